"""Weighted cross-entropy at supervised positions, in chunks, so that all logits never exist together.

The gradients of a chunk are computed while its logits exist, so the backward pass neither stores logits nor
computes them again. For Qwen3 (V = 151,936) and C = 1,024, the logits of a chunk take 0.6 GB in fp32.

S supervised positions, C positions in a chunk, V vocabulary rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 26
"""Most logits of one chunk: 256 MiB in fp32, and twice that at the peak."""


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """Sum weight x -log p(target): (S, D), (V, D), (V,) or None, (S,), (S,) -> fp32 scalar."""
        wanted = ctx.needs_input_grad[:3]
        device = hidden.device.type
        dtype = hidden.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            x, w = hidden.to(dtype), head.to(dtype)
            loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
            d_hidden = torch.zeros_like(x) if wanted[0] else None
            # fp32 for any dtype of the weights, because they sum over many chunks.
            d_head = torch.zeros_like(head, dtype=torch.float32) if wanted[1] else None
            d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None else None
            step = max(1, CHUNK_ELEMENTS // head.shape[0])
            for at in range(0, x.shape[0], step):
                part = slice(at, at + step)
                logits = (x[part] @ w.T).float()  # (C, V)
                if bias is not None:
                    logits += bias
                target, weight = targets[part, None], weights[part, None].float()
                log_sum = logits.logsumexp(1, keepdim=True)
                loss += ((log_sum - logits.gather(1, target)) * weight).sum()
                if not any(wanted):
                    continue
                # d loss / d logits = weight x (softmax - one-hot), in place of the logits
                logits.sub_(log_sum).exp_().mul_(weight)
                logits.scatter_add_(1, target, -weight)
                gradient = logits.to(dtype)
                if d_hidden is not None:
                    d_hidden[part] = gradient @ w
                if d_head is not None and d_head.dtype == dtype:
                    d_head.addmm_(gradient.T, x[part])  # no second (V, D) matrix
                elif d_head is not None:
                    d_head += gradient.T @ x[part]
                if d_bias is not None:
                    d_bias += logits.sum(0)
        ctx.gradients = (d_hidden, d_head, d_bias)
        ctx.dtypes = (hidden.dtype, head.dtype, bias.dtype if bias is not None else None)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("this loss has been differentiated already")
        scaled = [
            None if g is None else g.mul_(grads[0]).to(dtype)
            for g, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        ctx.gradients = None
        return (*scaled, None, None)


def weighted_cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Return the sum over positions of weight x cross-entropy, an fp32 scalar, differentiable once.

    Args:
        hidden: (S, D) final hidden states at the supervised positions.
        head: (V, D) output embedding.
        targets: (S,) int64.
        weights: (S,) float32.
        bias: (V,) of the output layer, None if the model has none.

    Raises:
        RuntimeError: in a second backward pass.
    """
    return _WeightedCrossEntropy.apply(hidden, head, bias, targets, weights)
