"""What every chart drawn as inline SVG needs: round ticks and short labels. No library, no script."""

from __future__ import annotations

import math


def number(value: float) -> str:
    """A short label: `0.25`, `1,000`, `2e-05`."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.10g}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:.2g}"


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values that cover [low, high]: steps of 1, 2 or 5 times a power of ten."""
    if high <= low:
        high = low + (abs(low) * 0.1 or 1.0)
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw)
    count = math.ceil(high / step - 1e-9) - math.floor(low / step + 1e-9)
    first = math.floor(low / step + 1e-9)
    return [round((first + i) * step, 12) for i in range(count + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around [low, high], with 2 and 5 between them when it is narrow."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [f * 10.0**e for e in range(first, last + 1) for f in factors]
    below = max((t for t in ticks if t <= low), default=ticks[0])
    above = min((t for t in ticks if t >= high), default=ticks[-1])
    return [t for t in ticks if below <= t <= above]
