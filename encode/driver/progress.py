"""The lines that a job prints: its progress, and at the end a line that a script can read.

    encode 1200/5000  24.1/s  bound by decode  3 failed  about 3 min left
    failed   3 at decode; each with its reason: python -m cache.ls --failures --features cache
    notes    2 ends early; which media: python -m cache.ls --notes --features cache
    encoded=4997 reused=0 failed=3 images/s=24.3 bound=decode seconds=206.1

The progress counts sources. `images/s` counts rows: images and frames of videos.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from configs.command_line import command_text
from configs.console import counts_text
from configs.text import unguarded
from encode.driver.tracker import Tracker
from encode.plan.estimate import about
from encode.worker.messages import Timings

WINDOW_S = 60.0
"""The remaining time is computed from the rate of this many seconds."""

TERMINAL_EVERY_S = 1.0
"""Seconds between two updates of the progress line on a terminal."""

ERASE_LINE = "\r\x1b[K"
"""Moves a terminal's cursor to the start of its line, and erases the line."""

LOG_EVERY_S = 10.0
"""Seconds between two progress lines elsewhere."""


@dataclass(frozen=True, kw_only=True)
class NodeProgress:
    """What the workers of one node of a cluster have done."""

    address: str
    """Address of the node, or its name."""
    workers: int
    """Workers that run on it."""
    done: int
    """Media items that its workers have encoded, dead workers included."""


class Progress:
    """Prints the progress of a job: one line that is overwritten on a terminal, else a line every 10 s."""

    def __init__(self, tracker: Tracker, *, out: TextIO | None = None):
        self._tracker = tracker
        self._out = unguarded(out or sys.stderr)
        self._terminal = self._out.isatty()
        self._printed = time.monotonic()
        self._marks: list[tuple[float, int]] = [(0.0, 0)]  # seconds of work, media items encoded
        self._nodes: tuple[NodeProgress, ...] = ()

    def update_nodes(self, rows: Sequence[NodeProgress]) -> None:
        """Set what each node of the cluster has done. Nodes that have left are not among the rows."""
        self._nodes = tuple(rows)

    def update(self, timings: Timings) -> None:
        """Print a line if it is time for one; `timings` are those of all workers together."""
        now = time.monotonic()
        # Media items count when they are encoded, long before their shard is committed.
        done = max(self._tracker.settled, min(timings.media, self._tracker.total))
        rate = self._rate(timings.span_s, done)
        if now - self._printed < (TERMINAL_EVERY_S if self._terminal else LOG_EVERY_S):
            return
        self._printed = now
        line = self.line(done, rate, timings)
        self._out.write(f"{ERASE_LINE}{line}" if self._terminal else line + "\n")
        self._out.flush()

    def line(self, done: int, rate: float, timings: Timings) -> str:
        """Return the text of one update."""
        tracker = self._tracker
        if not rate:
            return f"encode {done}/{tracker.total}  starting"
        parts = [f"encode {done}/{tracker.total}", f"{rate:.3g}/s", f"bound by {timings.bound()}"]
        if tracker.failed:
            parts.append(f"{tracker.failed} failed")
        if timings.clipped:
            parts.append(f"{timings.clipped} values clipped to float16")
        parts.append(f"{about((tracker.total - done) / rate)} left")
        return "  ".join(parts)

    def clear(self) -> None:
        """Erase the progress line on a terminal, so that another line can be printed."""
        if self._terminal:
            self._out.write(ERASE_LINE)
            self._out.flush()

    def _rate(self, worked_s: float, done: int) -> float:
        """Return the media items a second of the last `WINDOW_S` seconds of work."""
        if worked_s > self._marks[-1][0]:
            self._marks.append((worked_s, done))
        while len(self._marks) > 2 and self._marks[1][0] < worked_s - WINDOW_S:
            self._marks.pop(0)
        (then, before), (now, done) = self._marks[0], self._marks[-1]
        return (done - before) / (now - then) if now > then else 0.0


def closing_line(
    *, encoded: int, reused: int, failed: int, seconds: float, timings: Timings | None
) -> str:
    """Return the last line of a job; `timings` is None if there was nothing to do."""
    rate = f"{timings.rows / timings.span_s:.1f}" if timings is not None and timings.span_s else "0"
    bound = timings.bound() if timings is not None and encoded else "none"
    return (
        f"encoded={encoded} reused={reused} failed={failed} images/s={rate} bound={bound} "
        f"seconds={seconds:.1f}"
    )


def stage_line(timings: Timings) -> str:
    """Return the line with the seconds of each stage."""
    return (
        f"stages   read {timings.read_s:.1f} s, decode {timings.decode_s:.1f} s (threads, added up); "
        f"encode {timings.encode_s:.1f} s, waiting for input {timings.wait_s:.1f} s; "
        f"write {timings.write_s:.1f} s"
    )


def failure_line(failures: dict[str, int], features: str) -> str:
    """Return the line with the failures of each stage, and the command that lists their reasons."""
    stages = ", ".join(f"{count} at {stage}" for stage, count in sorted(failures.items()))
    words = ["--failures", "--features", features]
    return f"failed   {stages}; each with its reason: {command_text('python -m cache.ls', words)}"


def note_line(notes: Mapping[str, int], features: str) -> str:
    """Return the line with the subjects of notes on media that are used, and the command that lists them."""
    words = ["--notes", "--features", features]
    return (
        f"notes    {counts_text(notes)}; which media: {command_text('python -m cache.ls', words)}"
    )
