"""What `encode.check` saw, and how it says it.

R rows, M tokens, V values a token.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch

from cache.format.spec import FeatureSpec
from configs.console import bytes_text, table_text

SHOWN = 5
"""Rows printed of those that differ."""


@dataclass(kw_only=True)
class Loss:
    """What is left of features after packing: one entry a row."""

    errors: list[float] = field(default_factory=list)
    """|unpacked - features| / |features|."""
    cosines: list[float] = field(default_factory=list)
    """Of unpacked and features."""

    def add(self, features: torch.Tensor, values: torch.Tensor) -> None:
        """Rows of features (R, M, V) and what came back, both float32."""
        x, y = features.flatten(1).double(), values.flatten(1).double()
        norm = x.norm(dim=1)
        error = torch.where(norm > 0, (y - x).norm(dim=1) / norm, y.norm(dim=1))
        both = norm * y.norm(dim=1)
        self.errors += error.tolist()
        self.cosines += torch.where(both > 0, (x * y).sum(1) / both, 1.0).tolist()

    def cells(self) -> tuple[str, str, str, str]:
        """Error mean and max, cosine mean and min."""
        errors, cosines = np.array(self.errors), np.array(self.cosines)
        return (
            f"{errors.mean():.5f}",
            f"{errors.max():.5f}",
            f"{cosines.mean():.6f}",
            f"{cosines.min():.6f}",
        )


@dataclass(kw_only=True)
class CheckReport:
    """What was seen."""

    spec: FeatureSpec
    """Of the space."""
    trained: bool
    """Whether the encoder's weights are trained ones."""
    precision: str
    """What was computed in now."""
    tolerance: float
    """Relative error a stored row may have."""
    media: Counter[str] = field(default_factory=Counter)
    """Kind -> media looked at."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Why -> sources that could not be looked at."""
    rows: int = 0
    """Rows compared."""
    equal: int = 0
    """Of these, rows equal to the bit."""
    stored: Loss = field(default_factory=Loss)
    """Stored rows against live features."""
    variants: dict[FeatureSpec, Loss] = field(default_factory=dict)
    """The same live features as spaces of other codecs would hold them."""
    differing: list[tuple[float, str]] = field(default_factory=list)
    """Error, and which row: those beyond the tolerance."""

    @property
    def ok(self) -> bool:
        """Whether every row is what encoding makes."""
        return not self.differing

    def text(self) -> str:
        """For the reader."""
        media = ", ".join(f"{n:,} {kind}s" for kind, n in sorted(self.media.items()))
        lines = [f"space    {self.spec.name}: {media}, {self.rows:,} rows encoded again"]
        lines += [f"left out {n:,} sources: {why}" for why, n in self.skipped.most_common()]
        if self.rows:
            mean, most, cosine, least = self.stored.cells()
            limit = f"at most {self.tolerance:.3f}"
            lines += [
                f"equal    {self.equal:,} of {self.rows:,} rows, to the bit",
                f"error    of stored rows against live: mean {mean}, max {most} ({limit})",
                f"cosine   mean {cosine}, min {least}",
            ]
        if self.precision != self.spec.compute_dtype:
            lines.append(f"note     made in {self.spec.compute_dtype}, here in {self.precision}")
        self.differing.sort(reverse=True)
        lines += [f"DIFFERS  {error:.4f} {row}" for error, row in self.differing[:SHOWN]]
        lines.append(
            "ok: stored rows are what encoding makes"
            if self.ok
            else f"{len(self.differing):,} of {self.rows:,} rows differ by more than {self.spec.codec} may "
            "lose; python -m cache.verify --deep says whether their bytes are intact"
        )
        return "\n".join([*lines, "", self._table()] if self.rows else lines)

    def _table(self) -> str:
        """Every codec on the live features."""
        rows = [
            (variant.codec, bytes_text(variant.row_bytes("image")), *loss.cells())
            for variant, loss in self.variants.items()
        ]
        header = ("codec", "image", "error", "max", "cosine", "min")
        weights = (
            "trained weights" if self.trained else "random weights: no measure of trained ones"
        )
        title = f"the same features of {self.spec.encoder} through each codec ({weights})"
        return f"{title}\n{table_text(header, rows, right='image error max cosine min')}"
