"""AdamW with a learning rate for each part, their schedules, and gradient clipping.

    optimizer, rates = build_optimizer(vlm, options), rate_schedules(options)
    norm = clip_gradients(parameters, options.max_grad_norm)
    set_rates(optimizer, rates, step)
    optimizer.step()

The connector, the language model and the encoder's last blocks each have their own peak rate; the blocks warm
up with the language model. Matrices have weight decay;
norms and biases (everything with fewer than two dimensions) have none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from train.config import Options
from train.distributed.shard import local, mesh_of, sum_parts


@dataclass(frozen=True, kw_only=True)
class RateSchedule:
    """A linear warm-up to `peak`, then half a cosine down to `floor * peak` at the last step."""

    peak: float
    """Learning rate at the end of the warm-up."""
    warmup: int
    """Steps of the warm-up."""
    steps: int
    """Steps of the whole stage."""
    floor: float
    """Learning rate of the last step, as a share of the peak."""

    def rate(self, step: int) -> float:
        """Return the rate of step `step`, counted from 0: a pure function, so checkpoints do not store it."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
        return self.peak * (
            self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        )


def rate_schedules(options: Options) -> dict[str, RateSchedule]:
    """Return the schedule of each group: `connector`, `llm` and `vision`."""
    peaks = {
        "connector": (options.connector_learning_rate, options.connector_warmup_steps),
        "llm": (options.learning_rate, options.warmup_steps),
        "vision": (options.vision_learning_rate, options.warmup_steps),
    }
    return {
        name: RateSchedule(
            peak=peak, warmup=warmup, steps=options.max_steps, floor=options.min_lr_ratio
        )
        for name, (peak, warmup) in peaks.items()
    }


def build_optimizer(model: nn.Module, options: Options) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters; each group has a `name`: `connector`, `llm` or `vision`."""
    parts: dict[str, list[nn.Parameter]] = {"connector": [], "llm": [], "vision": []}
    group_of = {"connector": "connector", "tail": "vision"}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts[group_of.get(name.partition(".")[0], "llm")].append(parameter)
    groups: list[dict[str, Any]] = []
    for name, parameters in parts.items():
        for decays in (True, False):
            params = [p for p in parameters if (p.ndim >= 2) == decays]
            if params:
                decay = options.weight_decay if decays else 0.0
                groups.append({"params": params, "name": name, "weight_decay": decay})
    device = groups[0]["params"][0].device.type
    return torch.optim.AdamW(
        groups, lr=0.0, betas=options.betas, eps=options.adam_eps, fused=device in ("cpu", "cuda")
    )


def set_rates(
    optimizer: torch.optim.Optimizer, rates: dict[str, RateSchedule], step: int
) -> dict[str, float]:
    """Set the learning rate of each group for `step`; return the rates by group name."""
    for group in optimizer.param_groups:
        group["lr"] = rates[group["name"]].rate(step)
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale all gradients together to a norm of at most `max_norm`; return the norm before scaling.

    If the norm is not finite nothing is scaled, and the caller must not update the parameters. Of a sharded
    model it is the norm of all parts, so every process must call it.
    """
    found = [p.grad for p in parameters if p.grad is not None]
    gradients, mesh = [local(gradient) for gradient in found], mesh_of(found)
    total = torch.nn.utils.get_total_norm(gradients)
    norm = float(total if mesh is None else sum_parts(total.square(), mesh).sqrt())
    if math.isfinite(norm) and norm > max_norm:
        torch._foreach_mul_(gradients, max_norm / norm)
    return norm


def broken_gradients(model: nn.Module) -> list[str]:
    """Return the names of the parameters whose gradient has a NaN or an infinity, in this process's part."""
    return [
        n
        for n, p in model.named_parameters()
        if p.grad is not None and not bool(local(p.grad).isfinite().all())
    ]
