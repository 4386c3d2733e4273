"""Whole encode jobs in this process: what is encoded, reused and recorded as failed.

result = encode(folder / "cache", "folder:photos")      # tests.support.encode_jobs
result.reader.rows("image")                             # 14
result.failures()                                       # {"cut.png": ("decode", "...")}
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import re
import shutil
import threading
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cache.errors import DiskError
from cache.format.codec import pack, unpack
from cache.store.ledger import read_media
from cache.store.writer import ShardWriter
from configs import UserError
from configs.signals import Interrupts
from encode.errors import TooManyFailuresError
from encode.plan.probe import Probe
from encode.worker.config import WorkerConfig
from encode.worker.worker import Worker
from model.media import fit
from model.media.images import DecodedImage, decode_image
from model.vision.encoder import VisionEncoder, load_encoder
from tests.configs.screen import Terminal
from tests.support.encode_jobs import CONFIG, TINY, Result, SlowWorker, draw, encode

pytestmark = pytest.mark.slow


Encode = Callable[..., Result]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    draw(tmp_path / "photos", 14)
    return tmp_path / "photos"


@pytest.fixture
def job(photos: Path, tmp_path: Path) -> Encode:
    """Return a function that encodes the photos into one cache."""
    return partial(encode, tmp_path / "cache", f"folder:{photos}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def key_of(result: Result, name: str) -> str:
    key = result.ledger[name].key
    assert key is not None
    return key


def test_a_row_equals_the_features_of_its_image_encoded_alone(photos: Path, job: Encode) -> None:
    result = job(codec="fp16")
    encoder = load_encoder(TINY, device="cpu")
    assert result.code == 0
    assert result.reader.rows("image") == 14
    for path in photos.iterdir():
        image = decode_image(path.read_bytes())
        alone = encoder.encode(encoder.prepare(image)[None]).numpy()
        stored = result.reader.read("image", key_of(result, path.name))
        assert stored.tobytes() == pack(alone, "fp16").tobytes()
        record = result.ledger[path.name]
        assert (record.width, record.height, record.bytes) == (24, 24, path.stat().st_size)


def test_large_jpegs_are_decoded_at_a_reduced_scale_into_a_space_of_their_own(
    photos: Path, job: Encode
) -> None:
    """The ledger has the size of the whole image: points in pixels are divided by it."""
    draw(photos, 1, first=20, side=57)
    with Image.open(photos / "0020.png") as small:
        small.resize((227, 331)).save(photos / "large.jpg", quality=95)
    config = dataclasses.replace(CONFIG, encoder=dataclasses.replace(TINY, decode="reduced"))
    whole, reduced = job(codec="fp16"), job(codec="fp16", config=config)
    assert reduced.job.spec == dataclasses.replace(whole.job.spec, decode="reduced")
    assert reduced.paths != whole.paths and reduced.reader.rows("image") == 16
    encoder = load_encoder(config.encoder, device="cpu")
    for path in photos.iterdir():
        decoded = encoder.decode(path.read_bytes())
        alone = encoder.encode(encoder.prepare(decoded)[None]).numpy()
        key = key_of(reduced, path.name)
        stored, before = (one.reader.read("image", key) for one in (reduced, whole))
        assert stored.tobytes() == pack(alone, "fp16").tobytes()
        assert (stored.tobytes() == before.tobytes()) == (path.name != "large.jpg")
    record = reduced.ledger["large.jpg"]
    assert (record.width, record.height) == (227, 331)


def test_a_row_does_not_depend_on_the_other_images_of_its_batch(
    photos: Path, tmp_path: Path
) -> None:
    together = encode(tmp_path / "a", f"folder:{photos}")
    for path in sorted(photos.iterdir(), reverse=True):
        (tmp_path / "one").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "one")
        apart = encode(tmp_path / "b", f"folder:{tmp_path / 'one'}")
    assert apart.reader.logical_hash() == together.reader.logical_hash()
    assert apart.reader.rows("image") == 14


def files_below(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size)
        for p in sorted(folder.rglob("*"))
        if p.is_file() and "locks" not in p.parts
    }


def test_repeating_a_finished_job_touches_no_file_and_starts_no_worker(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], job: Encode
) -> None:
    (photos / "broken.jpg").write_bytes(b"no image")
    (photos / "metadata.jsonl").write_text(
        "".join(f'{{"file": "{n}"}}\n' for n in (*names(photos), "gone.png"))
    )
    first = job()
    assert len(first.failures()) == 2
    before = files_below(tmp_path / "cache")

    class Forbidden(Worker):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError("there is nothing to do")

    capsys.readouterr()
    again = job(worker_class=Forbidden)
    assert files_below(tmp_path / "cache") == before
    assert again.plan.todo == ()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("encoded=0 reused=14 failed=2 ")


def test_the_same_bytes_under_other_names_are_encoded_once(photos: Path, job: Encode) -> None:
    for i in range(5):
        shutil.copy(photos / "0003.png", photos / f"copy-{i}.png")
    result = job()
    assert result.reader.rows("image") == 14
    assert result.job._tracker.encoded == 14
    assert result.job._tracker.reused == 5
    keys = {result.ledger[f"copy-{i}.png"].key for i in range(5)}
    assert keys == {result.ledger["0003.png"].key}
    assert result.ledger["copy-0.png"].width == 24, "duplicates have a size, too"


def test_a_changed_file_with_its_old_time_stamp_is_encoded(
    photos: Path, tmp_path: Path, job: Encode
) -> None:
    before = job()
    target = photos / "0005.png"
    status = target.stat()
    (other,) = draw(tmp_path / "other", 1, first=99)
    data = other.read_bytes()[: status.st_size].ljust(status.st_size, b"\0")
    with target.open("r+b") as file:  # same inode, same size, and the old time put back
        file.write(data)
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert target.stat().st_size == status.st_size
    after = job()
    assert [Path(t.source).name for t in after.plan.todo] == ["0005.png"]
    assert key_of(after, "0005.png") != key_of(before, "0005.png")
    assert after.reader.rows("image") == 15, "other samples may refer to the old row"


def test_a_touched_moved_or_rehashed_file_is_not_encoded_again(photos: Path, job: Encode) -> None:
    job()
    os.utime(photos / "0001.png")
    (photos / "0002.png").rename(photos / "moved.png")
    again = job()
    assert len(again.plan.todo) == 2
    assert (again.job._tracker.encoded, again.job._tracker.reused) == (0, 2)
    assert job().plan.todo == ()
    all_again = job(rehash=True)
    assert (all_again.job._tracker.encoded, all_again.job._tracker.reused) == (0, 14)


def test_bad_images_are_recorded_and_the_job_succeeds(photos: Path, job: Encode) -> None:
    whole = (photos / "0000.png").read_bytes()
    (photos / "cut.png").write_bytes(whole[: len(whole) // 2])
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "page.jpg").write_bytes(b"<html>404</html>")
    os.mkfifo(photos / "pipe.png")
    lines = [*names(photos), "never-there.png"]
    (photos / "metadata.jsonl").write_text("".join(f'{{"file": "{n}"}}\n' for n in lines))
    result = job()
    failures = result.failures()
    assert result.code == 0
    assert {n: stage for n, (stage, _) in failures.items()} == {
        "cut.png": "decode",
        "empty.jpg": "decode",
        "page.jpg": "decode",
        "pipe.png": "fetch",
        "never-there.png": "fetch",
    }
    assert failures["page.jpg"][1] == "an HTML page, not an image"
    assert result.reader.rows("image") == 14
    assert result.ledger["cut.png"].key is not None, (
        "with its key, so that later jobs do not try it again"
    )


def test_another_encoder_gets_another_space_and_keeps_the_samples(
    photos: Path, job: Encode
) -> None:
    first = job()
    samples = first.root.samples("photos").stat().st_mtime_ns
    config = dataclasses.replace(TINY, seed=7)
    second = job(config=dataclasses.replace(CONFIG, encoder=config))
    assert second.paths != first.paths
    assert len(second.plan.todo) == 14
    assert second.plan.unread == 0, "the keys are known, so the rows are exact"
    assert second.root.samples("photos").stat().st_mtime_ns == samples
    assert second.reader.logical_hash() != first.reader.logical_hash()


# ---- our own errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class OddConfig(WorkerConfig):
    """An encoder that returns NaN for images whose pixels have these sums, or raises for their batches."""

    nan: tuple[int, ...] = ()
    breaks: tuple[int, ...] = ()
    raises: str = ""

    def load(self) -> VisionEncoder:
        encoder = super().load()
        original = encoder.features

        def features_oddly(
            pixels: torch.Tensor, array: str = "image"
        ) -> tuple[torch.Tensor, torch.Tensor]:
            sums = [int(image.sum()) for image in pixels]
            broken = any(number in self.breaks for number in sums)
            if broken or self.raises == "always" or (self.raises and pixels.any()):
                raise torch.OutOfMemoryError("no memory left\non this device")
            features, clipped = original(pixels, array)
            for i, number in enumerate(sums):
                if number in self.nan:
                    features[i, 0, 0] = float("nan")
            return features, clipped

        encoder.features = features_oddly  # type: ignore[method-assign]
        return encoder


def odd(**values: Any) -> OddConfig:
    fields = {f.name: getattr(CONFIG, f.name) for f in dataclasses.fields(CONFIG)}
    return OddConfig(**{**fields, **values})


def test_nan_fails_only_the_image_that_has_it(photos: Path, job: Encode) -> None:
    draw(photos, 30, first=14)
    encoder = load_encoder(TINY, device="cpu")
    prepared = encoder.prepare(decode_image((photos / "0006.png").read_bytes()))
    config = odd(nan=(int(prepared.sum()),))
    result = job(config=config)
    assert set(result.failures()) == {"0006.png"}
    stage, error = result.failures()["0006.png"]
    assert stage == "encode"
    assert error == f"{result.paths.name}: the features hold NaN or Inf"
    assert result.reader.rows("image") == 43
    # The failure is our own, so later jobs try it again, up to three times in all.
    for attempts in (2, 3):
        again = job(config=config)
        assert again.ledger["0006.png"].attempts == attempts
    assert job(config=config).plan.todo == ()
    # It does not count for another encoder.
    other = dataclasses.replace(CONFIG, encoder=dataclasses.replace(TINY, seed=1))
    assert job(config=other).failures() == {}


def test_a_batch_that_does_not_fit_the_memory_fails_and_no_other(photos: Path, job: Encode) -> None:
    """Its neighbours are in flight at the same time. The images of a batch of 4 fail with it."""
    draw(photos, 30, first=14)
    encoder = load_encoder(TINY, device="cpu")
    prepared = encoder.prepare(decode_image((photos / "0009.png").read_bytes()))
    result = job(config=odd(breaks=(int(prepared.sum()),)))
    assert set(result.failures()) == {f"00{number:02}.png" for number in (8, 9, 10, 11)}
    stage, error = result.failures()["0009.png"]
    assert stage == "encode" and "OutOfMemoryError: no memory left on this device" in str(error)
    assert result.reader.rows("image") == 40
    for name in ("0007.png", "0012.png", "0043.png"):
        image = decode_image((photos / name).read_bytes())
        alone = encoder.encode(encoder.prepare(image)[None]).numpy()
        stored = result.reader.read("image", key_of(result, name))
        assert np.array_equal(stored, unpack(pack(alone, "int8"), "int8", 4, 64)[0])


def test_too_many_errors_of_our_own_stop_the_job(photos: Path, job: Encode) -> None:
    draw(photos, 100, first=14)
    with pytest.raises(TooManyFailuresError) as stopped:
        job(config=odd(raises="images"))
    message = str(stopped.value)
    assert "OutOfMemoryError: no memory left on this device" in message
    assert "\n" not in message
    # Once the cause is fixed, all of them are tried again.
    result = job()
    assert result.failures() == {}
    assert result.reader.rows("image") == 114


def test_an_encoder_that_cannot_run_stops_the_job_before_anything_is_written(
    photos: Path, tmp_path: Path, job: Encode
) -> None:
    draw(photos, 10, first=14)
    with pytest.raises(UserError, match="a batch of 4 cannot be encoded on cpu: OutOfMemoryError"):
        job(config=odd(raises="always"))
    assert not (tmp_path / "cache" / "spaces").exists()


# ---- the disk


def failing_extend(number: int, *calls: int) -> Callable[..., None]:
    """Return a ShardWriter.extend that fails with errno `number` in these calls, counted from 1."""
    original, count = ShardWriter.extend, itertools.count(1)

    def extend(self: ShardWriter, *args: Any, **kwargs: Any) -> None:
        if next(count) in calls:
            raise OSError(number, os.strerror(number))
        original(self, *args, **kwargs)

    return extend


def test_a_full_disk_ends_the_job_and_keeps_committed_rows(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: Encode
) -> None:
    whole = encode(tmp_path / "whole", f"folder:{photos}").reader.logical_hash()
    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "extend", failing_extend(errno.ENOSPC, *range(10, 100)))
        with pytest.raises(DiskError) as full:
            job()
    assert str(full.value).startswith("disk full (")
    assert "run the same command again" in str(full.value)
    result = job()
    assert (result.job._tracker.encoded, result.reader.rows("image")) == (5, 14)
    assert result.reader.logical_hash() == whole


def test_a_disk_error_fails_the_items_of_one_shard(
    monkeypatch: pytest.MonkeyPatch, job: Encode
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "extend", failing_extend(errno.EIO, 5))
        result = job()
    assert [stage for stage, _ in result.failures().values()] == ["write"]
    assert result.reader.rows("image") == 13
    again = job()
    assert again.failures() == {}
    assert again.reader.rows("image") == 14


# ---- stopping


def test_an_interrupted_job_keeps_encoded_rows_and_can_be_continued(
    photos: Path, capsys: pytest.CaptureFixture[str], job: Encode
) -> None:
    draw(photos, 120, first=14)
    interrupts = Interrupts()
    timer = threading.Timer(2.0, lambda: setattr(interrupts, "received", 2))
    timer.start()
    config = dataclasses.replace(CONFIG, commit_every_s=1000.0)
    stopped = job(worker_class=SlowWorker, config=config, interrupts=interrupts)
    timer.join()
    kept = stopped.reader.rows("image")
    assert stopped.code == 130
    assert 0 < kept < 134
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"interrupted: {kept} encoded and kept, ")
    assert len(read_media(stopped.root)) == kept, "they are recorded, so nothing is read twice"
    result = job()
    assert result.plan.reused == kept
    assert result.reader.rows("image") == 134
    assert result.reader.index["image"].doubled.size == 0


def test_a_job_on_a_terminal_shows_a_bar_and_leaves_its_lines(
    photos: Path, monkeypatch: pytest.MonkeyPatch, job: Encode
) -> None:
    (photos / "cut.png").write_bytes(b"no image")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "")
    monkeypatch.setattr("configs.progress.FIRST_BAR_S", 0.0)
    monkeypatch.setattr("configs.terminal.TICK_S", 0.02)
    with Terminal(columns=100) as terminal:
        standard = redirect_stdout(terminal.stream), redirect_stderr(terminal.stream)
        with standard[0], standard[1]:
            assert job(worker_class=SlowWorker).code == 0
        shown = terminal.screen()
    assert re.search(r"encode\W.*  0% .*\[>.*  0/15  starting", terminal.output)
    lines = shown.text()
    assert shown.fresh and lines[-1].startswith("encoded=14 reused=0 failed=1 ")
    assert not [line for line in lines if line.startswith("encode ")]
    assert {line.split()[0] for line in lines} >= {"space", "media", "disk", "stages", "failed"}


def test_decoding_runs_in_threads_that_end_with_the_job(job: Encode) -> None:
    threads: set[str] = set()

    class Watched(Worker):
        def decode(self, data: bytes) -> DecodedImage:
            threads.add(threading.current_thread().name.rpartition("_")[0])
            return super().decode(data)

    job(worker_class=Watched)
    assert threads == {"decode"}
    assert not [t for t in threading.enumerate() if t.name.startswith(("decode", "read", "write"))]


def test_a_job_of_many_images_resizes_by_compiled_loops_to_the_same_rows(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    fit_image = fit.fit_image

    def recorded(*args: Any, compiled: bool) -> Any:
        asked.append(compiled)
        return fit_image(*args, compiled=compiled)

    monkeypatch.setattr(fit, "fit_image", recorded)
    hashes = set()
    for worth, decode_apart in ((14, False), (14, True), (15, False)):
        monkeypatch.setattr("encode.plan.plan.WORTH_INPUTS", worth)
        cache = tmp_path / f"{worth}-{decode_apart}"
        result = encode(cache, f"folder:{photos}", decode_apart=decode_apart)
        assert result.reader.rows("image") == 14
        hashes.add(result.reader.logical_hash())
    assert len(hashes) == 1
    assert asked == [True] * 14 + [False] * 14, "processes do not resize here"


def test_a_job_probes_few_of_its_files_and_a_plan_alone_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    def recorded(*_: Any, count: int, **__: Any) -> Probe:
        counts.append(count)
        return Probe()

    monkeypatch.setattr("encode.job.probe", recorded)
    monkeypatch.setattr("encode.job.PROBED", 40)
    monkeypatch.setattr("encode.job.SOURCES_A_PROBE", 2)
    draw(tmp_path / "photos", 60)
    result = encode(tmp_path / "cache", f"folder:{tmp_path / 'photos'}")
    assert result.reader.rows("image") == 60
    plan = result.plan
    for videos, alone in ((0, False), (0, True), (21, False)):
        result.job.show(dataclasses.replace(plan, untimed=videos), always_measure=alone)
    assert counts == [30, 30, 40, 40]
