"""Fixtures every test may use."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from types import ModuleType
from typing import Any

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("test", derandomize=True, deadline=None)
"""Equal code gives an equal result. New examples are drawn in `make soak`."""
hypothesis.settings.register_profile("soak", max_examples=1000, deadline=None)

LONG = (
    *("integration/encode/test_pixmo_kill", "integration/train/test_photos"),
    *("integration/encode/test_tables", "integration/encode/test_ray_pool"),
    *("integration/encode/test_cluster", "integration/encode/test_kill"),
    *("integration/train/test_distributed", "integration/train/test_run"),
    *("integration/encode/test_videos", "integration/encode/test_pixmo_web", "vision/test_encoder"),
    *("integration/model/test_tail", "train/stage/test_shards", "train/compare/test_compare"),
)
"""Files that take longest: first, so that two processes end at about one time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def order(item: pytest.Item) -> int:
        name = item.path.with_suffix("").as_posix()
        return next((i for i, long in enumerate(LONG) if name.endswith(long)), len(LONG))

    items.sort(key=order)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="proofs that count run at full count")


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("soak" if config.getoption("--soak") else "test")
    # Jobs do not record folders of media in the home of the person who runs the tests.
    state = tempfile.TemporaryDirectory(prefix="nm2-test-state-")
    os.environ["XDG_STATE_HOME"] = state.name
    config.add_cleanup(state.cleanup)
    # A shell starts commands in the background with Ctrl-C ignored, and commands under test would inherit it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def soak(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """`soak(few, many)` is how often a proof repeats: `few` in `make test`, `many` in `make soak`."""
    full = request.config.getoption("--soak")
    return lambda few, many: many if full else few


@pytest.fixture
def run_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[Any, str]]:
    """`run_command(module, *words)` returns what a command's `main` returns, and what it prints."""

    def run(module: ModuleType, *words: object) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
        return module.main(), capsys.readouterr().out

    return run


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Sums depend on the number of threads; every test, and every process it starts, sees the same one."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
