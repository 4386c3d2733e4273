"""The exchanges of a process group, with threads instead of processes, and the parts around them.

group.gather_objects(value)                      # the values of all processes, by rank
group.broadcast(make)                            # what the main process makes
group.require_equal(lambda: {"model": digest})   # or an error on every process
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from configs import UserError
from train import distributed
from train.distributed import (
    LostProcessError,
    ProcessGroup,
    buckets,
    find_process_group,
    fingerprint,
    process_group,
)


def in_threads(work: Callable[[ProcessGroup], Any], world: int = 3) -> list[Any]:
    """Run `work` for each member of a group, in threads with one store; return their results or errors."""
    store = HashStore()
    results: list[Any] = [None] * world

    def one(rank: int) -> None:
        member = ProcessGroup(rank, world, rank, store)
        try:
            results[rank] = work(member)
        except (UserError, LostProcessError) as error:
            member.fail(2)
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    return results


def test_values_are_gathered_by_rank_and_broadcast_from_the_main_process() -> None:
    def work(member: ProcessGroup) -> Any:
        shared = member.gather_objects({"rank": member.rank})
        return shared, member.broadcast(lambda: f"made by {member.rank}"), member.gather_objects(1)

    expected = ([{"rank": 0}, {"rank": 1}, {"rank": 2}], "made by 0", [1, 1, 1])
    assert in_threads(work) == [expected] * 3


def test_the_main_process_goes_first() -> None:
    order: list[int] = []

    def work(member: ProcessGroup) -> None:
        with member.main_process_first():
            time.sleep(0.2 if member.is_main else 0)
            order.append(member.rank)

    in_threads(work)
    assert order[0] == 0 and sorted(order) == [0, 1, 2]


def test_the_others_stop_waiting_when_one_process_fails() -> None:
    def work(member: ProcessGroup) -> None:
        with member.main_process_first():
            if member.is_main:
                time.sleep(0.1)
                raise UserError("the disk is full")

    first, *others = in_threads(work)
    assert isinstance(first, UserError)
    assert [type(o) for o in others] == [LostProcessError] * 2


def test_a_difference_is_an_error_on_every_process() -> None:
    def work(member: ProcessGroup) -> None:
        member.require_equal(lambda: {"samples": "abc", "step": 3})
        member.require_equal(lambda: {"samples": "abc", "step": 3 + (member.rank == 2)})

    results = in_threads(work)
    assert [str(r).split(";")[0] for r in results] == [
        "process 2 has another step than process 0 (4, not 3)"
    ] * 3


def test_exactly_one_process_is_the_first_to_fail() -> None:
    codes = in_threads(lambda member: member.fail(10 + member.rank))
    assert codes.count(None) == 1
    first = codes.index(None)
    assert [c for c in codes if c is not None] == [10 + first] * 2


def test_a_single_process_exchanges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = find_process_group()
    assert (alone.rank, alone.world_size, alone.is_main) == (0, 1, True)
    assert alone.gather_objects(1) == [1] and alone.gather_numbers([2.0]) == [[2.0]]
    assert alone.broadcast(lambda: "x") == "x"
    alone.require_equal(lambda: pytest.fail("called"))
    with alone.main_process_first():
        alone.connect(torch.device("cpu"))
    assert not torch.distributed.is_initialized()


def test_an_incomplete_environment_is_an_error_that_names_torchrun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"WORLD_SIZE is 4, .*RANK.*torchrun"), process_group():
        pass


def test_each_process_uses_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(distributed, "pick_device", lambda name: torch.device(kind))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    kind = "cuda"
    for local in range(2):
        assert ProcessGroup(2 + local, 4, local, HashStore()).device("auto") == torch.device(
            "cuda", local
        )
    assert chosen == [torch.device("cuda:0"), torch.device("cuda:1")]
    with pytest.raises(UserError, match="process 2 of this machine has no GPU, torch finds 2"):
        ProcessGroup(2, 3, 2, HashStore()).device("cuda")
    with pytest.raises(UserError, match="4 processes need a GPU each; give cuda"):
        ProcessGroup(0, 4, 0, HashStore()).device("cuda:1")
    # As given: no GPU of its own is chosen.
    assert ProcessGroup().device("cuda:1") == torch.device("cuda")
    kind = "mps"
    with pytest.raises(UserError, match="one Metal GPU"):
        ProcessGroup(0, 2, 0, HashStore()).device("auto")
    kind = "cpu"
    assert ProcessGroup(1, 2, 1, HashStore()).device("auto") == torch.device("cpu")


def test_buckets_have_neighbours_of_one_dtype_up_to_a_size() -> None:
    sizes = [3, 4, 100, 1, 1, 9, 2]
    tensors = [torch.zeros(n) for n in sizes]
    tensors[4] = tensors[4].double()
    groups = list(buckets(tensors, 40))
    assert [t for group in groups for t in group] == tensors
    assert [[t.numel() for t in group] for group in groups] == [
        *([3, 4], [100], [1], [1], [9], [2])
    ]
    assert list(buckets([], 40)) == []


def test_a_fingerprint_changes_with_one_bit_and_with_the_order() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(50, 3, generator=generator), torch.randn(7, generator=generator).half()]
    before = fingerprint(tensors)
    assert before == fingerprint([t.clone() for t in tensors])
    assert before != fingerprint(tensors[::-1])
    tensors[0].view(torch.int32)[17, 1] ^= 1
    assert before != fingerprint(tensors)


def test_a_single_process_keeps_its_gradients() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))]
    parameters[0].grad = torch.full((2,), math.pi)
    ProcessGroup().sum_gradients(parameters)
    assert parameters[0].grad.tolist() == pytest.approx([math.pi] * 2)
    assert parameters[1].grad is None
