"""The effect of a codec on a trained model: the demo trained on fp16, int8 and int4 rows, in pairs.

python -m tests.benchmarks.codecs.paired                     # 15 trainings, about half an hour on two cores
python -m tests.benchmarks.codecs.paired --seeds 2 --steps 100   # a rehearsal
python -m tests.benchmarks.codecs.paired --folder FOLDER     # keeps its files, and continues from them

The same drawings are encoded with each codec, in one cache, without pooling: with 36 tokens per image, int4
stores a mean token as it does for real images. For every seed one model is trained on each codec, from equal
initial weights and on equal samples in equal order; only the codec differs. Then all models answer the
held-out questions. A difference is codec minus fp16, so a negative difference of exact match is a loss. Its
95 % interval is Student's, over the seeds. For exact match a second interval resamples the held-out drawings
(10,000 times, each with all its questions): it shows the effect of the choice of drawings.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

import configs
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from tests.benchmarks import bench
from tests.benchmarks.bench import Requirements

CODECS = ("fp16", "int8", "int4")
DATASETS = {"demo-points": 0.4, "demo-questions": 0.6}
RESAMPLED = 10_000
"""Times that the held-out drawings are resampled."""


@dataclass(frozen=True, kw_only=True)
class Options(bench.Options):
    """Train models on several codecs and compare them in pairs. Files in `folder` are kept and used."""

    seeds: int = 5
    """Models trained for each codec."""
    steps: int = 600
    """Steps of each training, of 64 samples."""
    held_out: float = 0.15
    """Share of the drawings that are held out."""
    jobs: int = 2
    """Trainings at the same time, of one thread each."""


@dataclass(kw_only=True)
class Result:
    """The result of one trained model on the held-out questions."""

    loss: float
    """Cross-entropy per supervised token, nats."""
    mean: float
    """Exact match, mean over the question types."""
    right: dict[str, bool]
    """Whether the answer is right, by sample."""
    task: dict[str, str] = field(repr=False)
    """Question type, by sample."""
    image: dict[str, str] = field(repr=False)
    """Source of the drawing, by sample."""
    digest: str
    """Digest of the training samples, in order."""

    @property
    def accuracy(self) -> float:
        """Share of the questions answered right."""
        return float(np.mean(list(self.right.values())))


# ---- encode, train, evaluate


def command(module: str, flags: dict[str, Any], log: Path) -> None:
    """Run one of the product's commands with one thread; its output goes to `log`."""
    words = [sys.executable, "-m", module]
    for name, value in flags.items():
        for one in value if isinstance(value, tuple) else (value,):
            option = "--" + name.replace("_", "-")
            words += [option] if one is True else [option, str(one)]
    with log.open("a", encoding="utf-8") as out:
        done = subprocess.run(
            words, stdout=out, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}: {' '.join(words[1:])}; see {log}")


def encode_all(folder: Path) -> dict[str, str]:
    """Encode the drawings with every codec; return codec -> name of the space."""
    for codec in CODECS:
        flags = {
            "dataset": tuple(DATASETS),
            "encoder": "demo",
            "codec": codec,
            "pool": 1,
            "workers": 0,
        }
        command("encode.run", flags | {"features": folder / "cache"}, folder / "encode.log")
    root = CacheRoot(folder / "cache")
    readers = [FeatureReader(root.space(name)) for name in root.space_names()]
    return {reader.spec.codec: reader.path.name for reader in readers}


def train_and_ask(options: Options, folder: Path, space: str, codec: str, seed: int) -> Result:
    """Train and evaluate one model, unless its answers exist; return its result."""
    run = folder / f"{codec}-{seed}-{options.steps}"
    answers = run / "stage1" / "evaluation-val.json"
    if not answers.exists():
        demo = configs.load("demo")
        flags = {
            **demo["train"],
            **demo["stages"][2],
            "datasets": ",".join(f"{name}={share}" for name, share in DATASETS.items()),
            "max_steps": options.steps,
            "held_out": options.held_out,
            "seed": seed,
            "space": space,
        }
        where = {"run": run, "features": folder / "cache"}
        log = folder / f"{run.name}.log"
        command("train.run", {"stage": 1, "resume": True, **where, **flags}, log)
        command("train.evaluate", {**where, "limit": 100_000, "no_blind": True}, log)
    evaluation = json.loads(answers.read_text(encoding="utf-8"))
    given = evaluation["answers"]
    return Result(
        loss=evaluation["loss"],
        mean=evaluation["mean"]["value"],
        right={one["sample"]: one["correct"] for one in given},
        task={one["sample"]: one["task"] for one in given},
        image={one["sample"]: one["media"][0] for one in given},
        digest=json.loads((run / "stage1" / "run.json").read_text())["samples_digest"],
    )


def all_results(options: Options, folder: Path) -> dict[tuple[str, int], Result]:
    """Return (codec, seed) -> result. Seeds are trained in order, so an interrupted run has whole pairs."""
    spaces = encode_all(folder)
    begun = time.monotonic()
    wanted = list(product(range(options.seeds), CODECS))
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = {
            (codec, seed): pool.submit(train_and_ask, options, folder, spaces[codec], codec, seed)
            for seed, codec in wanted
        }
        results = {}
        for number, (key, job) in enumerate(jobs.items(), 1):
            results[key] = one = job.result()
            seconds = time.monotonic() - begun
            left = seconds / number * (len(jobs) - number)
            print(
                f"{number}/{len(jobs)}  {key[0]} seed {key[1]}: loss {one.loss:.4f}, exact match "
                f"{one.accuracy:.4f}  ({seconds:.0f} s, ETA {left:.0f} s)",
                flush=True,
            )
    return results


# ---- differences


def over_seeds(differences: Sequence[float]) -> str:
    """Return the mean of paired differences, and half of its 95 % interval (Student's), as text."""
    n, mean = len(differences), float(np.mean(differences))
    if n < 2:
        return f"{mean:+.4f} (one seed: no interval)"
    half = float(stats.t.ppf(0.975, n - 1)) * float(np.std(differences, ddof=1)) / n**0.5
    return f"{mean:+.4f} ± {half:.4f} over {n} seeds"


def over_images(ours: Sequence[Result], base: Sequence[Result]) -> tuple[float, float]:
    """Return the 95 % interval of the mean difference of accuracy when drawings are resampled."""
    samples = list(base[0].right)
    images, index = np.unique([base[0].image[s] for s in samples], return_inverse=True)
    difference = np.zeros(len(samples))
    for one, other in zip(ours, base, strict=True):
        difference += [float(one.right[s]) - float(other.right[s]) for s in samples]
    sums = np.bincount(index, difference / len(base))
    counts = np.bincount(index)
    rng = np.random.default_rng(0)
    means = np.empty(RESAMPLED)
    for i in range(RESAMPLED):
        taken = rng.integers(0, len(images), len(images))
        means[i] = sums[taken].sum() / counts[taken].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def report(results: dict[tuple[str, int], Result], seeds: int, requirements: Requirements) -> None:
    """Print the tables, then the requirements."""
    of = {codec: [results[codec, seed] for seed in range(seeds)] for codec in CODECS}
    base = of["fp16"]
    print(f"\n{'':6}{'loss':>9}{'exact match':>13}{'mean of types':>15}")
    for codec, them in of.items():
        loss, right, mean = (
            float(np.mean([getattr(one, name) for one in them]))
            for name in ("loss", "accuracy", "mean")
        )
        print(f"{codec:6}{loss:9.4f}{right:13.4f}{mean:15.4f}")
    if seeds > 1:
        spread = np.std([one.accuracy for one in base], ddof=1)
        print(f"from seed to seed, fp16: standard deviation of exact match {spread:.4f}")

    print("\ndifference from fp16, and its 95 % interval")
    for codec in CODECS[1:]:
        pairs = list(zip(of[codec], base, strict=True))
        low, high = over_images(of[codec], base)
        print(f"{codec:6}loss         {over_seeds([a.loss - b.loss for a, b in pairs])}")
        right = over_seeds([a.accuracy - b.accuracy for a, b in pairs])
        print(f"{codec:6}exact match  {right}; {low:+.4f} to {high:+.4f} over drawings")
        for task in sorted(set(base[0].task.values())):
            mine = [s for s, t in base[0].task.items() if t == task]
            part = [float(np.mean([a.right[s] - b.right[s] for s in mine])) for a, b in pairs]
            print(f"{'':8}{task:11}{over_seeds(part)}, {len(mine)} questions")

    print()
    paired = all(
        len({results[codec, seed].digest for codec in CODECS}) == 1
        and len({tuple(results[codec, seed].right) for codec in CODECS}) == 1
        for seed in range(seeds)
    )
    requirements.at_least("held-out questions", len(base[0].right), 2000)
    requirements.at_least("seeds", seeds, 5)
    requirements.equal("same samples, same order", paired, True)


def measure(options: Options, folder: Path, requirements: Requirements) -> None:
    """Train and evaluate all models, and compare them."""
    kept = (options.folder or folder).resolve()
    report(all_results(options, kept), options.seeds, requirements)


if __name__ == "__main__":
    bench.run("codecs.paired", __doc__, measure, Options)
