"""No command writes, reads or waits outside a cache that a stranger has changed, whatever was changed.

python -m tests.integration.strangers.run FOLDER --first 17 --count 1 --show    # one pair again
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT

FAILURES_SHOWN = 5


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory, where the system has one: thousands of caches are copied to it."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)


def run(folder: Path, first: int, count: int) -> list[dict[str, Any]]:
    """Return the results of some pairs, two processes in `make soak`."""
    processes = []
    shares = 2 if count > 1000 else 1
    for share in range(shares):
        start, end = (first + count * n // shares for n in (share, share + 1))
        words = [str(folder / str(share)), "--first", str(start), "--count", str(end - start)]
        (folder / str(share)).mkdir()
        with (
            (folder / f"{share}.jsonl").open("w") as out,
            (folder / f"{share}.err").open("w") as err,
        ):
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.integration.strangers.run", *words],
                    stdout=out,
                    stderr=err,
                    cwd=ROOT,
                    env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                )
            )
    results = []
    try:
        for share, process in enumerate(processes):
            assert process.wait() == 0, (folder / f"{share}.err").read_text()[-4000:]
            results += list(map(json.loads, (folder / f"{share}.jsonl").read_text().splitlines()))
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    return results


@pytest.mark.soak_counted
def test_commands_on_caches_that_a_stranger_changed(
    folder: Path, soak: Callable[[int, int], int]
) -> None:
    count = soak(40, 5000)
    results = run(folder, 0, count)
    assert len(results) == count
    codes = Counter(result["code"] for result in results)
    print(f"{count:,} pairs: exit codes {dict(sorted(codes.items()))}")
    wrong = [result for result in results if result["wrong"]]
    assert not wrong, f"{len(wrong)} pairs; the first:\n" + "\n".join(
        json.dumps(result, indent=1) for result in wrong[:FAILURES_SHOWN]
    )
    assert codes[0] > count / 20 and codes[2] > count / 20  # neither all refused nor all unnoticed
