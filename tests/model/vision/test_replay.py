"""Replaying: on a CPU the computation itself. What CUDA records is compared in tests/gpu/encoding.py.

run = Replay(tower)
blocks = run(x)
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.vision import replay
from model.vision.replay import Replay


def tower(x: Tensor) -> list[Tensor]:
    return [x + 1, 2 * x]


def test_a_cpu_runs_the_tower_itself() -> None:
    x = torch.randn(2, 3)
    run = Replay(tower)
    for _ in range(2):
        assert all(map(torch.equal, run(x), tower(x)))
    assert run._graph is None


def test_a_tower_that_cannot_be_recorded_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, recorded = Replay(tower), []

    def fail(_self: Replay, x: Any) -> None:
        recorded.append(x)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Replay, "_record", fail)
    monkeypatch.setattr(replay.torch.cuda, "synchronize", lambda _device: None)
    x = SimpleNamespace(device=SimpleNamespace(type="cuda"), shape=(1,), dtype=None)
    run._work = lambda given: [given]  # type: ignore[assignment]
    with caplog.at_level(logging.WARNING):
        assert run(x) == [x]  # type: ignore[arg-type]
        assert run(x) == [x]  # type: ignore[arg-type]
    assert len(recorded) == 1, "it is tried once"
    assert len(caplog.records) == 1
