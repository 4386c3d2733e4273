"""Registers the tiny towers with open_clip, and keeps code from exported folders away from the user's."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from transformers import dynamic_module_utils

from tests.support import tiny_clip


@pytest.fixture(scope="session", autouse=True)
def _register_tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> None:
    tiny_clip.register(tmp_path_factory.mktemp("open_clip"))


@pytest.fixture(scope="session", autouse=True)
def _own_modules_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies the code of a folder to a place from which it imports it."""
    place = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", place)
        yield
