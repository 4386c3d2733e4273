"""Figures of the proof that need no model: nearest neighbours, exact match, intervals, base rates.

D drawings, M tokens of a drawing, V width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy, normalize

FloatArray = NDArray[np.float32]


def nearest(train: FloatArray, test: FloatArray) -> NDArray[np.intp]:
    """Return for each test drawing the training drawing with the largest cosine: (D, M, V) each -> (D,).

    The mean of the training features is removed first, which is most of what all drawings share.
    """
    mean = train.mean((0, 1))
    return np.argmax(unit(test - mean) @ unit(train - mean).T, axis=1)


def unit(features: FloatArray) -> FloatArray:
    """Return features (D, ...), flat and divided by their lengths: (D, W)."""
    flat = features.reshape(len(features), -1)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def least_squares(given: FloatArray, wanted: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the linear map (D, V) -> (D, W) that fits best, a little damped: weight (V, W), bias (W,)."""
    mean, centre = given.mean(0), wanted.mean(0)
    x, y = given - mean, wanted - centre
    covariance = x.T @ x / len(x)
    damped = covariance + 0.01 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    weight = np.linalg.solve(damped, x.T @ y / len(x))
    return weight.astype(np.float32), (centre - mean @ weight).astype(np.float32)


def classifier(
    given: FloatArray,
    labels: Sequence[int],
    classes: FloatArray,
    *,
    steps: int = 300,
    seed: int = 0,
) -> tuple[FloatArray, FloatArray]:
    """Return weight (V, W) and bias (W,) of a linear map (D, V) -> (D, W) towards the class of each drawing.

    It begins with least squares, and learns that the class with the largest cosine is the right one, with a
    temperature of 0.05. The result is stretched until it spreads as the classes of the drawings do.

    Args:
        given: (D, V) features.
        labels: (D,) the row of `classes` that each is to become.
        classes: (C, W) where the classes are.
        steps: of Adam, with 2,048 drawings each.
        seed: of the choice of drawings.
    """
    known = torch.tensor(labels)
    x, places = torch.from_numpy(given), torch.from_numpy(classes)
    shift, scale = x.mean(0), x.std(0) + 1e-6
    x, centre = (x - shift) / scale, places.mean(0)
    directions = normalize(places - centre, dim=1)
    weight, bias = map(torch.from_numpy, least_squares(x.numpy(), classes[known.numpy()]))
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        some = torch.randint(len(x), (2048,), generator=generator)
        cosines = normalize(x[some] @ weight + bias - centre, dim=1) @ directions.T
        optimizer.zero_grad()
        cross_entropy(cosines / 0.05, known[some]).backward()
        optimizer.step()
        decay.step()
    with torch.no_grad():
        weight = weight / scale[:, None]
        spread = (places[known] - places[known].mean(0)).norm()
        weight *= spread / ((x * scale) @ weight).norm()
        bias = places[known].mean(0) - shift @ weight
    return weight.numpy(), bias.numpy()


def is_equal(expected: str, given: str) -> bool:
    """Whether an answer is the expected text, as `train.evaluate` compares for exact match."""
    return given.strip().removesuffix(".").strip().casefold() == expected.strip().casefold()


def base_rate(answers: Sequence[str]) -> float:
    """Return how often the most frequent answer is right."""
    return max(Counter(answers).values()) / len(answers)


def interval(differences: Sequence[float], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Return the mean of paired differences and half the width of its 95 % bootstrap interval.

    A difference is one drawing's, the mean over its questions and seeds, so whole drawings are drawn.
    """
    values = np.asarray(differences, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (draws, len(values)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(values.mean()), float(high - low) / 2


def paired(
    one: Sequence[Mapping[str, bool]], other: Sequence[Mapping[str, bool]]
) -> tuple[float, float]:
    """Return mean and half interval of one - other, from right answers by question, a mapping a seed."""
    assert all(a.keys() == b.keys() for a, b in zip(one, other, strict=True)), "other questions"
    by_drawing: dict[str, list[float]] = {}
    for a, b in zip(one, other, strict=True):
        for question, right in a.items():
            drawing = question.rpartition(" ")[0]
            by_drawing.setdefault(drawing, []).append(float(right) - float(b[question]))
    return interval([float(np.mean(each)) for each in by_drawing.values()])


def by_task(answers: Sequence[Mapping[str, Any]], key: str = "correct") -> dict[str, float]:
    """Return the share of right answers of each task."""
    tasks: dict[str, list[bool]] = {}
    for one in answers:
        tasks.setdefault(one["task"], []).append(bool(one[key]))
    return {task: sum(right) / len(right) for task, right in tasks.items()}


def flops_bound(tower: float, model: float) -> float:
    """Return how many times faster a step can be without the tower, at equal FLOP a second."""
    return (tower + model) / model


def perplexity(losses: Sequence[float]) -> float:
    """Return the perplexity of tokens with these losses, nats."""
    return math.exp(sum(losses) / len(losses))
