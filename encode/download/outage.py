"""Whether the network is there at all.

A night's job must not write ten thousand good links off because a router was restarted. When many hosts in
a row give no sign of life, and no other one does, those fetches wait for the first that does; the ledger
hears of them only when nothing has come for a long while.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from encode.download.config import DownloadError

__all__ = ["Outage"]

log = logging.getLogger(__name__)

HOSTS = 16
"""So many silent hosts in a row are no accident. Four times as many after each alarm in vain: a list's rest
may be nothing but dead hosts."""

PROBE_S = 15.0
"""While the network is down, a fetch tries again so often, seconds."""


class Outage:
    """See above. Belongs to one event loop."""

    def __init__(self, patience_s: float) -> None:
        """The network is there; when it is not, it is waited for so long."""
        self._patience_s = patience_s
        self._silent: set[str] = set()
        self._alarm_at = HOSTS
        self._since: float | None = None
        self._given_up = False
        self._back = asyncio.Event()

    def answered(self) -> None:
        """Somebody gave a sign of life."""
        if self._since is not None:
            log.warning("somebody answers again: the network is there")
        self._silent.clear()
        self._since = None
        self._back.set()

    async def over(self, trouble: DownloadError) -> bool:
        """Whether what failed with `trouble` failed for want of a network, and is to be tried again now.

        Waits, when it did.
        """
        if not trouble.silent:
            if trouble.asked and trouble.host:
                self.answered()
            return False
        clock = asyncio.get_running_loop().time
        if self._since is None:
            self._silent.add(trouble.host)
            if len(self._silent) < self._alarm_at:
                return False
            self._since = clock()
            self._given_up = False
            self._back.clear()
            log.warning(
                "the last %d hosts gave no sign of life: is the network down? Waiting up to %g s",
                len(self._silent),
                self._patience_s,
            )
        left_s = self._since + self._patience_s - clock()
        if left_s <= 0:  # in vain, and so for the others until somebody answers
            if not self._given_up:
                self._given_up = True
                self._alarm_at *= 4
            return False
        with contextlib.suppress(TimeoutError):  # time to probe
            async with asyncio.timeout(min(PROBE_S, left_s)):
                await self._back.wait()
        return True
