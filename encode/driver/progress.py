"""The progress of a job, and the lines that it prints at its end.

    encode  24% [====>           ]  1,200/5,000  24.1/s  2 min 38 s left  bound by decode  3 failed
      10.0.0.5  8 workers  16.2/s
      10.0.0.6  4 workers  7.9/s

    failed   3 at decode; each with its reason: python -m cache.ls --failures --features cache
    notes    2 ends early; which media: python -m cache.ls --notes --features cache
    encoded=4997 reused=0 failed=3 images/s=24.3 bound=decode seconds=206.1

The progress counts the sources that the job has to bring into the space, so what is reused is no part of it.
Its rate is that of the last minute, and counts media items that were encoded or have failed: those whose
bytes turn out to be in the space would make it look faster. `images/s` counts rows: images and frames of
videos.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self, TextIO

from configs import one_line
from configs.command_line import command_text
from configs.console import counts_text
from configs.progress import (
    UPDATE_S,
    WINDOW_S,
    Display,
    Pace,
    Status,
    left_text,
    number_text,
    rate_text,
)
from encode.driver.tracker import Tracker
from encode.worker.messages import Timings

log = logging.getLogger(__name__)

CALL_S = 1.0
"""Seconds between two calls of `on_progress`, at least."""

ONLY_REUSED_S = 30.0
"""Seconds after which a job that has encoded nothing yet tells its time by what it reuses."""


@dataclass(frozen=True, kw_only=True)
class NodeProgress:
    """What the workers of one node of a cluster have done."""

    address: str
    """Address of the node, or its name."""
    workers: int
    """Workers that run on it."""
    done: int
    """Media items that its workers have encoded, dead workers included."""
    rate: float = 0.0
    """Media items a second, recently. `JobProgress` computes it."""


@dataclass(frozen=True, kw_only=True)
class ProgressState:
    """The progress of a job at one moment, as `on_progress` gets it."""

    done: int
    """Sources that are encoded, reused or failed."""
    total: int
    """Sources of the job, or of the part at which a large one works. What is encoded is not among them."""
    rate: float
    """Media items encoded or failed a second, recently; 0.0 if that is not known yet."""
    eta_s: float | None
    """Seconds until the job ends; None if that is not known yet."""
    bound: str
    """What limits the speed: download, read, decode, encode or write; '' if that is not known yet."""
    failed: int
    """Sources that have failed."""
    nodes: tuple[NodeProgress, ...] = ()
    """The nodes of a cluster; none without Ray."""


OnProgress = Callable[[ProgressState], object]
"""Called about once a second, and at the end."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a job has done at one moment."""

    done: int
    """Sources that are encoded, reused or failed."""
    worked: int
    """Those that were encoded or have failed."""
    failed: int
    """Those that have failed."""
    bound: str = ""
    """What limits the speed."""
    note: str = ""
    """Anything else to show."""


class JobProgress:
    """Shows the progress of a job, or hands it to `on_progress`. Its methods belong to one thread."""

    def __init__(
        self,
        what: str,
        total: int,
        counts: Callable[[], Counts],
        *,
        on_progress: OnProgress | None = None,
        out: TextIO | None = None,
    ):
        """Show nothing yet.

        Args:
            what: the name of the work.
            total: sources of the job.
            counts: returns what is done.
            on_progress: gets the progress, and then nothing is printed.
            out: instead of standard error.
        """
        self._total, self._counts, self._on_progress = total, counts, on_progress
        self._display = Display(what, out=out) if on_progress is None else None
        self._worked, self._settled = Pace(), Pace()
        self._since: float | None = None  # when the work began
        self._measures = False  # whether the paces have begun
        self._done = 0
        self._updated = self._called = float("-inf")
        self._nodes: tuple[NodeProgress, ...] = ()
        self._node_paces: dict[str, Pace] = {}
        self._many = False  # whether there has been more than one node

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.show(last=True)
        finally:
            if self._display is not None:
                self._display.close(keep=kind is not None)

    def update_nodes(self, rows: Sequence[NodeProgress]) -> None:
        """Set what each node of the cluster has done. Nodes that have left are not among the rows."""
        now, paces = time.monotonic(), self._node_paces
        self._node_paces = {row.address: paces.get(row.address) or Pace() for row in rows}
        for row in rows:
            self._node_paces[row.address].add(now, row.done)
        self._nodes = tuple(replace(row, rate=self._node_paces[row.address].rate) for row in rows)
        self._many = self._many or len(rows) > 1

    def show(self, *, started: bool = True, last: bool = False) -> None:
        """Show what is done now, if it is time.

        Args:
            started: whether the work has begun. The time until then is no part of the rate.
            last: whether it is always time.
        """
        now = time.monotonic()
        if now - self._updated < UPDATE_S and not last:
            return
        self._updated = now
        counts = self._counts()
        if started:
            self._measure(now, counts)
        # Rows of a worker that died are encoded again, which is no reason to go back.
        self._done = max(self._done, min(counts.done, self._total))
        state = ProgressState(
            done=self._done,
            total=self._total,
            rate=self._worked.rate,
            eta_s=self._eta_s(),
            bound=counts.bound if self._worked.rate else "",
            failed=counts.failed,
            nodes=self._nodes,
        )
        if self._display is not None:
            self._display.update(self._status(state, counts.note))
        elif last or now - self._called >= CALL_S:
            self._called = now
            self._call(state)

    def _measure(self, now: float, counts: Counts) -> None:
        if self._since is None:
            self._since = now
        if not self._measures:
            # Not before the first item is encoded: what an interrupted job has committed is found first, and
            # in no time.
            self._worked, self._settled = Pace(), Pace()
            self._measures = counts.worked > 0 or now - self._since >= ONLY_REUSED_S
        self._worked.add(now, counts.worked)
        self._settled.add(now, counts.done)

    def _eta_s(self) -> float | None:
        if self._done == self._total:
            return 0.0
        return self._settled.seconds(self._total - self._done)

    def _status(self, state: ProgressState, note: str) -> Status:
        left = left_text(state.eta_s)
        if self._since is None:
            left = "starting"
        elif state.done == state.total:
            left = "finishing"
        rows = [
            (
                node.address,
                _number_of(node.workers, "worker"),
                rate_text(node.rate) if node.rate else "starting",
            )
            for node in state.nodes
            if self._many
        ]
        return Status(
            count=f"{number_text(state.done)}/{number_text(state.total)}",
            share=state.done / state.total if state.total else None,
            rate=rate_text(state.rate) if state.rate else "",
            left=left,
            bound=f"bound by {state.bound}" if state.bound else "",
            failed=f"{number_text(state.failed)} failed" if state.failed else "",
            note="  ".join(filter(None, (note, _number_of(len(rows), "node") if rows else ""))),
            rows=tuple(rows),
        )

    def _call(self, state: ProgressState) -> None:
        """Call `on_progress`. Its first error is a warning, since the job does not need it."""
        assert self._on_progress is not None, "else there is a display"
        try:
            self._on_progress(state)
        except Exception as error:
            log.warning("on_progress: %s; it is not called again", one_line(error))
            self._on_progress = _ignore


def _ignore(_state: ProgressState) -> None:
    pass


def _number_of(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


class Progress(JobProgress):
    """The progress of an encode job, from its tracker and the timings of its workers."""

    def __init__(
        self,
        tracker: Tracker,
        *,
        what: str = "encode",
        on_progress: OnProgress | None = None,
        out: TextIO | None = None,
    ):
        self._tracker, self._timings = tracker, Timings()
        self._recent: deque[tuple[float, Timings]] = deque()
        super().__init__(what, tracker.total, self._count, on_progress=on_progress, out=out)

    def update(self, timings: Timings) -> None:
        """Show the progress if it is time; `timings` are those of all workers together."""
        now = time.monotonic()
        self._timings = timings
        if not self._recent or now - self._recent[-1][0] >= 1.0:
            self._recent.append((now, timings))
        while len(self._recent) > 2 and self._recent[1][0] < now - WINDOW_S:
            self._recent.popleft()
        # A worker reports when it starts, and once a second from then on.
        self.show(started=timings.span_s > 0 or self._tracker.settled > 0)

    def _count(self) -> Counts:
        tracker, timings = self._tracker, self._timings
        # Media items count when they are encoded, long before their shard is committed.
        encoded = max(timings.media, tracker.encoded)
        recent = timings.since(self._recent[0][1]) if self._recent else timings
        clipped = f"{timings.clipped:,} values clipped to float16" if timings.clipped else ""
        return Counts(
            done=tracker.settled + encoded - tracker.encoded,
            worked=tracker.failed + encoded,
            failed=tracker.failed,
            bound=(recent if recent.media else timings).bound(),
            note=clipped,
        )


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
    download = f"download {timings.download_s:.1f} s, " if timings.download_s else ""
    return (
        f"stages   {download}read {timings.read_s:.1f} s, decode {timings.decode_s:.1f} s "
        f"(threads, added up); encode {timings.encode_s:.1f} s, waiting for input {timings.wait_s:.1f} s; "
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
