"""Sources that a node could not read, and this machine can: the node's error, not the media's.

    kept = unread.sort(node, outcomes, withdraw)       what is final; the rest is tried on other nodes
    tasks = unread.take(node, 32)                      for a node that has not tried them
    failed = unread.hopeless(nodes)                    what no node can read

A mount may be missing on one node, or a permission. What this machine cannot read either is the media's
failure. What only the nodes cannot read counts as our own: it is tried again by the next job, and the failure
budget ends a job with many of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from encode.download.urls import is_url
from encode.driver.nodes import Node
from encode.worker.local_files import CHANGES, check_readable, unreadable
from encode.worker.messages import Outcome, SourceTask
from model.media.images import BadMediaError, Failure

PROBATION = 20
"""Sources that a node must have failed to read before it is left out."""

SHARE = 0.5
"""Share of its sources that a node must have failed to read before it is left out."""


@dataclass
class _Unread:
    task: SourceTask
    tried: dict[str, str] = field(default_factory=dict)
    """Id of a node -> in words: the node, and why it could not read the source."""


class UnreadSources:
    """The sources of one job that some node could not read."""

    def __init__(self, home: str, space: str):
        """Nothing is unread.

        Args:
            home: id of the node of this machine, whose errors are the media's.
            space: name of the space, which our own failures begin with.
        """
        self._home, self._space = home, space
        self._sources: dict[str, _Unread] = {}
        self._waiting: dict[str, _Unread] = {}
        self._settled: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()

    def sort(
        self, node: Node, outcomes: Sequence[Outcome], withdraw: Callable[[str], SourceTask]
    ) -> list[Outcome]:
        """Return the outcomes that are final. The others are kept here, to be tried on other nodes.

        Args:
            node: the node of the worker.
            outcomes: of its sources.
            withdraw: takes a source from the worker and returns it.
        """
        final = []
        for outcome in outcomes:
            self._settled[node.id] += 1
            if node.id == self._home or not _could_not_read(outcome):
                final.append(outcome)
                continue
            try:
                check_readable(outcome.task)
            except BadMediaError as error:
                record = unreadable(outcome.task)
                final.append(replace(outcome, record=record, failure=error.failure))
                continue
            task = withdraw(outcome.task.source)
            unread = self._sources.setdefault(task.source, _Unread(task))
            assert outcome.failure is not None, "it has failed"
            unread.task = task
            unread.tried[node.id] = f"{node}: {outcome.failure.reason}"
            self._waiting[task.source] = unread
            self._failed[node.id] += 1
        return final

    def take(self, node: Node, count: int) -> list[SourceTask]:
        """Return up to `count` sources that this node has not tried."""
        found = [s for s, unread in self._waiting.items() if node.id not in unread.tried][:count]
        return [self._waiting.pop(source).task for source in found]

    def hopeless(self, nodes: Collection[str]) -> list[Outcome]:
        """Return the outcomes of sources that each of these nodes has failed to read; none without nodes."""
        failed = []
        for source, unread in list(self._waiting.items()):
            if nodes and all(node in unread.tried for node in nodes):
                del self._waiting[source]
                why = "; ".join(unread.tried.values())
                reason = f"{self._space}: this machine can read it, no node can: {why}"
                record = unreadable(unread.task)
                failure = Failure("encode", reason)
                failed.append(
                    Outcome(task=unread.task, record=record, result="failed", failure=failure)
                )
        return failed

    def is_blind(self, node: Node) -> bool:
        """Return whether a node fails to read most of its sources, and should get no more."""
        failed = self._failed[node.id]
        return failed >= PROBATION and failed > SHARE * self._settled[node.id]

    def example(self, node: Node) -> str:
        """Return one source that a node could not read, and why."""
        for source, unread in self._sources.items():
            if node.id in unread.tried:
                return f"{source}: {unread.tried[node.id].rpartition(': ')[2]}"
        return ""


def _could_not_read(outcome: Outcome) -> bool:
    failure = outcome.failure
    if failure is None or failure.stage != "fetch" or is_url(outcome.task.source):
        return False
    return failure.reason != CHANGES
