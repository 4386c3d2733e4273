"""The row codecs on features of real pretrained transformers, and other quantisers at the same bits.

python -m tests.benchmarks.codecs        # two minutes, 1 GB of disk; activations.py says what else it needs

The error of a row (an image, a passage) is |unpacked - features| / |features|; tables have its mean and its
largest value over rows. The variants are one quantiser with every choice open; the first entry of FOUR_BITS
and of EIGHT_BITS is our codec, made of the same parts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from cache.format import codec
from cache.format.codec import INT4_DIVISORS, INT4_LEVELS, rotation_signs
from model import quantize
from nanomolmo2.unpack import unpack
from tests.benchmarks import bench
from tests.benchmarks.bench import Options, Requirements
from tests.benchmarks.codecs import activations
from tests.benchmarks.codecs.activations import Features
from tests.benchmarks.codecs.convert import measure_conversion
from tests.benchmarks.codecs.reduced import measure_reduced

TOKENS, WIDTH = 576, 1024
"""Size of the row that is timed: ViT-L/14@336."""
ROWS = 8
LIMITS = {"int8": 0.006, "int4": 0.09}
"""Relative error of a row that each codec must not exceed."""
LAYERS, TEXT_TOKENS = 28, 100
"""Layers of Qwen3-0.6B, and tokens of text beside an image."""


def errors(x: Features, y: Features) -> np.ndarray:
    """Return the relative error of every row."""
    off = np.linalg.norm((x - y).reshape(len(x), -1).astype(np.float64), axis=1)
    return off / np.linalg.norm(x.reshape(len(x), -1).astype(np.float64), axis=1)


def cosine(x: Features, y: Features) -> float:
    """Return the cosine between tokens and unpacked tokens, mean over all tokens."""
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return float(((x * y).sum(1)[norms > 0] / norms[norms > 0]).mean())


def through(x: Features, name: str) -> Features:
    """Return features after packing and unpacking."""
    return codec.unpack(codec.pack(x, name), name, *x.shape[1:]).astype(np.float32)


# ---- speed


def seconds(work: Callable[[], object], clock: Callable[[], float], repeats: int = 9) -> float:
    """Return the median time of `repeats` calls, after one to warm up."""
    work()
    return statistics.median(bench.seconds(work, clock) for _ in range(repeats))


def gigabytes_per_second(name: str, threads: int, library: str) -> float:
    """Return GB of float16 values unpacked per second.

    With one thread the clock is CPU time, which other jobs disturb less.
    """
    features = torch.randn(ROWS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    rows = quantize.pack(features, name).rows
    arrays = [row.numpy() for row in rows]
    clock = time.process_time if threads == 1 else time.perf_counter
    size = ROWS * TOKENS * WIDTH * 2 / 1e9
    if library == "torch":
        torch.set_num_threads(threads)
        taken = seconds(lambda: unpack(rows, name, TOKENS, WIDTH), clock)
        torch.set_num_threads(1)
        return size / taken
    with ThreadPoolExecutor(threads) as pool:  # one task for each row, as the tools do
        return size / seconds(
            lambda: list(pool.map(lambda row: codec.unpack(row, name, TOKENS, WIDTH), arrays)),
            clock,
        )


def step_seconds() -> float:
    """Return the CPU time of Qwen3-0.6B's 28 layers on one image and its text, forward and backward.

    It is a lower bound of a training step, which also has a head, a loss and an optimizer.
    """
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
    """Print one variant's line; return its errors."""
    lost = errors(x, quantised(variant, x, train))
    bits = variant.bits(*x.shape[1:])
    print(f"  {name:58}{bits:6.2f}{lost.mean():9.4f}{lost.max():9.4f}")
    return lost


def tables(data: dict[str, Features], requirements: Requirements) -> None:
    """Print the errors of the row layouts and of the variants."""
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
                    requirements.at_most(f"{name} error, {kind}, {what}", value, LIMITS[name])
    for kind, x in data.items():
        train, test = x[::2], x[1::2]  # levels and means are fitted on other rows
        for bits, variants in (("8", EIGHT_BITS), ("4", FOUR_BITS)):
            print(f"\n{kind}, {bits} bits per value{'bits':>40}{'mean':>9}{'largest':>9}")
            means = {n: stored(n, v, test, train).mean() for n, v in variants.items()}
            (first, ours), *_ = means.items()
            most = variants[first].bits(*x.shape[1:])
            same = {n: m for n, m in means.items() if variants[n].bits(*x.shape[1:]) <= most}
            best = min(same, key=lambda n: same[n])
            print(f"  best at no more bits: {best}, {1 - same[best] / ours:.1%} below ours")
            if bits == "4":
                requirements.at_most(f"int4 / the best tried, {kind}", ours / same[best], 1.05)
        target = errors(test, through(test, "int4")).mean()
        bound = bound_bits(train, test, target)
        print(
            f"\n{kind}: transform coding at int4's error needs at least {bound:.2f} bits per value "
            "(Gaussian bound, PCA basis of other rows)"
        )


def speed(requirements: Requirements) -> None:
    """Print how fast rows are unpacked and packed."""
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
        requirements.at_most(f"{name} unpack / step, one thread", share, 0.01)
    print(f"a step's 28 layers: {step:.1f} s of CPU, {TOKENS} + {TEXT_TOKENS} tokens")


# ---- variants

NF4 = (
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
)
"""QLoRA's levels: equal shares of normal values, with a level at 0."""
FIT_ROUNDS = 15
"""Rounds of Lloyd-Max."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to quantise."""

    code_bits: int
    """Bits of a code."""
    levels: tuple[float, ...]
    """Values of the codes as multiples of the scale, ascending."""
    divisors: tuple[float, ...]
    """Scales to try: the block's largest magnitude divided by each. The smallest squared error decides."""
    block: int = 64
    """Values that share a scale; 0: all values of a token."""
    rotation: int = 64
    """Values that are rotated together; 0: no rotation."""
    side: bool = True
    """Whether a scale may be negative, so that the largest magnitude meets the lowest level."""
    least_squares: bool = False
    """Whether the scale is fitted again, to the codes."""
    mean: Literal["none", "row", "space"] = "none"
    """The mean token subtracted first: the row's own, which is stored with it, or that of other rows."""
    fitted: bool = False
    """Whether the levels are fitted (Lloyd-Max) to other rows of the features."""

    def bits(self, tokens: int, width: int) -> float:
        """Return the bits of a value, with its share of the scale and of the mean token."""
        mean = 16 / tokens if self.mean == "row" else 0.0
        return self.code_bits + 16 / (self.block or width) + mean


INT4 = Variant(
    code_bits=4, levels=INT4_LEVELS, divisors=tuple(map(float, INT4_DIVISORS)), mean="row"
)
EVEN = replace(INT4, levels=tuple(range(-8, 8)), divisors=(7.25, 7.75, 8, 8.25, 8.5, 8.75, 9, 9.25))
PLAIN = replace(EVEN, levels=tuple(range(-7, 8)), divisors=(7,), side=False)
FOUR_BITS: Mapping[str, Variant] = {
    "int4: row's mean off, rotated, 64 a scale, searched": INT4,
    "no mean off": replace(INT4, mean="none"),
    "the mean token of other rows off": replace(INT4, mean="space"),
    "largest value on the lowest level (no search)": replace(INT4, divisors=(127,)),
    "16 scales tried": replace(INT4, divisors=tuple(np.arange(95, 152, 3.75))),
    "scale refitted by least squares": replace(INT4, least_squares=True),
    "levels fitted to these features": replace(INT4, fitted=True),
    "NF4 levels, largest value": replace(INT4, levels=NF4, divisors=(1,), side=False),
    "NF4 levels, searched": replace(
        INT4, levels=NF4, divisors=tuple(np.arange(0.8, 1.16, 0.05)), side=False
    ),
    "even steps, searched, signed scale": EVEN,
    "even steps, -8 to the largest value": replace(EVEN, divisors=(8,)),
    "even steps, 7 to the largest value": PLAIN,
    "blocks of 32": replace(INT4, block=32, rotation=32),
    "blocks of 128": replace(INT4, block=128, rotation=128),
    "blocks of 256": replace(INT4, block=256, rotation=256),
    "rotated over 256, scales for 64": replace(INT4, rotation=256),
    "not rotated": replace(INT4, rotation=0),
    "a scale a token, rotated": replace(INT4, block=0),
    "a scale a token, not rotated": replace(INT4, block=0, rotation=0),
    "no mean off, not rotated, even steps": replace(PLAIN, mean="none", rotation=0),
    "no mean off, rotated, even steps": replace(PLAIN, mean="none"),
    "no mean off, a scale a token, even steps": replace(PLAIN, mean="none", rotation=0, block=0),
}
INT8 = Variant(code_bits=8, levels=tuple(range(-127, 128)), divisors=(127,), side=False, mean="row")
EIGHT_BITS: Mapping[str, Variant] = {
    "int8: row's mean off, rotated, 64 a scale, largest on 127": INT8,
    "no mean off (the first spaces)": replace(INT8, mean="none"),
    "the mean token of other rows off": replace(INT8, mean="space"),
    "scale searched": replace(INT8, divisors=(127, 129, 131, 134, 137, 141)),
    "-128 too, signed scale": replace(
        INT8, levels=tuple(range(-128, 128)), divisors=(128,), side=True
    ),
    "blocks of 32": replace(INT8, block=32, rotation=32),
    "blocks of 128": replace(INT8, block=128, rotation=128),
    "blocks of 256": replace(INT8, block=256, rotation=256),
    "not rotated": replace(INT8, rotation=0),
    "a scale a token, rotated": replace(INT8, block=0),
    "a scale a token, not rotated": replace(INT8, block=0, rotation=0),
}


def quantised(variant: Variant, x: Features, others: Features) -> Features:
    """Return features (rows, tokens, width) after quantising; levels and means are fitted on `others`."""
    mean = np.zeros(1, np.float32)
    if variant.mean == "row":
        mean = x.mean(1, keepdims=True).astype(np.float16).astype(np.float32)
    elif variant.mean == "space":
        mean = others.reshape(-1, x.shape[-1]).mean(0)
    if variant.fitted:
        left = others - others.mean(1, keepdims=True)
        variant = replace(variant, levels=fit_levels(variant, _rotated(left, variant.rotation)))
    blocks = _rotated(x - mean, variant.rotation).reshape(-1, variant.block or x.shape[-1])
    back = _unrotated(_nearest(variant, blocks), variant.rotation)
    return back.reshape(x.shape) + mean


def _nearest(variant: Variant, blocks: torch.Tensor) -> torch.Tensor:
    """Return the values of the codes nearest to (N, block) values."""
    levels = torch.tensor(variant.levels, dtype=torch.float32)
    scales = _scales(variant, blocks, levels)
    chosen = _levels_of(blocks, scales, levels)
    if variant.least_squares:
        fitted = ((chosen * blocks).sum(1) / (chosen * chosen).sum(1)).nan_to_num(0).half().float()
        chosen, scales = _levels_of(blocks, fitted, levels), fitted
    return chosen * scales[:, None]


def _levels_of(blocks: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    between = (levels[1:] + levels[:-1]) / 2
    in_scales = torch.where(scales[:, None] != 0, blocks / scales[:, None], 0.0)
    return levels[torch.bucketize(in_scales, between)]


def _scales(variant: Variant, blocks: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return the best of the scales tried, (N,)."""
    high, low = blocks.amax(1), blocks.amin(1)
    side = torch.where((high > -low) & variant.side, -1.0, 1.0)
    least = torch.full_like(high, torch.inf)
    best = torch.zeros_like(high)
    for divisor in variant.divisors:
        scales = (torch.maximum(high.abs(), low.abs()) / divisor * side).half().float()
        off = _levels_of(blocks, scales, levels) * scales[:, None] - blocks
        lost = (off * off).sum(1)
        best = torch.where(lost < least, scales, best)
        least = torch.minimum(lost, least)
    return best


def fit_levels(variant: Variant, blocks: torch.Tensor) -> tuple[float, ...]:
    """Fit levels to rotated values by Lloyd-Max: improve levels and scales in turns."""
    blocks = blocks.reshape(-1, variant.block)
    levels = torch.tensor(variant.levels, dtype=torch.float32)
    for _ in range(FIT_ROUNDS):
        scales = _scales(variant, blocks, levels)
        kept = scales != 0
        of, steps = blocks[kept], scales[kept, None]
        index = torch.bucketize(of / steps, (levels[1:] + levels[:-1]) / 2).flatten()
        weight = steps.square().expand_as(of).flatten()
        sums = torch.zeros(len(levels)).index_add_(0, index, (of * steps).flatten())
        levels = (sums / torch.zeros(len(levels)).index_add_(0, index, weight)).sort().values
    return tuple(levels.tolist())


def _rotated(x: Features, size: int) -> torch.Tensor:
    """Return flat values after a Hadamard rotation with random signs over `size` values; 0: no rotation."""
    values = torch.from_numpy(np.ascontiguousarray(x)).flatten()
    if not size:
        return values
    signs = torch.from_numpy(np.resize(rotation_signs(), size))
    return ((values.view(-1, size) * signs) @ _hadamard(size)).flatten()


def _unrotated(x: torch.Tensor, size: int) -> Features:
    if size:
        x = (x.reshape(-1, size) @ _hadamard(size)) * np.resize(rotation_signs(), size)
    return x.numpy()


def _hadamard(size: int) -> torch.Tensor:
    """Return the orthonormal Hadamard matrix."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def bound_bits(train: Features, test: Features, error: float) -> float:
    """Return the fewest bits per value for a relative error, if tokens are normally distributed.

    It is reverse water-filling over the variances of `test` along the principal directions of `train`, after
    subtracting each row's mean token and scaling each token to rms 1, which are not counted.
    """
    width = test.shape[-1]
    one, other = (
        (x - x.mean(1, keepdims=True)).reshape(-1, width).astype(float) for x in (train, test)
    )
    length = np.sqrt(np.square(other).mean(1, keepdims=True))
    one = one / np.sqrt(np.square(one).mean(1, keepdims=True))
    _, basis = np.linalg.eigh(np.cov(one.T))
    variances = np.square((other / length) @ basis).mean(0)
    # Squared error allowed for a token of rms 1, so that the relative error of all features is `error`.
    wanted = error**2 * np.square(test, dtype=float).mean() / np.square(length).mean() * width
    low, high = 0.0, float(variances.max())
    for _ in range(100):
        water = (low + high) / 2
        low, high = (water, high) if np.minimum(variances, water).sum() < wanted else (low, water)
    return float(np.maximum(0.0, 0.5 * np.log2(variances / water)).sum() / width)


def measure(_: Options, folder: Path, requirements: Requirements) -> None:
    """Print the tables of errors and of speed."""
    torch.set_num_threads(1)
    data = {"vision": activations.vision(), "language": activations.language()}
    for kind, x in data.items():
        largest = np.abs(x).max()
        rms = np.sqrt(np.square(x).mean())
        print(f"{kind}: {' x '.join(map(str, x.shape))}, rms {rms:.2f}, largest {largest:.1f}")
    tables(data, requirements)
    measure_reduced(requirements)
    speed(requirements)
    measure_conversion(folder, 600, 3, requirements)


if __name__ == "__main__":
    bench.run("codecs", __doc__, measure, Options)
