"""Download many URLs at the same time, in one event loop in a thread of its own.

    fetcher = Fetcher(DownloadConfig())
    futures = [fetcher.submit(url) for url in urls[:256]]
    fetched = futures[0].result()       # or BadMediaError with the reason in one line
    ...                                 # use fetched.data
    fetched.release()                   # its memory is free for other downloads
    fetcher.close()

`DownloadConfig` lists the limits. Beyond them:

- Cookies are not kept and no Referer is sent: an image that needs them is not public.
- Proxies of the environment are not used: the proxy would connect, and the address could not be checked.
- TLS certificates are verified.
- Bytes are not decoded or decompressed. What they are is found out when they are decoded.
- Connections to hosts that are used again stay open for a few seconds, and others are closed.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import logging
import random
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from cache.remote.net import tls_context
from encode.download.config import DownloadConfig
from encode.download.host_limits import HostLimits
from encode.download.memory_budget import MemoryBudget, Reservation
from encode.download.outage import Outage
from encode.download.request import Attempt
from encode.download.session import CheckedSockets, new_session
from encode.download.urls import parse_url
from encode.errors import DownloadError, OverBudgetError
from model.media.images import BadMediaError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Fetched:
    """A complete body, with the expected sha256."""

    data: bytes
    """The bytes."""
    seconds: float
    """Seconds from the start of the first attempt to the last byte, pauses between attempts included."""
    release: Callable[[], None] = lambda: None
    """Gives the memory of `data` back to the budget; call it when `data` is no longer needed. Any thread may
    call it, any number of times. It does not keep `data` alive."""


class _BodyFuture(Future[Fetched]):
    """A future that reports when a thread starts to wait for it: see `memory_budget`."""

    def __init__(self, on_wait: Callable[[], None]) -> None:
        super().__init__()
        self._on_wait = on_wait

    def result(self, timeout: float | None = None) -> Fetched:
        self._report_wait()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._report_wait()
        return super().exception(timeout)

    def _report_wait(self) -> None:
        if not self.done():
            self._on_wait()


class Fetcher:
    """A pool of downloads. Its methods may be called from any thread.

    Submit every URL that is wanted soon: each costs a few kB, and the URLs of one host are served in order.
    Release each body after use. A body that a thread waits for with `result()` is downloaded even if
    unreleased bodies have used up the memory budget. Callbacks of the futures run in the fetcher's thread.
    """

    def __init__(self, config: DownloadConfig) -> None:
        """Start the thread."""
        self._config = config
        self._tls = tls_context()  # here, so that the caller gets its errors
        self._lock = threading.Lock()
        self._closed = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._random = random.Random()  # noqa: S311 - jitter
        self._stop = asyncio.Event()
        self._budget = MemoryBudget(config.budget_bytes)
        self._hosts = HostLimits(config)
        self._outage = Outage(config.outage_s)
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = self._runner.get_loop()
        self._loop.set_exception_handler(_log_loop_error)
        self._thread = threading.Thread(target=self._main, name="fetch", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # otherwise Python warns of open sockets when it ends

    def submit(self, url: str, *, sha256: str | None = None) -> Future[Fetched]:
        """Download `url`.

        Args:
            url: http:// or https://, as spelt in the data set.
            sha256: hex; bytes with another sha256 are refused.

        Returns:
            a future of the body. It raises BadMediaError (stage `fetch`, or `verify` for another sha256),
            and CancelledError once the fetcher is closed.

        Raises:
            RuntimeError: the fetcher is closed.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the fetcher is closed")
            memory = Reservation(self._budget, self._loop)
            future = _BodyFuture(functools.partial(self._call_in_loop, memory.prioritize))
            self._loop.call_soon_threadsafe(self._start, url, sha256, memory, future)
        return future

    def close(self) -> None:
        """Cancel running downloads and end the thread. A second call does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._loop.call_soon_threadsafe(self._stop.set)
                atexit.unregister(self.close)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _main(self) -> None:
        with self._runner:
            self._runner.run(self._serve())

    async def _serve(self) -> None:
        sockets = CheckedSockets(self._config.allow_private)
        # Set before the first task runs: the loop starts tasks in the order of their creation.
        self._session = new_session(self._config, sockets, self._tls)
        async with self._session:
            await self._stop.wait()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await sockets.close()

    def _call_in_loop(self, call: Callable[[], object]) -> None:
        with self._lock:  # so that the loop has not ended
            if not self._closed:
                self._loop.call_soon_threadsafe(call)

    def _start(
        self, url: str, sha256: str | None, memory: Reservation, future: Future[Fetched]
    ) -> None:
        task = self._loop.create_task(self._run(url, sha256, memory, future))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

        def cancel_if_cancelled(done: Future[Fetched]) -> None:
            if done.cancelled():
                self._call_in_loop(task.cancel)

        future.add_done_callback(cancel_if_cancelled)

    async def _run(
        self, url: str, sha256: str | None, memory: Reservation, future: Future[Fetched]
    ) -> None:
        """Download `url` and resolve the future with a body, with BadMediaError, or as cancelled."""
        failure: BadMediaError | None = None
        try:
            data, seconds = await self._fetch(url, sha256, memory)
        except asyncio.CancelledError:
            memory.release()
            future.cancel()
            return
        except DownloadError as error:
            failure = error.with_traceback(None)  # traceback and context keep the body in memory
            failure.__cause__ = failure.__context__ = None
        except Exception as error:  # no list of exceptions covers all of the open web
            where = traceback.extract_tb(error.__traceback__)[-1]
            name = type(error).__name__
            log.warning("unexpected error in a download: %s at %s", name, tuple(where)[:2])
            failure = BadMediaError(f"download failed ({name})", "fetch")
        if not future.set_running_or_notify_cancel():
            memory.release()
        elif failure is not None:
            memory.release()
            future.set_exception(failure)
        else:
            release = memory.release_threadsafe
            # A consumer that drops a body without releasing it must not block the others forever.
            weakref.finalize(release, memory.release_threadsafe).atexit = False
            future.set_result(Fetched(data=data, seconds=seconds, release=release))

    async def _fetch(
        self, url: str, sha256: str | None, memory: Reservation
    ) -> tuple[bytes, float]:
        """Return the body, and the seconds since the first attempt started.

        Raises:
            DownloadError: the error of the last attempt that reached the host.
        """
        target = parse_url(url)
        attempt = Attempt(
            session=self._session,
            hosts=self._hosts,
            config=self._config,
            memory=memory,
            sha256=sha256,
        )
        begun = 0.0
        attempts = 0
        failure: DownloadError | None = None
        while True:
            await memory.acquire()
            begun = begun or time.monotonic()
            try:
                data, host = await attempt.run(target)
            except OverBudgetError:
                continue  # does not count as an attempt
            except DownloadError as error:
                memory.release()
                if await self._outage.wait_if_down(error):
                    continue  # does not count either
                if failure is None or error.attempted:
                    failure = error.with_traceback(None)  # the traceback keeps the body in memory
                retryable = error.retryable
            else:
                memory.shrink(len(data))
                self._outage.note_answer()
                self._hosts.succeeded(host)
                return data, time.monotonic() - begun
            attempts += 1
            if not retryable or attempts >= self._hosts.tries(failure.host):
                break
            wait_s = self._config.backoff_s * 2 ** (attempts - 1) * self._random.uniform(0.5, 1.5)
            await asyncio.sleep(max(wait_s, failure.wait_s))
        if failure.retryable or failure.wait_s:
            self._hosts.failed(failure.host)
        elif failure.attempted:
            self._hosts.succeeded(failure.host)
        raise failure


def _log_loop_error(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log errors of transports at a low level: the download they belong to reports them itself."""
    log.debug("%s: %r", context.get("message"), context.get("exception"))
