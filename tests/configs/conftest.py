"""A terminal for the tests of what is drawn on one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.configs.screen import Terminal


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that says nothing about terminals but TERM."""
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return monkeypatch


@pytest.fixture
def terminal(environment: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """A terminal of 80 columns, which is standard output and standard error of the test."""
    environment.setattr("configs.progress.FIRST_BAR_S", 0.0)
    with Terminal() as terminal:
        yield terminal


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    # Not in the fixture: pytest sets its own streams when the test itself begins.
    with contextlib.ExitStack() as streams:
        if isinstance(terminal := pyfuncitem.funcargs.get("terminal"), Terminal):
            streams.enter_context(contextlib.redirect_stdout(terminal.stream))
            streams.enter_context(contextlib.redirect_stderr(terminal.stream))
        return (yield)
