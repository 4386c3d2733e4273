"""Learning rates, parameter groups and clipping, compared with values worked out by hand.

optimizer, rates = build_optimizer(model, options), rate_schedules(options)
set_rates(optimizer, rates, step)    # {"connector": 4.0, "llm": 0.2}
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.support.trained_runs import Toy
from train.config import Options
from train.optim import (
    RateSchedule,
    broken_gradients,
    build_optimizer,
    clip_gradients,
    rate_schedules,
    set_rates,
)


def options(**values: object) -> Options:
    return Options(**{"max_steps": 100, "warmup_steps": 10, "connector_warmup_steps": 4, **values})  # type: ignore[arg-type]


def test_the_rate_warms_up_to_the_peak_and_ends_at_the_floor() -> None:
    schedule = RateSchedule(peak=2.0, warmup=4, steps=101, floor=0.1)
    assert [schedule.rate(s) for s in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert schedule.rate(4) == 2.0  # the cosine starts at the peak
    assert schedule.rate(52) == pytest.approx(2.0 * 0.55)  # the middle of the cosine
    assert schedule.rate(100) == pytest.approx(0.2)  # the last step


@given(st.integers(0, 20), st.integers(1, 60), st.floats(0, 1))
def test_the_rate_rises_during_the_warm_up_and_then_falls(
    warmup: int, steps: int, floor: float
) -> None:
    schedule = RateSchedule(peak=1.0, warmup=warmup, steps=steps, floor=floor)
    rates = [schedule.rate(s) for s in range(steps)]
    top = min(warmup, steps)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert all(0 < r <= 1 + 1e-12 for r in rates[:-1])


def test_connector_and_language_model_have_their_own_rates() -> None:
    chosen = options(learning_rate=1.0, connector_learning_rate=8.0)
    optimizer = build_optimizer(Toy(), chosen)
    assert set_rates(optimizer, rate_schedules(chosen), 1) == {"connector": 4.0, "llm": 0.2}
    assert {g["lr"] for g in optimizer.param_groups} == {4.0, 0.2}


def test_norms_and_biases_have_no_weight_decay() -> None:
    model = Toy()
    optimizer = build_optimizer(model, options(weight_decay=0.5))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    found = {name: decay[id(p)] for name, p in model.named_parameters()}
    assert found == {
        "connector.weight": 0.5,
        "connector.bias": 0.0,
        "language.0.weight": 0.0,
        "language.0.bias": 0.0,
        "language.1.weight": 0.5,
        "language.1.bias": 0.0,
    }


def test_frozen_parameters_are_not_in_the_optimizer() -> None:
    model = Toy()
    model.language.requires_grad_(False)
    optimizer = build_optimizer(model, options())
    assert {g["name"] for g in optimizer.param_groups} == {"connector"}


def test_three_steps_equal_adamw_in_numpy() -> None:
    """Algorithm 2 of Loshchilov and Hutter in float64, for both groups."""
    model = Toy()
    chosen = options(learning_rate=1e-2, connector_learning_rate=3e-2, weight_decay=0.1)
    optimizer = build_optimizer(model, chosen)
    rates = rate_schedules(chosen)
    inputs = torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(1))
    theta = {n: p.detach().double().numpy().copy() for n, p in model.named_parameters()}
    moment1 = {n: np.zeros_like(t) for n, t in theta.items()}
    moment2 = {n: np.zeros_like(t) for n, t in theta.items()}
    for step in range(3):
        optimizer.zero_grad()
        model(inputs[step]).pow(2).sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            g = parameter.grad.double().numpy()
            rate = rates["connector" if name.startswith("connector") else "llm"].rate(step)
            decay = 0.1 if parameter.ndim >= 2 else 0.0
            moment1[name] = 0.9 * moment1[name] + 0.1 * g
            moment2[name] = 0.95 * moment2[name] + 0.05 * g * g
            m = moment1[name] / (1 - 0.9 ** (step + 1))
            v = moment2[name] / (1 - 0.95 ** (step + 1))
            theta[name] -= rate * (m / (np.sqrt(v) + 1e-8) + decay * theta[name])
        set_rates(optimizer, rates, step)
        optimizer.step()
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), theta[name], rtol=2e-5, atol=1e-6)


def test_clipping_scales_all_gradients_by_one_factor() -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip_gradients([a, b], 10.0) == pytest.approx(5.0)
    assert a.grad.tolist() == [3.0, 0.0]  # within the limit: unchanged
    assert clip_gradients([a, b], 1.0) == pytest.approx(5.0)
    assert a.grad.tolist() == pytest.approx([0.6, 0.0])
    assert b.grad.tolist() == pytest.approx([0.8])


def test_gradients_that_are_not_finite_are_named_and_not_scaled() -> None:
    model = Toy()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert model.connector.bias.grad is not None
    model.connector.bias.grad[1] = float("nan")
    assert math.isnan(clip_gradients(model.parameters(), 1.0))
    assert broken_gradients(model) == ["connector.bias"]
    assert torch.equal(
        model.connector.weight.grad,  # type: ignore[arg-type]  # set above
        torch.ones_like(model.connector.weight),
    )
