"""Train in several processes, for test_distributed.py, and save what each process printed.

python -m tests.integration.train.distributed_child SCENES.json
torchrun --nproc-per-node 2 -m tests.integration.train.distributed_child SCENES.json

The first form starts the processes itself, as copies of one that has imported everything, with the
environment variables that torchrun sets. So a scene imports nothing, and a process that ends has ended. Under
torchrun the scenes run in turn in its processes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import configs
from cache.errors import CacheError
from configs import UserError
from tests.support.trained_runs import ENVIRONMENT
from train import run, step, training
from train.distributed.group import ProcessGroup, process_group
from train.stage import setup, shards
from train.stage.saver import Saver

MODULE = "tests.integration.train.distributed_child"
LONGEST_S = 120
"""Most seconds of a scene."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One training, and what is changed in it."""

    name: str
    """Name of the files with its outcomes."""
    words: list[str]
    """The command line; or the name of a function of EXCHANGES, which runs instead."""
    processes: int = 2
    """How many processes take part."""
    a_machine: int = 0
    """How many of them are on one machine; 0: all."""
    stop_after: int | None = None
    """The step after which every process stops with an error."""
    killed_after: int | None = None
    """The step after which the last process ends without a word."""
    killed_writing: int | None = None
    """The number of steps whose checkpoint is being written when the last process ends without a word."""
    background: bool = False
    """Whether checkpoints are written while training goes on, as on a GPU."""
    exhausted_after: int | None = None
    """The step after which the last process asks for more memory than there is."""
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
    parts: list[list[list[int]]]
    """Of each step, of each micro-batch: its number of samples and of feature tokens."""


# ---- for the test


def run_scenes(
    folder: Path, scenes: Sequence[Scene], *launcher: str
) -> subprocess.CompletedProcess[str]:
    """Run scenes in `folder`, in processes of this module or of a launcher; outcomes are written there."""
    file = folder / "scenes.json"
    file.write_text(json.dumps([asdict(scene) for scene in scenes]))
    return subprocess.run(
        [*(launcher or (sys.executable, "-m")), MODULE, str(file)],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def outcomes(folder: Path, name: str) -> list[Outcome]:
    """Return the outcomes of a scene by rank, of the processes that reached their end."""
    files = sorted(folder.glob(f"{name}-[0-9].json"))
    return [Outcome(**json.loads(path.read_text())) for path in files]


# ---- a scene


def run_scene(scene: Scene, rank: int) -> Outcome:
    """Run one training in this process."""
    out, err, parts = io.StringIO(), io.StringIO(), list[list[list[int]]]()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        changed(scene, rank, parts),
    ):
        try:
            configs.command(lambda: command(scene), errors=(CacheError,))
        except SystemExit as stop:
            code = stop.code
    if isinstance(code, str):
        err.write(code)
        code = 1
    return Outcome(code=code or 0, out=out.getvalue(), err=err.getvalue(), parts=parts)


def command(scene: Scene) -> int:
    """Run what a scene names."""
    if scene.words[0] not in EXCHANGES:
        return run.main(scene.words)
    with process_group() as group:
        sys.stderr.write(json.dumps(EXCHANGES[scene.words[0]](group)))
    return 0


@contextlib.contextmanager
def changed(scene: Scene, rank: int, parts: list[list[list[int]]]) -> Iterator[None]:
    """Patch the trainer as the scene says, and record the micro-batches of each step."""
    refuse, build = training.refuse_non_finite, setup.build_model
    write_data = shards.Writer.write_data

    class Counted(step.LocalStep):
        def __init__(self) -> None:
            super().__init__()
            parts.append([])

        def add(self, micro: Any, loss: torch.Tensor) -> None:
            parts[-1].append([micro.samples, len(micro.order)])
            super().add(micro, loss)

    def stop(number: int, *arguments: Any) -> None:
        refuse(number, *arguments)
        if number == scene.stop_after:
            raise UserError(f"stopped in step {number + 1}")
        if number == scene.killed_after and rank == scene.processes - 1:
            os._exit(9)
        if number == scene.exhausted_after and rank == scene.processes - 1:
            torch.empty(1 << 55, dtype=torch.uint8)

    def write(writer: Any, *arguments: Any) -> Any:
        is_last = rank == scene.processes - 1
        if is_last and writer.folder.name.startswith(f"step-{scene.killed_writing or 0:08d}"):
            os._exit(9)
        return write_data(writer, *arguments)

    def saver(folder: Path, group: ProcessGroup, *, background: bool) -> Saver:
        return Saver(folder, group, background=background or scene.background)

    def drift(options: Any, *arguments: Any) -> Any:
        seed = options.seed + (rank if scene.drifting else 0)
        return build(replace(options, seed=seed), *arguments)

    with (
        mock.patch.object(step, "LocalStep", Counted),
        mock.patch.object(training, "refuse_non_finite", stop),
        mock.patch.object(setup, "build_model", drift),
        mock.patch.object(shards.Writer, "write_data", write),
        mock.patch.object(training, "Saver", saver),
    ):
        yield


# ---- exchanges without a training


def exchange(group: ProcessGroup) -> Any:
    """Exchange values of every kind; return what was received."""
    shared = group.gather_objects({"rank": group.rank, "text": "é" * 100 * group.rank})
    group.require_equal(lambda: {"samples": "abc", "step": 3})
    return [
        [len(value["text"]) for value in shared],
        group.broadcast(lambda: f"made by {group.rank}"),
        group.gather_objects(None),
        group.gather_numbers([group.rank, 0.5]),
    ]


def main_first(group: ProcessGroup) -> Any:
    """Return when this process had its turn."""
    with group.main_process_first():
        time.sleep(0.2 if group.is_main else 0)
        return time.monotonic()


def main_fails(group: ProcessGroup) -> Any:
    """Fail in the main process while the others wait for it."""
    with group.main_process_first():
        time.sleep(0.1)
        raise UserError("the disk is full")


def difference(group: ProcessGroup) -> Any:
    """Compare facts of which one process has another."""
    group.require_equal(lambda: {"samples": "abc", "step": 3 + (group.rank == 2)})


EXCHANGES: dict[str, Callable[[ProcessGroup], Any]] = {
    function.__name__: function for function in (exchange, main_first, main_fails, difference)
}


# ---- processes


def start(scene: Scene, port: int, folder: Path) -> list[int]:
    """Fork the processes of a scene; return their ids."""
    started = []
    a_machine = scene.a_machine or scene.processes
    for rank in range(scene.processes):
        if (process := os.fork()) == 0:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank % a_machine),
                WORLD_SIZE=str(scene.processes),
                LOCAL_WORLD_SIZE=str(a_machine),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
                TORCHELASTIC_USE_AGENT_STORE="True",
            )
            signal.alarm(LONGEST_S)  # ends the process, also if it waits for another one
            try:
                save(folder, scene, rank)
            except BaseException:
                traceback.print_exc()
            os._exit(0)
        started.append(process)
    return started


def save(folder: Path, scene: Scene, rank: int) -> None:
    """Run a scene and write its outcome."""
    outcome = folder / f"{scene.name}-{rank}.json"
    partial = outcome.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(run_scene(scene, rank))))
    partial.rename(outcome)


def serve() -> tuple[int, int]:
    """Start a process with the store that torchrun's agent would serve; return its id and port."""
    told, tell = os.pipe()
    if (process := os.fork()) == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(tell, str(store.port).encode())
        signal.alarm(LONGEST_S)
        signal.pause()
    port = int(os.read(told, 20))
    os.close(told)
    os.close(tell)
    return process, port


def main() -> None:
    """Run all scenes."""
    file = Path(sys.argv[1])
    scenes = [Scene(**values) for values in json.loads(file.read_text())]
    if (rank := os.environ.get("RANK")) is None:
        for scene in scenes:
            server, port = serve()
            for process in start(scene, port, file.parent):
                os.waitpid(process, 0)
            os.kill(server, signal.SIGKILL)
            os.waitpid(server, 0)
        return
    for scene in scenes:
        if scene.final:
            configs.command(lambda words=scene.words: run.main(words), errors=(CacheError,))
        save(file.parent, scene, int(rank))


if __name__ == "__main__":
    main()
