"""Several processes train what one would, and end together: real torchrun, gloo, a tiny model."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import HashStore
from torch.distributed.run import parse_args

from cache.store.paths import CacheRoot
from configs import UserError, dump, parse
from model.io.saved_model import META
from tests.integration.train.distributed_child import Outcome, Scene
from tests.support import ROOT, trained_runs
from train import checkpoint, distributed, run_folder, step
from train.config import Options, preset
from train.distributed import (
    LostProcessError,
    ProcessGroup,
    buckets,
    find_process_group,
    fingerprint,
    process_group,
)
from train.metrics import read_metrics
from train.run import main

STEPS = 24
BASE = [
    *("--llm", "random:qwen3-tiny", "--hardware", "cpu", "--device", "cpu", "--held-out", "0.2"),
    *(
        "--learning-rate",
        "1e-3",
        "--max-steps",
        str(STEPS),
        "--save-every",
        "8",
        "--eval-every",
        "8",
    ),
]
TWO = ["--batch-size", "5", "--max-tokens", "64", "--max-sequence-length", "64"]
SCARCE = ["--batch-size", "3", "--processes", "1"]
"""Trees of two samples, three samples a step: every other step has a single tree."""
TOLERANCE = 1e-6


def torchrun(*words: str) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*command, "--nproc-per-node", "2", "-m", words[0], "--", *words[1:]]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def losses(folder: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in read_metrics(folder) if name in line]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> CacheRoot:
    return trained_runs.make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> CacheRoot:
    return trained_runs.make(tmp_path_factory.mktemp("broken"), 20, broken=11)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> CacheRoot:
    """With a bit of row 17 turned over."""
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
    """A folder where one process and two have trained the same things: runs/one-* and runs/two-*."""
    place = tmp_path_factory.mktemp("processes")
    words = [*BASE, "--features", str(cache.path)]
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
            Scene(name="damaged", words=[*BASE, "--features", str(damaged.path)], final=True),
        ]
        plan = place / "plan.json"
        plan.write_text(json.dumps([asdict(scene) for scene in scenes]))
        with run_folder.hold(place / "runs" / "busy" / "stage1"):
            done = subprocess.run(
                torchrun("tests.integration.train.distributed_child", str(plan)),
                env=environment(),
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
    assert done.returncode == 1, done.stderr  # as its last scene wants
    (place / "stderr").write_text(done.stderr)
    yield place


def outcomes(place: Path, name: str) -> list[Outcome]:
    return [
        Outcome(**json.loads(path.read_text())) for path in sorted(place.glob(f"{name}-[01].json"))
    ]


def run_of(place: Path, name: str) -> Path:
    return place / "runs" / name / "stage1"


# ---- the same training


@pytest.mark.parametrize("name", ["whole", "scarce"])
def test_two_processes_learn_what_one_does(place: Path, name: str) -> None:
    one, two = run_of(place, f"one-{name}"), run_of(place, f"two-{name}")
    assert [o.code for o in outcomes(place, name)] == [0, 0]
    assert len(losses(one)) == len(losses(two)) == STEPS
    assert losses(one)[-1] < losses(one)[0] - 0.5  # and it did learn
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


def test_processes_may_have_other_numbers_of_micro_batches_or_none(place: Path) -> None:
    first, second = (o.parts for o in outcomes(place, "whole"))
    assert len(first) == len(second) == STEPS
    assert any(a != b for a, b in zip(first, second, strict=True))
    assert min(first) > 1  # several micro-batches a process
    first, second = (o.parts for o in outcomes(place, "scarce"))
    assert 0 in second and 1 in second and 0 not in first


def test_resumed_by_one_process_then_by_two(place: Path) -> None:
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


def test_the_first_process_alone_tells(place: Path) -> None:
    leader, other = outcomes(place, "whole")
    assert f"step {STEPS}/{STEPS}" in leader.out and "held-out loss" in leader.out
    assert "processes 2, each with its share" in leader.out
    assert other.out == "" and other.err == ""
    leader, other = outcomes(place, "inspect")
    assert "<|im_start|>assistant" in leader.out
    assert other.out == ""
    leader, other = outcomes(place, "help")
    assert "torchrun --nproc-per-node 4 -m train.run -- --stage 1" in leader.out
    assert (leader.code, other.code, other.out) == (0, 0, "")


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
def test_a_mistake_is_told_once(place: Path, name: str, message: str) -> None:
    told = outcomes(place, name)
    assert [o.code for o in told] == [2, 2]
    lines = [line for o in told for line in o.err.splitlines()]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert re.search(message, lines[0])


def test_nothing_broken_is_kept(place: Path) -> None:
    folder = run_of(place, "nan")
    told = next(o.err for o in outcomes(place, "nan") if o.err)
    match = re.search(r"step (\d+)", told)
    assert match is not None
    assert len(losses(folder)) == int(match[1]) - 1
    for path in checkpoint.committed(folder / "checkpoints"):
        assert all(bool(t.isfinite().all()) for t in load_file(path / checkpoint.MODEL).values())
    assert not (run_of(place, "drift") / "metrics.jsonl").exists()


def test_damage_that_one_process_meets_ends_both(place: Path) -> None:
    """As a user sees it: torchrun itself ends with 1 and its own report, each process with 2."""
    said = (place / "stderr").read_text()
    lines = [line for line in said.splitlines() if "error: " in line]
    assert len(lines) == 1 and "row 17 fails its checksum" in lines[0], said
    assert "failed (exitcode: 2)" in said
    assert said.count("Traceback (most recent call last)") == 1, said  # torchrun's


@pytest.mark.soak_counted
def test_interrupted_and_killed_and_resumed(
    cache: CacheRoot, tmp_path: Path, soak: Callable[[int, int], int]
) -> None:
    """Ctrl-C, then kill -9 of either process anywhere: all end soon, and in the end it is one training."""
    rng = random.Random(time.time_ns())
    words = [*BASE, "--features", str(cache.path), "--save-every", "2"]
    folder = run_of(tmp_path, "two")
    command = torchrun("train.run", *words, "--batch-size", "4", "--run", "two", "--resume")
    kills = soak(1, 20)
    for kill in range(1 + kills):
        aim = STEPS // 3 if kill == 0 else rng.randrange(STEPS * kill // kills)
        with subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as parent:
            ranks = wait_for_ranks(parent)
            while parent.poll() is None and len(losses(folder)) < aim:
                time.sleep(0.005)
            if kill == 0:
                parent.send_signal(signal.SIGINT)
            else:
                with contextlib.suppress(ProcessLookupError):  # it was faster
                    os.kill(rng.choice(ranks), signal.SIGKILL)
            said, _ = parent.communicate(timeout=60)
        assert not any(alive(pid) for pid in ranks), said
        assert said.count("Traceback (most recent call last)") <= 1, said  # torchrun's
        if kill == 0:
            assert parent.returncode != 0
            assert sum(line == "interrupted" for line in said.splitlines()) == 1, said
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


# ---- the pieces


def side_by_side(work: Callable[[ProcessGroup], Any], world: int = 3) -> list[Any]:
    """What `work` returns or raises in each of several processes, here threads with a store in common."""
    store = HashStore()
    results: list[Any] = [None] * world

    def one(rank: int) -> None:
        member = ProcessGroup(rank, world, rank, store)
        try:
            results[rank] = work(member)
        except (UserError, LostProcessError) as error:
            member.fail(2)
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    return results


def test_notes() -> None:
    def work(member: ProcessGroup) -> Any:
        shared = member.gather_objects({"rank": member.rank})
        return shared, member.broadcast(lambda: f"made by {member.rank}"), member.gather_objects(1)

    expected = ([{"rank": 0}, {"rank": 1}, {"rank": 2}], "made by 0", [1, 1, 1])
    assert side_by_side(work) == [expected] * 3


def test_the_leader_goes_first() -> None:
    order: list[int] = []

    def work(member: ProcessGroup) -> None:
        with member.main_process_first():
            time.sleep(0.2 if member.is_main else 0)
            order.append(member.rank)

    side_by_side(work)
    assert order[0] == 0 and sorted(order) == [0, 1, 2]


def test_nobody_waits_for_a_process_that_failed() -> None:
    def work(member: ProcessGroup) -> None:
        with member.main_process_first():
            if member.is_main:
                time.sleep(0.1)
                raise UserError("the disk is full")

    first, *others = side_by_side(work)
    assert isinstance(first, UserError)
    assert [type(o) for o in others] == [LostProcessError] * 2


def test_they_must_agree() -> None:
    def work(member: ProcessGroup) -> None:
        member.require_equal(lambda: {"samples": "abc", "step": 3})
        member.require_equal(lambda: {"samples": "abc", "step": 3 + (member.rank == 2)})

    results = side_by_side(work)
    assert [str(r).split(";")[0] for r in results] == [
        "process 2 has another step than process 0 (4, not 3)"
    ] * 3


def test_only_one_is_the_first_to_fail() -> None:
    codes = side_by_side(lambda member: member.fail(10 + member.rank))
    assert codes.count(None) == 1
    first = codes.index(None)
    assert [c for c in codes if c is not None] == [10 + first] * 2


def test_a_process_alone_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = find_process_group()
    assert (alone.rank, alone.world_size, alone.is_main) == (0, 1, True)
    assert alone.gather_objects(1) == [1] and alone.gather_numbers([2.0]) == [[2.0]]
    assert alone.broadcast(lambda: "x") == "x"
    alone.require_equal(lambda: pytest.fail("was asked"))
    with alone.main_process_first():
        alone.connect(torch.device("cpu"))
    assert not torch.distributed.is_initialized()


def test_an_environment_that_is_not_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"WORLD_SIZE is 4, .*RANK.*torchrun"), process_group():
        pass


def test_every_process_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(distributed, "pick_device", lambda name: torch.device(kind))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    kind = "cuda"
    for local in range(2):
        assert ProcessGroup(2 + local, 4, local, HashStore()).device("auto") == torch.device(
            "cuda", local
        )
    assert chosen == [torch.device("cuda:0"), torch.device("cuda:1")]
    with pytest.raises(UserError, match="process 2 of this machine has no GPU, torch finds 2"):
        ProcessGroup(2, 3, 2, HashStore()).device("cuda")
    with pytest.raises(UserError, match="4 processes need a GPU each; give cuda"):
        ProcessGroup(0, 4, 0, HashStore()).device("cuda:1")
    assert ProcessGroup().device("cuda:1") == torch.device("cuda")  # alone: as model.device says
    kind = "mps"
    with pytest.raises(UserError, match="one Metal GPU"):
        ProcessGroup(0, 2, 0, HashStore()).device("auto")
    kind = "cpu"
    assert ProcessGroup(1, 2, 1, HashStore()).device("auto") == torch.device("cpu")


def test_buckets_hold_neighbours_of_one_type() -> None:
    sizes = [3, 4, 100, 1, 1, 9, 2]
    tensors = [torch.zeros(n) for n in sizes]
    tensors[4] = tensors[4].double()
    groups = list(buckets(tensors, 40))
    assert [t for group in groups for t in group] == tensors
    assert [[t.numel() for t in group] for group in groups] == [
        *([3, 4], [100], [1], [1], [9], [2])
    ]
    assert list(buckets([], 40)) == []


def test_a_fingerprint_sees_one_bit_and_the_order() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(50, 3, generator=generator), torch.randn(7, generator=generator).half()]
    before = fingerprint(tensors)
    assert before == fingerprint([t.clone() for t in tensors])
    assert before != fingerprint(tensors[::-1])
    tensors[0].view(torch.int32)[17, 1] ^= 1
    assert before != fingerprint(tensors)


def test_steps_of_a_process_that_is_dealt_little() -> None:
    def micro(number: int, last: bool) -> Any:
        return SimpleNamespace(step=number, last=last)

    asked: list[Any] = []

    def source() -> Iterator[Any]:
        for item in (micro(4, False), micro(4, True), micro(6, True), micro(7, True)):
            asked.append(item)
            yield item

    seen = {}
    for number, micro_batches in step.by_step(source(), 3, 10):
        mine = []
        for item in micro_batches:
            assert asked[-1] is item, "a buffer was filled again while it was in use"
            mine.append(item)
        seen[number] = len(mine)
    assert seen == {3: 0, 4: 2, 5: 0, 6: 1, 7: 1, 8: 0, 9: 0}


# ---- options


def test_torchrun_understands_the_commands_we_show() -> None:
    import train.run

    text = f"{train.run.__doc__}\n{distributed.__doc__}\n"
    text += (ROOT / "docs" / "TRAINING_PIPELINE.md").read_text()
    shown = re.findall(r"^ *torchrun (.*?)(?:  +#.*)?$", text, re.MULTILINE)
    assert len(shown) >= 4
    for line in shown:
        parsed = parse_args(line.split())
        assert parsed.training_script == "train.run"
        parse(Options, [w for w in parsed.training_script_args if w != "--"], prog="train.run")


def test_batch_size_is_a_process_and_a_run_keeps_its_total(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(batch_size_per_gpu=32, gradient_accumulation_steps=4)
    assert options.samples_per_step == 128
    assert Options(**{**vars(options), "processes": 4}).samples_per_step == 512
    with pytest.raises(ValueError, match="processes -1 is below 0"):
        Options(processes=-1)
    monkeypatch.chdir(tmp_path)
    saved = tmp_path / "runs" / "default" / "stage1" / "config.yaml"
    saved.parent.mkdir(parents=True)
    saved.write_text(dump(Options(processes=4)))
    assert preset({})["processes"] == 4  # whoever resumes it


def test_gradients_of_a_lone_process_are_left_alone() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))]
    parameters[0].grad = torch.full((2,), math.pi)
    ProcessGroup().sum_gradients(parameters)
    assert (
        parameters[0].grad.tolist() == pytest.approx([math.pi] * 2) and parameters[1].grad is None
    )
