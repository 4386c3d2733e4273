"""`cache.ls` prints figures that these tests count by hand.

python -m cache.ls
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache import ls
from cache.store.ledger import MediaRecord, append_media
from cache.store.locks import DriverLock
from cache.store.paths import CacheRoot
from cache.store.samples import MediaRef, Origin, Sample, read_samples, write_samples
from cache.store.space import Space
from cache.store.writer import ShardWriter
from configs import UserError
from configs.console import bytes_text, table_text
from tests.support.spaces import SPEC, fill, key, make_space, row

Run = Callable[..., str]


@pytest.fixture
def run(run_command: Callable[..., tuple[None, str]], tmp_path: Path) -> Run:
    return lambda *words: run_command(ls, "--features", tmp_path, *words)[1]


def sample(dataset: str, name: str, *sources: str) -> Sample:
    media = tuple(MediaRef(source=source) for source in sources)
    return Sample(id=name, dataset=dataset, messages=(), media=media)


@pytest.fixture
def root(tmp_path: Path) -> CacheRoot:
    """Return a cache: a, b, c have keys 0, 1, 0; d could not be decoded, e not fetched; f is unknown.

    The int8 space has keys 0 and 1, the fp16 space only 1.
    """
    fill(make_space(tmp_path, "int8"), [0, 1])
    fill(make_space(tmp_path, "fp16"), [1])
    root = CacheRoot(tmp_path)
    ok = [MediaRecord(source=s, key=key(n)) for s, n in (("a", 0), ("b", 1), ("c", 0))]
    bad = MediaRecord(source="d", key=key(3), status="failed", stage="decode", error="cut short")
    gone = MediaRecord(source="e", status="failed", stage="fetch", error="404")
    lost = MediaRecord(source="g", status="failed", stage="fetch", error="404")
    append_media(root, [*ok, bad, gone, lost], "job")
    two = [sample("two", str(n), *s) for n, s in enumerate(["a", "ab", "ad", "", "bb", "f"])]
    write_samples(root, "two", two)
    write_samples(root, "one", [sample("one", "0", "b"), sample("one", "1", "e", "d")])
    write_samples(root, "none", [])
    return root


def test_spaces_and_coverage_are_counted(root: CacheRoot, run: Run) -> None:
    values: Any = json.loads(run("--json"))
    fp16, int8 = values["spaces"]
    assert (int8["rows"], fp16["rows"]) == ({"image": 2, "frame": 0}, {"image": 1, "frame": 0})
    assert (int8["nbytes"], fp16["nbytes"]) == (2 * 268 + 68, 516 + 68)
    assert (int8["codec"], int8["encoder"], int8["blocks"]) == ("int8", "toy", [0])
    assert int8["pool"] == {"image": 1, "frame": 2}
    none, one, two = values["datasets"]
    assert (none["samples"], one["samples"], two["samples"]) == (0, 2, 6)
    assert (none["media"], one["media"], two["media"]) == (0, 3, 4)
    assert (none["failed"], one["failed"], two["failed"]) == (0, 2, 1)
    assert one["coverage"] == {int8["name"]: 1 / 2, fp16["name"]: 1 / 2}
    assert two["coverage"] == pytest.approx({int8["name"]: 4 / 6, fp16["name"]: 2 / 6})
    assert none["coverage"] == {int8["name"]: 1.0, fp16["name"]: 1.0}


def test_the_tables_show_the_same_counts(root: CacheRoot, run: Run) -> None:
    int8 = next(name for name in root.space_names() if "int8" in name)
    with DriverLock(root.space(int8), "job 7"):
        lines = run().splitlines()
    fields = [line.split() for line in lines]
    assert [int8, "toy", "int8", "0", "1/2", "zarr", "2", "0", "604", "B"] in fields
    assert [int8, "2", "images", "int8", *["0.00500"] * 4] in fields
    assert f"{int8}: being written by job 7" in lines
    assert ["two", "6", "4", "1"] in fields
    assert ["two", int8, "66.7%", "528", "B", "1", "264", "B"] in fields
    # The missing media of `one` have failed, so encoding adds nothing.
    assert ["one", int8, "50.0%", "264", "B", "0", "0", "B"] in fields
    assert f"why media failed: python -m cache.ls --failures --features {root.path}" in lines


def test_codec_errors_are_summarised_by_space_and_array(tmp_path: Path, run: Run) -> None:
    space = make_space(tmp_path)
    for number in range(250):
        if number % space.rows_per_shard("image") == 0:
            shard = ShardWriter(space, "image", space.next_shard("image"))
        shard.append(key(number), "full", row(number), error=number / 1000)
        if shard.full or number == 249:
            shard.commit()
    fill(space, [1], array="frame")
    (summary,) = json.loads(run("--json"))["spaces"]
    assert summary["error"]["image"] == pytest.approx(
        {"mean": 0.1245, "median": 0.1245, "p99": 0.24651, "largest": 0.249}, rel=1e-5
    )
    assert summary["error"]["frame"]["largest"] == pytest.approx(0.005)
    line = f"{space.spec.name} 250 images int8 0.12450 0.12450 0.24651 0.24900"
    assert line.split() in [line.split() for line in run().splitlines()]


def test_missing_rows_and_bytes_are_counted(tmp_path: Path, run: Run) -> None:
    """Two images and a video have rows; an image, a short video and one of unknown length have none."""
    root = CacheRoot(tmp_path)
    load = {"encoder": {"name": "demo"}}
    space = Space.create(root, SPEC, load)
    fill(space, [0, 1])
    shard = ShardWriter(space, "frame", 0)
    for us in (0, 500_000, 700_000):
        shard.append(key(5), f"t:{us}", row(us, "frame"), time_s=us / 1e6)
    shard.commit()
    videos = [
        MediaRecord(source=s, key=key(n), kind="video", duration_s=d)
        for s, n, d in (("/f/here.mp4", 5, 0.7), ("/f/short.mp4", 6, 0.3))
    ]
    images = [MediaRecord(source=f"/f/{n}.png", key=key(n % 3)) for n in range(4)]
    bad = MediaRecord(source="/f/bad.png", status="failed", stage="decode", error="cut short")
    append_media(root, [*videos, *images, bad], "job")
    names = ["0.png", "1.png", "2.png", "3.png", "bad.png", "here.mp4", "short.mp4", "new.mp4"]
    samples = []
    for name in names:
        kind = "video" if name.endswith("mp4") else "image"
        ref = MediaRef(source=f"/f/{name}", kind=kind)
        samples.append(Sample(id=f"{name}#0", dataset="f-1", messages=(), media=(ref,)))
    words = ("--dataset", "f-1=folder:/my photos", "--limit", "9")
    write_samples(root, "f-1", samples, Origin(words=words))
    values = json.loads(run("--json"))["datasets"][0]
    need = values["needs"][SPEC.name]
    image, frame = SPEC.row_bytes("image"), SPEC.row_bytes("frame")
    assert values["coverage"] == {SPEC.name: 4 / 8}
    assert need["reads"] == 2 * image + 3 * frame  # 0.png and 3.png have one key
    assert (need["media"], need["rows"]) == (3, 1 + 2 + 128)
    assert need["nbytes"] == image + 130 * frame
    assert need["command"] == (
        "python -m encode.run --dataset 'f-1=folder:/my photos' --limit 9 --encoder demo "
        f"--codec int8 --pool 1 --features {tmp_path}"
    )
    assert f"complete: {need['command']}" in run().splitlines()


def test_a_sample_that_states_another_sha256_is_not_covered(root: CacheRoot, run: Run) -> None:
    said = [key(0), key(1), None]  # stated for source a, whose key is 0
    refs = [(MediaRef(source="a", sha256=sha),) for sha in said]
    samples = [Sample(id="", dataset="hash", messages=(), media=media) for media in refs]
    write_samples(root, "hash", samples)
    values = {one["name"]: one for one in json.loads(run("--json"))["datasets"]}
    assert {round(share, 3) for share in values["hash"]["coverage"].values()} == {0.667, 0.0}
    assert [n for n, one in values.items() for _ in range(one["mismatched"])] == ["hash"]
    assert "hash: samples whose source has another sha256 than they state: 1" in run()


def test_failures_are_grouped_by_reason_and_data_set(root: CacheRoot, run: Run) -> None:
    write_samples(
        root, "one", read_samples(root, "one"), Origin(words=("--dataset", "1=json:/a b.json"))
    )
    int8 = next(name for name in root.space_names() if "int8" in name)
    os.utime(root.space(int8).commits_dir, ns=(1, 1))
    space = "--encoder toy --codec fp16 --pool 1 --frame-pool 2"
    end = f"{space} --features {root.path} --retry-failed"
    assert run("--failures").splitlines() == [
        "fetch            2 media",
        "decode           1 media",
        "",
        "1 in one: decode: cut short",
        "    d",
        "",
        "1 in two: decode: cut short",
        "    d",
        "",
        "1 in no data set: fetch: 404",
        "    g",
        "",
        "1 in one: fetch: 404",
        "    e",
        "",
        f"try them again: python -m encode.run --dataset '1=json:/a b.json' {end}",
        f"try them again: python -m encode.run --dataset two {end}",
    ]
    groups = json.loads(run("--failures", "--json"))["failures"]
    command = f"python -m encode.run --dataset '1=json:/a b.json' {end}"
    place = {"host": "", "dataset": "one", "sources": ["d"], "command": command}
    assert groups[0] == {"stage": "decode", "error": "cut short", **place}


def test_what_was_not_used_of_a_data_set_is_remembered(root: CacheRoot, run: Run) -> None:
    account = {
        "samples": 2,
        "lines": {"LLaVA": 2},
        "left_out": {".heic": 4000, ".jp2": 1},
        "faults": {"unknown key": 2},
        "ignored": {"data_source": 12},
        "notes": {},
    }
    line = "one: 2 lines (LLaVA); left out: 4,000 .heic, 2 unknown key, 1 .jp2"
    origin = Origin(words=("--dataset", "one"), account=account, said=line)
    write_samples(root, "one", read_samples(root, "one"), origin)
    write_samples(root, "two", read_samples(root, "two"), Origin(words=("--dataset", "two")))
    assert line in run().splitlines()
    assert sum("left out" in line for line in run().splitlines()) == 1
    values = {one["name"]: one["account"] for one in json.loads(run("--json"))["datasets"]}
    assert values == {"none": {}, "one": account, "two": {}}


def test_notes_of_media_that_are_used_are_counted_and_listed(root: CacheRoot, run: Run) -> None:
    assert "with a note" not in run() and run("--notes") == "no notes\n"
    early, hdr = "ends early: 0.3 s of 2.0 s", "HDR (PQ), shown without tone mapping"
    noted = [
        MediaRecord(source="a", key=key(0), note=early),
        MediaRecord(source="b", key=key(1), note=f"{early}; {hdr}"),
        MediaRecord(source="f", key=key(5), note=hdr),
        MediaRecord(source="unused", key=key(6), note=hdr),
        MediaRecord(source="d", key=key(3), status="failed", stage="decode", error="x", note=early),
    ]
    append_media(root, noted, "job")
    lines = run().splitlines()
    assert "two: used with a note: 2 ends early, 2 HDR" in lines
    assert "one: used with a note: 1 ends early, 1 HDR" in lines
    assert f"which media have notes: python -m cache.ls --notes --features {root.path}" in lines
    assert run("--notes").split("\n\n") == [
        f"1 in no data set: {hdr}\n    unused",
        f"1 in two: {hdr}\n    f",
        f"1 in two: {early}\n    a",
        f"1 in one: {early}; {hdr}\n    b",
        f"1 in two: {early}; {hdr}\n    b\n",
    ]
    values = json.loads(run("--notes", "--json"))["notes"]
    assert values[1] == {"note": hdr, "dataset": "two", "sources": ["f"]}
    none, _, two = json.loads(run("--json"))["datasets"]
    assert (none["notes"], two["notes"]) == ({}, {"ends early": 2, "HDR": 2})
    with pytest.raises(UserError, match="--failures and --notes are two lists"):
        run("--notes", "--failures")


def test_names_of_any_kind_are_one_line_and_hints_quote_them(
    run_command: Callable[..., tuple[None, str]], tmp_path: Path
) -> None:
    folder = tmp_path / "my cache's ‘größte’"
    root = CacheRoot(folder)
    names = ["/p/a b.jpg", '/p/it\'s "q".jpg', "/p/one\ntwo.jpg", "/p/猫.jpg"]
    bad = [MediaRecord(source=n, status="failed", stage="decode", error="cut") for n in names]
    append_media(root, bad, "job")
    write_samples(root, "p", [sample("p", str(n), name) for n, name in enumerate(names)])
    lines = run_command(ls, "--features", folder)[1].splitlines()
    (hint,) = [line for line in lines if line.startswith("why media failed: ")]
    words = shlex.split(hint.removeprefix("why media failed: "))
    assert words == ["python", "-m", "cache.ls", "--failures", "--features", str(folder)]
    lines = run_command(ls, *words[3:])[1].splitlines()
    assert [line for line in lines if line.startswith("    ")] == [
        "    /p/a b.jpg",
        '    /p/it\'s "q".jpg',
        "    '/p/one\\ntwo.jpg'",
        "    /p/猫.jpg",
    ]


def test_a_source_that_succeeded_later_is_no_failure(root: CacheRoot, run: Run) -> None:
    records = [MediaRecord(source=source, key=key(5)) for source in "deg"]
    append_media(root, records, "job")
    assert run("--failures") == "no failures\n"


def test_damage_to_one_space_does_not_hide_the_others(root: CacheRoot, run: Run) -> None:
    fp16, int8 = root.space_names()
    path = root.space(int8).commit("image", 0)
    path.write_bytes(path.read_bytes()[:-1])
    lines = run().splitlines()
    assert any(line.startswith(f"{int8}: DAMAGED: {path}: ") for line in lines)
    assert any(line.startswith(f"{fp16} ") for line in lines)


def test_an_empty_cache_is_named_as_empty(tmp_path: Path, run: Run) -> None:
    out = run()
    assert "no spaces; create one: python -m encode.run" in out
    assert "no data sets" in out
    tmp_path.rmdir()
    with pytest.raises(UserError, match=r"no cache at .*--features"):
        run()


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1179648, "1.18 MB"), (99_960_000, "100 MB"),
     (999_600, "1 MB"), (430e9, "430 GB"), (1.69e12, "1.69 TB"), (2.5e15, "2500 TB")],
)  # fmt: skip
def test_bytes_have_three_digits(nbytes: float, text: str) -> None:
    assert bytes_text(nbytes) == text


def test_columns_are_aligned() -> None:
    text = table_text(("name", "n"), [("a", "5"), ("longer", "1,000")], right="n")
    assert text.splitlines() == ["name        n", "a           5", "longer  1,000"]


def test_names_of_any_script_are_aligned() -> None:
    lines = table_text(
        ("name", "n"), [("写真", "5"), ("e\u0301te\u0301", "7")], right="n"
    ).splitlines()
    assert lines == ["name  n", "写真  5", "e\u0301te\u0301   7"]
