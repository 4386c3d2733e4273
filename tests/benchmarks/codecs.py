"""The row codecs on features of real pretrained transformers, and what else was tried at the same bits.

python -m tests.benchmarks.codecs        # a minute; see tests/benchmarks/activations.py for what it needs

Error: |unpacked - features| / |features| of a row (an image, a passage); mean and largest over rows.
Prints tables, then a requirement a line (`name  measured  required  ok|short`), a summary last, and exits 0
either way.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

import configs
from cache.format import codec
from model import quantize
from tests.benchmarks import activations
from tests.benchmarks.activations import Features
from tests.benchmarks.codec_variants import EIGHT_BITS, FOUR_BITS, Variant, bound_bits, quantised

TOKENS, WIDTH = 576, 1024
"""Of the row that is timed: ViT-L/14@336."""
ROWS = 8
LIMITS = {"int8": 0.006, "int4": 0.09}
"""Relative error of a row that each codec must not exceed."""
LAYERS, TEXT_TOKENS = 28, 100
"""Of Qwen3-0.6B, and of the text beside an image."""


def errors(x: Features, y: Features) -> np.ndarray:
    """Relative error of every row."""
    off = np.linalg.norm((x - y).reshape(len(x), -1).astype(np.float64), axis=1)
    return off / np.linalg.norm(x.reshape(len(x), -1).astype(np.float64), axis=1)


def cosine(x: Features, y: Features) -> float:
    """Mean over all tokens of the cosine between a token and what came back."""
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return float(((x * y).sum(1)[norms > 0] / norms[norms > 0]).mean())


def through(x: Features, name: str) -> Features:
    """Packed and unpacked."""
    return codec.unpack(codec.pack(x, name), name, *x.shape[1:]).astype(np.float32)


# ---- speed


def seconds(work: Callable[[], object], clock: Callable[[], float], repeats: int = 9) -> float:
    """Median of several; one to warm up."""
    work()
    taken = []
    for _ in range(repeats):
        begun = clock()
        work()
        taken.append(clock() - begun)
    return statistics.median(taken)


def gigabytes_per_second(name: str, threads: int, library: str) -> float:
    """float16 values made per second; CPU time where one thread works, so that other jobs disturb less."""
    features = torch.randn(ROWS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    rows = quantize.pack(features, name).rows
    arrays = [row.numpy() for row in rows]
    clock = time.process_time if threads == 1 else time.perf_counter
    size = ROWS * TOKENS * WIDTH * 2 / 1e9
    if library == "torch":
        torch.set_num_threads(threads)
        taken = seconds(lambda: quantize.unpack(rows, name, TOKENS, WIDTH), clock)
        torch.set_num_threads(1)
        return size / taken
    with ThreadPoolExecutor(threads) as pool:  # a row a task, as tools do it
        return size / seconds(
            lambda: list(pool.map(lambda row: codec.unpack(row, name, TOKENS, WIDTH), arrays)),
            clock,
        )


def step_seconds() -> float:
    """CPU time of Qwen3-0.6B's 28 layers on one image and its text, forward and backward: a lower bound
    of a training step, which also has a head, a loss and an optimizer."""
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        hidden_size=1024, intermediate_size=3072, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, num_hidden_layers=1, vocab_size=8,
    )  # fmt: skip
    layer = Qwen3Model(config)
    x = torch.randn(1, TOKENS + TEXT_TOKENS, 1024, requires_grad=True)

    def step() -> None:
        layer(inputs_embeds=x, use_cache=False).last_hidden_state.sum().backward()

    return LAYERS * seconds(step, time.process_time, 3)


# ---- tables


def stored(name: str, variant: Variant, x: Features, train: Features) -> np.ndarray:
    """Prints one alternative's row; returns its errors."""
    lost = errors(x, quantised(variant, x, train))
    bits = variant.bits(*x.shape[1:])
    print(f"  {name:58}{bits:6.2f}{lost.mean():9.4f}{lost.max():9.4f}")
    return lost


def tables(data: dict[str, Features]) -> list[tuple[str, str, str, bool]]:
    """Prints everything about errors; the requirements' lines."""
    lines = []
    print("codec     bytes of 576 x 1024   features    error mean   largest      cosine")
    for name in codec.CODECS:
        size = codec.row_bytes(name, TOKENS, WIDTH)
        for kind, x in data.items():
            y = through(x, name)
            lost = errors(x, y)
            print(
                f"{name:10}{size:>19,}   {kind:12}{lost.mean():10.5f}{lost.max():10.5f}"
                f"{cosine(x, y):12.6f}"
            )
            if name in LIMITS:
                for what, value in (("mean", lost.mean()), ("largest", lost.max())):
                    label = f"{name} error, {kind}, {what}"
                    ok = value <= LIMITS[name]
                    lines.append((label, f"{value:.4f}", f"<= {LIMITS[name]}", bool(ok)))
    for kind, x in data.items():
        train, test = x[::2], x[1::2]  # what is fitted is fitted on other rows
        for bits, variants in (("8", EIGHT_BITS), ("4", FOUR_BITS)):
            print(f"\n{kind}, {bits} bits a value{'bits':>40}{'mean':>9}{'largest':>9}")
            means = {n: stored(n, v, test, train).mean() for n, v in variants.items()}
            (first, ours), *_ = means.items()
            most = variants[first].bits(*x.shape[1:])
            same = {n: m for n, m in means.items() if variants[n].bits(*x.shape[1:]) <= most}
            best = min(same, key=lambda n: same[n])
            print(f"  best at no more bits: {best}, {1 - same[best] / ours:.1%} below ours")
            if bits == "4":
                label = f"int4 above the best tried, {kind}"
                worse = ours / same[best] - 1
                lines.append((label, f"{worse:.1%}", "<= 5%", bool(worse <= 0.05)))
        target = errors(test, through(test, "int4")).mean()
        bound = bound_bits(train, test, target)
        print(
            f"\n{kind}: transform coding at int4's error needs at least {bound:.2f} bits a value "
            "(Gaussian bound, PCA basis of other rows)"
        )
    return lines


def speed() -> list[tuple[str, str, str, bool]]:
    """Prints how fast rows unpack; the requirements' lines."""
    lines = []
    print("\n               unpack, GB/s of float16                         pack, ms of CPU a row")
    print("          torch, 1 thread   2 threads   numpy, 1 thread   2 threads    torch, 1 thread")
    step = step_seconds()
    row = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    for name in LIMITS:  # fp16 is a view
        cells = [gigabytes_per_second(name, t, lib) for lib in ("torch", "numpy") for t in (1, 2)]
        packing = 1e3 * seconds(partial(quantize.pack, row, name), time.process_time)
        speeds = f"{cells[0]:17.2f}{cells[1]:12.2f}{cells[2]:18.2f}{cells[3]:12.2f}"
        print(f"{name:8}{speeds}{packing:19.0f}")
        share = TOKENS * WIDTH * 2 / 1e9 / cells[0] / step
        lines.append((f"{name} unpack / step, one thread", f"{share:.3%}", "<= 1%", share <= 0.01))
    print(f"a step's 28 layers: {step:.1f} s of CPU, {TOKENS} + {TEXT_TOKENS} tokens")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    torch.set_num_threads(1)
    data = {"vision": activations.vision(), "language": activations.language()}
    for kind, x in data.items():
        largest = np.abs(x).max()
        rms = np.sqrt(np.square(x).mean())
        print(f"{kind}: {' x '.join(map(str, x.shape))}, rms {rms:.2f}, largest {largest:.1f}")
    lines = tables(data) + speed()
    print()
    for name, measured, required, ok in lines:
        print(f"{name:38}{measured:>10}{required:>10}  {'ok' if ok else 'short'}")
    print(f"codecs: {sum(line[3] for line in lines)}/{len(lines)} ok")
    return 0


if __name__ == "__main__":
    configs.command(main)
