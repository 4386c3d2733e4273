"""Train a stage on cached features. No encoder is loaded; pictures are not opened.

python -m train.run --stage 1 --features cache                    # Qwen3-0.6B on every data set in the cache
python -m train.run --stage 2                                     # goes on from stage 1 of the same run
python -m train.run --resume                                      # after a crash: exactly where it was
python -m train.run --datasets cap=0.6,points=0.3,text=0.1        # a mix
python -m train.run --inspect                                     # the first packed batches as text
python -m train.run --llm random:qwen3-tiny --max-steps 20        # a laptop, offline
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import configs
from cache.reader import FeatureReader
from configs import UserError
from model.device import pick_device
from model.language import load_tokenizer
from model.load import save_final
from model.vlm import parameter_counts
from train import checkpoint, metrics, stage, start
from train.config import SELECTORS, Options, preset
from train.data import FeatureLoader, MicroBatch, OnePass, StepPlan, TokenStore, inspect_text
from train.forward import Forward, choose_precision
from train.join import KIND
from train.optim import broken_gradients, build_optimizer, clip_gradients, schedules, set_rates

PROG = "python -m train.run"
INSPECTED = 2
"""Micro-batches `--inspect` shows."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    options = configs.parse(
        Options, argv, prog=PROG, description=__doc__, preset=preset, selectors=SELECTORS
    )
    stage.refuse_processes()
    folder, options = stage.check_folder(options)
    if stage.is_finished(folder) and not options.inspect:
        print(f"{folder}: stage {options.stage} is finished; nothing to do")
        return 0
    device = pick_device(options.device)
    reader = start.open_space(options)
    origin = start.starting_point(options)
    options = start.resolve(options, origin, reader.spec)
    tokenizer = load_tokenizer(str(origin or options.llm))
    data = start.load_data(options, reader, tokenizer, folder)
    if options.inspect:
        inspect(options, reader, data, tokenizer)
        return 0
    vlm = start.build_model(options, origin, reader.spec, device)
    precision = choose_precision(options.precision, device, vlm)
    forward = Forward(vlm=vlm, spec=reader.spec, device=device, autocast=precision)
    with stage.hold(folder):
        facts = stage.open_folder(folder, options, reader, data.train)
        describe(folder, options, reader, data, forward)
        step = train(folder, options, reader, data, forward, run_id=facts["id"])
        save_final(folder / stage.FINAL, vlm, tokenizer, start.final_meta(options, reader, step))
    print(f"stage {options.stage} is finished: {folder / stage.FINAL}")
    return 0


def train(
    folder: Path,
    options: Options,
    reader: FeatureReader,
    data: start.Data,
    forward: Forward,
    *,
    run_id: str,
) -> int:
    """Every step of the stage, from the newest checkpoint on; returns the number of the last."""
    vlm, device = forward.vlm, forward.device
    optimizer, rates = build_optimizer(vlm, options), schedules(options)
    checkpoints = folder / stage.CHECKPOINTS
    done = 0
    if (newest := checkpoint.newest(checkpoints)) is not None:
        done = checkpoint.load(newest, vlm, optimizer)["step"]
        print(f"resuming after step {done}: {newest}")
    metrics.cut_metrics(folder, done)
    trackers = metrics.open_trackers(
        options.log, folder, run_id=run_id, start=done, config=vars(options)
    )
    log = metrics.RunLog(
        folder, every=options.log_every, last_step=options.max_steps, trackers=trackers
    )
    loader = load(options, reader, data.plan, data.tokens, device, done, options.max_steps)
    learning = [p for p in vlm.parameters() if p.requires_grad]
    parts: list[torch.Tensor] = []  # the loss of each micro-batch, left on the device
    batches: list[tuple[int, ...]] = []  # and its samples, to name them when something is wrong
    wait_s, tokens = 0.0, 0
    vlm.train()
    started = time.perf_counter()
    try:
        for micro in loader:
            if not parts:
                # Dropout, where a language model has any, draws the same after a resume.
                torch.manual_seed((options.seed << 32) + micro.step)
            loss = forward.loss(micro)
            loss.backward()
            parts.append(loss.detach())
            batches.append(sample_numbers(micro))
            wait_s += micro.wait_s
            tokens += micro.tokens
            if not micro.last:
                continue

            losses = torch.stack(parts).tolist()
            norm = clip_gradients(learning, options.max_grad_norm)
            refuse_non_finite(micro.step, losses, norm, batches, forward, data)
            lr = set_rates(optimizer, rates, micro.step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            done = micro.step + 1
            now = time.perf_counter()
            log.step(
                metrics.StepRecord(
                    step=done,
                    epoch=data.plan.epoch(micro.step),
                    loss=math.fsum(losses),
                    lr=lr.get("llm", 0.0),
                    connector_lr=lr.get("connector", 0.0),
                    grad_norm=norm,
                    samples=micro.step_samples,
                    tokens=tokens,
                    step_s=now - started,
                    wait_s=wait_s,
                    memory_gib=metrics.memory_gib(device),
                )
            )
            last = done == options.max_steps
            if data.val is not None and (last or done % options.eval_every == 0):
                log.held_out(done, *held_out_loss(options, reader, data, forward))
            if last or done % options.save_every == 0:
                checkpoint.save(
                    checkpoints, done, vlm, optimizer, {"samples_digest": data.train.digest}
                )
            parts, batches, wait_s, tokens = [], [], 0.0, 0
            started = time.perf_counter()
    finally:
        loader.close()
        log.close()
    return done


def load(
    options: Options,
    reader: FeatureReader,
    plan: StepPlan | OnePass,
    tokens: TokenStore,
    device: torch.device,
    first: int,
    stop: int,
) -> FeatureLoader:
    """The micro-batches of steps [first, stop)."""
    return FeatureLoader(
        plan,
        tokens,
        reader,
        max_tokens=options.max_tokens,
        start=first,
        stop=stop,
        threads=options.read_threads,
        ahead=options.read_ahead,
        pin=device.type == "cuda",
    )


def held_out_loss(
    options: Options, reader: FeatureReader, data: start.Data, forward: Forward
) -> tuple[float, int]:
    """Loss on the held-out samples, and how many they are."""
    assert data.val is not None and data.val_tokens is not None
    with load(
        options, reader, data.val, data.val_tokens, forward.device, 0, len(data.val)
    ) as loader:
        return forward.mean_loss(loader)


def refuse_non_finite(
    step: int,
    losses: Sequence[float],
    norm: float,
    batches: Sequence[Sequence[int]],
    forward: Forward,
    data: start.Data,
) -> None:
    """Stop before a broken step is taken: the weights on disk and in memory stay good.

    Raises:
        UserError: a loss or a gradient is NaN or infinite.
    """
    if math.isfinite(norm) and all(map(math.isfinite, losses)):
        return
    broken = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
    suspects = [s for i in broken or range(len(batches)) for s in batches[i]]
    names = ", ".join(data.train.name_of(s) for s in suspects[:5])
    more = f" and {len(suspects) - 5} more" if len(suspects) > 5 else ""
    if broken:
        what = f"the loss is {losses[broken[0]]}"
    else:
        parameters = broken_gradients(forward.vlm)
        what = f"the gradient is not finite in {len(parameters)} parameters, first {parameters[0]}"
    raise UserError(
        f"step {step + 1}: {what}; samples {names}{more}. Nothing was updated. Lower --learning-rate, "
        "or check the features (python -m cache.verify --deep); --resume goes on from the last checkpoint"
    )


def sample_numbers(micro: MicroBatch) -> tuple[int, ...]:
    """Positions in the sample list of everything in a micro-batch."""
    return tuple(sample for tree in micro.placed for _, _, sample in tree.branches)


def inspect(options: Options, reader: FeatureReader, data: start.Data, tokenizer: Any) -> None:
    """Print the first packed batches as text."""
    device = torch.device("cpu")
    with load(options, reader, data.plan, data.tokens, device, 0, options.max_steps) as loader:
        for micro in islice(loader, INSPECTED):
            print(inspect_text(micro, tokenizer, data.plan.trees))


def describe(
    folder: Path, options: Options, reader: FeatureReader, data: start.Data, forward: Forward
) -> None:
    """What is about to happen."""
    precision = "float32" if forward.autocast is None else "bfloat16"
    print(f"run       {folder}: stage {options.stage}, {options.max_steps} steps")
    print(f"space     {reader.path.name}: {reader.rows(KIND):,} pictures")
    for line in data.train.describe().splitlines():
        print(f"data      {line}")
    print(f"plan      {options.samples_per_step} samples a step; {data.plan.describe()}")
    print(f"trees     {data.plan.trees.describe()}")
    for name, (learns, total) in parameter_counts(forward.vlm).items():
        state = "trained" if learns else "frozen"
        print(f"model     {name} {state}: {learns:,} of {total:,} parameters")
    print(f"device    {forward.device}, {precision}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    # Once a batch is known by heart its gradients, squared by AdamW, sink below 1e-38, where a CPU is 60
    # times slower (measured 2026-11-23: 8 s instead of 0.14 s a step). Zero is as good. It must be said
    # before torch starts its threads, which inherit it; and only for this process.
    torch.set_flush_denormal(True)
    configs.command(main)
