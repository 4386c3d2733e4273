"""Run code in a process of its own, as a user's script in a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import ROOT


@pytest.fixture
def in_process() -> Callable[..., tuple[int, str, str]]:
    """`in_process(folder, code)` runs a script in a folder and returns exit code, output and errors."""

    def run(folder: Path, code: str, name: str = "script.py") -> tuple[int, str, str]:
        (folder / name).write_text(code)
        done = subprocess.run(
            [sys.executable, name],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    return run
