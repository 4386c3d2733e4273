"""A job in the driver's own process, without Ray: for small jobs, for debugging, for tests.

A picture that kills its worker kills the job here; with `--workers 1` it goes to the ledger instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from encode.book import Book, TooManyFailures
from encode.tasks import Registrar, Timings
from encode.worker import Worker

NUMBER = 0
TASK_SOURCES = 32


def run_inline(
    book: Book,
    worker: Worker,
    registrar: Registrar,
    stopping: Callable[[], bool],
    progress: Callable[[Timings], None],
) -> None:
    """Until every source is accounted for, or `stopping` says so; then what is encoded is kept.

    Raises:
        UserError: the job cannot go on.
    """
    try:
        while not book.finished() and not stopping():
            tasks = book.take(NUMBER, TASK_SOURCES)
            book.settle(NUMBER, worker.run(tasks) if tasks else worker.flush())
            progress(registrar.timings())
    except TooManyFailures:
        registrar.stop()
        with contextlib.suppress(TooManyFailures):  # it is written down all the same
            book.settle(NUMBER, worker.flush())
        raise
    if not book.finished():
        registrar.stop()
        book.settle(NUMBER, worker.flush())
