"""The row codecs in torch, on any device. Every bit equals that of `cache.format.codec`.

Features are packed on the encoder's device before the copy to the host, and unpacked on the trainer's device
after the copy from it. So a copy moves a quarter of the bytes of float32 (int8), or an eighth (int4).

    rows = pack(features, "int8").rows                    # (B, M, V) -> (B, row_bytes) uint8
    features = unpack(rows, "int8", tokens=M, width=V)    # -> (B, M, V) float16

B images in a batch, R rows of a part of it, M tokens, V values a token, N blocks of 64 values.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from cache.format.codec import (
    BLOCK,
    CODECS,
    FP16_MAX,
    INT4_CELLS,
    INT4_DIVISORS,
    INT4_LEVELS,
    INT8_MAX,
    hadamard,
    int4_cells,
    rotation_signs,
    row_bytes,
    row_parts,
)

_LIMIT = float(FP16_MAX)
CPU_BLOCKS = 8192
"""Blocks of 64 values that a CPU packs or unpacks at a time, but at least one row.

That is 2 MB as float32, so intermediate values stay in the CPU's cache. Eight rows of 576 x 1024 unpack three
times as fast.
"""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Packed rows of one batch, with the errors of packing."""

    rows: torch.Tensor
    """(B, row_bytes) uint8, as stored."""
    error: torch.Tensor
    """(B,) float32: |unpacked - features| / |features|, 0 for a row of zeros."""
    finite: torch.Tensor
    """(B,) bool; False for features with NaN or Inf, whose row must not be stored."""
    clipped: int
    """Values that were clipped to float16's range, in all finite rows."""


def pack(features: torch.Tensor, codec: str) -> Packed:
    """Pack features (B, M, V) of any float dtype into rows, on their device.

    Raises:
        ValueError: the codec is unknown, or V is not a multiple of its block.
    """
    batch, tokens, width = features.shape
    size = row_bytes(codec, tokens, width)
    x = features.detach()
    if x.device.type == "mps":
        x = x.cpu()  # Metal's division is inexact; the copy is cheap, because memory is shared
    x = x.float()
    largest = x.flatten(1).abs().amax(1)  # (B,); NaN and Inf propagate
    finite = torch.isfinite(largest)
    if not finite.all():
        x = torch.where(finite[:, None, None], x, 0.0)
    clipped, clean = 0, x
    if (largest > _LIMIT).any():
        clipped = int((x.abs() > _LIMIT).sum())
        clean = x.clamp(-_LIMIT, _LIMIT)
    if codec == "fp16":
        rows = clean.half().contiguous().view(torch.uint8).reshape(batch, size)
    else:
        with _without_autocast(x.device):
            pieces = _pieces(batch, tokens * width // BLOCK, x.device)
            # Rounded first, so that cache.convert gets equal rows from stored fp16 rows.
            rows = torch.cat([_pack_rows(clean[part].half().float(), codec) for part in pieces])
    # Squares of values beyond float16's range may overflow float32.
    precision = torch.float64 if clipped else torch.float32
    norm = torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=precision)
    off = unpack(rows, codec, tokens, width, torch.float32).sub_(x).flatten(1)
    lost = torch.linalg.vector_norm(off, dim=1, dtype=precision)
    error = torch.where(norm > 0, lost / norm, 0.0).float()
    return Packed(rows=rows, error=error, finite=finite, clipped=clipped)


def unpack(
    rows: torch.Tensor, codec: str, tokens: int, width: int, dtype: torch.dtype = torch.float16
) -> torch.Tensor:
    """Unpack rows (B, row_bytes) uint8 into features (B, tokens, width), on their device.

    The values are those of float16 for every `dtype`, because the codec defines float16 values.

    Raises:
        ValueError: the rows are not (B, row_bytes) uint8, or as `pack`.
    """
    size = row_bytes(codec, tokens, width)
    if rows.ndim != 2 or rows.shape[1] != size or rows.dtype != torch.uint8:
        raise ValueError(
            f"rows {tuple(rows.shape)} {rows.dtype}; {codec} {tokens} x {width} takes (B, {size}) uint8"
        )
    batch = len(rows)
    rows = rows.contiguous()
    if codec == "fp16":
        return rows.view(torch.float16).reshape(batch, tokens, width).to(dtype)
    x = torch.empty((batch, tokens, width), dtype=torch.float16, device=rows.device)
    with _without_autocast(rows.device):
        for part in _pieces(batch, tokens * width // BLOCK, rows.device):
            x[part] = _values(rows[part], codec, tokens, width)
    return x.to(dtype)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Disable autocast, under which the trainer unpacks.

    Its bfloat16 matrix products would round sums that are exact in float32 (found by a test, 2026-11-24).
    """
    return torch.autocast(device.type, enabled=False)


def _pieces(rows: int, blocks: int, device: torch.device) -> Iterator[slice]:
    """Yield slices of rows of `blocks` blocks: all rows on a GPU, `CPU_BLOCKS` blocks on a CPU."""
    step = max(1, CPU_BLOCKS // blocks if device.type == "cpu" else rows)
    return (slice(start, start + step) for start in range(0, rows, step))


def _values(rows: torch.Tensor, codec: str, tokens: int, width: int) -> torch.Tensor:
    """Unpack int8 or int4 rows: (R, row_bytes) -> (R, M, V) float32, within float16's range.

    The first stage of the Hadamard transform is computed by sums and differences, which halves the matrix
    product: H = [[h, h], [h, -h]].
    """
    constants = _constants(rows.device)
    codes_end, scales_end, size = row_parts(codec, tokens, width)
    blocks = len(rows) * tokens * width // BLOCK
    stored = rows[:, :codes_end].reshape(blocks, -1)  # (N, 64), or (N, 32) for int4
    halves = torch.empty((blocks, 2, BLOCK // 2), device=rows.device)
    if codec == "int4":  # this stage adds and subtracts the two halves of a byte
        index = stored.flatten().int()
        halves[:, 0] = constants.sums.index_select(0, index).view(stored.shape)
        halves[:, 1] = constants.differences.index_select(0, index).view(stored.shape)
    else:
        left, right = stored.view(torch.int8).float().chunk(2, dim=1)
        torch.add(left, right, out=halves[:, 0])
        torch.sub(left, right, out=halves[:, 1])
    # Sums of integers up to 64 * 127 are exact in float32, and in TF32, in any order.
    # (2 N, 32) @ (32, 32) -> (N, 64)
    x = (halves.view(-1, BLOCK // 2) @ constants.matrix).view(-1, BLOCK)
    x.mul_(_halves_of(rows, codes_end, scales_end).mul_(0.125).view(-1, 1)).mul_(constants.signs)
    x = x.view(len(rows), tokens, width)
    if scales_end < size:
        x += _halves_of(rows, scales_end, size)[:, None]
    return x.clamp_(-_LIMIT, _LIMIT)


def _halves_of(rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Return the float16 values in these bytes of every row, as float32."""
    return rows[:, start:stop].contiguous().view(torch.float16).float()


def _pack_rows(x: torch.Tensor, codec: str) -> torch.Tensor:
    """Pack (R, M, V) within float16's range into int8 or int4 rows (R, row_bytes)."""
    rows, tokens, width = x.shape
    constants = _constants(x.device)
    _, scales_end, size = row_parts(codec, tokens, width)
    parts = []
    if scales_end < size:
        mean = _mean_token(x).half()
        x = x - mean.float()[:, None]
        parts.append(mean)
    # (R, M, V) -> (64, N): with the values of a block in a column, each stage of the transform is contiguous.
    blocks = _rotate((x.reshape(-1, BLOCK) * constants.signs).t().contiguous())
    codes, scales = (_int4_codes if codec == "int4" else _int8_codes)(blocks, constants)
    parts = [codes.t().contiguous(), scales, *parts]
    return torch.cat([part.view(torch.uint8).reshape(rows, -1) for part in parts], dim=1)


def _mean_token(x: torch.Tensor) -> torch.Tensor:
    """Return the mean token, (R, M, V) -> (R, V), added in the order of `cache.format.codec`."""
    tokens = torch.full((1,), float(x.shape[1]), device=x.device)
    while (half := x.shape[1] // 2) > 0:
        last = x[:, 2 * half :]
        x = x[:, :half] + x[:, half : 2 * half]
        x[:, : last.shape[1]] += last
    return x[:, 0] / tokens


def _int8_codes(blocks: torch.Tensor, constants: _Constants) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise rotated blocks: (64, N) -> codes (64, N) int8, scales (N,) float16."""
    scales = (blocks.abs().amax(0) / constants.int8_max).half()
    codes = _in_scales(blocks, scales).round_().clamp_(-INT8_MAX, INT8_MAX)
    return codes.to(torch.int8), scales


def _int4_codes(blocks: torch.Tensor, constants: _Constants) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise rotated blocks: (64, N) -> two codes a byte (32, N) uint8, scales (N,) float16.

    Searches the scales of `cache.format.codec` in its order.
    """
    high, low = blocks.amax(0), blocks.amin(0)
    largest = torch.maximum(high.abs(), low.abs())
    side = torch.where(high > -low, -1.0, 1.0)
    least = torch.full_like(largest, torch.inf)
    best = torch.zeros_like(largest, dtype=torch.float16)
    for divisor in constants.int4_divisors:
        scales = (largest / divisor).mul_(side).half()
        off = constants.levels_of.index_select(0, _cell(blocks, scales)).view_as(blocks)
        off.mul_(scales.float()).sub_(blocks)
        lost = _sum(off.mul_(off))
        better = lost < least
        least = torch.where(better, lost, least)
        best = torch.where(better, scales, best)
    codes = constants.codes_of.index_select(0, _cell(blocks, best)).view_as(blocks)
    low_half, high_half = codes.chunk(2)
    return low_half | high_half << 4, best


def _cell(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the index of each value's code in `int4_cells`, flat, int32."""
    cells = _in_scales(blocks, scales).mul_(2).ceil_().clamp_(-INT4_CELLS, INT4_CELLS)
    return cells.int().add_(INT4_CELLS).flatten()


def _in_scales(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Divide values by the scale of their block; 0 for a scale of 0."""
    steps = scales.float()
    return torch.where(steps != 0, blocks / steps, 0.0)


def _sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over the first axis (64) by adding halves, as the numpy codec does. Overwrites `values`."""
    while (half := len(values) // 2) > 0:
        values = values[:half].add_(values[half:])
    return values[0]


def _rotate(x: torch.Tensor) -> torch.Tensor:
    """Return the orthonormal Hadamard transform of (64, N), added in the order of `cache.format.codec`.

    Overwrites `x`.
    """
    y = torch.empty_like(x)
    half = 1
    while half < BLOCK:
        pairs = (BLOCK // (2 * half), 2, half, x.shape[1])
        left, right = x.view(pairs).unbind(1)
        torch.add(left, right, out=y.view(pairs)[:, 0])
        torch.sub(left, right, out=y.view(pairs)[:, 1])
        x, y = y, x
        half *= 2
    return x.mul_(0.125)


@dataclass(frozen=True, kw_only=True)
class _Constants:
    """Constants of packing and unpacking, on one device."""

    signs: torch.Tensor
    """(64,) signs of the rotation, 1 or -1."""
    matrix: torch.Tensor
    """(32, 32) unnormalised Hadamard matrix of half a block."""
    # Divisors are tensors: CUDA replaces division by a Python number by multiplication with its reciprocal.
    int8_max: torch.Tensor
    """(1,) largest int8 code."""
    int4_divisors: tuple[torch.Tensor, ...]
    """Divisors of the scales that are tried, each (1,)."""
    codes_of: torch.Tensor
    """(511,) uint8, `cache.format.codec.int4_cells`."""
    levels_of: torch.Tensor
    """(511,) levels of those codes."""
    sums: torch.Tensor
    """(256,) sums of the levels in the two halves of each int4 byte."""
    differences: torch.Tensor
    """(256,) low half's level minus high half's, of each int4 byte."""


@functools.cache
def _constants(device: torch.device) -> _Constants:
    codes_of = torch.from_numpy(int4_cells())
    levels = torch.tensor(INT4_LEVELS, dtype=torch.float32)
    high, low = levels[:, None], levels[None, :]
    return _Constants(
        signs=torch.from_numpy(rotation_signs()).to(device),
        matrix=torch.from_numpy(hadamard()[: BLOCK // 2, : BLOCK // 2].copy()).to(device),
        int8_max=torch.full((1,), float(INT8_MAX), device=device),
        int4_divisors=tuple(torch.full((1,), float(d), device=device) for d in INT4_DIVISORS),
        codes_of=codes_of.to(device),
        levels_of=levels[codes_of.int()].to(device),
        sums=(low + high).flatten().to(device),
        differences=(low - high).flatten().to(device),
    )


assert set(CODECS) == {"fp16", "int8", "int4"}, "a codec was added without its torch version here"
