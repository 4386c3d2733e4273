"""Attention over packed batches, under the name by which transformers calls it in every layer.

Legend: T tokens in the batch, Hq query heads, Hkv key and value heads, D values per head.
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

from model.attention.plan import AttentionPlan, Group, LongTree, SdpaPlan, VarlenPlan

ATTENTION = "nano_packed"
"""The name under which transformers finds this attention."""


class _Spread(torch.autograd.Function):
    """Tokens to padded rows. Padding has no gradient (masked as key, dropped as query), so the way
    back is a gather too, faster than the general scatter-add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


class _Collect(torch.autograd.Function):
    """Padded rows to tokens; every token has one row, so the way back is a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inverse: Tensor) -> Tensor:
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
    """(T, Hq, D), (T, Hkv, D) x 2 -> (T, Hq, D)."""
    heads, width = q.shape[1:]
    spread = []
    for x in (q, k, v):
        x = x.reshape(x.shape[0], -1)
        if plan.index is not None:
            x = _Spread.apply(x, plan.index, plan.inverse)
        spread.append(x.split(plan.rows))
    done = []
    for part, *rows in zip(plan.parts, *spread, strict=True):
        count = part.trees if isinstance(part, Group) else 1
        # (B * L, H * D) -> (B, H, L, D)
        a, b, c = (x.view(count, -1, x.shape[1] // width, width).transpose(1, 2) for x in rows)
        out = (
            _sdpa(a, b, c, part.mask, scale)
            if isinstance(part, Group)
            else _long(a, b, c, part, scale)
        )
        done.append(out.transpose(1, 2).reshape(-1, heads * width))
    result = done[0] if len(done) == 1 else torch.cat(done)
    if plan.inverse is not None:
        result = _Collect.apply(result, plan.inverse)
    return result.view(-1, heads, width)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _long(q: Tensor, k: Tensor, v: Tensor, part: LongTree, scale: float) -> Tensor:
    queries, keys, values = (x.split(part.sizes, dim=2) for x in (q, k, v))
    done = [_sdpa(queries[0], keys[0], values[0], None, scale)]
    for i, mask in enumerate(part.masks, start=1):
        key = torch.cat((keys[0], keys[i]), dim=2)
        value = torch.cat((values[0], values[i]), dim=2)
        done.append(_sdpa(queries[i], key, value, mask, scale))
    return torch.cat(done, dim=2)


def varlen_packed(
    q: Tensor, k: Tensor, v: Tensor, plan: VarlenPlan, scale: float, kernel: Kernel
) -> Tensor:
    """(T, Hq, D), (T, Hkv, D) x 2 -> (T, Hq, D), through a kernel of `cuda_kernel`.

    Not yet run on a GPU; its indices are checked on the CPU against a kernel written out in loops.
    """
    if plan.keys is not None:
        k, v = k.index_select(0, plan.keys), v.index_select(0, plan.keys)
    return kernel(q, k, v, plan.cu_queries, plan.cu_keys, plan.max_queries, plan.max_keys, scale)


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float], Tensor]
"""q, k, v, cumulative query and key lengths, longest query and key run, scale -> output."""


@functools.cache
def cuda_kernel() -> Kernel | None:
    """flash-attn when installed, else torch's own variable-length attention, else None.

    Both align the causal triangle with the last key, so a prefix is seen in full.
    """
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        pass
    else:
        return lambda q, k, v, cu_q, cu_k, max_q, max_k, scale: flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=True
        )
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if "enable_gqa" not in inspect.signature(varlen_attn).parameters:  # an older torch
        return None

    def torch_kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        scale: float,
    ) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        out = varlen_attn(
            q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=(-1, 0), enable_gqa=grouped
        )
        assert isinstance(out, Tensor)  # a tuple only when auxiliary results are asked for
        return out

    return torch_kernel


def choose_kernel(q: Tensor, flash: bool) -> Kernel | None:
    """The variable-length kernel for these queries, or None: SDPA. Kernels know 2-byte floats only."""
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
    """What transformers calls in each layer; q (1, Hq, T, D), k and v (1, Hkv, T, D) -> (1, T, Hq, D).

    The plan arrives as keyword argument `packed` of the model's forward.
    """
    if packed is None:
        raise ValueError(f"{ATTENTION} without a plan: every token would see every other")
    if attention_mask is not None or dropout:
        raise ValueError(f"{ATTENTION} knows neither masks nor dropout")
    for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise ValueError(f"{ATTENTION} has no {name}")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    # Under autocast, norms and rotation leave queries and keys in float32; values are as computed.
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))  # (T, H, D)
    kernel = choose_kernel(q, packed.flash)
    if kernel is not None:
        out = varlen_packed(q, k, v, packed.varlen, scale, kernel)
    else:
        out = sdpa_packed(q, k, v, packed.sdpa(q.dtype), scale)
    return out.unsqueeze(0), None


def register_packed_attention() -> str:
    """Make this attention known to transformers; returns the name to set it by."""
    AttentionInterface.register(ATTENTION, packed_attention)
    return ATTENTION
