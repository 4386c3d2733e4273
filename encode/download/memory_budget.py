"""Limit the memory of downloaded bodies.

A download reserves a small share before its request, and more once the length of the body is known. A
download that holds a connection never waits for memory: if there is no room to grow, the attempt ends and
starts again once all the memory it needs is free. So downloads cannot block each other.

A consumer that keeps bodies can block others. Therefore a body that a thread waits for in `result()` may
exceed the budget, one body at a time.

Everything here belongs to one event loop, except `Reservation.release_threadsafe`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

from encode.errors import OverBudgetError

FIRST_SHARE = 64 << 10
"""Bytes reserved before the length is known: about what arrives with the headers."""


class Reservation:
    """The memory of one download."""

    def __init__(self, budget: MemoryBudget, loop: asyncio.AbstractEventLoop) -> None:
        """Reserve nothing yet."""
        self._budget, self._loop = budget, loop
        self.held = 0
        """Bytes reserved now."""
        self.needed = FIRST_SHARE
        """Bytes to reserve before the next attempt."""
        self.urgent = False
        """Whether a thread waits for this body."""
        self.admitted: asyncio.Future[None] | None = None
        """Set while this reservation waits in the queue; done once its bytes are reserved."""

    async def acquire(self) -> None:
        """Wait for `needed` bytes."""
        await self._budget.admit(self)

    def check_room(self) -> None:
        """Check before a request that more than the first share is free.

        Raises:
            OverBudgetError: too little is free. Nothing is reserved any more.
        """
        if self.needed <= FIRST_SHARE and not self.urgent and self._budget.nearly_full:
            self.release()
            raise OverBudgetError

    def grow(self, size: int, expected: int) -> None:
        """Reserve at least `size` bytes in total.

        Args:
            size: bytes needed now.
            expected: bytes that the whole body may need.

        Raises:
            OverBudgetError: too little is free. Nothing is reserved any more, and the next attempt starts
                with `expected` bytes.
        """
        if size > self.held and not self._budget.extend(self, size - self.held):
            self.release()
            self.needed = max(self.needed, expected)
            raise OverBudgetError

    def shrink(self, size: int) -> None:
        """Keep exactly the `size` bytes of a complete body."""
        self._budget.give_back(self, self.held - size)

    def release(self) -> None:
        """Give back all bytes. A second call does nothing."""
        self._budget.give_back(self, self.held)

    def release_threadsafe(self) -> None:
        """Call `release` from any thread, or during garbage collection."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and the budget with it
            self._loop.call_soon_threadsafe(self.release)

    def prioritize(self) -> None:
        """Mark that a thread waits for this body, and may keep others meanwhile."""
        self.urgent = True
        self._budget.admit_waiting()


class MemoryBudget:
    """The memory of all downloads of one `Fetcher`."""

    def __init__(self, total: int) -> None:
        """Allow `total` bytes."""
        self.total = total
        self.used = 0
        """Bytes reserved. Only one urgent body at a time may raise this above `total`."""
        self._start_limit = total // 2
        """New downloads start below this limit, so that running ones have room to grow."""
        self._queue: deque[Reservation] = deque()
        self._over_budget: Reservation | None = None
        """The urgent body that may exceed the budget now."""

    @property
    def nearly_full(self) -> bool:
        """Whether a new request would probably find no room for its body."""
        return self.used > self.total - self._start_limit // 2

    async def admit(self, reservation: Reservation) -> None:
        """Wait until `reservation` holds the bytes it needs."""
        if not self._queue and self._fits(reservation):
            self._hold(reservation, reservation.needed)
            return
        reservation.admitted = asyncio.get_running_loop().create_future()
        self._queue.append(reservation)
        self.admit_waiting()
        try:
            await reservation.admitted
        except asyncio.CancelledError:
            with contextlib.suppress(ValueError):  # it was admitted; the caller releases its bytes
                self._queue.remove(reservation)
            self.admit_waiting()
            raise
        finally:
            reservation.admitted = None

    def extend(self, reservation: Reservation, more: int) -> bool:
        """Reserve `more` bytes without waiting; return whether they were free."""
        if self.used + more > self.total and reservation is not self._over_budget:
            if not reservation.urgent or self._over_budget is not None:
                return False
            self._over_budget = reservation
        self._hold(reservation, more)
        return True

    def give_back(self, reservation: Reservation, size: int) -> None:
        """Give back `size` bytes of a body that does not grow any more."""
        reservation.held -= size
        self.used -= size
        if reservation is self._over_budget:
            self._over_budget = None
        self.admit_waiting()

    def admit_waiting(self) -> None:
        """Admit queued reservations that fit now."""
        while self._over_budget is None:
            urgent = next((one for one in self._queue if one.urgent), None)
            if urgent is None:
                break
            self._over_budget = None if self._fits(urgent) else urgent
            self._start(urgent)
        while self._queue and self._fits(self._queue[0]):
            self._start(self._queue[0])

    def _fits(self, reservation: Reservation) -> bool:
        limit = self._start_limit if reservation.needed <= FIRST_SHARE else self.total
        return self.used + reservation.needed <= limit or self.used == 0

    def _start(self, reservation: Reservation) -> None:
        self._queue.remove(reservation)
        assert reservation.admitted is not None, "only waiting reservations are in the queue"
        if not reservation.admitted.done():
            self._hold(reservation, reservation.needed)
            reservation.admitted.set_result(None)

    def _hold(self, reservation: Reservation, size: int) -> None:
        reservation.held += size
        self.used += size
