"""Every way out that the trainer prints works as printed: after a NaN, a full disk, a signal, grown data.

error: step 2: the gradient is not finite ... Start again with lower rates: python -m train.run --run a ...

A message ends with one command. The tests take it from standard error, run it in the same folder and see the
stage finish.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save_file as real_save_file

import configs
from cache.errors import CacheError, UnreachableError
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.samples import write_samples
from model.io import saved_model
from tests.support import trained_runs
from tests.support.trained_runs import BASE, ENVIRONMENT, losses
from train import metrics, run, training
from train.data import tokens
from train.stage import checkpoint, files, records, run_folder, setup

pytestmark = pytest.mark.slow

NAME = "first run é"
"""A name with spaces and an accent, as it must survive in a command."""
STAGE = Path("runs") / NAME / "stage1"
FULL = OSError(
    errno.ENOSPC, "No space left on device"
)  # as os.write raises it, without a file name


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> CacheRoot:
    return trained_runs.make(tmp_path_factory.mktemp("a world"))


@pytest.fixture
def train(
    cache: CacheRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> Iterator[Callable[..., tuple[int, str]]]:
    """Return a function that runs train.run as a command; it returns the exit code and standard error."""
    monkeypatch.chdir(tmp_path)
    # A command begins with Python's handlers; a test before this one may have left others.
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def command(*words: str) -> tuple[int, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            configs.command(lambda: run.main(words), errors=(CacheError,))
        error = capfd.readouterr().err
        assert "Traceback" not in error
        return int(ended.value.code or 0), error

    def begin(*words: str, features: Path = cache.path) -> tuple[int, str]:
        named = ["--features", str(features), "--run", NAME]
        return command(*BASE, *named, "--max-steps", "6", "--save-every", "2", *words)

    begin.command = command  # type: ignore[attr-defined]
    yield begin
    for number, handler in before.items():
        signal.signal(number, handler)


def printed(error: str) -> list[str]:
    """Return the arguments of the command at the end of the last line."""
    line = error.rstrip("\n").splitlines()[-1]
    words = shlex.split(line[line.index("python -m train.run") :])
    assert words[:3] == ["python", "-m", "train.run"]
    return words[3:]


def goes_on(train: Any, error: str) -> Path:
    """Run the command that an error ends with, see it finish, and return the folder of its stage."""
    words = printed(error)
    code, again = train.command(*words)
    assert code == 0, again
    folder = Path("runs") / words[words.index("--run") + 1] / "stage1"
    assert run_folder.is_finished(folder) and len(losses(folder)) == 6
    return folder


# ---- a loss that is not finite


def test_after_a_nan_the_checkpoint_before_it_goes_on_with_lower_rates(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fourth step diverges: its update is made too large, as by a spike of the rate."""
    with monkeypatch.context() as patch:
        rates = training.set_rates

        def spike(optimizer: Any, schedules: Any, step: int) -> dict[str, float]:
            found = rates(optimizer, schedules, step)
            if step == 3:
                for group in optimizer.param_groups:
                    group["lr"] = 1e12
            return found

        patch.setattr(training, "set_rates", spike)
        code, error = train("--save-every", "3")
    assert code == 2 and "step 5: the gradient is not finite" in error
    assert "With the weights of step-00000003 its loss is" in error
    words = printed(error)
    values = dict(zip(words[::2], words[1::2], strict=False))
    assert values["--from"] == str(STAGE / "checkpoints" / "step-00000003")
    # A tenth of the rate of stage 1, or its preset, whichever is lower.
    assert float(values["--learning-rate"]) == 1e-4
    learned = load_file(STAGE / "checkpoints" / "step-00000003" / checkpoint.MODEL)
    folder = goes_on(train, error)
    assert folder.parent.name == f"{NAME}-2"
    start = load_file(folder / files.START / saved_model.CONNECTOR)
    for name, value in start.items():
        assert torch.equal(value, learned[f"connector.{name}"])


def test_after_a_nan_weights_that_have_diverged_are_not_continued_from(train: Any) -> None:
    """With a rate of 1e12 the first checkpoint is finite, but no rate trains it further."""
    rates = ["--learning-rate", "1e12", "--connector-learning-rate", "1e12", "--warmup-steps", "0"]
    code, error = train(*rates, "--connector-warmup-steps", "0", "--save-every", "1")
    assert code == 2 and "The weights of step-00000001 had diverged too. Start again" in error
    assert goes_on(train, error) == STAGE


def test_a_lower_rate_and_resume_start_a_run_without_checkpoints_again(train: Any) -> None:
    rates = ["--warmup-steps", "0", "--connector-warmup-steps", "0", "--save-every", "100"]
    code, error = train(*rates, "--learning-rate", "1e12", "--connector-learning-rate", "1e12")
    assert code == 2 and "Start again with lower rates" in error
    code, error = train(*rates, "--connector-learning-rate", "1e-3", "--resume")
    assert code == 0, error
    assert len(losses(STAGE)) == 6


def test_a_resumed_run_with_a_lower_rate_is_another_run(train: Any) -> None:
    code, error = interrupted(train)
    code, error = train("--learning-rate", "1e-4", "--resume")
    assert (
        code == 2 and "a resumed run keeps its options, but learning_rate 0.003 -> 0.0001" in error
    )
    assert goes_on(train, error).parent.name == f"{NAME}-2"


def test_the_command_after_changed_options_keeps_the_others(train: Any) -> None:
    """`--resume` needs no other option, so the command of the message adds those of the run."""
    interrupted(train)
    short = ["--run", NAME, "--resume", "--batch-size", "2"]
    code, error = train.command(*short)
    assert code == 2 and "batch_size_per_gpu" in error
    words = printed(error)
    assert words[words.index("--max-steps") + 1] == "6" and "--features" in words
    goes_on(train, error)


def test_a_start_after_a_failed_one_is_a_command_of_its_own(train: Any) -> None:
    """The options of a start that left no checkpoint are no options of the next start."""
    high = ["--learning-rate", "1e30", "--connector-learning-rate", "1e30"]
    high += ["--warmup-steps", "0", "--connector-warmup-steps", "0", "--save-every", "100"]
    code, error = train(*high, "--eval-samples", "7")
    assert code == 2 and "--eval-samples 7" in error
    code, error = train(*high)
    assert code == 2 and "--eval-samples" not in error
    goes_on(train, error)


def test_features_that_are_not_finite_are_named(train: Any, tmp_path: Path) -> None:
    root = trained_runs.make(tmp_path / "bro ken", 20, broken=11)
    code, error = train("--held-out", "0", "--max-steps", "9", features=root.path)
    assert code == 2 and "The features of colors/11-" in error
    line = error.splitlines()[-1]
    words = shlex.split(line[line.index("python -m cache.verify") :])
    assert words[3:] == ["--deep", "--features", str(root.path), "--repair"]
    done = subprocess.run(
        [sys.executable, *words[1:]], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert "NaN" in done.stdout + done.stderr


def test_a_model_that_is_not_finite_from_the_start_is_not_blamed_on_the_rate(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = setup.build_model

    def broken(*arguments: Any) -> Any:
        vlm = build(*arguments)
        vlm.connector.weight.register_hook(lambda grad: grad * float("inf"))
        return vlm

    with monkeypatch.context() as patch:
        patch.setattr(setup, "build_model", broken)
        code, error = train()
    assert code == 2 and "No rate helps, because nothing had been learned" in error
    assert not STAGE.parent.exists()  # a start that fails before the first step leaves no run
    assert goes_on(train, error) == STAGE


# ---- signals


def interrupted(train: Any, number: int = signal.SIGINT, at: int = 3) -> tuple[int, str]:
    """Train until a signal is received in a step."""
    step = metrics.RunLog.step

    def press(log: metrics.RunLog, record: metrics.StepRecord) -> None:
        step(log, record)
        if record.step == at:
            signal.raise_signal(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics.RunLog, "step", press)
        found: tuple[int, str] = train()
    return found


@pytest.mark.parametrize(
    ("number", "code", "name"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_saves_a_checkpoint_and_the_run_goes_on_as_if_there_had_been_none(
    train: Any, number: int, code: int, name: str
) -> None:
    found, error = interrupted(train, number)
    assert found == code
    # The signal comes after step 3 has been computed, so step 4 is the last.
    assert f"{name} after step 4 of 6; saved in {STAGE}/checkpoints/step-00000004" in error
    assert "--resume goes on from step 5: python -m" in error
    parts = losses(goes_on(train, error))
    assert train("--run", "whole")[0] == 0
    assert parts == losses(Path("runs/whole/stage1"))


def test_a_second_ctrl_c_ends_at_once(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        time.sleep(10)

    monkeypatch.setattr(training, "set_rates", twice)
    code, error = train()
    assert code == 130 and "Ctrl-C again ends at once" in error
    assert error.splitlines()[-1].startswith(
        "interrupted; no checkpoint was saved yet. Start again: "
    )
    assert not STAGE.parent.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_leaves_no_run(
    train: Any, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(training, "describe", lambda *_: signal.raise_signal(number))
    code, _ = train()
    assert code == 128 + number
    assert not STAGE.parent.exists()


def test_ctrl_c_as_a_user_presses_it(cache: CacheRoot, tmp_path: Path) -> None:
    """In a process of its own, with the default handler: the shell sees exit code 130."""
    words = [*BASE, "--features", str(cache.path), "--max-steps", "5000", "--eval-every", "0"]
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "train.run", *words, "--log-every", "1"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step"):
                break
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert printed(error)[-1] == "--resume"


# ---- full disks


@contextlib.contextmanager
def fails_once(
    target: Any, name: str, error: Callable[..., Exception], after: int = 0
) -> Iterator[None]:
    """Make the call number `after` of a function fail, and only that one."""
    real, calls = getattr(target, name), 0

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == after + 1:
            raise error(*arguments)
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, failing)
        yield
        assert calls > after, f"{name} was called {calls} times"


def half_written(tensors: Any, path: Path) -> Exception:
    """Leave half a file and return what safetensors raises on a full disk."""
    real_save_file(tensors, path)
    os.truncate(path, path.stat().st_size // 2)
    reason = "No space left on device (os error 28)"
    return SafetensorError(f"Error while serializing: I/O error: {reason}")


def full(*_: Any) -> Exception:
    return FULL


def rust(*_: Any) -> Exception:
    return Exception("No space left on device (os error 28)")  # as the library tokenizers raises it


def quota(*_: Any) -> Exception:
    return OSError(errno.EDQUOT, "Disk quota exceeded")


def read_only(*_: Any) -> Exception:
    return OSError(errno.EROFS, "Read-only file system", "runs/x")


PLACES: dict[str, tuple[Any, str, Callable[..., Exception], int, str]] = {
    "first checkpoint": (checkpoint, "save_file", half_written, 0, "the disk is full"),
    "its moments": (checkpoint, "save_file", half_written, 1, "the disk is full"),
    "second checkpoint": (checkpoint, "save_file", half_written, 2, "the disk is full"),
    "last checkpoint": (checkpoint, "save_file", half_written, 5, "the disk is full"),
    "its folder": (checkpoint, "fsync_folder", quota, 2, "the disk quota is used up"),
    "connector": (saved_model, "save_file", half_written, 0, "the disk is full"),
    "tokenizer": (saved_model, "save_language", rust, 0, "the disk is full"),
    "description": (saved_model, "sealed_json", full, 0, "the disk is full"),
    "metrics": (metrics.RunLog, "_write", full, 3, "the disk is full"),
    "first metrics": (metrics.RunLog, "_write", full, 0, "the disk is full"),
    "tokens": (tokens, "_tokenize", full, 0, "the disk is full"),
    "sample list": (run_folder, "write_atomic", read_only, 0, "the disk is read-only"),
    "run.json": (run_folder, "write_atomic", full, 1, "the disk is full"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_full_disk_is_one_line_and_its_command_goes_on(train: Any, place: str) -> None:
    target, name, error, after, what = PLACES[place]
    with fails_once(target, name, error, after):
        code, said = train()
    assert code == 2 and what in said
    assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1
    checkpoints = checkpoint.committed(STAGE / "checkpoints")
    if checkpoints:
        assert f"{checkpoints[-1]} is kept" in said
        assert not list(STAGE.glob("checkpoints/*.partial"))
    else:
        assert "no checkpoint was saved yet" in said
    for path in checkpoints:
        for file in (checkpoint.MODEL, checkpoint.OPTIMIZER):
            load_file(path / file)  # raises if it is cut
    folder = goes_on(train, said)
    assert folder == STAGE
    assert train("--run", "whole")[0] == 0
    assert losses(folder) == losses(Path("runs/whole/stage1"))


def test_a_limit_of_the_kernel_is_one_line_too(train: Any) -> None:
    """No file may become larger than 200 kB: a real fault of the system call, without a small disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        code, said = train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2 and "the file is larger than this disk or `ulimit -f` allows" in said
    assert goes_on(train, said) == STAGE


def test_a_disk_that_is_too_small_is_refused_before_the_first_step(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(records, "free_bytes", lambda folder: 1_000_000)
        code, error = train("--save-every", "1")
    assert code == 2 and "1 MB are free" in error and "needs" in error
    assert not STAGE.parent.exists()
    goes_on(train, error)
    needed = sum(p.stat().st_size for p in STAGE.rglob("*") if p.is_file())
    options = setup.Options(llm="random:qwen3-tiny", max_steps=6, save_every=1)
    vlm = setup.build_model(
        configs.build(setup.Options, vars(options) | {"connector": "linear"}, "options"),
        None,
        trained_runs.spec(),
        torch.device("cpu"),
    )
    one = checkpoint.nbytes(vlm)
    newest = checkpoint.newest(STAGE / "checkpoints")
    assert newest is not None
    real = sum(p.stat().st_size for p in newest.iterdir())
    assert real <= one < 1.2 * real
    monkeypatch.setattr(records, "free_bytes", lambda folder: needed + one)
    assert train("--run", "fits", "--save-every", "1")[0] == 0


def test_too_little_memory_is_one_line(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    oom = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with monkeypatch.context() as patch:
        patch.setattr(training, "forward_backward", lambda *_: (_ for _ in ()).throw(oom))
        code, error = train("--max-sequence-length", "64", "--max-tokens", "256")
    assert code == 2 and "error: out of memory (CUDA out of memory." in error
    words = printed(error)
    assert words[words.index("--max-tokens") + 1] == "128"
    assert "--use-gradient-checkpointing" in words
    assert not STAGE.parent.exists()
    goes_on(train, error)


def test_an_allocation_that_fails_loses_nothing(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the fifth step torch is asked for more memory than there can be; the last checkpoint stays."""
    real = training.forward_backward

    def huge(step: int, *arguments: Any) -> Any:
        if step == 4:
            torch.empty(1 << 55, dtype=torch.uint8)
        return real(step, *arguments)

    words = ["--max-sequence-length", "64", "--max-tokens", "256"]
    with monkeypatch.context() as patch:
        patch.setattr(training, "forward_backward", huge)
        code, error = train(*words)
    assert code == 2 and error.splitlines()[-1].startswith("error: out of memory ([enforce fail")
    assert f"; {STAGE}/checkpoints/step-00000004 is kept. These need less memory, in this" in error
    assert printed(error)[-1] == "--resume"
    parts = losses(goes_on(train, error))
    assert train("--run", "whole", *words)[0] == 0
    # Smaller micro-batches add up the same numbers in another order.
    assert parts == pytest.approx(losses(Path("runs/whole/stage1")), rel=1e-5)


def test_a_tracker_that_fails_leaves_no_run(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, error = train("--log", "wandb")
    assert code == 2 and "pip install" in error
    assert not STAGE.parent.exists()


# ---- features that cannot be read


def test_a_server_that_is_gone_loses_no_step(train: Any) -> None:
    """A row of some later step cannot be read: the steps before it are saved although none was due."""
    gone = "http://h/x: Connection refused (tried 40 times in 300 s)"
    words = ["--save-every", "100", "--read-ahead", "1", "--read-threads", "1"]
    with fails_once(FeatureReader, "read_into", lambda *_: UnreachableError(gone), after=4):
        code, error = train(*words)
    assert code == 2 and f"error: {gone}; {STAGE}/checkpoints/step-0000000" in error
    assert "is kept. Make it reachable, then go on with: " in error
    parts = losses(goes_on(train, error))
    assert train("--run", "whole")[0] == 0
    assert parts == losses(Path("runs/whole/stage1"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_data_are_awaited_saves_the_steps_so_far(train: Any, number: int) -> None:
    """As when a server does not answer: the read goes on for minutes."""
    read, calls, released = FeatureReader.read_into, 0, threading.Event()

    def hanging(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
            threading.Timer(1.0, released.set).start()
            released.wait(60)
        read(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureReader, "read_into", hanging)
        code, error = train("--save-every", "100", "--read-ahead", "1", "--read-threads", "1")
    assert code == 128 + number
    assert re.search(
        r" after step [1-4] of 6; saved in .*/step-0000000[1-4]\. --resume goes on", error
    )
    parts = losses(goes_on(train, error))
    assert train("--run", "whole")[0] == 0
    assert parts == losses(Path("runs/whole/stage1"))


# ---- data that have changed


@pytest.mark.parametrize("change", ["grown", "edited", "sample list lost"])
def test_samples_that_have_changed_start_another_run(
    train: Any, tmp_path: Path, change: str
) -> None:
    world = tmp_path / "world"
    root = trained_runs.make(world, 20)
    begin = [*("--held-out", "0.2"), *(["--datasets", "colors"] if change == "grown" else [])]

    def again(*words: str) -> tuple[int, str]:
        found: tuple[int, str] = train(*begin, *words, features=root.path)
        return found

    assert interrupted(again)[0] == 130
    if change == "sample list lost":
        (STAGE / files.SAMPLES).unlink()
    elif change == "grown":
        trained_runs.make(world, 24)
    else:
        shorter = trained_runs.samples(world / "images", 20, "colors")[:-1]
        write_samples(root, "colors", shorter)
    # Even the short form of the command leads to one with all its options.
    code, error = train.command("--run", NAME, "--resume", "--features", str(root.path))
    assert code == 2 and "what was learned starts another run" in error, error
    code, full_form = again("--resume")
    assert code == 2
    words = printed(error)
    assert sorted(words) == sorted(printed(full_form))
    folder = goes_on(train, error)
    assert folder.parent.name == f"{NAME}-2"
    facts = json.loads((folder / files.RUN).read_text())
    assert facts["origin"][1] == files.START
