"""Training: the loader's copies, runs on the device and on the CPU, resume, NCCL, and answers."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from cache.store.paths import CacheRoot
from configs.hardware import one_card
from model.inference import answer_ids
from model.verify.memory import sizes_of
from model.verify.report import describe_device, memory_verdicts
from model.vlm import build_vlm, parameter_counts
from tests.gpu import collective
from tests.gpu.lines import Lines, Scale, unequal_rows
from tests.support import ROOT, trained_runs
from tests.support.feature_caches import mixed_world
from tests.support.trained_runs import ENVIRONMENT, losses
from train.data.loader import FeatureLoader
from train.data.schedule import TrainingSchedule
from train.distributed.group import disconnect
from train.run import main as train

STEPS = 12
WORDS = [
    *("--llm", "random:qwen3-tiny", "--batch-size", "8", "--gradient-accumulation-steps", "1"),
    *("--learning-rate", "3e-3", "--warmup-steps", "2", "--connector-warmup-steps", "2"),
    *("--max-sequence-length", "512", "--held-out", "0.2", "--max-steps", str(STEPS)),
    *("--save-every", "6", "--eval-every", "6", "--log-every", "1"),
]


WAYS = {
    "float32": ["--precision", "float32"],
    "bfloat16": ["--precision", "bfloat16"],
    "bfloat16, SDPA": ["--precision", "bfloat16", "--no-use-flash-attention"],
}
"""Name -> options. Float32 always uses SDPA."""


def check_training(lines: Lines, scale: Scale, folder: Path) -> None:
    """Check everything about training, on tiny models."""
    with lines.part("loader"):
        check_loader(lines, scale, folder / "loader")
    root = trained_runs.make(folder / "colors")
    runs = folder / "runs"
    for name, words in WAYS.items():
        with lines.part(f"train.run: {name}"):
            check_runs(lines, scale, root, runs, name, words)
    with lines.part("torchrun"):
        check_collectives(lines, scale)
    with lines.part("generate"):
        check_answers(lines, scale)
    with lines.part("model.verify"):
        check_verify(lines, scale)


def check_loader(lines: Lines, scale: Scale, folder: Path) -> None:
    """Copy micro-batches while the GPU is behind: no buffer is overwritten before its copy has ended."""
    world = mixed_world(folder)
    trees = world.trees(world.join("d", "e"))
    pairs = []
    for device in (scale.device, torch.device("cpu")):
        taken: list[tuple[Tensor, Tensor]] = []
        with FeatureLoader(
            TrainingSchedule(trees, 16, seed=0),
            world.reader,
            max_tokens=1024,
            stop=12,
            ahead=1,
            pin=device.type == "cuda",
        ) as loader:
            for micro in loader:
                if device.type == "cuda":
                    assert micro.codes["image"].is_pinned()
                    torch.cuda._sleep(50_000_000)  # about 25 ms: the copies below wait for it
                moved = micro.to(device)
                taken.append((moved.codes["image"].clone(), moved.packed.input_ids.clone()))
        pairs.append(taken)
    wrong = sum(
        unequal_rows(a[0], b[0]) + int(not torch.equal(a[1].cpu(), b[1]))
        for a, b in zip(*pairs, strict=True)
    )
    lines.at_most(f"loader: rows of {len(pairs[0])} pinned copies that differ", wrong, 0)


def run(root: CacheRoot, folder: Path, name: str, device: str, *words: str) -> list[float]:
    """Train below `folder`/runs; return the losses."""
    folder.mkdir(exist_ok=True)
    said = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(said):
        code = train(
            [*WORDS, "--features", str(root.path), "--device", device, "--run", name, *words]
        )
    assert code == 0, said.getvalue()
    return losses(folder / "runs" / name / "stage1")


def check_runs(
    lines: Lines, scale: Scale, root: CacheRoot, folder: Path, way: str, words: list[str]
) -> None:
    """Train on the device and on the CPU, once more, and from the middle."""
    device, name, label = str(scale.device), way.replace(", ", "-"), f"train.run: {way}"
    is_exact = way != "bfloat16"  # the kernel's backward pass adds in no fixed order
    whole = run(root, folder, f"whole-{name}", device, *words)
    reference = folder / "runs" / "cpu" / "stage1"  # the same for every way
    if not reference.exists():
        run(root, folder, "cpu", "cpu", "--precision", "float32")
    on_cpu = losses(reference)
    limit = 1e-4 if way == "float32" else 2e-2
    lines.at_most(f"{label}: {STEPS} losses, off the CPU's", off(whole, on_cpu), limit)
    lines.at_most(f"{label}: last loss of the first", whole[-1] / whole[0], 0.9)

    stage = folder / "runs" / f"whole-{name}" / "stage1"
    final = load_weights(stage)
    cut = stage.parent.with_name(f"cut-{name}") / "stage1"
    shutil.copytree(stage.parent, cut.parent)
    shutil.rmtree(cut / "final")
    shutil.rmtree(max((cut / "checkpoints").glob("step-*")))
    resumed = run(root, folder, f"cut-{name}", device, *words, "--resume")
    limit = 0 if is_exact else 1e-3
    lines.at_most(f"{label}: losses, resumed, off the whole run's", off(resumed, whole), limit)
    after = load_weights(cut)
    wrong = sum(not torch.equal(after[name], final[name]) for name in final)
    if is_exact:
        lines.at_most(f"{label}: tensors that differ after a resume", wrong, 0)
    else:
        lines.note(f"{label}: tensors that differ after a resume", f"{wrong} of {len(final)}")


def off(ours: list[float], reference: list[float]) -> float:
    """Return the largest relative difference of two lists of losses."""
    return max(abs(a / b - 1) for a, b in zip(ours, reference, strict=True))


def load_weights(stage: Path) -> dict[str, Tensor]:
    """Return every tensor of a finished model."""
    found = {}
    for path in sorted((stage / "final").rglob("*.safetensors")):
        found |= {f"{path.parent.name}/{k}": v for k, v in load_file(path).items()}
    assert found
    return found


def check_collectives(lines: Lines, scale: Scale) -> None:
    """Sum through NCCL in a process that torchrun starts, or on a CPU through gloo in this one."""
    if not scale.on_gpu:  # torchrun and its process would import everything again
        disconnect()
        collective.main(scale.device.type)
        lines.equal("this process: sums by gloo", 0, 0)
        return
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "1",
    ]
    done = subprocess.run(
        [*command, "-m", "tests.gpu.collective", scale.device.type],
        cwd=ROOT,
        env=ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = done.stdout.strip().splitlines()[-1:] or done.stderr.strip().splitlines()[-1:]
    print(*said)
    lines.equal("torchrun, one process: sums by NCCL", done.returncode, 0)


def check_answers(lines: Lines, scale: Scale) -> None:
    """Answer greedily on the device and on the CPU: equal tokens, in batches with padding."""
    vlm, tokenizer = build_vlm(64, "random:qwen3-tiny", "mlp", seed=6)
    g = torch.Generator().manual_seed(11)
    for p in vlm.parameters():
        p.data += (0.3 if p.dim() == 1 else 0.1) * torch.randn(p.shape, generator=g)
    prompts = []
    for i in range(6):
        images = torch.randn(i % 3, 4, 64, generator=g)
        prompts.append(([("user", "<image>" * (i % 3) + "What is this? " * (i + 1), 1.0)], images))
    answers = [
        answer_ids(vlm.to(device), tokenizer, prompts, max_new_tokens=16, batch_size=4)
        for device in (torch.device("cpu"), scale.device)
    ]
    wrong = sum(a != b for a, b in zip(*answers, strict=True))
    lines.at_most(f"generate: of {len(prompts)} answers, those that differ", wrong, 0)


def check_verify(lines: Lines, scale: Scale) -> None:
    """Describe the device and judge it, as `python -m model.verify` does."""
    print(describe_device(scale.device))
    vlm, _ = build_vlm(1024, "random:qwen3-0.6b", "linear", 0, device="meta")
    counts = {part: total for part, (_, total) in parameter_counts(vlm).items()}
    verdicts = memory_verdicts(scale.device, sizes_of(vlm.language.config, **counts))
    print(*verdicts, sep="\n")
    if scale.on_gpu:
        card = torch.cuda.get_device_properties(scale.device)
        preset = one_card(card.total_memory)
        lines.equal("model.verify: verdicts on this card", len(verdicts), 1)
        lines.note("model.verify: hardware preset of this card", preset)
