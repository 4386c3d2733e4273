"""The loader: the schedule's samples with their features, whatever the memory settings and threads.

with FeatureLoader(schedule, reader, max_tokens=4096, stop=12) as loader:
    for micro in loader: ...
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.errors import CorruptError
from cache.store.reader import FeatureReader
from cache.store.space import find_space
from tests.support.feature_caches import IMAGES, M, World, ask, key_of, mixed_world, payload
from train.data.loader import FeatureLoader, MicroBatch
from train.data.packing import build_token_tree
from train.data.schedule import SinglePass, Step, TrainingSchedule


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> World:
    return mixed_world(tmp_path_factory.mktemp("mixed"))


def triples(micro_batches: Iterable[MicroBatch]) -> Counter[tuple[int, int, float]]:
    """Count the (position, target, weight) triples of micro-batches."""
    found: Counter[tuple[int, int, float]] = Counter()
    for b in (micro.packed for micro in micro_batches):
        positions = b.position_ids[b.loss_positions].tolist()
        found.update(zip(positions, b.targets.tolist(), b.loss_weights.tolist(), strict=True))
    return found


def test_micro_batches_have_the_features_of_their_images_in_order(mixed: World) -> None:
    joined = mixed.join("d", "e")
    schedule = TrainingSchedule(mixed.trees(joined), 16, seed=0)
    seen = 0
    with mixed.load(schedule, max_tokens=4096, stop=12) as loader:
        for micro in loader:
            assert len(micro.codes["frame"]) == 0
            rows = micro.order[::M] // M
            assert (micro.order.view(-1, M) == rows[:, None] * M + torch.arange(M)).all()
            codes = micro.codes["image"][rows]
            firsts = [tree.branches[0][2] for tree in micro.layouts]
            media = [int(m) for sample in firsts for m in joined.media_of(sample)]
            assert len(codes) == len(media) == len(micro.packed.image_slots) // M
            for row, number in zip(codes, media, strict=True):
                image = next(p for p in IMAGES if key_of(p) == joined.key(number))
                assert row.numpy().tobytes() == payload(image)
            assert len(micro.codes["image"]) == len(set(media))  # each row is read once
            seen += len(media)
    assert seen > 100


@given(
    seed=st.integers(0, 5),
    max_tokens=st.sampled_from([64, 100, 300, 4096]),
    branches=st.sampled_from([1, 3, 8]),
    threads=st.integers(1, 3),
)
@settings(deadline=None, max_examples=12)
def test_memory_settings_do_not_change_what_a_step_learns(
    mixed: World, seed: int, max_tokens: int, branches: int, threads: int
) -> None:
    joined = mixed.join("d", "e")
    schedule = TrainingSchedule(mixed.trees(joined, 64, max_branches=branches), 8, seed=seed)
    tokens = schedule.trees.tokens
    for step in range(3):
        members = [int(m) for p in schedule.step(step).slices for m in p.members]
        expected: Counter[tuple[int, int, float]] = Counter()
        for m in members:  # each sample in a tree of its own
            media = joined.media_of(m).tolist()
            branch = build_token_tree(
                [tokens.sample(int(joined.dataset[m]), int(joined.index[m]))],
                sample_numbers=[m],
                factors=[float(joined.weight[m])],
                media=media,
                contents=schedule.trees.placeholders.contents(joined, media),
                image_token_id=tokens.image_token_id,
            ).branches[0]
            expected.update(
                zip(
                    branch.sources.tolist(),
                    branch.targets.tolist(),
                    branch.weights.tolist(),
                    strict=True,
                )
            )
        options = {"max_tokens": max_tokens, "threads": threads, "ahead": 3}
        with mixed.load(schedule, start=step, stop=step + 1, **options) as loader:
            batches = list(loader)
        assert sum(b.samples for b in batches) == len(members)
        assert [b.last for b in batches] == [False] * (len(batches) - 1) + [True]
        assert all(b.tokens <= max_tokens for b in batches)
        assert triples(batches) == expected
        assert batches[0].step_weight == pytest.approx(
            sum(w * n for (_, _, w), n in expected.items())
        )


def test_loading_from_a_later_step_gives_equal_micro_batches(mixed: World) -> None:
    joined = mixed.join("d", "e")

    def batches(start: int, stop: int) -> list[Any]:
        # A new schedule, as after a resume.
        schedule = TrainingSchedule(mixed.trees(joined, 256), 16, seed=9)
        with mixed.load(schedule, max_tokens=256, start=start, stop=stop, threads=3) as loader:
            return [
                (m.step, m.index, m.packed.input_ids.tolist(), m.codes["image"].numpy().tobytes())
                for m in loader
            ]

    whole = batches(0, 20)
    assert [b for b in whole if b[0] >= 13] == batches(13, 20)


def test_two_ranks_have_the_samples_of_one(mixed: World) -> None:
    joined = mixed.join("d", "e")
    schedule = TrainingSchedule(mixed.trees(joined), 16, seed=4)

    def loader(rank: int, world: int) -> FeatureLoader:
        return mixed.load(schedule, max_tokens=4096, stop=6, rank=rank, world_size=world)

    assert triples(loader(0, 2)) + triples(loader(1, 2)) == triples(loader(0, 1))


@pytest.mark.parametrize(("samples", "world"), [(4, 3), (16, 2), (4, 7)])
def test_every_rank_has_equally_many_micro_batches_in_a_step(
    mixed: World, samples: int, world: int
) -> None:
    """Each rank computes the number without asking the others. What is added has one token and no loss."""
    joined = mixed.join("d", "e")
    for schedule in (
        TrainingSchedule(mixed.trees(joined, 64), samples, seed=4),
        SinglePass(mixed.trees(joined, 64), samples),
    ):
        ranks = []
        for rank in range(world):
            options = {"max_tokens": 64, "stop": 6, "rank": rank, "world_size": world}
            with mixed.load(schedule, **options) as loader:
                # The text of a micro-batch stays when the next one is requested, its rows do not.
                ranks.append([(m, m.codes["image"].shape[0]) for m in loader])
        numbered = [[(m.step, m.index, m.last) for m, _ in rank] for rank in ranks]
        assert numbered == [numbered[0]] * world
        assert sum(last for _, _, last in numbered[0]) == 6
        added = [(m, rows) for rank in ranks for m, rows in rank if not m.samples]
        assert added
        for micro, rows in added:
            assert micro.packed.input_ids.tolist() == [0] and not len(micro.packed.targets)
            assert (rows, micro.tokens, micro.sample_numbers, len(micro.order)) == (0, 0, (), 0)
            assert micro.step_weight > 0
        # Never in all ranks at once.
        assert all(any(rank[i][0].samples for rank in ranks) for i in range(len(ranks[0])))


def test_the_last_micro_batch_of_a_step_is_marked(mixed: World) -> None:
    joined = mixed.join("d")
    schedule = SinglePass(mixed.trees(joined), 10)
    with mixed.load(schedule, max_tokens=4096) as loader:
        steps = [(m.step, m.last, m.wait_s >= 0) for m in loader]
        assert steps == [(i, True, True) for i in range(len(schedule))]
        assert list(loader) == []  # the loader stays exhausted


def feature_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("features")]


def test_a_damaged_row_is_an_error_that_names_the_shard(world: World) -> None:
    world.write(d=[ask(f"{i}", [f"p{i}"]) for i in range(8)])
    world.encode([f"p{i}" for i in range(8)])
    joined = world.join()
    shard = find_space(world.root, None).shard("image", 1)
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    schedule = TrainingSchedule(world.trees(joined), 2, seed=0)
    loader = world.load(schedule, stop=4)
    with pytest.raises(CorruptError, match=str(shard)):
        list(loader)
    assert feature_threads() == []
    assert list(loader) == []


def test_leaving_the_context_early_stops_the_threads(mixed: World) -> None:
    joined = mixed.join("d")
    schedule = TrainingSchedule(mixed.trees(joined), 4, seed=0)
    with mixed.load(schedule, threads=3, ahead=6) as loader:
        next(loader)
        assert feature_threads()
    assert feature_threads() == []
    loader.close()


class SlowReader(FeatureReader):
    """A reader that pauses in every read, and counts the reads."""

    def __init__(self, world: World, pause_s: float) -> None:
        super().__init__(find_space(world.root, None))
        self.pause_s, self.calls = pause_s, 0

    def read_into(self, *arguments: Any) -> None:
        self.calls += 1
        time.sleep(self.pause_s)
        super().read_into(*arguments)


def test_waiting_is_measured_and_reading_ahead_hides_reads(mixed: World) -> None:
    joined = mixed.join("d")
    schedule = TrainingSchedule(mixed.trees(joined), 4, seed=0)

    def waits(work_s: float) -> list[float]:
        reader = SlowReader(mixed, 0.05)
        with FeatureLoader(schedule, reader, max_tokens=512, stop=12, threads=2, ahead=4) as loader:
            measured = []
            for micro in loader:
                measured.append(micro.wait_s)
                time.sleep(work_s)
        return measured

    bare = waits(0.0)
    assert bare[0] > 0.045  # nothing hides the first read
    assert sum(bare) > 0.2  # 12 reads of 50 ms in two threads
    assert sum(waits(0.1)[1:]) < sum(bare) / 2  # a step longer than a read hides it


def test_a_step_is_planned_while_the_one_before_is_used(mixed: World) -> None:
    """Dividing a step among many ranks takes milliseconds, which `next` must not wait for."""
    schedule = TrainingSchedule(mixed.trees(mixed.join("d", "e")), 16, seed=0)
    planned: list[tuple[int, str]] = []
    step = schedule.step

    def watched(number: int) -> Step:
        planned.append((number, threading.current_thread().name))
        return step(number)

    schedule.step = watched  # type: ignore[method-assign]
    with mixed.load(schedule, max_tokens=4096, stop=8, ahead=1) as loader:
        used = [micro.step for micro in loader]
    assert sorted(set(used)) == [number for number, _ in planned] == list(range(8))
    assert not any(thread == threading.current_thread().name for _, thread in planned)


def test_no_more_is_read_ahead_than_requested(mixed: World) -> None:
    joined = mixed.join("d")
    schedule = TrainingSchedule(mixed.trees(joined), 4, seed=0)
    reader = SlowReader(mixed, 0.0)
    with FeatureLoader(schedule, reader, max_tokens=512, threads=2, ahead=3) as loader:
        for taken in range(1, 9):
            next(loader)
            time.sleep(0.02)
            assert reader.calls <= taken + 3


def test_rows_are_not_overwritten_before_the_next_request(mixed: World) -> None:
    joined = mixed.join("d")
    schedule = TrainingSchedule(mixed.trees(joined), 4, seed=0)
    with mixed.load(schedule, stop=30, threads=3, ahead=2) as loader:
        for micro in loader:
            before = micro.codes["image"].clone()
            time.sleep(0.005)  # threads read the next micro-batches
            assert (micro.codes["image"] == before).all()


def test_max_tokens_below_the_window_is_an_error(mixed: World) -> None:
    joined = mixed.join("d")
    schedule = TrainingSchedule(mixed.trees(joined), 16, seed=0)
    with pytest.raises(ValueError, match="less than the window of 512"):
        mixed.load(schedule, max_tokens=500)
