"""Training in two processes: equal to one process, and ending together. Real torchrun, gloo, a tiny model.

torchrun --nproc-per-node 2 -m train.run -- --stage 1 --features cache
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cache.store.paths import CacheRoot
from model.io.saved_model import META
from tests.integration.train.distributed_child import Outcome, Scene
from tests.support import trained_runs
from tests.support.trained_runs import BASE, ENVIRONMENT, losses
from train.run import main
from train.stage import checkpoint, run_folder

STEPS = 24
WORDS = [
    *(*BASE, "--learning-rate", "1e-3", "--log-every", "10"),
    *("--max-steps", str(STEPS), "--save-every", "8", "--eval-every", "8"),
]
TWO = ["--batch-size", "5", "--max-tokens", "64", "--max-sequence-length", "64"]
SCARCE = ["--batch-size", "3", "--processes", "1"]
"""Three samples a step and trees of two samples: every other step has a single tree."""
TOLERANCE = 1e-6


def torchrun(*words: str) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*command, "--nproc-per-node", "2", "-m", words[0], "--", *words[1:]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> CacheRoot:
    return trained_runs.make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> CacheRoot:
    return trained_runs.make(tmp_path_factory.mktemp("broken"), 20, broken=11)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> CacheRoot:
    """Return a cache in which one bit of row 17 is flipped."""
    root = trained_runs.make(tmp_path_factory.mktemp("damaged"))
    files = [p for p in root.path.glob("spaces/*/features/image/**/*") if p.is_file()]
    shard = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[17 * (trained_runs.spec().row_bytes("image") + 4) + 5] ^= 4  # a checksum follows each row
    shard.write_bytes(data)
    return root


@pytest.fixture(scope="module")
def place(
    cache: CacheRoot,
    broken: CacheRoot,
    damaged: CacheRoot,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Path]:
    """Run every scene; return the folder with runs/one-* of one process and runs/two-* of two processes."""
    place = tmp_path_factory.mktemp("processes")
    words = [*WORDS, "--features", str(cache.path)]
    chain = [*words, *TWO, "--run", "two-chain", "--resume"]
    with contextlib.chdir(place):
        assert main([*words, *TWO, "--batch-size", "10", "--run", "one-whole"]) == 0
        assert main([*words, *SCARCE, "--run", "one-scarce"]) == 0
        scenes = [
            Scene(name="whole", words=[*words, *TWO, "--run", "two-whole"]),
            Scene(name="scarce", words=[*words, *SCARCE, "--run", "two-scarce"]),
            Scene(name="chain-a", words=chain, stop_after=8),
            Scene(name="chain-b", words=chain, stop_after=16, alone=True),
            Scene(name="chain-c", words=["--run", "two-chain", "--resume", *words[-2:]]),
            Scene(
                name="nan",
                words=[*words, "--run", "nan", "--held-out", "0", "--features", str(broken.path)],
            ),
            Scene(name="mistake", words=[*words, "--run", "x", "--space", "nothing"]),
            Scene(name="command", words=[*words, "--learning-rat", "1"]),
            Scene(name="help", words=["--help"]),
            Scene(name="busy", words=[*words, "--run", "busy"]),
            Scene(name="drift", words=[*words, "--run", "drift"], drifting=True),
            Scene(name="inspect", words=[*words, "--run", "inspect", "--inspect"]),
            Scene(
                name="damaged",
                words=[*WORDS, "--held-out", "0", "--features", str(damaged.path)],
                final=True,
            ),
        ]
        scene_file = place / "scenes.json"
        scene_file.write_text(json.dumps([asdict(scene) for scene in scenes]))
        with run_folder.lock(place / "runs" / "busy" / "stage1"):
            done = subprocess.run(
                torchrun("tests.integration.train.distributed_child", str(scene_file)),
                env=ENVIRONMENT,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
    assert done.returncode == 1, done.stderr  # the last scene ends with an error
    (place / "stderr").write_text(done.stderr)
    yield place


def outcomes(place: Path, name: str) -> list[Outcome]:
    return [
        Outcome(**json.loads(path.read_text())) for path in sorted(place.glob(f"{name}-[01].json"))
    ]


def run_of(place: Path, name: str) -> Path:
    return place / "runs" / name / "stage1"


# ---- equal training


@pytest.mark.parametrize("name", ["whole", "scarce"])
def test_two_processes_train_the_model_that_one_process_trains(place: Path, name: str) -> None:
    one, two = run_of(place, f"one-{name}"), run_of(place, f"two-{name}")
    assert [o.code for o in outcomes(place, name)] == [0, 0]
    assert len(losses(one)) == len(losses(two)) == STEPS
    assert losses(one)[-1] < losses(one)[0] - 0.5  # training lowers the loss
    assert losses(two) == pytest.approx(losses(one), rel=TOLERANCE)
    assert losses(two, "grad_norm") == pytest.approx(losses(one, "grad_norm"), rel=1e-4)
    assert losses(two, "held_out_loss") == pytest.approx(
        losses(one, "held_out_loss"), rel=TOLERANCE
    )
    for what in ("samples", "tokens", "step", "epoch", "lr", "held_out_samples"):
        assert losses(two, what) == losses(one, what), what
    weights = load_file(two / "final" / "model.safetensors")
    for key, expected in load_file(one / "final" / "model.safetensors").items():
        torch.testing.assert_close(weights[key], expected, rtol=1e-4, atol=1e-5)


def test_processes_may_have_different_numbers_of_micro_batches_or_none(place: Path) -> None:
    first, second = (o.parts for o in outcomes(place, "whole"))
    assert len(first) == len(second) == STEPS
    assert any(a != b for a, b in zip(first, second, strict=True))
    assert min(first) > 1  # several micro-batches in every step
    first, second = (o.parts for o in outcomes(place, "scarce"))
    assert 0 in second and 1 in second and 0 not in first


def test_a_run_of_two_processes_can_be_resumed_by_one_and_then_by_two(place: Path) -> None:
    assert [o.code for o in outcomes(place, "chain-a")] == [2, 2]
    assert [o.code for o in outcomes(place, "chain-b")] == [2]
    third = outcomes(place, "chain-c")
    assert [o.code for o in third] == [0, 0]
    assert "resuming after step 16" in third[0].out
    one, chain = run_of(place, "one-whole"), run_of(place, "two-chain")
    assert losses(chain) == pytest.approx(losses(one), rel=TOLERANCE)
    assert losses(chain, "held_out_loss") == pytest.approx(
        losses(one, "held_out_loss"), rel=TOLERANCE
    )
    assert losses(chain, "samples") == losses(one, "samples")


def test_only_the_main_process_prints(place: Path) -> None:
    main_process, other = outcomes(place, "whole")
    assert f"step {STEPS}/{STEPS}" in main_process.out and "held-out loss" in main_process.out
    assert "processes 2, each with its share" in main_process.out
    assert other.out == "" and other.err == ""
    main_process, other = outcomes(place, "inspect")
    assert "<|im_start|>assistant" in main_process.out
    assert other.out == ""
    main_process, other = outcomes(place, "help")
    assert "torchrun --nproc-per-node 4 -m train.run -- --stage 1" in main_process.out
    assert (main_process.code, other.code, other.out) == (0, 0, "")


# ---- ending together


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan", r"step \d+: the loss is nan; samples .*colors/11-.* Nothing was updated"),
        ("mistake", "no space 'nothing' under"),
        ("command", "nearest: --learning-rate"),
        ("busy", "another trainer is at work on this stage"),
        ("drift", r"process 1 has another model than process 0 \(\w{16}, not \w{16}\)"),
        ("chain-a", "stopped in step 9"),
    ],
)
def test_an_error_is_printed_once(place: Path, name: str, message: str) -> None:
    found = outcomes(place, name)
    assert [o.code for o in found] == [2, 2]
    lines = [line for o in found for line in o.err.splitlines()]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert re.search(message, lines[0])


def test_a_step_with_a_nan_changes_nothing(place: Path) -> None:
    folder = run_of(place, "nan")
    error = next(o.err for o in outcomes(place, "nan") if o.err)
    match = re.search(r"step (\d+)", error)
    assert match is not None
    assert len(losses(folder)) == int(match[1]) - 1
    for path in checkpoint.committed(folder / "checkpoints"):
        assert all(bool(t.isfinite().all()) for t in load_file(path / checkpoint.MODEL).values())
    assert not (run_of(place, "drift") / "metrics.jsonl").exists()


def test_damage_that_one_process_reads_ends_both(place: Path) -> None:
    """What a user sees: each process exits with 2, torchrun exits with 1 after a report of its own."""
    said = (place / "stderr").read_text()
    lines = [line for line in said.splitlines() if "error: " in line]
    assert len(lines) == 1 and "row 17 fails its checksum" in lines[0], said
    assert "failed (exitcode: 2)" in said
    assert said.count("Traceback (most recent call last)") == 1, said  # torchrun's


@pytest.mark.soak_counted
def test_interrupted_killed_and_resumed_training_equals_uninterrupted_training(
    cache: CacheRoot, tmp_path: Path, soak: Callable[[int, int], int]
) -> None:
    """Press Ctrl-C, then kill either process at random steps: both end soon, and resuming loses nothing."""
    rng = random.Random(time.time_ns())
    words = [*WORDS, "--features", str(cache.path), "--save-every", "2"]
    folder = run_of(tmp_path, "two")
    command = torchrun("train.run", *words, "--batch-size", "4", "--run", "two", "--resume")
    kills = soak(1, 20)
    for kill in range(1 + kills):
        aim = STEPS // 3 if kill == 0 else rng.randrange(STEPS * kill // kills)
        with subprocess.Popen(
            command,
            cwd=tmp_path,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as parent:
            ranks = wait_for_ranks(parent)
            while parent.poll() is None and len(losses(folder)) < aim:
                time.sleep(0.005)
            if kill == 0:
                for pid in (
                    *ranks,
                    parent.pid,
                ):  # as a terminal does; torchrun passes it on as well
                    os.kill(pid, signal.SIGINT)
            else:
                with contextlib.suppress(ProcessLookupError):  # it has ended already
                    os.kill(rng.choice(ranks), signal.SIGKILL)
            said, _ = parent.communicate(timeout=60)
        assert not any(alive(pid) for pid in ranks), said
        assert said.count("Traceback (most recent call last)") <= 1, said  # torchrun's
        if kill == 0:
            assert parent.returncode != 0
            ends = re.findall(
                r"^interrupted after step (\d+) of .*: (torchrun .*)$", said, re.MULTILINE
            )
            assert len(ends) == 1, said
            shown = shlex.split(ends[0][1])
            assert shown == [
                *["torchrun", "--nproc-per-node", "2", "-m", "train.run"],
                *command[8:],
            ]
            newest = checkpoint.newest(folder / "checkpoints")
            assert newest is not None and newest.name == f"step-{int(ends[0][0]):08d}"
            assert not (folder / "final" / META).exists()
    with contextlib.chdir(tmp_path):
        assert main(["--run", "two", "--resume", "--features", str(cache.path)]) == 0
        assert main([*words, "--batch-size", "8", "--run", "one"]) == 0
    assert losses(folder) == pytest.approx(losses(run_of(tmp_path, "one")), rel=TOLERANCE)


def wait_for_ranks(parent: subprocess.Popen[str]) -> list[int]:
    found: list[int] = []
    while parent.poll() is None and len(found) < 2:
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], stdout=subprocess.PIPE, text=True)
        pairs = [line.split() for line in listed.stdout.splitlines()]
        found = [int(pid) for pid, ppid in pairs if int(ppid) == parent.pid]
        time.sleep(0.05)
    return found


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False
