"""Run a job in the driver's own process, without Ray: for small jobs, for debugging, for tests.

A file that crashes its worker ends the job here: decoding runs in the driver's own process if the job is
short. With `--workers 1` such a file is recorded in the ledger instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from encode.driver.tracker import Tracker
from encode.errors import TooManyFailuresError
from encode.worker.messages import Registrar
from encode.worker.worker import Worker

WORKER = 0
"""Number of the only worker."""

TASK_SOURCES = 32
"""Sources given to the worker in one call."""


def run_inline(
    tracker: Tracker, worker: Worker, registrar: Registrar, stopping: Callable[[], bool]
) -> None:
    """Encode until every source is settled or `stopping` returns True. Commit all encoded rows.

    Raises:
        UserError: the job cannot go on.
    """
    try:
        while not tracker.finished() and not stopping():
            tasks = tracker.assign_next(WORKER, TASK_SOURCES)
            tracker.settle(WORKER, worker.run(tasks) if tasks else worker.flush())
    except TooManyFailuresError:
        registrar.stop()
        with contextlib.suppress(TooManyFailuresError):  # raised after everything is recorded
            tracker.settle(WORKER, worker.flush())
        raise
    if not tracker.finished():
        registrar.stop()
        tracker.settle(WORKER, worker.flush())
