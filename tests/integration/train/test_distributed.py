"""Training in several processes: equal to one process, and ending together. Real FSDP2, gloo, a tiny model.

torchrun --nproc-per-node 4 -m train.run -- --stage 1 --features cache --shard full
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cache.store.paths import CacheRoot
from cache.store.samples import Sample, write_samples
from model.io.run_files import META
from tests.integration.train.distributed_child import EXCHANGES, Scene, outcomes, run_scenes
from tests.support import trained_runs
from tests.support.spaces import tail_arrays, tail_of
from tests.support.trained_runs import BASE, ENVIRONMENT, losses
from train.run import main
from train.stage import checkpoint, run_folder

STEPS = 24
WORDS = [
    *(*BASE, "--learning-rate", "1e-3", "--log-every", "10"),
    *("--max-steps", str(STEPS), "--save-every", "8", "--eval-every", "8"),
]
TWO = ["--batch-size", "5", "--max-tokens", "64", "--max-sequence-length", "64"]
WHOLE = ["--batch-size", "10", "--processes", "1"]
MIX = [
    *("--datasets", "colors=0.3,films=0.2,texts=0.5", "--batch-size", "4", "--processes", "1"),
    *("--max-tokens", "80", "--max-sequence-length", "80", "--held-out", "0.2"),
    *("--max-steps", "12", "--eval-every", "12", "--save-every", "12"),
    "--use-gradient-checkpointing",
]
"""Four samples a step: trees of an image and its two samples, clips, texts without media."""
FEW = ["--max-steps", "4", "--eval-every", "0", "--max-tokens", "256"]
HIGH = [
    *("--learning-rate", "1e12", "--connector-learning-rate", "1e12", "--warmup-steps", "0"),
    *("--connector-warmup-steps", "0", "--save-every", "1"),
]
"""The first checkpoint is finite, but no rate trains it further."""
SHARED = {
    "none-4": Scene(name="none-4", words=["--shard", "none"], processes=4),
    "full-4": Scene(name="full-4", words=["--shard", "full"], processes=4),
    "node-4": Scene(name="node-4", words=["--shard", "node"], processes=4, a_machine=2),
    "offload-2": Scene(name="offload-2", words=["--shard", "full", "--offload"]),
    "offload-1": Scene(name="offload-1", words=["--offload"], processes=1),
}
"""Trainings that have to equal that of one process without --offload."""
MEMORY = (
    r"out of memory \(\[enforce fail .*/step-00000002 is kept\. These need less memory, in this "
    r"order: --max-tokens 128, --use-gradient-checkpointing, --shard full; in another run, --lora "
    r"16\. Go on with: torchrun --nproc-per-node 2 -m train\.run -- .*checkpointing --resume$"
)
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
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the command line of a training on images, clips and texts."""
    folder = tmp_path_factory.mktemp("mixed")
    root = trained_runs.make(folder, 24)
    trained_runs.film(folder, 12)
    write_texts(root)
    return [*WORDS, *MIX, "--features", str(root.path)]


def write_texts(root: CacheRoot) -> None:
    """Add the data set `texts`, without media."""
    asked = [
        Sample(id=f"{i}", dataset="texts", messages=trained_runs.turns("Name a colour.", color))
        for i, color in enumerate([*trained_runs.COLORS] * 6)
    ]
    write_samples(root, "texts", asked)


@pytest.fixture(scope="module")
def tailed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the command line of a training on images and texts, with two blocks behind what is stored."""
    folder = tmp_path_factory.mktemp("tailed")
    tail, data = tail_of(pool_image=2)
    root = trained_runs.make(folder, 24, tail_file=data, pool_frame=1, tail=tail)
    write_texts(root)
    mix = ["--datasets", "colors=0.5,texts=0.5", "--max-steps", "6"]
    blocks = ["--train-vision-blocks", "1", "--vision-learning-rate", "1e-3"]
    return [*WORDS, *MIX, *mix, *blocks, "--features", str(root.path)]


@pytest.fixture(scope="module")
def place(
    cache: CacheRoot,
    mixed: list[str],
    tailed: list[str],
    broken: CacheRoot,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Path:
    """Run every scene; return the folder with runs/one-* of one process and the others of several."""
    place = tmp_path_factory.mktemp("processes")
    words = [*WORDS, "--features", str(cache.path)]
    chain = [*words, *TWO, "--run", "two-chain", "--resume"]
    with contextlib.chdir(place):
        assert main([*words, *TWO, *WHOLE, "--run", "one-whole"]) == 0
        assert main([*mixed, "--run", "one-mixed"]) == 0
        assert main([*mixed, "--lora", "4", "--run", "one-lora"]) == 0
        assert main([*tailed, "--run", "one-tail"]) == 0
        scenes = [
            *(
                replace(scene, words=[*mixed, *scene.words, "--run", name])
                for name, scene in SHARED.items()
            ),
            Scene(name="lora", words=[*mixed, "--lora", "4", "--shard", "full", "--run", "lora"]),
            *(Scene(name=n, words=[n], processes=3) for n in EXCHANGES),
            Scene(name="tail", words=[*tailed, "--shard", "full", "--run", "two-tail"]),
            Scene(
                name="whole",
                words=[*words, *TWO, *WHOLE, "--shard", "full", "--run", "four-whole"],
                processes=4,
            ),
            Scene(name="chain-a", words=[*chain, "--shard", "full"], stop_after=8),
            Scene(name="chain-b", words=chain, stop_after=16, processes=1),
            Scene(name="chain-c", words=["--run", "two-chain", "--resume", *words[-2:]]),
            *killed_scenes(mixed, "offload-2", 2),
            *(killed_scenes(mixed, "node-4", 10) if request.config.getoption("--soak") else []),
            Scene(name="gone", words=[*words, "--run", "gone", "--shard", "full"], killed_after=2),
            Scene(
                name="nan",
                words=[*words, "--run", "nan", "--held-out", "0", "--features", str(broken.path)],
            ),
            Scene(
                name="memory",
                words=[*words, *TWO, "--run", "memory", "--save-every", "2", *FEW],
                exhausted_after=2,
            ),
            Scene(name="diverged", words=[*words, "--run", "diverged", "--shard", "full", *HIGH]),
            Scene(name="mistake", words=[*words, "--run", "x", "--space", "nothing"]),
            Scene(name="command", words=[*words, "--learning-rat", "1"]),
            Scene(name="help", words=["--help"]),
            Scene(name="busy", words=[*words, "--run", "busy"]),
            Scene(name="drift", words=[*words, "--run", "drift"], drifting=True),
            Scene(name="inspect", words=[*words, "--run", "inspect", "--inspect"]),
        ]
        with run_folder.lock(place / "runs" / "busy" / "stage1"):
            done = run_scenes(place, scenes)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    return place


def killed_scenes(words: list[str], like: str, kills: int) -> list[Scene]:
    """Return trainings of one run that are killed at random steps, in turn while a checkpoint is written."""
    steps = sorted(random.Random(time.time_ns()).sample(range(1, 12), kills))
    ends = [{("killed_after", "killed_writing")[i % 2]: step} for i, step in enumerate(steps)]
    whole = SHARED[like]
    words = [*words, *whole.words, "--run", f"killed-{like}", "--resume", "--save-every", "1"]
    return [
        replace(whole, name=f"killed-{like}-{i}", words=words, background=True, **end)
        for i, end in enumerate([*ends, {}])
    ]


def run_of(place: Path, name: str) -> Path:
    return place / "runs" / name / "stage1"


# ---- equal training


@pytest.mark.parametrize("name", SHARED)
def test_several_processes_train_the_model_that_one_process_trains(place: Path, name: str) -> None:
    """On trees, clips and texts, with steps of text alone and processes that are dealt nothing."""
    one, several = run_of(place, "one-mixed"), run_of(place, name)
    found = outcomes(place, name)
    assert [o.code for o in found] == [0] * SHARED[name].processes, found
    assert_equal_trainings(one, several)
    if SHARED[name].processes == 1:
        assert losses(several) == losses(one)  # to the bit
    steps = [list(zip(*step, strict=True)) for step in zip(*(o.parts for o in found), strict=True)]
    assert len(steps) == 12
    for micro_batches in steps:  # equally many in every process, and not all of them empty
        assert all(any(samples for samples, _ in same) for same in micro_batches)


def test_adapters_are_trained_in_parts_and_saved_whole(place: Path) -> None:
    one, several = run_of(place, "one-lora"), run_of(place, "lora")
    assert [o.code for o in outcomes(place, "lora")] == [0, 0]
    assert (one / "final/adapter_model.safetensors").exists()
    assert_equal_trainings(one, several)


def test_the_encoders_last_blocks_are_shared_as_the_rest(place: Path) -> None:
    """With steps in which a process has no image, and so nothing for these blocks."""
    one, two = run_of(place, "one-tail"), run_of(place, "two-tail")
    found = outcomes(place, "tail")
    assert [o.code for o in found] == [0, 0], found
    assert any(tokens == 0 for o in found for step in o.parts for _, tokens in step)
    assert_equal_trainings(one, two)
    ours, theirs = (load_file(stage / "final" / "tail.safetensors") for stage in (one, two))
    stored = tail_arrays()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=1e-5)
        assert torch.equal(value, torch.from_numpy(stored[name])) == name.startswith("blocks.1.")


def assert_equal_trainings(one: Path, several: Path) -> None:
    """Compare losses and gradient norms of every step, held-out losses, counts, and the final weights."""
    assert losses(several) == pytest.approx(losses(one), rel=TOLERANCE)
    assert losses(several, "grad_norm") == pytest.approx(losses(one, "grad_norm"), rel=TOLERANCE)
    assert losses(several, "held_out_loss") == pytest.approx(
        losses(one, "held_out_loss"), rel=TOLERANCE
    )
    for what in ("samples", "tokens", "step", "epoch", "lr", "held_out_samples"):
        assert losses(several, what) == losses(one, what), what
    for name in (file.name for file in (one / "final").glob("*.safetensors")):
        weights = load_file(several / "final" / name)
        expected = load_file(one / "final" / name)
        assert weights.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-5)


def test_the_steps_have_every_kind_that_could_make_processes_differ(place: Path) -> None:
    found = outcomes(place, "full-4")
    steps = list(zip(*(o.parts for o in found), strict=True))
    media = [[sum(tokens for _, tokens in mine) for mine in step] for step in steps]
    samples = [[sum(count for count, _ in mine) for mine in step] for step in steps]
    assert any(not any(step) for step in media), "a step of text alone"
    assert any(step.count(0) == 3 for step in media), "media in one process alone"
    assert any(0 in step for step in samples), "a process that is dealt nothing"


def test_processes_with_fewer_micro_batches_learn_the_same_task(place: Path) -> None:
    one, several = run_of(place, "one-whole"), run_of(place, "four-whole")
    found = outcomes(place, "whole")
    assert [o.code for o in found] == [0] * 4
    assert len(losses(one)) == STEPS
    assert losses(one)[-1] < losses(one)[0] - 0.5  # training lowers the loss
    assert losses(several) == pytest.approx(losses(one), rel=TOLERANCE)
    steps = list(zip(*(o.parts for o in found), strict=True))
    counts = [[sum(samples > 0 for samples, _ in mine) for mine in step] for step in steps]
    assert any(max(step) > 1 and min(step) < max(step) for step in counts)
    assert all(len({len(mine) for mine in step}) == 1 for step in steps)


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


@pytest.mark.soak_counted
def test_a_run_that_was_killed_has_the_bits_of_one_that_was_not(
    place: Path, soak: Callable[[int, int], int]
) -> None:
    """With an equal number of processes, also if it was killed while a checkpoint was written.

    Two processes are killed twice; in `make soak`, four processes ten times.
    """
    for like, kills in (("offload-2", 2), ("node-4", soak(0, 10))):
        processes, last = SHARED[like].processes, f"killed-{like}-{kills}"
        if not kills:
            continue
        for kill in range(kills):
            left = outcomes(place, f"killed-{like}-{kill}")
            assert len(left) == processes - 1 and all(o.code for o in left)
            gone = "error: a process of this training is gone"
            assert sum(o.err.count(gone) for o in left) >= 1
        assert [o.code for o in outcomes(place, last)] == [0] * processes
        killed, whole = run_of(place, f"killed-{like}"), run_of(place, like)
        for what in ("loss", "grad_norm", "held_out_loss"):
            assert losses(killed, what) == losses(whole, what)
        for name in ("model.safetensors", "connector.safetensors"):
            assert (killed / "final" / name).read_bytes() == (whole / "final" / name).read_bytes()
        print(f"{processes} processes killed {kills} times: equal bits")


def test_only_the_main_process_prints(place: Path) -> None:
    main_process, other, *_ = outcomes(place, "whole")
    assert f"step {STEPS}/{STEPS}" in main_process.out and "held-out loss" in main_process.out
    assert "processes 4, each with its share" in main_process.out
    assert other.out == "" and other.err == ""
    assert "--shard full" in main_process.out
    main_process, other = outcomes(place, "inspect")
    assert "<|im_start|>assistant" in main_process.out
    assert other.out == ""
    main_process, other = outcomes(place, "help")
    assert "torchrun --nproc-per-node 4 -m train.run -- --stage 1" in main_process.out
    assert (main_process.code, other.code, other.out) == (0, 0, "")


# ---- exchanges


def test_values_are_gathered_by_rank_and_broadcast_from_the_main_process(place: Path) -> None:
    expected = [[0, 100, 200], "made by 0", [None] * 3, [[0.0, 0.5], [1.0, 0.5], [2.0, 0.5]]]
    assert [json.loads(o.err) for o in outcomes(place, "exchange")] == [expected] * 3


def test_the_main_process_goes_first(place: Path) -> None:
    first, *others = (json.loads(o.err) for o in outcomes(place, "main_first"))
    assert first < min(others)


# ---- ending together


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan", r"step \d+: the loss is nan; samples .*colors/11-.* Nothing was updated"),
        ("diverged", "The weights of step-00000001 had diverged too. Start again with lower rates"),
        ("memory", MEMORY),
        ("mistake", "no space 'nothing' under"),
        ("command", "nearest: --learning-rate"),
        ("busy", "another trainer is at work on this stage"),
        ("drift", r"process 1 has another model than process 0 \(\w{16}, not \w{16}\)"),
        ("chain-a", "stopped in step 9"),
        ("main_fails", "the disk is full"),
        (
            "difference",
            r"process 2 has another step than process 0 \(4, not 3\); every process needs",
        ),
    ],
)
def test_an_error_is_printed_once(place: Path, name: str, message: str) -> None:
    found = outcomes(place, name)
    assert [o.code for o in found] == [2] * len(found) and len(found) > 1
    said = "".join(o.err for o in found)
    errors = re.findall("^error: .*", said, re.MULTILINE)
    assert len(errors) == 1 and "Traceback" not in said, said
    assert re.search(message, errors[0])


def test_a_step_with_a_nan_changes_nothing(place: Path) -> None:
    folder = run_of(place, "nan")
    said = "".join(o.err for o in outcomes(place, "nan"))
    match = re.search(r"error: step (\d+)", said)
    assert match is not None
    assert len(losses(folder)) == int(match[1]) - 1
    for path in checkpoint.committed(folder / "checkpoints"):
        for file in path.glob("*.safetensors"):
            assert all(bool(t.isfinite().all()) for t in load_file(file).values())
    assert not (run_of(place, "drift") / "metrics.jsonl").exists()


def test_the_end_of_another_process_is_one_line(place: Path) -> None:
    [left] = outcomes(place, "gone")
    assert left.code == 1
    assert left.err.startswith("error: a process of this training is gone (killed, or its machine")
    assert left.err.count("\n") <= 1 and "--resume continues from the last checkpoint" in left.err


@pytest.mark.soak_counted
def test_two_machines_of_torchrun_train_and_end_together(
    mixed: list[str], damaged: CacheRoot, tmp_path: Path, soak: Callable[[int, int], int]
) -> None:
    """Two torchruns on one machine: a training, then one in which a process reads a damaged row.

    Each process exits with 2; torchrun exits with 1, after a report of its own.
    """
    a_machine = soak(1, 2)
    reading = [*WORDS, "--held-out", "0", "--features", str(damaged.path)]
    scenes = [
        Scene(name="node", words=[*mixed, "--shard", "node", "--run", "node"]),
        Scene(name="damaged", words=reading, final=True),
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def machine(number: int) -> subprocess.CompletedProcess[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank"]
        launcher += [str(number), "--nproc-per-node", str(a_machine), "--master-addr", "127.0.0.1"]
        return run_scenes(tmp_path, scenes, *launcher, "--master-port", str(port), "-m")

    with ThreadPoolExecutor() as threads:
        done = list(threads.map(machine, range(2)))
    said = "".join(one.stderr for one in done)
    assert [one.returncode for one in done] == [1, 1], said
    found = outcomes(tmp_path, "node")
    assert [o.code for o in found] == [0] * (2 * a_machine), said
    assert "--shard node" in found[0].out
    with contextlib.chdir(tmp_path):
        assert main([*mixed, "--run", "one"]) == 0
    assert_equal_trainings(run_of(tmp_path, "one"), run_of(tmp_path, "node"))
    lines = [line for line in said.splitlines() if "error: " in line]
    assert len(lines) == 1 and "row 17 fails its checksum" in lines[0], said
    assert said.count("failed (exitcode: 2)") == 2, said


@pytest.mark.soak_counted
def test_interrupted_killed_and_resumed_training_equals_uninterrupted_training(
    cache: CacheRoot, tmp_path: Path, soak: Callable[[int, int], int]
) -> None:
    """Press Ctrl-C: both processes end soon, and resuming loses nothing. In `make soak`, then kill one.

    In `make test` the scenes `gone` and `killed-…` have a process that is killed, without torchrun.
    """
    rng = random.Random(time.time_ns())
    words = [*WORDS, "--features", str(cache.path), "--save-every", "2"]
    folder = run_of(tmp_path, "two")
    command = torchrun("train.run", *words, "--batch-size", "4", "--run", "two", "--resume")
    kills = soak(0, 20)
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
                for pid in (*ranks, parent.pid):  # as a terminal does; torchrun passes it on too
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
