"""A server and fetchers for the tests of downloads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from encode.download.client import Fetcher
from tests.support.web_server import MakeFetcher, TroubleServer, quick_config


@pytest.fixture(scope="module")
def server() -> Iterator[TroubleServer]:
    with TroubleServer(photos=3) as one:
        yield one


@pytest.fixture
def fetcher() -> Iterator[MakeFetcher]:
    """Return a function that makes fetchers with quick limits, which are closed after the test."""
    with contextlib.ExitStack() as opened:

        def make(**changed: Any) -> Fetcher:
            return opened.enter_context(contextlib.closing(Fetcher(quick_config(**changed))))

        yield make
