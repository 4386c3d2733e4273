"""Sources in, committed rows out: the class that does the work, inline or inside a Ray actor.

    worker = Worker(setup, setup.load(), office, number=0)
    outcomes = worker.run(tasks)        # those final so far; the rest goes on in the background
    outcomes += worker.flush()          # everything encoded is committed now
    worker.close()

    intake: read, claim, decode (threads) -> encode and pack, here -> row_writer (thread)

Batches have one fixed shape and cross the borders of tasks. A source is `ok` only once its shard is
committed. Order and company change nothing in a row, so a killed job and its repetition end alike.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from cache.layout import SpacePaths
from cache.locks import WorkerLease
from cache.spec import FeatureSpec
from cache.writer import Space
from configs import UserError
from encode.breadcrumbs import Breadcrumbs, breadcrumb_file
from encode.intake import Intake, Item
from encode.local import failed
from encode.row_writer import Row, RowWriter
from encode.setup import Setup
from encode.tasks import Office, Outcome, SourceTask, Timings
from model.media import decode_picture
from model.quantize import pack

REPORT_EVERY_S = 1.0


class Encoder(Protocol):
    """The part of `model.vision.VisionEncoder` that a worker uses."""

    def spec(self, codec: str) -> FeatureSpec:
        """How it makes features, stored by `codec`."""
        ...

    def prepare(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """RGB picture -> (S, S, 3)."""
        ...

    def encode(self, pixels: npt.NDArray[np.uint8], kind: str = "picture") -> torch.Tensor:
        """(n, S, S, 3) -> (n, tokens, width), in the one batch shape whatever n is."""
        ...


class Worker:
    """See above. All methods belong to one thread; a worker that raised is good for `close` only."""

    def __init__(
        self,
        setup: Setup,
        encoder: Encoder,
        office: Office,
        *,
        number: int,
    ):
        """Take the lease and start the threads.

        Args:
            setup: what the workers of this job have in common.
            encoder: what `setup.load` makes.
            office: the driver's side.
            number: this worker's, never used before in the job.
        """
        paths = SpacePaths(setup.space)
        self.space = Space.open(paths)
        if encoder.spec(self.space.spec.codec).fingerprint != self.space.spec.fingerprint:
            raise UserError(f"{paths.root}: this encoder does not make the features of this space")
        self._lease = WorkerLease(paths, setup.token, str(number))
        self._lease.__enter__()
        self._encoder, self._office, self._number = encoder, office, number
        self._batch_size = self.space.spec.batch_size
        self._ahead = max(2 * self._batch_size, 4 * setup.threads)
        self._crumbs = Breadcrumbs(breadcrumb_file(paths, number), setup.threads)
        self._done: deque[Outcome] = deque()
        self._intake = Intake(
            claim=lambda keys: office.claim(number, keys),
            decode=self.decode,
            prepare=encoder.prepare,
            our_error=self._our_error,
            crumbs=self._crumbs,
            threads=setup.threads,
            ahead=self._ahead,
        )
        self._writer = RowWriter(
            self.space,
            next_shard=lambda kind: office.next_shard(number, kind),
            fence=self._lease.fence,
            done=self._done.append,
            commit_every_s=setup.commit_every_s,
        )
        self._under_way = 0  # sources taken up and not yet in a batch
        self._batch: list[Item] = []
        self._timings = Timings()
        self._going, self._reported = True, 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def run(self, tasks: Sequence[SourceTask]) -> list[Outcome]:
        """Take `tasks` up; returns what is final so far, once most of them are encoded.

        Raises:
            DiskFull: a shard could not be written; its rows do not exist.
            StaleJob: the space belongs to another job now.
        """
        self._go_on()
        for task in tasks:
            self._intake.put(task)
        self._under_way += len(tasks)
        while self._under_way > self._ahead and self._go_on():
            self._pull()
        return self._take_done()

    def flush(self) -> list[Outcome]:
        """Finish and commit what was taken up; after a stop, only what is encoded already.

        Raises:
            DiskFull, StaleJob: as `run`.
        """
        while self._under_way and self._go_on():
            self._pull()
        if self._going:
            self._encode()
        self._writer.commit()
        self._office.report(self._number, self.timings())
        return self._take_done()

    def timings(self) -> Timings:
        """What was done so far."""
        return replace(self._timings, write_s=self._writer.seconds)

    def close(self) -> None:
        """End the threads and give the lease back; what is not committed is dropped."""
        self._intake.close()
        self._writer.close()
        self._crumbs.close()
        self._lease.__exit__(None, None, None)

    def decode(self, data: bytes) -> Image.Image:
        """Bytes to picture; a test may put another in its place."""
        return decode_picture(data)

    def _pull(self) -> None:
        """Bring one source from the intake into the batch; encode the batch when it is full."""
        start = time.perf_counter()
        item = self._intake.get(timeout_s=REPORT_EVERY_S)
        self._timings.wait_s += time.perf_counter() - start
        if item is None:
            return
        self._under_way -= 1
        self._timings.read_s += item.read_s
        self._timings.decode_s += item.decode_s
        if item.failure is not None:
            self._fail(item, *item.failure)
        elif item.duplicate:
            self._done.append(Outcome(task=item.task, result="duplicate", record=item.record))
        else:
            if self._batch and self._batch[0].task.kind != item.task.kind:
                self._encode()
            self._batch.append(item)
            if len(self._batch) == self._batch_size:
                self._encode()

    def _encode(self) -> None:
        """Pixels of the batch -> packed rows, to the writer."""
        batch, self._batch = self._batch, []
        if not batch:
            return
        start = time.perf_counter()
        try:
            pixels = np.stack([item.pixels for item in batch if item.pixels is not None])
            features = self._encoder.encode(pixels, batch[0].task.kind)
            packed = pack(features, self.space.spec.codec)
            rows = packed.rows.cpu().numpy()
        except RuntimeError as error:  # what torch raises, out of memory included
            for item in batch:
                self._fail(item, "encode", self._our_error(error))
            return
        finite, lost = packed.finite.tolist(), packed.error.tolist()
        for item, row, sound, loss in zip(batch, rows, finite, lost, strict=True):
            if sound:
                self._writer.put(Row(task=item.task, record=item.record, payload=row, lost=loss))
            else:
                self._fail(item, "encode", f"{self.space.spec.name}: the features hold NaN or Inf")
        self._timings.clipped += packed.clipped
        self._timings.pictures += len(batch)
        self._timings.encode_s += time.perf_counter() - start

    def _fail(self, item: Item, stage: str, why: str) -> None:
        record = failed(item.record, item.task.attempts, stage, why)
        self._done.append(Outcome(task=item.task, result="failed", record=record))

    def _our_error(self, error: Exception) -> str:
        """In one line that begins with the space's name: of another space it says nothing."""
        text = " ".join(str(error).split())[:200]
        return f"{self.space.spec.name}: {type(error).__name__}: {text}"

    def _go_on(self) -> bool:
        """Report now and then; False when the job stops. Raises what the writer met."""
        self._writer.check()
        now = time.monotonic()
        if self._going and now - self._reported > REPORT_EVERY_S:
            self._reported = now
            self._going = self._office.report(self._number, self.timings())
        return self._going

    def _take_done(self) -> list[Outcome]:
        return [self._done.popleft() for _ in range(len(self._done))]
