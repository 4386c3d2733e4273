"""How many bytes of bodies are in memory at once.

A fetch takes a small share before it asks, and grows it once the length is known. Nothing waits for bytes
while it holds a connection: when there is no room to grow, the try is dropped and begins again with all
it needs. So fetches never block each other, and only those who keep bodies can keep others waiting: who
waits in `result()` for a body while keeping others is served beyond the budget, one body at a time.

Belongs to one event loop, but for `Lease.release_soon`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

__all__ = ["Budget", "Lease", "NoRoomError"]

FIRST_SHARE = 64 << 10
"""Bytes taken before a length is known: what an answer's first packets may bring."""


class NoRoomError(Exception):
    """This try would need more than is left; the lease knows how much."""


class Lease:
    """One fetch's share."""

    def __init__(self, budget: Budget, loop: asyncio.AbstractEventLoop) -> None:
        """Nothing yet."""
        self._budget, self._loop = budget, loop
        self.held = 0
        """Bytes taken."""
        self.need = FIRST_SHARE
        """Bytes to take before asking."""
        self.hurried = False
        """Somebody waits for this body."""
        self.waiter: asyncio.Future[None] | None = None
        """Set while it waits in line."""

    async def take(self) -> None:
        """Wait for `need` bytes."""
        await self._budget.admit(self)

    def check(self) -> None:
        """Before asking: is there still room for more than a first share?

        Raises:
            NoRoomError: there is not. The lease is empty.
        """
        if self.need <= FIRST_SHARE and not self.hurried and self._budget.crowded:
            self.release()
            raise NoRoomError

    def grow(self, size: int, whole: int) -> None:
        """Hold at least `size` bytes from now on, or nothing.

        Args:
            size: bytes needed now.
            whole: bytes the body may need in all.

        Raises:
            NoRoomError: they are not there. The lease is empty, and begins anew with `whole`.
        """
        if size > self.held and not self._budget.extend(self, size - self.held):
            self.release()
            self.need = max(self.need, whole)
            raise NoRoomError

    def settle(self, size: int) -> None:
        """The body is whole: hold exactly `size` until it is released."""
        self._budget.give_back(self, self.held - size)

    def release(self) -> None:
        """Give all back; a second time does nothing."""
        self._budget.give_back(self, self.held)

    def release_soon(self) -> None:
        """The same, from any thread, also while Python collects garbage."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and the budget with it
            self._loop.call_soon_threadsafe(self.release)

    def hurry(self) -> None:
        """Somebody waits for this body and may keep others until it comes."""
        self.hurried = True
        self._budget.move_up()


class Budget:
    """See above."""

    def __init__(self, total: int) -> None:
        """`total` bytes."""
        self.total = total
        self.used = 0
        """Bytes taken; above `total` only by a body somebody waits for."""
        self._start_below = total // 2
        """New fetches start below this, so that those under way find room to grow."""
        self._line: deque[Lease] = deque()
        self._beyond: Lease | None = None
        """Being read beyond the budget."""

    @property
    def crowded(self) -> bool:
        """Hardly anything is left: a fetch that asked now would likely ask in vain."""
        return self.used > self.total - self._start_below // 2

    async def admit(self, lease: Lease) -> None:
        """Wait until `lease` has all it needs."""
        if not self._line and self._fits(lease):
            self._hold(lease, lease.need)
            return
        lease.waiter = asyncio.get_running_loop().create_future()
        self._line.append(lease)
        self.move_up()
        try:
            await lease.waiter
        except asyncio.CancelledError:
            with contextlib.suppress(ValueError):  # it had its bytes, and gives them back elsewhere
                self._line.remove(lease)
            self.move_up()
            raise
        finally:
            lease.waiter = None

    def extend(self, lease: Lease, more: int) -> bool:
        """Whether `lease` got `more` bytes, at once."""
        if self.used + more > self.total and lease is not self._beyond:
            if not lease.hurried or self._beyond is not None:
                return False
            self._beyond = lease
        self._hold(lease, more)
        return True

    def give_back(self, lease: Lease, size: int) -> None:
        """`lease` holds `size` bytes less, and is read to its end."""
        lease.held -= size
        self.used -= size
        if lease is self._beyond:
            self._beyond = None
        self.move_up()

    def move_up(self) -> None:
        """Let those in line start for whom there is room now."""
        while self._beyond is None:
            hurried = next((lease for lease in self._line if lease.hurried), None)
            if hurried is None:
                break
            self._beyond = None if self._fits(hurried) else hurried
            self._start(hurried)
        while self._line and self._fits(self._line[0]):
            self._start(self._line[0])

    def _fits(self, lease: Lease) -> bool:
        limit = self._start_below if lease.need <= FIRST_SHARE else self.total
        return self.used + lease.need <= limit or self.used == 0

    def _start(self, lease: Lease) -> None:
        self._line.remove(lease)
        assert lease.waiter is not None, "only those who wait stand in line"
        if not lease.waiter.done():
            self._hold(lease, lease.need)
            lease.waiter.set_result(None)

    def _hold(self, lease: Lease, size: int) -> None:
        lease.held += size
        self.used += size
