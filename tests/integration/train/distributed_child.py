"""Several trainings in turn, started under torchrun by test_distributed.py, and what each process saw.

torchrun --standalone --nproc-per-node 2 -m tests.integration.train.distributed_child PLAN.json
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
from configs import UserError
from train import run, setup, step


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One training."""

    name: str
    """Of its outcomes."""
    words: list[str]
    """Command line."""
    alone: bool = False
    """Whether the first process does it alone."""
    stop_after: int | None = None
    """Steps after which every process stops with an error."""
    drifting: bool = False
    """Whether the second process starts with other weights."""
    final: bool = False
    """Whether the processes end as this training does, for torchrun to see."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one process saw of it."""

    code: int
    """Exit code."""
    out: str
    """Standard output."""
    err: str
    """Standard error."""
    parts: list[int]
    """Micro-batches of each step."""


def play(scene: Scene, rank: int) -> Outcome:
    """One training, as this process."""
    out, err, parts = io.StringIO(), io.StringIO(), list[int]()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        changed(scene, rank, parts),
    ):
        try:
            configs.command(lambda: run.main(scene.words))
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
    """The trainer with what the scene changes in it."""
    refuse, build = run.refuse_non_finite, setup.build_model

    class Counted(step.LocalStep):
        def reduce(self, *arguments: Any) -> step.StepTotals:
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
        mock.patch.object(run, "LocalStep", Counted),
        mock.patch.object(run, "refuse_non_finite", stop),
        mock.patch.object(setup, "build_model", drift),
    ):
        yield


def main() -> None:
    """All scenes; the processes wait for each other in between."""
    plan = Path(sys.argv[1])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for scene in (Scene(**values) for values in json.loads(plan.read_text())):
        if scene.final:
            configs.command(lambda words=scene.words: run.main(words))
        players = 1 if scene.alone else world
        if rank < players:
            told = plan.with_name(f"{scene.name}-{rank}.json")
            partial = told.with_suffix(".partial")
            partial.write_text(json.dumps(asdict(play(scene, rank))))
            partial.rename(told)
        while not all(plan.with_name(f"{scene.name}-{r}.json").exists() for r in range(players)):
            time.sleep(0.01)


if __name__ == "__main__":
    main()
