"""Whose turn it is to ask: so many requests at once to one host, so many to all.

A request first gets a place with its host, then one among all, so that a slow host keeps waiting only
those who want something of it. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from encode.download.config import DownloadConfig, DownloadError

RECENT = 64
"""Hosts asked last. Asked again, their connections are kept a while; of a million hosts asked once, none
is, or there would be more open ones than a process may have."""

REMEMBERED = 10_000
"""Hosts with failures that are kept in mind while nothing is asked of them."""


class _Lane:
    """What is known of one host."""

    def __init__(self, per_host: int) -> None:
        self.places = asyncio.Semaphore(per_host)
        self.users = 0
        """Requests under way or waiting."""
        self.failed = 0
        """Fetches in a row that failed for good, through the host's fault."""
        self.recent = False
        """Asked before, not long ago."""
        self.resume_at = 0.0
        """Nothing is asked before, on the loop's clock."""


class HostLimits:
    """See above."""

    def __init__(self, rules: DownloadConfig) -> None:
        """Within these limits."""
        self._rules = rules
        self._all = asyncio.Semaphore(rules.connections)
        self._lanes: dict[str, _Lane] = {}
        self._recent: OrderedDict[str, None] = OrderedDict()

    @asynccontextmanager
    async def turn(self, host: str) -> AsyncIterator[None]:
        """Wait until `host` may be asked something; it counts as being asked within.

        Raises:
            DownloadError: it has failed again and again, and asks to be left alone.
        """
        lane = self._lanes.setdefault(host, _Lane(self._rules.per_host))
        lane.users += 1
        try:
            async with lane.places:
                await self._sit_out(lane)
                async with self._all:
                    self._note(host, lane)
                    yield
        finally:
            lane.users -= 1
            self._forget(host, lane)

    def wanted(self, host: str) -> bool:
        """Whether others ask the same host, or did just now: its connection is worth keeping."""
        lane = self._lanes.get(host)
        return lane is not None and (lane.users > 1 or lane.recent)

    def tries(self, host: str) -> int:
        """Tries a URL of this host gets."""
        return 1 if self._worn_out(self._lanes.get(host)) else self._rules.tries

    def pause(self, host: str, wait_s: float) -> None:
        """`host` asks to be left alone so long; 0: it did not say how long.

        Without a time, or with an absurd one, only a host that does nothing but fail is paused.
        """
        lane = self._lanes.get(host)
        if lane is None:
            return
        if not 0 < wait_s <= self._rules.retry_after_s:
            wait_s = self._rules.retry_after_s if self._worn_out(lane) else 0.0
        lane.resume_at = max(lane.resume_at, asyncio.get_running_loop().time() + wait_s)

    def fetched(self, host: str) -> None:
        """A fetch got a proper answer, be it 404."""
        if lane := self._lanes.get(host):
            lane.failed = 0
            self._forget(host, lane)

    def failed(self, host: str) -> None:
        """A fetch is given up, through the host's fault."""
        self._lanes.setdefault(host, _Lane(self._rules.per_host)).failed += 1
        while len(self._lanes) > REMEMBERED:
            idle = next((name for name, lane in self._lanes.items() if not lane.users), None)
            if idle is None:
                return
            del self._lanes[idle]

    def _note(self, host: str, lane: _Lane) -> None:
        lane.recent = host in self._recent
        self._recent[host] = None
        self._recent.move_to_end(host)
        if len(self._recent) > RECENT:
            self._recent.popitem(last=False)

    async def _sit_out(self, lane: _Lane) -> None:
        clock = asyncio.get_running_loop().time
        while (wait_s := lane.resume_at - clock()) > 0:
            if self._worn_out(lane):
                said = (
                    f"not tried: the host asks to wait, and its last {lane.failed} fetches failed"
                )
                trouble = DownloadError(said)
                trouble.asked = False
                raise trouble
            await asyncio.sleep(wait_s)

    def _worn_out(self, lane: _Lane | None) -> bool:
        return lane is not None and lane.failed >= self._rules.patience

    def _forget(self, host: str, lane: _Lane) -> None:
        done = lane.resume_at <= asyncio.get_running_loop().time()
        if not lane.users and not lane.failed and done and self._lanes.get(host) is lane:
            del self._lanes[host]
