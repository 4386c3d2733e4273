"""Train a stage in the processes of a group: prepare it, take its steps, save its model.

code = run(options, "python -m train.run", words, group)    # what the command does, in every process
step = train(folder, options, reader, data, forward, run_id="a1b2")    # the loop alone
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from cache.errors import CacheError
from cache.store.paths import is_url
from cache.store.reader import FeatureReader
from configs import UserError
from configs.command_line import CommandLine, merge
from configs.console import bytes_text
from configs.hardware import check_processes
from configs.signals import Interrupts
from configs.text import say
from model.io.saved_model import save_final
from model.language.lora import adapter_parameters
from model.language.model import load_tokenizer
from model.vlm import parameter_counts
from train import metrics
from train.config import Options, common_options, stage_folder
from train.data.inspect import inspect_text
from train.data.loader import FeatureLoader, StoppedWaitingError
from train.data.sample_list import ChangedSamplesError
from train.data.schedule import Schedule
from train.distributed.group import ProcessGroup
from train.distributed.shard import fingerprint, make_whole, part_number, shard
from train.optim import build_optimizer, clip_gradients, rate_schedules, set_rates
from train.stage import checkpoint, ending, files, records, run_folder, setup, vision_tail
from train.stage.card import write_card
from train.stage.saver import Saver
from train.step import (
    Forward,
    NonFiniteError,
    by_step,
    choose_precision,
    forward_backward,
    refuse_non_finite,
)

REMOTE_THREADS, REMOTE_AHEAD = 8, 16
"""Threads, and micro-batches read ahead, at least, when features are read over a network: with several
seconds of steps ready, an interruption of seconds does not stop training."""
STOPPING = "stopping after this step, with a checkpoint; Ctrl-C again ends at once\n"
INSPECTED = 2
"""Micro-batches that `--inspect` prints."""
SINGLE_PROCESS = ProcessGroup()


def run(options: Options, program: str, words: list[str], group: ProcessGroup) -> int:
    """Train a stage as the options say; return the exit code.

    Args:
        options: of the command line, with the number of processes.
        program: how the command is called, for messages that repeat it.
        words: its command line.
        group: the processes that train together.
    """
    command = ending.command_line(program, words, group)
    if not options.resume:
        check_processes(options.hardware, options.processes, command)
    if options.resume:
        # Every command that goes on from this one then has the options that the run began with.
        began_with = run_folder.began_with(stage_folder(options.run, options.stage))
        command = dataclasses.replace(command, words=tuple(merge(began_with, words)))
    folder, options = run_folder.check_folder(options, command)
    if group.broadcast(lambda: run_folder.is_finished(folder)) and not options.inspect:
        say(f"{folder}: stage {options.stage} is finished; nothing to do")
        return 0
    run_folder.read_facts(folder)  # a damaged run.json is an error before anything is loaded
    device = group.device(options.device)
    with ending.one_line(folder, command, options, group.world_size):
        return train_stage(folder, options, device, command, group)


def train_stage(
    folder: Path,
    options: Options,
    device: torch.device,
    command: CommandLine,
    group: ProcessGroup,
) -> int:
    """Prepare a stage, train it and save its model; return the exit code."""
    reader = setup.open_space(options)
    origin = setup.starting_point(options, folder, command)
    options = setup.resolve(options, origin, reader)
    tokenizer = origin.tokenizer() if origin else load_tokenizer(str(options.llm))
    setup.check_template(options, tokenizer)
    setup.check_adapters(options, device)
    try:
        data = setup.load_data(options, reader, tokenizer, folder, group.main_process_first)
    except ChangedSamplesError as error:
        another = ending.another_run(folder, options, command)
        raise UserError(f"{error}; what was learned starts another run: {another}") from None
    if options.inspect:
        if group.is_main:
            inspect(options, reader, data, tokenizer)
        return 0
    # A single process trains plain tensors. Sharding moves a model to the device, one layer at a time, but
    # weights of 4 bits, which are rounded there and which no process shares.
    sharded = group.world_size > 1 or options.offload
    first = torch.device("cpu") if sharded and not options.load_in_4bit else device
    tail = vision_tail.open_tail(options, reader)
    vlm = setup.build_model(options, origin, reader.spec, first, tail)
    precision = choose_precision(options.precision, device, vlm)
    forward = Forward(vlm=vlm, spec=reader.spec, device=device, autocast=precision)
    records.check_room(folder, options, vlm, origin, command)
    with run_folder.lock(folder) if group.is_main else contextlib.nullcontext():

        def open_folder() -> dict[str, Any]:
            counts = parameter_counts(vlm)
            facts = run_folder.open_folder(folder, options, reader, data.train, command, counts)
            meta = records.model_meta(options, reader)
            facts = records.keep_origin(folder, facts, origin, vlm, tokenizer, meta)
            return records.keep_base(folder, facts, options, vlm)

        facts = group.broadcast(open_folder)
        group.require_equal(lambda: starting_facts(folder, options, data, forward))
        if sharded:
            shard(vlm, group, device, options.shard, offload=options.offload)
        describe(folder, options, reader, data, forward, group)
        # torchrun passes on the Ctrl-C that a terminal has already sent to every process.
        with Interrupts(STOPPING if group.is_main else "", float(group.world_size > 1)) as stop:
            try:
                meta = records.checkpoint_meta(options, reader, facts, tokenizer, vlm)
                step = train(
                    folder,
                    options,
                    reader,
                    data,
                    forward,
                    group,
                    run_id=facts["id"],
                    meta=meta,
                    stop=stop,
                )
            except NonFiniteError as error:
                used = data.schedule.trees.samples
                again = partial(step_again, error.step, options, reader, data, forward, group)
                cause = ending.after_non_finite(
                    error, vlm, again, folder, options, used, reader, origin, command, group
                )
                raise UserError(f"{error}. {cause}") from None
            if step < options.max_steps:
                if group.is_main:
                    print(ending.stopped(folder, step, options, stop, command), file=sys.stderr)
                return stop.exit_code
            make_whole(vlm, group)
            with group.main_process_first():
                if group.is_main:
                    used = data.schedule.trees.samples
                    write_card(folder, options, reader, data.train, used, origin, vlm.adapters)
                    meta = records.model_meta(options, reader) | {"step": step}
                    meta |= {"base": facts["base"]} if vlm.adapters else {}
                    save_final(folder / files.FINAL, vlm, tokenizer, meta)
    say(f"stage {options.stage} is finished: {folder / files.FINAL}")
    return 0


def train(
    folder: Path,
    options: Options,
    reader: FeatureReader,
    data: setup.Data,
    forward: Forward,
    group: ProcessGroup = SINGLE_PROCESS,
    *,
    run_id: str,
    meta: Mapping[str, Any] = MappingProxyType({}),
    stop: Interrupts | None = None,
) -> int:
    """Train from the newest checkpoint to the last step of the stage, or until a signal.

    Args:
        folder: the folder of the stage.
        options: the resolved options.
        reader: a reader of the space.
        data: samples and steps.
        forward: the model.
        group: the processes that train together.
        run_id: identifies the run in trackers.
        meta: what every checkpoint records beside its step.
        stop: the signals that end the training after a step, with a checkpoint; None: none do.

    Returns:
        the number of steps done.

    Raises:
        NonFiniteError: a loss or gradient is NaN or infinite.
    """
    stop = stop or Interrupts()
    vlm, device = forward.vlm, forward.device
    optimizer, rates = build_optimizer(vlm, options), rate_schedules(options)
    checkpoints = folder / files.CHECKPOINTS
    done = saved = 0
    if (newest := checkpoint.newest(checkpoints)) is not None:
        done = saved = checkpoint.load(newest, vlm, optimizer)["step"]
        say(f"resuming after step {done}: {newest}")
    saver = Saver(checkpoints, group, background=device.type != "cpu")
    used = data.schedule.trees.samples
    trainable = [p for p in vlm.parameters() if p.requires_grad]
    # Processes with one part of the model have it twice, and it must be equal.
    part = part_number(vlm)
    group.require_equal(lambda: {"model": fingerprint(trainable)}, part)
    log = open_log(folder, options, group, run_id, done)
    # One process may drop a step that waits for data, as after a server is gone; several would disagree.
    stopping = stop.stopping if group.world_size == 1 else lambda: False
    steps = (done, options.max_steps)
    loader = load(options, reader, data.schedule, device, *steps, group, stopping=stopping)
    vlm.train()
    started = time.perf_counter()
    try:
        for step, micro_batches in by_step(loader, done, options.max_steps):
            saver.check()
            local = forward_backward(step, micro_batches, options.seed, forward, group)
            totals = local.reduce(group, device, stop.received)
            norm = clip_gradients(trainable, options.max_grad_norm)
            refuse_non_finite(step, local, totals, norm, vlm, used, group)
            lr = set_rates(optimizer, rates, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            done = step + 1
            now = time.perf_counter()
            log.step(
                metrics.StepRecord(
                    step=done,
                    epoch=data.schedule.epoch(step),
                    lr=lr.get("llm", 0.0),
                    connector_lr=lr.get("connector", 0.0),
                    vision_lr=lr.get("vision", 0.0),
                    grad_norm=norm,
                    step_s=now - started,
                    **dataclasses.asdict(totals),
                )
            )
            # Of any process, so that all end after the same step. A later signal counts in the next step.
            last = done == options.max_steps or local.signal > 0
            if data.val_schedule is not None and (
                done == options.max_steps or done % options.eval_every == 0
            ):
                log.held_out(done, *held_out_loss(options, reader, data, forward, group))
            if last or done % options.save_every == 0:
                # Equal gradients keep them equal, unless a process computes wrongly.
                group.require_equal(lambda: {"model": fingerprint(trainable)}, part)
                saver.save(done, vlm, optimizer, meta)
                saved = done
            if last:
                saver.wait()
                stop.received = local.signal or None
                break
            started = time.perf_counter()
    except (CacheError, StoppedWaitingError) as error:
        # A server that is gone, a damaged row or a signal: the weights are those of the last whole step.
        if done > saved and group.world_size == 1:
            saver.save(done, vlm, optimizer, meta)
            saver.wait()
        if isinstance(error, CacheError):
            raise
        if not done:
            raise KeyboardInterrupt from None
    finally:
        saver.close()
        loader.close()
        log.close()
    return done


def step_again(
    step: int,
    options: Options,
    reader: FeatureReader,
    data: setup.Data,
    forward: Forward,
    group: ProcessGroup,
) -> tuple[float, float]:
    """Compute a step with the present weights and change nothing; return its loss and gradient norm."""
    trainable = [p for p in forward.vlm.parameters() if p.requires_grad]
    forward.vlm.zero_grad(set_to_none=True)
    with load(options, reader, data.schedule, forward.device, step, step + 1, group) as loader:
        local = forward_backward(step, loader, options.seed, forward, group)
    totals = local.reduce(group, forward.device)
    return totals.loss, clip_gradients(trainable, options.max_grad_norm)


def starting_facts(
    folder: Path, options: Options, data: setup.Data, forward: Forward
) -> dict[str, object]:
    """Return what must be equal on all processes before they share a model: else they wait for each other."""
    newest = checkpoint.newest(folder / files.CHECKPOINTS)
    return {
        "checkpoint": newest and newest.name,
        "samples": data.train.digest,
        "model": fingerprint(forward.vlm.parameters()),
        "device": forward.device.type,
        "precision": str(forward.autocast),
        **common_options(options),
    }


def open_log(
    folder: Path, options: Options, group: ProcessGroup, run_id: str, done: int
) -> metrics.RunLog | metrics.NoLog:
    """Open the main process's log, without the steps that a killed run did after its checkpoint."""
    if not group.is_main:
        return metrics.NoLog()
    recorded = metrics.cut_metrics(folder, done)
    trackers = metrics.open_trackers(
        options.log,
        folder,
        run_id=run_id,
        start=done,
        recorded=recorded,
        config=vars(options),
    )
    return metrics.RunLog(
        folder,
        every=options.log_every,
        last_step=options.max_steps,
        start=done,
        trackers=trackers,
    )


def load(
    options: Options,
    reader: FeatureReader,
    schedule: Schedule,
    device: torch.device,
    start: int,
    stop: int,
    group: ProcessGroup = SINGLE_PROCESS,
    *,
    stopping: Callable[[], bool] = lambda: False,
) -> FeatureLoader:
    """Return a loader of this process's micro-batches of steps [start, stop)."""
    threads, ahead = options.read_threads, options.read_ahead
    if is_url(options.features):
        threads, ahead = max(threads, REMOTE_THREADS), max(ahead, REMOTE_AHEAD)
    return FeatureLoader(
        schedule,
        reader,
        max_tokens=options.max_tokens,
        start=start,
        stop=stop,
        rank=group.rank,
        world_size=group.world_size,
        threads=threads,
        ahead=ahead,
        pin=device.type == "cuda",
        stopping=stopping,
    )


def held_out_loss(
    options: Options,
    reader: FeatureReader,
    data: setup.Data,
    forward: Forward,
    group: ProcessGroup = SINGLE_PROCESS,
) -> tuple[float, int]:
    """Return the loss on the held-out samples, computed by all processes, and the number of samples."""
    schedule = data.val_schedule
    assert schedule is not None
    with load(options, reader, schedule, forward.device, 0, len(schedule), group) as loader:
        sums = group.gather_numbers(forward.loss_sums(loader))
    totals, weights, samples = zip(*sums, strict=True)
    # A process counts the weight of the steps it takes part in; the first one takes part in all.
    return sum(totals) / weights[0], round(sum(samples))


def inspect(options: Options, reader: FeatureReader, data: setup.Data, tokenizer: Any) -> None:
    """Print the first packed micro-batches as text, at most those of one epoch."""
    device, schedule = torch.device("cpu"), data.schedule
    epoch = -(-schedule.samples_per_epoch // schedule.samples_per_step)
    with load(options, reader, schedule, device, 0, min(epoch, options.max_steps)) as loader:
        for micro in islice(loader, INSPECTED):
            print(inspect_text(micro, tokenizer, data.schedule.trees))


def describe(
    folder: Path,
    options: Options,
    reader: FeatureReader,
    data: setup.Data,
    forward: Forward,
    group: ProcessGroup,
) -> None:
    """Print what is trained, on what, and where."""
    precision = "float32" if forward.autocast is None else "bfloat16"
    say(f"run       {folder}: stage {options.stage}, {options.max_steps} steps")
    frames = f", {n:,} frames of videos" if (n := reader.rows("frame")) else ""
    say(f"space     {reader.path.name}: {reader.rows('image'):,} images{frames}")
    for line in data.train.describe().splitlines():
        say(f"data      {line}")
    say(f"schedule  {options.samples_per_step} samples per step; {data.schedule.describe()}")
    say(f"trees     {data.schedule.trees.describe()}")
    for name, (learns, total) in parameter_counts(forward.vlm).items():
        state = "trained" if learns else "frozen"
        say(f"model     {name} {state}: {learns:,} of {total:,} parameters")
    if forward.vlm.adapters:
        adapted = adapter_parameters(forward.vlm.language).values()
        size = bytes_text(sum(p.nbytes for p in adapted))
        say(f"model     adapters: {size}, {forward.vlm.adapters}")
    if (tail := forward.vlm.tail) is not None:
        names = ", ".join(
            f"{n} {'trained' if n in tail.trained else 'frozen'}" for n in tail.numbers
        )
        say(
            f"tail      blocks of the vision encoder: {names}; those before them are in the features"
        )
    say(f"device    {forward.device}, {precision}, {torch.get_num_threads()} threads")
    if group.world_size > 1:
        shared = f"each with its share of every step; --shard {options.shard}"
        say(f"processes {group.world_size}, {shared}")
