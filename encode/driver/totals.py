"""What became of the sources of a job, over all the parts in which it takes them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from encode.driver.tracker import Tracker
from encode.plan.plan import Plan
from encode.worker.messages import Timings


@dataclass(kw_only=True)
class Totals:
    """Sums over the parts that have ended."""

    encoded: int = 0
    """Media items that were committed."""
    reused: int = 0
    """Sources whose bytes the space had."""
    failed: int = 0
    """Sources that failed, now or before."""
    left: int = 0
    """Sources of these parts that are not settled, since the job was told to stop."""
    failures: Counter[str] = field(default_factory=Counter)
    """Stage -> sources that failed there in this job."""
    notes: Counter[str] = field(default_factory=Counter)
    """Subject of a note -> sources that have it and are used."""
    timings: Timings | None = None
    """Of all workers; None if there was nothing to do."""

    def add(self, plan: Plan, tracker: Tracker, timings: Timings | None) -> None:
        """Add a part: its plan, what became of the sources to do, and what the workers did."""
        self.encoded += tracker.encoded
        self.reused += plan.reused + tracker.reused
        self.failed += plan.known_failures + len(plan.missing) + tracker.failed
        self.left += tracker.total - tracker.settled
        self.failures += tracker.failures + Counter(fetch=len(plan.missing))
        self.notes += tracker.notes + Counter(plan.notes)
        if timings is not None:
            self.timings = timings if self.timings is None else self.timings + timings
