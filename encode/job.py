"""One encode job, step by step: `encode.run` calls these in order, and holds the lock meanwhile."""

from __future__ import annotations

import contextlib
import gc
import logging
import secrets
import sys
from dataclasses import replace

import torch

from cache.format.space_info import SHARD_BYTES, new_info
from cache.format.spec import ARRAYS
from cache.store.index_file import save_index
from cache.store.ledger import read_media
from cache.store.paths import CacheRoot
from cache.store.references import Present
from cache.store.space import Space, fitting_info
from configs import UserError
from configs.console import free_bytes
from encode.download.config import DownloadConfig
from encode.driver.inline import run_inline
from encode.driver.progress import Progress, closing_line, failure_line, stage_line
from encode.driver.resources import MEASURE_BATCHES, WorkerLayout, measure_speed
from encode.driver.signals import Interrupts
from encode.driver.tracker import Ledger, Tracker
from encode.estimate import check_fits, describe, table
from encode.plan import MediaCounter, Plan, make_plan
from encode.worker.config import WorkerConfig
from encode.worker.decode_log import clear_decode_log
from encode.worker.messages import Registrar, Timings
from encode.worker.worker import Worker

log = logging.getLogger(__name__)


def share(rules: DownloadConfig, workers: int) -> DownloadConfig:
    """One worker's part of what all of them may do at a time."""
    return replace(
        rules,
        connections=max(1, rules.connections // workers),
        per_host=max(1, rules.per_host // workers),
        budget_bytes=max(rules.max_bytes, rules.budget_bytes // workers),
    )


class Job:
    """See above."""

    def __init__(
        self,
        root: CacheRoot,
        counter: MediaCounter,
        *,
        codec: str,
        container: str = "zarr",
        config: WorkerConfig,
        worker_class: type[Worker] = Worker,
    ):
        """Load the encoder: its weights are part of the space's name.

        Args:
            root: the cache.
            counter: the media of all data sets asked for.
            codec: how rows are stored.
            container: the on-disk format of a new space: `zarr` or `webdataset`.
            config: how workers are made.
            worker_class: what does the work, inline or in an actor.
        """
        self._root, self._counter, self._config = root, counter, config
        self._worker_class = worker_class
        self._encoder = config.load()
        self.spec = replace(self._encoder.spec(codec), container=container)
        self.device_type = self._encoder.device.type
        self.paths = root.space(self.spec.name)
        self._present = Present()
        self._timings: Timings | None = None

    def plan(self, *, rehash: bool = False, retry_failed: bool = False) -> Plan:
        """What is to do. For a job that shall run: with the lock held, so that it stays true."""
        most = self._config.max_frames
        if (space := self._space_there()) is not None:
            self._present = Present.of(space, max_frames=most)
        return make_plan(
            self._counter.media,
            read_media(self._root),
            self._present,
            space=self.spec.name,
            max_frames=most,
            rehash=rehash,
            retry_failed=retry_failed,
        )

    def _space_there(self) -> Space | None:
        """The space as it is, also when only its space.json was lost; None when there is none yet."""
        if self.paths.space_json.exists():
            return Space.open(self.paths)
        if not self.paths.has_commits:
            return None
        info = new_info(self.spec, self._encoder.load_info(), SHARD_BYTES)
        return Space(self.paths, fitting_info(self.paths, info))

    def show(self, plan: Plan, *, always_measure: bool = False) -> float:
        """Print the plan; returns how many seconds it will take, about (0: not worth measuring).

        Raises:
            UserError: the disk cannot hold it; the table of what it could is printed before.
        """
        speed = None
        if plan.todo and (always_measure or plan.rows > MEASURE_BATCHES * self.spec.batch_size):
            speed = measure_speed(self._encoder, self.spec, str(self._encoder.device))
        free = free_bytes(self._root.path)
        print(describe(plan, self.spec, samples=self._counter.samples, free=free, speed=speed))
        try:
            check_fits(plan, self.spec, free)
        except UserError:
            print(table(plan, self.spec, free), flush=True)
            raise
        sys.stdout.flush()
        return speed.seconds(plan.rows) if speed else 0.0

    def open_space(self, plan: Plan) -> None:
        """Make the space if it is new, put right what a crash left, and enter what is missing."""
        self._space = Space.create(self._root, self.spec, self._encoder.load_info())
        self._grow()
        for entry in clear_decode_log(self.paths):
            log.warning("an earlier job ended while it decoded %s", entry.source)
        self._ledger = Ledger(self._root, secrets.token_hex(4))
        for record in (*plan.missing, *plan.recognised):
            self._ledger.add(record)
        self._ledger.flush()
        self._tracker = Tracker(plan.todo, present=self._present.images, on_record=self._ledger.add)

    def run(
        self, layout: WorkerLayout, token: str, interrupts: Interrupts, *, timeout_s: float
    ) -> None:
        """Encode what is to do.

        Raises:
            UserError: the job cannot go on; what is encoded is kept.
        """
        self._config = replace(
            self._config,
            space=self.paths.root,
            token=token,
            threads=layout.threads,
            torch_threads=layout.torch_threads,
            download=share(self._config.download, max(1, layout.workers)),
        )
        self._progress = Progress(self._tracker)
        try:
            if layout.workers == 0:
                self._run_inline(interrupts)
            else:
                self._run_ray(layout, interrupts, timeout_s)
        finally:
            self._progress.clear()
            self._keep()
        if not interrupts.stopping():
            assert self._tracker.finished(), "a source is not accounted for"

    def _run_inline(self, interrupts: Interrupts) -> None:
        numbers = {kind: self._space.next_shard(kind) for kind in ARRAYS}
        registrar = Registrar(self._present.images, numbers, self._update)
        worker = self._worker_class(self._config, self._encoder, registrar, number=0)
        with contextlib.closing(worker):
            run_inline(self._tracker, worker, registrar, interrupts.stopping)

    def _run_ray(self, layout: WorkerLayout, interrupts: Interrupts, timeout_s: float) -> None:
        # Ray takes a second to import, and the workers load encoders of their own.
        from encode.driver import ray_pool

        del self._encoder
        gc.collect()
        torch.cuda.empty_cache()  # does nothing where CUDA was never used
        with ray_pool.session(layout.workers, layout.workers * layout.gpus):
            interrupts.install()
            workers = ray_pool.RayPool(
                self._tracker,
                self._space,
                self._config,
                workers=layout.workers,
                gpus=layout.gpus,
                timeout_s=timeout_s,
                worker_class=self._worker_class,
            )
            workers.run(interrupts.stopping, self._update)

    def _update(self, timings: Timings) -> None:
        self._timings = timings
        self._progress.update(timings)

    def _keep(self) -> None:
        """Enter what is final into the ledger, and let zarr.json cover it."""
        self._ledger.flush()
        self._grow()

    def _grow(self) -> None:
        for kind in ARRAYS:
            self._space.grow(kind)

    def _save_index(self) -> None:
        """What makes the space open fast."""
        try:
            save_index(self.paths, self._space.info)
        except OSError as error:
            log.warning("no index was saved, so opening takes longer: %s", error)

    def close(self, plan: Plan, seconds: float, interrupts: Interrupts) -> int:
        """Print what became of it; returns the exit code."""
        self._save_index()
        tracker = self._tracker
        if interrupts.stopping():
            left = tracker.total - tracker.settled
            print(
                f"interrupted: {tracker.encoded} encoded and kept, {left} left; run the same command again"
            )
            return interrupts.exit_code
        failures = dict(tracker.failures)
        if plan.missing:
            failures["fetch"] = failures.get("fetch", 0) + len(plan.missing)
        if self._timings is not None:
            print(stage_line(self._timings))
        if failures:
            print(failure_line(failures, str(self._root.path)))
        print(
            closing_line(
                encoded=tracker.encoded,
                reused=plan.reused + tracker.reused,
                failed=plan.known_failures + len(plan.missing) + tracker.failed,
                seconds=seconds,
                timings=self._timings,
            )
        )
        return 0
