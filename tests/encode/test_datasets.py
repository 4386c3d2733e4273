"""Data sets are read whole, their accounts are printed and kept, and faults refuse them before any encoding.

counter = read_datasets(root, datasets, choices, Reading(sample=1000))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from cache.store.paths import CacheRoot
from cache.store.samples import MediaRef, Sample, dataset_names, read_origin, read_samples
from configs import UserError
from encode.datasets import Reading, listing, read_datasets
from encode.records.account import Account, FaultError
from encode.sources.catalogue import Choice, Entry, read_catalogue
from encode.sources.demo_drawings import DemoWorld


@dataclass(frozen=True)
class Lines:
    """A data set of numbered lines, some of which cannot be used."""

    name: str
    total: int
    bad: tuple[int, ...] = ()

    needs_sizes: ClassVar[bool] = False

    def samples(
        self, sizes: Mapping[str, tuple[int, int]] = {}, account: Account | None = None
    ) -> Iterator[Sample]:
        account = account or Account(name=self.name)
        account.left_out[".heic"] += 2
        for number in range(self.total):
            if number in self.bad:
                error = FaultError("unknown key", f"unknown key 'captoin{number}'")
                account.fault(f"{self.name}.jsonl:{number + 1}", error)
                continue
            account.lines["ours"] += 1
            media = (MediaRef(source=f"/{self.name}/{number // 2}.png"),)
            yield Sample(id=f"{number}", dataset=self.name, messages=(), media=media)


def read(root: CacheRoot, reading: Reading, *datasets: Lines, write: bool = True) -> list[str]:
    choices = {}
    for dataset in datasets:
        entry = Entry(source="folder", path=f"/{dataset.name}")
        word = f"{dataset.name}=folder:/{dataset.name}"
        choices[dataset.name] = Choice(name=dataset.name, entry=entry, word=word)
    return list(read_datasets(root, datasets, choices, reading, write=write).media)


def test_an_account_is_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = CacheRoot(tmp_path)
    media = read(root, Reading(), Lines("a", 5), Lines("b", 1))
    assert media == ["/a/0.png", "/a/1.png", "/a/2.png", "/b/0.png"]
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "a: 5 lines (ours), 3 images; left out: 2 .heic",
        "b: 1 line (ours), 1 image; left out: 2 .heic",
    ]
    origin = read_origin(root, "a")
    assert origin is not None
    assert Account.from_json("a", dict(origin.account)).text() == lines[0]
    assert origin.words == ("--dataset", "a=folder:/a")


def test_planning_prints_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read(CacheRoot(tmp_path), Reading(), Lines("a", 5), write=False)
    assert capsys.readouterr().out.startswith("a: 5 lines")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize(
    "reading", [Reading(), Reading(limit=70), Reading(sample=3)], ids=["all", "limit", "sample"]
)
def test_all_lines_are_read_before_faults_refuse_them(
    tmp_path: Path, reading: Reading, write: bool
) -> None:
    root = CacheRoot(tmp_path)
    bad = tuple(range(0, 60, 2))
    with pytest.raises(UserError) as refused:
        read(root, reading, Lines("good", 4), Lines("b", 100, bad), Lines("c", 2), write=write)
    lines = str(refused.value).splitlines()
    assert lines[0] == "b.jsonl:1: unknown key 'captoin0'"
    assert lines[20] == "... and 10 more"
    assert lines[21].startswith("b: 30 lines cannot be used (unknown key: 30); correct them, or")
    assert lines[21].endswith("--bad-lines leave-out")
    assert len(lines) == 22
    assert dataset_names(root) == (["good"] if write else [])


def test_bad_lines_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = CacheRoot(tmp_path)
    read(root, Reading(leave_out=True), Lines("b", 10, (0, 3)))
    assert (
        "8 lines (ours), 5 images; left out: 2 .heic, 2 lines (unknown key: 2)"
        in capsys.readouterr().out
    )
    origin = read_origin(root, "b")
    assert origin is not None
    assert origin.words == ("--dataset", "b=folder:/b", "--bad-lines", "leave-out")
    assert origin.account["faults"] == {"unknown key": 2}


def test_keys_that_are_left_out_are_part_of_the_words(tmp_path: Path) -> None:
    root = CacheRoot(tmp_path)
    read(root, Reading(ignore_keys=frozenset({"messages.hint", "a"})), Lines("b", 1))
    origin = read_origin(root, "b")
    assert origin is not None
    assert origin.words == ("--dataset", "b=folder:/b", "--ignore-keys", "a,messages.hint")


@pytest.mark.parametrize("wanted", [1, 7, 500, 2000])
def test_a_sample_has_that_many_from_everywhere(tmp_path: Path, wanted: int) -> None:
    root = CacheRoot(tmp_path)
    read(root, Reading(sample=wanted), Lines("a", 1000))
    ids = [int(sample.id) for sample in read_samples(root, "a")]
    assert len(ids) == min(wanted, 1000)
    assert ids == sorted(set(ids))
    if wanted == 500:
        quarters = [sum(q * 250 <= i < (q + 1) * 250 for i in ids) for q in range(4)]
        assert min(quarters) > 90
    origin = read_origin(root, "a")
    assert origin is not None
    assert origin.account["samples"] == len(ids)
    assert origin.account["lines"] == {"ours": 1000}, "each line counts once"


def test_an_empty_data_set_can_be_sampled(tmp_path: Path) -> None:
    read(CacheRoot(tmp_path), Reading(sample=3), Lines("a", 0))
    assert list(read_samples(CacheRoot(tmp_path), "a")) == []


def test_the_options_of_a_source_are_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reading = Reading(source=Path("lists"), media=Path("pictures"), limit=3)

    def words(source: str, **more: str) -> str:
        entry = Entry(source=source, **more)  # type: ignore[arg-type]
        return " ".join(reading.words(Choice(name="x", entry=entry, word="x")))

    assert words("folder", path="/x") == "--dataset x --limit 3"
    assert words("pixmo", hub="a/b") == f"--dataset x --source {tmp_path}/lists --limit 3"
    assert words("json", path="/x") == f"--dataset x --media {tmp_path}/pictures --limit 3"


# ---- --list


def test_the_list_has_sizes_hours_and_totals(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {
        "a": Entry(
            source="folder", path="/a", rows=10, images=600_000, text_bytes=1e6, media_bytes=2e9
        ),
        "b": Entry(source="folder", path="/b", rows=5, images=60_000, about="bees"),
        "c": Entry(source="folder", path="/c", rows=7, images=0, text_bytes=5e5),
    }
    groups = {"ab": ("a", "b"), "ac": ("a", "c"), "b2": ("b",)}
    monkeypatch.setattr("encode.datasets.read_catalogue", lambda: (entries, groups))
    lines = listing().splitlines()
    assert [line.split("  about")[0].split() for line in lines[:1]] == [
        ["data", "set", "rows", "images", "text", "media", "A100", "2cores"]
    ]
    assert [line.split() for line in lines[1:7]] == [
        ["a", "10", "600,000", "1", "MB", "2", "GB", "0.6", "505", "folder:/a"],
        ["b", "5", "60,000", "?", "?", "<0.1", "51", "bees"],
        ["c", "7", "0", "500", "kB", "?", "0", "0", "folder:/c"],
        ["ab", "15", "660,000", "1", "MB+", "2", "GB+", "0.6", "556", "group:", "a,", "b"],
        ["ac", "17", "600,000", "1.5", "MB", "2", "GB+", "0.6", "505", "group:", "a,", "c"],
        ["b2", "5", "60,000", "?", "?", "<0.1", "51", "group:", "b"],
    ]


def test_the_stages_of_training_are_groups() -> None:
    entries, groups = read_catalogue()
    for stage in ("pretraining", "sft", "long-context"):
        assert {"hf", "pixmo"} == {entries[name].source for name in groups[stage]}
    world = DemoWorld.load()
    drawn = [e for n, e in entries.items() if e.source == "demo" and n != "demo-videos"]
    assert {entry.images for entry in drawn} == {world.images}
