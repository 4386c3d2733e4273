"""The requirements of a benchmark: one printed line each, and a summary at the end.

    requirements = Requirements("scale")
    requirements.at_most("open with its index, s", 1.2, 2.0)    # ...  1.20  <= 2  ok
    requirements.summary()                                      # scale: 1/1 ok

A requirement that is not met prints `short`. The exit code is 0 anyway, because a busy machine is no error.
"""

from __future__ import annotations


class Requirements:
    """Print requirements as they are measured, and count those that are met."""

    def __init__(self, benchmark: str) -> None:
        self.benchmark = benchmark
        self.met = self.total = 0

    def add(self, name: str, measured: str, required: str, ok: bool) -> None:
        """Print one requirement."""
        self.met, self.total = self.met + ok, self.total + 1
        print(f"{name:<60}{measured:>12}  {required:>14}  {'ok' if ok else 'short'}", flush=True)

    def at_least(self, name: str, measured: float, required: float) -> None:
        """Print the requirement that a number is at least `required`."""
        self.add(name, f"{measured:.2f}", f">= {required:g}", measured >= required)

    def at_most(self, name: str, measured: float, required: float) -> None:
        """Print the requirement that a number is at most `required`."""
        self.add(name, f"{measured:.4g}", f"<= {required:g}", measured <= required)

    def summary(self) -> None:
        """Print how many requirements are met."""
        print(f"{self.benchmark}: {self.met}/{self.total} ok")
