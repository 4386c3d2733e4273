"""The progress of a job, and the lines at its end.

with Progress(tracker) as progress:
    progress.update(timings)    # encode  40% [==>  ]  400/1,000  8/s  1 min 15 s left  bound by decode
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable

import pytest

from cache.store.ledger import MediaRecord
from encode.driver.progress import (
    Counts,
    JobProgress,
    NodeProgress,
    Progress,
    ProgressState,
    closing_line,
    failure_line,
    note_line,
    stage_line,
)
from encode.driver.tracker import Tracker
from encode.worker.messages import Outcome, Result, SourceTask, Timings
from model.media.images import Failure

Clock = Callable[[float], None]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return a function that lets seconds pass."""
    now = [100.0]
    monkeypatch.setattr("encode.driver.progress.time.monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def tracker_of(count: int) -> Tracker:
    tracker = Tracker(
        [SourceTask(source=str(i)) for i in range(count)], present=(), on_record=lambda _: None
    )
    tracker.assign_next(0, count)
    return tracker


def settle(tracker: Tracker, first: int, count: int, result: Result) -> None:
    """Settle sources as the only worker does."""
    failure = Failure("decode", "no image") if result == "failed" else None
    tracker.settle(
        0,
        [
            Outcome(
                task=SourceTask(source=str(i)),
                record=MediaRecord(source=str(i), key=f"{i:064d}"),
                result=result,
                failure=failure,
            )
            for i in range(first, first + count)
        ],
    )


class Seen:
    """An `on_progress` that keeps what it gets."""

    def __init__(self) -> None:
        self.states: list[ProgressState] = []

    def __call__(self, state: ProgressState) -> None:
        self.states.append(state)

    @property
    def last(self) -> ProgressState:
        return self.states[-1]


def test_lines_have_rate_bound_and_time_left(clock: Clock) -> None:
    out = io.StringIO()
    with Progress(tracker_of(1000), out=out) as progress:
        for second in range(71):
            # Ten seconds to start, then 8 images a second; the encoder mostly waits for decoded images.
            worked = max(0, second - 10)
            seconds = {"wait_s": 0.7 * worked, "encode_s": 0.2 * worked, "decode_s": 1.5 * worked}
            progress.update(Timings(media=8 * worked, span_s=worked, **seconds))
            clock(1)
    lines = [line[21:] for line in out.getvalue().splitlines()]
    assert lines[0] == "encode 0%  0/1,000  starting"
    assert lines[1] == "encode 4%  40/1,000  8/s  2 min 00 s left  bound by decode"
    assert lines[-1] == "encode 44%  440/1,000  8/s  1 min 10 s left  bound by decode"
    assert len(lines) == 7


def test_the_state_of_a_job(clock: Clock) -> None:
    seen = Seen()
    tracker = tracker_of(100)
    with Progress(tracker, on_progress=seen) as progress:
        for second in range(11):
            progress.update(Timings(media=2 * second, span_s=second, encode_s=second))
            if second == 5:
                settle(tracker, 0, 4, "failed")
            clock(1)
        assert seen.states[0] == ProgressState(
            done=0, total=100, rate=0.0, eta_s=None, bound="", failed=0
        )
        assert seen.states[3].eta_s is None, "there is no evidence yet"
        assert seen.last.done == 20 + 4 and seen.last.failed == 4 and seen.last.bound == "encode"
        assert seen.last.rate == pytest.approx(22 / 9)
        assert seen.last.eta_s == pytest.approx(76 / (22 / 9))
        settle(tracker, 4, 96, "ok")
    assert (seen.last.done, seen.last.eta_s) == (100, 0.0)
    assert len(seen.states) == 12, "once a second, and at the end"


def test_it_is_called_once_a_second(clock: Clock) -> None:
    seen = Seen()
    progress = JobProgress(
        "fetch", 100, lambda: Counts(done=1, worked=1, failed=0), on_progress=seen
    )
    for _ in range(81):
        progress.show()
        clock(0.0625)
    assert len(seen.states) == 6


def test_what_is_reused_is_no_part_of_the_rate(clock: Clock) -> None:
    """An interrupted job goes on: 600 sources are found in the space at once, then 2 are encoded a second."""
    seen = Seen()
    tracker = tracker_of(1000)
    with Progress(tracker, on_progress=seen) as progress:
        for second in range(4):
            settle(tracker, 150 * second, 150, "present")
            clock(1)
            progress.update(Timings(span_s=second + 1))
            assert (seen.last.done, seen.last.rate, seen.last.eta_s) == (
                150 * (second + 1),
                0,
                None,
            )
        for second in range(10):
            clock(1)
            progress.update(Timings(media=2 * (second + 1), span_s=5 + second, encode_s=1))
        assert (seen.last.done, seen.last.rate) == (620, pytest.approx(2))
        assert seen.last.eta_s == pytest.approx(190)


def test_a_job_that_encodes_nothing_has_a_time_too(clock: Clock) -> None:
    """Every file was touched, so each is read and hashed."""
    seen = Seen()
    tracker = tracker_of(1000)
    with Progress(tracker, on_progress=seen) as progress:
        for second in range(50):
            settle(tracker, 10 * second, 10, "present")
            clock(1)
            progress.update(Timings(span_s=second + 1, wait_s=second))
        assert seen.states[20].eta_s is None
        assert (seen.last.rate, seen.last.eta_s) == (0, pytest.approx(50))


def test_committed_items_count_once_and_nothing_goes_back(clock: Clock) -> None:
    seen = Seen()
    tracker = tracker_of(100)
    with Progress(tracker, on_progress=seen) as progress:
        progress.update(Timings(media=30, span_s=1))
        assert seen.last.done == 30
        settle(tracker, 0, 20, "ok")
        settle(tracker, 20, 5, "failed")
        clock(1)
        progress.update(Timings(media=30, span_s=2))
        assert (seen.last.done, seen.last.failed) == (35, 5)
        clock(1)
        progress.update(Timings(media=22, span_s=3))  # of a registrar that was started again
        assert seen.last.done == 35
        clock(1)
        progress.update(Timings(media=500, span_s=4))  # rows of dead workers were encoded twice
        assert seen.last.done == 100


def test_what_bounds_it_is_that_of_the_last_minute(clock: Clock) -> None:
    seen = Seen()
    with Progress(tracker_of(10_000), on_progress=seen) as progress:
        for second in range(200):
            # Downloads for 100 seconds; from then on the media are at hand.
            first, then = float(min(second, 100)), float(max(0, second - 100))
            timings = Timings(
                media=second,
                span_s=second,
                wait_s=first,
                download_s=first,
                decode_s=0.5 * second,
                encode_s=then,
            )
            progress.update(timings)
            clock(1)
    assert (seen.states[90].bound, seen.last.bound) == ("download", "encode")


@pytest.mark.parametrize("stage", ["download", "read", "decode", "encode", "write"])
def test_the_stage_that_takes_longest_bounds_a_job(stage: str) -> None:
    seconds = {"download_s": 0.1, "read_s": 0.1, "decode_s": 0.1, "encode_s": 0.1, "write_s": 0.1}
    wait_s = 0.0 if stage in ("encode", "write") else 3.0
    timings = Timings(**{**seconds, f"{stage}_s": 2.0}, wait_s=wait_s)
    assert timings.bound() == stage
    assert (timings + timings).since(timings) == timings


def test_each_node_has_a_line_and_a_rate(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, out = Seen(), io.StringIO()
    progress, printed = (
        Progress(tracker_of(1000), on_progress=seen),
        Progress(tracker_of(1000), out=out),
    )
    for second in range(11):
        rows = [
            NodeProgress(address="10.0.0.5", workers=8, done=16 * second),
            NodeProgress(address="10.0.0.12", workers=4, done=8 * second),
        ]
        if second > 8:
            rows.pop()  # it has left
        for one in (progress, printed):
            one.update_nodes(rows)
            one.update(Timings(media=24 * second, span_s=second))
        clock(1)
        if second == 8:
            both = seen.last.nodes
            assert [(node.address, node.workers, node.done) for node in both] == [
                ("10.0.0.5", 8, 128),
                ("10.0.0.12", 4, 64),
            ]
            assert [node.rate for node in both] == pytest.approx([16, 8])
            status = printed._status(seen.last, "")
            assert status.rows == (
                ("10.0.0.5", "8 workers", "16/s"),
                ("10.0.0.12", "4 workers", "8/s"),
            )
    assert [node.address for node in seen.last.nodes] == ["10.0.0.5"]
    assert "  2 nodes\n" in out.getvalue()


def test_the_only_node_has_no_line(clock: Clock) -> None:
    progress = Progress(tracker_of(10), out=io.StringIO())
    progress.update_nodes([NodeProgress(address="127.0.0.1", workers=2, done=0)])
    state = ProgressState(
        done=0, total=10, rate=0, eta_s=None, bound="", failed=0, nodes=progress._nodes
    )
    assert progress._status(state, "").rows == ()


def test_a_callback_that_fails_does_not_end_the_job(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def fail(state: ProgressState) -> None:
        calls.append(state)
        raise ZeroDivisionError("division\nby zero")

    with caplog.at_level(logging.WARNING), Progress(tracker_of(10), on_progress=fail) as progress:
        for second in range(5):
            progress.update(Timings(media=second, span_s=second))
            clock(1)
    assert len(calls) == 1
    assert caplog.messages == ["on_progress: division by zero; it is not called again"]


def test_an_interrupt_passes_through_the_callback(clock: Clock) -> None:
    def stop(_state: ProgressState) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Progress(tracker_of(10), on_progress=stop) as progress:
        progress.update(Timings(media=1, span_s=1))


def test_a_large_rate_is_no_power_of_ten(clock: Clock) -> None:
    out, tracker = io.StringIO(), tracker_of(1)
    tracker.total = 10_000_000
    with Progress(tracker, out=out) as progress:
        for second in range(8):
            timings = Timings(media=123_456 * second, span_s=second, clipped=7, encode_s=second)
            progress.update(timings)
            clock(1)
    line = out.getvalue().splitlines()[-1]
    assert re.search(
        r"  \d{3},\d{3}/10,000,000  123,456/s  1 min \d\d s left  bound by encode", line
    )
    assert line.endswith("  7 values clipped to float16")


def test_the_closing_line() -> None:
    timings = Timings(rows=30, encode_s=9.0, span_s=10.0)
    line = closing_line(encoded=30, reused=2, failed=1, seconds=14.0, timings=timings)
    assert line == "encoded=30 reused=2 failed=1 images/s=3.0 bound=encode seconds=14.0"
    assert failure_line({"fetch": 2, "decode": 1}, "cache") == (
        "failed   1 at decode, 2 at fetch; each with its reason: "
        "python -m cache.ls --failures --features cache"
    )
    assert failure_line({"fetch": 2}, "/my cache").endswith(" --features '/my cache'")


def test_the_seconds_of_each_stage() -> None:
    timings = Timings(read_s=1, decode_s=2, encode_s=3, wait_s=4, write_s=5)
    line = "read 1.0 s, decode 2.0 s (threads, added up); encode 3.0 s, waiting for input 4.0 s; write 5.0 s"
    assert stage_line(timings) == f"stages   {line}"
    assert stage_line(timings + Timings(download_s=6)) == f"stages   download 6.0 s, {line}"


def test_the_line_of_notes() -> None:
    line = note_line({"ends early": 1200, "HDR": 1}, "/my cache")
    command = "python -m cache.ls --notes --features '/my cache'"
    assert line == f"notes    1,200 ends early, 1 HDR; which media: {command}"
