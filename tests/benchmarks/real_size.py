"""Models of the real sizes on this machine: they encode, train, and use the memory that was estimated.

python -m tests.benchmarks.real_size                     # ten minutes, 13 GB of memory, 10 MB of disk
python -m tests.benchmarks.real_size --only memory       # or: end-to-end, stage-3

The weights are random: times, memory and shapes are those of the real models, answers are not. Each case of
`memory` takes two steps of two micro-batches in a process of its own, whose largest resident memory is
compared with `model.verify`'s estimate.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForCausalLM

from cache.store.samples import write_samples
from model.attention.batch import PackedBatch
from model.connector import build_connector
from model.language.model import LanguagePreset, load_language, save_language
from model.tail import StoredRows
from model.verify.memory import GIB, Sizes, Step, sizes_of, step_bytes
from model.vlm import VLM, parameter_counts
from tests.benchmarks import bench
from tests.benchmarks.bench import CLIP, Requirements, take_turns
from tests.support import ROOT
from train.config import Options as TrainOptions
from train.data.schedule import TrainingSchedule
from train.metrics import read_metrics
from train.optim import build_optimizer, clip_gradients

IMAGES = 16
TRAIN_STEPS = 3
OFF = 0.15
"""How far an estimate may be from what is measured, as a share."""
PARTS = ("end-to-end", "memory", "stage-3")


@dataclass(frozen=True, kw_only=True)
class Options(bench.Options):
    """Measure models of the real sizes."""

    only: Literal["", "end-to-end", "memory", "stage-3"] = ""
    """The part to measure; all by default."""


# ---- memory


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training step whose memory is measured."""

    llm: str | LanguagePreset
    """The language model: `random:<preset>`, or sizes with `vocab_rows`."""
    tokens: int
    """Tokens of each micro-batch; half of them have features."""
    supervised: float = 0.5
    """Share of the tokens that are supervised, the last ones."""
    checkpointing: bool = False
    """Whether each layer is computed again in the backward pass."""
    train_llm: bool = True
    """Whether the language model trains."""
    lora: int = 0
    """Rank of adapters; 0: none."""
    micro_batches: int = 2
    """Micro-batches of a step."""

    def build(self, features: int = 64) -> tuple[VLM, Sizes]:
        """Return the model with a connector from as many values, and its sizes."""
        if isinstance(self.llm, str):
            language = load_language(self.llm)[0]
        else:
            language = AutoModelForCausalLM.from_config(self.llm.config(self.llm.vocab_rows))
        width = language.get_input_embeddings().embedding_dim
        vlm = VLM(language, build_connector("linear", features, width), features)
        counts = {part: total for part, (_, total) in parameter_counts(vlm).items()}
        if self.lora:
            vlm.add_adapters(self.lora, seed=0)
        vlm.freeze(train_connector=True, train_llm=self.train_llm)
        vlm.gradient_checkpointing(self.checkpointing)
        return vlm.train(), sizes_of(language.config, **counts)

    def step(self) -> Step:
        """Return the settings, as an estimate takes them."""
        return Step(
            tokens=self.tokens,
            checkpointing=self.checkpointing,
            gpu=False,
            train_llm=self.train_llm,
            lora=self.lora,
            accumulates=self.micro_batches > 1,
        )

    def batch(self, image: int) -> PackedBatch:
        """Return a micro-batch of one sample; `image` is the id of a token that features replace."""
        ids, weights = torch.arange(self.tokens) % image, torch.zeros(self.tokens)
        ids[: self.tokens // 2] = image
        weights[-int(self.tokens * self.supervised) :] = 1
        weights[0] = 0  # nothing predicts the first token
        return PackedBatch.one_sample(ids, weights, image)


def train_steps(
    case: Case, vlm: VLM, steps: int = 2, features: torch.Tensor | StoredRows | None = None
) -> None:
    """Take some steps, as the trainer takes them."""
    batch = case.batch(image=255)
    if features is None:
        features = torch.randn(1, case.tokens // 2, 64, generator=torch.Generator().manual_seed(0))
    optimizer = build_optimizer(vlm, TrainOptions())
    for _ in range(steps):
        for _ in range(case.micro_batches):
            (vlm.loss(batch, features)[0] / case.tokens).backward()
        clip_gradients(vlm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def allocated_peak(work: Callable[[], object]) -> int:
    """Return the most bytes of tensors on the CPU that a call holds at once, of those that it makes."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = largest = 0
    for _, change in changes:
        held += change
        largest = max(largest, held)
    return largest


def resident_peak(case: Case) -> int:
    """Return the largest resident memory of a process that takes the steps of a case."""
    code = (
        "import dataclasses, json, resource, sys\n"
        "from tests.benchmarks.real_size import Case, LanguagePreset, train_steps\n"
        "values = json.loads(sys.argv[1])\n"
        "if isinstance(values['llm'], dict):\n"
        "    values['llm'] = LanguagePreset(**values['llm'])\n"
        "case = Case(**values)\n"
        "train_steps(case, case.build()[0])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(dataclasses.asdict(case))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return int(done.stdout)


def estimate(case: Case) -> int:
    """Return the estimate of a case, bytes."""
    with torch.device("meta"):
        _, sizes = dataclasses.replace(case, lora=0).build()
    return step_bytes(sizes, case.step())["total"]


MIDDLE = LanguagePreset(
    hidden_size=512,
    layers=12,
    heads=8,
    kv_heads=2,
    head_dim=64,
    intermediate_size=1536,
    vocab_rows=32768,
)
"""A model of 53 million parameters."""
MEMORY_CASES = {
    "53 M, 512 tokens": Case(llm=MIDDLE, tokens=512),
    "53 M, 2,048 tokens": Case(llm=MIDDLE, tokens=2048),
    "53 M, 2,048 tokens, checkpointing": Case(llm=MIDDLE, tokens=2048, checkpointing=True),
    "53 M, 2,048 tokens, connector": Case(llm=MIDDLE, tokens=2048, train_llm=False),
    "53 M, 2,048 tokens, LoRA 16": Case(llm=MIDDLE, tokens=2048, lora=16),
    "53 M, 2,048 tokens, LoRA 16, checkpointing": Case(
        llm=MIDDLE, tokens=2048, lora=16, checkpointing=True
    ),
    "Qwen2.5-0.5B, 256 tokens": Case(llm="random:qwen2.5-0.5b", tokens=256),
    "Qwen3-0.6B, 256 tokens": Case(llm="random:qwen3-0.6b", tokens=256),
    "Qwen3-0.6B, 512 tokens, LoRA 16, checkpointing": Case(
        llm="random:qwen3-0.6b", tokens=512, lora=16, checkpointing=True
    ),
}
"""Name -> what is trained. The largest need 11 GiB."""


def measure_memory(requirements: Requirements) -> None:
    """Compare estimates with resident memory, then what checkpointing saves with what it costs."""
    for name, case in MEMORY_CASES.items():
        measured, estimated = resident_peak(case), estimate(case)
        off = estimated / measured - 1
        print(f"{name}: measured {measured / GIB:.2f} GiB, estimate {estimated / GIB:.2f} GiB")
        requirements.at_most(f"memory: {name}, off by", abs(off), OFF)
    plain = Case(llm=MIDDLE, tokens=1024)
    saved, times = checkpointing(plain, rounds=3)
    print(f"checkpointing, 53 M, 1,024 tokens: {saved:.2f} of the memory, {times:.2f} of the time")
    requirements.at_most("checkpointing: memory, share", saved, 0.8)
    requirements.at_most("checkpointing: time of a step, times", times, 1.5)


def checkpointing(plain: Case, rounds: int) -> tuple[float, float]:
    """Return the memory of tensors and the time of a step with checkpointing, as shares of those without."""
    cases = (plain, dataclasses.replace(plain, checkpointing=True))

    def whole(case: Case) -> None:
        train_steps(case, case.build()[0])

    without, with_it = (allocated_peak(lambda case=case: whole(case)) for case in cases)
    models = {case.checkpointing: (case, case.build()[0]) for case in cases}
    taken = take_turns(
        {str(name): (lambda pair=pair: train_steps(*pair, 1)) for name, pair in models.items()},
        rounds,
    )
    return with_it / without, min(taken["True"]) / min(taken["False"])


# ---- stage 3


FRAMES, WINDOW = 384, 36864


def stage_3(folder: Path, requirements: Requirements) -> None:
    """Take one step of stage 3 at its own window, with a video of 384 pooled frames, by a tiny model."""
    features = long_world(folder / "long")
    language, tokenizer = load_language("random:qwen3-tiny")
    language.config.max_position_embeddings = 40960  # as Qwen3-0.6B's
    llm = folder / "long" / "llm"
    llm.mkdir()
    save_language(llm, language, tokenizer)
    common = (
        *("--features", str(features), "--llm", str(llm), "--device", "cpu"),
        *("--hardware", "24gb", "--max-sequence-length", str(WINDOW), "--max-frames", str(FRAMES)),
        *("--batch-size", "1", "--gradient-accumulation-steps", "1", "--held-out", "0"),
        *("--max-steps", "1", "--run", str(folder / "long" / "runs" / "long")),
    )
    run("train.run", "--stage", "1", *common)
    words = [word for word in common if word not in ("--llm", str(llm))]
    _, seconds, memory = run("train.run", "--stage", "3", *words, "--from", f"{common[-1]}/stage1")
    (line,) = (m for m in read_metrics(Path(common[-1]) / "stage3") if "loss" in m)
    print(f"stage 3, {line['tokens']:,} tokens: {seconds:.0f} s in all, peak {memory:.2f} GiB")
    requirements.equal("stage 3: tokens of the step", line["tokens"], WINDOW)
    requirements.at_most("stage 3: peak, GiB", memory, 4.0)


def long_world(folder: Path) -> Path:
    """Make a cache with one video of 384 frames of 64 tokens, whose sample fills the window exactly."""
    # Here, because it imports more than the processes that are measured need.
    from tests.gpu.worlds import ANSWER, QUESTION, World, record_of, samples_of

    folder.mkdir()
    world = World.make(folder, dataclasses.replace(CLIP, width=64), "frame", 1, FRAMES)
    tokenizer = load_language("random:qwen3-tiny", device="meta")[1]
    trees, _ = world.trees(tokenizer, WINDOW, max_frames=FRAMES)
    missing = WINDOW - TrainingSchedule(trees, 1, seed=0).step(0).slices[0].tokens
    video = record_of(0, True, (FRAMES - 1) / 2)
    longer = ANSWER + "a" * missing  # a token each
    write_samples(world.root, "d", samples_of(0, video, [(QUESTION, longer)]))
    return world.root.path


# ---- commands


def run(*argv: str) -> tuple[str, float, float]:
    """Run a command; return its output, seconds, and peak resident memory with its children, GiB."""
    print("$ python -m " + " ".join(argv), flush=True)
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    peak = Peak(process.pid)
    output, _ = process.communicate()
    seconds = time.monotonic() - started
    print(output, flush=True)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}")
    return output, seconds, peak.stop()


class Peak:
    """Sample the memory of a process tree, because a parent does not wait for Ray's workers."""

    def __init__(self, pid: int) -> None:
        self.pid, self.largest, self.done = pid, 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.done.wait(0.1):
            self.largest = max(self.largest, sum(map(resident_bytes, session_members(self.pid))))

    def stop(self) -> float:
        """Stop sampling; return the largest sum, GiB."""
        self.done.set()
        self.thread.join()
        return self.largest / 2**30


def session_members(root: int) -> list[int]:
    """Return the ids of a process and of all its descendants."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                stat = (entry / "stat").read_text()
            except OSError:  # the process has ended
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    members, grown = {root}, True
    while grown:
        new = {pid for pid, parent in parents.items() if parent in members} - members
        grown = bool(new)
        members |= new
    return sorted(members)


def resident_bytes(pid: int) -> int:
    """Return the private and shared memory of a process now; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def end_to_end(folder: Path, requirements: Requirements) -> None:
    """Encode, verify and train, then compare the numbers of parameters."""
    from tests.support.photos import make_folder

    features = str(folder / "features")
    photos = make_folder(folder / "photos")
    encoder = ("--encoder", "clip-vit-l14-336", "--random-weights")
    _, seconds, memory = run(
        "encode.run", "--dataset", f"folder:{photos}", "--features", features, *encoder,
        "--limit", str(IMAGES), "--codec", "fp16",
    )  # fmt: skip
    print(f"encode: {seconds:.0f} s in all, peak {memory:.1f} GiB\n")
    array = next(Path(features).glob("spaces/*/features/image/zarr.json"))
    requirements.equal("row shape", json.loads(array.read_text())["shape"][1:], [576, 1024])
    listed, _, _ = run("cache.verify", "--features", features, "--deep")
    rows = re.search(r"(\d+) image rows", listed)
    requirements.equal("rows stored", rows and int(rows[1]), IMAGES)

    _, seconds, memory = run(
        "train.run", "--stage", "1", "--llm", "random:qwen3-0.6b", "--hardware", "cpu",
        "--max-steps", str(TRAIN_STEPS), "--features", features, "--run", f"{folder}/run",
    )  # fmt: skip
    print(f"train: {seconds:.0f} s in all, peak {memory:.1f} GiB\n")
    metrics = read_metrics(folder / "run" / "stage1")
    taken = max((line["step"] for line in metrics if "loss" in line), default=0)
    requirements.equal("steps taken", taken, TRAIN_STEPS)

    table, _, _ = run("model.verify", "--random-weights", "--llm", "random:qwen3-0.6b")
    for figure in ("1,049,600", "596,049,920"):
        requirements.equal(f"parameters {figure} printed", figure in table, True)
    vision = re.search(r"303[,.][5-9]\d*|304[,.][0-3]\d*", table)
    print(f"parameters of the encoder: {vision[0] if vision else 'absent'}")
    requirements.equal("parameters of the encoder are 303.5-304.3 M", vision is not None, True)


def measure(options: Options, folder: Path, requirements: Requirements) -> None:
    """Measure the parts."""
    parts = [options.only] if options.only else PARTS
    if "end-to-end" in parts:
        end_to_end(folder, requirements)
    if "memory" in parts:
        measure_memory(requirements)
    if "stage-3" in parts:
        stage_3(folder, requirements)


if __name__ == "__main__":
    bench.run("real_size", __doc__, measure, Options)
