"""Detect that the network is down, and let downloads wait for it.

A restarted router must not make thousands of good links fail. When many hosts in a row are unreachable and no
other host answers, their downloads wait for the first answer. They fail only if none comes for a long time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from encode.errors import DownloadError

log = logging.getLogger(__name__)

# Multiplied by 4 after each wait in vain: the rest of a list may contain only dead hosts.
HOSTS = 16
"""Number of unreachable hosts in a row after which the network counts as down."""

PROBE_S = 15.0
"""Seconds between attempts of one download while the network is down."""


class Outage:
    """The state of the network. It belongs to one event loop."""

    def __init__(self, max_wait_s: float) -> None:
        """Assume that the network is up; wait at most `max_wait_s` seconds whenever it is down."""
        self._max_wait_s = max_wait_s
        self._unreachable: set[str] = set()
        self._alarm_at = HOSTS
        self._down_since: float | None = None
        self._waited_in_vain = False
        self._answered = asyncio.Event()

    def note_answer(self) -> None:
        """Record that some host answered, so the network is up."""
        if self._down_since is not None:
            log.warning("a host answers again: the network is back")
        self._unreachable.clear()
        self._down_since = None
        self._answered.set()

    async def wait_if_down(self, error: DownloadError) -> bool:
        """Wait for the network if it is down.

        Args:
            error: the error of an attempt.

        Returns:
            whether the attempt failed because the network is down and should be repeated now.
        """
        if not error.unreachable:
            if error.attempted and error.host:
                self.note_answer()
            return False
        clock = asyncio.get_running_loop().time
        if self._down_since is None:
            self._unreachable.add(error.host)
            if len(self._unreachable) < self._alarm_at:
                return False
            self._down_since = clock()
            self._waited_in_vain = False
            self._answered.clear()
            log.warning(
                "the last %d hosts are unreachable: the network may be down; waiting up to %g s",
                len(self._unreachable),
                self._max_wait_s,
            )
        left_s = self._down_since + self._max_wait_s - clock()
        if left_s <= 0:  # downloads fail from now on, until a host answers
            if not self._waited_in_vain:
                self._waited_in_vain = True
                self._alarm_at *= 4
            return False
        with contextlib.suppress(TimeoutError):  # then probe
            async with asyncio.timeout(min(PROBE_S, left_s)):
                await self._answered.wait()
        return True
