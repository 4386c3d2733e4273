"""Attention over packed trees: every kernel of the device against SDPA in float32 on the CPU.

A tree is a beginning and branches that see it, but not each other (model/attention/plan.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.attention.batch import PackedBatch
from model.attention.kernels import cuda_kernel, sdpa_packed, varlen_packed
from model.attention.plan import packed_layout, plan_sdpa, plan_varlen
from model.vlm import VLM, build_vlm
from tests.gpu.lines import (
    Lines,
    Scale,
    difference,
    largest_difference,
    median_s,
    unequal_rows,
)

CPU = torch.device("cpu")
BF16_LIMIT = 1e-2
"""Relative error of bfloat16 operands."""
FP32_LIMIT = 1e-5
VISION = 48
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def trees(sizes: list[tuple[int, list[int]]]) -> Tensor:
    """Return the units of trees, each (tokens of the beginning, tokens of each branch)."""
    units, at = [], 0
    for beginning, branches in sizes:
        start = at
        units.append([at, at + beginning, at, at])
        at += beginning
        for branch in branches:
            units.append([at, at + branch, start, start + beginning])
            at += branch
    return torch.tensor(units)


SMALL = [(37, [5, 9, 1]), (64, []), (130, [33, 20]), (3, [70])]
LARGE = [
    (1300, [90, 40, 300]),
    (700, [50, 60]),
    (620, []),
    (1, [200]),
    (590, [110] * 4),
    (2047, []),
]
"""Also a tree above LONG_TREE tokens, and lengths around the tiles of the kernels."""


def check_attention(lines: Lines, scale: Scale) -> None:
    """Check the kernels alone, then inside a model."""
    sizes = LARGE if scale.on_gpu else SMALL
    with lines.part("attention: kernels"):
        check_kernels(lines, scale, sizes)
    with lines.part("attention: in a model"):
        check_model(lines, scale)
    with lines.part("attention: speed"):
        time_kernels(lines, scale)


def kernels_of(scale: Scale, units: Tensor, dtype: torch.dtype, width: int) -> dict[str, Attention]:
    """Return every way to compute attention on the device in a precision."""
    tokens, factor = int(units[-1, 1]), width**-0.5
    plan = plan_sdpa(units, tokens, scale.device, dtype)
    found: dict[str, Attention] = {
        "padded SDPA": lambda q, k, v: sdpa_packed(q, k, v, plan, factor)
    }
    if scale.on_gpu and dtype != torch.float32:
        kernel, lengths = cuda_kernel(), plan_varlen(units, scale.device)
        if kernel is not None:
            name = f"variable-length ({'flash-attn' if has_flash() else 'torch'})"
            found[name] = lambda q, k, v: varlen_packed(q, k, v, lengths, factor, kernel)
    if scale.on_gpu and dtype != torch.float32:
        found["flex"] = flex(units, scale.device, factor)
    return found


def has_flash() -> bool:
    """Return whether flash-attn is installed."""
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        return False
    return True


def flex(units: Tensor, device: torch.device, factor: float) -> Attention:
    """Return attention by torch's compiled flex_attention. The model does not use it; it is measured here."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    @functools.cache
    def prepared() -> tuple[Any, Any]:  # at the first call, inside of the part that a failure ends
        tokens = int(units[-1, 1])
        layout = packed_layout(units, tokens)
        own, prefix = layout.own.to(device), layout.prefix.to(device)

        def sees(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            inside = (key >= own[query]) & (key <= query)
            return inside | ((key >= prefix[query, 0]) & (key < prefix[query, 1]))

        mask = create_block_mask(sees, None, None, tokens, tokens, device=device)
        return torch.compile(flex_attention, dynamic=False), mask

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        compiled, mask = prepared()
        a, b, c = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out: Tensor = compiled(a, b, c, block_mask=mask, scale=factor, enable_gqa=True)
        return out[0].transpose(0, 1)

    return attend


def random_qkv(tokens: int, scale: Scale, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries, keys, values and a gradient of the output, float32 on the CPU, exact in bfloat16."""
    heads, kv_heads, width = (16, 8, 128) if scale.on_gpu else (4, 2, 16)
    g = torch.Generator().manual_seed(seed)
    shapes = [(tokens, h, width) for h in (heads, kv_heads, kv_heads, heads)]
    q, k, v, grad = (torch.randn(s, generator=g).bfloat16().float() for s in shapes)
    return q, k, v, grad


def run(
    attend: Attention, qkv: tuple[Tensor, ...], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return output and gradients of one call."""
    *inputs, grad = (x.detach().clone().to(device, dtype) for x in qkv)
    q, k, v = (x.requires_grad_() for x in inputs)
    out = attend(q, k, v)
    out.backward(grad)
    assert q.grad is not None and k.grad is not None and v.grad is not None
    return {"out": out.detach(), "q": q.grad, "k": k.grad, "v": v.grad}


def check_kernels(lines: Lines, scale: Scale, sizes: list[tuple[int, list[int]]]) -> None:
    """Compare output and gradients of each kernel; no token may influence another tree."""
    units = trees(sizes)
    tokens = int(units[-1, 1])
    qkv = random_qkv(tokens, scale)
    width = qkv[0].shape[-1]
    plan = plan_sdpa(units, tokens, CPU)
    reference = run(
        lambda q, k, v: sdpa_packed(q, k, v, plan, width**-0.5), qkv, CPU, torch.float32
    )
    other = [x.clone() for x in qkv]
    first_tree = int(units[1:][units[1:, 2] == units[1:, 3]][0, 0])  # where the second tree begins
    for x in other[:3]:
        x[first_tree:] = torch.randn(x[first_tree:].shape).bfloat16().float()
    for dtype, limit in ((torch.float32, FP32_LIMIT), (torch.bfloat16, BF16_LIMIT)):
        for name, attend in kernels_of(scale, units, dtype, width).items():
            label = f"attention: {name}, {str(dtype).removeprefix('torch.')}"
            with lines.part(label):
                ours = run(attend, qkv, scale.device, dtype)
                error = largest_difference(ours, reference)
                lines.at_most(f"{label}: off fp32 SDPA on the CPU", error, limit)
                changed = run(attend, tuple(other), scale.device, dtype)["out"]
                seen = unequal_rows(ours["out"][:first_tree], changed[:first_tree])
                lines.at_most(f"{label}: tokens that see another tree", seen, 0)


def check_model(lines: Lines, scale: Scale) -> None:
    """Compare loss and gradients of a tiny model on trees, with media, on the device and on the CPU."""
    vlm, _ = build_vlm(VISION, "random:qwen3-tiny", "linear", seed=1)
    g = torch.Generator().manual_seed(7)
    for value in vlm.parameters():  # new norms are all ones; new weights are too small to matter
        spread = 0.2 if value.dim() == 1 else value.std().item()
        value.data += spread * torch.randn(value.shape, generator=g)
    batch, features = random_batch(trees(SMALL))
    reference = gradients(vlm, batch, features, CPU, None)
    exact = gradients(vlm.to(scale.device), batch, features, scale.device, None)
    loss = difference(exact["loss"], reference["loss"])
    lines.at_most("model: float32: loss, off the CPU's", loss, FP32_LIMIT)
    worst = largest_difference(exact, reference)
    lines.at_most("model: float32: worst gradient, off the CPU's", worst, 1e-4)
    for flash in (True, False):
        vlm.flash = flash
        ours = gradients(vlm, batch, features, scale.device, torch.bfloat16)
        name = f"model: bfloat16 autocast, {'kernel' if flash else 'SDPA'}"
        loss = difference(ours["loss"], reference["loss"])
        lines.at_most(f"{name}: loss, off float32", loss, BF16_LIMIT)
        whole = difference(flat(ours), flat(reference))
        lines.at_most(f"{name}: gradient, off float32", whole, 5 * BF16_LIMIT)


def random_batch(units: Tensor) -> tuple[PackedBatch, Tensor]:
    """Return a batch with these units, three features in each beginning, and every branch supervised."""
    tokens = int(units[-1, 1])
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 250, (tokens,), generator=g)
    positions = torch.cat([torch.arange(q1 - q0) + (p1 - p0) for q0, q1, p0, p1 in units.tolist()])
    roots = units[units[:, 2] == units[:, 3]]
    slots = torch.cat([torch.arange(3) + q0 for q0 in roots[:, 0]])
    slots = slots[slots < tokens]
    where = torch.arange(tokens)[::2]
    batch = PackedBatch(
        input_ids=ids,
        position_ids=positions,
        image_slots=slots,
        loss_positions=where,
        targets=torch.randint(0, 250, (len(where),), generator=g),
        loss_weights=1.0 + (where % 3).float(),
        units=units,
    )
    return batch, torch.randn(len(slots), VISION, generator=g)


def gradients(
    vlm: VLM,
    batch: PackedBatch,
    features: Tensor,
    device: torch.device,
    autocast: torch.dtype | None,
) -> dict[str, Tensor]:
    """Return the loss and every gradient, on the CPU."""
    vlm.zero_grad(set_to_none=True)
    with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        loss, _ = vlm.loss(batch.to(device), features.to(device))
    loss.backward()
    found = {n: p.grad.cpu() for n, p in vlm.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach().cpu()}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """Return all gradients as one vector."""
    return torch.cat([t.float().flatten() for name, t in tensors.items() if name != "loss"])


def time_kernels(lines: Lines, scale: Scale) -> None:
    """Time one layer's attention, forward and backward, on a micro-batch of images with two annotations."""
    count = scale.window // 876
    units = trees([(596, [80, 200])] * max(1, count))
    tokens = int(units[-1, 1])
    qkv = random_qkv(tokens, scale, seed=2)
    rounds = 5 if scale.on_gpu else 1
    for name, attend in kernels_of(scale, units, torch.bfloat16, qkv[0].shape[-1]).items():
        label = f"attention: {name}, {tokens:,} tokens, a layer, ms"
        with lines.part(label):
            step = partial(run, attend, qkv_on(qkv, scale), scale.device, torch.bfloat16)
            lines.note(label, f"{median_s(step, scale.device, rounds, scale.steps) * 1e3:.2f}")


def qkv_on(qkv: tuple[Tensor, ...], scale: Scale) -> tuple[Tensor, ...]:
    """Return the tensors in bfloat16 on the device, so that only device copies are timed with a step."""
    return tuple(x.to(scale.device, torch.bfloat16) for x in qkv)
