"""Run several trainings in turn under torchrun, for test_distributed.py, and save what each process printed.

torchrun --standalone --nproc-per-node 2 -m tests.integration.train.distributed_child SCENES.json
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

import configs
from cache.errors import CacheError
from configs import UserError
from train import metrics, run, setup, step


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One training, and what is changed in it."""

    name: str
    """Name of the files with its outcomes."""
    words: list[str]
    """The command line."""
    alone: bool = False
    """Whether only the first process trains, as a single process."""
    stop_after: int | None = None
    """The step after which every process stops with an error."""
    drifting: bool = False
    """Whether the second process starts with different weights."""
    final: bool = False
    """Whether the processes exit as this training does, so that torchrun sees it."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one process printed and did."""

    code: int
    """The exit code."""
    out: str
    """Standard output."""
    err: str
    """Standard error."""
    parts: list[int]
    """Number of micro-batches of each step."""


def run_scene(scene: Scene, rank: int) -> Outcome:
    """Run one training in this process."""
    out, err, parts = io.StringIO(), io.StringIO(), list[int]()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        changed(scene, rank, parts),
    ):
        try:
            configs.command(lambda: run.main(scene.words), errors=(CacheError,))
        except SystemExit as stop:
            code = stop.code
    if isinstance(code, str):
        err.write(code)
        code = 1
    if dist.is_initialized():
        dist.destroy_process_group()
    return Outcome(code=code or 0, out=out.getvalue(), err=err.getvalue(), parts=parts)


@contextlib.contextmanager
def changed(scene: Scene, rank: int, parts: list[int]) -> Iterator[None]:
    """Patch the trainer as the scene says, and record the micro-batches of each step."""
    refuse, build = run.refuse_non_finite, setup.build_model

    class Counted(step.LocalStep):
        def reduce(self, *arguments: Any) -> metrics.StepTotals:
            parts.append(len(self.losses()))
            return super().reduce(*arguments)

    def stop(number: int, *arguments: Any) -> None:
        refuse(number, *arguments)
        if number == scene.stop_after:
            raise UserError(f"stopped in step {number + 1}")

    def drift(options: Any, *arguments: Any) -> Any:
        seed = options.seed + (rank if scene.drifting else 0)
        return build(replace(options, seed=seed), *arguments)

    environment = {"WORLD_SIZE": "1"} if scene.alone else {}
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(step, "LocalStep", Counted),
        mock.patch.object(run, "refuse_non_finite", stop),
        mock.patch.object(setup, "build_model", drift),
    ):
        yield


def main() -> None:
    """Run all scenes; the processes wait for each other after each one."""
    scenes = Path(sys.argv[1])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for scene in (Scene(**values) for values in json.loads(scenes.read_text())):
        if scene.final:
            configs.command(lambda words=scene.words: run.main(words), errors=(CacheError,))
        members = 1 if scene.alone else world
        if rank < members:
            outcome = scenes.with_name(f"{scene.name}-{rank}.json")
            partial = outcome.with_suffix(".partial")
            partial.write_text(json.dumps(asdict(run_scene(scene, rank))))
            partial.rename(outcome)
        while not all(scenes.with_name(f"{scene.name}-{r}.json").exists() for r in range(members)):
            time.sleep(0.01)


if __name__ == "__main__":
    main()
