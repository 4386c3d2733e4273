"""Attention over packed batches, registered with transformers, which calls it in every layer.

T tokens in the batch, R rows of a plan, Hq query heads, Hkv key and value heads, D values per head; of a part
of a plan, B trees and L tokens in each (padded).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from model.attention.plan import AttentionPlan, SdpaPart, SdpaPlan, VarlenPlan

ATTENTION = "nano_packed"
"""Name of this attention in transformers."""


class _TokensToRows(torch.autograd.Function):
    """Gather tokens into padded rows.

    The backward pass is a gather too, faster than a scatter-add: padding has no gradient, because it is
    masked as a key and dropped as a query, so each token gets its gradient from exactly one row.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:  # (T, n) -> (R, n)
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


class _RowsToTokens(torch.autograd.Function):
    """Gather padded rows into tokens. Each token has one row, so the backward pass is a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inverse: Tensor) -> Tensor:  # (R, n) -> (T, n)
        ctx.save_for_backward(inverse)
        ctx.rows = x.shape[0]
        return x.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.rows, grads[0].shape[1]).index_copy_(
            0, inverse, grads[0]
        ), None


def sdpa_packed(q: Tensor, k: Tensor, v: Tensor, plan: SdpaPlan, scale: float) -> Tensor:
    """Compute attention by `scaled_dot_product_attention`: (T, Hq, D), (T, Hkv, D) x 2 -> (T, Hq, D)."""
    heads, width = q.shape[1:]
    gathered = []
    for x in (q, k, v):
        x = x.reshape(x.shape[0], -1)
        if plan.index is not None:
            x = _TokensToRows.apply(x, plan.index, plan.inverse)
        gathered.append(x.split(plan.rows))
    outputs = []
    for part, *rows in zip(plan.parts, *gathered, strict=True):
        # each (B * L, H * D) -> (B, H, L, D)
        a, b, c = (x.view(part.trees, -1, x.shape[1] // width, width).transpose(1, 2) for x in rows)
        out = _sdpa(a, b, c, part, scale)
        outputs.append(out.transpose(1, 2).reshape(-1, heads * width))  # -> (B * L, Hq * D)
    result = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if plan.inverse is not None:
        result = _RowsToTokens.apply(result, plan.inverse)
    return result.view(-1, heads, width)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, part: SdpaPart, scale: float) -> Tensor:
    queries, keys, values = (
        x.split(part.sizes, dim=2) if len(part.sizes) > 1 else (x,) for x in (q, k, v)
    )
    outputs = []
    for i, mask in enumerate(part.masks):
        key, value = (torch.cat((x[0], x[i]), dim=2) if i else x[0] for x in (keys, values))
        outputs.append(
            F.scaled_dot_product_attention(
                queries[i],
                key,
                value,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def varlen_packed(
    q: Tensor, k: Tensor, v: Tensor, plan: VarlenPlan, scale: float, kernel: Kernel
) -> Tensor:
    """Compute attention by a variable-length kernel: (T, Hq, D), (T, Hkv, D) x 2 -> (T, Hq, D).

    A test compares its indices with a kernel written as loops on the CPU, and `python -m tests.gpu` compares
    torch's own kernel with float32 on the CPU. The backward pass of that kernel adds in no fixed order.
    """
    if plan.keys is not None:
        k, v = k.index_select(0, plan.keys), v.index_select(0, plan.keys)
    return kernel(
        q, k, v, plan.cu_queries, plan.cu_keys, plan.max_queries, plan.max_keys, scale=scale
    )


Kernel = Callable[..., Tensor]
"""(q, k, v, cumulative query lengths, cumulative key lengths, most queries, most keys, scale=) -> output."""


@functools.cache
def cuda_kernel() -> Kernel | None:
    """Return flash-attn's kernel if it is installed, else torch's own, else None.

    Both align the causal triangle with the last key, so queries see a prefix in full.
    """
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        pass
    else:
        return lambda *batch, scale: flash_attn_varlen_func(
            *batch, softmax_scale=scale, causal=True
        )
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if "window_size" not in known:  # an older torch, whose causal triangle is another
        return None

    def torch_kernel(q: Tensor, k: Tensor, *rest: Any, scale: float) -> Tensor:
        # torch 2.11 shares key heads without being asked, and has no such argument.
        more: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]}
        more = more if "enable_gqa" in known else {}
        out = varlen_attn(q, k, *rest, scale=scale, window_size=(-1, 0), **more)
        assert isinstance(out, Tensor)  # a tuple only when auxiliary results are asked for
        return out

    return torch_kernel


def choose_kernel(q: Tensor, flash: bool) -> Kernel | None:
    """Return the variable-length kernel for these queries, or None for SDPA.

    The kernels take 2-byte floats on CUDA only.
    """
    if flash and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        return cuda_kernel()
    return None


def packed_attention(
    _module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed: AttentionPlan | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute one layer's attention for transformers: (1, Hq, T, D), (1, Hkv, T, D) x 2 -> (1, T, Hq, D).

    The model's forward passes its keyword argument `packed` on to here.

    Raises:
        ValueError: there is no plan, or the model asks for something this attention does not compute.
    """
    if packed is None:
        raise ValueError(f"{ATTENTION} without a plan: every token would see every other")
    if attention_mask is not None or dropout:
        raise ValueError(f"{ATTENTION} supports neither masks nor dropout")
    for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise ValueError(f"{ATTENTION} does not support {name}")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    # Under autocast, norms and rotary positions leave queries and keys in float32, values in 2 bytes.
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))  # (T, H, D)
    kernel = choose_kernel(q, packed.flash)
    if kernel is not None:
        out = varlen_packed(q, k, v, packed.varlen, scale, kernel)
    else:
        out = sdpa_packed(q, k, v, packed.sdpa(q.dtype), scale)
    return out.unsqueeze(0), None


def register_packed_attention() -> str:
    """Register this attention with transformers and return its name, for `set_attn_implementation`."""
    AttentionInterface.register(ATTENTION, packed_attention)
    return ATTENTION
