"""What happens when something goes wrong: killed jobs, a flipped bit, another tower under the same name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from cache.store.paths import CacheRoot, SpacePaths
from tests.proof import training
from tests.proof.work import Line, Work, as_json, metrics

SAMPLES = 400
"""Questions whose drawings these tests encode, at most: two a drawing."""


def kills(work: Work) -> dict[str, Any]:
    """Kill an encode job three times and compare what it stores with an undisturbed one."""
    straight, killed = work.folder / "straight", work.folder / "killed"
    for folder in (straight, killed):
        shutil.rmtree(folder, ignore_errors=True)
    work.run("encode.run", flags(work, straight))
    count = 0
    for _ in range(3):
        before = _commits(killed)
        count += work.kill("encode.run", flags(work, killed), lambda b=before: _commits(killed) > b)
    rest = work.run("encode.run", flags(work, killed))
    hashes = [
        work.run("cache.verify", {"features": folder, "deep": True}).found(r"logical hash: (\w+)")
        for folder in (straight, killed)
    ]
    shutil.rmtree(killed)
    same = hashes[0] == hashes[1]
    left = rest.found(r"encoded=(\d+)")
    line = Line(
        "encode killed: logical hash",
        f"killed {count} times, {left} rows left to encode, {'same' if same else 'another'} hash",
        "3 kills, same hash",
        same and count == 3,
    )
    return {"lines": [as_json(line)]}


def flags(work: Work, features: Path) -> dict[str, Any]:
    """Return the options of these encode jobs: a shard each few drawings, so that there is much to kill."""
    few = {"commit_every_s": 1, "limit": SAMPLES}
    return {**training.encode_flags(work, ("train",), features), **few}


def _commits(features: Path) -> int:
    return sum(1 for _ in features.glob("spaces/*/commits/*.parquet"))


def damage(work: Work) -> dict[str, Any]:
    """Flip one bit of a stored row, and look for it; change one weight of the tower, and plan a job."""
    damaged = work.folder / "damaged-cache"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(work.folder / "straight", damaged)
    shard = max(_shards(damaged), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    found = work.run("cache.verify", {"features": damaged, "deep": True}, codes=(0, 1))
    shutil.rmtree(damaged)
    lines = [
        Line(
            "one bit of a shard flipped",
            "found" if found.code == 1 else "not found",
            "found",
            found.code == 1,
        ),
        other_weights(work),
    ]
    return {"lines": [as_json(line) for line in lines]}


def _shards(features: Path) -> list[Path]:
    [space] = CacheRoot(features).space_names()
    paths = SpacePaths(features / "spaces" / space)
    return [paths.shard("image", number) for number in paths.committed("image")]


def other_weights(work: Work) -> Line:
    """Change one weight of the tower, and see what an encode job into the same cache would reuse."""
    tower, other = (work.folder / "models" / name for name in ("tower", "tower-other"))
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(tower, other)
    tensors = load_file(other / "model.safetensors")
    name = "encoder.layer.4.mlp.fc1.weight"
    tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    config = work.folder / "nanomolmo2.yaml"
    values = json.loads(config.read_text(encoding="utf-8"))
    values["encoders"][training.ENCODER]["model"] = str(other.resolve())
    changed = work.folder / "other-weights.yaml"
    changed.write_text(json.dumps(values), encoding="utf-8")
    job = {**flags(work, work.folder / "straight"), "plan": True}
    reused = [
        int(work.run("encode.run", job | {"config": file}).found(r"(\d+) reused"))
        for file in (config, changed)
    ]
    shutil.rmtree(other)
    return Line(
        "one tower weight changed by 0.001: rows reused",
        f"{reused[1]} of {reused[0]}",
        "0",
        reused[1] == 0 < reused[0],
    )


def train_killed(work: Work, space: str, straight: list[float]) -> dict[str, Any]:
    """Kill a training, resume it, and compare its losses with those of the undisturbed run."""
    folder = work.folder / "train-killed"
    shutil.rmtree(folder, ignore_errors=True)
    every = max(1, len(straight) // 4)
    options = training.train_flags(
        work, "train-killed", 1, {**work.recipe["reference"], "connector": "linear"}, space
    ) | {"save_every": every}
    enough = 2 * every + 1
    stage = folder / "stage1"
    killed = work.kill("train.run", options, lambda: len(metrics(stage)) >= enough)
    work.run("train.run", options | {"resume": True})
    losses = [step["loss"] for step in metrics(stage)]
    shutil.rmtree(folder)
    off = max(abs(a - b) for a, b in zip(losses, straight, strict=True))
    line = Line(
        "train killed: losses of all steps",
        f"{'killed once' if killed else 'not killed'}, largest difference {off:.1e}",
        "0",
        killed and off == 0,
    )
    return {"lines": [as_json(line)]}
