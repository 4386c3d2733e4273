"""Samples are read as they were written, and unchanged content is not written again.

write_samples(root, "d", samples)
samples = list(read_samples(root, "d"))
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.errors import CorruptError, NotFoundError
from cache.format.checksums import UNSEALED, seal_file
from cache.store import samples
from cache.store.files import new_file
from cache.store.paths import CacheRoot
from cache.store.samples import (
    MediaRef,
    Message,
    Origin,
    Sample,
    dataset_names,
    read_origin,
    read_samples,
    samples_at,
    samples_digest,
    samples_table,
    write_samples,
)
from tests.support.faults import flip

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
weight = st.floats(0, 10)
sample = st.builds(
    Sample,
    id=text,
    dataset=st.just("toy"),
    messages=st.lists(
        st.builds(Message, role=st.sampled_from(samples.ROLES), content=text, weight=weight),
        max_size=3,
    ).map(tuple),
    media=st.lists(
        st.builds(MediaRef, source=text, kind=st.sampled_from(["image", "frame"])), max_size=3
    ).map(tuple),
    weight=weight,
    task=text,
    choice=text,
)


def question(number: int) -> Sample:
    return Sample(
        id=str(number),
        dataset="toy",
        messages=(
            Message(role="user", content="<image>What?"),
            Message(role="assistant", content=f"{number}: sha256:{'0' * 64}", weight=0.2),
        ),
        media=(MediaRef(source=f"/images/{number}.png"),),
        task="what",
    )


@settings(max_examples=25, deadline=None)
@given(st.lists(sample, max_size=5))
def test_samples_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, samples: list[Sample]
) -> None:
    root = CacheRoot(tmp_path_factory.mktemp("root"))
    assert write_samples(root, "toy", samples)
    assert list(read_samples(root, "toy")) == samples
    assert samples_table(root, "toy").num_rows == len(samples)


def test_many_samples_are_streamed_in_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "ROW_GROUP", 4)
    root = CacheRoot(tmp_path)
    assert write_samples(root, "toy", map(question, range(11)))
    with pq.ParquetFile(root.samples("toy")) as file:
        assert file.num_row_groups == 3
    assert list(read_samples(root, "toy")) == [question(number) for number in range(11)]
    assert next(read_samples(root, "toy")) == question(0)


def test_unchanged_samples_are_not_written_again(tmp_path: Path) -> None:
    root, path = CacheRoot(tmp_path), CacheRoot(tmp_path).samples("toy")
    assert write_samples(root, "toy", [question(1)])
    before = path.stat()
    digest = samples_digest(root, "toy")
    assert not write_samples(root, "toy", [question(1)])
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert write_samples(root, "toy", [question(2)])
    assert samples_digest(root, "toy") != digest
    assert [p.name for p in path.parent.iterdir()] == [path.name]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.just(UNSEALED)


@settings(max_examples=25, deadline=None)
@given(st.lists(texts, max_size=4).map(tuple), st.dictionaries(texts, texts | st.integers()))
def test_where_samples_came_from_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, words: tuple[str, ...], account: dict[str, object]
) -> None:
    """Keys of other people's data are in the account. One that looks like a seal does no harm."""
    root = CacheRoot(tmp_path_factory.mktemp("root"))
    origin = Origin(words=words, account=account)
    assert write_samples(root, "toy", [question(1)], lambda: origin)
    assert read_origin(root, "toy") == origin
    assert not write_samples(root, "toy", [question(1)], lambda: origin)


def test_another_origin_replaces_the_file_and_not_the_digest(tmp_path: Path) -> None:
    root = CacheRoot(tmp_path)
    write_samples(root, "toy", [question(1)])
    assert read_origin(root, "toy") is None
    digest = samples_digest(root, "toy")
    seen: list[str] = []

    def samples_seen() -> Iterator[Sample]:
        yield question(1)
        seen.append("all")

    for words in (("--dataset", "toy"), ("--dataset", "toy", "--limit", "1")):
        assert write_samples(
            root,
            "toy",
            samples_seen(),
            lambda w=words: Origin(words=w, account={"seen": list(seen)}),
        )
        origin = read_origin(root, "toy")
        assert origin is not None
        assert (origin.words, origin.account) == (words, {"seen": seen}), "made after the samples"
        assert samples_digest(root, "toy") == digest


@pytest.mark.parametrize(
    "value", ["", "{}", "[]", "[" * 50_000, '{"words": [1], "account": {}}', '{"words": 1}']
)
def test_an_origin_of_another_form_is_none(tmp_path: Path, value: str) -> None:
    root, path = CacheRoot(tmp_path), CacheRoot(tmp_path).samples("toy")
    write_samples(root, "toy", [question(1)])
    table = samples_table(root, "toy")
    metadata = {**table.schema.metadata, "origin": value, "seal": UNSEALED}
    with new_file(path) as file:
        pq.write_table(table.replace_schema_metadata(metadata), file)
        seal_file(file)
    assert read_origin(root, "toy") is None
    assert list(read_samples(root, "toy")) == [question(1)]


def test_an_error_while_samples_are_made_leaves_the_old_ones(tmp_path: Path) -> None:
    root = CacheRoot(tmp_path)
    write_samples(root, "toy", [question(1)])

    def failing() -> object:
        yield question(2)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_samples(root, "toy", failing())
    assert list(read_samples(root, "toy")) == [question(1)]


def test_damaged_samples_are_refused_then_replaced(tmp_path: Path) -> None:
    root, path = CacheRoot(tmp_path), CacheRoot(tmp_path).samples("toy")
    write_samples(root, "toy", [question(1)])
    flip(path, 4 * path.stat().st_size)
    for read in (samples_digest, samples_table, lambda *args: next(read_samples(*args))):
        with pytest.raises(CorruptError, match=r"part-00000\.parquet"):
            read(root, "toy")
    assert write_samples(root, "toy", [question(1)])
    assert next(read_samples(root, "toy")) == question(1)


def test_samples_of_another_version_are_named_as_such(tmp_path: Path) -> None:
    root, path = CacheRoot(tmp_path), CacheRoot(tmp_path).samples("toy")
    write_samples(root, "toy", [question(1)])
    table = samples_table(root, "toy").drop_columns(["choice"])
    with new_file(path) as file:
        pq.write_table(table.replace_schema_metadata({"content": "0" * 64, "seal": UNSEALED}), file)
        seal_file(file)
    for read in (samples_table, lambda *args: next(read_samples(*args))):
        with pytest.raises(CorruptError, match=r"another version .*task\); .* --dataset toy "):
            read(root, "toy")


def test_the_error_for_a_missing_data_set_lists_the_existing_ones(tmp_path: Path) -> None:
    root = CacheRoot(tmp_path)
    write_samples(root, "colors", [])
    write_samples(root, "shapes", [])
    assert dataset_names(root) == ["colors", "shapes"]
    with pytest.raises(
        NotFoundError, match=r"no data set 'shape' .*colors, shapes.*nearest: shapes.*encode.run"
    ):
        samples_digest(root, "shape")


def test_some_samples_are_read_by_number(tmp_path: Path) -> None:
    root = CacheRoot(tmp_path)
    write_samples(root, "d", [Sample(id=str(i), dataset="d", messages=()) for i in range(9000)])
    numbers = np.array([0, 7, 8191, 8192, 8999])
    assert [int(s.id) for s in samples_at(root, "d", numbers)] == numbers.tolist()
    with pytest.raises(CorruptError, match=r"9,000 samples, so none has number 9,000"):
        list(samples_at(root, "d", np.array([3, 9000])))
