"""Limit the memory of all decoding threads of a worker together.

    budget = DecodeBudget()
    turn = budget.turn()                            # in the order in which items are delivered
    with budget.room(turn, nbytes, waiting=lambda: is_open):
        ...                                         # decodes

The bytes are estimated from an item's header before anything is decoded. Items are admitted in the order of
their turns, so an item waits only for those that are delivered before it, and never for one that waits for
it. An item that needs more than the whole budget is decoded alone; one that needs little does not count, and
waits for nothing.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from model.media.images import BadMediaError

BUDGET_BYTES = 2 << 30
"""Bytes for all threads. Four of the largest images, or forty photographs of 12 megapixels, at a time."""

ITEM_BYTES = 4 << 30
"""Bytes for one media item, at most."""

LITTLE_BYTES = 32 << 20
"""Bytes up to which an item does not count: what each thread may have besides. A JPEG of 2.8 megapixels."""

POLL_S = 0.5
"""Seconds between two looks at whether to go on waiting."""


class DecodeBudget:
    """The memory for decoding in one worker. Threads may call all methods."""

    def __init__(self, total: int = BUDGET_BYTES, little: int = LITTLE_BYTES) -> None:
        """Allow `total` bytes for the items that need more than `little`."""
        self.total, self.little = total, little
        self.used = 0
        """Bytes of the items that are being decoded; of one that is decoded alone, at most `total`."""
        self._turns = self._next = 0
        self._passed = set[int]()  # turns that are used, while one before them is not
        self._changed = threading.Condition()

    def turn(self) -> int:
        """Return the next turn. Every turn must be used in one `room`, or all later ones wait."""
        with self._changed:
            self._turns += 1
            return self._turns - 1

    @contextlib.contextmanager
    def room(self, turn: int, nbytes: int, waiting: Callable[[], bool]) -> Iterator[None]:
        """Wait for this turn and for `nbytes`, and hold them while the block runs.

        Args:
            turn: from `turn`.
            nbytes: the estimate; 0 for an item that is not decoded.
            waiting: whether to go on waiting. Once it returns False, the block runs without room.

        Raises:
            BadMediaError: the item needs more than `ITEM_BYTES`.
        """
        too_large, counts = nbytes > ITEM_BYTES, nbytes > self.little
        held = min(nbytes, self.total) if counts and not too_large else 0
        with self._changed:
            while counts and waiting() and not self._admits(turn, held):
                self._changed.wait(POLL_S)
            self._passed.add(turn)
            while self._next in self._passed:
                self._passed.remove(self._next)
                self._next += 1
            self.used += held
            self._changed.notify_all()
        try:
            if too_large:
                raise BadMediaError(
                    f"needs {nbytes / 1e9:.1f} GB to be decoded, at most {ITEM_BYTES / 1e9:.1f} GB are used"
                )
            yield
        finally:
            with self._changed:
                self.used -= held
                self._changed.notify_all()

    def _admits(self, turn: int, held: int) -> bool:
        return turn == self._next and self.used + held <= self.total
