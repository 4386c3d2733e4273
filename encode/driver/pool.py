"""Keep the workers of a job busy, and replace those that crash, hang or leave with their node.

Each worker is an actor on a node: this machine, or one machine of a cluster. What an actor that is gone has
committed counts, and its other sources are assigned again. An actor whose process crashed or hung is
replaced, and the files it was decoding are retried alone first. If its node has left, no file is at fault.
`encode.driver.ray_pool` runs the actors; tests have some without processes.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cache.errors import CacheError
from cache.store.locks import wait_for_exit
from cache.store.space import Space
from configs import UserError, one_line
from encode.driver.culprits import Culprits, HangWatch, rejection
from encode.driver.nodes import Backend, Layouts, Membership, Node
from encode.driver.progress import NodeProgress
from encode.driver.slots import Loss, Slot, release
from encode.driver.tracker import Tracker
from encode.driver.unread import UnreadSources
from encode.errors import WorkerLostError
from encode.worker.config import WorkerConfig
from encode.worker.messages import Outcome, SourceTask, Timings
from encode.worker.worker import Worker

log = logging.getLogger(__name__)

POLL_S = 0.5
"""Seconds between two looks for a stop."""

IN_FLIGHT = 2
"""Calls queued at an actor, so that it has the next one when it finishes the first."""

TASK_SOURCES = 32
"""Sources in one call, at most. Small jobs use fewer, so that all actors finish at about the same time."""

GONE_S = 10.0
"""Seconds that a killed worker may take to end. It can commit nothing meanwhile."""

STOP_S = 120.0
"""Seconds that all workers together may take to commit what they have encoded, when the job stops."""

SILENT_S = 600.0
"""Seconds without a report after which a worker with work counts as hanging, whatever it does."""

GRACE_S = 5.0
"""Seconds after which a node whose worker is gone is asked whether it is still there. A machine that is shut
down ends the workers first, and Ray a little later."""

UNREACHABLE_S = 90.0
"""Seconds that such a node may take to answer, or Ray to find that it has left."""

NO_NODE_S = 600.0
"""Seconds that a job waits for a node when all have left."""

BUSY_S = 180.0
"""Seconds after which a worker that is not ready is worth a line."""

STARTS = 3
"""Workers of one node that may end in a row before they are ready, before the node is left out."""

WATCH_EVERY_S = 5.0
"""Seconds between two looks for hung workers: each reads a file of every worker."""


class WorkerPool:
    """The workers of one job."""

    def __init__(
        self,
        tracker: Tracker,
        space: Space,
        config: WorkerConfig,
        layouts: Layouts,
        backend: Backend,
        *,
        timeout_s: float,
        worker_class: type[Worker],
        folders: Sequence[Path] | None = None,
    ):
        """Start nothing yet.

        Args:
            tracker: the job's sources.
            space: the space to write to.
            config: how a worker is made. Its limits of downloads are those of all workers together.
            layouts: the number of workers of each node, and of the GPUs that each has to itself.
            backend: the actors.
            timeout_s: seconds without progress after which a file that is being decoded counts as hanging.
            worker_class: the class that runs in the actors.
            folders: what every node of the cluster must see; None if this machine is the only node.
        """
        self._tracker, self._space, self._config = tracker, space, config
        self._layouts, self._backend, self._worker_class = layouts, backend, worker_class
        self._cluster = folders is not None
        self._members = Membership(backend, layouts, folders)
        self._first_nodes: frozenset[str] = frozenset()
        self._numbers = itertools.count(1)
        self._culprits, self._watch = Culprits(), HangWatch(timeout_s)
        self._timeout_s, self._watch_every_s = timeout_s, min(WATCH_EVERY_S, timeout_s / 8)
        self._unread = UnreadSources(backend.home, space.spec.name)
        self._suspects: deque[SourceTask] = deque()  # to retry alone, by any worker
        self._slots: list[Slot] = []
        self._where: dict[int, str] = {}  # number of a worker -> its node
        self._false_starts: Counter[str] = Counter()  # by node
        self._warned: set[str] = set()
        self._progress_s = self._watched_s = self._alone_s = 0.0

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
            self._members.begin(stopping)
            self._first_nodes = frozenset(self._members.nodes)
            self._start_workers()
            while not self._tracker.finished() and not stopping():
                for slot in list(self._slots):
                    self._feed(slot)
                self._collect()
                now = time.monotonic()
                if now - self._watched_s > self._watch_every_s:
                    self._watched_s = now
                    self._replace_hung()
                if now - self._progress_s > POLL_S:
                    self._progress_s = now
                    update_nodes(self._by_node())
                    progress(self.timings())
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
        return self._backend.ask("timings")

    def _by_node(self) -> list[NodeProgress]:
        """Return what each node that has workers has done."""
        done: Counter[str] = Counter()
        for number, timings in self._backend.ask("by_worker").items():
            done[self._where[number]] += timings.media
        running = Counter(str(slot.node) for slot in self._slots if slot.started)
        return [
            NodeProgress(address=node, workers=workers, done=done[node])
            for node, workers in running.items()
        ]

    # ---- workers and their calls

    def _wanted(self) -> dict[str, int]:
        return self._layouts.deal(list(self._members.nodes.values()))

    def _start_workers(self) -> None:
        """Start the workers that the nodes lack."""
        wanted = self._wanted()
        room = sum(wanted.values()) - len(self._slots)  # of a given number, wherever the others run
        for node in self._members.nodes.values():
            here = sum(slot.node.id == node.id for slot in self._slots)
            for _ in range(min(room, wanted[node.id] - here)):
                self._slots.append(self._new_slot(node, wanted))
                room -= 1

    def _new_slot(self, node: Node, wanted: Mapping[str, int]) -> Slot:
        layout, number = self._layouts.layout(node, wanted[node.id]), next(self._numbers)
        download = self._config.download.share(sum(wanted.values()))
        config = layout.apply(replace(self._config, download=download))
        actor, start = self._backend.start(node, layout.gpus, config, number, self._worker_class)
        self._where[number], now = str(node), time.monotonic()
        return Slot(number=number, node=node, actor=actor, calls=[start], busy_since=now)

    def _feed(self, slot: Slot) -> None:
        """Keep a worker busy. One with files to retry alone does these first, one at a time."""
        if not slot.started or slot.loss is not None:
            return
        if slot.node.id not in self._members.nodes:
            self._retire(slot)
            return
        if self._suspects and not slot.to_retry:
            slot.to_retry.append(self._suspects.popleft())
        if slot.to_retry or slot.alone:
            if not slot.calls and self._tracker.num_assigned(slot.number):
                self._call(slot, "flush")
            if slot.calls:
                return
            slot.alone = slot.to_retry.popleft() if slot.to_retry else None
            if slot.alone is not None:
                self._tracker.assign(slot.number, [slot.alone])
                self._call(slot, "run", [slot.alone])
                self._call(slot, "flush")
                return
        while len(slot.calls) < IN_FLIGHT:
            tasks = self._unread.take(slot.node, self._task_sources())
            if tasks:
                self._tracker.assign(slot.number, tasks)
            else:
                tasks = self._tracker.assign_next(slot.number, self._task_sources())
            if not tasks:
                break
            self._call(slot, "run", tasks)
        if not slot.calls and self._tracker.num_assigned(slot.number):
            self._call(slot, "flush")

    def _call(self, slot: Slot, method: str, *values: Any) -> None:
        if not slot.calls:
            slot.busy_since = time.monotonic()
        slot.calls.append(self._backend.call(slot.actor, method, *values))

    def _task_sources(self) -> int:
        return max(1, min(TASK_SOURCES, self._tracker.total // (8 * max(1, len(self._slots)))))

    def _collect(self) -> None:
        """Settle the calls that have ended, and see who is gone and which nodes there are."""
        calls = [call for slot in self._slots for call in slot.calls]
        pings = [slot.loss.ping for slot in self._slots if slot.loss and slot.loss.ping]
        others = [*self._members.calls, *pings]
        assert calls or self._cluster, "sources are left, and no worker has a call"
        if calls or others:
            ready = self._backend.wait([*calls, *others], POLL_S)
        else:
            time.sleep(POLL_S)
            ready = ()
        for slot in list(self._slots):
            while slot.calls and slot.calls[0] in ready:
                call = slot.calls.pop(0)
                try:
                    outcomes = self._backend.result(call)
                except WorkerLostError as error:
                    self._lost(slot, str(error))
                    break
                except Exception as error:  # of the worker's own code, as inline: it ends the job
                    if slot.started or not self._cluster:
                        raise
                    self._cannot_start(slot, error)
                    break
                if not slot.started:
                    slot.started = True
                    self._false_starts.pop(slot.node.id, None)
                self._settle(slot, outcomes or [])
        self._judge_losses(ready)
        if self._cluster:
            for node in self._members.update(ready):
                self._node_left(node)
            self._start_workers()
            for outcome in self._unread.hopeless(self._nodes_to_try()):
                self._tracker.fail(outcome)
            self._check_waiting()

    def _settle(self, slot: Slot, outcomes: Sequence[Outcome]) -> None:
        def withdraw(source: str) -> SourceTask:
            return self._tracker.withdraw(slot.number, [source])[0]

        final = self._unread.sort(slot.node, outcomes, withdraw) if self._cluster else outcomes
        self._tracker.settle(slot.number, final)
        if slot.node.id in self._members.nodes and self._unread.is_blind(slot.node):
            example = self._unread.example(slot.node)
            log.warning(
                "node %s cannot read most of its sources, which this machine can (%s); it is left out",
                slot.node,
                example,
            )
            self._members.leave_out(slot.node)
            if not self._members.nodes:
                raise UserError(
                    f"no node can read the sources that this machine can ({example}): mount their folder on "
                    "the nodes, under the same path"
                )

    def _nodes_to_try(self) -> set[str]:
        """Return the nodes on which a source may still be tried: not those that others keep busy."""
        late = time.monotonic() - BUSY_S
        nodes = {s.node.id for s in self._slots if s.started or s.busy_since > late}
        return nodes & set(self._members.nodes)

    def _retire(self, slot: Slot) -> None:
        """Let a worker of a node that is left out commit what it has, then end it."""
        if slot.calls:
            return
        if self._tracker.num_assigned(slot.number):
            self._call(slot, "flush")
            return
        self._suspects.extend(slot.to_retry)
        self._backend.kill(slot.actor)
        self._slots.remove(slot)

    def _cannot_start(self, slot: Slot, error: Exception) -> None:
        """End the job if a node of the start has an error of its own; leave out one that joined later."""
        why = f"node {slot.node}: {one_line(error, 400)}"
        if slot.node.id in self._first_nodes and not self._tracker.settled:
            raise UserError(why) from error
        log.warning("%s; it is left out", why)
        self._members.leave_out(slot.node)
        self._suspects.extend(slot.to_retry)
        self._backend.kill(slot.actor)
        self._slots.remove(slot)

    # ---- nodes that leave

    def _node_left(self, node: Node) -> None:
        gone = [slot for slot in self._slots if slot.node.id == node.id]
        sources = sum(self._tracker.num_assigned(slot.number) for slot in gone)
        log.warning(
            "node %s has left; %d workers and %d open sources were on it", node, len(gone), sources
        )
        for slot in gone:
            self._take_back(slot)

    def _take_back(self, slot: Slot) -> None:
        """Give all sources of a worker to others. What its node was doing says nothing about them."""
        self._slots.remove(slot)
        self._backend.kill(slot.actor)
        self._suspects.extend(slot.to_retry)
        wait_for_exit(self._space.paths, str(slot.number), 0.0)  # if it lives on, it cannot write
        release(slot, [], self._tracker, self._space, self._backend)

    def _check_waiting(self) -> None:
        """Say what the job waits for. If no node is left, wait for one, but not forever.

        Raises:
            UserError: none has come.
        """
        now = time.monotonic()
        for slot in self._slots:
            late = not slot.started and now - slot.busy_since > BUSY_S
            if late and slot.node.id not in self._warned:
                self._warned.add(slot.node.id)
                log.warning(
                    "node %s: no worker is ready after %.0f s; other jobs of the cluster may use the node",
                    slot.node,
                    BUSY_S,
                )
        if self._slots or self._members.calls:
            self._alone_s = 0.0
        elif not self._alone_s:
            self._alone_s = now
            log.warning("no node is left; waiting up to %.0f min for one to join", NO_NODE_S / 60)
        elif now - self._alone_s > NO_NODE_S:
            raise UserError(
                f"no node that can have workers has joined for {NO_NODE_S / 60:.0f} min; everything "
                "committed is kept: run the same command again"
            )

    # ---- workers that crash or hang

    def _lost(self, slot: Slot, why: str) -> None:
        """A call was not answered: the process is gone, or on another machine perhaps the node."""
        if not self._cluster or slot.node.id == self._backend.home:
            self._replace(slot, why, hung=False)
            return
        now = time.monotonic()
        slot.calls.clear()
        slot.loss = Loss(why=why, since=now, ping_after=now + GRACE_S)
        self._backend.kill(slot.actor)

    def _judge_losses(self, ready: Collection[Any]) -> None:
        """Replace a worker whose node answers. `_node_left` has those of nodes that Ray has lost."""
        now = time.monotonic()
        for slot in list(self._slots):
            loss = slot.loss
            if loss is None:
                continue
            if loss.ping is None and now > loss.ping_after:
                loss.ping = self._backend.ping(slot.node)
            elif loss.ping is not None and loss.ping in ready:
                ping, loss.ping, loss.ping_after = loss.ping, None, now + GRACE_S
                with contextlib.suppress(WorkerLostError):
                    self._backend.result(ping)
                    self._replace(slot, loss.why, hung=False)
                    continue
            if now - loss.since > UNREACHABLE_S:
                log.warning("node %s cannot be reached; it is left out", slot.node)
                self._members.leave_out(slot.node)
                self._take_back(slot)

    def _replace_hung(self) -> None:
        silent = self._backend.ask("silent_s")
        for slot in list(self._slots):
            if slot.loss is not None or not slot.started:
                continue
            quiet_s = min(silent.get(slot.number, 0.0), time.monotonic() - slot.busy_since)
            if self._watch.hanging(slot.number, slot.entries(self._space)):
                self._replace(slot, f"no progress for {self._timeout_s:.0f} s", hung=True)
            elif slot.calls and quiet_s > SILENT_S:
                self._replace(slot, f"no report for {SILENT_S:.0f} s", hung=False)

    def _replace(self, slot: Slot, why: str, *, hung: bool) -> None:
        """Kill a worker, take its unsettled sources back, and start another one in its place."""
        self._backend.kill(slot.actor)
        if not wait_for_exit(self._space.paths, str(slot.number), GONE_S):
            log.warning("worker %d still runs; it can no longer commit", slot.number)
        entries = slot.entries(self._space)
        if hung:
            entries = self._watch.hanging(slot.number, entries)
        self._watch.forget(slot.number)
        decoding = release(slot, entries, self._tracker, self._space, self._backend)
        log.warning(
            "worker %d%s: %s; decoding: %s",
            slot.number,
            f" on node {slot.node}" if self._cluster else "",
            why,
            ", ".join(t.source for t in decoding),
        )
        rejected, retried = self._culprits.judge(decoding, slot.alone, hung=hung)
        keys = {entry.source: entry.key for entry in entries}
        for task in rejected:
            self._tracker.fail(rejection(task, keys[task.source], hung=hung))
        self._suspects.extend([*retried, *slot.to_retry])
        at, wanted = self._slots.index(slot), self._wanted()
        if not slot.started:
            self._false_starts[slot.node.id] += 1
            if self._cluster and self._false_starts[slot.node.id] >= STARTS:
                log.warning(
                    "node %s: its workers end before they are ready; it is left out", slot.node
                )
                self._members.leave_out(slot.node)
        if slot.node.id in self._members.nodes:
            self._slots[at] = self._new_slot(slot.node, wanted)
        else:
            del self._slots[at]
        self._culprits.count_crash(self._tracker.settled, why)

    def _end(self) -> None:
        """End the process of every worker."""
        self._members.close()
        closing = [
            self._backend.call(slot.actor, "close")
            for slot in self._slots
            if slot.started and not slot.calls and slot.loss is None
        ]
        self._backend.end([slot.actor for slot in self._slots], closing)

    def _stop(self) -> None:
        """Let every worker commit what it has encoded, and settle its outcomes."""
        self._backend.ask("stop")
        running = [slot for slot in self._slots if slot.started and slot.loss is None]
        for slot in running:
            self._call(slot, "flush")
        deadline = time.monotonic() + STOP_S
        for slot in running:
            while slot.calls:
                left_s = max(0.0, deadline - time.monotonic())
                try:
                    outcomes = self._backend.result(slot.calls.pop(0), left_s)
                except Exception:  # it died, failed or is too slow: the next job finds its commits
                    break
                with contextlib.suppress(UserError):  # raised after all is recorded
                    self._settle(slot, outcomes or [])
