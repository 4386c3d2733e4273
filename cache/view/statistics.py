"""Measure features: principal directions, norms, channels, nearest neighbours.

T tokens, W values a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

OUTLIER = 2.0
"""A token is an outlier if its norm is more than this many times the median of its array. In trained
transformers such tokens hold no image content but serve as scratch space (Darcet et al. 2023)."""

FIT_TOKENS = 32_768
"""Tokens that principal directions are fitted to, at most: a bound on time."""

COLOUR_TAIL = 1.0
"""Percent of tokens at each end of a direction that share the darkest or the brightest colour."""

CHANNELS_NAMED = 6
"""Channels with the largest share of the energy that the page names."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Basis:
    """Principal directions of tokens, and how the first three become colours."""

    mean: Floats
    """(W,) mean of the tokens it was fitted to."""
    directions: Floats
    """(k, W) orthonormal, by falling variance."""
    shares: npt.NDArray[np.float64]
    """(k,) share of the variance in each direction."""
    low: Floats
    """(3,) coordinates that become 0 in an image."""
    high: Floats
    """(3,) coordinates that become 255."""
    tokens: int
    """Tokens it was fitted to."""

    def project(self, tokens: Floats, count: int) -> Floats:
        """Return coordinates (..., count) of tokens (..., W) in the first directions; 0 beyond the last."""
        out = np.zeros((*tokens.shape[:-1], count), np.float32)
        found = (tokens - self.mean) @ self.directions[:count].T
        out[..., : found.shape[-1]] = found
        return out

    def colours(self, tokens: Floats) -> npt.NDArray[np.uint8]:
        """Return red, green and blue (..., 3) of tokens (..., W): their first three coordinates."""
        width = np.maximum(self.high - self.low, np.finfo(np.float32).tiny)
        scaled = (self.project(tokens, 3) - self.low) / width
        return (np.clip(scaled, 0, 1) * 255).round().astype(np.uint8)


def fit_basis(tokens: Floats, outliers: npt.NDArray[np.bool_]) -> Basis:
    """Fit principal directions to tokens (T, W) without the outliers (T,).

    A few outliers would otherwise decide all three colours. The largest entry of each direction is positive,
    so equal tokens always have equal colours.
    """
    fitted = tokens[~outliers] if not outliers.all() else tokens
    fitted = fitted[:: max(1, -(-len(fitted) // FIT_TOKENS))]
    mean = fitted.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred = fitted - mean
    # X Xᵀ and Xᵀ X have the same eigenvalues above 0: take the smaller matrix.
    if len(centred) < centred.shape[1]:
        values, vectors = np.linalg.eigh((centred @ centred.T).astype(np.float64))
        vectors = centred.T @ vectors / np.sqrt(np.maximum(values, 1e-30))
    else:
        values, vectors = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    order = np.argsort(-values)
    values = np.maximum(values[order], 0)
    directions = np.asarray(vectors[:, order].T, np.float32)
    directions = directions[values > values.max(initial=0) * 1e-9]  # the others are rounding errors
    values = values[: len(directions)]
    largest = np.take_along_axis(directions, np.abs(directions).argmax(axis=1)[:, None], axis=1)
    directions *= np.where(largest < 0, -1, 1).astype(np.float32)
    coordinates = centred @ directions[:3].T
    ends = np.zeros((2, 3), np.float32)  # a missing direction is 0 everywhere
    ends[:, : coordinates.shape[1]] = np.percentile(
        coordinates, [COLOUR_TAIL, 100 - COLOUR_TAIL], axis=0
    )
    return Basis(
        mean=mean,
        directions=directions,
        shares=values / max(float(values.sum()), 1e-300),
        low=ends[0],
        high=ends[1],
        tokens=len(fitted),
    )


def norms(tokens: Floats) -> Floats:
    """Return the Euclidean lengths (...) of tokens (..., W)."""
    return np.sqrt(np.square(tokens).sum(axis=-1))


@dataclass(frozen=True, kw_only=True, eq=False)
class Channels:
    """Statistics of each of the W channels over many tokens."""

    mean: npt.NDArray[np.float64]
    """(W,)"""
    std: npt.NDArray[np.float64]
    """(W,)"""
    energy: npt.NDArray[np.float64]
    """(W,) share of the sum of squares in each channel."""
    constant: float
    """Share of the energy in the mean vector, which is equal in every token."""
    tokens: int
    """Tokens that were measured."""

    @property
    def largest(self) -> list[int]:
        """Channels with the most energy, by falling energy."""
        return np.argsort(-self.energy, kind="stable")[:CHANNELS_NAMED].tolist()


def channels(tokens: Floats) -> Channels:
    """Measure the channels of tokens (T, W), T > 0."""
    mean, square = np.zeros((2, tokens.shape[-1]))
    # In parts: all of them as float64 would need twice the memory of the tokens.
    for start in range(0, len(tokens), 4096):
        part = tokens[start : start + 4096].astype(np.float64)
        mean += part.sum(axis=0) / len(tokens)
        square += np.square(part).sum(axis=0) / len(tokens)
    total = max(float(square.sum()), 1e-300)
    return Channels(
        mean=mean,
        std=np.sqrt(np.maximum(square - mean**2, 0)),
        energy=square / total,
        constant=float((mean**2).sum()) / total,
        tokens=len(tokens),
    )


def neighbours(means: Floats) -> list[tuple[int, float]]:
    """Return for each of n mean features (n, W) the position of the most similar other one, and their cosine.

    The mean over all is subtracted first: it would make all of them similar. Empty for n < 3, because two
    vectors about their mean are always opposite.
    """
    if len(means) < 3:
        return []
    centred = means - means.mean(axis=0)
    unit = centred / np.maximum(norms(centred), 1e-12)[:, None]
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    best = cosines.argmax(axis=1)
    return [(int(at), float(cosines[i, at])) for i, at in enumerate(best)]
