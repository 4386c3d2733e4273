"""Pack features into stored rows in torch, on any device. Every bit equals that of `cache.format.codec`.

Features are packed on the encoder's device before the copy to the host, so the copy moves a quarter of the
bytes of float32 (int8), or an eighth (int4). `nanomolmo2.unpack` unpacks them.

    rows = pack(features, "int8").rows                    # (B, M, V) -> (B, row_bytes) uint8

B images in a batch, R rows of a part of it, M tokens, V values a token, N blocks of 64 values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cache.format.codec import (
    BLOCK,
    CODECS,
    INT4_CELLS,
    INT8_MAX,
    row_bytes,
    row_parts,
)
from nanomolmo2.unpack import (
    LIMIT,
    Constants,
    constants_on,
    pieces,
    unpack,
    without_autocast,
)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Packed rows of one batch, with the errors of packing."""

    rows: torch.Tensor
    """(B, row_bytes) uint8, as stored."""
    error: torch.Tensor
    """(B,) float32: |unpacked - features| / |features|, 0 for a row of zeros."""
    finite: torch.Tensor
    """(B,) bool; False for features with NaN or Inf, whose row must not be stored."""
    clipped: torch.Tensor
    """(B,) int64: values that were clipped to float16's range; 0 for a row that is not finite."""


def occurs(rare: torch.Tensor) -> bool:
    """Return whether to compute what only rare values need: if there are any; on a GPU always.

    Asking a GPU means to wait for it, which takes longer.
    """
    return rare.is_cuda or bool(rare.any())


def pack(features: torch.Tensor, codec: str) -> Packed:
    """Pack features (B, M, V) of any float dtype into rows, on their device, without waiting for a GPU.

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
    if occurs(~finite):
        x = torch.where(finite[:, None, None], x, 0.0)
    clipped, clean = torch.zeros_like(finite, dtype=torch.int64), x
    # Squares of values beyond float16's range may overflow float32.
    precision = torch.float32
    if occurs(largest > LIMIT):
        clipped = (x.abs() > LIMIT).sum((1, 2))
        clean, precision = x.clamp(-LIMIT, LIMIT), torch.float64
    if codec == "fp16":
        rows = clean.half().contiguous().view(torch.uint8).reshape(batch, size)
    else:
        with without_autocast(x.device):
            parts = pieces(batch, tokens * width // BLOCK, x.device)
            # Rounded first, so that cache.convert gets equal rows from stored fp16 rows.
            rows = torch.cat([_pack_rows(clean[part].half().float(), codec) for part in parts])
    norm = torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=precision)
    off = unpack(rows, codec, tokens, width, torch.float32).sub_(x).flatten(1)
    lost = torch.linalg.vector_norm(off, dim=1, dtype=precision)
    error = torch.where(norm > 0, lost / norm, 0.0).float()
    return Packed(rows=rows, error=error, finite=finite, clipped=clipped)


def _pack_rows(x: torch.Tensor, codec: str) -> torch.Tensor:
    """Pack (R, M, V) within float16's range into int8 or int4 rows (R, row_bytes)."""
    rows, tokens, width = x.shape
    constants = constants_on(x.device)
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


def _int8_codes(blocks: torch.Tensor, constants: Constants) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise rotated blocks: (64, N) -> codes (64, N) int8, scales (N,) float16."""
    scales = (blocks.abs().amax(0) / constants.int8_max).half()
    codes = _in_scales(blocks, scales).round_().clamp_(-INT8_MAX, INT8_MAX)
    return codes.to(torch.int8), scales


def _int4_codes(blocks: torch.Tensor, constants: Constants) -> tuple[torch.Tensor, torch.Tensor]:
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


assert set(CODECS) == {"fp16", "int8", "int4"}, "a codec was added without its torch version here"
