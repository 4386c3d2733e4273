"""PixMo data sets from Parquet files below `--source`: streamed samples with stable ids, and clear errors.

(dataset,) = open_datasets(["pixmo-cap"], Path("cache"), source=Path("downloads"))
samples = dataset.samples()
"""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import configs
from cache.store.paths import CacheRoot
from cache.store.samples import MediaRef, Message, Sample, read_samples, write_samples
from configs import UserError
from encode.records.account import Account
from encode.sources.catalogue import Dataset, open_datasets, read_catalogue
from encode.sources.pixmo import NAMES
from tests.support.pixmo_lists import HELD_OUT, write_pixmo, write_table

SHA = "ab" * 32
URLS = [(f"https://x.org/{n}.jpg", SHA if n % 2 else None) for n in range(6)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_pixmo(tmp_path / "downloads", URLS)


def only(name: str, source: Path) -> Dataset:
    (dataset,) = open_datasets([name], source / "cache", source)
    return dataset


def refusal(name: str, source: Path) -> str:
    """Return the error of reading a data set, which is one line."""
    with pytest.raises(UserError) as refused:
        list(only(name, source).samples())
    assert "\n" not in str(refused.value)
    return str(refused.value)


def texts(sample: Sample) -> list[str]:
    return [message.content for message in sample.messages]


def a_question(n: int = 0, **changed: Any) -> dict[str, Any]:
    row = {"image_url": f"https://x.org/{n}.jpg", "question": f"What {n}?", "answer": f"It {n}."}
    return {**row, **changed}


ASK = "pixmo-ask-model-anything"


# ---- samples


def test_the_group_pixmo_has_all_five_data_sets(source: Path) -> None:
    opened = open_datasets(["pixmo"], source / "cache", source)
    assert [dataset.name for dataset in opened] == list(NAMES)
    tasks = {d.name: Counter(s.task for s in d.samples()) for d in opened}
    assert tasks == {
        "pixmo-cap": {"caption": 6, "transcript": 9},
        "pixmo-points": {"point": 12},
        "pixmo-count": {"count": 6},
        "pixmo-cap-qa": {"question": 3, "chat": 3},
        ASK: {"question": 6},
    }


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_complete_and_stable(name: str, source: Path, tmp_path: Path) -> None:
    dataset = only(name, source)
    found = list(dataset.samples())
    assert list(dataset.samples()) == found, "the same each time"
    if not dataset.needs_sizes:
        assert list(dataset.samples({url: (2, 4) for url, _ in URLS})) == found
    assert len({sample.id for sample in found}) == len(found)
    hashed = name not in ("pixmo-cap", "pixmo-cap-qa")
    known = {url: sha if hashed else None for url, sha in URLS}
    for sample in found:
        assert sample.dataset == name
        (media,) = sample.media
        assert media == MediaRef(source=media.source, sha256=known[media.source])
        assert sample.messages[0].content.startswith("<image>")
        assert [m.role for m in sample.messages] == ["user", "assistant"] * (
            len(sample.messages) // 2
        )
    assert {s.media[0].source for s in found} == set(known)
    root = CacheRoot(tmp_path / "features")
    write_samples(root, name, found)
    assert list(read_samples(root, name)) == found


def test_one_sample_in_full(source: Path) -> None:
    second = list(only("pixmo-points", source).samples())[2]
    assert second == Sample(
        id="train-00000-of-00001#2",
        dataset="pixmo-points",
        messages=(
            Message(role="user", content="<image>Point to bright spots."),
            Message(
                role="assistant",
                content='<points coords="1 1 100 500 2 200 510">bright spots</points>',
                weight=0.2,
            ),
        ),
        media=(MediaRef(source="https://x.org/1.jpg", sha256=SHA),),
        task="point",
    )
    ids = [s.id.partition("#")[2] for s in only("pixmo-cap", source).samples()]
    assert ids[:5] == ["0", "0.t0", "1", "1.t0", "1.t1"]


def test_sizes_add_points_to_counts_and_keep_ids(source: Path) -> None:
    dataset = only("pixmo-count", source)
    before = list(dataset.samples())
    sizes = {url: (2, 4) for url, _ in URLS[:4]}
    after = list(dataset.samples(sizes))
    assert [s.id for s in after] == [s.id for s in before]
    assert [s.media for s in after] == [s.media for s in before]
    assert [texts(s)[1] for s in before] == ["0", "1", "2", "3", "0", "1"]
    assert [texts(s)[1] for s in after[:4]] == [
        "0",
        '<points coords="1 1 125 062">things</points> That makes 1.',
        '<points coords="1 1 125 062 2 250 125">things</points> That makes 2.',
        '<points coords="1 1 125 062 2 250 125 3 375 188">things</points> That makes 3.',
    ]
    assert after[4:] == before[4:], "their sizes are unknown"


def test_only_pixmo_count_needs_sizes(source: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    specs = [*NAMES, "demo", f"folder:{tmp_path / 'images'}"]
    found = {d.name for d in open_datasets(specs, tmp_path / "cache", source) if d.needs_sizes}
    assert found == {"pixmo-count"}


# ---- files


def test_only_training_files_are_read(source: Path) -> None:
    found = list(only("pixmo-count", source).samples())
    assert len(found) == len(URLS)
    assert not any(HELD_OUT in text for sample in found for text in texts(sample))
    assert len(list((source / "pixmo-count" / "data").glob("*.parquet"))) == 3


def test_files_are_read_in_order_and_give_ids(tmp_path: Path) -> None:
    for file in (1, 0):
        rows = [a_question(10 * file + n) for n in range(5)]
        write_table(tmp_path, ASK, rows, stem=f"train-{file:05}-of-00002", row_group=2)
    found = list(only(ASK, tmp_path).samples())
    assert [s.id for s in found] == [
        f"train-{file:05}-of-00002#{row}" for file in (0, 1) for row in range(5)
    ]
    assert [texts(s)[1] for s in found] == [f"It {10 * f + n}." for f in (0, 1) for n in range(5)]


def test_files_without_a_split_are_training_files(tmp_path: Path) -> None:
    write_table(tmp_path, ASK, [a_question(1)], stem="0000")
    write_table(tmp_path, ASK, [a_question(2)], stem="test-00000-of-00001")
    assert [s.id for s in only(ASK, tmp_path).samples()] == ["0000#0"]


def test_a_missing_shard_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in (0, 3):
        write_table(tmp_path, ASK, [a_question(number)], stem=f"train-{number:05}-of-00004")
    assert len(list(only(ASK, tmp_path).samples())) == 2
    (line,) = caplog.messages
    assert "2 of 4 files are missing (first train-00001-of-00004.parquet)" in line


def test_a_missing_data_set_is_logged_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_table(tmp_path, ASK, [a_question()])
    opened = open_datasets(["pixmo", "demo-points", "pixmo-cap"], tmp_path, tmp_path)
    assert [d.name for d in opened] == [ASK, "demo-points"]
    assert [m.partition(" is not below")[0] for m in caplog.messages] == [
        f"data set {name}" for name in NAMES if name != ASK
    ]


def test_a_source_without_any_data_set_is_refused(tmp_path: Path, source: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, expected in (
        (tmp_path / "nowhere", "nowhere: no such folder"),
        (tmp_path / "empty", "looked for the folders pixmo-cap, pixmo-points"),
        (tmp_path / "empty", "hf download allenai/pixmo-cap --repo-type dataset --local-dir"),
    ):
        with pytest.raises(UserError) as refused:
            open_datasets(["pixmo-cap", "pixmo"], tmp_path, path)
        assert expected in str(refused.value) and "\n" not in str(refused.value)


def test_a_source_may_be_the_data_set_itself(source: Path, tmp_path: Path) -> None:
    assert open_datasets(["pixmo-cap"], tmp_path, source / "pixmo-cap") == open_datasets(
        ["pixmo-cap"], tmp_path, source
    )


def test_held_out_files_alone_are_refused(tmp_path: Path) -> None:
    write_table(tmp_path, "pixmo-count", [], stem="test-00000-of-00001")
    with pytest.raises(UserError, match="pixmo-count has no training files, only test; to use one"):
        open_datasets(["pixmo-count"], tmp_path, tmp_path)


def test_an_unused_source_is_refused(source: Path) -> None:
    with pytest.raises(UserError, match="no data set named by --dataset is read from there"):
        open_datasets(["demo"], source, source)


def test_a_tilde_is_the_home_folder(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(source.parent))
    assert open_datasets(["pixmo-cap"], source, Path("~/downloads"))


def test_entries_of_the_catalogue_name_a_repository(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entries, groups = read_catalogue()
    assert {name: e.hub for name, e in entries.items() if e.source == "pixmo"} == {
        name: f"allenai/{name}" for name in NAMES
    }
    assert groups["pixmo"] == NAMES
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    (tmp_path / "datasets.yaml").write_text("datasets: {pixmo-cap: {source: pixmo}}\n")
    with pytest.raises(UserError, match="pixmo-cap: source: pixmo needs hub"):
        read_catalogue()
    yaml = "datasets: {pixmo-caps: {source: pixmo, hub: a/b}}\n"
    (tmp_path / "datasets.yaml").write_text(yaml)
    with pytest.raises(UserError, match=r"pixmo-caps is none of pixmo-cap,.*nearest: pixmo-cap"):
        open_datasets(["pixmo-caps"], tmp_path, tmp_path)


# ---- columns


WRONG_TYPES: list[tuple[str, dict[str, Any], str]] = [
    ("pixmo-cap", {"caption": pa.int64()}, "'caption' of pixmo-cap should be text, it is int64"),
    (
        "pixmo-cap",
        {"transcripts": pa.string()},
        "'transcripts' of pixmo-cap should be lists of text, it is string",
    ),
    ("pixmo-points", {"count": pa.string()}, "should be whole numbers, it is string"),
    ("pixmo-points", {"points": pa.string()}, "should be points (x, y), it is string"),
    (
        "pixmo-points",
        {"points": pa.list_(pa.struct({"x": pa.float64()}))},
        "should be points (x, y), it is list<element: struct<x: double>>",
    ),
    (
        "pixmo-count",
        {"points": pa.struct({"x": pa.float64(), "y": pa.float64()})},
        "should be points (x, y), it is struct<x: double, y: double>",
    ),
    ("pixmo-cap-qa", {"messages": pa.string()}, "should be lists of text, it is string"),
]


@pytest.mark.parametrize(("name", "types", "expected"), WRONG_TYPES)
def test_a_column_of_another_type_is_refused(
    name: str, types: Mapping[str, Any], expected: str, tmp_path: Path
) -> None:
    path = write_table(tmp_path, name, [], types=types)
    message = refusal(name, tmp_path)
    assert message.startswith(f"{path}: column ")
    assert expected in message.replace("child 0, ", "")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_another_data_set_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name / "data" / "train-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"image_url": ["http://x"], "text": ["hi"]}), path)
    message = refusal(name, tmp_path)
    assert message.startswith(f"{path}: {name} needs a column '")
    assert message.endswith("there are image_url (string), text (string)")


def test_other_columns_and_widths_are_accepted(tmp_path: Path) -> None:
    for layout, kind in (("list", pa.float32()), ("struct", pa.float64())):
        both = {"x": [1.0, 2.0], "y": [3.0, 4.0]}
        points: Any = both
        types: Any = pa.struct({"x": pa.list_(kind), "y": pa.large_list(kind)})
        if layout == "list":
            points = [{"x": x, "y": y} for x, y in zip(both["x"], both["y"], strict=True)]
            types = pa.large_list(pa.struct({"y": kind, "x": kind, "z": kind}))
        row = {"image_url": "http://x", "label": "cars", "count": 2, "points": points}
        others = {"count": pa.uint8(), "label": pa.large_string(), "n": pa.bool_()}
        write_table(tmp_path, "pixmo-points", [row], types={"points": types, **others})
        (found,) = only("pixmo-points", tmp_path).samples()
        assert texts(found)[1] == '<points coords="1 1 010 030 2 020 040">cars</points>'


def test_a_file_without_messages_is_accepted(tmp_path: Path) -> None:
    path = write_table(tmp_path, "pixmo-cap-qa", [a_question(question="[USER] What? [ASSISTANT]")])
    pq.write_table(pq.read_table(path).drop_columns("messages"), path)
    (found,) = only("pixmo-cap-qa", tmp_path).samples()
    assert texts(found) == ["<image>What?", "It 0."]


# ---- damage


def test_every_truncated_file_gives_one_line(tmp_path: Path) -> None:
    path = write_table(tmp_path, ASK, [a_question(n) for n in range(300)], row_group=100)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), len(whole) // 25), len(whole) - 1]:
        path.write_bytes(whole[:length])
        message = refusal(ASK, tmp_path)
        assert message.startswith(f"{path}: damaged file (")
        assert message.endswith("; download it again")


def test_zeroed_bytes_give_rows_or_one_line(tmp_path: Path) -> None:
    path = write_table(tmp_path, ASK, [a_question(n) for n in range(300)], row_group=100)
    whole = path.read_bytes()
    refused = 0
    for start in range(4, len(whole), len(whole) // 40):
        path.write_bytes(whole[:start] + bytes(16) + whole[start + 16 :])
        try:
            assert len(list(only(ASK, tmp_path).samples())) <= 300
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 10


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    path = write_table(tmp_path, ASK, [])
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0bd\nsize 138400335\n")
    assert refusal(ASK, tmp_path).endswith(
        "a Git LFS pointer, not the data: fetch it with git lfs pull"
    )


def test_an_unreadable_file_gives_one_line(tmp_path: Path) -> None:
    path = tmp_path / ASK / "data" / "train-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    path.symlink_to(tmp_path / "gone")
    assert refusal(ASK, tmp_path).endswith("cannot be read (No such file or directory)")


# ---- rows


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_unusable_rows_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        a_question(0),
        a_question(1, image_url=None),
        a_question(2, answer=" "),
        a_question(3, image_url="ftp://x.org/a"),
        a_question(4, answer=None),
        a_question(5),
    ]
    write_table(tmp_path, ASK, rows)
    dataset = only(ASK, tmp_path)
    found = [s.id for s in dataset.samples()]
    assert found == ["train-00000-of-00001#0", "train-00000-of-00001#5"]
    list(dataset.samples())
    (line,) = warnings(caplog)
    assert line == (
        f"{ASK}: left out: no answer (2, first train-00000-of-00001#2); "
        "left out: no image_url (1, first train-00000-of-00001#1); "
        "left out: image_url is not an http(s) URL (1, first train-00000-of-00001#3)"
    )


def test_an_account_counts_rows_and_why_they_are_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [a_question(0), a_question(1, image_url=None), a_question(2, answer=" ")]
    write_table(tmp_path, ASK, rows)
    account = Account(name=ASK)
    assert len(list(account.watch(only(ASK, tmp_path).samples({}, account)))) == 1
    assert account.text() == (
        f"{ASK}: 3 lines (PixMo), 1 image; left out: 1 no image_url, 1 no answer"
    )
    assert not warnings(caplog), "the account is printed"


def test_unusable_rows_are_logged_if_the_caller_stops_early(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [a_question(0, answer=None), a_question(1), a_question(2, answer=None), a_question(3)]
    write_table(tmp_path, ASK, rows)
    root = CacheRoot(tmp_path / "features")
    write_samples(root, ASK, islice(only(ASK, tmp_path).samples(), 1))
    gc.collect()
    assert [s.id for s in read_samples(root, ASK)] == ["train-00000-of-00001#1"]
    assert warnings(caplog) == [f"{ASK}: left out: no answer (1, first train-00000-of-00001#0)"]


def test_unusable_points_of_a_count_are_logged_in_the_second_pass(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = "https://x.org/a.jpg"
    row = {"image_url": url, "label": "dogs", "count": 1, "points": {"x": [90.0], "y": [1.0]}}
    write_table(tmp_path, "pixmo-count", [row])
    dataset = only("pixmo-count", tmp_path)
    before = list(dataset.samples())
    assert warnings(caplog) == []
    assert list(dataset.samples({url: (10, 10)})) == before
    (line,) = warnings(caplog)
    assert "counted without its points: a point outside the image (1, first" in line


def test_invalid_utf8_makes_only_its_row_unusable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts_ = pa.array([b"What?", b"\xff\xfe", b"Which?"], pa.binary()).view(pa.string())
    path = write_table(tmp_path, ASK, [a_question(n) for n in range(3)])
    table = pq.read_table(path)
    table = table.set_column(table.schema.get_field_index("question"), "question", texts_)
    pq.write_table(table, path)
    found = [texts(s)[0] for s in only(ASK, tmp_path).samples()]
    assert found == ["<image>What?", "<image>Which?"]
    assert "question is not UTF-8 (1, first train-00000-of-00001#1)" in warnings(caplog)[0]


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([], "there are none"),
        ([a_question(answer=None)], "left out: no answer (1, first train-00000-of-00001#0)"),
    ],
)
def test_a_data_set_without_usable_rows_is_refused(
    rows: list[Any], why: str, tmp_path: Path
) -> None:
    write_table(tmp_path, ASK, rows)
    assert refusal(ASK, tmp_path).endswith(f"is usable: {why}")


# ---- memory


def peak_bytes(samples: Iterator[Sample]) -> int:
    """Return the largest memory that Arrow used while these samples were read."""
    usual = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(pool)
    try:
        assert sum(1 for _ in samples) > 0
        return int(pool.max_memory())
    finally:
        pa.set_memory_pool(usual)


@pytest.mark.slow
@pytest.mark.parametrize("row_group", [1000, 1_000_000])
def test_memory_does_not_grow_with_the_file(row_group: int, tmp_path: Path) -> None:
    points = [{"x": float(i), "y": float(i)} for i in range(10)]
    row = {"image_url": "https://x.org/a.jpg", "label": "x", "count": 10, "points": points}
    path = write_table(tmp_path, "pixmo-points", [row])
    one = pq.read_table(path)
    peaks = []
    for rows in (10_000, 30_000):
        many = one.take(pa.array([0] * rows))
        labels = pa.array([f"thing {n} {'x' * 200}" for n in range(rows)])
        many = many.set_column(many.schema.get_field_index("label"), "label", labels)
        pq.write_table(many, path, row_group_size=row_group, use_dictionary=False)
        peaks.append(peak_bytes(only("pixmo-points", tmp_path).samples()))
    assert many.nbytes > 10 << 20
    assert peaks[1] < 1.2 * peaks[0] < 4 << 20
