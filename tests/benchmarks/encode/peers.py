"""Other libraries that encode the same photographs, decoded the same way, with the same tower.

Each runs `peer_loops.py` in its own process. Those of them that are not installed are left out:

    pip install -e '.[bench]'
    pip install --no-deps clip-retrieval     # of what it depends on, a package no longer builds
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from model.vision.config import EncoderConfig
from tests.benchmarks.encode.jobs import Photos, Speed
from tests.benchmarks.encode.peer_loops import BATCH
from tests.support import ROOT

PEERS = {
    "dataloader": "DataLoader loop that saves .npy",
    "datasets": "datasets.map",
    "datasets_processes": "datasets.map, a process a core",
    "ray_data": "Ray Data map_batches",
    "clip_retrieval": "clip-retrieval's inference",
}
"""Function of peer_loops.py -> what it is."""


def available(photos: Photos, config: EncoderConfig) -> dict[str, Callable[[], Speed]]:
    """Return the peers that are installed, after printing which are not."""
    found: dict[str, Callable[[], Speed]] = {}
    for peer, name in PEERS.items():
        done = _run(peer)
        if done.returncode == 0:
            found[name] = partial(measure, peer, photos, config)
        else:
            why = done.stderr.strip().splitlines()[-1:] or ["no reason"]
            print(f"{name}: not installed ({why[0]})", flush=True)
    return found


def measure(peer: str, photos: Photos, config: EncoderConfig) -> Speed:
    """Run a peer on a batch, on the short and on the long list.

    What a process does once, such as to start threads and to get memory, happens with the batch. In the short
    list it would make the slope from there to the long one too small, by half a second of 17.

    Raises:
        SystemExit: it failed.
    """
    first = photos.short[:BATCH]
    job = {
        "first": [str(path) for path in first],
        "short": [str(path) for path in photos.short],
        "long": [str(path) for path in photos.long],
        "folder": str(photos.folder / "peer"),
        "encoder": asdict(config),
    }
    done = _run(peer, json.dumps(job))
    if done.returncode:
        raise SystemExit(f"{peer}: {done.stderr}")
    taken = json.loads(done.stdout.splitlines()[-1])
    speed = Speed.of((len(photos.short), taken["short"]), (len(photos.long), taken["long"]))
    return replace(speed, start_s=taken["first"] - len(first) * speed.image_s)


def _run(peer: str, job: str = "") -> subprocess.CompletedProcess[str]:
    script = Path(__file__).with_name("peer_loops.py")
    return subprocess.run(
        [sys.executable, str(script), peer],
        input=job,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
