"""A converted space equals an encoded one: name, stored bytes and logical hash.

python -m encode.run --dataset folder:photos --codec fp16     # keep what later codecs need
python -m cache.convert --codec int8 --pool 2                   # in seconds, without the encoder
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cache import convert
from cache.errors import CacheError, LostProcessError
from cache.format.codec import CODECS
from cache.maintenance import compiled_codec, convert_rows, copy_rows, processes
from cache.maintenance.checks import verify
from cache.maintenance.convert_rows import Conversion, pool
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.space import Space
from cache.store.writer import ShardWriter
from configs import UserError
from encode.worker.config import WorkerConfig
from model.vision.config import DemoTowerConfig
from model.vision.encoder import _pool, rebuild_encoder
from tests.support.encode_jobs import TINY, draw, encode
from tests.support.faults import garble
from tests.support.spaces import SPEC, committed_rows, fill, key, make_space
from tests.support.videos import make_video

pytestmark = pytest.mark.slow


TOWER = DemoTowerConfig(image_size=112, patch_size=14, width=64, depth=1, heads=2)


def config_with(image: int, frame: int) -> WorkerConfig:
    """Return a config that computes in float32, so that rounding to float16 changes values."""
    config = replace(TINY, tower=TOWER, compute_dtype="float32", pool_image=image, pool_frame=frame)
    return WorkerConfig(encoder=config, device="cpu", commit_every_s=1e9, max_frames=6)


def run(folder: Path, *argv: Any) -> int:
    sys.argv = ["cache.convert", "--features", str(folder), *map(str, argv)]
    return convert.main()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media") / "photos"
    draw(folder, 6)
    make_video(folder / "video.mp4", frames=30, fps=Fraction(10))
    return folder


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache with one fp16 space, not pooled."""
    folder = tmp_path_factory.mktemp("fp16") / "cache"
    assert encode(folder, f"folder:{photos}", codec="fp16", config=config_with(1, 1)).code == 0
    return folder


def hashes(folder: Path) -> dict[str, str | None]:
    report = verify(CacheRoot(folder), deep=True)
    assert not report.broken, report.all_findings
    return {space.name: space.logical_hash for space in report.spaces}


POOLS = ((1, 1), (2, 1), (4, 2))
MADE = [(name, *pools) for name in CODECS for pools in POOLS if (name, pools) != ("fp16", (1, 1))]


@pytest.mark.parametrize(("name", "image", "frame"), MADE)
def test_a_converted_space_equals_an_encoded_one(
    whole: Path, photos: Path, tmp_path: Path, name: str, image: int, frame: int
) -> None:
    shutil.copytree(whole, tmp_path / "cache")
    words = ("--codec", name, "--pool", image, "--frame-pool", frame)
    assert run(tmp_path / "cache", *words) == 0
    source, config = f"folder:{photos}", config_with(image, frame)
    encoded = encode(tmp_path / "encoded", source, codec=name, config=config)
    made = hashes(tmp_path / "cache")
    assert made.items() >= hashes(tmp_path / "encoded").items() and len(made) == 2
    # The commits agree, too. The encoder measures errors before rounding to float16. Convert measures the
    # codec's after it, and adds that of rounding what is pooled.
    theirs = Space.open(encoded.paths)
    ours = Space.open(CacheRoot(tmp_path / "cache").space(encoded.paths.name))
    for array in ("image", "frame"):
        rows = [
            sorted(committed_rows(space, array).to_pylist(), key=lambda r: (r["key"], r["view"]))
            for space in (ours, theirs)
        ]
        rounding = 4e-4
        assert len(rows[0]) == 6
        for one, other in zip(*rows, strict=True):
            for field in ("key", "view", "time_s"):
                assert one[field] == other[field]
            assert one["error"] == pytest.approx(other["error"], abs=rounding)
    # `encode.run` finds nothing left to do in the converted space, and can build its encoder.
    again = encode(tmp_path / "cache", source, codec=name, config=config)
    assert not again.plan.todo and again.paths.name == encoded.paths.name
    reader = FeatureReader(again.paths)
    assert rebuild_encoder(reader.load, reader.spec, device="cpu").config.pool_image == image
    assert reader.load["converted_from"].startswith(f"{reader.spec.encoder}-fp16-")


@pytest.mark.parametrize("workers", [1, 2])
def test_many_rows_are_packed_by_compiled_loops(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """They store the same bytes. What counts is how many rows each process has."""
    compiled: list[bool] = []
    real = copy_rows.Converters

    def converters(conversion: Conversion, **words: Any) -> Any:
        compiled.append(conversion.compiled)
        return real(conversion, **words)

    monkeypatch.setattr(copy_rows, "Converters", converters)
    spec = FeatureReader(CacheRoot(whole).space(next(iter(hashes(whole))))).spec
    worth = 6 * spec.tokens("image") * spec.width // workers
    stored = []
    for limit in (worth + 1, worth):
        monkeypatch.setattr(convert_rows, "WORTH_VALUES", limit)
        folder = tmp_path / str(limit)
        shutil.copytree(whole, folder)
        for words in (("--codec", "int8"), ("--codec", "int4", "--pool", 2), ("--pool", 2)):
            run(folder, *words, "--workers", workers)
        stored.append(hashes(folder))
    assert compiled == 6 * [False] + [*5 * [True], False], "frames of the third stay as they are"
    assert stored[0] == stored[1] and len(stored[0]) == 4


WRONG = """
import sys
sys.path[:] = sys.argv[1:]
from cache.maintenance import compiled_codec, processes
real = compiled_codec.quantise
def wrong(x, codec):
    rows, errors = real(x, codec)
    rows[0, -1] ^= 1
    return rows, errors
compiled_codec.quantise = wrong
processes.serve()
"""


def test_compiled_loops_that_give_other_bytes_are_not_used(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those were that two processes had kept in one place at a time."""
    conversion = Conversion(tokens=36, width=64, window=1, codec="int8", compiled=True)
    with monkeypatch.context() as patch:
        patch.setattr(processes, "PROGRAM", WRONG)
        with (
            processes.Converters(conversion, batch_rows=1, slots=1, workers=2) as converters,
            pytest.raises(
                LostProcessError, match="failed: CacheError: loops compiled by numba give"
            ),
        ):
            converters.convert(0, 1)
    real = compiled_codec.quantise

    def wrong(x: Any, name: str) -> Any:
        rows, errors = real(x, name)
        rows[0, -1] ^= 1
        return rows, errors

    monkeypatch.setattr(convert_rows, "WORTH_VALUES", 0)
    monkeypatch.setattr(compiled_codec, "quantise", wrong)
    shutil.copytree(whole, tmp_path / "cache")
    with pytest.raises(CacheError, match="give other bytes than numpy: remove those"):
        run(tmp_path / "cache", "--codec", "int8", "--workers", 1)
    made = next((tmp_path / "cache" / "spaces").glob("*int8*"))
    assert not list(made.rglob("*.parquet")), "nothing is stored"


def test_without_numba_numpy_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(SPEC, codec="fp16")
    assert Conversion.between(spec, SPEC, "image", rows=1e9).compiled
    assert not Conversion.between(spec, SPEC, "image", rows=1).compiled, "it is not worth it"
    assert not Conversion.between(spec, spec, "image", rows=1e9).compiled, "nothing is packed"
    monkeypatch.setitem(sys.modules, "cache.maintenance.compiled_codec", None)
    assert not Conversion.between(spec, SPEC, "image", rows=1e9).compiled


def test_another_shard_format_holds_equal_rows(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "cache")
    assert run(tmp_path / "cache", "--format", "webdataset") == 0
    made = hashes(tmp_path / "cache")
    assert len(made) == 2 and len(set(made.values())) == 1


def test_only_missing_rows_are_converted(
    whole: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    run(folder, "--codec", "int8", "--pool", "2")
    run(folder, "--codec", "int8", "--pool", "2")
    out = capsys.readouterr().out
    assert "12 of 12 rows to convert" in out and "0 of 12 rows to convert" in out
    shutil.copytree(photos, tmp_path / "more")
    draw(tmp_path / "more", 3, first=50)
    source = f"folder:{tmp_path / 'more'}"
    encode(folder, source, codec="fp16", config=config_with(1, 1))
    capsys.readouterr()
    run(folder, "--codec", "int8", "--pool", "2")
    assert "3 of 15 rows to convert" in capsys.readouterr().out
    encode(tmp_path / "encoded", source, codec="int8", config=config_with(2, 1))
    assert hashes(folder).items() >= hashes(tmp_path / "encoded").items()


@pytest.fixture
def fine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make batches of one to three rows."""
    monkeypatch.setattr(
        copy_rows, "BATCH_BYTES", 3 * replace(SPEC, codec="fp16").row_bytes("image")
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_conversion_continues(
    tmp_path: Path, fine: None, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """The second run keeps committed shards and ignores an uncommitted one."""
    space = make_space(tmp_path, "fp16")
    for start in range(0, 40, 4):
        fill(space, range(start, start + 4))
    root, small = CacheRoot(tmp_path), 4 * SPEC.row_bytes("image")
    Space.create(root, SPEC, {}, shard_bytes=small)
    calls, real = itertools.count(1), os.pwritev
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", lambda *a: os._exit(9) if next(calls) == 13 else real(*a))
        words = (tmp_path, "--codec", "int8", "--workers", workers)
        process = multiprocessing.get_context("fork").Process(target=run, args=words)
        process.start()
        process.join()
    assert process.exitcode == 9
    committed = FeatureReader(root.space(SPEC.name)).rows("image")
    assert committed in range(4, 33, 4)  # each shard takes at least two calls
    assert run(tmp_path, "--codec", "int8") == 0
    killed = hashes(tmp_path)[SPEC.name]
    shutil.rmtree(tmp_path / "spaces" / SPEC.name)
    run(tmp_path, "--codec", "int8")
    assert hashes(tmp_path)[SPEC.name] == killed


# ---- several processes


def images(folder: Path) -> Space:
    """Return an fp16 space of 30 images, in 8 shards."""
    space = make_space(folder, "fp16")
    for start in range(0, 30, 4):
        fill(space, range(start, min(start + 4, 30)))
    return space


def damaged_rows(folder: Path) -> Space:
    """Return it with a video of 6 frames, one image and one frame damaged."""
    space = images(folder)
    for number in range(6):
        fill(space, [100], "frame", f"t:{number}00000")
    geometry = space.info.geometry("image")
    garble(space.paths.shard("image", 3), geometry.row_offset(1))
    garble(space.paths.shard("frame", 2), space.info.geometry("frame").row_offset(0))
    return space


def stored(folder: Path) -> dict[str, bytes]:
    """Return the files of the converted space, except for its index, which has times, by name."""
    [space] = [path for path in (folder / "spaces").iterdir() if "fp16" not in path.name]
    names = (p for p in space.rglob("*") if p.is_file())
    return {str(p.relative_to(space)): p.read_bytes() for p in names if p.parent.name != "index"}


@pytest.mark.parametrize("container", ["zarr", "webdataset"])
def test_any_number_of_processes_writes_the_same_files(
    tmp_path: Path, fine: None, container: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {}
    for workers in (1, 2, 4) if container == "zarr" else (1, 2):
        folder = tmp_path / str(workers)
        damaged_rows(folder)
        Space.create(
            CacheRoot(folder),
            replace(SPEC, codec="int4", container=container),
            {},
            shard_bytes=8 * replace(SPEC, codec="int4").row_bytes("image"),
        )
        words = ("--codec", "int4", "--format", container, "--workers", workers)
        assert run(folder, *words) == 1
        assert "2 damaged rows were not copied" in capsys.readouterr().out
        files[workers] = stored(folder)
    assert len(files[1]) > 8
    for workers, found in files.items():
        assert found == files[1], workers


def test_a_process_that_dies_is_one_error_with_the_command_that_continues(
    tmp_path: Path, fine: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images(tmp_path)
    real, started = processes._Process, itertools.count(1)

    class Dying(real):  # type: ignore[misc, valid-type]
        def convert(self, slot: int, count: int) -> float:
            if next(started) == 5:
                self._popen.kill()
            return super().convert(slot, count)

    with monkeypatch.context() as patch:
        patch.setattr(processes, "_Process", Dying)
        with pytest.raises(CacheError, match="converts rows was killed") as caught:
            run(tmp_path, "--codec", "int8", "--workers", 2)
    text = str(caught.value)
    assert "\n" not in text and "as the system does when memory is full" in text
    again = text.partition("is kept: ")[2].split()
    assert again[:3] == ["python", "-m", "cache.convert"] and again[-2:] == ["--workers", "1"]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", again[2:])
    assert convert.main() == 0
    whole = hashes(tmp_path)[SPEC.name]
    shutil.rmtree(tmp_path / "spaces" / SPEC.name)
    run(tmp_path, "--codec", "int8", "--workers", 1)
    assert hashes(tmp_path)[SPEC.name] == whole


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    conversion = Conversion(tokens=10, width=64, window=2, codec="int8")
    with (
        processes.Converters(conversion, batch_rows=1, slots=1, workers=2) as converters,
        pytest.raises(
            LostProcessError, match=r"failed: ValueError: 10 patches in windows of 2 x 2"
        ),
    ):
        converters.convert(0, 1)


def test_the_first_signal_commits_what_is_converted(
    tmp_path: Path, fine: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images(tmp_path)
    real, batches = copy_rows._Filler.write, itertools.count(1)

    def write(filler: Any) -> None:
        real(filler)
        if next(batches) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(copy_rows._Filler, "write", write)
        with pytest.raises(SystemExit) as caught:
            run(tmp_path, "--codec", "int8", "--workers", 2)
    assert caught.value.code == 130
    said = capsys.readouterr().out
    left = 30 - FeatureReader(CacheRoot(tmp_path).space(SPEC.name)).rows("image")
    assert 0 < left < 30
    assert f"stopped: {left} rows are left" in said and f": {30 - left} rows" in said
    assert run(tmp_path, "--codec", "int8") == 0
    assert f"{left} of 30 rows to convert" in capsys.readouterr().out


def test_memory_does_not_grow_with_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only as many batches exist as there are slots, however slowly they are written."""
    space = images(tmp_path)
    monkeypatch.setattr(copy_rows, "BATCH_BYTES", 1)
    reader, real, most = FeatureReader(space.paths), copy_rows._read, 0
    begun: list[int] = []

    def read(*words: Any) -> Any:
        begun.append(1)
        return real(*words)

    monkeypatch.setattr(copy_rows, "_read", read)
    conversion = Conversion.between(reader.spec, SPEC, "image")
    batches = copy_rows._converted(reader, "image", np.arange(30), conversion, 1)
    for used, batch in enumerate(batches, 1):
        assert len(batch.rows) == 1
        time.sleep(0.002)
        most = max(most, len(begun) - used)
    assert used == 30 and 0 < most <= 2 * copy_rows._threads(1)


def test_a_row_with_nan_or_infinity_is_reported_as_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = make_space(tmp_path, "fp16")
    writer = ShardWriter(space, "image", space.next_shard("image"))
    for number, bits in enumerate((0x7C00, 0xFC00, 0x7E00, 0xFBFF)):
        values = np.zeros(256, np.uint16)
        values[number * 80] = bits
        writer.append(key(number), "full", values.view(np.uint8))
    writer.commit()
    assert run(tmp_path, "--codec", "int4") == 1
    said = capsys.readouterr().out
    assert "3 damaged rows were not copied" in said and "row 0 has NaN or Inf" in said
    name = next(n for n in CacheRoot(tmp_path).space_names() if "int4" in n)
    reader = FeatureReader(CacheRoot(tmp_path).space(name))
    assert [reader.contains("image", key(n)) for n in range(4)] == [False, False, False, True]


def test_the_progress_says_what_bounds_it() -> None:
    def bound(waited: float, written: float, read: float, convert: float, workers: int) -> str:
        pace = copy_rows._Pace(workers)
        pace._waited_s, pace._written_s, pace._read_s, pace._convert_s = (
            waited,
            written,
            read,
            convert,
        )
        return pace.bound

    assert bound(0, 0, 0, 0, 2) == ""
    assert bound(1, 2, 1, 1, 2) == "writing"
    assert bound(5, 1, 1, 10, 2) == "packing"
    assert bound(5, 1, 20, 1, 2) == "reading"


def test_fewer_processes_than_one_are_refused() -> None:
    with pytest.raises(ValueError, match="--workers 0: must be 1 or more"):
        convert.Options(workers=0)


def test_damaged_rows_are_reported_and_not_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = make_space(tmp_path, "fp16")
    fill(space, [1, 2, 3])
    garble(space.paths.shard("image", 0), space.info.geometry("image").row_offset(2))
    assert run(tmp_path, "--codec", "int8") == 1
    assert "1 damaged rows were not copied" in capsys.readouterr().out
    name = next(n for n in CacheRoot(tmp_path).space_names() if "int8" in n)
    reader = FeatureReader(CacheRoot(tmp_path).space(name))
    assert [reader.contains("image", key(n)) for n in (1, 2, 3)] == [True, True, False]


HALVES = hnp.arrays(
    np.float16, (2, 36, 64), elements=st.floats(-65504, 65504, width=16, allow_subnormal=True)
)


@settings(max_examples=40, deadline=None)
@given(x=HALVES, window=st.sampled_from([2, 3, 6]))
def test_pooling_in_numpy_equals_the_encoder_bit_for_bit(x: np.ndarray, window: int) -> None:
    ours = pool(x, window)
    theirs = _pool(torch.from_numpy(x).float(), window)[0].numpy()
    assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))
    side = 6 // window
    blocks = x.astype(np.float64).reshape(2, side, window, side, window, 64)
    mean = blocks.mean(axis=(2, 4)).reshape(2, side**2, 64)
    assert np.allclose(ours, mean, rtol=1e-5, atol=1e-2)


def test_the_encoder_clips_before_it_pools_and_keeps_nan_and_infinity() -> None:
    x = torch.zeros(3, 4, 64)
    x[0, 1, 0], x[1, 2, 3], x[2, 0, 5] = 1e6, float("nan"), -float("inf")
    pooled, clipped = _pool(x, 2)
    assert pooled[0, 0, 0] == 65504 / 4
    assert pooled[1, 0, 3].isnan() and pooled[2, 0, 5] == -float("inf")
    assert clipped.tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="5 patches in windows"):
        pool(np.zeros((1, 5, 64), np.float16), 2)


def test_conversions_that_would_differ_from_encoding_are_refused(tmp_path: Path) -> None:
    def refused(folder: str, match: str, *words: Any) -> None:
        with pytest.raises((UserError, CacheError), match=match) as caught:
            run(tmp_path / folder, *words)
        assert "\n" not in str(caught.value)

    refused("none", "no feature space under")
    fill(make_space(tmp_path / "lossy", "int8"), [1])
    refused("lossy", r"no fp16 space under .*encode.run .*--codec fp16", "--codec", "int8")
    words = ("--codec", "int8", "--space", "toy")
    refused("lossy", "is stored as int8, which is lossy", *words)
    fp16 = make_space(tmp_path / "fp16", "fp16")
    fill(fp16, [1])
    refused("fp16", "pool_image 3 does not divide", "--pool", "3")
    refused("fp16", r"has these options already; choose others: --codec")
    pooled = Space.create(CacheRoot(tmp_path / "pooled"), replace(fp16.spec, pool_image=2), {})
    fill(pooled, [1])
    refused("pooled", "its image rows are pooled 2 x 2 and rounded", "--pool", "1")
    fill(Space.create(CacheRoot(tmp_path / "fp16"), replace(fp16.spec, pool_image=2), {}), [1])
    refused("fp16", r"2 fp16 spaces under .*say which: --space .* \| ", "--codec", "int8")
