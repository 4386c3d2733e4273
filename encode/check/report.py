"""The report of `encode.run --check`: differences of stored rows, and the loss of every codec.

R rows, M tokens, V values a token.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch

from cache.format.spec import FeatureSpec
from configs.console import bytes_text, table_text
from configs.text import lines_text

SHOWN = 5
"""Number of differing rows that are printed."""


@dataclass(kw_only=True)
class CodecLoss:
    """How far unpacked rows are from the features they were packed from, one entry a row."""

    errors: list[float] = field(default_factory=list)
    """|unpacked - features| / |features|."""
    cosines: list[float] = field(default_factory=list)
    """Cosine of unpacked values and features."""

    def add(self, features: torch.Tensor, values: torch.Tensor) -> list[float]:
        """Add R rows and return their errors.

        Args:
            features: (R, M, V) float32.
            values: (R, M, V) float32, unpacked.
        """
        x, y = features.flatten(1).double(), values.flatten(1).double()
        norm = x.norm(dim=1)
        errors: list[float]
        errors = torch.where(norm > 0, (y - x).norm(dim=1) / norm, y.norm(dim=1)).tolist()
        both = norm * y.norm(dim=1)
        self.errors += errors
        self.cosines += torch.where(both > 0, (x * y).sum(1) / both, 1.0).tolist()
        return errors

    def cells(self) -> tuple[str, str, str, str]:
        """Return mean and largest error, mean and smallest cosine, as text."""
        errors, cosines = np.array(self.errors), np.array(self.cosines)
        return (
            f"{errors.mean():.5f}",
            f"{errors.max():.5f}",
            f"{cosines.mean():.6f}",
            f"{cosines.min():.6f}",
        )


@dataclass(kw_only=True)
class CheckReport:
    """What a check found."""

    spec: FeatureSpec
    """Spec of the space."""
    verify: str
    """Command line that checks its bytes."""
    trained: bool
    """Whether the encoder has trained weights."""
    precision: str
    """Precision of the new features."""
    tolerance: float
    """Largest relative error of a stored row."""
    skipped: Counter[str]
    """Reason -> number of sources that could not be loaded."""
    media: Counter[str] = field(default_factory=Counter)
    """Media kind -> number of media encoded again."""
    rows: int = 0
    """Number of rows compared."""
    equal: int = 0
    """Number of rows equal bit for bit."""
    stored: CodecLoss = field(default_factory=CodecLoss)
    """Stored rows against new features."""
    variants: dict[FeatureSpec, CodecLoss] = field(default_factory=dict)
    """Spec with another codec -> loss of the new features in that codec."""
    differing: list[tuple[float, str]] = field(default_factory=list)
    """Error and name of each row beyond the tolerance."""

    @property
    def ok(self) -> bool:
        """Whether every row is within the tolerance."""
        return not self.differing

    def text(self) -> str:
        """Return the printed report."""
        media = ", ".join(f"{n:,} {kind}s" for kind, n in sorted(self.media.items()))
        lines = [f"space    {self.spec.name}: {media}, {self.rows:,} rows encoded again"]
        lines += [f"left out {n:,} sources: {why}" for why, n in self.skipped.most_common()]
        if self.rows:
            mean, most, cosine, least = self.stored.cells()
            limit = f"at most {self.tolerance:.3f}"
            lines += [
                f"equal    {self.equal:,} of {self.rows:,} rows, to the bit",
                f"error    of stored rows against new ones: mean {mean}, max {most} ({limit})",
                f"cosine   mean {cosine}, min {least}",
            ]
        if self.precision != self.spec.compute_dtype:
            lines.append(
                f"note     stored in {self.spec.compute_dtype}, computed in {self.precision} here"
            )
        self.differing.sort(reverse=True)
        lines += [f"DIFFERS  {error:.4f} {row}" for error, row in self.differing[:SHOWN]]
        lines.append(
            "ok: stored rows are what encoding gives"
            if self.ok
            else f"{len(self.differing):,} of {self.rows:,} rows differ by more than {self.spec.codec} "
            f"loses; {self.verify} checks whether their bytes are intact"
        )
        text = lines_text(lines)
        return f"{text}\n\n{self._table()}" if self.rows else text

    def _table(self) -> str:
        """Return the loss of the new features in every codec, as a table."""
        rows = [
            (variant.codec, bytes_text(variant.row_bytes("image")), *loss.cells())
            for variant, loss in self.variants.items()
        ]
        header = ("codec", "image", "error", "max", "cosine", "min")
        weights = "trained weights" if self.trained else "random weights: trained ones differ"
        title = f"the same features of {self.spec.encoder} through each codec ({weights})"
        return f"{title}\n{table_text(header, rows, right='image error max cosine min')}"
