"""Other libraries read the exported files and find the stored rows bit for bit.

python -m cache.export --to webdataset --out tars

for sample in webdataset.WebDataset("tars/image-000000.tar", shardshuffle=False).decode():
    sample["full.npy"]                              # the stored row, and its facts in "full.json"
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from safetensors import safe_open

from cache.errors import CorruptError, DiskError, NotFoundError
from cache.export import __main__ as export
from cache.export import rows as export_rows
from cache.export import samples as export_samples
from cache.format import codec
from cache.format.codec import CODECS
from cache.format.spec import CONTAINERS
from cache.store.ledger import MediaRecord, append_media
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.samples import MediaRef, Message, Sample, write_samples
from cache.store.space import Space
from cache.store.writer import ShardWriter
from configs import UserError
from configs.console import SPARE_BYTES
from tests.support.faults import garble
from tests.support.spaces import fill, key, make_space, row

pytestmark = pytest.mark.slow


TIMES = {"t:0": 0.0, "t:500000": 0.48, "t:10000000": 10.0}
"""View -> time of the video's frames; sorted by name, the last one would be the second."""


def make(folder: Path, codec_name: str = "int8", container: str = "zarr", **changes: Any) -> Space:
    """Return a space of seven images and a video of three frames, and a data set."""
    space = make_space(folder, codec_name, container, **changes)
    fill(space, [3, 0, 2, 1])
    fill(space, [5, 4, 6])
    video = ShardWriter(space, "frame", 0)
    for number, (view, time_s) in enumerate(TIMES.items()):
        video.append(key(9), view, row(number, "frame", space.spec), time_s=time_s, error=0.004)
    video.commit()
    root = CacheRoot(folder)
    images = [MediaRecord(source=f"/{n}.png", key=key(n)) for n in range(9)]  # 7, 8: not encoded
    nine = MediaRecord(source="/9.mp4", key=key(9), kind="video", duration_s=10.0)
    bad = MediaRecord(source="/x.png", status="failed", stage="decode", error="truncated")
    append_media(root, [*images, nine, bad], "job")
    write_samples(root, "talk", SAMPLES)
    return space


def say(name: str, *sources: str, choice: str = "") -> Sample:
    marks = "".join("<video>" if "mp4" in source else "<image>" for source in sources)
    return Sample(
        id=name,
        dataset="talk",
        messages=(
            Message(role="user", content=f"{marks}what, {name}?"),
            Message(role="assistant", content=f"größe of {name}", weight=0.5),
        ),
        media=tuple(MediaRef(source=s, kind="video" if "mp4" in s else "image") for s in sources),
        task="ask",
        choice=choice,
    )


SAMPLES = [
    say("a.1", "/4.png", choice="one question"),
    say("b/2", "/1.png", "/9.mp4"),
    say("c", "/4.png", choice="one question"),
    say("text"),
    say("none", "/8.png"),
    say("failed", "/1.png", "/x.png"),
]


Run = Callable[..., tuple[Path, str]]


@pytest.fixture
def space(tmp_path: Path) -> Space:
    return make(tmp_path / "cache")


@pytest.fixture
def run(tmp_path: Path, run_command: Callable[..., tuple[None, str]]) -> Run:
    cache, out = tmp_path / "cache", tmp_path / "out"
    words = ("--features", cache, "--out", out, "--to")
    return lambda *more: (out, run_command(export, *words, *more)[1])


def stream(folder: Path, pattern: str = "*.tar") -> list[dict[str, Any]]:
    """Return all samples of the tars, as the webdataset library yields them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves files open
        files = [str(path) for path in sorted(folder.glob(pattern))]
        samples = list(webdataset.WebDataset(files, shardshuffle=False).decode())
        gc.collect(1)
    return samples


Rows = dict[tuple[str, str, str], np.ndarray]
"""(array, key, view) -> the array that another library returned."""


def tar_rows(folder: Path) -> Rows:
    rows = {}
    for array in ("image", "frame"):
        for sample in stream(folder, f"{array}-*.tar"):
            for name, about in sample.items():
                if name.endswith(".json"):
                    view = name.removesuffix(".json")
                    assert (sample["__key__"], view) == (about["key"], about["view"])
                    rows[array, about["key"], view] = sample[f"{view}.npy"]
    return rows


def safetensors_rows(folder: Path) -> Rows:
    rows = {}
    index = json.loads((folder / "index.json").read_text())
    for array in ("image", "frame"):
        for path in sorted(folder.glob(f"{array}-*.safetensors")):
            with safe_open(path, "numpy") as file:
                for name in list(file.keys()):
                    assert index["weight_map"][name] == path.name
                    rows[array, *name.split("/")] = file.get_tensor(name)
    assert len(index["weight_map"]) == len(rows)
    return rows


READ = {"webdataset": tar_rows, "safetensors": safetensors_rows}


def logical_hash(rows: Rows) -> str:
    """Compute what `FeatureReader.logical_hash` computes, from arrays that other libraries returned."""
    whole = hashlib.sha256()
    for name in sorted(rows):
        digest = hashlib.sha256(np.ascontiguousarray(rows[name]).tobytes()).hexdigest()
        whole.update(("\t".join((*name, digest)) + "\n").encode())
    return whole.hexdigest()


@pytest.mark.parametrize("to", READ)
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("codec_name", CODECS)
def test_exported_rows_equal_stored_rows_bit_for_bit(
    tmp_path: Path, run: Run, to: str, container: str, codec_name: str
) -> None:
    space = make(tmp_path / "cache", codec_name, container, image_size=12)  # with mean tokens
    expected = FeatureReader(space.paths).logical_hash()
    fill(space, [0])  # stored twice, exported once
    out, said = run(to)
    assert "7 image rows, 3 frame rows" in said
    assert logical_hash(READ[to](out)) == expected
    about = json.loads((out / "export.json").read_text())
    assert about["rows"] == {"image": 7, "frame": 3}
    assert about["codec"] == about["stored_as"] == about["spec"]["codec"] == codec_name
    assert {*about["files"], "export.json"} == {path.name for path in out.iterdir()}


@pytest.mark.parametrize("to", READ)
@pytest.mark.parametrize("codec_name", CODECS)
def test_unpacked_rows_equal_those_of_the_reader(
    tmp_path: Path, run: Run, to: str, codec_name: str
) -> None:
    space = make(tmp_path / "cache", codec_name, image_size=12)  # with mean tokens
    out, _ = run(to, "--unpack")
    rows, reader = READ[to](out), FeatureReader(space.paths)
    assert len(rows) == 10
    for (array, media_key, view), values in rows.items():
        assert values.dtype == np.float16
        np.testing.assert_array_equal(values, reader.read(array, media_key, view))


def test_each_row_comes_with_its_facts(space: Space, run: Run) -> None:
    out, _ = run("webdataset")
    (video,) = stream(out, "frame-*.tar")
    for view, time_s in TIMES.items():
        about = video[f"{view}.json"]
        assert (about["time_s"], about["relative_error"]) == (time_s, 0.004)
        assert about["crc32c"] == export_rows.crc32c(video[f"{view}.npy"])
    shutil.rmtree(out)
    out, _ = run("webdataset", "--unpack")
    for sample in stream(out, "image-*.tar"):
        about = sample["full.json"]
        assert about["codec"] == "fp16"
        assert about["crc32c"] == export_rows.crc32c(np.ascontiguousarray(sample["full.npy"]))
    shutil.rmtree(out)
    out, _ = run("safetensors")
    index = json.loads((out / "index.json").read_text())
    assert index["time_s"] == {f"{key(9)}/{view}": time_s for view, time_s in TIMES.items()}
    with safe_open(out / "frame-00000.safetensors", "numpy") as file:
        metadata = file.metadata()
    assert (metadata["codec"], metadata["tokens"], metadata["width"]) == ("int8", "1", "64")


def test_a_video_stays_in_one_file(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = make_space(tmp_path / "cache")
    videos = ShardWriter(space, "frame", 0)
    for media, frames in ((1, 3), (2, 2), (3, 6), (4, 1)):
        for number in range(frames):
            videos.append(key(media), f"t:{number}", row(number, "frame"), time_s=float(number))
    videos.commit()
    monkeypatch.setattr(export_rows, "FILE_ROWS", 4)
    out, _ = run("webdataset")
    files = [
        [(s["__key__"], sum(name.endswith("npy") for name in s)) for s in stream(out, path.name)]
        for path in sorted(out.glob("*.tar"))
    ]
    assert files == [[(key(1), 3)], [(key(2), 2)], [(key(3), 4)], [(key(3), 2), (key(4), 1)]]


# ---- data sets


def unpacked(sample: dict[str, Any], number: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (view, features) of one media item of a tar's sample, as docs/FEATURE_CACHE.md describes it."""
    about, rows = sample["json"]["media"][number], sample[f"{number}.npy"]
    assert len(rows) == len(about["views"])
    for view, stored in zip(about["views"], rows, strict=True):
        if sample["json"]["codec"] == "fp16":
            yield view, stored  # needs no codec
        else:
            yield view, codec.unpack(stored, sample["json"]["codec"], about["tokens"], 64)


@pytest.mark.parametrize("unpack", [(), ("--unpack",)])
def test_a_data_set_is_exported_with_text_and_features(
    space: Space, run: Run, unpack: tuple[str, ...]
) -> None:
    out, said = run("webdataset", "--dataset", "talk", *unpack)
    assert "talk: 4 samples; 2 left out, whose media have no features" in said
    assert [path.name for path in sorted(out.iterdir())] == ["export.json", "talk-000000.tar"]
    reader = FeatureReader(space.paths)
    twice, both, text = stream(out)
    assert twice["__key__"] == key(4)
    assert [s["id"] for s in twice["json"]["samples"]] == ["a.1", "c"], "the image is stored once"
    assert [s["choice"] for s in twice["json"]["samples"]] == ["one question"] * 2, "both answers"
    assert both["json"]["samples"][0]["messages"][0]["content"] == "<image><video>what, b/2?"
    assert twice["json"]["samples"][1]["messages"] == [
        {"role": "user", "content": "<image>what, c?", "weight": 1.0},
        {"role": "assistant", "content": "größe of c", "weight": 0.5},
    ]
    assert [m["source"] for m in both["json"]["media"]] == ["/1.png", "/9.mp4"]
    assert [m["key"] for m in both["json"]["media"]] == [key(1), key(9)]
    assert both["json"]["media"][1]["time_s"] == list(TIMES.values()), "in time order"
    for sample, number, array, media_key in (
        (twice, 0, "image", key(4)),
        (both, 0, "image", key(1)),
        (both, 1, "frame", key(9)),
    ):
        for view, features in unpacked(sample, number):
            np.testing.assert_array_equal(features, reader.read(array, media_key, view))
    assert text["json"]["media"] == []
    assert [s["id"] for s in text["json"]["samples"]] == ["text"]
    assert not [name for name in text if name.endswith("npy")]


@pytest.mark.parametrize("to", ["webdataset", "safetensors"])
def test_a_sample_never_leaves_with_other_bytes_than_its_data_set_states(
    tmp_path: Path, space: Space, run: Run, to: str
) -> None:
    """`/2.png` gave image 2, which has features; one sample states the sha256 of image 5 for it."""
    stated = [("other", "/2.png", key(5)), ("same", "/3.png", key(3))]
    more = [
        replace(say(name, source), media=(MediaRef(source=source, sha256=sha256),))
        for name, source, sha256 in stated
    ]
    write_samples(CacheRoot(tmp_path / "cache"), "talk", [*SAMPLES, *more])
    out, said = run(to, "--dataset", "talk")
    assert "talk: 5 samples; 2 left out, whose media have no features in this space" in said
    assert "; 1 left out, whose source has another sha256 than they state" in said
    if to == "webdataset":
        ids = [one["id"] for sample in stream(out) for one in sample["json"]["samples"]]
        assert key(2) not in {sample["__key__"] for sample in stream(out)}
    else:
        ids = [json.loads(line)["id"] for line in (out / "talk.jsonl").read_text().splitlines()]
        assert key(2) not in {name for _, name, _ in safetensors_rows(out)}
    assert sorted(ids) == ["a.1", "b/2", "c", "same", "text"]


def test_safetensors_of_a_data_set_hold_its_rows_and_its_text(space: Space, run: Run) -> None:
    out, _ = run("safetensors", "--dataset", "talk")
    found = {(array, media) for array, media, _ in safetensors_rows(out)}
    assert found == {("image", key(1)), ("image", key(4)), ("frame", key(9))}
    lines = [json.loads(line) for line in (out / "talk.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["a.1", "b/2", "c", "text"]
    assert [m["key"] for m in lines[1]["media"]] == [key(1), key(9)]
    assert [line["choice"] for line in lines] == ["one question", "", "one question", ""]


# ---- complete, or not under its name


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("words", ["webdataset", "safetensors", "webdataset --dataset talk"])
def test_an_interrupted_export_is_done_again_from_the_start(
    space: Space, run: Run, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.setattr(export_rows, "FILE_ROWS", 2)
    monkeypatch.setattr(export_samples, "FILE_ROWS", 1)
    arguments = words.split()
    out, _ = run(*arguments)
    whole = contents(out)
    assert len(whole) > 3
    shutil.rmtree(out)
    partial = out.with_name("out.partial")
    real, calls = export_rows.Source.rows, itertools.count(1)

    def dying(*args: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(export_rows.Source, "rows", dying)
        with pytest.raises(KeyboardInterrupt):
            run(*arguments)
    assert not out.exists()
    assert {"export.json"} < set(contents(partial)) < set(whole), "only complete files are left"
    # A killed process also leaves an unfinished file. Another export may have left a file of its own.
    (partial / f"{max(whole)}.0a0b.partial").write_bytes(b"half")
    (partial / "image-999999.tar").write_bytes(b"of another export")
    run(*arguments)
    assert contents(out) == whole
    assert not partial.exists()


def test_two_exports_do_not_write_to_one_folder(tmp_path: Path, space: Space, run: Run) -> None:
    with (
        export.empty_folder(tmp_path / "out.partial"),
        pytest.raises(UserError, match="another export is writing"),
    ):
        run("webdataset")


def test_other_files_are_not_replaced(tmp_path: Path, space: Space, run: Run) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        run("webdataset")
    (out / "mine").unlink()
    half = tmp_path / "out.partial"
    half.mkdir()
    (half / "mine").write_text("x")
    with pytest.raises(UserError, match="not an unfinished export"):
        run("webdataset")
    assert (half / "mine").read_text() == "x"
    (half / "mine").rename(half / "export.json.0a0b.partial")  # killed before its first file
    run("webdataset")
    assert len(tar_rows(out)) == 10


def test_a_disk_that_is_too_small_is_reported_before_writing(
    tmp_path: Path, space: Space, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=SPARE_BYTES))
    with pytest.raises(UserError, match="the export needs"):
        run("webdataset")
    assert list(tmp_path.glob("out*/*.tar")) == []


def test_an_export_can_be_repeated_after_the_disk_was_full(
    tmp_path: Path, space: Space, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, real = FeatureReader(space.paths).logical_hash(), os.fsync
    for calls in range(100):
        left = iter(range(calls))

        def full(fd: int, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise OSError(28, os.strerror(28))
            real(fd)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            try:
                run("safetensors")
                break
            except DiskError as error:
                assert str(error).startswith("disk full"), error
        if not (tmp_path / "out").exists():  # else only the rename was not durable
            run("safetensors")
        assert logical_hash(safetensors_rows(tmp_path / "out")) == expected
        shutil.rmtree(tmp_path / "out")
    assert calls > 8, "the disk was full at every fsync"


def test_a_damaged_row_is_not_exported(tmp_path: Path, space: Space, run: Run) -> None:
    garble(space.paths.shard("image", 1), space.info.geometry("image").row_offset(1))  # image 4
    for arguments in (("webdataset",), ("safetensors",), ("webdataset", "--dataset", "talk")):
        with pytest.raises(CorruptError, match="checksum"):
            run(*arguments)
        assert not (tmp_path / "out").exists()


def test_unknown_names_are_refused(tmp_path: Path, run: Run) -> None:
    with pytest.raises(NotFoundError, match="no cache at"):
        run("webdataset")
    make(tmp_path / "cache")
    with pytest.raises(NotFoundError, match=r"no data set 'tal'.*nearest: talk"):
        run("webdataset", "--dataset", "tal")
    with pytest.raises(NotFoundError, match="no space 'other'"):
        run("webdataset", "--space", "other")
    with pytest.raises(UserError, match="--to"):
        run("parquet")
