"""Train one model in several processes: exchange values, sum gradients, and end together.

    torchrun --nproc-per-node 4 -m train.run -- --stage 1 --features cache

    with process_group() as group:         # one process without torchrun
        group.connect(group.device("auto"))
        facts = group.broadcast(make)      # the main process calls make(); all get its result
        group.sum_gradients(parameters)    # after the last micro-batch of a step

Each step's trees are split among the processes, and gradients are summed once, after the last micro-batch of
each process. DistributedDataParallel is not used: it sums during every backward pass, so all processes would
need equally many micro-batches, and a process with fewer, or none, would leave the others waiting forever.
Here every process makes the same few exchanges in every step, whatever its share of the trees.

Small values are exchanged as JSON through torchrun's store, numbers through gloo, and gradients through NCCL
on GPUs (gloo on CPUs). `ProcessGroup()` is a single process; its methods return immediately.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from cache.errors import CacheError
from configs import USER_ERROR_EXIT, UserError, wrong_place
from model.io.device import pick_device

T = TypeVar("T")

START_TIMEOUT = timedelta(minutes=5)
"""Limit for the processes to find each other."""
EXCHANGE_TIMEOUT = timedelta(minutes=30)
"""Limit for a process to reach an exchange, while it writes a checkpoint or reads a slow disk."""
POLL_S = 0.02
"""Seconds between looks into the store."""
FAILED_KEY = "failed"
"""Key in the store: rank and exit code of the first process that failed."""
GROUP_NUMBERS = itertools.count()
"""Numbers the groups of this process, so that each group has keys of its own in the store."""

BUCKET_BYTES = 32 << 20
"""Most bytes of gradients summed in one message, and of the copy that this takes. A larger gradient is summed
in place."""
FINGERPRINT_CHUNK = 1 << 24
"""Values summed at a time for a fingerprint; limits the memory of the conversion to int64."""
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer type for each element size in bytes."""


class LostProcessError(Exception):
    """Another process has ended or does not answer."""


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
            if isinstance(error, LostProcessError):
                raise SystemExit(
                    "error: a process of this training is gone (killed, or its machine failed); "
                    f"--resume continues from the last checkpoint ({error})"
                ) from None
            raise
        if dist.is_initialized():
            dist.destroy_process_group()


def find_process_group() -> ProcessGroup:
    """Return the group described by the environment variables that torchrun sets."""
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size == "1":
        return ProcessGroup()
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=START_TIMEOUT)))
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"WORLD_SIZE is {world_size}, but the processes do not find each other ({reason}); start "
            "them with torchrun --nproc-per-node N -m train.run -- OPTIONS, or unset WORLD_SIZE"
        ) from None
    return ProcessGroup(rank, size, local_rank, PrefixStore(f"train/{next(GROUP_NUMBERS)}", store))


def _exit_code(error: BaseException) -> tuple[int, bool]:
    """Return a process's exit code, as configs.command sets it, and whether one process should print it."""
    if isinstance(error, UserError | CacheError) or (
        isinstance(error, OSError) and wrong_place(error)
    ):
        return USER_ERROR_EXIT, True
    if isinstance(error, KeyboardInterrupt):
        return 130, True
    return 1, isinstance(error, LostProcessError)  # a bug is printed by every process that has it


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
        self._exchanges = 0

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

    def connect(self, device: torch.device) -> None:
        """Connect gloo, and NCCL for CUDA. Returns once every process has called it."""
        if self._store is None:
            return
        with self._exchange("connect"):
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=PrefixStore("group", self._store),
                rank=self.rank,
                world_size=self.world_size,
                timeout=EXCHANGE_TIMEOUT,
            )

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the JSON value of every process, by rank. Every process must call it."""
        if self._store is None:
            return [value]
        key = self._next_key("gather")
        self._set(f"{key}/{self.rank}", value)
        return [self._get(f"{key}/{rank}") for rank in range(self.world_size)]

    def broadcast(self, make: Callable[[], T]) -> T:
        """Return make(), a JSON value, as the main process makes it. Every process must call it."""
        if self._store is None:
            return make()
        key = self._next_key("broadcast")
        if not self.is_main:
            found: T = self._get(key)
            return found
        value = make()
        self._set(key, value)
        return value

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the body in the main process, then in the others. Every process must call it."""
        key = self._next_key("first")
        if self._store is not None and not self.is_main:
            self._get(key)
        yield
        if self._store is not None and self.is_main:
            self._set(key, True)

    def require_equal(self, facts: Callable[[], Mapping[str, Any]]) -> None:
        """Check that all processes have equal facts (JSON values). Every process must call it.

        A single process does not call `facts`.

        Raises:
            UserError: on every process, if a fact of one process differs.
        """
        if self.world_size == 1:
            return
        everyone = self.gather_objects(dict(facts()))
        for rank, theirs in enumerate(everyone):
            for name, value in everyone[0].items():
                if theirs.get(name) != value:
                    raise UserError(
                        f"process {rank} has another {name} than process 0 ({theirs.get(name)}, not "
                        f"{value}); every process needs the same command, code, cache and run folder"
                    )

    def gather_numbers(self, values: Sequence[float]) -> list[list[float]]:
        """Return the numbers of every process, by rank. Every process must call it with equally many."""
        if self.world_size == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        with self._exchange("gather"):
            dist.all_gather(everyone, mine)
        return [one.tolist() for one in everyone]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Set each parameter's gradient to the sum over all processes. Every process must call it."""
        if self.world_size == 1:
            return
        with self._exchange("gradients"):
            _all_reduce_gradients(parameters)

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

    def _next_key(self, kind: str) -> str:
        # Every process makes the same calls in the same order, so a number identifies an exchange.
        self._exchanges += 1
        return f"{self._exchanges}/{kind}"

    def _set(self, key: str, value: Any) -> None:
        assert self._store is not None
        with self._exchange(key):
            self._store.set(key, json.dumps(value))

    def _get(self, key: str) -> Any:
        """Wait for a value in the store, without a limit, unless another process fails."""
        assert self._store is not None
        with self._exchange(key):
            while not self._store.check([key]):
                if self._store.check([FAILED_KEY]):
                    raise LostProcessError("another process has failed")
                time.sleep(POLL_S)
            return json.loads(self._store.get(key))

    @contextlib.contextmanager
    def _exchange(self, name: str) -> Iterator[None]:
        """Raise errors of the store, gloo and NCCL, which are all RuntimeError, as LostProcessError."""
        try:
            yield
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise LostProcessError(f"process {self.rank}, {name}: {reason}") from error


# ---- gradients and weights


def _all_reduce_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Set each parameter's gradient to the sum over all processes, with the same bits everywhere.

    A gradient that is missing on some processes counts as zeros there. One that is missing on all stays
    missing: AdamW then skips the parameter, as it does in a single process.
    """
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    gradients: list[Tensor] = []
    for parameter, used_somewhere in zip(parameters, used.tolist(), strict=True):
        if used_somewhere and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad is not None:
            gradients.append(parameter.grad)
    for bucket in buckets(gradients, BUCKET_BYTES):
        _all_reduce(bucket)


def buckets(tensors: Iterable[Tensor], max_bytes: int) -> Iterator[list[Tensor]]:
    """Yield neighbouring tensors of one dtype in groups of at most `max_bytes`, or one larger tensor."""
    group: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if group and (size + tensor.nbytes > max_bytes or tensor.dtype != group[0].dtype):
            yield group
            group, size = [], 0
        group.append(tensor)
        size += tensor.nbytes
    if group:
        yield group


def _all_reduce(bucket: Sequence[Tensor]) -> None:
    """Sum the tensors over all processes, in one message."""
    if len(bucket) == 1 and bucket[0].is_contiguous():
        dist.all_reduce(bucket[0])
        return
    flat = torch.cat([t.reshape(-1) for t in bucket])
    dist.all_reduce(flat)
    for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Return a checksum of 16 hex digits that differs if one value has other bits; equal on every device."""
    total: Tensor | int = 0
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(INTEGERS[tensor.element_size()]).reshape(-1)
        for part in bits.split(FINGERPRINT_CHUNK):
            total = total * 31 + part.sum(dtype=torch.int64)  # wraps around, on the device
    return f"{int(total) & (1 << 64) - 1:016x}"
