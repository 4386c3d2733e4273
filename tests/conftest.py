"""Fixtures every test may use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="proofs that count run at full count")


@pytest.fixture
def soak(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """`soak(few, many)` is how often a proof repeats: `few` in `make test`, `many` in `make soak`."""
    full = request.config.getoption("--soak")
    return lambda few, many: many if full else few


@pytest.fixture(autouse=True, scope="session")
def _two_threads() -> None:
    """Sums depend on the number of threads; every test sees the same one."""
    torch.set_num_threads(2)
