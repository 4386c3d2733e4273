"""A block of lines at the end of a terminal, read back from a window of a pseudo-terminal.

with Block(sys.stderr, lambda columns, lines: ["work  43%"]) as block:
    print("a line")             # above the block
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Sequence

import pytest

from configs.console import columns_of
from configs.terminal import Block, can_redraw, cut, has_colors, size_of
from configs.text import guard_streams
from tests.configs.screen import Terminal


class Lines:
    """What a block draws: the lines that a test sets, with the window's size."""

    def __init__(self, *lines: str) -> None:
        self.lines: Sequence[str] = lines

    def __call__(self, columns: int, lines: int) -> list[str]:
        return [line.replace("SIZE", f"{columns}x{lines}") for line in self.lines]


def test_output_is_printed_above_the_block(terminal: Terminal) -> None:
    lines = Lines("work   0%")
    with Block(sys.stderr, lines) as block:
        block.paint()
        print("one")
        print("two", "and", "a half", file=sys.stderr)
        lines.lines = ["work  43%"]
        block.paint()
        sys.stderr.writelines(["three\n", "four\n"])
        shown = terminal.screen()
        assert shown.text()[-1] == "work  43%"
        assert sum(line.startswith("work") for line in shown.text()) == 1
        assert shown.column == len("work  43%"), "the cursor waits behind the line"
    shown = terminal.screen()
    assert shown.fresh
    assert shown.text() == ["one", "two and a half", "three", "four"]
    print("five")
    assert terminal.screen().text()[-1] == "five"


def test_handlers_of_logs_that_were_made_before_print_above_it(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard_streams()
    logger, handler = logging.getLogger("tests.handlers"), logging.StreamHandler()
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "propagate", False)
    before = handler.stream
    with Block(sys.stderr, Lines("work")) as block:
        block.paint()
        logger.warning("one\x1b[2J")
        assert terminal.screen().text() == [r"one\x1b[2J", "work"], "the guard of the stream stays"
    assert handler.stream is before is sys.stderr


def test_a_line_that_is_not_complete_is_not_drawn_over(terminal: Terminal) -> None:
    with Block(sys.stderr, Lines("work")) as block:
        block.paint()
        print("half ", end="", flush=True)
        block.paint()
        assert terminal.screen().text() == ["half"]
        print("a line")
        assert terminal.screen().text() == ["half a line", "work"]


def test_a_block_of_several_lines_shrinks_and_grows(terminal: Terminal) -> None:
    lines = Lines("work", "  10.0.0.5", "  10.0.0.6", "  10.0.0.7")
    print("before")
    with Block(sys.stderr, lines) as block:
        for few in (4, 2, 3, 1, 4):
            lines.lines = ["work", "  10.0.0.5", "  10.0.0.6", "  10.0.0.7"][:few]
            block.paint()
            assert terminal.screen().text() == ["before", *lines.lines]
        print("above")
        assert terminal.screen().text() == ["before", "above", *lines.lines]
    assert terminal.screen().text() == ["before", "above"]


def test_it_is_drawn_at_the_end_of_a_full_window(terminal: Terminal) -> None:
    terminal.resize(20, lines=5)
    lines = Lines("work", "  a", "  b")
    with Block(sys.stderr, lines) as block:
        for number in range(12):
            print(f"line {number}")
            lines.lines = [f"work {number}", "  a", "  b"]
            block.paint()
    assert terminal.screen().text() == [f"line {number}" for number in range(12)]


def test_a_resized_window_is_drawn_anew_by_itself(terminal: Terminal) -> None:
    """Without a call: the program may compute for minutes. Nothing above is erased."""
    print("before")
    with Block(sys.stderr, Lines("SIZE")) as block:
        block.paint()
        assert terminal.screen().text() == ["before", "80x24"]
        terminal.resize(40, lines=10)
        assert terminal.read(timeout_s=20.0)
        assert terminal.screen().text() == ["before", "40x10"]
        assert not terminal.read(timeout_s=0.6), "nothing has changed, so nothing is written"


def test_what_others_write_to_the_terminal_is_not_erased(terminal: Terminal) -> None:
    lines = Lines("work 1", "  a", "  b")
    with Block(sys.stderr, lines) as block:
        block.paint()
        os.write(terminal.slave, b" a library's warning\n")
        lines.lines = ["work 2", "  a", "  b"]
        block.paint()
    assert terminal.screen().text() == ["work 1 a library's warning"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_an_error_leaves_the_last_lines_and_a_fresh_one(
    terminal: Terminal, error: type[BaseException]
) -> None:
    lines = Lines("work 1", "  a")
    before = sys.stdout, sys.stderr
    with pytest.raises(error), Block(sys.stderr, lines) as block:
        block.paint()
        lines.lines = ["work 2", "  a"]
        raise error
    shown = terminal.screen()
    assert shown.text() == ["work 2", "  a"] and shown.fresh
    assert (sys.stdout, sys.stderr) == before
    block.close()
    block.paint()
    assert not terminal.read()


def test_a_block_inside_another_draws_nothing(terminal: Terminal) -> None:
    with Block(sys.stderr, Lines("outer")) as outer:
        outer.paint()
        with Block(sys.stderr, Lines("inner")) as inner:
            inner.paint()
            print("a line")
            assert terminal.screen().text() == ["a line", "outer"]
        outer.paint()
        assert terminal.screen().text() == ["a line", "outer"]
    assert terminal.screen().fresh
    with Block(sys.stderr, Lines("next")) as following:
        following.paint()
        assert terminal.screen().text() == ["a line", "next"]


def test_a_terminal_that_is_gone_does_not_end_the_job(terminal: Terminal) -> None:
    lines, before = Lines("work 1"), sys.stderr
    with Block(sys.stderr, lines) as block:
        block.paint()
        os.close(terminal.master)
        lines.lines = ["work 2"]
        block.paint()
        block.paint()
    assert sys.stderr is before and Block._active is None


def test_output_to_a_file_does_not_pass_the_block(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    with Block(sys.stderr, Lines("work")) as block:
        block.paint()
        terminal.read()
        print("a result")
        assert sys.stdout is file and file.getvalue() == "a result\n"
        assert not terminal.read()


def test_a_forked_process_prints_without_the_lock(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Block(sys.stderr, Lines("work")) as block:
        block.paint()
        with monkeypatch.context() as forked:
            forked.setattr("configs.terminal.os.getpid", lambda: -1)
            forked.setattr(block, "_lock", None)  # held by a thread that does not exist here
            print(" from a child")
        block.paint()
        assert terminal.screen().text()[0] == "work from a child"


def test_a_program_in_the_background_draws_nothing_and_erases_nothing(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = Lines("work 1")
    with Block(sys.stderr, lines) as block:
        block.paint()
        with monkeypatch.context() as background:
            background.setattr("configs.terminal.os.tcgetpgrp", lambda _fd: os.getpgrp() + 1)
            os.write(terminal.slave, b"\n[1]+ Stopped\n$ ls")
            lines.lines = ["work 2"]
            block.paint()
            print(" a line", file=sys.stderr)
            assert terminal.screen().text() == ["work 1", "[1]+ Stopped", "$ ls a line"]
        block.paint()
        assert terminal.screen().text()[-1] == "work 2"


# ---- what the environment and the window say


@pytest.mark.parametrize(
    ("values", "redraw", "colors"),
    [
        ({}, True, True),
        ({"TERM": "dumb"}, False, False),
        ({"TERM": ""}, False, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"NO_COLOR": ""}, True, True),
        ({"FORCE_COLOR": "1", "TERM": "dumb"}, False, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, False),
        ({"FORCE_COLOR": "0", "TERM": "dumb"}, False, False),
    ],
)
def test_the_environment_decides(
    terminal: Terminal,
    environment: pytest.MonkeyPatch,
    values: dict[str, str],
    redraw: bool,
    colors: bool,
) -> None:
    for name, value in values.items():
        environment.setenv(name, value)
    assert (can_redraw(terminal.stream), has_colors(terminal.stream)) == (redraw, colors)
    assert not can_redraw(io.StringIO())
    assert has_colors(io.StringIO()) == ("FORCE_COLOR" in values and colors)


def test_the_size_of_a_window(terminal: Terminal, environment: pytest.MonkeyPatch) -> None:
    terminal.resize(100, lines=30)
    assert size_of(terminal.stream) == (100, 30)
    for text, columns in (("60", 60), ("200", 100), ("0", 100), ("x", 100), ("", 100), ("²", 100)):
        environment.setenv("COLUMNS", text)
        assert size_of(terminal.stream) == (columns, 30)
    terminal.resize(0, lines=0)  # as over a serial line
    environment.setenv("COLUMNS", "132")
    assert size_of(terminal.stream) == (132, 24)
    assert size_of(io.StringIO()) == (132, 24)
    environment.delenv("COLUMNS")
    assert size_of(io.StringIO()) == (80, 24)


def test_text_is_cut_by_its_columns() -> None:
    assert cut("10.0.0.5", 8) == "10.0.0.5" and cut("10.0.0.55", 8) == "10.0...."
    assert cut("写真写真写真", 12) == "写真写真写真" and cut("写真写真写真", 10) == "写真写..."
    for columns in range(14):
        assert columns_of(cut("写真 e\u0301te\u0301 写真", columns)) <= columns
