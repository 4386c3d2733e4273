"""Limit the number of simultaneous requests to each host, and to all hosts together.

A request first waits for a slot of its host, then for one of the common slots. So a slow host delays only the
requests to itself. Everything here belongs to one event loop.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from encode.download.config import DownloadConfig
from encode.errors import DownloadError

# Connections to these hosts stay open for a few seconds. Keeping one for each of a million hosts that are
# asked once would exceed the number of files that a process may open.
RECENT_HOSTS = 64
"""Number of last used hosts whose connections are kept."""

REMEMBERED_HOSTS = 10_000
"""Number of hosts whose failures are remembered while no request to them is waiting."""


class _Host:
    """The state of one host."""

    def __init__(self, per_host: int) -> None:
        self.slots = asyncio.Semaphore(per_host)
        self.requests = 0
        """Requests that are running or waiting."""
        self.failures = 0
        """Downloads that the host made fail since its last success."""
        self.recent = False
        """Whether the last request found the host among the recent ones."""
        self.resume_at = 0.0
        """Time on the loop's clock before which no request may start."""


class HostLimits:
    """Count requests, failures and pauses of hosts."""

    def __init__(self, config: DownloadConfig) -> None:
        """Start without any host."""
        self._config = config
        self._slots = asyncio.Semaphore(config.connections)
        self._hosts: dict[str, _Host] = {}
        self._recent: OrderedDict[str, None] = OrderedDict()

    @asynccontextmanager
    async def slot(self, host: str) -> AsyncIterator[None]:
        """Wait until a request to `host` may start, and hold its slot inside the block.

        Raises:
            DownloadError: the host asked for a pause, and its last downloads failed.
        """
        state = self._hosts.setdefault(host, _Host(self._config.per_host))
        state.requests += 1
        try:
            async with state.slots:
                await self._wait_out_pause(state)
                async with self._slots:
                    state.recent = host in self._recent
                    self._recent[host] = None
                    self._recent.move_to_end(host)
                    if len(self._recent) > RECENT_HOSTS:
                        self._recent.popitem(last=False)
                    yield
        finally:
            state.requests -= 1
            self._forget_if_idle(host, state)

    def keeps_connection(self, host: str) -> bool:
        """Return whether another request to `host` is likely, so that its connection should stay open.

        Call it inside `slot`.
        """
        state = self._hosts[host]
        return state.requests > 1 or state.recent

    def tries(self, host: str) -> int:
        """Return the number of attempts for a URL of this host."""
        return 1 if self._is_failing(self._hosts.get(host)) else self._config.tries

    def pause(self, host: str, wait_s: float) -> None:
        """Start no request to `host` for a while. Call it inside `slot`.

        Args:
            host: the host that asked for a pause.
            wait_s: seconds it asked for. If this is 0 or above `retry_after_s`, only a host that keeps
                failing is paused, for `retry_after_s`.
        """
        state = self._hosts[host]
        if not 0 < wait_s <= self._config.retry_after_s:
            wait_s = self._config.retry_after_s if self._is_failing(state) else 0.0
        state.resume_at = max(state.resume_at, asyncio.get_running_loop().time() + wait_s)

    def succeeded(self, host: str) -> None:
        """Count a download that got a proper response, which may be a 404."""
        if state := self._hosts.get(host):
            state.failures = 0
            self._forget_if_idle(host, state)

    def failed(self, host: str) -> None:
        """Count a download that the host made fail."""
        self._hosts.setdefault(host, _Host(self._config.per_host)).failures += 1
        while len(self._hosts) > REMEMBERED_HOSTS:
            idle = next((name for name, state in self._hosts.items() if not state.requests), None)
            if idle is None:
                return
            del self._hosts[idle]

    async def _wait_out_pause(self, state: _Host) -> None:
        clock = asyncio.get_running_loop().time
        while (wait_s := state.resume_at - clock()) > 0:
            if self._is_failing(state):
                raise DownloadError(
                    "not attempted: the host asked for a pause, and its last "
                    f"{state.failures} downloads failed",
                    attempted=False,
                )
            await asyncio.sleep(wait_s)

    def _is_failing(self, state: _Host | None) -> bool:
        return state is not None and state.failures >= self._config.max_host_failures

    def _forget_if_idle(self, host: str, state: _Host) -> None:
        paused = state.resume_at > asyncio.get_running_loop().time()
        if not (state.requests or state.failures or paused) and self._hosts.get(host) is state:
            del self._hosts[host]
