"""What no checksum can know: rows that are stored exactly as they were written, but written wrong.

Two signs of it. A number that is none (NaN, Inf) in a row, or in the scales of its codec: the fault of the
encoder or of the packing. And a row that its codec holds far worse than all others of its space, an
*outlier*: only a note, since a strange image is no damage.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cache.format.codec import row_parts
from cache.format.spec import FeatureSpec

FP16_SIGN = 0x8000
FP16_INF = 0x7C00
"""From here on, an fp16's bits (without the sign) are Inf or NaN."""

FAR = 8.0
"""Standard deviations of the logarithm beyond which an error is an outlier: none of 10^9 normal ones is."""

LEAST_SPREAD = 0.05
"""Errors closer together than 5 % count as this far apart, so that equal ones make no outlier of a hair."""


class Finite:
    """Whether the numbers in a stored row are numbers. Not for several threads at once."""

    def __init__(self, spec: FeatureSpec, array: str):
        # Lossy codecs: integer codes first, which cannot be wrong; then float16, scales before all else.
        self._start = self._unsigned = 0
        if spec.codec != "fp16":
            self._start, scales_end, _ = row_parts(spec.layout, spec.tokens(array), spec.width)
            if spec.codec == "int8":  # int4's scales have signs, as any mean token
                self._unsigned = (scales_end - self._start) // 2
        self._bits = np.empty((spec.row_bytes(array) - self._start) // 2, np.uint16)

    def __call__(self, row: npt.NDArray[np.uint8]) -> bool:
        """Row (row_bytes,) -> False when it holds NaN or Inf, or a negative scale where none can be."""
        bits = row[self._start :].view("<u2")
        if (
            self._unsigned and bits[: self._unsigned].max() >= FP16_INF
        ):  # the sign is beyond it, too
            return False
        return bool(np.bitwise_and(bits, ~FP16_SIGN & 0xFFFF, out=self._bits).max() < FP16_INF)


def outliers(errors: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Positions of errors (n,) far above the others, worst first; those that are no number always.

    Errors of a codec are spread about evenly on a logarithmic scale; median and median deviation are not
    moved by the outliers themselves.
    """
    wrong = ~np.isfinite(errors) | (errors < 0)
    usual = errors[~wrong & (errors > 0)]
    far = wrong
    if len(usual):
        logs = np.log(usual.astype(np.float64))
        median = np.median(logs)
        spread = max(1.4826 * np.median(np.abs(logs - median)), LEAST_SPREAD)
        far = wrong | (errors > np.exp(median + FAR * spread))
    found = np.flatnonzero(far)
    return found[np.argsort(-np.where(wrong[found], np.inf, errors[found]), kind="stable")]
