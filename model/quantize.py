"""The row codecs in torch, on any device: twins of `cache.codec`, equal to it to the bit.

Features are packed where they were computed, before the copy to the host, and unpacked where they are
used, after the copy from it: what travels is a quarter of float32.

    rows = pack(features, "int8").rows                     # (B, M, V) -> (B, row_bytes) uint8
    features = unpack(rows, "int8", tokens=M, width=V)     # -> (B, M, V) float16

B pictures, M tokens, V values a token.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from cache.codec import BLOCK, CODECS, FP16_MAX, INT8_MAX, hadamard, rotation_signs, row_bytes

__all__ = ["Packed", "pack", "unpack"]

_LIMIT = float(FP16_MAX)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Rows of one batch, and what packing did to them."""

    rows: torch.Tensor
    """(B, row_bytes) uint8, as stored."""
    error: torch.Tensor
    """(B,) float32: |unpacked - features| / |features|, 0 for a row of zeros."""
    finite: torch.Tensor
    """(B,) bool. False: the features held NaN or Inf; the row is not to be stored."""
    clipped: int
    """Values beyond float16's range, over all finite rows."""


def pack(features: torch.Tensor, codec: str) -> Packed:
    """Features (B, M, V) of any float type -> rows, on the same device.

    Raises:
        ValueError: as `cache.codec.row_bytes`.
    """
    batch, tokens, width = features.shape
    size = row_bytes(codec, tokens, width)
    x = features.detach()
    if x.device.type == "mps":
        x = x.cpu()  # Metal divides approximately; memory is shared anyway
    x = x.float()
    largest = x.flatten(1).abs().amax(1)  # NaN and Inf come through
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
        rows = _pack_int8(clean.half().float())  # so that an fp16 row packs alike: cache.convert
    # Beyond float16's range even squares may overflow float32.
    precision = torch.float64 if clipped else torch.float32
    norm = torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=precision)
    off = unpack(rows, codec, tokens, width, torch.float32).sub_(x).flatten(1)
    lost = torch.linalg.vector_norm(off, dim=1, dtype=precision)
    error = torch.where(norm > 0, lost / norm, 0.0).float()
    return Packed(rows=rows, error=error, finite=finite, clipped=clipped)


def unpack(
    rows: torch.Tensor,
    codec: str,
    tokens: int,
    width: int,
    dtype: torch.dtype = torch.float16,
) -> torch.Tensor:
    """Rows (B, row_bytes) uint8 -> features (B, tokens, width), on the same device.

    Every `dtype` holds the same values: those of float16, which is what the codec defines.

    Raises:
        ValueError: the rows have another length than `row_bytes(codec, tokens, width)`.
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
    signs, matrix, _ = _constants(rows.device)
    values = tokens * width
    codes = rows[:, :values].view(torch.int8).reshape(batch, -1, BLOCK).float()
    scales = rows[:, values:].contiguous().view(torch.float16).float()
    # Sums of integers up to 64 * 127: exact in float32 (and in TF32) in any order.
    x = (codes @ matrix).mul_((scales * 0.125)[..., None]).mul_(signs)
    x = x.clamp_(-_LIMIT, _LIMIT).half()
    return x.reshape(batch, tokens, width).to(dtype)


def _pack_int8(x: torch.Tensor) -> torch.Tensor:
    """(B, M, V) within float16's range -> (B, row_bytes)."""
    batch = len(x)
    signs, _, divisor = _constants(x.device)
    # Values of a block stand below one another from here on: (64, blocks) keeps every stage contiguous.
    blocks = _rotate((x.reshape(-1, BLOCK) * signs).t().contiguous())
    largest = blocks.abs().amax(0)
    # By a tensor: CUDA turns division by a Python number into multiplication by its reciprocal.
    scales = (largest / divisor).half()
    steps = scales.float()
    quotient = torch.where(steps > 0, blocks.div_(steps), 0.0)
    codes = quotient.round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)
    return torch.cat(
        [
            codes.t().contiguous().view(torch.uint8).reshape(batch, -1),
            scales.reshape(batch, -1).view(torch.uint8),
        ],
        dim=1,
    )


def _rotate(x: torch.Tensor) -> torch.Tensor:
    """(64, blocks) -> its orthonormal Hadamard transform, adding in the very order of `cache.codec`.

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


@functools.cache
def _constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rotation's signs (64,), its matrix (64, 64), and 127 as a tensor."""
    signs = torch.from_numpy(rotation_signs()).to(device)
    return (
        signs,
        torch.from_numpy(hadamard()).to(device),
        torch.full((1,), float(INT8_MAX), device=device),
    )


assert set(CODECS) == {"fp16", "int8"}, "a codec was added without its twin here"
