"""The coat: workers in processes of their own, by Ray. Nothing else in the project imports ray.

One actor a GPU, or several on the CPU, around `encode.worker.Worker`; a small one around the Registrar.
Tasks and outcomes travel through Ray, features never do. An actor that dies or hangs is replaced: its
commits are believed, the rest of its sources is done again; what it was decoding is tried alone first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from cache.errors import CacheError
from cache.format.spec import ARRAY_OF, ARRAYS
from cache.store.locks import wait_gone
from cache.store.paths import SpacePaths
from cache.store.references import Present
from cache.store.space import Space
from configs import UserError
from encode.driver.culprits import Culprits, rejection
from encode.driver.tracker import TooManyFailuresError, Tracker
from encode.worker.config import WorkerConfig
from encode.worker.decode_log import decode_log_file, read_entries
from encode.worker.messages import Outcome, Registrar, SourceTask, Timings, media_id
from encode.worker.worker import Worker

log = logging.getLogger(__name__)

POLL_S = 0.5
IN_FLIGHT = 2
"""Calls waiting at an actor: it never stands still between two of them."""
TASK_SOURCES = 32
"""Sources in one call, at most; fewer when there are few, so that all actors end at about one time."""
GONE_S = 60.0
STOP_S = 120.0
CLOSE_S = 5.0
OBJECT_STORE_BYTES = 96 << 20  # Ray's least is 75 MiB; only tasks and outcomes go through it
SOCKET_PATH_BYTES = 40  # Ray adds about 60 to its folder, and the kernel allows 107


class RemoteWorker:
    """A Worker, made inside the actor's process."""

    def start(
        self, config: WorkerConfig, number: int, coordinator: Any, kind: type[Worker]
    ) -> None:
        """Load the encoder and take the lease."""
        self._worker = kind(config, config.load(), _RemoteCoordinator(coordinator), number=number)

    def run(self, tasks: Sequence[SourceTask]) -> list[Outcome]:
        """See Worker."""
        return self._worker.run(tasks)

    def flush(self) -> list[Outcome]:
        """See Worker."""
        return self._worker.flush()

    def close(self) -> None:
        """See Worker."""
        self._worker.close()


class SpaceRegistrar(Registrar):
    """The registrar of a space; reads for itself what is committed there."""

    def __init__(self, paths: SpacePaths):
        space = Space.open(paths)
        super().__init__(Present.of(space).images, {k: space.next_shard(k) for k in ARRAYS})


class _RemoteCoordinator:
    """The registrar's actor, as a worker sees it."""

    def __init__(self, actor: Any):
        self._actor = actor

    def reserve(self, worker: int, keys: Sequence[str]) -> list[bool]:
        return ray.get(self._actor.reserve.remote(worker, keys))

    def next_shard(self, worker: int, kind: str) -> int:
        return ray.get(self._actor.next_shard.remote(worker, kind))

    def report(self, worker: int, timings: Timings) -> bool:
        return ray.get(self._actor.report.remote(worker, timings))


@dataclass(kw_only=True)
class _Slot:
    """One actor and what it is doing."""

    number: int
    actor: Any
    calls: list[Any] = field(default_factory=list)
    trials: deque[SourceTask] = field(
        default_factory=deque
    )  # culprits, for this actor to try alone
    trying: SourceTask | None = None


@contextlib.contextmanager
def session(cpus: int, gpus: int) -> Iterator[None]:
    """A Ray of our own on this machine, quiet, without dashboard or network, gone afterwards.

    Within another session: that one.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would ask the network
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a warning a start
    base = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="nm2-", dir=base if len(base) < SOCKET_PATH_BYTES else "/tmp")  # noqa: S108
    try:
        ray.init(
            num_cpus=cpus,
            num_gpus=gpus,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=folder,
        )
        # A dead worker is our own news; Ray would print a paragraph about each to stdout.
        ray._private.worker._worker_logs_enabled = False
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


class RayPool:
    """One job's actors, from the first call to the last outcome. For use inside `session`."""

    def __init__(
        self,
        tracker: Tracker,
        space: Space,
        config: WorkerConfig,
        *,
        workers: int,
        gpus: int,
        timeout_s: float,
        worker_class: type[Worker] = Worker,
    ):
        """Start the actors; their encoders load meanwhile.

        Args:
            tracker: what is to do.
            space: where rows go.
            config: how a worker is made.
            workers: how many.
            gpus: GPUs each of them has to itself, 0 or 1.
            timeout_s: a media that takes longer to decode hangs.
            worker_class: what runs in the actors.
        """
        self._tracker, self._space, self._config = tracker, space, config
        self._gpus, self._timeout_s, self._worker_class = gpus, timeout_s, worker_class
        self._numbers = iter(range(1, 1 << 62))
        self._culprits = Culprits()
        self._task_sources = max(1, min(TASK_SOURCES, tracker.total // (8 * workers)))
        self._looked = 0.0
        self._registrar = ray.remote(SpaceRegistrar).options(num_cpus=0).remote(space.paths)
        self._slots = [self._new_slot() for _ in range(workers)]

    def run(self, stopping: Callable[[], bool], progress: Callable[[Timings], None]) -> None:
        """Until every source is accounted for, or `stopping` says so; then what is encoded is kept.

        Raises:
            UserError: the job cannot go on; what is encoded is kept too.
        """
        try:
            while not self._tracker.finished() and not stopping():
                for slot in self._slots:
                    self._feed(slot)
                self._collect(POLL_S)
                if time.monotonic() - self._looked > POLL_S:
                    self._looked = time.monotonic()
                    self._replace_hung()
                    progress(self.timings())
        except (UserError, CacheError):
            with contextlib.suppress(UserError, CacheError):  # the first one says why
                self._stop()
            raise
        else:
            if not self._tracker.finished():
                self._stop()
            progress(self.timings())
        finally:
            self._end()

    def timings(self) -> Timings:
        """All workers together."""
        return self._ask(self._registrar.timings.remote())

    # ---- actors and their calls

    def _new_slot(self) -> _Slot:
        number = next(self._numbers)
        actor = (
            ray.remote(RemoteWorker)
            .options(num_cpus=1, num_gpus=self._gpus, max_restarts=0, max_task_retries=0)
            .remote()
        )
        start = actor.start.remote(self._config, number, self._registrar, self._worker_class)
        return _Slot(number=number, actor=actor, calls=[start])

    def _feed(self, slot: _Slot) -> None:
        """Give an actor enough to do; one with culprits tries them first, one at a time."""
        if slot.trials or slot.trying:
            if not slot.calls and not self._tracker.held(slot.number):
                slot.trying = slot.trials.popleft() if slot.trials else None
                if slot.trying is not None:
                    self._tracker.give(slot.number, [slot.trying])
                    slot.calls += [slot.actor.run.remote([slot.trying]), slot.actor.flush.remote()]
                    return
            else:
                return
        while len(slot.calls) < IN_FLIGHT:
            tasks = self._tracker.take(slot.number, self._task_sources)
            if not tasks:
                break
            slot.calls.append(slot.actor.run.remote(tasks))
        if not slot.calls and self._tracker.held(slot.number):
            slot.calls.append(slot.actor.flush.remote())

    def _collect(self, timeout_s: float) -> None:
        """Settle what actors have answered; replace those that cannot any more."""
        calls = [call for slot in self._slots for call in slot.calls]
        assert calls, "sources are left, and nobody has anything to do"
        ray.wait(calls, num_returns=1, timeout=timeout_s)
        ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        for slot in list(self._slots):
            while slot.calls and slot.calls[0] in ready:
                call = slot.calls.pop(0)
                try:
                    outcomes = ray.get(call)
                except RayTaskError as error:
                    self._refuse(error)
                except RayError as error:
                    self._lose(slot, str(error).split("\n")[0], hung=False)
                    break
                else:
                    self._tracker.settle(slot.number, outcomes or [])

    def _refuse(self, error: RayTaskError) -> None:
        """An exception of the worker's own code ends the job, as it would inline."""
        if isinstance(error.cause, RayError):
            self.timings()  # says it if the registrar is gone
        if isinstance(error.cause, Exception):
            raise error.cause
        raise error

    def _ask(self, call: Any) -> Any:
        try:
            return ray.get(call)
        except RayActorError as error:
            raise UserError(
                f"the process that keeps the job's claims is gone ({str(error).splitlines()[0]}); "
                "everything committed is kept: run the same command again"
            ) from None

    # ---- actors that die or hang

    def _replace_hung(self) -> None:
        paths = self._space.paths
        for slot in list(self._slots):
            entries = read_entries(decode_log_file(paths, slot.number))
            if any(entry.age_s > self._timeout_s for entry in entries):
                self._lose(slot, f"no progress for {self._timeout_s:.0f} s", hung=True)

    def _lose(self, slot: _Slot, why: str, *, hung: bool) -> None:
        """Make sure a worker is gone, take back what it owed, and put another in its place."""
        paths, tracker = self._space.paths, self._tracker
        ray.kill(slot.actor)
        if not wait_gone(paths, str(slot.number), GONE_S):
            raise UserError(
                f"worker {slot.number} can neither go on nor be ended; everything committed is kept: "
                "end its process and run the same command again"
            )
        entries = read_entries(decode_log_file(paths, slot.number))
        if hung:
            entries = [entry for entry in entries if entry.age_s > self._timeout_s]
        culprits = tracker.set_aside(slot.number, [entry.source for entry in entries])
        committed = self._committed_by(slot.number)
        released = self._ask(self._registrar.release.remote(slot.number, committed))
        # Repeats of a suspect's bytes wait for its trial.
        on_trial = {media_id(kind, entry.key) for entry in entries for kind in ARRAY_OF}
        tracker.lost(slot.number, committed, set(released) - on_trial)
        log.warning(
            "worker %d: %s; decoding: %s", slot.number, why, ", ".join(t.source for t in culprits)
        )
        guilty, again = self._culprits.judge(culprits, slot.trying, hung=hung)
        keys = {entry.source: entry.key for entry in entries}
        for task in guilty:
            tracker.fail(rejection(task, keys[task.source], hung=hung))
        new = self._new_slot()
        new.trials.extend([*again, *slot.trials])
        self._slots[self._slots.index(slot)] = new
        self._culprits.count(tracker.settled, why)

    def _committed_by(self, number: int) -> set[str]:
        shards = self._ask(self._registrar.shards.remote(number))
        # Of a video some rows may be missing still: whoever gets it next will see which.
        images = [shard for kind, shard in shards if kind == ARRAY_OF["image"]]
        return {key for shard in images for key, _ in self._space.shard_keys("image", shard)}

    def _end(self) -> None:
        """End every process of this job."""
        closing = [slot.actor.close.remote() for slot in self._slots if not slot.calls]
        ray.wait(closing, num_returns=len(closing), timeout=CLOSE_S) if closing else None
        for actor in (*(slot.actor for slot in self._slots), self._registrar):
            ray.kill(actor)

    def _stop(self) -> None:
        """Let every worker commit what it has encoded, and settle that."""
        self._ask(self._registrar.stop.remote())
        flushes = {slot.actor.flush.remote(): slot for slot in self._slots}
        for slot in self._slots:
            slot.calls += [call for call, owner in flushes.items() if owner is slot]
        deadline = time.monotonic() + STOP_S
        while any(slot.calls for slot in self._slots) and time.monotonic() < deadline:
            for slot in self._slots:
                self._collect_last(slot)

    def _collect_last(self, slot: _Slot) -> None:
        if not slot.calls:
            return
        ready, _ = ray.wait(slot.calls[:1], timeout=POLL_S)
        if not ready:
            return
        call = slot.calls.pop(0)
        try:
            outcomes = ray.get(call)
        except RayError:  # it died or was refused: its commits will be found by the next job
            slot.calls.clear()
            return
        with contextlib.suppress(TooManyFailuresError):  # it is written down all the same
            self._tracker.settle(slot.number, outcomes or [])
