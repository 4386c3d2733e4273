"""The group of a single process, and the parts around exchanges; test_distributed.py has several processes.

with process_group() as group:
    device = group.device("auto")
    group.require_equal(lambda: {"model": digest})   # or an error on every process
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore

from configs import UserError
from train.distributed import group as module
from train.distributed.group import ProcessGroup, find_process_group, is_lost, process_group


def test_a_single_process_exchanges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = find_process_group()
    assert (alone.rank, alone.world_size, alone.is_main) == (0, 1, True)
    assert alone.gather_objects(1) == [1] and alone.gather_numbers([2.0]) == [[2.0]]
    assert alone.broadcast(lambda: "x") == "x"
    alone.require_equal(lambda: pytest.fail("called"))
    with process_group() as group, group.main_process_first():
        assert not dist.is_initialized()


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
    monkeypatch.setattr(module, "pick_device", lambda name: torch.device(kind))
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


def test_exactly_one_process_is_the_first_to_fail() -> None:
    store = HashStore()
    members = [ProcessGroup(rank, 3, rank, store) for rank in range(3)]
    assert [member.fail(10 + member.rank) for member in members] == [None, 10, 10]


class FakeGroup(ProcessGroup):
    """One of several processes, with what all of them say."""

    def __init__(self, *said: object) -> None:
        super().__init__(0, len(said), 0, HashStore())
        self.said = list(said)

    def gather_objects(self, value: object) -> list[object]:
        return self.said


def test_a_difference_names_the_process_and_the_fact() -> None:
    same = {"model": "a", "step": 3}
    FakeGroup([0, same], [0, same]).require_equal(lambda: same)
    with pytest.raises(UserError, match=r"process 2 has another step than process 0 \(4, not 3\)"):
        FakeGroup([0, same], [0, same], [0, same | {"step": 4}]).require_equal(lambda: same)
    with pytest.raises(UserError, match=r"process 1 has another step than process 0 \(None, not"):
        FakeGroup([0, same], [0, {"model": "a"}]).require_equal(lambda: same)


def test_only_processes_with_the_same_part_are_compared() -> None:
    """Two machines of two processes: rank 2 has the part of rank 0, and rank 3 that of rank 1."""
    a, b, c = ({"model": name} for name in "abc")
    FakeGroup([0, a], [1, b], [0, a], [1, b]).require_equal(lambda: a)
    with pytest.raises(UserError, match="process 3 has another model than process 1"):
        FakeGroup([0, a], [1, b], [0, a], [1, c]).require_equal(lambda: a)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[.../gloo/transport/tcp/pair.cc:561] Connection closed by peer"), True),
        (RuntimeError("NCCL communicator was aborted on rank 1"), True),
        (dist.DistNetworkError("the client socket has timed out"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (ValueError("gloo"), False),
    ],
)
def test_an_error_of_a_connection_is_no_bug(error: Exception, lost: bool) -> None:
    assert is_lost(error) is lost
