"""Which samples have which rows: the join agrees with one written with dictionaries, for any content.

references = read_references(root, "d", table)
media, (items,) = number_media([references], table)
rows = find_rows(reader, media, max_frames=128)
complete = references.count(~np.append(rows.counts > 0, False)[items]) == 0
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.format.frame_sampling import frame_views, time_view
from cache.store.ledger import MediaRecord, append_media, media_table, read_media
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.references import (
    IMAGE,
    MEDIA_KINDS,
    UNKNOWN_KIND,
    References,
    all_rows,
    find_rows,
    means_other_bytes,
    number_media,
    read_references,
    split_samples,
)
from cache.store.samples import SPLITS, MediaRef, Sample, read_samples, write_samples
from cache.store.space import Present, Space
from cache.store.writer import ShardWriter
from tests.support.spaces import fill, key, make_space, row

MAX_FRAMES = 3
DURATIONS = (0.0, 0.7, 5.0, None)


def filled_cache(folder: Path, seed: int) -> tuple[CacheRoot, Space]:
    """A cache with any mixture of present, absent, failed, unknown and mismatched media.

    Sources a to j have keys 0 to 4, so that several sources share their bytes. Some videos lack frames.
    """
    rng = np.random.default_rng(seed)
    space, root = make_space(folder), CacheRoot(folder)
    records = []
    for source in "abcdefghij":
        number = int(rng.integers(5))
        if rng.random() < 0.2:
            records.append(MediaRecord(source=source, status="failed", stage="fetch", error="404"))
        elif rng.random() < 0.5:
            records.append(MediaRecord(source=source, key=key(number)))
        else:
            duration_s = DURATIONS[int(rng.integers(4))]
            video = MediaRecord(source=source, key=key(number), kind="video", duration_s=duration_s)
            records.append(video)
    append_media(root, records, "job")
    fill(space, [n for n in range(5) if rng.random() < 0.6] or [0])
    writer = ShardWriter(space, "frame", 0)
    for number in range(5):
        for view in sorted({view for d in (0.0, 0.7, 5.0) for view in frame_views(d, MAX_FRAMES)}):
            if writer.left and rng.random() < 0.8:
                stored = row(number, "frame", space.spec)
                writer.append(key(number), view, stored, time_s=int(view[2:]) / 1e6)
    writer.commit()
    for dataset in ("one", "two"):
        write_samples(root, dataset, [sample(dataset, n, rng) for n in range(40)])
    return root, space


def sample(dataset: str, number: int, rng: np.random.Generator) -> Sample:
    media = []
    for source in rng.choice(list("abcdefghijxy"), int(rng.integers(0, 4))):
        stated = None if rng.random() < 0.6 else key(int(rng.integers(5)))
        kind = str(rng.choice(["image", "video", "video", "sound"], p=[0.6, 0.2, 0.15, 0.05]))
        media.append(MediaRef(source=str(source), kind=kind, sha256=stated))
    return Sample(id=str(number), dataset=dataset, messages=(), media=tuple(media))


@pytest.mark.parametrize("seed", range(20))
def test_the_join_equals_one_with_dictionaries(tmp_path: Path, seed: int) -> None:
    root, space = filled_cache(tmp_path, seed)
    table, ledger, reader = media_table(root), read_media(root), FeatureReader(space.paths)
    names = ["one", "two"]
    references = [read_references(root, name, table) for name in names]
    media, numbers = number_media(references, table)
    found = find_rows(reader, media, MAX_FRAMES)
    every = all_rows(reader, media)
    present = Present.of(space, max_frames=MAX_FRAMES)
    durations: dict[str | None, float | None] = defaultdict(lambda: None)
    durations |= {r.key: r.duration_s for r in ledger.values() if r.duration_s is not None}
    stored = defaultdict(list)
    for array in ("image", "frame"):
        for position in range(len(reader.index[array])):
            at = reader.index[array].times[position]
            number = int(reader.index[array].rows(np.array([position]))[0])
            stored[array, reader.index[array].identity(position)[0]].append((at, number))
    distinct = set()
    for name, one, items in zip(names, references, numbers, strict=True):
        refs = [(n, r) for n, s in enumerate(read_samples(root, name)) for r in s.media]
        assert one.sample.tolist() == [n for n, _ in refs]
        for at, (_, ref) in enumerate(refs):
            record = ledger.get(ref.source)
            known = record.key if record else None
            assert bool(one.mismatch[at]) == means_other_bytes(ref.sha256, known)
            item = int(items[at])
            usable = known is not None and ref.sha256 in (None, known) and ref.kind != "sound"
            assert (item >= 0) == usable
            if item < 0:
                continue
            distinct.add((known, ref.kind))
            assert (media.key(item), MEDIA_KINDS[media.kinds[item]]) == (known, ref.kind)
            duration_s = durations[known]
            assert (len(found.of(item)) > 0) == present.has(ref.kind, known, duration_s)
            array = "image" if ref.kind == "image" else "frame"
            rows = [number for _, number in sorted(stored[array, str(known)])]
            assert every.of(item).tolist() == rows
            if len(found.of(item)) and array == "frame":
                assert duration_s is not None
                views = frame_views(duration_s, MAX_FRAMES)
                wanted = reader.lookup_pairs(array, [str(known)] * len(views), views)
                assert found.of(item).tolist() == wanted.tolist()
    assert len(media.keys) == len(distinct), "each media item has one number"


def test_sources_that_the_table_lacks_are_numbered_behind_it(tmp_path: Path) -> None:
    root = CacheRoot(tmp_path)
    append_media(root, [MediaRecord(source="a", key=key(0)), MediaRecord(source="b")], "job")
    refs = [["x", "a"], [], ["y", "x", "b"]]
    samples = [
        Sample(id=str(n), dataset="d", messages=(), media=tuple(MediaRef(source=s) for s in of))
        for n, of in enumerate(refs)
    ]
    write_samples(root, "d", samples)
    table = media_table(root)
    found = read_references(root, "d", table)
    rows = {source: n for n, source in enumerate(table["source"].to_pylist())}
    assert found.source.tolist() == [2, rows["a"], 3, 2, rows["b"]]
    assert found.counts.tolist() == [2, 0, 3]
    assert found.look_up(np.array([7, 7]), -1).tolist() == [-1, 7, -1, -1, 7]
    assert found.count(found.source >= 2).tolist() == [1, 0, 2]


def test_of_a_row_that_is_stored_twice_the_older_counts(tmp_path: Path) -> None:
    space, root = make_space(tmp_path), CacheRoot(tmp_path)
    fill(space, [3, 0])
    fill(space, [0, 1])
    records = [MediaRecord(source=str(n), key=key(n)) for n in range(3)]
    append_media(root, records, "job")
    media = tuple(MediaRef(source=str(n)) for n in range(3))
    write_samples(root, "d", [Sample(id="0", dataset="d", messages=(), media=media)])
    table = media_table(root)
    items, _ = number_media([read_references(root, "d", table)], table)
    rows = all_rows(FeatureReader(space.paths), items)
    by_key = {items.key(item): rows.of(item).tolist() for item in range(3)}
    assert by_key == {key(0): [1], key(1): [5], key(2): []}


def test_an_empty_cache_joins_to_nothing(tmp_path: Path) -> None:
    root, space = CacheRoot(tmp_path), make_space(tmp_path)
    write_samples(root, "d", [])
    table, reader = media_table(root), FeatureReader(space.paths)
    references = read_references(root, "d", table)
    media, (items,) = number_media([references], table)
    assert (len(references.counts), len(media.keys), len(items)) == (0, 0, 0)
    assert find_rows(reader, media, MAX_FRAMES).starts.tolist() == [0]
    assert all_rows(reader, media).starts.tolist() == [0]


def test_a_kind_of_a_later_version_is_no_media_item(tmp_path: Path) -> None:
    root = CacheRoot(tmp_path)
    append_media(root, [MediaRecord(source="a", key=key(0))], "job")
    media = (MediaRef(source="a", kind="sound"), MediaRef(source="a"))
    write_samples(root, "d", [Sample(id="0", dataset="d", messages=(), media=media)])
    table = media_table(root)
    references = read_references(root, "d", table)
    assert isinstance(references, References)
    assert references.kind.tolist() == [UNKNOWN_KIND, IMAGE]
    assert number_media([references], table)[1][0].tolist() == [-1, 0]


def test_present_names_the_views_that_are_missing(tmp_path: Path) -> None:
    space = make_space(tmp_path)
    assert Present.of(space).missing(key(0), ["t:0"]) == ["t:0"]
    fill(space, [0], array="frame", view=time_view(0))
    assert Present.of(space).missing(key(0), ["t:0", "t:500000"]) == ["t:500000"]
    assert Present.of(space).missing(key(1), ["t:0"]) == ["t:0"]


Mentions = list[tuple[list[int], str]]
"""For each sample the numbers of its media, and its choice."""

some_samples = st.lists(
    st.tuples(st.lists(st.integers(0, 29), max_size=3), st.sampled_from(["", "", "q", "r"])),
    max_size=30,
)


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def splits_of(datasets: list[Mentions], held_out: float) -> list[list[str]]:
    """Return the split of each sample of data sets that share one ledger."""
    lists = [[[str(n) for n in media] for media, _ in samples] for samples in datasets]
    sources = sorted({source for media in lists for sample in media for source in sample})
    ledger = pa.table(
        {
            "source": pa.array(sources, pa.string()),
            "key": pa.array([hash_of(s) for s in sources], pa.string()),
            "duration_s": pa.nulls(len(sources), pa.float64()),
        }
    )
    struct = pa.struct({"source": pa.string(), "kind": pa.string(), "sha256": pa.string()})
    references = []
    for media in lists:
        refs = [[{"source": s, "kind": "image", "sha256": None} for s in one] for one in media]
        references.append(
            References.of(pa.chunked_array([pa.array(refs, pa.list_(struct))]), ledger)
        )
    items, numbers = number_media(references, ledger)
    result = []
    for samples, one, of in zip(datasets, references, numbers, strict=True):
        table = pa.table(
            {
                "id": pa.array([str(n) for n in range(len(samples))], pa.string()),
                "choice": pa.array([choice for _, choice in samples], pa.string()),
            }
        )
        found = split_samples(table, one, of, items.keys, held_out)
        result.append([SPLITS[side] for side in found])
    return result


@given(some_samples, some_samples, st.sampled_from([0.0, 0.05, 0.2, 0.49]))
def test_the_three_splits_are_disjoint_by_key_and_data_added_later_moves_no_sample(
    first: Mentions, later: Mentions, held_out: float
) -> None:
    before = splits_of([first], held_out)
    assert splits_of([first, later], held_out)[0] == before[0]
    assert splits_of([first + later], held_out)[0][: len(first)] == before[0]
    for number, ((media, choice), split) in enumerate(zip(first, before[0], strict=True)):
        # What decides is computed here by hand: a key's first 32 bits as a fraction.
        deciding = [hash_of(str(m)) for m in media] or [hash_of(choice or str(number))]
        shares = [int(key[:8], 16) / 2**32 for key in deciding]
        expected = "train"
        if any(held_out <= share < 2 * held_out for share in shares):
            expected = "test"
        elif any(share < held_out for share in shares):
            expected = "val"
        assert split == expected


def test_no_key_of_a_held_out_split_is_in_train_and_none_of_test_is_in_val() -> None:
    rng = np.random.default_rng(0)
    samples = [(rng.integers(0, 500, rng.integers(1, 3)).tolist(), "") for _ in range(2000)]
    (found,) = splits_of([samples], 0.1)
    sides = {side: np.flatnonzero(np.array(found) == side) for side in SPLITS}
    assert sum(map(len, sides.values())) == 2000 and min(map(len, sides.values())) > 200
    keys = {side: {m for i in at for m in samples[i][0]} for side, at in sides.items()}
    alone = {m for m in range(500) if splits_of([[([m], "")]], 0.1) == [["test"]]}
    held = {m for m in range(500) if splits_of([[([m], "")]], 0.1) == [["val"]]}
    assert 25 < len(alone) < 75 and 25 < len(held) < 75  # a tenth each
    assert not keys["train"] & (alone | held)
    assert not keys["val"] & alone


@pytest.mark.parametrize("held_out", [-0.1, 0.5, 1.0])
def test_shares_that_leave_nothing_to_train_on_are_refused(held_out: float) -> None:
    with pytest.raises(ValueError, match=r"held_out .* is not in \[0, 0\.5\)"):
        splits_of([[([1], "")]], held_out)
