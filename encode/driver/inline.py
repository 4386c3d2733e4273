"""A job in the driver's own process, without Ray: for small jobs, for debugging, for tests.

An image that kills its worker kills the job here; with `--workers 1` it goes to the ledger instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection

from encode.driver.tracker import TooManyFailuresError, Tracker
from encode.worker.messages import Registrar, Timings
from encode.worker.worker import Worker

NUMBER = 0
TASK_SOURCES = 32


class InlineRegistrar(Registrar):
    """A registrar over the counter: what the worker reports is shown at once."""

    def __init__(
        self,
        committed: Collection[str],
        next_shard: dict[str, int],
        show: Callable[[Timings], None],
    ):
        super().__init__(committed, next_shard)
        self._show = show

    def report(self, worker: int, timings: Timings) -> bool:
        """See Coordinator."""
        going = super().report(worker, timings)
        self._show(self.timings())
        return going


def run_inline(
    tracker: Tracker, worker: Worker, registrar: Registrar, stopping: Callable[[], bool]
) -> None:
    """Until every source is accounted for, or `stopping` says so; then what is encoded is kept.

    Raises:
        UserError: the job cannot go on.
    """
    try:
        while not tracker.finished() and not stopping():
            tasks = tracker.take(NUMBER, TASK_SOURCES)
            tracker.settle(NUMBER, worker.run(tasks) if tasks else worker.flush())
    except TooManyFailuresError:
        registrar.stop()
        with contextlib.suppress(TooManyFailuresError):  # it is written down all the same
            tracker.settle(NUMBER, worker.flush())
        raise
    if not tracker.finished():
        registrar.stop()
        tracker.settle(NUMBER, worker.flush())
