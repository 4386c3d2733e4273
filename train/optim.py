"""AdamW with two rates, their schedules, and what is checked before a step is taken.

Groups: the connector and the language model each have their own peak rate and warm-up, and each is split into
parameters with weight decay (matrices) and without (norms, biases: everything of fewer than two dimensions).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from train.config import Options

Named = tuple[str, nn.Parameter]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up to `peak`, then half a cosine down to `floor * peak` at the last step."""

    peak: float
    """Learning rate after the warm-up."""
    warmup: int
    """Steps of the warm-up."""
    steps: int
    """Steps of the whole stage."""
    floor: float
    """Last rate, as a share of the peak."""

    def rate(self, step: int) -> float:
        """The rate of step `step`, counted from 0; a pure function, so a resumed run needs no state."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
        return self.peak * (
            self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        )


def schedules(options: Options) -> dict[str, Schedule]:
    """The schedules by group: `connector` and `llm`."""
    peaks = {
        "connector": (options.connector_learning_rate, options.connector_warmup_steps),
        "llm": (options.learning_rate, options.warmup_steps),
    }
    return {
        name: Schedule(
            peak=peak, warmup=warmup, steps=options.max_steps, floor=options.min_lr_ratio
        )
        for name, (peak, warmup) in peaks.items()
    }


def build_optimizer(model: nn.Module, options: Options) -> torch.optim.AdamW:
    """AdamW over what learns. Each parameter group carries `name` (connector | llm), for the schedule."""
    groups: list[dict[str, Any]] = []
    for name, named in _by_part(model).items():
        for decays in (True, False):
            params = [p for _, p in named if (p.ndim >= 2) == decays]
            if params:
                decay = options.weight_decay if decays else 0.0
                groups.append({"params": params, "name": name, "weight_decay": decay})
    device = groups[0]["params"][0].device.type
    return torch.optim.AdamW(
        groups, lr=0.0, betas=options.betas, eps=options.adam_eps, fused=device in ("cpu", "cuda")
    )


def _by_part(model: nn.Module) -> dict[str, list[Named]]:
    parts: dict[str, list[Named]] = {"connector": [], "llm": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts["connector" if name.startswith("connector.") else "llm"].append((name, parameter))
    return parts


def set_rates(
    optimizer: torch.optim.Optimizer, rates: dict[str, Schedule], step: int
) -> dict[str, float]:
    """Give each group its rate for `step`; returns the rates in use, by group name."""
    for group in optimizer.param_groups:
        group["lr"] = rates[group["name"]].rate(step)
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def clip_gradients(parameters: Iterable[nn.Parameter], longest: float) -> float:
    """Scale all gradients together to a norm of at most `longest`; returns the norm they had.

    When that is not finite nothing is scaled, and the caller must not take the step.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    length = float(norm)
    if math.isfinite(length) and length > longest:
        torch._foreach_mul_(gradients, longest / length)
    return length


def broken_gradients(model: nn.Module) -> list[str]:
    """Names of the parameters whose gradient has a NaN or an infinity."""
    return [
        n
        for n, p in model.named_parameters()
        if p.grad is not None and not bool(p.grad.isfinite().all())
    ]
