"""What holds for both shard formats and every codec.

space = Space.create(CacheRoot(folder), replace(spec, container="webdataset"), {})
for sample in webdataset.WebDataset(str(space.paths.shard("image", 0)), shardshuffle=False).decode():
    sample["full.npy"], sample["full.json"]
"""

from __future__ import annotations

import gc as garbage
import io
import json
import os
import shutil
import sys
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import webdataset

from cache import gc
from cache.errors import CorruptError
from cache.format import codec, tar_shard
from cache.format.codec import CODECS
from cache.format.spec import CONTAINERS
from cache.maintenance.checks import check_shard, verify
from cache.maintenance.repair import Repair
from cache.store.commits import commit_bytes, read_commit
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.space import Space
from cache.store.writer import ShardWriter
from tests.support import faults, trained_runs
from tests.support.encode_jobs import draw, encode
from tests.support.faults import garble, struck
from tests.support.spaces import SLOTS, features, fill, key, make_space, row
from train.metrics import read_metrics
from train.run import main as train_main

pytestmark = pytest.mark.slow


FRAMES = {0: "t:0", 1: "t:500000", 2: "t:1000000"}


@pytest.fixture(params=CONTAINERS)
def container(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=CODECS)
def codec_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def space(tmp_path: Path, codec_name: str, container: str) -> Space:
    return full(tmp_path / "cache", codec_name, container)


TOKENS = {"image": 36, "frame": 9}
"""Tokens of a row: int8 and int4 images have a mean token."""


def full(folder: Path, codec_name: str, container: str) -> Space:
    """Return a space with a full shard of images, a shard of two images, and a video of three frames."""
    space = make_space(folder, codec_name, container, image_size=12)
    fill(space, range(SLOTS))
    fill(space, [5, 4])
    video = ShardWriter(space, "frame", 0)
    for number, view in FRAMES.items():
        time_s = 0.04 + number / 2
        video.append(key(9), view, row(number, "frame", space.spec), time_s=time_s, error=0.004)
    video.commit()
    space.grow("image")
    space.grow("frame")
    return space


IMAGES = {**{number: number for number in range(SLOTS)}, 5: SLOTS, 4: SLOTS + 1}
"""Number of an image -> its row."""


# ---- written, read


def test_rows_are_read_one_by_one_and_in_runs(space: Space) -> None:
    reader = FeatureReader(space.paths)
    numbers = list(IMAGES)
    rows = reader.lookup("image", [key(number) for number in numbers])
    assert rows.tolist() == list(IMAGES.values())
    assert reader.lookup("image", [key(99)]).tolist() == [-1]
    for order in (numbers, numbers[::-1], [4, 0, 1, 5, 3, 2], [2]):
        out = np.empty((len(order), space.spec.row_bytes("image")), np.uint8)
        reader.read_into("image", np.array([IMAGES[number] for number in order]), out)
        for number, stored in zip(order, out, strict=True):
            assert stored.tobytes() == row(number, spec=space.spec).tobytes()
    for number, view in FRAMES.items():
        expected = codec.unpack(
            row(number, "frame", space.spec), space.spec.codec, TOKENS["frame"], 64
        )
        np.testing.assert_array_equal(reader.read("frame", key(9), view), expected)
    video = reader.lookup_pairs("frame", [key(9)] * 3, list(FRAMES.values()))
    assert reader.times("frame", video).tolist() == [0.04, 0.54, 1.04]


def test_the_logical_hash_does_not_depend_on_the_format(tmp_path: Path, codec_name: str) -> None:
    made = [full(tmp_path / name, codec_name, name) for name in CONTAINERS]
    hashes = {FeatureReader(space.paths).logical_hash() for space in made}
    assert len({space.spec.fingerprint for space in made}) == len(CONTAINERS)
    reports = [verify(CacheRoot(tmp_path / name), deep=True) for name in CONTAINERS]
    assert {report.spaces[0].logical_hash for report in reports} == hashes
    assert len(hashes) == 1


def test_an_intact_space_has_no_findings(space: Space) -> None:
    report = verify(CacheRoot(space.paths.root.parents[1]), deep=True)
    assert report.all_findings == []
    assert report.spaces[0].rows == {"image": 6, "frame": 3}
    sizes = [path.stat().st_size for path in space.paths.root.rglob("c/*/**/*") if path.is_file()]
    assert report.spaces[0].nbytes == sum(sizes)


def test_sizes_are_those_of_the_geometry(space: Space) -> None:
    for kind, number, rows in (("image", 0, SLOTS), ("image", 1, 2), ("frame", 0, 3)):
        geometry = space.info.geometry(kind)
        data = space.paths.shard(kind, number).read_bytes()
        assert len(data) == geometry.file_bytes(rows)
        assert geometry.gap_bytes == geometry.slot_bytes - geometry.row_bytes
        commit = read_commit(space.paths, space.info, kind, number)
        assert data.endswith(geometry.tail_with_crc(commit.table.num_rows)[0])
    for number, at in IMAGES.items():
        shard, slot = divmod(at, SLOTS)
        start = space.info.geometry("image").row_offset(slot)
        data = space.paths.shard("image", shard).read_bytes()
        assert data[start:].startswith(row(number, spec=space.spec).tobytes())


def test_equal_rows_make_equal_files(tmp_path: Path, codec_name: str, container: str) -> None:
    """A shard contains no time, host or user."""
    first, again = (full(tmp_path / name, codec_name, container) for name in "ab")
    shards = [path.relative_to(first.paths.root) for path in first.paths.root.rglob("c/**/*")]
    files = [path for path in shards if (first.paths.root / path).is_file()]
    assert len(files) == 3
    for path in files:
        assert (first.paths.root / path).read_bytes() == (again.paths.root / path).read_bytes()


# ---- damage


@pytest.mark.soak_counted
def test_every_flipped_bit_of_a_shard_is_found_and_never_returned(
    space: Space, soak: Callable[[int, int], int]
) -> None:
    """Including headers, padding and the end of the tar. Every 101st byte here, every byte in `make soak`."""
    clean = FeatureReader(space.paths).logical_hash()
    path = space.paths.shard("image", 1)
    commit = read_commit(space.paths, space.info, "image", 1)
    geometry = space.info.geometry("image")
    starts = [geometry.row_offset(slot) for slot in range(commit.table.num_rows)]
    stored = {at for start in starts for at in range(start, start + geometry.row_bytes)}
    data = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for at in range(0, len(data), soak(101, 1)):
            os.pwrite(file.fileno(), bytes([data[at] ^ 1 << at % 8]), at)
            findings, _ = check_shard(
                space.paths, space.info, "image", commit, True, lambda _: None
            )
            assert [finding.path for finding in findings] == [str(path)], f"byte {at}"
            if at % 5 == 0 and at in stored:
                with pytest.raises(CorruptError, match="checksum"):
                    FeatureReader(space.paths).logical_hash()
            elif at % 5 == 0:
                assert FeatureReader(space.paths).logical_hash() == clean
            os.pwrite(file.fileno(), data[at : at + 1], at)
    assert not verify(CacheRoot(space.paths.root.parents[1]), deep=True).broken


def test_a_shard_of_the_wrong_length_is_not_read(space: Space) -> None:
    path = space.paths.shard("image", 0)
    path.write_bytes(path.read_bytes()[:-1])
    reader = FeatureReader(space.paths)
    with pytest.raises(CorruptError, match="bytes, not"):
        reader.read("image", key(0))
    path.unlink()
    with pytest.raises(CorruptError, match="missing"):
        FeatureReader(space.paths).read("image", key(0))


def test_verify_names_a_file_that_no_commit_names(space: Space) -> None:
    beside = space.paths.array("image") / "notes.txt"
    beside.write_text("mine")
    (finding,) = verify(CacheRoot(space.paths.root.parents[1]), deep=True).all_findings
    assert finding.path == str(beside)
    assert (finding.what, finding.broken) == ("no commit names it", False)


# ---- crashes


def test_a_kill_at_any_system_call_leaves_a_valid_webdataset_space(tmp_path: Path) -> None:
    """tests/integration/cache/test_crash.py does this for Zarr."""
    space = make_space(tmp_path / "cache", container="webdataset")
    fill(space, [1, 2])
    space.grow("image")
    shutil.copytree(tmp_path / "cache", tmp_path / "whole")
    faults.write(CacheRoot(tmp_path / "whole"), [])
    whole = FeatureReader(tmp_path / "whole" / "spaces" / space.paths.name).logical_hash()
    seen = []
    for copy in struck(tmp_path, "write", "kill"):
        root = CacheRoot(Path(copy["folder"]))
        left = Space.open(root.space(space.paths.name))
        keys = left.keys("image")
        assert {(key(1), "full"), (key(2), "full")} <= keys
        seen.append(len(keys))
        faults.write(root, [])
        report = verify(root, deep=True)
        assert not report.broken
        assert report.spaces[0].logical_hash == whole
    assert seen == sorted(seen), "a visible row stays visible"
    assert set(seen) == {2, 6, 7}, "all rows of a shard appear together"


def test_gc_removes_only_uncommitted_shards(
    space: Space, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = FeatureReader(space.paths).logical_hash()
    ShardWriter(space, "image", 2).append(key(9), "full", row(9, spec=space.spec))
    fill(space, [8])
    space.paths.commit("image", 3).unlink()
    root = space.paths.root.parents[1]
    monkeypatch.setattr(sys, "argv", ["cache.gc", "--features", str(root), "--delete"])
    gc.main()
    capsys.readouterr()
    assert verify(CacheRoot(root), deep=True).all_findings == []
    assert FeatureReader(space.paths).logical_hash() == clean
    assert [space.paths.shard("image", number).exists() for number in range(4)] == (
        [True, True, False, False]
    )


def test_repair_keeps_the_intact_rows(tmp_path: Path, container: str, codec_name: str) -> None:
    space = make_space(tmp_path, codec_name, container=container)
    for numbers in ([0, 1, 2, 3], [4, 5], [6]):
        fill(space, numbers)
    space.grow("image")
    shards = [space.paths.shard("image", number) for number in range(3)]
    geometry = space.info.geometry("image")
    garble(shards[0], geometry.row_offset(1) + 8)
    garble(shards[0], geometry.row_offset(2) + geometry.row_bytes, 4)  # next to a row, which stays
    os.truncate(shards[1], geometry.row_offset(1) + 5)
    garble(space.paths.commit("image", 2), 100)
    root = CacheRoot(tmp_path)
    report = Repair(root, deep=True, tell=lambda _: None, progress=lambda _: None).run(None)
    assert not report.broken
    assert verify(root, deep=True).all_findings == []
    kept = {key(number) for number in (0, 2, 3, 4)}
    assert {name for name, _ in space.keys("image")} == kept
    fill(space, [1, 5, 6])
    space.grow("image")
    whole = make_space(tmp_path / "whole", codec_name, container=container)
    for number in range(7):
        fill(whole, [number])
    reader = FeatureReader(space.paths)
    assert reader.logical_hash() == FeatureReader(whole.paths).logical_hash()


# ---- a whole job, and training on it


def test_an_encode_job_makes_equal_rows_in_both_formats(tmp_path: Path) -> None:
    draw(tmp_path / "images", 5)
    spec = f"folder:{tmp_path / 'images'}"
    made = {name: encode(tmp_path / name, spec, container=name) for name in CONTAINERS}
    hashes = {result.reader.logical_hash() for result in made.values()}
    assert len(hashes) == 1
    for name, result in made.items():
        assert (result.code, result.reader.rows("image")) == (0, 5)
        assert result.reader.spec.container == name
        assert not verify(result.root, deep=True).broken
        again = encode(tmp_path / name, spec, container=name)
        assert not again.plan.todo
        assert again.plan.reused == 5
    both = encode(tmp_path / "zarr", spec, container="webdataset")
    assert len(both.root.space_names()) == 2, "each format has its own space"


def test_training_does_not_depend_on_the_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are equal to the bit, and a run on one format continues on the other."""
    monkeypatch.chdir(tmp_path)
    fixed = ["--llm", "random:qwen3-tiny", "--hardware", "cpu", "--device", "cpu"]
    fixed += ["--batch-size", "4", "--held-out", "0", "--max-steps", "3"]

    def losses(container: str, run: str, *more: str) -> list[float]:
        at = ["--features", str(roots[container].path), "--run", run]
        assert train_main([*at, *fixed, *more]) == 0
        lines = read_metrics(tmp_path / "runs" / run / "stage1")
        return [line["loss"] for line in lines if "loss" in line]

    roots = {"zarr": trained_runs.make(tmp_path / "a", 16)}
    roots["webdataset"] = trained_runs.make(tmp_path / "b", 16, container="webdataset")
    first, second = (losses(container, container) for container in CONTAINERS)
    assert first == second
    assert len(first) == 3
    assert losses("webdataset", "on", "--from", "zarr") == losses("zarr", "over", "--from", "zarr")


# ---- readers of other projects


def test_tensorstore_reads_fp16_zarr_spaces(tmp_path: Path) -> None:
    space = full(tmp_path, "fp16", "zarr")
    reader = FeatureReader(space.paths)
    store = {"driver": "file", "path": str(space.paths.array("image"))}
    images = tensorstore.open({"driver": "zarr3", "kvstore": store}, read=True).result()
    for number, at in IMAGES.items():
        np.testing.assert_array_equal(images[at].read().result(), reader.read("image", key(number)))


def stream(*shards: Path) -> list[dict[str, Any]]:
    """Return the samples that the webdataset library makes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves files open
        samples = list(webdataset.WebDataset(list(map(str, shards)), shardshuffle=False).decode())
        garbage.collect(1)
    return samples


def values(member: np.ndarray, about: dict[str, Any]) -> np.ndarray:
    """Return the features of a member, as the documentation describes it."""
    if about["codec"] == "fp16":
        return member
    return codec.unpack(member, about["codec"], about["tokens"], about["width"])


def test_the_webdataset_library_streams_a_space(tmp_path: Path, codec_name: str) -> None:
    space = full(tmp_path, codec_name, "webdataset")
    reader = FeatureReader(space.paths)
    samples = stream(*(space.paths.shard("image", number) for number in (0, 1)))
    assert [sample["__key__"] for sample in samples] == [key(number) for number in IMAGES]
    for number, sample in zip(IMAGES, samples, strict=True):
        about = sample["full.json"]
        assert (about["key"], about["view"], about["time_s"]) == (key(number), "full", None)
        assert about["codec"] == codec_name
        assert (about["tokens"], about["width"]) == (TOKENS["image"], 64)
        assert about["relative_error"] == 0.005
        ours = reader.read("image", key(number))
        theirs = values(sample["full.npy"], about)
        assert theirs.dtype == np.float16
        np.testing.assert_array_equal(theirs, ours)
        expected = features(number, spec=space.spec)
        np.testing.assert_allclose(theirs, expected, atol=0.03 if codec_name != "int4" else 1)


def test_the_views_of_a_video_are_one_sample(tmp_path: Path, codec_name: str) -> None:
    space = full(tmp_path, codec_name, "webdataset")
    reader = FeatureReader(space.paths)
    (sample,) = stream(space.paths.shard("frame", 0))
    assert sample["__key__"] == key(9)
    members = {name for name in sample if not name.startswith("__")}
    assert members == {f"{v}.{end}" for v in FRAMES.values() for end in ("npy", "json")}
    for view in FRAMES.values():
        theirs = values(sample[f"{view}.npy"], sample[f"{view}.json"])
        np.testing.assert_array_equal(theirs, reader.read("frame", key(9), view))
    assert sample["t:500000.json"]["time_s"] == 0.54


@pytest.mark.parametrize("view", ["full", "t:3600000000", "crop:10000,10000,20000,20000", "v" * 30])
def test_every_view_has_a_member_name(tmp_path: Path, view: str) -> None:
    """webdataset and tarfile read names with commas, colons and the maximum length."""
    space = make_space(tmp_path, container="webdataset")
    fill(space, [1], view=view)
    path = space.paths.shard("image", 0)
    (sample,) = stream(path)
    assert sample[f"{view}.npy"].tobytes() == row(1).tobytes()
    assert sample[f"{view}.json"]["view"] == view
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        assert [m.name for m in members] == [f"{key(1)}.{view}.npy", f"{key(1)}.{view}.json"]
        assert not tar.pax_headers
        for member in members:
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
            assert not member.pax_headers
        data = tar.extractfile(members[0])
        assert data is not None
        saved = io.BytesIO()
        np.save(saved, row(1))
        assert data.read() == saved.getvalue(), "the bytes that numpy.save writes"


@pytest.mark.parametrize("nbytes", [0, 1, 512, 1_179_776, 8**11 - 1])
def test_headers_equal_those_of_tarfile(nbytes: int) -> None:
    for name in ("a.npy", f"{key(1)}.t:0.json", "n" * 100):
        info = tarfile.TarInfo(name)
        info.size, info.mode = nbytes, 0o644
        expected = info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
        assert tar_shard.member_header(name, nbytes) == expected


@pytest.mark.parametrize("view", ["v" * 31, "T:5", "a/b", "", ".full", "größe", "a b", "full\n"])
def test_a_view_that_a_tar_cannot_name_is_refused(tmp_path: Path, view: str) -> None:
    space = make_space(tmp_path, container="webdataset")
    writer = ShardWriter(space, "image", 0)
    with pytest.raises(ValueError, match="view"):
        writer.append(key(1), view, row(1))
    assert writer.rows == 0


def test_a_parquet_reader_finds_rows_by_their_offset(tmp_path: Path, codec_name: str) -> None:
    """Random access to a tar needs nothing but its commit file."""
    import pyarrow.parquet as pq

    space = full(tmp_path, codec_name, "webdataset")
    size = space.spec.row_bytes("image")
    for shard in (0, 1):
        data = space.paths.shard("image", shard).read_bytes()
        for line in pq.read_table(space.paths.commit("image", shard)).to_pylist():
            number = next(n for n in IMAGES if key(n) == line["key"].hex())
            stored = data[line["offset"] : line["offset"] + size]
            assert stored == row(number, spec=space.spec).tobytes()
    zarr_space = full(tmp_path / "z", codec_name, "zarr")
    assert "offset" not in pq.read_schema(zarr_space.paths.commit("image", 0)).names


def test_a_commit_with_wrong_offsets_is_refused(tmp_path: Path) -> None:
    space = full(tmp_path, "int8", "webdataset")
    info, path = space.info, space.paths.commit("image", 1)
    good = read_commit(space.paths, info, "image", 1)
    columns = info.geometry("image").commit_columns(2)

    def write(**own: Any) -> None:
        table = good.table
        for name, column in own.items():
            table = table.append_column(name, [column])
        names = {"fingerprint": space.spec.fingerprint, "array": "image", "shard": 1}
        data = commit_bytes(table, **names, nbytes=good.nbytes, index_crc=good.index_crc)
        path.write_bytes(data)

    write(**columns)
    assert read_commit(space.paths, info, "image", 1).table.equals(good.table)
    write(offset=columns["offset"] + 512)
    with pytest.raises(CorruptError, match="not where the shards"):
        read_commit(space.paths, info, "image", 1)
    write()
    with pytest.raises(CorruptError, match="its columns are key fixed_size_binary"):
        read_commit(space.paths, info, "image", 1)


def test_a_webdataset_space_has_only_tars(tmp_path: Path) -> None:
    space = full(tmp_path, "int8", "webdataset")
    names = [path.name for path in (space.paths.root / "features").rglob("*") if path.is_file()]
    assert sorted(names) == ["frame-00000000.tar", "image-00000000.tar", "image-00000001.tar"]
    moved = tmp_path / "moved"
    shutil.copytree(space.paths.root, moved)
    assert FeatureReader(moved).logical_hash() == FeatureReader(space.paths).logical_hash()
    assert json.loads(space.paths.space_json.read_text())["spec"]["container"] == "webdataset"
