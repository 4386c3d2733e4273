"""The memory of this process."""

from __future__ import annotations

from pathlib import Path


def memory_mb(field: str = "VmRSS") -> float:
    """Return this process's memory in MB: VmRSS now, VmHWM its peak, RssAnon without mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    return float("nan")
