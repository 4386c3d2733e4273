"""Find rows that were wrong when they were written, which no checksum can detect.

There are two signs. A NaN or Inf in a row, or in the scales of its codec, is an error of the encoder or of
the packing. An *outlier* has a far larger codec error than the other rows of its space. It is only
worth a note, since an unusual image is no damage.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cache.format.codec import row_parts
from cache.format.spec import FeatureSpec

FP16_SIGN = 0x8000
FP16_INF = 0x7C00
"""From here on, the bits of a float16 without its sign are Inf or NaN."""

FAR = 8.0
"""Standard deviations of the logarithm beyond which an error is an outlier: none of 10^9 normal ones is."""

LEAST_SPREAD = 0.05
"""Errors closer together than 5 % count as this far apart, so that equal ones make no outlier of a hair."""


class Finite:
    """Check whether all numbers in a stored row are finite. Only one thread may use it."""

    def __init__(self, spec: FeatureSpec, array: str):
        # Lossy codecs store integer codes first, all of which are valid, and then float16: first the scales.
        self._start = self._unsigned = 0
        if spec.codec != "fp16":
            self._start, scales_end, _ = row_parts(spec.codec, spec.tokens(array), spec.width)
            if spec.codec == "int8":  # int4's scales have signs, like any mean token
                self._unsigned = (scales_end - self._start) // 2
        self._bits = np.empty((spec.row_bytes(array) - self._start) // 2, np.uint16)

    def __call__(self, row: npt.NDArray[np.uint8]) -> bool:
        """Return False for a row (row_bytes,) with a NaN or Inf, or with a negative scale of int8."""
        bits = row[self._start :].view("<u2")
        # The bits of a negative number are above those of Inf.
        if self._unsigned and bits[: self._unsigned].max() >= FP16_INF:
            return False
        return bool(np.bitwise_and(bits, ~FP16_SIGN & 0xFFFF, out=self._bits).max() < FP16_INF)


def outliers(errors: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Return the positions of the outliers among errors (n,), the largest first.

    NaN, Inf and negative errors are always outliers.

    The logarithms of a codec's errors are about normally distributed. Their median and median deviation do
    not depend on the outliers themselves.
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
