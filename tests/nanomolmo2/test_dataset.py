"""The torch Dataset: the samples of `train.run`, with exactly the stored features, in any kind of worker.

data = cache.dataset("d", split="train")
for batch in DataLoader(data, 64, num_workers=4, collate_fn=data.collate):
    features, messages = batch.features(device), batch.messages
"""

from __future__ import annotations

import logging
import pickle
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset

import nanomolmo2 as nm
from cache.errors import CacheError, CorruptError, NotFoundError
from cache.share import share
from cache.store.paths import CacheRoot
from cache.store.samples import SPLITS, Message, Sample
from nanomolmo2 import memory
from tests.support.feature_caches import (
    IMAGES,
    SPEC,
    World,
    ask,
    features,
    key_of,
    mixed_samples,
    names_of,
    new_world,
)
from tests.support.remote_servers import WebServer

VIDEOS = {"video v": 2.2, "video w": 0.0, "video x": 9.0}


def mixed(count: int, seed: int) -> list[Sample]:
    """Samples without media, with images, with videos, and with both."""
    films = [
        ask("film", ["video v"]),
        ask("both", ["p1", "video x", "p1"], "<image> then <video> then <image>?"),
        ask("two", ["video w", "video v"]),
        ask("talk", task="chat"),
    ]
    return [*mixed_samples(count, seed), *films]


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = new_world(tmp_path)
    world.write(d=mixed(60, 0), e=mixed_samples(30, 1))
    world.encode(IMAGES)
    world.encode_videos(VIDEOS)
    return world


@pytest.fixture
def cache(world: World) -> nm.Cache:
    return nm.open(world.root.path)


def check(batch: nm.Batch, world: World) -> None:
    """Everything a batch has equals what was stored, by one name at a time."""
    cache = nm.open(world.root.path)
    values = batch.features()
    assert len(batch) == len(values) == len(batch.messages) == len(batch.keys) == len(batch.times)
    padded, mask = values.padded()
    at = 0
    for i, example in enumerate(batch):
        expected = [np.asarray(cache[key]) for key in batch.keys[i]]
        for kind, ours, one, array in zip(
            batch.kinds[i], values[i], example.features, expected, strict=True
        ):
            assert ours.dtype == torch.float16
            np.testing.assert_array_equal(ours.numpy(), array)
            np.testing.assert_array_equal(np.asarray(one), array)
            assert (array.ndim == 3) == isinstance(one, nm.Clip) == (kind == "video")
        whole = np.concatenate(
            [np.empty((0, SPEC.width), np.float16)] + [a.reshape(-1, SPEC.width) for a in expected]
        )
        assert values.lengths[i] == len(whole) == int(mask[i].sum())
        np.testing.assert_array_equal(padded[i, : len(whole)].numpy(), whole)
        assert not padded[i, len(whole) :].any() and mask[i, : len(whole)].all()
        np.testing.assert_array_equal(values.flat[at : at + len(whole)].numpy(), whole)
        at += len(whole)
        assert example.texts == batch.texts[i]
        texts = [text for turn in example.texts for text in turn]
        assert len(texts) == len(example.messages) + len(example.keys)
    assert len(values.flat) == at


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("names", [("d",), ("e", "d"), None])
def test_the_samples_are_those_of_training(
    cache: nm.Cache, world: World, split: Any, names: Sequence[str] | None
) -> None:
    data = cache.dataset(names, split=split, held_out=0.2)
    joined = world.join(*(names or ("d", "e")), split=split, held_out=0.2, min_coverage=0.95)
    assert data.ids == names_of(joined)
    assert len(data) == joined.size > 0
    for i in range(len(data)):
        assert data[i].keys == [joined.key(m) for m in joined.media_of(i)]
        rows = [row for m in joined.media_of(i) for row in joined.rows_of(m)]
        assert sum(len(codes) for codes in data[i].codes) == len(rows)
        times = np.concatenate([[], *(t for t in data[i].times if t is not None)])
        of_videos = [m for m in joined.media_of(i) if joined.is_video(m)]
        expected = np.concatenate([[], *(joined.times_of(m) for m in of_videos)])
        assert times.tolist() == expected.tolist()


def test_memory_is_used_again_only_when_nothing_refers_to_it(
    cache: nm.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanomolmo2.memory.LEAST_BYTES", 1)
    data = cache.dataset("d", held_out=0.0)
    film = data.ids.index("d/both")
    row = data[film].codes[0].copy()

    def held(batch: nm.Batch) -> list[Any]:
        """Parts of a batch that share its memory, of each kind that a user may keep."""
        codes = batch.codes["image"]
        return [codes, codes[:1], codes.numpy()[:1], batch[0].codes[0], codes.view(torch.int8)]

    for kept in range(5):
        part = held(data.__getitems__([film]))[kept]
        for other in range(len(data)):
            data[other]
        first = part[:1] if isinstance(part, np.ndarray) else part.numpy()[:1]
        np.testing.assert_array_equal(first.view(np.uint8), row)

    batch = data.__getitems__([film])
    places = {rows.data_ptr() for rows in batch.codes.values()}
    del batch, part, first
    batch = data.__getitems__([film])
    assert places & {rows.data_ptr() for rows in batch.codes.values()}


def test_text_and_tasks_are_there_without_reading_features(
    cache: nm.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = cache.dataset("d", held_out=0.0)
    batch = data.collate([data[i] for i in range(len(data))])
    monkeypatch.setattr(type(data), "_read", None)
    assert data.messages == batch.messages
    assert data.tasks == batch.tasks
    assert "chat" in data.tasks


def test_a_batch_has_the_stored_features_and_the_texts(cache: nm.Cache, world: World) -> None:
    data = cache.dataset("d", held_out=0.0)
    by_id = {f"d/{sample.id}": sample for sample in mixed(60, 0)}
    loader = DataLoader(data, 7, shuffle=True, collate_fn=data.collate)
    seen: list[str] = []
    for batch in loader:
        check(batch, world)
        seen += batch.ids
        for i, name in enumerate(batch.ids):
            sample = by_id[name]
            assert batch.messages[i] == [
                {"role": turn.role, "content": turn.content} for turn in sample.messages
            ]
            assert batch.turn_weights[i] == [turn.weight for turn in sample.messages]
            assert (float(batch.weights[i]), batch.tasks[i]) == (sample.weight, sample.task)
    assert sorted(seen) == sorted(by_id)
    both = data[data.ids.index("d/both")]
    assert both.texts[0] == ["", " then ", " then ", "?"]


def test_equal_rows_of_a_batch_are_read_once_and_adjacent_ones_together(
    cache: nm.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = cache.dataset(held_out=0.0)
    asked: dict[str, list[np.ndarray]] = {"image": [], "frame": []}
    reader = data._source.reader
    read_into = reader.read_into
    monkeypatch.setattr(
        reader, "read_into", lambda a, rows, out: (asked[a].append(rows), read_into(a, rows, out))
    )
    batch = data.__getitems__(range(len(data)))
    assert {array: len(calls) for array, calls in asked.items()} == {"image": 1, "frame": 1}
    for array, (rows,) in asked.items():
        assert len(set(rows.tolist())) == len(rows) == len(batch.codes[array])
    assert len(batch.codes["image"]) == len(IMAGES)


def test_examples_may_be_collated_one_by_one_and_from_several_data_sets(
    cache: nm.Cache, world: World, tmp_path: Path
) -> None:
    d, e = cache.dataset("d", held_out=0.0), cache.dataset("e", held_out=0.0)
    both = ConcatDataset([d, e])
    check(d.collate([both[i] for i in (0, len(d) + 3, len(d) - 3, 0, 5)]), world)
    check(next(iter(DataLoader(Subset(d, [3, 9, len(d) - 2]), 3, collate_fn=d.collate))), world)
    assert d[-1].id == d.ids[-1]
    with pytest.raises(IndexError, match="64 samples"):
        d[64]
    with pytest.raises(ValueError, match="no samples"):
        d.collate([])
    other = new_world(tmp_path / "other")
    other.write(d=[ask("1", ["a"])])
    other.encode(["a"])
    changed = nm.open(other.root.path).dataset(held_out=0.0)[0]
    object.__setattr__(changed, "spec", None)
    with pytest.raises(ValueError, match="different spaces"):
        d.collate([d[0], changed])


def test_text_alone_has_no_features(cache: nm.Cache, world: World) -> None:
    data = cache.dataset("d", held_out=0.0)
    talk = data.ids.index("d/talk")
    batch = data.__getitems__([talk, talk])
    check(batch, world)
    assert batch.features().flat.shape == (0, SPEC.width)
    assert batch.features()[0] == [] and batch.tasks == ["chat", "chat"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_features_have_the_type_asked_for(cache: nm.Cache, dtype: torch.dtype) -> None:
    data = cache.dataset("d", held_out=0.0)
    batch = data.__getitems__(range(20))
    values = batch.features(dtype=dtype)
    assert values.flat.dtype == dtype == values.padded()[0].dtype
    assert torch.equal(values.flat, batch.features().flat.to(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("method", [None, "fork", "spawn"])
@pytest.mark.parametrize("remote", [False, True], ids=["folder", "server"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_every_kind_of_worker_reads_the_same(
    world: World, tmp_path: Path, method: str | None, remote: bool
) -> None:
    share(CacheRoot(world.root.path))
    with WebServer(world.root.path) as server:
        where = server.url if remote else world.root.path
        data = nm.open(where, mirror=tmp_path / "mirror").dataset(held_out=0.1)
        loader = DataLoader(
            data,
            10,
            num_workers={None: 0, "fork": 2, "spawn": 1}[method],  # each one imports torch
            multiprocessing_context=method,
            collate_fn=data.collate,
        )
        ids: list[str] = []
        for batch in loader:
            check(batch, world)
            ids += batch.ids
    assert ids == data.ids


class Doubled:
    """A user's own collate_fn: what it returns is no Batch, and the worker lets go of the rows."""

    def __call__(self, batch: nm.Batch) -> tuple[list[str], torch.Tensor]:
        return batch.ids, batch.features().flat * 2


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0, 1, 3, 100])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_worker_reads_into_shared_memory_again_once_the_trainer_let_go_of_it(
    world: World, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    monkeypatch.setattr("nanomolmo2.memory.LEAST_BYTES", 1)
    data = nm.open(world.root.path).dataset(held_out=0.1)
    dice = np.random.default_rng(kept)
    order = dice.integers(0, len(data), (60, 4)).tolist()
    images = [i for i in range(len(data)) if data[i].kinds == ["image"]][:4]
    equal = [dice.permutation(images).tolist() for _ in range(60)]

    def loader(order: list[list[int]], collate: Any) -> DataLoader[Any]:
        return DataLoader(
            data,
            batch_sampler=order,
            num_workers=2,
            multiprocessing_context="fork",
            collate_fn=collate,
        )

    held: deque[tuple[nm.Batch, torch.Tensor]] = deque(maxlen=kept)
    for numbers in (order, equal):
        memory._mapped.clear()
        for batch in loader(numbers, data.collate):
            check(batch, world)
            held.append((batch, batch.codes["image"].clone()))
            for earlier, codes in held:
                assert torch.equal(earlier.codes["image"], codes)
    if kept < 3:  # 60 batches of one size: each worker reads two ahead, and has one in hand
        assert 2 <= len(memory._mapped) <= 2 * (4 + kept)
    wanted = [Doubled()(data.__getitems__(numbers)) for numbers in order]
    for (ids, values), (expected_ids, expected) in zip(
        loader(order, Doubled()), wanted, strict=True
    ):
        assert ids == expected_ids and torch.equal(values, expected)


def test_what_lacks_features_is_left_out_counted_and_said(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    samples = [ask(f"{i}", ["p1"]) for i in range(20)]
    world.write(d=[*samples, ask("x", ["unknown"]), ask("y", ["bad"]), ask("z", ["bad", "p1"])])
    world.fail("bad")
    with caplog.at_level(logging.WARNING):
        data = nm.open(world.root.path).dataset("d", held_out=0.0)
    assert (len(data), data.missing, data.failed) == (20, 1, 2)
    assert "of all splits 1 not encoded, 2 with failed media" in caplog.text
    assert repr(data) in caplog.text
    world.write(d=[*samples, ask("x", ["unknown"]), ask("w", ["unknown"])])
    with pytest.raises(NotFoundError) as caught:
        nm.open(world.root.path).dataset("d", held_out=0.0)
    assert "features for 90.9% of the samples of d, less than min_coverage 95.0%" in str(
        caught.value
    )
    assert "python -m encode.run --dataset d" in str(caught.value)
    assert len(nm.open(world.root.path).dataset("d", held_out=0.0, min_coverage=0.9)) == 20
    world.write(d=[ask("y", ["bad"])])
    with pytest.raises(NotFoundError, match=r"cache\.ls --failures --features"):
        nm.open(world.root.path).dataset("d", held_out=0.0)


def test_wrong_arguments_are_refused(cache: nm.Cache, world: World) -> None:
    with pytest.raises(NotFoundError, match=r"no data set 'dd' in .*there: d, e.*nearest: d"):
        cache.dataset("dd")
    with pytest.raises(ValueError, match="split 'dev' is none of train, val, test"):
        cache.dataset("d", split="dev")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"held_out 0\.5 is not in"):
        cache.dataset("d", held_out=0.5)
    with pytest.raises(NotFoundError, match="no sample is in the test split; change held_out"):
        cache.dataset("d", split="test", held_out=0.0)


def test_a_damaged_row_is_an_error_and_no_zeros(world: World) -> None:
    data = nm.open(world.root.path).dataset("d", held_out=0.0)
    path = world.root.space(SPEC.name).shard("image", 0)
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    hit = 0
    for i in range(len(data)):
        try:
            keys = data[i].keys
        except CorruptError as error:
            assert "fails its checksum" in str(error)
            hit += 1
        else:
            assert key_of("p0") not in keys
    assert hit


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_worker_reports_damage_with_its_reason(world: World) -> None:
    data = nm.open(world.root.path).dataset("d", held_out=0.0)
    path = world.root.space(SPEC.name).shard("image", 0)
    path.write_bytes(bytes(len(path.read_bytes())))
    loader = DataLoader(
        data, 8, num_workers=1, multiprocessing_context="fork", collate_fn=data.collate
    )
    with pytest.raises(
        Exception, match=r"row \d fails its checksum; python -m cache\.verify"
    ) as caught:
        for _ in loader:
            pass
    assert isinstance(caught.value, CorruptError | RuntimeError)


def test_a_process_that_opens_another_cache_than_the_first_is_refused(world: World) -> None:
    data = nm.open(world.root.path).dataset("d", held_out=0.0)
    travelled = pickle.dumps(data)
    assert pickle.loads(travelled)[0].id == data[0].id
    world.write(d=[*mixed(60, 0)[:-1], ask("talk", answer="edited")])
    with pytest.raises(
        CacheError, match="has changed since this data set was opened; open it again"
    ):
        pickle.loads(travelled)[0]
    world.write(d=mixed(60, 0))
    assert pickle.loads(travelled)[0].id == data[0].id
    # The same row numbers, but of other media.
    other = new_world(world.folder / "other")
    other.write(d=mixed(60, 0))
    other.encode([*reversed(IMAGES)])
    other.encode_videos(VIDEOS)
    moved = pickle.loads(travelled)
    moved._source.where = str(other.root.path)
    with pytest.raises(CacheError, match="has changed since this data set was opened"):
        moved[0]


def test_marks_that_do_not_fit_name_the_sample(world: World) -> None:
    sample = Sample(
        id="odd",
        dataset="d",
        messages=(Message(role="user", content="<image>"), Message(role="assistant", content="a")),
        media=ask("x", ["p1", "p2"]).media,
    )
    world.write(d=[sample])
    batch = nm.open(world.root.path).dataset("d", held_out=0.0).__getitems__([0])
    check_features = batch.features()[0]
    assert len(check_features) == 2
    with pytest.raises(ValueError, match="sample d/odd: 2 media but 1 mark"):
        batch.texts  # noqa: B018
    np.testing.assert_array_equal(check_features[0].numpy(), features("p1"))
