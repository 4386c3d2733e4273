"""Train a stage on cached features. No encoder is loaded; images are not opened.

python -m train.run --stage 1 --features cache                    # Qwen3-0.6B on every data set in the cache
python -m train.run --stage 2                                     # goes on from stage 1 of the same run
python -m train.run --resume                                      # after a crash: exactly where it was
python -m train.run --datasets cap=0.6,points=0.3,text=0.1        # a mix
python -m train.run --inspect                                     # the first packed batches as text
python -m train.run --llm random:qwen3-tiny --max-steps 20        # a laptop, offline
torchrun --nproc-per-node 4 -m train.run -- --stage 1             # four GPUs of one machine
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import configs
from cache.store.paths import is_url
from cache.store.reader import FeatureReader
from model.io.saved_model import save_final
from model.language.model import load_tokenizer
from model.vlm import parameter_counts
from train import checkpoint, metrics, run_folder, setup
from train.config import MACHINE_KEYS, SELECTORS, Options, preset
from train.data.inspect import inspect_text
from train.data.loader import FeatureLoader
from train.data.schedule import OnePass, StepPlan
from train.data.tokens import TokenStore
from train.distributed import Processes, fingerprint, joined
from train.optim import build_optimizer, clip_gradients, schedules, set_rates
from train.step import Forward, Share, by_step, choose_precision, refuse_non_finite

PROG = "python -m train.run"
REMOTE_THREADS, REMOTE_AHEAD = 8, 16
"""At least so many threads, and micro-batches ahead, when features come over a network: seconds of steps
hide seconds of trouble."""
INSPECTED = 2
"""Micro-batches `--inspect` shows."""
ALONE = Processes()


def main(argv: Sequence[str] | None = None) -> int:
    """The command, in one process or, under torchrun, in one of several."""
    with joined() as processes:
        level = logging.INFO if processes.leader else logging.ERROR
        logging.basicConfig(format="%(message)s", level=level)
        return run(argv, processes)


def run(argv: Sequence[str] | None, processes: Processes) -> int:
    """From the command line to a finished stage."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--"]:  # the end of torchrun's options, which some versions of Python pass on
        words = words[1:]
    options = configs.parse(
        Options, words, prog=PROG, description=__doc__, preset=preset, selectors=SELECTORS
    )
    options = dataclasses.replace(options, processes=options.processes or processes.world)
    folder, options = run_folder.check_folder(options)
    if processes.from_leader(lambda: run_folder.is_finished(folder)) and not options.inspect:
        print(f"{folder}: stage {options.stage} is finished; nothing to do")
        return 0
    device = processes.device(options.device)
    processes.connect(device)
    reader = setup.open_space(options)
    origin = setup.starting_point(options)
    options = setup.resolve(options, origin, reader.spec)
    tokenizer = load_tokenizer(str(origin or options.llm))
    data = setup.load_data(options, reader, tokenizer, folder, processes.leader_first)
    if options.inspect:
        if processes.leader:
            inspect(options, reader, data, tokenizer)
        return 0
    vlm = setup.build_model(options, origin, reader.spec, device)
    precision = choose_precision(options.precision, device, vlm)
    forward = Forward(vlm=vlm, spec=reader.spec, device=device, autocast=precision)
    with run_folder.hold(folder) if processes.leader else contextlib.nullcontext():
        facts = processes.from_leader(
            lambda: run_folder.open_folder(folder, options, reader, data.train)
        )
        describe(folder, options, reader, data, forward, processes)
        step = train(folder, options, reader, data, forward, processes, run_id=facts["id"])
        with processes.leader_first():
            if processes.leader:
                meta = setup.final_meta(options, reader, step)
                save_final(folder / run_folder.FINAL, vlm, tokenizer, meta)
    print(f"stage {options.stage} is finished: {folder / run_folder.FINAL}")
    return 0


def train(
    folder: Path,
    options: Options,
    reader: FeatureReader,
    data: setup.Data,
    forward: Forward,
    processes: Processes = ALONE,
    *,
    run_id: str,
) -> int:
    """Every step of the stage, from the newest checkpoint on; returns the number of the last."""
    vlm, device = forward.vlm, forward.device
    optimizer, rates = build_optimizer(vlm, options), schedules(options)
    checkpoints = folder / run_folder.CHECKPOINTS
    done = 0
    if (newest := checkpoint.newest(checkpoints)) is not None:
        done = checkpoint.load(newest, vlm, optimizer)["step"]
        print(f"resuming after step {done}: {newest}")
    learning = [p for p in vlm.parameters() if p.requires_grad]
    processes.agree(lambda: starting_facts(options, data, forward, done))
    log = open_log(folder, options, processes, run_id, done)
    loader = load(
        options, reader, data.plan, data.tokens, device, done, options.max_steps, processes
    )
    vlm.train()
    started = time.perf_counter()
    try:
        for step, micro_batches in by_step(loader, done, options.max_steps):
            # Dropout, where a language model has any, draws the same after a resume.
            torch.manual_seed((options.seed << 32) + step * processes.world + processes.rank)
            share = Share()
            for micro in micro_batches:
                loss = forward.loss(micro)
                loss.backward()
                share.add(micro, loss)

            # Every process comes here in every step, also one that was dealt nothing.
            totals = share.total(processes, device)
            processes.sum_gradients(learning)
            norm = clip_gradients(learning, options.max_grad_norm)
            refuse_non_finite(step, share, totals, norm, vlm, data.train, processes)
            lr = set_rates(optimizer, rates, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            done = step + 1
            now = time.perf_counter()
            log.step(
                metrics.StepRecord(
                    step=done,
                    epoch=data.plan.epoch(step),
                    lr=lr.get("llm", 0.0),
                    connector_lr=lr.get("connector", 0.0),
                    grad_norm=norm,
                    step_s=now - started,
                    **dataclasses.asdict(totals),
                )
            )
            last = done == options.max_steps
            if data.val is not None and (last or done % options.eval_every == 0):
                log.held_out(done, *held_out_loss(options, reader, data, forward, processes))
            if last or done % options.save_every == 0:
                # Equal sums make equal models; a process that computes otherwise must not go unnoticed.
                processes.agree(lambda: {"model": fingerprint(learning)})
                if processes.leader:
                    state = {"samples_digest": data.train.digest}
                    checkpoint.save(checkpoints, done, vlm, optimizer, state)
            started = time.perf_counter()
    finally:
        loader.close()
        log.close()
    return done


def starting_facts(
    options: Options, data: setup.Data, forward: Forward, done: int
) -> dict[str, object]:
    """What must be the same on every process, or they would not train one model."""
    rhythm = ("run", "eval_every", "eval_samples", "save_every")
    return {
        "checkpoint": done,
        "samples": data.train.digest,
        "model": fingerprint(forward.vlm.parameters()),
        "precision": str(forward.autocast),
        **{
            name: str(value)
            for name, value in vars(options).items()
            if name in rhythm or name not in MACHINE_KEYS
        },
    }


def open_log(
    folder: Path, options: Options, processes: Processes, run_id: str, done: int
) -> metrics.RunLog | metrics.NoLog:
    """Where the leader tells about steps; what a killed run wrote after its checkpoint goes."""
    if not processes.leader:
        return metrics.NoLog()
    metrics.cut_metrics(folder, done)
    trackers = metrics.open_trackers(
        options.log, folder, run_id=run_id, start=done, config=vars(options)
    )
    return metrics.RunLog(
        folder, every=options.log_every, last_step=options.max_steps, trackers=trackers
    )


def load(
    options: Options,
    reader: FeatureReader,
    plan: StepPlan | OnePass,
    tokens: TokenStore,
    device: torch.device,
    first: int,
    stop: int,
    processes: Processes = ALONE,
) -> FeatureLoader:
    """This process's micro-batches of steps [first, stop)."""
    return FeatureLoader(
        plan,
        tokens,
        reader,
        max_tokens=options.max_tokens,
        start=first,
        stop=stop,
        rank=processes.rank,
        world=processes.world,
        **reading(options),
        pin=device.type == "cuda",
    )


def reading(options: Options) -> dict[str, int]:
    """How many micro-batches are in the making, and ready: more where each read takes a journey."""
    threads, ahead = options.read_threads, options.read_ahead
    if is_url(options.features):
        threads, ahead = max(threads, REMOTE_THREADS), max(ahead, REMOTE_AHEAD)
    return {"threads": threads, "ahead": ahead}


def held_out_loss(
    options: Options,
    reader: FeatureReader,
    data: setup.Data,
    forward: Forward,
    processes: Processes = ALONE,
) -> tuple[float, int]:
    """Loss on the held-out samples, shared among the processes, and how many they are."""
    assert data.val is not None and data.val_tokens is not None
    steps = len(data.val)
    with load(
        options, reader, data.val, data.val_tokens, forward.device, 0, steps, processes
    ) as loader:
        sums = processes.gather(forward.loss_sums(loader))
    totals, weights, samples = zip(*sums, strict=True)
    # The first process has a piece of every step, so it alone has seen the weight of all.
    return sum(totals) / weights[0], round(sum(samples))


def inspect(options: Options, reader: FeatureReader, data: setup.Data, tokenizer: Any) -> None:
    """Print the first packed batches as text."""
    device = torch.device("cpu")
    with load(options, reader, data.plan, data.tokens, device, 0, options.max_steps) as loader:
        for micro in islice(loader, INSPECTED):
            print(inspect_text(micro, tokenizer, data.plan.trees))


def describe(
    folder: Path,
    options: Options,
    reader: FeatureReader,
    data: setup.Data,
    forward: Forward,
    processes: Processes,
) -> None:
    """What is about to happen."""
    precision = "float32" if forward.autocast is None else "bfloat16"
    print(f"run       {folder}: stage {options.stage}, {options.max_steps} steps")
    frames = f", {n:,} frames of videos" if (n := reader.rows("frame")) else ""
    print(f"space     {reader.path.name}: {reader.rows('image'):,} images{frames}")
    for line in data.train.describe().splitlines():
        print(f"data      {line}")
    print(f"plan      {options.samples_per_step} samples a step; {data.plan.describe()}")
    print(f"trees     {data.plan.trees.describe()}")
    for name, (learns, total) in parameter_counts(forward.vlm).items():
        state = "trained" if learns else "frozen"
        print(f"model     {name} {state}: {learns:,} of {total:,} parameters")
    print(f"device    {forward.device}, {precision}, {torch.get_num_threads()} threads")
    if processes.world > 1:
        print(f"processes {processes.world}, each with its share of every step")


if __name__ == "__main__":
    # Once a batch is known by heart its gradients, squared by AdamW, sink below 1e-38, where a CPU is 60
    # times slower (measured 2026-11-23: 8 s instead of 0.14 s a step). Zero is as good. It must be said
    # before torch starts its threads, which inherit it; and only for this process.
    torch.set_flush_denormal(True)
    configs.command(main)
