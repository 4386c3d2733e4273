"""Run workers as Ray actors. No other file of the project imports Ray.

Each GPU has one actor with an `encode.worker.worker.Worker`; a CPU may have several. One more actor is the
Registrar. Tasks and outcomes are sent through Ray, features never are. An actor that crashes or hangs is
replaced: what it has committed counts, its other sources are assigned again, and the files it was decoding
are retried alone first.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from cache.errors import CacheError
from cache.format.spec import ARRAY_OF, ARRAYS
from cache.store.locks import wait_for_exit
from cache.store.paths import SpacePaths
from cache.store.space import Present, Space
from configs import UserError, one_line
from encode.driver.culprits import Culprits, rejection
from encode.driver.progress import NodeProgress
from encode.driver.ray_session import LOOPBACK, private_folder, ray_environment
from encode.driver.tracker import Tracker
from encode.errors import TooManyFailuresError
from encode.worker.config import WorkerConfig
from encode.worker.decode_log import decode_log_file, read_entries
from encode.worker.messages import Outcome, Registrar, SourceTask, Timings, media_id

if TYPE_CHECKING:
    # The registrar's process imports this file, and needs no torch: 2 s and 470 MB less.
    from encode.driver.resources import WorkerLayout
    from encode.worker.worker import Worker

log = logging.getLogger(__name__)

POLL_S = 0.5
"""Seconds between two looks for hung workers and for a stop."""

IN_FLIGHT = 2
"""Calls queued at an actor, so that it has the next one when it finishes the first."""

TASK_SOURCES = 32
"""Sources in one call, at most. Small jobs use fewer, so that all actors finish at about the same time."""

GONE_S = 60.0
"""Seconds that a killed worker may take to release its lock."""

STOP_S = 120.0
"""Seconds that all workers together may take to commit what they have encoded, when the job stops."""

CLOSE_S = 5.0
"""Seconds that all workers together may take to end their threads, before they are killed."""

OBJECT_STORE_BYTES = 96 << 20
"""Ray requires 75 MiB. It holds only tasks and outcomes."""

OTHER_RAY = "install another one: pip install 'ray==2.60.0', or encode without Ray: --workers 0"


class RemoteWorker:
    """A Worker that is created inside the actor's process. Its methods are those of Worker."""

    def start(
        self, config: WorkerConfig, number: int, registrar: Any, worker_class: type[Worker]
    ) -> None:
        """Load the encoder and take the lease."""
        coordinator = _RemoteCoordinator(registrar)
        self._worker = worker_class(config, config.load(), coordinator, number=number)

    def run(self, tasks: Sequence[SourceTask]) -> list[Outcome]:
        """Start `tasks`; return the outcomes known so far."""
        return self._worker.run(tasks)

    def flush(self) -> list[Outcome]:
        """Encode and commit all started tasks; return their outcomes."""
        return self._worker.flush()

    def close(self) -> None:
        """End the worker's threads and release its lease."""
        self._worker.close()


class SpaceRegistrar(Registrar):
    """A Registrar that reads what is committed from the space itself, in its own process."""

    def __init__(self, paths: SpacePaths):
        space = Space.open(paths)
        super().__init__(Present.of(space).images, {a: space.next_shard(a) for a in ARRAYS})


class _RemoteCoordinator:
    """The Coordinator of a worker in another process: calls the registrar's actor."""

    def __init__(self, actor: Any):
        self._actor = actor

    def reserve(self, worker: int, ids: Sequence[str]) -> list[bool]:
        return ray.get(self._actor.reserve.remote(worker, ids))

    def next_shard(self, worker: int, array: str) -> int:
        return ray.get(self._actor.next_shard.remote(worker, array))

    def report(self, worker: int, timings: Timings) -> bool:
        return ray.get(self._actor.report.remote(worker, timings))


@dataclass(kw_only=True)
class _Slot:
    """One actor and its work."""

    number: int
    """Number of its worker."""
    actor: Any
    calls: list[Any] = field(default_factory=list)
    """Its unfinished calls, in order."""
    to_retry: deque[SourceTask] = field(default_factory=deque)
    """Files that may have crashed a worker, for this one to retry alone."""
    alone: SourceTask | None = None
    """The file it is retrying alone."""


@contextlib.contextmanager
def session(cpus: int, gpus: int) -> Iterator[None]:
    """Start a Ray of this process alone, and end it afterwards. If Ray is running already, use it.

    Its ports are on the loopback address and require a token, and nobody else can enter its folder.

    Raises:
        UserError: Ray cannot be started in this way.
    """
    if ray.is_initialized():
        yield
        return
    _check_ray()
    if os.environ.get("RAY_ADDRESS"):
        log.warning("RAY_ADDRESS is not used: the job runs on this machine alone")
    with contextlib.ExitStack() as stack:
        stack.callback(_read_environment)  # for a Ray that this process may start later
        folder = stack.enter_context(private_folder())
        stack.enter_context(ray_environment(folder / "token"))
        try:
            _read_environment()
            with _no_other_address(), _one_line():
                context = ray.init(
                    "local",
                    num_cpus=cpus,
                    num_gpus=gpus,
                    include_dashboard=False,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _node_ip_address=LOOPBACK,
                    _temp_dir=str(folder / "ray"),
                )
            if context.address_info["node_ip_address"] != LOOPBACK:
                raise _unknown_ray()
            # We report dead workers ourselves; Ray would print a paragraph about each to stdout.
            ray._private.worker._worker_logs_enabled = False
            yield
        finally:
            ray.shutdown(wait_for_processes=True)


def _check_ray() -> None:
    """Raise UserError unless Ray has what `session` needs, of which no version promises to keep any."""
    parts = (
        (ray._private.services, "resolve_ip_for_localhost"),
        (ray._raylet, "Config"),
        (ray._raylet, "AuthenticationTokenLoader"),
    )
    if not all(hasattr(module, name) for module, name in parts):
        raise _unknown_ray()


@contextlib.contextmanager
def _no_other_address() -> Iterator[None]:
    """Let Ray use the loopback address, which it otherwise replaces by the machine's."""
    services = ray._private.services
    before = services.resolve_ip_for_localhost
    services.resolve_ip_for_localhost = lambda host: host
    try:
        yield
    finally:
        services.resolve_ip_for_localhost = before


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Ray raises many types, Exception itself among them
        raise UserError(
            f"Ray cannot be started ({one_line(error)}); encode without it: --workers 0"
        ) from error


def _read_environment() -> None:
    """Let Ray read its variables again. It keeps those that it has read for an earlier session."""
    ray._raylet.Config.initialize("")
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()


def _unknown_ray() -> UserError:
    return UserError(
        f"Ray {ray.__version__} cannot be kept to this machine's loopback address with a token: {OTHER_RAY}"
    )


class RayPool:
    """The actors of one job. Use it inside `session`."""

    def __init__(
        self,
        tracker: Tracker,
        space: Space,
        config: WorkerConfig,
        layout: WorkerLayout,
        *,
        timeout_s: float,
        worker_class: type[Worker],
    ):
        """Start the actors. They load their encoders in the background.

        Args:
            tracker: the job's sources.
            space: the space to write to.
            config: how a worker is made.
            layout: the number of actors, and of the GPUs that each has to itself.
            timeout_s: seconds without progress after which a file that is being decoded counts as hanging.
            worker_class: the class that runs in the actors.
        """
        self._tracker, self._space, self._config = tracker, space, config
        self._gpus, self._timeout_s, self._worker_class = layout.gpus, timeout_s, worker_class
        self._numbers = itertools.count(1)
        self._culprits = Culprits()
        self._task_sources = max(1, min(TASK_SOURCES, tracker.total // (8 * layout.workers)))
        self._checked_s = 0.0
        self._registrar = ray.remote(SpaceRegistrar).options(num_cpus=0).remote(space.paths)
        self._slots = [self._new_slot() for _ in range(layout.workers)]

    def run(
        self,
        stopping: Callable[[], bool],
        progress: Callable[[Timings], None],
        update_nodes: Callable[[Sequence[NodeProgress]], None] = lambda _: None,
    ) -> None:
        """Encode until every source is settled or `stopping` returns True. Commit all encoded rows.

        Args:
            stopping: whether to end early.
            progress: called with the timings of all workers, every `POLL_S` seconds and at the end.
            update_nodes: called before `progress`, with what each node has done.

        Raises:
            UserError: the job cannot go on. All encoded rows are committed.
        """
        try:
            while not self._tracker.finished() and not stopping():
                for slot in self._slots:
                    self._feed(slot)
                self._collect(POLL_S)
                if time.monotonic() - self._checked_s > POLL_S:
                    self._checked_s = time.monotonic()
                    self._replace_hung()
                    timings = self.timings()
                    update_nodes(self._nodes(timings))
                    progress(timings)
        except (UserError, CacheError):
            with contextlib.suppress(UserError, CacheError):  # the first error is the cause
                self._stop()
            raise
        else:
            if not self._tracker.finished():
                self._stop()
            progress(self.timings())
        finally:
            self._end()

    def timings(self) -> Timings:
        """Return the timings of all workers together."""
        return self._ask(self._registrar.timings.remote())

    def _nodes(self, timings: Timings) -> list[NodeProgress]:
        """Return what each node has done: this machine is the only one."""
        return [NodeProgress(address=LOOPBACK, workers=len(self._slots), done=timings.media)]

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
        """Keep an actor busy. One with files to retry alone does these first, one at a time."""
        if slot.to_retry or slot.alone:
            if slot.calls or self._tracker.num_assigned(slot.number):
                return
            slot.alone = slot.to_retry.popleft() if slot.to_retry else None
            if slot.alone is not None:
                self._tracker.assign(slot.number, [slot.alone])
                slot.calls += [slot.actor.run.remote([slot.alone]), slot.actor.flush.remote()]
                return
        while len(slot.calls) < IN_FLIGHT:
            tasks = self._tracker.assign_next(slot.number, self._task_sources)
            if not tasks:
                break
            slot.calls.append(slot.actor.run.remote(tasks))
        if not slot.calls and self._tracker.num_assigned(slot.number):
            slot.calls.append(slot.actor.flush.remote())

    def _collect(self, timeout_s: float) -> None:
        """Settle the finished calls, and replace actors that have died."""
        calls = [call for slot in self._slots for call in slot.calls]
        assert calls, "sources are left, and no actor has a call"
        ray.wait(calls, num_returns=1, timeout=timeout_s)
        ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        for slot in list(self._slots):
            while slot.calls and slot.calls[0] in ready:
                call = slot.calls.pop(0)
                try:
                    outcomes = ray.get(call)
                except RayTaskError as error:
                    self._raise(error)
                except RayError as error:
                    self._replace(slot, str(error).split("\n")[0], hung=False)
                    break
                else:
                    self._tracker.settle(slot.number, outcomes or [])

    def _raise(self, error: RayTaskError) -> None:
        """Raise an exception of the worker's own code, as inline. It ends the job."""
        if isinstance(error.cause, RayError):
            self.timings()  # raises a better message if the registrar's process is gone
        if isinstance(error.cause, Exception):
            raise error.cause
        raise error

    def _ask(self, call: Any) -> Any:
        try:
            return ray.get(call)
        except RayActorError as error:
            raise UserError(
                f"the process that coordinates the workers has died ({str(error).splitlines()[0]}); "
                "everything committed is kept: run the same command again"
            ) from None

    # ---- actors that crash or hang

    def _replace_hung(self) -> None:
        paths = self._space.paths
        for slot in list(self._slots):
            entries = read_entries(decode_log_file(paths, slot.number), paths.cache_root)
            if any(entry.age_s > self._timeout_s for entry in entries):
                self._replace(slot, f"no progress for {self._timeout_s:.0f} s", hung=True)

    def _replace(self, slot: _Slot, why: str, *, hung: bool) -> None:
        """Kill a worker, take its unsettled sources back, and start another one in its place."""
        paths, tracker = self._space.paths, self._tracker
        ray.kill(slot.actor)
        if not wait_for_exit(paths, str(slot.number), GONE_S):
            raise UserError(
                f"worker {slot.number} still runs {GONE_S:.0f} s after it was killed; everything committed "
                "is kept: end its process and run the same command again"
            )
        entries = read_entries(decode_log_file(paths, slot.number), paths.cache_root)
        if hung:
            entries = [entry for entry in entries if entry.age_s > self._timeout_s]
        decoding = tracker.withdraw(slot.number, [entry.source for entry in entries])
        committed = self._committed_by(slot.number)
        released = self._ask(self._registrar.release.remote(slot.number, committed))
        # Duplicates of the files that are retried alone must wait until these are settled.
        withdrawn = {media_id(kind, entry.key) for entry in entries for kind in ARRAY_OF}
        tracker.worker_died(slot.number, committed, set(released) - withdrawn)
        log.warning(
            "worker %d: %s; decoding: %s", slot.number, why, ", ".join(t.source for t in decoding)
        )
        rejected, retried = self._culprits.judge(decoding, slot.alone, hung=hung)
        keys = {entry.source: entry.key for entry in entries}
        for task in rejected:
            tracker.fail(rejection(task, keys[task.source], hung=hung))
        new = self._new_slot()
        new.to_retry.extend([*retried, *slot.to_retry])
        self._slots[self._slots.index(slot)] = new
        self._culprits.count_crash(tracker.settled, why)

    def _committed_by(self, number: int) -> set[str]:
        shards = self._ask(self._registrar.shards.remote(number))
        # Images only: a video may lack some rows, and the next worker that has it encodes just these.
        images = [shard for array, shard in shards if array == ARRAY_OF["image"]]
        return {key for shard in images for key, _ in self._space.shard_keys("image", shard)}

    def _end(self) -> None:
        """End the process of every actor."""
        closing = [slot.actor.close.remote() for slot in self._slots if not slot.calls]
        ray.wait(closing, num_returns=len(closing), timeout=CLOSE_S) if closing else None
        for actor in (*(slot.actor for slot in self._slots), self._registrar):
            ray.kill(actor)

    def _stop(self) -> None:
        """Let every worker commit what it has encoded, and settle its outcomes."""
        self._ask(self._registrar.stop.remote())
        for slot in self._slots:
            slot.calls.append(slot.actor.flush.remote())
        deadline = time.monotonic() + STOP_S
        for slot in self._slots:
            # A worker that died, failed or is too slow: the next job finds its commits.
            with contextlib.suppress(RayError):
                while slot.calls:
                    left_s = max(0.0, deadline - time.monotonic())
                    outcomes = ray.get(slot.calls[0], timeout=left_s)
                    del slot.calls[0]
                    with contextlib.suppress(
                        TooManyFailuresError
                    ):  # raised after everything is recorded
                        self._tracker.settle(slot.number, outcomes or [])
