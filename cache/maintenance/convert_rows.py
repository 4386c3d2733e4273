"""Turn stored fp16 rows into rows of another codec or pooling.

    conversion = Conversion.between(source_spec, target_spec, "image")
    errors = conversion(rows, out)          # (n, source_bytes) uint8 -> (n, target_bytes) uint8

The bytes are those that encoding stores, because features are rounded to float16 before they are pooled and
packed. Nothing but numpy is needed, so processes that do this start quickly: see processes.py. Many rows are
converted by the loops of compiled_codec.py, which numba has to load or compile first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cache.errors import CacheError
from cache.format import codec
from cache.format.spec import FeatureSpec

FP16_INF = 0x7C00
"""The bits of a float16 from which on, without its sign, it is Inf or NaN."""
FP16_SIGN = 0x8000

WORTH_VALUES = 1_000_000_000
"""Values of one process from which on compiled loops are worth it: 1,700 rows of 576 x 1024. numpy packs them
in 13 s (int8) or 52 (int4), compiled loops in 4 or 22, after 10 to 15 s of compiling the first time, and 1 s
of loading later (docs/BENCHMARKS.md, 2026-11-27)."""

Rows = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What is done to the rows of one array."""

    tokens: int
    """Tokens of a row of the source."""
    width: int
    """Values of a token."""
    window: int
    """Average window x window tokens; 1: none."""
    codec: str
    """Codec of the target."""
    compiled: bool = False
    """Whether compiled_codec.py does it. The bytes are the same."""

    @classmethod
    def between(cls, source: FeatureSpec, target: FeatureSpec, array: str, rows: float = 0) -> Self:
        """Return the conversion of an array (image, frame) of an fp16 space into that of another space.

        Args:
            source: the spec of the fp16 space.
            target: the spec of the other one.
            array: image or frame.
            rows: rows that one process converts; many are, by compiled loops.
        """
        values = rows * source.tokens(array) * source.width
        changes = target.codec != "fp16" or target.pool(array) != source.pool(array)
        return cls(
            tokens=source.tokens(array),
            width=source.width,
            window=target.pool(array) // source.pool(array),
            codec=target.codec,
            compiled=changes and values >= WORTH_VALUES and _compiles(),
        )

    def compile(self) -> None:
        """Compile what this conversion uses, or load what was compiled, and compare it with numpy once.

        Raises:
            CacheError: the compiled loops give other bytes.
        """
        if not self.compiled:
            return
        values = np.random.default_rng(0).standard_normal(self.tokens * self.width) * 50
        row = values.astype("<f2").view(np.uint8)[None]
        compiled, _ = self._converted(row)
        by_numpy, _ = replace(self, compiled=False)._converted(row)
        if not np.array_equal(compiled, by_numpy):
            kept = Path(__file__).parent / "__pycache__"
            raise CacheError(
                f"loops compiled by numba give other bytes than numpy: remove those that it keeps (rm "
                f"{kept}/compiled_codec.*.nb*), or convert without it (pip uninstall numba)"
            )

    @property
    def source_bytes(self) -> int:
        """Bytes of a row of the source."""
        return codec.row_bytes("fp16", self.tokens, self.width)

    @property
    def target_bytes(self) -> int:
        """Bytes of a row of the target."""
        return codec.row_bytes(self.codec, self.tokens // self.window**2, self.width)

    def __call__(self, rows: Rows, out: Rows) -> npt.NDArray[np.float32]:
        """Convert rows (n, source_bytes) into `out` (n, target_bytes).

        Returns:
            The relative errors (n,): of the codec, and of rounding what is pooled. A row with NaN or Inf has
            the error NaN, and its bytes are meaningless.
        """
        bits = rows.view("<u2")
        # Read as signed numbers, the bits of Inf, NaN and all negative values are above or below the others'.
        finite = (bits.view("<i2").max(axis=1) < FP16_INF) & (
            bits.max(axis=1) < FP16_SIGN | FP16_INF
        )
        if not finite.all():
            rows = np.where(finite[:, None], rows, np.uint8(0))
        errors = np.empty(len(rows), np.float32)
        # One row at a time, whose values stay in the processor's cache. Small ones share the cost of a call.
        # Compiled loops see to that themselves.
        at_once = codec.PART_VALUES // (self.tokens * self.width)
        step = max(1, len(rows) if self.compiled else at_once)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            out[part], errors[part] = self._converted(rows[part])
        errors[~finite] = np.nan
        return errors

    def _converted(self, rows: Rows) -> tuple[Rows, npt.NDArray[np.float32]]:
        halves = codec.unpack(rows, "fp16", self.tokens, self.width)
        lost = np.zeros(len(rows), np.float32)
        if self.window > 1:
            halves, lost = self._pooled(halves)
        if self.codec == "fp16":
            return halves.astype("<f2", copy=False).view(np.uint8).reshape(len(rows), -1), lost
        packed, errors = self._quantise(halves)
        # The two errors have nothing to do with each other, so their squares add up.
        if self.window > 1:
            errors = np.sqrt(errors * errors + lost * lost)
        return packed, errors

    def _quantise(self, x: Any) -> tuple[Rows, npt.NDArray[np.float32]]:
        if self.compiled:
            from cache.maintenance import compiled_codec

            return compiled_codec.quantise(x, self.codec)
        return codec.quantise(x, self.codec)

    def _pooled(self, halves: Any) -> tuple[Any, npt.NDArray[np.float32]]:
        """Return the pooled values, which float16 holds, and the relative errors (n,) of rounding them."""
        if self.compiled:
            from cache.maintenance import compiled_codec

            return compiled_codec.pool(halves, self.window)
        features = pool(halves, self.window)
        rounded = codec.round_to_halves(features)
        lost = _relative(rounded - features, features)
        return rounded, lost


def _compiles() -> bool:
    """Return whether numba is there, and works with this Python and numpy."""
    try:
        import cache.maintenance.compiled_codec  # noqa: F401
    except ImportError:
        return False
    return True


def _relative(off: npt.NDArray[np.float32], features: npt.NDArray[np.float32]) -> Any:
    """Return |off| / |features| of each row (n,), 0 for a row of zeros."""
    lost, norms = (np.sqrt(np.square(x).sum((1, 2), dtype=np.float32)) for x in (off, features))
    return np.divide(lost, norms, out=np.zeros_like(norms), where=norms > 0)


def pool(features: npt.NDArray[np.float16], window: int) -> npt.NDArray[np.float32]:
    """Average windows of patches, to the bit as `model.vision.encoder` does it with torch.

    The sums have one fixed order and there is no division, so numpy and torch agree on every device.

    Args:
        features: (..., N, V) little-endian float16, finite: N patches of a square grid in row-major order.
        window: the side of a window, in patches.

    Returns:
        (..., N / window^2, V) float32, windows in row-major order.

    Raises:
        ValueError: N is not a square number, or the window does not divide the grid's side.
    """
    *lead, patches, width = features.shape
    grid = math.isqrt(patches)
    if grid * grid != patches or window < 1 or grid % window:
        raise ValueError(f"{patches} patches in windows of {window} x {window}")
    side = grid // window
    strips = features.reshape(-1, window, side, window, width)
    pooled = np.empty((len(strips), side, width), np.float32)
    # A strip of the image at a time, for the processor's cache.
    values = np.empty(strips.shape[1:], np.float32)
    for strip, total in zip(strips, pooled, strict=True):
        codec.widen(strip, values)
        total[:] = values[0, :, 0]
        for row in range(window):
            for column in range(row == 0, window):
                total += values[row, :, column]
        total *= codec.HALF_UNIT
    pooled *= np.float32(1 / window**2)
    pooled += np.float32(0)  # -0.0 becomes 0.0, as in a sum that starts with 0
    return pooled.reshape(*lead, side * side, width)
