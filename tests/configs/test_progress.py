"""A bar on a terminal, and lines with the time of day elsewhere.

with Meter("read", nbytes) as meter:
    meter.add(len(block))       # read  43% [=======>        ]  1.2 GB/2.8 GB  300 MB/s  5 s left
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.console import columns_of
from configs.progress import (
    Display,
    Meter,
    Pace,
    Status,
    bar_line,
    counted,
    log_line,
    number_text,
    rate_text,
    row_lines,
)
from tests.configs.screen import Terminal
from tests.support import ROOT

JOB = Status(
    share=0.43,
    count="2,150/5,000",
    rate="24.1/s",
    left="2 min 00 s left",
    bound="bound by decode",
    failed="3 failed",
    note="12 values clipped to float16",
)

REST = "  2,150/5,000  24.1/s  2 min 00 s left  bound by decode  3 failed"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """Return a function that lets seconds pass."""
    now = [1000.0]
    monkeypatch.setattr("configs.progress.time.monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    yield wait


# ---- the line


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (160, f"encode  43% [=================>                      ]{REST}  {JOB.note}"),
        (120, f"encode  43% [====>      ]{REST}  {JOB.note}"),
        (113, f"encode  43% [==============>                   ]{REST}"),
        (90, f"encode  43% [====>      ]{REST}"),
        (
            80,
            "encode  43%  2,150/5,000  24.1/s  2 min 00 s left  bound by decode  3 failed",
        ),
        (70, "encode  43%  2,150/5,000  2 min 00 s left  bound by decode  3 failed"),
        (60, "encode  43%  2 min 00 s left  bound by decode  3 failed"),
        (50, "encode  43%  2 min 00 s left  3 failed"),
        (30, "encode  43%  2 min 00 s left"),
        (12, "encode  43%"),
        (8, " 43%"),
        (2, " 4"),
    ],
)
def test_the_parts_that_matter_most_fit_any_window(columns: int, line: str) -> None:
    assert bar_line("encode", JOB, columns) == line


texts = st.text(st.sampled_from("ab 写e\u0301"), max_size=12)


@given(
    what=texts,
    status=st.builds(
        Status,
        share=st.none() | st.floats(0, 1.5),
        count=texts,
        rate=texts,
        left=texts,
        bound=texts,
        failed=texts,
        note=texts,
    ),
    columns=st.integers(0, 200),
)
def test_no_line_is_wider_than_its_window(what: str, status: Status, columns: int) -> None:
    line = bar_line(what, status, columns)
    assert columns_of(line) <= columns
    plain = re.sub(r"\x1b\[\d+m", "", bar_line(what, status, columns, colors=True))
    assert plain == line


def test_a_bar_is_full_only_at_the_end() -> None:
    def bar(share: float) -> str:
        return bar_line("x", Status(count="", share=share), 14)

    assert [bar(share) for share in (0, 0.5, 0.999, 1)] == [
        "x   0% [>    ]",
        "x  50% [==>  ]",
        "x  99% [====>]",
        "x 100% [=====]",
    ]
    assert bar(29 / 100).startswith("x  29%"), "0.29 * 100 is below 29"


def test_work_of_unknown_size_has_no_bar() -> None:
    status = Status(count="1,200", rate="300/s")
    assert bar_line("read photos", status, 80) == "read photos  1,200  300/s"
    assert log_line("read photos", status) == "read photos  1,200  300/s"


def test_rows_are_aligned_cut_and_counted() -> None:
    rows = [("10.0.0.5", "8 workers"), ("写真", "12 workers"), ("x\x1b[2J", "1 workers")]
    assert row_lines(rows, 80, 9) == [
        "  10.0.0.5  8 workers",
        "  写真      12 workers",
        r"  x\x1b[2J  1 workers",
    ]
    assert row_lines(rows, 14, 2) == ["  10.0.0.5 ...", "  and 2 more"]
    assert row_lines(rows, 80, 0) == row_lines([], 80, 5) == []


def test_rates() -> None:
    rates = (12345.6, 100, 99.94, 24.12, 0.333, 0.04)
    assert [rate_text(rate) for rate in rates] == [
        "12,346/s",
        "100/s",
        "99.9/s",
        "24.1/s",
        "0.333/s",
        "2.4/min",
    ]


# ---- the time that is left


def paced(*marks: tuple[float, float]) -> Pace:
    pace = Pace()
    for now, done in marks:
        pace.add(now, done)
    return pace


def test_nothing_is_foretold_before_there_is_evidence() -> None:
    assert Pace().seconds(10) is None
    assert paced((0, 0), (10, 0)).seconds(10) is None, "nothing is done"
    assert paced((0, 0), (10, 8)).seconds(10) is None, "one batch"
    assert paced((0, 0), (1, 8), (2, 16)).seconds(8) is None, "too early"
    assert paced((0, 0), (2, 8), (4, 16)).seconds(8) == 2


def test_what_was_done_at_the_start_is_no_part_of_the_rate() -> None:
    pace = paced((50, 4000), (52, 4010), (54, 4020))
    assert (pace.rate, pace.seconds(50)) == (5, 10)


def test_the_rate_is_that_of_the_last_minute() -> None:
    marks = [(float(s), 100.0 * s) for s in range(100)]
    marks += [(100.0 + s, 9900 + 5.0 * (s + 1)) for s in range(200)]
    pace = paced(*marks)
    assert pace.rate == pytest.approx(5)
    assert len(pace._marks) < 80, "it remembers the window alone"


def test_slow_batches_have_a_steady_rate() -> None:
    """8 images each 24 s, asked every second: what is left counts down, without a saw tooth."""
    pace, rates = Pace(), []
    for now in range(500):
        pace.add(now, now // 24 * 8)
        if now > 60:
            rates.append(pace.rate)
    assert min(rates) == pytest.approx(1 / 3) == max(rates)


def test_work_that_stops_gets_slower() -> None:
    pace = paced(*((float(s), 10.0 * s) for s in range(60)))
    assert pace.rate == 10
    pace.add(120, 590)
    assert pace.rate < 6
    pace.add(5000, 590)
    assert pace.rate < 0.2


# ---- lines where no bar can be drawn


def test_lines_have_the_time_and_growing_intervals(clock: Callable[[float], None]) -> None:
    out = io.StringIO()
    moments, total = [], 100_000
    with Display("encode", out=out) as display:
        for second in range(3600):
            clock(1)
            before = out.tell()
            display.update(Status(count=f"{second}/{total}", share=second / total))
            if out.tell() > before:
                moments.append(second + 1)
    assert moments[:7] == [5, 15, 35, 75, 135, 195, 255]
    assert len(moments) == 62
    for line in out.getvalue().splitlines():
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  encode \d%  \d+/100000", line)
    assert "\r" not in out.getvalue() and "\x1b" not in out.getvalue()


def test_a_line_is_printed_at_each_twentieth_of_the_work(clock: Callable[[float], None]) -> None:
    out = io.StringIO()
    with Display("encode", out=out) as display:
        for percent in range(101):
            clock(11)
            display.update(Status(count="", share=percent / 100))
    shares = [int(found) for found in re.findall(r"encode (\d+)%", out.getvalue())]
    assert shares == [0, 1, 3, 5, 9, *range(10, 101, 5)]


def test_a_short_command_prints_nothing(clock: Callable[[float], None]) -> None:
    out = io.StringIO()
    with Meter("read", 1000, out=out) as meter:
        for _ in range(20):
            clock(0.2)
            meter.add(50)
    assert out.getvalue() == ""
    assert meter.total_text() == "read 1 kB in 4.0 s: 250 B/s"


def test_a_meter_counts_bytes_or_items(clock: Callable[[float], None]) -> None:
    out = io.StringIO()
    with Meter("read", 4_000_000, out=out) as meter:
        for _ in range(6):
            clock(1)
            meter.add(250_000)
    assert out.getvalue().endswith("  read 31%  1.25 MB/4 MB  250 kB/s  11 s left\n")
    out = io.StringIO()
    with Meter("read photos", None, text=number_text, out=out) as meter:
        taken = 0
        for _ in counted(range(100_000), meter):
            taken += 1
            clock(0.0005)
    assert taken == 100_000
    first = out.getvalue().splitlines()[0]
    assert re.search(r"  read photos  10,\d{3}  2,0\d\d/s$", first)


def test_nothing_to_do_and_more_than_expected_are_no_error(clock: Callable[[float], None]) -> None:
    for total, amount in ((0, 0), (10, 30)):
        out = io.StringIO()
        with Meter("read", total, out=out) as meter:
            for _ in range(6):
                clock(1)
                meter.add(amount)
        assert out.getvalue().count("\n") == 1
    assert "read 100%  " in out.getvalue() and out.getvalue().endswith("  under a second left\n")


def test_threads_may_count(clock: Callable[[float], None]) -> None:
    with Meter("read", 8000, text=number_text, out=io.StringIO()) as meter:
        threads = [
            threading.Thread(target=lambda: [meter.add(1) for _ in range(1000)]) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert meter.total_text().startswith("read 8,000 in ")


@pytest.mark.parametrize("stream", [None, "closed", "closed before"])
def test_a_process_without_standard_error_works(
    stream: str | None, monkeypatch: pytest.MonkeyPatch, clock: Callable[[float], None]
) -> None:
    out = None
    if stream:
        out = io.TextIOWrapper(io.BytesIO())
        if stream == "closed before":
            out.close()
    monkeypatch.setattr(sys, "stderr", out)
    with Meter("read", 100) as meter:
        if out is not None:
            out.close()
        clock(10)
        meter.add(50)


def test_forced_colors_reach_a_file_and_no_cursor_movement_does(
    environment: pytest.MonkeyPatch, clock: Callable[[float], None]
) -> None:
    for name, value, sequences in (("FORCE_COLOR", "1", 4), ("NO_COLOR", "1", 0)):
        environment.setenv(name, value)
        out = io.StringIO()
        with Display("encode", out=out) as display:
            clock(6)
            display.update(JOB)
        assert len(re.findall(r"\x1b\[\d+m", out.getvalue())) == sequences
        assert "\r" not in out.getvalue()
        assert re.sub(r"\x1b\[\d+m", "", out.getvalue())[21:] == log_line("encode", JOB) + "\n"


# ---- a bar on a terminal


def test_a_bar_fits_the_window_after_each_change(terminal: Terminal) -> None:
    print("plan")
    with Display("encode") as display:
        display.update(JOB)
        for columns in (100, 81, 60, 30, 9, 140):
            terminal.resize(columns)
            display.paint()
            assert terminal.screen().text() == [
                "plan",
                bar_line("encode", JOB, columns - 1).rstrip(),
            ]
    assert terminal.screen().text() == ["plan"]


def test_a_window_that_wraps_the_old_bar_loses_no_line_above(terminal: Terminal) -> None:
    """A piece of the old bar stays. To erase it, one would have to know that this terminal wraps."""
    print("plan")
    with Display("encode") as display:
        display.update(JOB)
        display.paint()
        terminal.resize(40, wraps=True)
        display.paint()
        plan, piece, bar = terminal.screen().text()
        assert (plan, piece) == ("plan", "encode  43%  2,150/5,000  24.1/s  2 min")
        assert bar == bar_line("encode", JOB, 39)
    assert terminal.screen().fresh


def test_rows_are_below_the_bar_as_far_as_they_fit(terminal: Terminal) -> None:
    rows = tuple((f"10.0.0.{node}", "8 workers", "16.2/s") for node in range(30))
    with Display("encode") as display:
        display.update(Status(count="1/2", share=0.5, rows=rows))
        display.paint()
        terminal.screen()
        text = terminal.screen().text()
        assert len(text) == 23 and text[1] == "  10.0.0.0   8 workers  16.2/s"
        assert text[-1] == "  and 9 more"
        terminal.resize(80, lines=2)
        display.paint()
    assert terminal.screen().fresh


@pytest.mark.parametrize("name", ["NO_COLOR", ""])
def test_colors_are_left_out_when_nobody_wants_them(
    terminal: Terminal, environment: pytest.MonkeyPatch, name: str
) -> None:
    if name:
        environment.setenv(name, "1")
    with Display("encode") as display:
        display.update(JOB)
        display.paint()
        shown = terminal.screen()
    assert bool(shown.colors) == (not name)
    assert shown.text() == [
        "encode  43%  2,150/5,000  24.1/s  2 min 00 s left  bound by decode  3 failed"
    ]


def test_a_dumb_terminal_gets_lines(
    terminal: Terminal, environment: pytest.MonkeyPatch, clock: Callable[[float], None]
) -> None:
    environment.setenv("TERM", "dumb")
    with Meter("read", 100) as meter:
        clock(10)
        meter.add(50)
    (line,) = terminal.screen().text()
    assert line[19:] == "  read 50%  50 B/100 B  5 B/s"
    assert "\x1b" not in terminal.output and "\r" not in terminal.output.replace("\r\n", "\n")


def test_a_command_of_half_a_second_shows_no_bar(
    terminal: Terminal, environment: pytest.MonkeyPatch
) -> None:
    environment.setattr("configs.progress.FIRST_BAR_S", 60.0)
    with Display("read") as display:
        display.update(JOB)
        display.paint()
        print("a line")
    assert terminal.screen().text() == ["a line"] and "read" not in terminal.output


PROGRAM = """
import fcntl, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # its signals are for this process
import configs
from configs.progress import Meter
from configs.signals import Interrupts

def at_once():
    with Meter("read", 10**6) as meter:
        while True:
            meter.add(1)
            time.sleep(0.02)

def in_order():
    with Interrupts("stopping\\n") as interrupts, Meter("read", 10**6) as meter:
        while not interrupts.stopping():
            meter.add(1)
            time.sleep(0.02)
        time.sleep(0.6)  # to commit
        meter.add(1)
    print("12 are kept")
    return interrupts.exit_code

configs.command(globals()[sys.argv[1]])
"""


def interrupted(kind: str) -> list[str]:
    """Return what is on the terminal of a program after Ctrl-C."""
    with Terminal(columns=120) as terminal:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, kind],
            stdin=terminal.slave,
            stdout=terminal.slave,
            stderr=terminal.slave,
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "", "NO_COLOR": "1"},
            start_new_session=True,
        )
        deadline = time.monotonic() + 60
        while "/s" not in terminal.output and time.monotonic() < deadline:
            terminal.read(timeout_s=0.1)
        os.write(terminal.master, b"\x03")  # the terminal makes a signal of it
        while process.poll() is None and time.monotonic() < deadline:
            terminal.read(timeout_s=0.1)
        assert process.wait(timeout=10) == 130
        shown = terminal.screen()
    assert shown.fresh
    return shown.text()


def test_ctrl_c_leaves_the_bar_and_a_fresh_line() -> None:
    *_, bar, said = interrupted("at_once")
    assert said == "interrupted" and re.match(r"read   0% \[>.*  \d+ B/1 MB  \d+ B/s", bar)


def test_a_job_that_ends_in_order_erases_its_bar() -> None:
    *_, bar, stopping, kept = interrupted("in_order")
    assert (stopping, kept) == ("stopping", "12 are kept")
    assert bar.startswith("read   0% [>") and bar.endswith("^C"), "where the terminal wrote into it"
