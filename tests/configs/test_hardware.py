"""What a process learns of its machine, and memory that it keeps: freed buffers that it allocates again.

may_have_gpu()     # without importing torch
keep_memory()      # nothing, where the user has set MALLOC_...
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from configs import hardware
from encode.driver import ray_pool
from tests.support import ROOT

PROGRAM = """
import resource
from configs.hardware import keep_memory
{call}
def use():
    return [b"x" * (20 << 20) for _ in range(3)]
for _ in range(3):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
@pytest.mark.parametrize(
    ("call", "given", "keeps"),
    [
        ("keep_memory()", {}, True),
        ("", {}, False),
        ("keep_memory()", {"MALLOC_TRIM_THRESHOLD_": "131072"}, False),
    ],
)
def test_freed_buffers_are_used_again(call: str, given: dict[str, str], keeps: bool) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(call=call)],
        env=environment | given,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (int(done.stdout) < 1000) is keeps, done.stdout


def test_a_worker_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(ray_pool, "spin_briefly", lambda: calls.append("spin"))
    monkeypatch.setattr(ray_pool, "keep_memory", lambda: calls.append("keep"))
    ray_pool.RemoteWorker()
    assert calls == ["spin", "keep"]


@pytest.mark.parametrize(
    ("shown", "may"),
    [
        (("null", "tty", "nvram"), False),
        (
            ("null", "nvidiactl", "nvidia-uvm", "nvidia3"),
            True,
        ),  # a container with the fourth of eight
        (("dxg",), True),
        (("kfd", "dri"), True),
        ((), False),
    ],
)
def test_a_gpu_has_a_device_of_its_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: tuple[str, ...], may: bool
) -> None:
    for name in shown:
        (tmp_path / name).touch()
    monkeypatch.setattr(hardware, "DEVICES", tmp_path)
    assert hardware.may_have_gpu() is may
