"""How a training ends before its last step: in one line, with the command that goes on, runnable as printed.

    with one_line(folder, command):         # a full disk, too little memory: UserError
        ...
        raise UserError(f"{error}. {after_non_finite(error, ...)}")

Checkpoints keep what was learned. A message names `--resume` where the same command can go on, another
run with `--from CHECKPOINT` where it cannot, and a new start where nothing was saved.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

import configs
from cache.errors import CacheError, UnreachableError
from cache.store.paths import is_url
from cache.store.reader import FeatureReader
from configs import UserError
from configs.command_line import CommandLine, command_text, with_options
from configs.signals import Interrupts
from model.vlm import VLM
from train.config import Options, free_name
from train.data.features import read_features
from train.data.sample_list import SampleList
from train.distributed.group import ProcessGroup
from train.metrics import read_metrics
from train.stage import checkpoint
from train.stage.files import CHECKPOINTS
from train.stage.less_memory import is_out_of_memory, less_memory, on_gpu, shorter
from train.stage.origin import Origin
from train.step import SAMPLES_NAMED, NonFiniteError

DISK_ERRORS = {
    errno.ENOSPC: ("the disk is full", "Make room"),
    errno.EDQUOT: ("the disk quota is used up", "Make room"),
    errno.EROFS: ("the disk is read-only", "Make it writable"),
    errno.EIO: ("the disk fails (I/O error)", "Repair it"),
    errno.EFBIG: ("the file is larger than this disk or `ulimit -f` allows", "Raise the limit"),
}
"""errno -> what is wrong, and what the user does about it."""
OS_ERROR = re.compile(r"os error (\d+)")
"""How safetensors and tokenizers, which are written in Rust, name an errno."""
DIVERGED = 2.0
"""Weights have diverged if their loss is more than that of guessing, and more than this many times that of
the run's first step."""
LOWER = 10
"""What the learning rates are divided by after a loss that is not finite; they are at most the preset's."""


def command_line(program: str, words: list[str], group: ProcessGroup) -> CommandLine:
    """Return the command that the user gave, for one process or for torchrun."""
    if group.world_size > 1:
        here = os.environ.get("LOCAL_WORLD_SIZE", str(group.world_size))
        program = program.replace("python", f"torchrun --nproc-per-node {here}", 1) + " --"
    return CommandLine(program, tuple(words))


# ---- disk and memory


@contextlib.contextmanager
def one_line(
    folder: Path, command: CommandLine, options: Options, processes: int = 1
) -> Iterator[None]:
    """Say in one line how to go on after errors of a disk, memory or server, or a signal that ends at once.

    Args:
        folder: the folder of the stage.
        command: the command line.
        options: the options.
        processes: that train together.

    Raises:
        UserError: for errors of a disk, of memory or of the server of a remote cache.
        KeyboardInterrupt: with the line as its message.
    """
    try:
        yield
    except UnreachableError as error:
        raise UserError(f"{error}; {go_on(folder, command, 'Make it reachable')}") from error
    except (UserError, CacheError):
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(go_on(folder, command)) from None
    except Exception as error:
        if found := _disk_error(error):
            what, remedy = found
            place = getattr(error, "filename", None) or folder
            message = f"{place}: {what}; {go_on(folder, command, remedy)}"
        elif is_out_of_memory(error):
            message = _out_of_memory(error, folder, command, options, processes)
        else:
            raise
        raise UserError(message) from error


def _disk_error(error: Exception) -> tuple[str, str] | None:
    """Return what is wrong with a disk and the remedy, if an error says so."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := OS_ERROR.search(str(error))):
        number = int(found[1])
    return DISK_ERRORS.get(number or 0)


def _out_of_memory(
    error: Exception, folder: Path, command: CommandLine, options: Options, processes: int
) -> str:
    """Return what is kept after an error of memory, the settings that need less, and the command."""
    now, another = less_memory(options, processes=processes, gpu=on_gpu(error))
    newest = checkpoint.newest(folder / CHECKPOINTS)
    kept = f"{newest} is kept" if newest else "no checkpoint was saved yet"
    # Another run is needed only for what a checkpoint would contradict.
    fresh = {"run": free_name(options.run), "resume": None, "from_": newest} if newest else {}
    if now:
        # The two that every machine has, or else one that moves the model.
        cheap = ("max_tokens", "use_gradient_checkpointing")
        first = {n: v for n, v in now.items() if n in cheap} or dict([next(iter(now.items()))])
        order = f"These need less memory, in this order: {_options_text(now)}"
        order += f"; in another run, {_options_text(another)}" if another else ""
        how = f"Go on with: {command.text(**first, resume=True)}"
        if not newest:
            how = f"Start again with: {command.text(**first)}"
    elif another:
        order = f"In another run, {_options_text(another)} needs less memory"
        how = f"Start it with: {command.text(**fresh, **another)}"
        if not newest:
            order = f"{_options_text(another)} needs less memory"
            how = f"Start again with: {command.text(**another)}"
    else:
        order = "Take a smaller --llm, or shorter sequences"
        how = f"Start another run with: {command.text(**fresh, **shorter(options))}"
    return f"out of memory ({configs.one_line(error, 80)}); {kept}. {order}. {how}"


def _options_text(values: Mapping[str, object]) -> str:
    return ", ".join(" ".join(with_options([], **{name: value})) for name, value in values.items())


def go_on(folder: Path, command: CommandLine, remedy: str = "", **changes: object) -> str:
    """Return what is kept of a stage, and the command that continues it or starts it again.

    Args:
        folder: the folder of the stage.
        command: the command line.
        remedy: what the user does first.
        changes: options to change.
    """
    first = f"{remedy}, then " if remedy else ""
    if newest := checkpoint.newest(folder / CHECKPOINTS):
        how = _sentence(f"{first}go on with")
        return f"{newest} is kept. {how}: {command.text(**changes, resume=True)}"
    how = _sentence(f"{first}start again")
    return f"no checkpoint was saved yet. {how}: {command.text(**changes)}"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def stopped(
    folder: Path, done: int, options: Options, stop: Interrupts, command: CommandLine
) -> str:
    """Return what to print when a signal has ended a training in order."""
    saved = checkpoint.newest(folder / CHECKPOINTS)
    name = "interrupted" if stop.received == signal.SIGINT else "terminated"
    return (
        f"{name} after step {done:,} of {options.max_steps:,}; saved in {saved}. --resume goes on from step "
        f"{done + 1:,}: {command.text(resume=True)}"
    )


# ---- data that have changed


def another_run(folder: Path, options: Options, command: CommandLine) -> str:
    """Return the command of another run that starts from the newest checkpoint of this one."""
    newest = checkpoint.newest(folder / CHECKPOINTS)
    return command.text(run=free_name(options.run), resume=None, from_=newest)


# ---- a loss that is not finite


def after_non_finite(
    error: NonFiniteError,
    vlm: VLM,
    again: Callable[[], tuple[float, float]],
    folder: Path,
    options: Options,
    samples: SampleList,
    reader: FeatureReader,
    origin: Origin | None,
    command: CommandLine,
    group: ProcessGroup,
) -> str:
    """Find out why a step is not finite; return the cause and the command that goes on.

    The step is computed again with the weights of each checkpoint, newest first. The first whose loss and
    gradient are finite starts another run with lower rates. A checkpoint that has diverged is set aside.
    Every process must call it.

    Args:
        error: what happened.
        vlm: the model, whose weights are replaced.
        again: computes the step with the model's weights; returns its loss and the norm of its gradient.
        folder: the folder of the stage.
        options: the resolved options.
        samples: the training split.
        reader: a reader of the space.
        origin: what the stage started from.
        command: the command line.
        group: the processes that train together.
    """
    if broken := _broken_features(error, samples, reader, group):
        where = options.features
        check = ["--deep"] if is_url(where) else ["--deep", "--features", where]
        return (
            f"The features of {', '.join(broken)} are not finite, so no rate helps. Remove those rows, then "
            f"encode again: {command_text('python -m cache.verify', [*check, '--repair'])}"
        )
    lower = lower_rates(options)
    aside = []
    for path in reversed(checkpoint.committed(folder / CHECKPOINTS)):
        checkpoint.load_weights(path, vlm)
        loss, norm = again()
        guessing = math.log(vlm.language.get_input_embeddings().num_embeddings)
        if math.isfinite(norm) and not has_diverged(loss, guessing, _first_loss(folder, loss)):
            another = command.text(run=free_name(options.run), resume=None, from_=path, **lower)
            return (
                f"With the weights of {path.name} its loss is {loss:.3f}, so another run goes on from there "
                f"with lower rates: {another}"
            )
        aside.append(path)
    group.broadcast(lambda: [str(checkpoint.set_aside(path)) for path in aside])
    if error.step or aside:
        gone = (
            f"The weights of {' and '.join(p.name for p in aside)} had diverged too. "
            if aside
            else ""
        )
        return f"{gone}Start again with lower rates: {command.text(resume=None, **lower)}"
    if origin is not None:
        return (
            f"No rate helps: the weights of {origin} cause it. Start from another model, or afresh: "
            f"{command.text(from_=None, resume=None, stage=1, run=free_name(options.run))}"
        )
    return (
        "No rate helps, because nothing had been learned: the language model or its precision causes it. "
        "Try: "
        f"{command.text(precision='float32', resume=None)}"
    )


def _broken_features(
    error: NonFiniteError, samples: SampleList, reader: FeatureReader, group: ProcessGroup
) -> list[str]:
    """Return the names of the samples of a step, of all processes, whose features are not finite."""
    mine = []
    for sample in error.samples:
        media = samples.media_of(sample).tolist()
        found = read_features(samples, media, reader) if media else []
        tensors = [f if isinstance(f, torch.Tensor) else f.features for f in found]
        if not all(bool(t.isfinite().all()) for t in tensors):
            mine.append(samples.name_of(sample))
    return sorted({name for names in group.gather_objects(mine[:SAMPLES_NAMED]) for name in names})


def has_diverged(loss: float, guessing: float, first: float) -> bool:
    """Whether weights are worse than any that training passes through.

    Args:
        loss: of the step, with these weights.
        guessing: the loss of equal probabilities for all tokens.
        first: the loss of the first step of the run.
    """
    return not loss <= max(guessing, DIVERGED * first)  # also true of NaN


def _first_loss(folder: Path, default: float) -> float:
    """Return the loss of the first step in the metrics of a stage."""
    return next((line["loss"] for line in read_metrics(folder) if "loss" in line), default)


def lower_rates(options: Options) -> dict[str, float]:
    """Return rates for another try: a tenth, and at most those of the stage's preset."""
    preset = configs.load("train")["stages"][options.stage]
    names = ("learning_rate", "connector_learning_rate")
    return {name: min(getattr(options, name) / LOWER, float(preset[name])) for name in names}
