"""The steps of one encode job. `encode.run` calls them in order while it holds the driver's lock.

job = Job(root, counter, codec="int8", config=config)      # loads the encoder
plan = job.plan()                                          # compares ledger and space
job.show(plan)                                             # prints what it costs
job.open_space(plan)
job.run(layout, lock.token, interrupts, timeout_s=120.0)
exit_code = job.close(seconds, interrupts)                 # prints what became of it
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from cache.format.space_info import SHARD_BYTES, new_info
from cache.format.spec import ARRAYS
from cache.store.index_file import save_index
from cache.store.ledger import MediaRows
from cache.store.paths import CacheRoot
from cache.store.space import Present, Space, fitting_info
from configs import UserError
from configs.command_line import CommandLine
from configs.console import SPARE_BYTES, free_bytes
from configs.signals import Interrupts
from encode.driver.cluster import remove_stale
from encode.driver.inline import run_inline
from encode.driver.nodes import Layouts, NodeLayouts, OneMachine
from encode.driver.progress import (
    OnProgress,
    Progress,
    closing_line,
    failure_line,
    note_line,
    stage_line,
)
from encode.driver.resources import (
    DECODE_APART_S,
    MEASURE_BATCHES,
    WorkerLayout,
    measure_speed,
    starts_ray,
)
from encode.driver.totals import Totals
from encode.driver.tracker import Ledger, Tracker
from encode.plan.estimate import (
    DECODERS_START_S,
    RAY_START_S,
    Estimate,
    describe,
    estimate,
    expected_rows,
)
from encode.plan.fits import check_fits, table
from encode.plan.media import MediaCounter
from encode.plan.plan import Plan, make_plan
from encode.plan.probe import PROBED, Probe, probe
from encode.worker.config import WorkerConfig
from encode.worker.decode_log import clear_decode_log
from encode.worker.decoders import niceness
from encode.worker.messages import Registrar, Timings
from encode.worker.worker import Worker

log = logging.getLogger(__name__)

COMMAND = CommandLine("python -m encode.run", ())
"""The command that is suggested, if the user's is not known."""

FEW_VIDEOS = 20
"""Videos of unknown length that are not probed: the job then needs the disk for most frames of each."""

SOURCES_A_PROBE, LEAST_PROBED = 50, 20
"""Sources of a job for each that is probed before, and the fewest that are: a small job does little twice,
and downloads no URL twice."""


class Job:
    """One encode job."""

    def __init__(
        self,
        root: CacheRoot,
        counter: MediaCounter,
        *,
        codec: str,
        container: str = "zarr",
        config: WorkerConfig,
        worker_class: type[Worker] = Worker,
        on_cluster: bool = False,
    ):
        """Load the encoder, since a hash of its weights is part of the space's name.

        Args:
            root: the cache.
            counter: the media of all data sets of the job.
            codec: how rows are stored: fp16, int8 or int4.
            container: the format of the shards: zarr or webdataset.
            config: how workers are made.
            worker_class: the class that encodes, inline or in an actor.
            on_cluster: whether the workers are on the nodes of a cluster. This process then encodes nothing,
                and may be on a machine without a GPU.
        """
        self._root, self._counter, self._config = root, counter, config
        self._worker_class = worker_class
        self._on_cluster = on_cluster
        self._encoder = (replace(config, device="cpu") if on_cluster else config).load()
        self.spec = replace(self._encoder.spec(codec), container=container)
        self._tail: bytes | None = None
        if config.encoder.tail:
            # transformers, which it imports, is slow to import and only this needs it.
            from model.vision.tail_blocks import make_tail

            tail, self._tail = make_tail(
                config.encoder,
                self.spec,
                random_weights=config.random_weights,
                weights=config.weights,
            )
            self.spec = replace(self.spec, tail=tail)
        self.device_type = self._encoder.device.type
        self._load_info = self._encoder.load_info()
        self.paths = root.space(self.spec.name)
        self._present = Present()
        self._timings: Timings | None = None
        self._totals = Totals()
        self._found = Probe()
        self._work_s = 0.0

    def plan(self, *, rehash: bool = False, retry_failed: bool = False) -> Plan:
        """Return what is to do. Hold the driver's lock if the job will run, so that nothing changes."""
        max_frames = self._config.max_frames
        if (space := self._existing_space()) is not None:
            self._present = Present.of(space, max_frames=max_frames)
        self._plan = make_plan(
            self._counter.media,
            MediaRows(self._root),
            self._present,
            space=self.spec.name,
            max_frames=max_frames,
            rehash=rehash,
            retry_failed=retry_failed,
        )
        return self._plan

    def _existing_space(self) -> Space | None:
        """Return the space, even if its space.json is lost; None if it does not exist yet."""
        if self.paths.space_json.exists():
            return Space.open(self.paths)
        if not self.paths.has_commits:
            return None
        info = new_info(self.spec, self._load_info, SHARD_BYTES)
        return Space(self.paths, fitting_info(self.paths, info))

    def show(
        self,
        plan: Plan,
        *,
        always_measure: bool = False,
        command: CommandLine = COMMAND,
        workers: int | Literal["auto"] = 0,
        datasets: int = 1,
        spent_s: float = 0.0,
    ) -> float:
        """Print the plan; return the estimated seconds of work, 0 if the job is too small to be measured.

        Args:
            plan: what is to do.
            always_measure: whether a small job is measured, too.
            command: the user's, to print another one if the disk cannot hold the features.
            workers: option --workers.
            datasets: number of data sets.
            spent_s: seconds since the command started.

        Raises:
            UserError: the disk cannot hold it. A table of what would fit is printed before.
        """
        part = self._counter.part
        if part.number:
            print(f"part     {part.number + 1} of {part.parts}: {len(plan.todo)} to do", flush=True)
            return self._work_s
        costs = self._estimate(plan, always_measure, spent_s)
        if costs is not None:
            self._work_s = part.parts * costs.work_s
            start_s = costs.start_s + starts_ray(workers, self._work_s) * RAY_START_S
            if self._work_s >= DECODE_APART_S:
                start_s += DECODERS_START_S / self._found.share
            costs = replace(costs, start_s=start_s)
        free = free_bytes(self._root.path)
        samples, max_frames = self._counter.samples, self._config.max_frames
        spec, parts = self.spec, part.parts
        print(describe(plan, spec, samples=samples, free=free, costs=costs, parts=parts))
        try:
            check_fits(
                plan,
                spec,
                free,
                command=command,
                samples=samples,
                max_frames=max_frames,
                datasets=datasets,
                found=self._found,
                parts=parts,
            )
        except UserError:
            if free > SPARE_BYTES:  # else nothing fits
                rows = expected_rows(plan, self._found, max_frames)
                rows = {array: parts * number for array, number in rows.items()}
                print(table(rows, spec, free), flush=True)
            raise
        sys.stdout.flush()
        return self._work_s

    def _estimate(self, plan: Plan, always_measure: bool, spent_s: float) -> Estimate | None:
        """Measure what the job will cost; None if it is too small for that."""
        small = plan.rows <= MEASURE_BATCHES * self.spec.batch_size
        few = len(plan.todo) <= PROBED and plan.untimed <= FEW_VIDEOS
        if not plan.todo or (small and not always_measure):
            return None
        start = time.monotonic()
        speed = None  # also on a cluster: this machine's says nothing about the nodes'
        if not self._on_cluster:
            speed = measure_speed(self._encoder, self.spec, self._encoder.device)
        measured = time.monotonic()
        if always_measure or not few:
            self._found = self._probe(plan, whole=always_measure)
        # Of a job that does not measure or probe for itself, this is no part.
        spent_s += (not small) * (measured - start) + (not few) * (time.monotonic() - measured)
        if speed is None:
            return None
        return estimate(
            plan,
            self.spec,
            speed,
            self._found,
            max_frames=self._config.max_frames,
            download=self._config.download,
            start_s=spent_s,
        )

    def _probe(self, plan: Plan, *, whole: bool) -> Probe:
        """Probe some sources: PROBED for a plan alone, else a fiftieth, which costs the job little.

        Videos of unknown length are probed as for a plan: whether the disk holds the job depends on them.
        """
        count = max(LEAST_PROBED, len(plan.todo) // SOURCES_A_PROBE)
        if whole or plan.untimed:
            count = PROBED
        try:
            return probe(
                plan,
                self.spec,
                max_frames=self._config.max_frames,
                download=self._config.download,
                media_store=self._config.media_store,
                count=min(PROBED, count),
                urls=PROBED if whole else plan.downloads // SOURCES_A_PROBE,
                nice=niceness(self.device_type),
            )
        except OSError as error:
            log.warning("the sources are not probed: %s", error)
            return Probe()

    def open_space(self, plan: Plan) -> None:
        """Create the space if it is new, complete what a crash left, and record the missing files."""
        self._space = Space.create(self._root, self.spec, self._load_info, tail=self._tail)
        self._grow()
        for entry in clear_decode_log(self.paths):
            log.warning("an earlier job ended while it decoded %s", entry.source)
        self._ledger = Ledger(self._root, secrets.token_hex(4))
        for record in itertools.chain(plan.missing, plan.recognised):
            self._ledger.add(record)
        self._ledger.flush()
        self._tracker = Tracker(plan.todo, present=self._present.images, on_record=self._ledger.add)

    def run(
        self,
        layout: WorkerLayout | NodeLayouts,
        token: str,
        interrupts: Interrupts,
        *,
        timeout_s: float,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Encode what is to do.

        Args:
            layout: the workers, of this machine or of the cluster that this process is connected to.
            token: of the driver's lock.
            interrupts: says when to stop.
            timeout_s: seconds without progress after which a file that is being decoded counts as hanging.
            on_progress: gets the progress, which is printed otherwise.

        Raises:
            UserError, CacheError: the job cannot go on. All encoded rows are committed.
        """
        self._config = replace(
            self._config,
            space=self.paths.root,
            token=token,
            timeout_s=timeout_s,
            compiled=self._plan.compiles,
        )
        try:
            part = self._counter.part
            what = f"encode part {part.number + 1}/{part.parts}" if part.parts > 1 else "encode"
            progress = Progress(self._tracker, what=what, on_progress=on_progress)
            with progress as self._progress:
                if isinstance(layout, NodeLayouts):
                    self._run_ray(layout, interrupts, timeout_s, folders=self._shared_folders())
                elif layout.workers == 0:
                    self._run_inline(layout, interrupts)
                else:
                    from encode.driver.ray_pool import session

                    with session(layout.workers, layout.workers * layout.gpus):
                        self._run_ray(OneMachine(layout), interrupts, timeout_s)
        finally:
            self._ledger.flush()
            self._grow()
        if not interrupts.stopping():
            assert self._tracker.finished(), "a source is not settled"

    def _run_inline(self, layout: WorkerLayout, interrupts: Interrupts) -> None:
        numbers = {array: self._space.next_shard(array) for array in ARRAYS}
        registrar = Registrar(self._present.images, numbers, self._update)
        config = layout.apply(self._config)
        worker = self._worker_class(config, self._encoder, registrar, number=0)
        with contextlib.closing(worker):
            run_inline(self._tracker, worker, registrar, interrupts.stopping)

    def _run_ray(
        self,
        layouts: Layouts,
        interrupts: Interrupts,
        timeout_s: float,
        *,
        folders: Sequence[Path] | None = None,
    ) -> None:
        # Imported here, since importing Ray takes a second.
        from encode.driver.pool import WorkerPool
        from encode.driver.ray_pool import RayBackend

        if hasattr(self, "_encoder"):  # each worker loads its own, in later parts of the job too
            del self._encoder
        gc.collect()
        torch.cuda.empty_cache()  # does nothing if CUDA was not used
        interrupts.install()
        pool = WorkerPool(
            self._tracker,
            self._space,
            self._config,
            layouts,
            RayBackend(self.paths),
            timeout_s=timeout_s,
            worker_class=self._worker_class,
            folders=folders,
        )
        pool.run(interrupts.stopping, self._update, self._progress.update_nodes)

    def _shared_folders(self) -> list[Path]:
        """Return the folders that all nodes of a cluster must share."""
        remove_stale(self.paths.locks_dir)
        folders = [self.paths.locks_dir]
        if (store := self._config.media_store) is not None:
            store.mkdir(parents=True, exist_ok=True)
            folders.append(store)
        return folders

    def _update(self, timings: Timings) -> None:
        self._timings = timings
        self._progress.update(timings)

    def _grow(self) -> None:
        """Make the array files of other tools cover all committed rows."""
        for array in ARRAYS:
            self._space.grow(array)

    def take(self, counter: MediaCounter) -> None:
        """Go on with another part of the media; what became of the one before is counted."""
        if counter is not self._counter:
            self._end_part()
            self._counter = counter

    def _end_part(self) -> None:
        self._totals.add(self._plan, self._tracker, self._timings)
        self._timings = None

    def close(self, seconds: float, interrupts: Interrupts, *, again: str = "encode.run") -> int:
        """Save the index, print the result; return the exit code.

        Args:
            seconds: since the command started.
            interrupts: whether the job was told to stop.
            again: the command line that goes on after an interruption.
        """
        try:
            save_index(self.paths, self._space.info)
        except OSError as error:
            log.warning(
                "the index could not be saved, so opening the space takes longer: %s", error
            )
        self._end_part()
        done = self._totals
        if interrupts.stopping():
            parts = self._counter.part.parts
            of_part = f" of part {self._counter.part.number + 1} of {parts}" if parts > 1 else ""
            print(
                f"interrupted: {done.encoded} encoded and kept, {done.left} left{of_part}; go on: {again}"
            )
            return interrupts.exit_code
        if done.timings is not None:
            print(stage_line(done.timings))
        if done.failures:
            print(failure_line(done.failures, str(self._root.path)))
        if done.notes:
            print(note_line(done.notes, str(self._root.path)))
        print(
            closing_line(
                encoded=done.encoded,
                reused=done.reused,
                failed=done.failed,
                seconds=seconds,
                timings=done.timings,
            )
        )
        return 0
