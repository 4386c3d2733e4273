"""Several processes that train one model: what they tell each other, and how they end together.

    torchrun --nproc-per-node 4 -m train.run -- --stage 1 --features cache

Each step's pieces are dealt to the processes, whose gradients are summed once, after their last micro-batch.
No DistributedDataParallel: it sums during every backward pass, so all processes would need equally many, and
one that was dealt less than the others, or nothing, would leave them waiting for ever. Here every process
comes to the same few exchanges in every step, whatever it was dealt.

Small exchanges go through the store that torchrun keeps (JSON), numbers through gloo, and gradients through
NCCL on GPUs. `Processes()` is a process alone, for which every method is free.
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

from configs import USER_ERROR_EXIT, UserError, wrong_place
from model.io.device import pick_device

T = TypeVar("T")

STARTING = timedelta(minutes=5)
"""For the processes to find each other."""
PATIENCE = timedelta(minutes=30)
"""For one process to come to an exchange; the others write a checkpoint meanwhile, or wait for a disk."""
POLL_S = 0.02
FAILED = "failed"
JOINED = itertools.count()
"""Times this process has joined others: each time their notes begin anew."""


class LostProcessError(Exception):
    """Another process has ended or does not answer."""


class Processes:
    """This process among those that train together.

    Args:
        rank: which it is.
        world: how many there are.
        local_rank: which it is on this machine; its GPU's number.
        store: where all of them may leave notes; None when alone.
    """

    def __init__(
        self, rank: int = 0, world: int = 1, local_rank: int = 0, store: Store | None = None
    ) -> None:
        assert store is not None or world == 1, "several processes need a store"
        self.rank, self.world, self.local_rank = rank, world, local_rank
        self._store = store
        self._turn = 0

    @property
    def leader(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    # ---- starting

    def device(self, name: str) -> torch.device:
        """The device for `--device`; several processes take a GPU each.

        Raises:
            UserError: there is none for this process.
        """
        if self.world == 1:
            return pick_device(name)
        if ":" in name:
            raise UserError(f"--device {name}: {self.world} processes need a GPU each; give cuda")
        device = pick_device(name)
        if device.type == "mps":
            raise UserError(
                f"{self.world} processes and one Metal GPU; start python -m train.run, or --device cpu"
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
        """Open the ways numbers and gradients take. Returns when every process has come here."""
        if self._store is None:
            return
        with self._talking("connect"):
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=PrefixStore("group", self._store),
                rank=self.rank,
                world_size=self.world,
                timeout=PATIENCE,
            )

    # ---- small things, as JSON

    def share(self, value: Any) -> list[Any]:
        """What every process gives, by rank. All must call it."""
        if self._store is None:
            return [value]
        key = self._key("share")
        self._leave(f"{key}/{self.rank}", value)
        return [self._find(f"{key}/{rank}") for rank in range(self.world)]

    def from_leader(self, make: Callable[[], T]) -> T:
        """What the leader makes (a JSON value), for everyone. All must call it."""
        if self._store is None:
            return make()
        key = self._key("leader")
        if not self.leader:
            found: T = self._find(key)
            return found
        value = make()
        self._leave(key, value)
        return value

    @contextlib.contextmanager
    def leader_first(self) -> Iterator[None]:
        """The leader does what is inside; when it is done the others do it too. All must call it."""
        key = self._key("first")
        if self._store is not None and not self.leader:
            self._find(key)
        yield
        if self._store is not None and self.leader:
            self._leave(key, True)

    def agree(self, facts: Callable[[], Mapping[str, Any]]) -> None:
        """Make sure that all processes hold the same facts (JSON values). All must call it.

        Alone, they are not even asked for.

        Raises:
            UserError: on every process, when one differs.
        """
        if self.world == 1:
            return
        everyone = self.share(dict(facts()))
        for rank, theirs in enumerate(everyone):
            for name, value in everyone[0].items():
                if theirs.get(name) != value:
                    raise UserError(
                        f"process {rank} has another {name} than process 0 ({theirs.get(name)}, not "
                        f"{value}); every process needs the same command, code, cache and run folder"
                    )

    def _key(self, kind: str) -> str:
        self._turn += 1  # every process makes the same calls, so a number names an exchange
        return f"{self._turn}/{kind}"

    def _leave(self, key: str, value: Any) -> None:
        assert self._store is not None
        with self._talking(key):
            self._store.set(key, json.dumps(value))

    def _find(self, key: str) -> Any:
        """Wait for a note, however long it takes, unless a process fails meanwhile."""
        assert self._store is not None
        with self._talking(key):
            while not self._store.check([key]):
                if self._store.check([FAILED]):
                    raise LostProcessError("another process has failed")
                time.sleep(POLL_S)
            return json.loads(self._store.get(key))

    # ---- numbers

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """As many numbers of each process, by rank. All must call it."""
        if self.world == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self.world)]
        with self._talking("gather"):
            dist.all_gather(everyone, mine)
        return [one.tolist() for one in everyone]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give each parameter the sum of all processes' gradients. All must call it."""
        if self.world == 1:
            return
        with self._talking("gradients"):
            sum_over_processes(parameters)

    @contextlib.contextmanager
    def _talking(self, about: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo, NCCL and the store alike
            said = " ".join(str(error).split())
            raise LostProcessError(f"process {self.rank}, {about}: {said}") from error

    # ---- ending

    def fail(self, code: int) -> int | None:
        """Note that this process ends with `code`; None when it is the first, else the first one's code."""
        assert self._store is not None
        mine = f"{self.rank}:{code}"
        try:
            first = self._store.compare_set(FAILED, "", mine).decode()
        except (
            RuntimeError
        ):  # the store is gone with the process that kept it: rather twice than never
            return None
        return None if first == mine else int(first.partition(":")[2])


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """The processes torchrun started, this one alone without it. They end together, with one message.

    Only the leader has a standard output. The first one to fail says why; the others, who only notice that
    it is gone or make the same mistake, end in silence with its exit code.

    Raises:
        UserError: the environment speaks of several processes, but does not say which this is.
    """
    processes = join()
    if processes.world == 1:
        yield processes
        return
    with contextlib.ExitStack() as stack:
        if not processes.leader:
            silence = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(silence))
        try:
            yield processes
        except SystemExit:  # --help
            raise
        except BaseException as error:
            code, known = _exit_code(error)
            others = processes.fail(code)
            if others is not None and known:
                raise SystemExit(others) from None
            if isinstance(error, LostProcessError):
                raise SystemExit(
                    "error: a process of this training is gone (killed, or its machine is); "
                    f"--resume goes on from the last checkpoint ({error})"
                ) from None
            raise
        if dist.is_initialized():
            dist.destroy_process_group()


def join() -> Processes:
    """Which process of how many this is, by the environment torchrun sets."""
    started = os.environ.get("WORLD_SIZE", "1")
    if started == "1":
        return Processes()
    try:
        store, rank, world = next(iter(rendezvous("env://", timeout=STARTING)))
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"WORLD_SIZE is {started}, but the processes do not find each other ({reason}); start them "
            "with torchrun --nproc-per-node N -m train.run -- OPTIONS, or unset WORLD_SIZE"
        ) from None
    return Processes(rank, world, local_rank, PrefixStore(f"train/{next(JOINED)}", store))


def _exit_code(error: BaseException) -> tuple[int, bool]:
    """What a process ends with (as configs.command does), and whether saying it once is enough."""
    if isinstance(error, UserError) or (isinstance(error, OSError) and wrong_place(error)):
        return USER_ERROR_EXIT, True
    if isinstance(error, KeyboardInterrupt):
        return 130, True
    return 1, isinstance(error, LostProcessError)  # our own mistakes are all shown


BUCKET_BYTES = 32 << 20
"""Gradients summed in one message, so also the memory that takes; a larger one is summed where it lies."""


CHUNK = 1 << 24
"""Values added up at a time for a fingerprint."""


INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sum_over_processes(parameters: Sequence[nn.Parameter]) -> None:
    """Give each parameter the sum of all processes' gradients, the same bits everywhere.

    One that has no gradient on some processes counts as zeros there. One that has none on any stays without:
    AdamW leaves it alone, as it does when one process trains.
    """
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    gradients: list[Tensor] = []
    for parameter, somewhere in zip(parameters, used.tolist(), strict=True):
        if somewhere and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad is not None:
            gradients.append(parameter.grad)
    for bucket in buckets(gradients, BUCKET_BYTES):
        _sum(bucket)


def buckets(tensors: Iterable[Tensor], most_bytes: int) -> Iterator[list[Tensor]]:
    """Neighbours of one type in groups of at most `most_bytes`; a larger tensor is a group of its own."""
    group: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if group and (size + tensor.nbytes > most_bytes or tensor.dtype != group[0].dtype):
            yield group
            group, size = [], 0
        group.append(tensor)
        size += tensor.nbytes
    if group:
        yield group


def _sum(bucket: Sequence[Tensor]) -> None:
    if len(bucket) == 1 and bucket[0].is_contiguous():
        dist.all_reduce(bucket[0])
        return
    flat = torch.cat([t.reshape(-1) for t in bucket])
    dist.all_reduce(flat)
    for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Short, and another one as soon as one value has other bits. The same on every device."""
    total: Tensor | int = 0
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(INTEGERS[tensor.element_size()]).reshape(-1)
        for part in bits.split(CHUNK):
            total = total * 31 + part.sum(dtype=torch.int64)  # wraps around, on the device
    return f"{int(total) & (1 << 64) - 1:016x}"
