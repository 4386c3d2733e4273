"""Memory that a process keeps: buffers that are freed and allocated again are no fresh pages of the system.

keep_memory()      # nothing, where the user has set MALLOC_...
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

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
