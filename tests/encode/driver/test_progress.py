"""The lines that a job prints.

progress = Progress(tracker)
progress.update(timings)        # encode 400/1000  8/s  bound by decode  about 1 min 15 s left
"""

from __future__ import annotations

import io

import pytest

from encode.driver.progress import Progress, closing_line, failure_line, note_line
from encode.driver.tracker import Tracker
from encode.worker.messages import SourceTask, Timings


@pytest.mark.parametrize("terminal", [True, False])
def test_a_progress_line_has_rate_bound_and_time_left(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("encode.driver.progress.time.monotonic", lambda: clock[0])
    tasks = [SourceTask(source=str(i)) for i in range(1000)]
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: terminal)
    progress = Progress(Tracker(tasks, present=(), on_record=print), out=screen)
    for second in range(61):
        clock[0] = 100.0 + second
        # Ten seconds to start, then 8 images a second; the encoder mostly waits for decoded images.
        worked = max(0, second - 10)
        seconds = {"wait_s": 0.7 * worked, "encode_s": 0.2 * worked, "decode_s": 1.5 * worked}
        progress.update(Timings(media=8 * worked, span_s=worked, **seconds))
    progress.clear()
    if terminal:
        lines = screen.getvalue().split("\r\x1b[K")
        assert len(lines) == 60 + 2
        assert "\n" not in screen.getvalue()
        assert lines[-1] == ""
        lines.pop()
    else:
        lines = screen.getvalue().splitlines()
        assert len(lines) == 6
    assert lines[0 if not terminal else 5] == "encode 0/1000  starting"
    assert lines[-1] == "encode 400/1000  8/s  bound by decode  about 1 min 15 s left"


def test_the_closing_line() -> None:
    timings = Timings(rows=30, encode_s=9.0, span_s=10.0)
    line = closing_line(encoded=30, reused=2, failed=1, seconds=14.0, timings=timings)
    assert line == "encoded=30 reused=2 failed=1 images/s=3.0 bound=encode seconds=14.0"
    assert failure_line({"fetch": 2, "decode": 1}, "cache") == (
        "failed   1 at decode, 2 at fetch; each with its reason: "
        "python -m cache.ls --failures --features cache"
    )
    assert failure_line({"fetch": 2}, "/my cache").endswith(" --features '/my cache'")


def test_the_line_of_notes() -> None:
    line = note_line({"ends early": 1200, "HDR": 1}, "/my cache")
    command = "python -m cache.ls --notes --features '/my cache'"
    assert line == f"notes    1,200 ends early, 1 HDR; which media: {command}"
