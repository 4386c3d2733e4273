"""Batches of encoder inputs -> packed rows. Two batches are in flight, and a batch never waits for the GPU.

    pipeline = Pipeline(encoder, "int8")
    for pixels, names in batches:
        for done in pipeline.put(pixels, "image", names):      # earlier batches, in order
            store(done.label, done.rows)
    for done in pipeline.drain():                              # the last ones
        store(done.label, done.rows)

    pinned pixels ──► pixels ──► forward pass, pooling, packing ──► rows, facts ──► pinned rows, facts
                  up                  (one recorded call)                      down

Each arrow is a stream of its own, so the copies of one batch run beside the forward pass of another. What the
host wants to know of a batch (which features are finite, how many values were clipped, the error of packing)
is computed on the device and copied with the rows: asking earlier would make the host wait, and then the GPU.
Buffers are allocated once for each shape, and used again by every other batch.

On a CPU the two batches compute side by side, each with half of the threads, unless a batch takes long.

n inputs in a batch, B with those that fill it up, S side of an input in pixels, R bytes of a row.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, cuda

from model.quantize import pack
from model.vision.encoder import VisionEncoder
from model.vision.replay import Replay

IN_FLIGHT = 2
"""Batches that are started and not handed out. While one computes, the other's pixels or rows are copied."""

BRIEF_S = 1.0
"""Seconds of a batch, on all threads of a CPU, up to which two of them compute side by side."""

ERROR, FINITE, CLIPPED = range(3)
"""Columns of what is known of each row, float64: counts up to 2^53 are exact."""

Label = TypeVar("Label")


@dataclass(frozen=True, kw_only=True, eq=False)
class Done(Generic[Label]):
    """One batch, encoded."""

    label: Label
    """What `put` was given with it."""
    rows: npt.NDArray[np.uint8]
    """(n, R) packed rows; those that are not finite must not be stored."""
    error: npt.NDArray[np.float64]
    """(n,) relative error of packing."""
    finite: npt.NDArray[np.bool_]
    """(n,) whether the features hold neither NaN nor Inf."""
    clipped: npt.NDArray[np.int64]
    """(n,) values that were clipped to float16's range, before pooling or packing."""
    failure: RuntimeError | None = None
    """Why it could not be encoded; the arrays are empty then."""


@dataclass(kw_only=True, eq=False)
class _Slot:
    """The buffers of one batch in flight."""

    pixels: Tensor
    """(B, S, S, 3) uint8, on the host."""
    on_device: Tensor
    """The same, on the device."""
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    """Array -> rows (B, R) uint8 and facts (B, 3) float64, on the device."""
    on_host: dict[str, list[Tensor]] = field(default_factory=dict)
    """The same, on the host."""


@dataclass(kw_only=True, eq=False)
class _Started(Generic[Label]):
    """A batch that is started."""

    label: Label
    array: str
    count: int
    slot: _Slot
    failure: RuntimeError | None = None


class Pipeline(Generic[Label]):
    """Encodes batches in the order they are put. All methods belong to one thread."""

    def __init__(self, encoder: VisionEncoder, codec: str, *, side_by_side: bool = True) -> None:
        """Allocate the buffers of the inputs.

        Args:
            encoder: on its device.
            codec: of the rows: fp16, int8 or int4.
            side_by_side: whether a CPU computes the batches in flight together.
        """
        self._encoder, self._codec = encoder, codec
        spec = encoder.spec(codec)
        shape = (spec.batch_size, spec.image_size, spec.image_size, 3)
        kinds = {"cuda": _CudaCopies, "cpu": _SideBySide if side_by_side else _Copies}
        self._copies = kinds.get(encoder.device.type, _Copies)(encoder.device)
        self._free = deque(self._copies.slot(shape) for _ in range(IN_FLIGHT))
        self._started: deque[_Started[Label]] = deque()
        self._work: dict[str, Replay] = {}

    def put(
        self, pixels: Sequence[npt.NDArray[np.uint8]], array: str, label: Label
    ) -> list[Done[Label]]:
        """Start a batch; return the oldest one if `IN_FLIGHT` were in flight already.

        Args:
            pixels: n inputs (S, S, 3), at most the encoder's batch size.
            array: `image` or `frame`, which are pooled each in their way.
            label: returned with the rows.
        """
        done = [self._oldest()] if len(self._started) == IN_FLIGHT else []
        slot = self._free[0]
        host = slot.pixels.numpy()
        np.stack(pixels, out=host[: len(pixels)])
        host[len(pixels) :] = 0
        started = _Started(label=label, array=array, count=len(pixels), slot=self._free.popleft())
        self._started.append(started)
        try:
            self._copies.up(slot)
            self._copies.compute(slot, array, self._replay(array))
            self._copies.down(slot, array)
        except RuntimeError as error:  # torch raises it for every error, out of memory included
            started.failure = error
        return done

    def drain(self) -> list[Done[Label]]:
        """Return the batches in flight, in order."""
        return [self._oldest() for _ in range(len(self._started))]

    def close(self) -> None:
        """Wait for the copies under way, so that the buffers can be freed. Batches in flight are lost."""
        self._copies.close()

    def _oldest(self) -> Done[Label]:
        """Wait for the oldest batch, and free its slot."""
        started = self._started.popleft()
        failure = started.failure
        rows, facts = np.empty((0, 0), np.uint8), np.empty((0, 3))
        if failure is None:
            try:
                rows, facts = self._copies.wait(started.slot, started.array, started.count)
            except RuntimeError as error:  # of a kernel that was started long ago
                failure = error
        self._free.append(started.slot)
        return Done(
            label=started.label,
            rows=rows,
            error=facts[:, ERROR],
            finite=facts[:, FINITE].astype(np.bool_),
            clipped=facts[:, CLIPPED].astype(np.int64),
            failure=failure,
        )

    def _replay(self, array: str) -> Replay:
        """Return the whole computation of a batch of this array, which CUDA records once."""
        if array not in self._work:

            def work(pixels: Tensor) -> list[Tensor]:
                features, over = self._encoder.features(pixels, array)
                packed = pack(features, self._codec)
                clipped = packed.clipped + over.to(packed.clipped.device)
                facts = (packed.error.double(), packed.finite.double(), clipped.double())
                return [packed.rows, torch.stack(facts, dim=1)]

            self._work[array] = Replay(work)
        return self._work[array]


class _Copies:
    """Copies the batches of a device without streams: a batch is complete when it is put."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def slot(self, shape: tuple[int, ...]) -> _Slot:
        """Return the buffers of one batch of inputs (B, S, S, 3)."""
        pixels = torch.zeros(shape, dtype=torch.uint8)
        return _Slot(pixels=pixels, on_device=pixels.to(self.device))

    def up(self, slot: _Slot) -> None:
        """Copy the inputs to the device."""
        if slot.on_device is not slot.pixels:
            slot.on_device.copy_(slot.pixels)

    def compute(self, slot: _Slot, array: str, work: Replay) -> None:
        """Compute rows and facts of the inputs."""
        slot.outputs[array] = list(work(slot.on_device))

    def down(self, slot: _Slot, array: str) -> None:
        """Copy rows and facts to the host."""
        slot.on_host[array] = [x.cpu() for x in slot.outputs.pop(array)]

    def wait(
        self, slot: _Slot, array: str, count: int
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
        """Return the rows and facts of `count` inputs once they are on the host."""
        rows, facts = slot.on_host.pop(array)
        return rows[:count].numpy(), facts[:count].numpy()

    def close(self) -> None:
        """Do nothing: no copy goes on after its call."""


class _SideBySide(_Copies):
    """Computes the batches of a CPU, which are where they are needed, in a thread each.

    A pass of a small tower gains little from a second core, and waits for it where a decoder wants that core
    too. Two batches of one thread each took 0.8 to 0.9 of the time on 2 idle cores; the bits are the same. Of
    ViT-L/14@336 they took 0.97 (2026-11-27), and a job that is stopped would wait twice as long. So a tower
    whose first batch takes longer than `BRIEF_S` computes one batch at a time.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._threads: ThreadPoolExecutor | None = None
        self._is_first = True
        self._results: dict[tuple[int, str], Future[Sequence[Tensor]]] = {}  # by slot and array

    def compute(self, slot: _Slot, array: str, work: Replay) -> None:
        """Compute rows and facts of the inputs, or start to."""
        if self._threads is not None:
            self._results[id(slot), array] = self._threads.submit(work, slot.on_device)
            return
        started, done = time.perf_counter(), Future[Sequence[Tensor]]()
        done.set_result(work(slot.on_device))
        self._results[id(slot), array] = done
        if self._is_first and time.perf_counter() - started < BRIEF_S:
            lanes = min(IN_FLIGHT, torch.get_num_threads())
            share = torch.get_num_threads() // lanes
            self._threads = ThreadPoolExecutor(
                lanes, "encode", initializer=torch.set_num_threads, initargs=(share,)
            )
        self._is_first = False

    def down(self, slot: _Slot, array: str) -> None:
        """Do nothing: rows and facts are made on the host."""

    def wait(
        self, slot: _Slot, array: str, count: int
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
        """Wait for rows and facts."""
        rows, facts = self._results.pop((id(slot), array)).result()
        return rows[:count].numpy(), facts[:count].numpy()

    def close(self) -> None:
        """Wait for the batches that compute."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)


class _CudaCopies(_Copies):
    """Copies the batches of a GPU on streams of their own. No call waits for the GPU, except `wait`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._up, self._down = cuda.Stream(device), cuda.Stream(device)
        self._events: dict[int, tuple[cuda.Event, cuda.Event, cuda.Event]] = {}  # by slot

    def slot(self, shape: tuple[int, ...]) -> _Slot:
        """Return the buffers of one batch: pinned memory, which a GPU reads while the host goes on."""
        pixels = torch.zeros(shape, dtype=torch.uint8, pin_memory=True)
        slot = _Slot(pixels=pixels, on_device=torch.empty_like(pixels, device=self.device))
        # `blocking`: the host sleeps while it waits, and a thread that decodes gets the core.
        self._events[id(slot)] = (cuda.Event(), cuda.Event(), cuda.Event(blocking=True))
        # The memory may be of a tensor that was freed, and whose last kernel still runs.
        self._up.wait_stream(cuda.current_stream(self.device))
        return slot

    def up(self, slot: _Slot) -> None:
        """Start the copy of the inputs."""
        copied, _, _ = self._events[id(slot)]
        with cuda.stream(self._up):
            slot.on_device.copy_(slot.pixels, non_blocking=True)
            copied.record(self._up)

    def compute(self, slot: _Slot, array: str, work: Replay) -> None:
        """Start the computation behind the copy, on the current stream, where weights and constants are."""
        copied, computed, _ = self._events[id(slot)]
        stream = cuda.current_stream(self.device)
        stream.wait_event(copied)
        outputs = work(slot.on_device)
        if array not in slot.outputs:
            slot.outputs[array] = [torch.empty_like(x) for x in outputs]
        for own, x in zip(slot.outputs[array], outputs, strict=True):
            own.copy_(x)  # the next batch overwrites what was recorded, while these are copied
        computed.record(stream)

    def down(self, slot: _Slot, array: str) -> None:
        """Start the copy of rows and facts behind the computation."""
        _, computed, arrived = self._events[id(slot)]
        if array not in slot.on_host:
            slot.on_host[array] = [
                torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in slot.outputs[array]
            ]
        with cuda.stream(self._down):
            self._down.wait_event(computed)
            for host, x in zip(slot.on_host[array], slot.outputs[array], strict=True):
                host.copy_(x, non_blocking=True)
            arrived.record(self._down)

    def wait(
        self, slot: _Slot, array: str, count: int
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
        """Wait for the copy; return rows and facts in memory of their own, as the buffers are used again."""
        _, _, arrived = self._events[id(slot)]
        arrived.synchronize()
        rows, facts = slot.on_host[array]
        return rows[:count].numpy().copy(), facts[:count].numpy().copy()

    def close(self) -> None:
        """Wait for the copies that are under way."""
        with contextlib.suppress(RuntimeError):  # of a kernel: its batch is lost anyway
            self._up.synchronize()
            self._down.synchronize()
