"""How many workers a job gets.

choose_layout("auto", None, device="auto", device_type="cuda", seconds=5000.0)      # one for each GPU
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from configs import UserError, hardware
from encode.driver import resources
from encode.driver.resources import WorkerLayout, choose_layout


def layout(workers: Any, threads: int | None, seconds: float, device: str = "auto") -> WorkerLayout:
    device_type = "cuda" if resources.gpus(device) else "cpu"
    if device != "auto":
        device_type = device.partition(":")[0]
    return choose_layout(workers, threads, device=device, device_type=device_type, seconds=seconds)


def test_the_quota_of_a_container_limits_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(hardware, "CPU_QUOTA", quota)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert resources.cores() == 16
    for text, cores in (
        ("max 100000\n", 16),
        ("400000 100000\n", 4),
        ("150000 100000\n", 2),
        ("1000 100000\n", 1),
        ("9900000 100000\n", 16),
        ("strange", 16),
    ):
        quota.write_text(text)
        assert resources.cores() == cores, text


def test_workers_and_threads_follow_from_cores_gpus_and_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resources, "cores", lambda: 16)
    monkeypatch.setattr("torch.get_num_threads", lambda: 16)
    monkeypatch.setattr(resources, "gpus", lambda device: 0)
    small, large = layout("auto", None, 5.0), layout("auto", None, 5000.0)
    assert (small.workers, small.torch_threads, small.decode_apart) == (0, 16, False)
    assert large.decode_apart and layout("auto", None, 20.0).decode_apart
    assert (large.workers, large.gpus, large.torch_threads, large.threads) == (2, 0, 8, 9)
    assert layout(5, 3, 1.0).threads == 3
    assert layout(5, None, 1.0).torch_threads == 3
    for one in ("cuda:1", "mps"):
        alone = layout("auto", None, 5000.0, one)
        assert (alone.workers, alone.gpus) == (1, 0)
    monkeypatch.setattr(resources, "gpus", lambda device: 4)
    four = layout("auto", None, 5000.0)
    assert (four.workers, four.gpus, four.threads) == (4, 1, 5)
    with pytest.raises(UserError, match="each worker needs a GPU, and there are 4"):
        layout(5, None, 5000.0)
