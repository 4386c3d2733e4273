"""Sources in, committed rows out: the class that does the work, inline or inside a Ray actor.

    worker = Worker(config, config.load(), coordinator, number=0)
    outcomes = worker.run(tasks)        # those final so far; the rest goes on in the background
    outcomes += worker.flush()          # everything encoded is committed now
    worker.close()

    prefetcher: read, download, reserve, decode (threads) -> encode and pack, here -> row_writer (thread)

Batches have one fixed shape and cross the borders of tasks; images and frames have one each. A source is
`ok` only once all its rows are committed. Order and company change nothing in a row, so a killed job and its
repetition end alike.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import torch
from PIL import Image

from cache.format.spec import ARRAY_OF, FeatureSpec
from cache.store.locks import WorkerLease
from cache.store.paths import SpacePaths
from cache.store.references import Present
from cache.store.space import Space
from cache.store.writer import NewRow
from configs import UserError
from encode.download.urls import is_url
from encode.worker.config import WorkerConfig
from encode.worker.decode_log import DecodeLog, decode_log_file
from encode.worker.downloads import Downloads
from encode.worker.media_item import EncoderInput, MediaItem, Pixels
from encode.worker.messages import Coordinator, Outcome, SourceTask, Timings
from encode.worker.prefetch import Prefetcher
from encode.worker.row_writer import RowWriter
from model.media.images import Failure, decode_image
from model.quantize import pack

REPORT_EVERY_S = 1.0


class Encoder(Protocol):
    """The part of `model.vision.VisionEncoder` that a worker uses."""

    def spec(self, codec: str) -> FeatureSpec:
        """How it makes features, stored by `codec`."""
        ...

    def prepare(self, image: Image.Image) -> Pixels:
        """RGB image -> (S, S, 3)."""
        ...

    def encode(self, pixels: Pixels, kind: str = "image") -> torch.Tensor:
        """(n, S, S, 3) -> (n, tokens, width), in the one batch shape whatever n is."""
        ...


class Worker:
    """See above. All methods belong to one thread; a worker that raised is good for `close` only."""

    def __init__(
        self,
        config: WorkerConfig,
        encoder: Encoder,
        coordinator: Coordinator,
        *,
        number: int,
    ):
        """Take the lease and start the threads.

        Args:
            config: what the workers of this job have in common.
            encoder: what `config.load` makes.
            coordinator: the driver's side.
            number: this worker's, never used before in the job.
        """
        paths = SpacePaths(config.space)
        self.space = Space.open(paths)
        spec = self.space.spec
        made = replace(encoder.spec(spec.codec), container=spec.container)
        if made.fingerprint != spec.fingerprint:
            raise UserError(f"{paths.root}: this encoder does not make the features of this space")
        self._lease = WorkerLease(paths, config.token, str(number))
        self._lease.__enter__()
        self._encoder, self._coordinator, self._number = encoder, coordinator, number
        self._batch_size = self.space.spec.batch_size
        self._ahead = max(2 * self._batch_size, 4 * config.threads)
        self._web_ahead = self._ahead + 2 * config.download.connections
        self._present = Present.of(self.space, max_frames=config.max_frames)
        self._max_frames = config.max_frames
        self._decode_log = DecodeLog(decode_log_file(paths, number), config.threads)
        self._done: deque[Outcome] = deque()
        self._prefetcher = Prefetcher(
            self,
            decode_log=self._decode_log,
            downloads=Downloads(config.download, config.media_store),
            threads=config.threads,
            ahead=self._ahead,
            batch_size=self._batch_size,
            max_frames=config.max_frames,
        )
        self._writer = RowWriter(
            self.space,
            next_shard=lambda kind: coordinator.next_shard(number, kind),
            fence=self._lease.fence,
            done=self._done.append,
            commit_every_s=config.commit_every_s,
        )
        self._under_way = 0  # sources taken up and not yet wholly in batches
        self._batches: dict[str, list[EncoderInput]] = {array: [] for array in ARRAY_OF.values()}
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
            DiskFullError: a shard could not be written; its rows do not exist.
            StaleJobError: the space belongs to another job now.
        """
        self._go_on()
        for task in tasks:
            self._prefetcher.put(task)
        self._under_way += len(tasks)
        # Downloads wait for servers, so many more are begun than there is room for decoded images.
        web = any(is_url(task.source) for task in tasks)
        while self._under_way > (self._web_ahead if web else self._ahead) and self._go_on():
            self._pull()
        return self._take_done()

    def flush(self) -> list[Outcome]:
        """Finish and commit what was taken up; after a stop, only what is encoded already.

        Raises:
            DiskFullError, StaleJobError: as `run`.
        """
        while self._under_way and self._go_on():
            self._pull()
        if self._going:
            for array in self._batches:
                self._encode(array)
        self._writer.commit()
        self._coordinator.report(self._number, self.timings())
        return self._take_done()

    def timings(self) -> Timings:
        """What was done so far."""
        return replace(self._timings, write_s=self._writer.seconds)

    def close(self) -> None:
        """End the threads and give the lease back; what is not committed is dropped."""
        self._prefetcher.close()
        self._writer.close()
        self._decode_log.close()
        self._lease.__exit__(None, None, None)

    # ---- what the prefetcher asks, from its threads

    def reserve(self, ids: Sequence[str]) -> list[bool]:
        """Which of these media this worker shall encode."""
        return self._coordinator.reserve(self._number, ids)

    def missing(self, key: str, views: Sequence[str], *, again: bool) -> list[str]:
        """Which of a video's views are not in the space."""
        if again:  # of a worker that is gone: it may have committed some since this one looked
            self._present = Present.of(self.space, max_frames=self._max_frames)
        return self._present.missing(key, views)

    def decode(self, data: bytes) -> Image.Image:
        """Bytes to image; a test may put another in its place."""
        return decode_image(data)

    def prepare(self, image: Image.Image) -> Pixels:
        """Image to encoder input."""
        return self._encoder.prepare(image)

    def our_error(self, error: Exception) -> str:
        """In one line that begins with the space's name: of another space it says nothing."""
        text = " ".join(str(error).split())[:200]
        return f"{self.space.spec.name}: {type(error).__name__}: {text}"

    # ---- encoder inputs -> batches -> rows

    def _pull(self) -> None:
        """Bring one encoder input from the prefetcher into its batch; encode the batch when it is full."""
        start = time.perf_counter()
        got = self._prefetcher.get(timeout_s=REPORT_EVERY_S)
        self._timings.wait_s += time.perf_counter() - start
        if isinstance(got, EncoderInput):
            array = ARRAY_OF[got.item.task.kind]
            got.item.pending += 1
            self._batches[array].append(got)
            if len(self._batches[array]) == self._batch_size:
                self._encode(array)
        elif got is not None:
            self._under_way -= 1
            self._timings.read_s += got.read_s
            self._timings.decode_s += got.decode_s
            got.decoded = True
            self._finish(got)

    def _encode(self, array: str) -> None:
        """Encode and pack the inputs of one batch."""
        batch, self._batches[array] = self._batches[array], []
        if not batch:
            return
        start = time.perf_counter()
        try:
            features = self._encoder.encode(np.stack([one.pixels for one in batch]), array)
            packed = pack(features, self.space.spec.layout)
            rows = packed.rows.cpu().numpy()
        except RuntimeError as error:  # what torch raises, out of memory included
            for one in batch:
                self._fail(one.item, self.our_error(error))
        else:
            finite, errors = packed.finite.tolist(), packed.error.tolist()
            for one, row, is_finite, error_ in zip(batch, rows, finite, errors, strict=True):
                one.item.rows.append(
                    NewRow(
                        key=one.item.key,
                        view=one.view,
                        payload=row.data,
                        time_s=one.time_s,
                        error=error_,
                    )
                )
                if not is_finite:
                    self._fail(one.item, f"{self.space.spec.name}: the features hold NaN or Inf")
            self._timings.clipped += packed.clipped
            self._timings.rows += len(batch)
        self._timings.encode_s += time.perf_counter() - start
        for one in batch:
            one.item.pending -= 1
        for item in dict.fromkeys(one.item for one in batch):
            self._finish(item)

    def _fail(self, item: MediaItem, reason: str) -> None:
        item.failure = item.failure or Failure("encode", reason)  # decoding may have failed before

    def _finish(self, item: MediaItem) -> None:
        """Once all inputs of an item are encoded, write its rows, or report why there are none."""
        if not item.decoded or item.pending:
            return
        outcome = item.outcome()
        if outcome.result != "ok":
            self._done.append(outcome)
            return
        self._timings.media += 1
        self._writer.put(item)

    def _go_on(self) -> bool:
        """Report now and then; False when the job stops. Raises what the writer met."""
        self._writer.check()
        now = time.monotonic()
        if self._going and now - self._reported > REPORT_EVERY_S:
            self._reported = now
            self._going = self._coordinator.report(self._number, self.timings())
        return self._going

    def _take_done(self) -> list[Outcome]:
        return [self._done.popleft() for _ in range(len(self._done))]
