"""The processes that train one model: they exchange small values, and end together.

    torchrun --nproc-per-node 4 -m train.run -- --stage 1 --features cache

    with process_group() as group:         # one process without torchrun
        device = group.device("auto")
        facts = group.broadcast(make)      # the main process calls make(); all get its result

Values travel as JSON and as numbers through gloo, in the order in which every process makes the same calls. A
process that ends closes its connections, so the others do not wait for it. torchrun's store has one entry of
ours: which process failed first. `ProcessGroup()` is a single process; its methods return immediately.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from cache.errors import CacheError
from configs import USER_ERROR_EXIT, UserError, one_line, wrong_place
from model.io.device import pick_device

T = TypeVar("T")

START_TIMEOUT = timedelta(minutes=5)
"""Limit for the processes to find each other."""
EXCHANGE_TIMEOUT = timedelta(hours=2)
"""Limit for a process to reach an exchange, while the main process tokenises a data set or saves a model. A
process that has ended is noticed at once."""
FAILED_KEY = "failed"
"""Key in the store: rank and exit code of the first process that failed."""
GROUP_NUMBERS = itertools.count()
"""Numbers the groups of this process, so that each group has keys of its own in the store."""
WIRE = re.compile(r"gloo|nccl", re.IGNORECASE)
"""In the message of a RuntimeError: a connection to another process has failed."""


# ---- ending together


@contextlib.contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Yield the group of processes that torchrun started; they end together, with one message.

    Only the main process has a standard output. The first process that fails prints its error. The others,
    which only notice its end or make the same mistake, end silently with its exit code.

    Raises:
        UserError: WORLD_SIZE is above 1, but the processes do not find each other.
    """
    group = find_process_group()
    if group.world_size == 1:
        yield group
        disconnect()
        return
    with contextlib.ExitStack() as stack:
        if not group.is_main:
            silence = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(silence))
        try:
            yield group
        except SystemExit:  # --help
            raise
        except BaseException as error:
            code, expected = _exit_code(error)
            first_code = group.fail(code)
            if first_code is not None and expected:
                raise SystemExit(first_code) from None
            if is_lost(error):
                raise SystemExit(
                    "error: a process of this training is gone (killed, or its machine failed); --resume "
                    f"continues from the last checkpoint (process {group.rank}: {one_line(error, 200)})"
                ) from None
            raise
        disconnect()


def find_process_group() -> ProcessGroup:
    """Return the group described by the environment variables that torchrun sets, connected."""
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size == "1":
        return ProcessGroup()
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=START_TIMEOUT)))
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        store = PrefixStore(f"train/{next(GROUP_NUMBERS)}", store)
        connect(store, rank, size)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"WORLD_SIZE is {world_size}, but the processes do not find each other ({one_line(error)}); "
            "start them with torchrun --nproc-per-node N -m train.run -- OPTIONS, or unset WORLD_SIZE"
        ) from None
    return ProcessGroup(rank, size, local_rank, store)


def connect(store: Store, rank: int, world_size: int) -> None:
    """Connect gloo, and NCCL where there is a GPU for it. Returns once every process has called it."""
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if has_nccl else "gloo",
        store=PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=EXCHANGE_TIMEOUT,
    )


def disconnect() -> None:
    """Close the connections, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process has ended or does not answer."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and WIRE.search(str(error)) is not None
    )


def _exit_code(error: BaseException) -> tuple[int, bool]:
    """Return a process's exit code, as configs.command sets it, and whether one process should print it."""
    if isinstance(error, UserError | CacheError) or (
        isinstance(error, OSError) and wrong_place(error)
    ):
        return USER_ERROR_EXIT, True
    if isinstance(error, KeyboardInterrupt):
        return 130, True
    return 1, is_lost(error)  # a bug is printed by every process that has it


# ---- exchanging


class ProcessGroup:
    """The processes that train together, as one of them sees the group.

    Args:
        rank: number of this process.
        world_size: number of processes.
        local_rank: number of this process on its machine, and of its GPU.
        store: key-value store of all processes; None for a single process.
    """

    def __init__(
        self, rank: int = 0, world_size: int = 1, local_rank: int = 0, store: Store | None = None
    ) -> None:
        assert store is not None or world_size == 1, "several processes need a store"
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self._store = store

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the process that prints and writes."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """Return the device for `--device`; several processes use one GPU each.

        Raises:
            UserError: there is no device for this process.
        """
        if self.world_size == 1:
            return pick_device(name)
        if ":" in name:
            raise UserError(
                f"--device {name}: {self.world_size} processes need a GPU each; give cuda"
            )
        device = pick_device(name)
        if device.type == "mps":
            raise UserError(
                f"{self.world_size} processes and one Metal GPU; start python -m train.run, or "
                "--device cpu"
            )
        if device.type == "cuda":
            if self.local_rank >= (count := torch.cuda.device_count()):
                raise UserError(
                    f"process {self.local_rank} of this machine has no GPU, torch finds {count}; "
                    f"torchrun --nproc-per-node {count}"
                )
            device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(device)
        return device

    def gather_numbers(self, values: Sequence[float]) -> list[list[float]]:
        """Return the numbers of every process, by rank. Every process must call it with equally many."""
        if self.world_size == 1:
            return [list(values)]
        return [part.tolist() for part in self._gather(torch.tensor(values, dtype=torch.float64))]

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the JSON value of every process, by rank. Every process must call it."""
        if self.world_size == 1:
            return [value]
        # JSON, not torch's own `all_gather_object`: that unpickles what a connection delivers.
        text = json.dumps(value).encode()
        longest = max(int(size) for [size] in self.gather_numbers([len(text)]))
        padded = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8)
        return [json.loads(part.numpy().tobytes()) for part in self._gather(padded)]

    def _gather(self, mine: Tensor) -> list[Tensor]:
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(everyone, mine)
        return everyone

    def broadcast(self, make: Callable[[], T]) -> T:
        """Return make(), a JSON value, as the main process makes it. Every process must call it."""
        value = make() if self.is_main else None
        found: T = self.gather_objects(value)[0]
        return found

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the body in the main process, then in the others. Every process must call it."""
        if not self.is_main:
            self.gather_numbers([0])
        yield
        if self.is_main:
            self.gather_numbers([0])

    def require_equal(self, facts: Callable[[], Mapping[str, Any]], part: int = 0) -> None:
        """Check that processes with equal `part` have equal facts (JSON). Every process must call it.

        A single process does not call `facts`.

        Raises:
            UserError: on every process, if a fact of one process differs.
        """
        if self.world_size == 1:
            return
        first: dict[int, tuple[int, dict[str, Any]]] = {}
        for rank, (of, theirs) in enumerate(self.gather_objects([part, dict(facts())])):
            other, expected = first.setdefault(of, (rank, theirs))
            for name, value in expected.items():
                if theirs.get(name) != value:
                    raise UserError(
                        f"process {rank} has another {name} than process {other} ({theirs.get(name)}, not "
                        f"{value}); every process needs the same command, code, cache and run folder"
                    )

    def fail(self, code: int) -> int | None:
        """Record that this process ends with `code`.

        Returns:
            None for the first process that fails; for the others, the exit code of the first.
        """
        assert self._store is not None
        mine = f"{self.rank}:{code}"
        try:
            first = self._store.compare_set(FAILED_KEY, "", mine).decode()
        except RuntimeError:
            # The process that serves the store has ended. Print the error, even if another one does too.
            return None
        return None if first == mine else int(first.partition(":")[2])
