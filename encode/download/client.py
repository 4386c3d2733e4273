"""URLs -> bytes, many at once, in one event loop in a thread of its own.

    fetcher = Fetcher(DownloadConfig())
    ahead = [fetcher.submit(url) for url in urls[:256]]
    fetched = ahead[0].result()         # or BadMediaError: why it cannot be had, in one line
    ...                                 # use fetched.data
    fetched.release()                   # its bytes no longer count as being in memory
    fetcher.close()

What is refused, what is tried again and what is waited for stands in `fetch_rules`. Decided besides:

- Cookies are not kept, and no Referer is sent: an image that needs them is not public.
- Proxies from the environment are not used: the proxy would make the connection, and which addresses may
  be connected to could not be checked.
- TLS certificates are verified.
- Bytes are taken as they are sent; what they are is found out when they are decoded.
- Connections are kept a few seconds for hosts that are asked again and again, and for no others.
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

from encode.download.config import DownloadConfig, DownloadError
from encode.download.host_limits import HostLimits
from encode.download.memory_budget import Budget, Lease, NoRoomError
from encode.download.outage import Outage
from encode.download.request import Body, Exchange
from encode.download.session import Lookups, Sockets, new_session
from encode.download.urls import host_of, parse_url
from model.media.images import BadMediaError

log = logging.getLogger(__name__)


def _nothing() -> None:
    pass


@dataclass(frozen=True, kw_only=True, eq=False)
class Fetched:
    """A body, whole, and checked where a sha256 was known."""

    data: bytes
    """The bytes."""
    final_url: str
    """Where they came from after redirects. May hold secrets in its query: not for logs."""
    seconds: float
    """From the first try's start to the last byte, waits between tries included."""
    release: Callable[[], None] = _nothing
    """To be called once `data` is needed no longer: its bytes go back to the budget. Any thread, any number
    of times. Holding on to it does not keep the data."""


class _Share:
    """What a body takes of the budget. Goes back at the latest when nobody can call `release` any more:
    who drops a body without releasing it must not make the others wait for ever."""

    def __init__(self, lease: Lease) -> None:
        self._give_back = weakref.finalize(self, lease.release_soon)
        self._give_back.atexit = False

    def release(self) -> None:
        self._give_back()  # the first time; then nothing


class _Pending(Future[Fetched]):
    """A future that lets the budget know when somebody waits for it: see `budget`."""

    def __init__(self, hurry: Callable[[], None]) -> None:
        super().__init__()
        self._hurry: Callable[[], None] | None = hurry

    def result(self, timeout: float | None = None) -> Fetched:
        self._is_awaited()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._is_awaited()
        return super().exception(timeout)

    def _is_awaited(self) -> None:
        if self._hurry is not None and not self.done():
            hurry, self._hurry = self._hurry, None
            hurry()


class Fetcher:
    """See above. Methods may be called from any thread.

    Submit as many as are wanted soon (each costs a few kB, and they are served in order within a host),
    release what was fetched, and wait with `result()`: a body somebody waits for so is read even when
    unreleased ones have used up the budget. Callbacks of the futures run in the fetcher's thread.
    """

    def __init__(self, rules: DownloadConfig) -> None:
        """Start the thread."""
        self._rules = rules
        self._lock = threading.Lock()
        self._closed = False
        self._jobs: set[asyncio.Task[None]] = set()
        self._random = random.Random()  # noqa: S311 - jitter
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._main, name="fetch", daemon=True)
        self._thread.start()
        self._ready.result()
        atexit.register(self.close)  # else sockets are found open when Python ends

    def submit(self, url: str, *, sha256: str | None = None) -> Future[Fetched]:
        """Fetch `url`.

        Args:
            url: http:// or https://, as the data set has it.
            sha256: hex; other bytes are refused.

        Returns:
            a future of the body. It raises BadMediaError (stage `fetch`, or `verify`: other bytes than
            recorded), and CancelledError once the fetcher is closed.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the fetcher is closed")
            lease = Lease(self._budget, self._loop)
            future = _Pending(functools.partial(self._soon, lease.hurry))
            self._loop.call_soon_threadsafe(self._begin, url, sha256, lease, future)
        return future

    def close(self) -> None:
        """Cancel what is under way, and end the thread. A second time does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._loop.call_soon_threadsafe(self._stop.set)
                atexit.unregister(self.close)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _main(self) -> None:
        with asyncio.Runner() as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        rules = self._rules
        lookups, sockets = Lookups(), Sockets(rules.allow_private)
        try:
            self._loop = asyncio.get_running_loop()
            self._loop.set_exception_handler(_note)
            self._stop = asyncio.Event()
            self._budget = Budget(rules.budget_bytes)
            self._lanes = HostLimits(rules)
            self._outage = Outage(rules.outage_s)
            session = new_session(rules, lookups, sockets)
            self._exchange = Exchange(session, self._lanes, rules)
        except BaseException as error:
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        async with session:
            await self._stop.wait()
            for job in self._jobs:
                job.cancel()
            await asyncio.gather(*self._jobs, return_exceptions=True)
        lookups.close()
        await sockets.close()

    def _soon(self, call: Callable[[], None]) -> None:
        with self._lock:  # so that the loop has not ended
            if not self._closed:
                self._loop.call_soon_threadsafe(call)

    def _begin(self, url: str, sha256: str | None, lease: Lease, future: Future[Fetched]) -> None:
        job = self._loop.create_task(self._run(url, sha256, lease, future))
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)

        def cancel_if_cancelled(done: Future[Fetched]) -> None:
            if done.cancelled():
                self._soon(functools.partial(_cancel, job))

        future.add_done_callback(cancel_if_cancelled)

    async def _run(
        self, url: str, sha256: str | None, lease: Lease, future: Future[Fetched]
    ) -> None:
        """Fetch, and fulfil the future: with a body, with BadMediaError, or cancelled."""
        failure: BadMediaError | None = None
        try:
            begun, body = await self._fetch(url, sha256, lease)
        except asyncio.CancelledError:
            lease.release()
            future.cancel()
            return
        except DownloadError as error:
            # Its traceback and context hold the parts of the body.
            failure = error.with_traceback(None)
            failure.__cause__ = failure.__context__ = None
        except Exception as error:  # the open web finds what no list of exceptions has
            where = traceback.extract_tb(error.__traceback__)[-1]
            name = type(error).__name__
            log.warning("a fetch failed in an unknown way: %s at %s", name, tuple(where)[:2])
            failure = BadMediaError(f"cannot be fetched ({name})", "fetch")
        if not future.set_running_or_notify_cancel():
            lease.release()
        elif failure is not None:
            lease.release()
            future.set_exception(failure)
        else:
            fetched = Fetched(
                data=body.data,
                final_url=str(body.url),
                seconds=time.monotonic() - begun,
                release=_Share(lease).release,
            )
            future.set_result(fetched)

    async def _fetch(self, url: str, sha256: str | None, lease: Lease) -> tuple[float, Body]:
        """A body, and when its first try began, after as many tries as it takes.

        Raises:
            DownloadError: the last try's.
        """
        target = parse_url(url)
        begun = 0.0
        tried = 0
        failed: DownloadError | None = None
        while True:
            await lease.take()
            begun = begun or time.monotonic()
            try:
                body = await self._exchange.once(target, lease, sha256)
            except NoRoomError:
                continue  # not counted: nobody's fault
            except DownloadError as trouble:
                lease.release()
                if await self._outage.over(trouble):
                    continue  # not counted either
                if failed is None or trouble.asked:
                    failed = trouble.with_traceback(None)  # it holds the body's parts
                again = trouble.again
            else:
                lease.settle(len(body.data))
                self._outage.answered()
                self._lanes.fetched(host_of(body.url))
                return begun, body
            tried += 1
            if not again or tried >= self._lanes.tries(failed.host):
                break
            wait_s = self._rules.backoff_s * 2 ** (tried - 1) * self._random.uniform(0.5, 1.5)
            await asyncio.sleep(max(wait_s, failed.wait_s))
        if failed.again or failed.wait_s:
            self._lanes.failed(failed.host)
        elif failed.asked:
            self._lanes.fetched(failed.host)
        raise failed


def _cancel(job: asyncio.Task[None]) -> None:
    job.cancel()


def _note(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What transports have to say besides: a fetch that suffers from it says so itself."""
    log.debug("%s: %r", context.get("message"), context.get("exception"))
