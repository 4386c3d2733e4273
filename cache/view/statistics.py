"""The figures of a page about features: principal directions, norms, channels, nearest neighbours.

T tokens, W values a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

OUTLIER = 2.0
"""A token is an outlier when its norm is more than so many times the median of its kind. In trained
transformers such tokens carry no image content but serve as scratch space (Darcet et al. 2023)."""

FIT_TOKENS = 32_768
"""Tokens that principal directions are fitted to, at most."""

COLOUR_TAIL = 1.0
"""Percent of tokens at either end of a direction that share the darkest, or the brightest, colour."""

CHANNELS_NAMED = 6
"""Of the channels with the largest share of the energy."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Basis:
    """Principal directions of tokens, and how three of them become colours."""

    mean: Floats
    """(W,) of the tokens it was fitted to."""
    directions: Floats
    """(k, W) orthonormal, by falling variance."""
    shares: npt.NDArray[np.float64]
    """(k,) of the variance, each."""
    low: Floats
    """(3,) what becomes 0 in an image."""
    high: Floats
    """(3,) what becomes 255."""
    tokens: int
    """T that it was fitted to."""

    def project(self, tokens: Floats, count: int) -> Floats:
        """(T, W) -> (T, count) along the first directions; zeros where there are fewer."""
        out = np.zeros((len(tokens), count), np.float32)
        found = (tokens - self.mean) @ self.directions[:count].T
        out[:, : found.shape[1]] = found
        return out

    def colours(self, tokens: Floats) -> npt.NDArray[np.uint8]:
        """(T, W) -> (T, 3): the first three directions as red, green, blue."""
        width = np.maximum(self.high - self.low, np.finfo(np.float32).tiny)
        scaled = (self.project(tokens, 3) - self.low) / width
        return (np.clip(scaled, 0, 1) * 255).round().astype(np.uint8)


def fit_basis(tokens: Floats, outliers: npt.NDArray[np.bool_]) -> Basis:
    """The principal directions of tokens (T, W), outliers (T,) left out: a few would take all three.

    Signs are fixed (the largest entry of a direction is positive), so equal tokens give equal colours.
    """
    fitted = tokens[~outliers] if not outliers.all() else tokens
    fitted = fitted[:: max(1, -(-len(fitted) // FIT_TOKENS))]
    mean = fitted.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred = fitted - mean
    if len(centred) < centred.shape[1]:  # the smaller of the two matrices with these eigenvalues
        values, vectors = np.linalg.eigh((centred @ centred.T).astype(np.float64))
        vectors = centred.T @ vectors / np.sqrt(np.maximum(values, 1e-30))
    else:
        values, vectors = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    order = np.argsort(-values)
    values = np.maximum(values[order], 0)
    directions = np.asarray(vectors[:, order].T, np.float32)
    directions = directions[values > values.max(initial=0) * 1e-9]
    values = values[: len(directions)]
    largest = np.take_along_axis(directions, np.abs(directions).argmax(axis=1)[:, None], axis=1)
    basis = Basis(
        mean=mean,
        directions=directions * np.where(largest < 0, -1, 1).astype(np.float32),
        shares=values / max(float(values.sum()), 1e-300),
        low=np.zeros(3, np.float32),
        high=np.zeros(3, np.float32),
        tokens=len(fitted),
    )
    ends = np.percentile(basis.project(fitted, 3), [COLOUR_TAIL, 100 - COLOUR_TAIL], axis=0)
    low, high = ends.astype(np.float32)
    return Basis(**{**vars(basis), "low": low, "high": high})


def norms(tokens: Floats) -> Floats:
    """(..., W) -> (...): Euclidean lengths."""
    return np.sqrt(np.square(tokens).sum(axis=-1))


@dataclass(frozen=True, kw_only=True, eq=False)
class Channels:
    """What each of the W channels does over many tokens."""

    mean: npt.NDArray[np.float64]
    """(W,)"""
    std: npt.NDArray[np.float64]
    """(W,)"""
    energy: npt.NDArray[np.float64]
    """(W,) share of the mean square."""
    constant: float
    """Share of the energy that the mean vector has: what is the same in every token."""
    tokens: int
    """T they were measured on."""

    @property
    def largest(self) -> list[int]:
        """Channels by falling share of the energy, a few."""
        return np.argsort(-self.energy, kind="stable")[:CHANNELS_NAMED].tolist()


def channels(tokens: Floats) -> Channels:
    """The statistics of tokens (T, W)."""
    total_of, square_of = np.zeros((2, tokens.shape[-1]))
    for start in range(0, len(tokens), 4096):
        some = tokens[start : start + 4096].astype(np.float64)
        total_of += some.sum(axis=0)
        square_of += np.square(some).sum(axis=0)
    mean, square = total_of / max(1, len(tokens)), square_of / max(1, len(tokens))
    total = max(float(square.sum()), 1e-300)
    return Channels(
        mean=mean,
        std=np.sqrt(np.maximum(square - mean**2, 0)),
        energy=square / total,
        constant=float((mean**2).sum()) / total,
        tokens=len(tokens),
    )


def neighbours(means: Floats) -> list[tuple[int, float]]:
    """For each media its most similar other one, and their cosine.

    Args:
        means: (n, W) mean feature of each. What all share is taken off first: else all are alike.
    """
    if len(means) < 3:  # two vectors about their mean are always opposites
        return []
    centred = means - means.mean(axis=0)
    lengths = np.maximum(norms(centred), 1e-12)
    cosines = (centred / lengths[:, None]) @ (centred / lengths[:, None]).T
    np.fill_diagonal(cosines, -np.inf)
    best = cosines.argmax(axis=1)
    return [(int(at), float(cosines[i, at])) for i, at in enumerate(best)]
