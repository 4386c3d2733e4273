"""Registers the tiny towers with open_clip for every test of this folder."""

from __future__ import annotations

import pytest

from tests.support import tiny_clip


@pytest.fixture(scope="session", autouse=True)
def _register_tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> None:
    tiny_clip.register(tmp_path_factory.mktemp("open_clip"))
