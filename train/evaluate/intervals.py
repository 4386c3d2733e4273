"""95 % intervals of means by the bootstrap, over media items.

    drawn = resampled_means(values, clusters)                   # (B, K)
    share_interval(drawn[:, 0], values[:, 0], clusters)         # (0.91, 0.95)

Questions about one image are not independent: an image that the model reads wrongly costs all of them. So
whole media items are drawn, with all their questions (Davison and Hinkley, "Bootstrap Methods", 1997, section
3.8). All columns use the same draws, so the difference of two columns is a paired one.

N questions, K columns (a score of a type, of the model or of the blind one), C media items, B draws.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Interval = tuple[float, float]

DRAWS = 2000
"""Draws of C media items. The ends of an interval vary by about 3 % of its width with the seed."""
SEED = 0
AT_ONCE = 1 << 22
"""Numbers drawn at once; limits memory."""
ENDS = (2.5, 97.5)
"""Percentiles of the draws: 95 % are between them."""


def resampled_means(
    values: Floats, clusters: npt.NDArray[np.int64], *, draws: int = DRAWS, seed: int = SEED
) -> Floats:
    """Return the mean of each column in each draw, (B, K); NaN where a draw has nothing of a column.

    Args:
        values: (N, K) scores; NaN where a question does not have that score.
        clusters: (N,) number of the media item of each question, from 0 to C - 1.
        draws: B.
        seed: of the draws.
    """
    count = int(clusters.max()) + 1 if len(clusters) else 0
    here = ~np.isnan(values)
    sums = _per_cluster(np.where(here, values, 0.0), clusters, count)
    numbers = _per_cluster(here.astype(np.float64), clusters, count)
    random = np.random.default_rng(seed)
    step = max(1, AT_ONCE // max(count, 1))
    parts = []
    for start in range(0, draws, step):
        rows = min(step, draws - start)
        chosen = random.integers(0, count, size=(rows, count))
        chosen += count * np.arange(rows)[:, None]
        times = np.bincount(chosen.ravel(), minlength=rows * count).reshape(rows, count)
        with np.errstate(invalid="ignore"):  # 0 / 0 is NaN, as documented
            parts.append((times @ sums) / (times @ numbers))
    return np.concatenate(parts)


def _per_cluster(values: Floats, clusters: npt.NDArray[np.int64], count: int) -> Floats:
    """Return the sum over the questions of each media item, (C, K)."""
    columns = [np.bincount(clusters, weights=one, minlength=count) for one in values.T]
    return np.stack(columns, axis=1)


def interval(drawn: Floats) -> Interval | None:
    """Return the ends of the 95 % interval; None if the draws lack the column, or are all equal."""
    known = drawn[~np.isnan(drawn)]
    # Equal draws come of equal questions, and do not show how far the mean could be off.
    if not len(known) or np.ptp(known) == 0:
        return None
    low, high = np.percentile(known, ENDS)
    return float(low), float(high)


def share_interval(
    drawn: Floats, values: Floats, clusters: npt.NDArray[np.int64], least: float = 0.0
) -> Interval | None:
    """Return the 95 % interval of the mean of one column of scores from `least` to 1; None of one media item.

    If every question has the same score, every draw has too, and says nothing of others: 20 right answers to
    20 questions do not prove a share of 1. There the interval is that of the rule of three: 3 / media items
    wide (Hanley and Lippman-Hand, JAMA 1983).

    Args:
        drawn: (B,) means of the draws.
        values: (N,) the column; NaN where a question does not have the score.
        clusters: (N,) number of the media item of each question.
        least: smallest score: 0, or -1 of a difference.
    """
    here = ~np.isnan(values)
    items = len(np.unique(clusters[here]))
    if items < 2:
        return None
    known = values[here]
    if (known != known[0]).any():
        return interval(drawn)
    same, margin = float(known[0]), 3 / items
    return max(same - margin, least), min(same + margin, 1.0)
