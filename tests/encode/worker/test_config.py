"""How long torch's threads spin before they sleep.

spin_briefly()      # GOMP_SPINCOUNT=1000, unless the user has said otherwise
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from encode.driver.ray_pool import RemoteWorker
from encode.worker.config import SPINS, spin_briefly


@pytest.mark.parametrize("called", [spin_briefly, RemoteWorker], ids=["a command", "an actor"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, str(SPINS)),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_threads_spin_briefly_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
    called: Callable[[], object],
    given: dict[str, str],
    expected: str | None,
) -> None:
    environment = {k: v for k, v in os.environ.items() if k[:4] not in ("GOMP", "OMP_")}
    monkeypatch.setattr(os, "environ", environment | given)
    called()
    assert os.environ.get("GOMP_SPINCOUNT") == expected
