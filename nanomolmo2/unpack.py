"""Unpack stored rows in torch, on any device. Every bit equals that of `cache.format.codec`.

Rows are copied to the device as stored and unpacked there. So a copy moves a quarter of the bytes of float32
(int8), or an eighth (int4).

    features = unpack(rows, "int8", tokens=M, width=V)    # (B, row_bytes) uint8 -> (B, M, V) float16

`model.quantize` packs. B rows, R rows of a part of them, M tokens, V values a token, N blocks of 64 values.
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
    INT4_DIVISORS,
    INT4_LEVELS,
    INT8_MAX,
    hadamard,
    int4_cells,
    rotation_signs,
    row_bytes,
    row_parts,
)

LIMIT = float(FP16_MAX)
"""The largest finite float16."""
CPU_BLOCKS = 8192
"""Blocks of 64 values that a CPU packs or unpacks at a time, but at least one row.

That is 2 MB as float32, so intermediate values stay in the CPU's cache. Eight rows of 576 x 1024 unpack three
times as fast.
"""


def unpack(
    rows: torch.Tensor, codec: str, tokens: int, width: int, dtype: torch.dtype = torch.float16
) -> torch.Tensor:
    """Unpack rows (B, row_bytes) uint8 into features (B, tokens, width), on their device.

    The values are those of float16 for every `dtype`, because the codec defines float16 values.

    Raises:
        ValueError: the rows are not (B, row_bytes) uint8, the codec is unknown, or the width is no multiple
            of its block.
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
    with without_autocast(rows.device):
        for part in pieces(batch, tokens * width // BLOCK, rows.device):
            x[part] = _values(rows[part], codec, tokens, width)
    return x.to(dtype)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Disable autocast, under which the trainer unpacks.

    Its bfloat16 matrix products would round sums that are exact in float32 (found by a test, 2026-11-24).
    """
    return torch.autocast(device.type, enabled=False)


def pieces(rows: int, blocks: int, device: torch.device) -> Iterator[slice]:
    """Yield slices of rows of `blocks` blocks: all rows on a GPU, `CPU_BLOCKS` blocks on a CPU."""
    step = max(1, CPU_BLOCKS // blocks if device.type == "cpu" else rows)
    return (slice(start, start + step) for start in range(0, rows, step))


def _values(rows: torch.Tensor, codec: str, tokens: int, width: int) -> torch.Tensor:
    """Unpack int8 or int4 rows: (R, row_bytes) -> (R, M, V) float32, within float16's range.

    The first stage of the Hadamard transform is computed by sums and differences, which halves the matrix
    product: H = [[h, h], [h, -h]].
    """
    constants = constants_on(rows.device)
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
    return x.clamp_(-LIMIT, LIMIT)


def _halves_of(rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Return the float16 values in these bytes of every row, as float32."""
    return rows[:, start:stop].contiguous().view(torch.float16).float()


@dataclass(frozen=True, kw_only=True)
class Constants:
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
def constants_on(device: torch.device) -> Constants:
    """Return the constants on a device. They are made once."""
    codes_of = torch.from_numpy(int4_cells())
    levels = torch.tensor(INT4_LEVELS, dtype=torch.float32)
    high, low = levels[:, None], levels[None, :]
    return Constants(
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
