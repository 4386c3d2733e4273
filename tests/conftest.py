"""Fixtures every test may use."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

LONG = (
    *("test_pixmo_kill", "test_photographs", "test_encode_cluster", "test_encode_kill"),
    *("test_processes", "test_train_run", "test_encode_videos", "test_pixmo_web", "test_vision"),
)
"""Files that take longest: first, so that two processes end at about one time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"{name}.py": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="proofs that count run at full count")


@pytest.fixture
def soak(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """`soak(few, many)` is how often a proof repeats: `few` in `make test`, `many` in `make soak`."""
    full = request.config.getoption("--soak")
    return lambda few, many: many if full else few


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Sums depend on the number of threads; every test, and every process it starts, sees the same one."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
