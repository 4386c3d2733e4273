"""The worker: sources in, committed rows out. It runs inline, or inside a Ray actor.

    worker = Worker(config, config.load(), coordinator, number=0)
    outcomes = worker.run(tasks)        # the outcomes known so far; the other tasks go on in the background
    outcomes += worker.flush()          # everything is encoded and committed now
    worker.close()

    prefetcher: read, download, reserve, decode (threads) -> pipeline: encode, pack -> row_writer (thread)

A batch has one fixed shape and may hold inputs of several sources; images and frames have a batch each. A
source is `ok` only once all its rows are committed. A row does not depend on batch order or on what else is
in the batch, so a killed and resumed job stores the same rows as an uninterrupted one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace

from PIL import Image

from cache.format.spec import ARRAY_OF
from cache.store.locks import WorkerLease
from cache.store.paths import SpacePaths
from cache.store.space import Present, Space
from cache.store.writer import NewRow
from configs import UserError
from encode.download.urls import is_url
from encode.worker.config import WorkerConfig
from encode.worker.decode_log import DecodeLog, decode_log_file
from encode.worker.decode_process import SLOTS
from encode.worker.decoders import setup_for
from encode.worker.media_item import EncoderInput, MediaItem, Pixels
from encode.worker.messages import Coordinator, Outcome, SourceTask, Timings
from encode.worker.prefetch import Prefetcher
from encode.worker.row_writer import RowWriter
from model.media.images import DecodedImage, Failure
from model.vision.encoder import VisionEncoder
from model.vision.pipeline import Done, Pipeline

REPORT_EVERY_S = 1.0
"""Seconds between two reports to the coordinator, and so the delay of a stop."""


class Worker:
    """Encodes sources. All methods belong to one thread. After an exception, only `close` may be called."""

    def __init__(
        self,
        config: WorkerConfig,
        encoder: VisionEncoder,
        coordinator: Coordinator,
        *,
        number: int,
    ):
        """Take the lease and start the threads.

        Args:
            config: what the workers of this job have in common.
            encoder: the result of `config.load`.
            coordinator: gives out reservations and shard numbers.
            number: number of this worker, never used before in the job.

        Raises:
            UserError: the encoder's features do not belong into the space.
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
        self._fit = replace(encoder.input, compiled=config.compiled)
        if not config.decode_apart:
            self._fit.compile()
        self._batch_size = spec.batch_size
        # Decoded ahead: a second batch while one is encoded, and enough to keep all threads busy: of what a
        # process decodes together, one bunch at work and one that waits.
        busy = 2 * SLOTS if config.decode_apart else 4
        self._ahead = max(2 * self._batch_size, busy * config.threads)
        # Downloads mostly wait for servers, so more of them are started than decoded images fit in memory.
        self._web_ahead = self._ahead + 2 * config.download.connections
        self._present = Present.of(self.space, max_frames=config.max_frames)
        self._max_frames = config.max_frames
        log_file = decode_log_file(paths, number)
        self._decode_log = DecodeLog(log_file, config.threads, paths.cache_root)
        self._done: deque[Outcome] = deque()
        self._prefetcher = Prefetcher(
            self,
            config,
            self._decode_log,
            ahead=self._ahead,
            batch_size=self._batch_size,
            apart=setup_for(config, spec, encoder.device.type),
        )
        self._writer = RowWriter(
            self.space,
            next_shard=lambda array: coordinator.next_shard(number, array),
            fence=self._lease.fence,
            done=self._done.append,
            commit_every_s=config.commit_every_s,
        )
        self._pipeline: Pipeline[list[EncoderInput]] = Pipeline(encoder, spec.codec)
        self._under_way = 0  # sources that the prefetcher has not delivered completely
        self._batches: dict[str, list[EncoderInput]] = {array: [] for array in ARRAY_OF.values()}
        self._timings = Timings()
        self._running, self._reported_s = True, 0.0

    def run(self, tasks: Sequence[SourceTask]) -> list[Outcome]:
        """Start `tasks`, and encode until few sources are waiting. Return the outcomes known so far.

        Raises:
            DiskError: a shard could not be written; its rows do not exist.
            StaleJobError: another job has taken over the space.
        """
        self._report()
        for task in tasks:
            self._prefetcher.put(task)
        self._under_way += len(tasks)
        web = any(is_url(task.source) for task in tasks)
        while self._under_way > (self._web_ahead if web else self._ahead) and self._report():
            self._pull()
        return self._take_done()

    def flush(self) -> list[Outcome]:
        """Encode and commit all started tasks; after a stop, commit only what is encoded already.

        Raises:
            DiskError: a shard could not be written; its rows do not exist.
            StaleJobError: another job has taken over the space.
        """
        while self._under_way and self._report():
            self._pull()
        if self._running:
            for array in self._batches:
                self._encode(array)
        self._drain()
        self._writer.commit()
        self._coordinator.report(self._number, self.timings())
        return self._take_done()

    def timings(self) -> Timings:
        """Return what this worker has done so far."""
        return replace(self._timings, write_s=self._writer.seconds)

    def close(self) -> None:
        """End the threads and release the lease. Rows that are not committed are lost."""
        self._prefetcher.close()
        self._pipeline.close()
        self._writer.close()
        self._decode_log.close()
        self._lease.__exit__(None, None, None)

    # ---- called by the prefetcher, from its threads

    def reserve(self, ids: Sequence[str]) -> list[bool]:
        """Return which of these media are this worker's to encode."""
        return self._coordinator.reserve(self._number, ids)

    def missing(self, key: str, views: Sequence[str], *, reread: bool) -> list[str]:
        """Return which of a video's views are not in the space; `reread` reads its commits first."""
        if reread:
            self._present = Present.of(self.space, max_frames=self._max_frames)
        return self._present.missing(key, views)

    def decode(self, data: bytes) -> DecodedImage:
        """Decode an image, in a thread. Tests override it."""
        return self._fit.decode(data)

    def prepare(self, image: Image.Image | DecodedImage) -> Pixels:
        """Return the encoder input (S, S, 3) of an image."""
        return self._fit.prepare(image)

    def our_error(self, error: Exception) -> str:
        """Return an error in one line that begins with the space's name, since it applies to no other."""
        text = " ".join(str(error).split())[:200]
        return f"{self.space.spec.name}: {type(error).__name__}: {text}"

    # ---- encoder inputs -> batches -> rows

    def _pull(self) -> None:
        """Move one encoder input from the prefetcher to its batch, and encode the batch if it is full."""
        start = time.perf_counter()
        got = self._prefetcher.get(timeout_s=REPORT_EVERY_S)
        self._timings.wait_s += time.perf_counter() - start
        if isinstance(got, EncoderInput):
            array = ARRAY_OF[got.item.task.kind]
            got.item.pending += 1
            self._batches[array].append(got)
            if len(self._batches[array]) == self._batch_size:
                self._encode(array)
        elif got is None:
            self._drain()  # nothing follows soon that would have them taken
        else:
            self._under_way -= 1
            if is_url(got.task.source):
                self._timings.download_s += got.read_s
            else:
                self._timings.read_s += got.read_s
            self._timings.decode_s += got.decode_s
            got.decoded = True
            self._finish(got)

    def _encode(self, array: str) -> None:
        """Start the batch of an array, and take the batches that are done."""
        batch, self._batches[array] = self._batches[array], []
        if not batch:
            return
        start = time.perf_counter()
        done = self._pipeline.put([one.pixels for one in batch], array, batch)
        self._timings.encode_s += time.perf_counter() - start
        self._take_rows(done)

    def _drain(self) -> None:
        """Take the batches in flight."""
        start = time.perf_counter()
        done = self._pipeline.drain()
        self._timings.encode_s += time.perf_counter() - start
        self._take_rows(done)

    def _take_rows(self, batches: Iterable[Done[list[EncoderInput]]]) -> None:
        """Give the rows of batches to their items, and finish the items that are complete."""
        for done in batches:
            if done.failure is not None:
                for one in done.label:
                    self._fail(one.item, self.our_error(done.failure))
            else:
                self._keep(done)
                self._timings.clipped += int(done.clipped.sum())
                self._timings.rows += len(done.rows)
            for one in done.label:
                one.item.pending -= 1
            for item in dict.fromkeys(one.item for one in done.label):
                self._finish(item)

    def _keep(self, done: Done[list[EncoderInput]]) -> None:
        """Give each row to its item."""
        facts = zip(done.rows, done.error.tolist(), done.finite.tolist(), strict=True)
        for one, (row, error, is_finite) in zip(done.label, facts, strict=True):
            new = NewRow(
                key=one.item.key, view=one.view, payload=row.data, time_s=one.time_s, error=error
            )
            one.item.rows.append(new)
            if not is_finite:
                self._fail(one.item, f"{self.space.spec.name}: the features hold NaN or Inf")

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

    def _report(self) -> bool:
        """Report once a second. Return False when the job stops. Raise StaleJobError, or a writer's error."""
        self._writer.check()
        now = time.monotonic()
        if self._running and now - self._reported_s > REPORT_EVERY_S:
            self._reported_s = now
            self._lease.fence()
            self._running = self._coordinator.report(self._number, self.timings())
        return self._running

    def _take_done(self) -> list[Outcome]:
        return [self._done.popleft() for _ in range(len(self._done))]
