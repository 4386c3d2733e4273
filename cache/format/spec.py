"""What a feature is: everything that decides how one view's pixels become one row, and its fingerprint.

Two rows made under equal specs are interchangeable; anything that could change a value changes the
fingerprint, and with it the space the row lives in. That is what makes a stale hit impossible.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cache.format.codec import CODECS, row_bytes

FORMAT = 1
ARRAYS = ("image", "frame")
"""Kinds of media view. Each has its own array in a space, under the same name."""

ARRAY_OF = {"image": "image", "video": "frame"}
"""Media kind -> the array its views' rows are in."""

FITS = ("squash", "pad", "crop")
CONTAINERS = ("zarr", "webdataset")
_NOT_HASHED = frozenset(
    {"encoder"}
)  # a name for people; `weights` and `architecture` say what it is
_LATER = {"container": "zarr"}
"""Fields younger than the first spaces: hashed only where they are not this."""


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """One way of encoding. Hashed in whole, but for the display name `encoder`."""

    encoder: str
    """Display name, first part of the space's folder name: `clip-vit-l14-336`, `random-demo`."""
    architecture: str
    """Library and model, as `open_clip:ViT-L-14-336-quickgelu`."""
    weights: str
    """sha256 (hex) over the sorted (name, dtype, shape, bytes) of the tensors the features depend on."""
    activation: str
    """The MLPs' activation as built: `quick_gelu`, `gelu`, `gelu_tanh`."""
    blocks: tuple[int, ...]
    """Transformer blocks (0-based) whose outputs are concatenated, in this order."""
    keep_cls: bool = False
    """Whether the CLS token stands first in each row."""
    image_size: int
    """Side of the square encoder input, pixels."""
    patch_size: int
    """Side of one patch, pixels."""
    width: int
    """Values per token, all blocks together."""
    fit: str
    """How an image becomes square: `squash`, `pad` or `crop`."""
    resize: str
    """Resampling filter and the library that computes it."""
    mean: tuple[float, float, float]
    """Subtracted from pixels in [0, 1], per channel."""
    std: tuple[float, float, float]
    """Divides what is left, per channel."""
    pool_image: int = 1
    """Images: n x n patches are averaged into one token."""
    pool_frame: int = 3
    """Video frames: the same."""
    compute_dtype: str
    """What the encoder computes in. bf16 is 1.2 % off fp32 at block 22, fp16 0.15 %."""
    batch_size: int
    """The one batch shape the encoder runs; in bf16, batch 1 and batch 8 differ by 1 %."""
    codec: str
    """How rows are stored: `fp16`, `int8` or `int4`."""
    format: int = FORMAT
    """Version of the on-disk format."""
    container: str = "zarr"
    """What a shard is: `zarr` (a shard of a Zarr v3 array) or `webdataset` (a tar of standard members)."""

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(f"codec {self.codec!r} is none of {', '.join(CODECS)}")
        if self.fit not in FITS:
            raise ValueError(f"fit {self.fit!r} is none of {', '.join(FITS)}")
        if self.container not in CONTAINERS:
            raise ValueError(f"container {self.container!r} is none of {', '.join(CONTAINERS)}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}"
            )
        for array in ARRAYS:
            if self.pool(array) < 1 or self.grid % self.pool(array):
                raise ValueError(
                    f"pool_{array} {self.pool(array)} does not divide "
                    f"the grid of {self.grid} x {self.grid} patches"
                )
        if self.keep_cls and (self.pool_image > 1 or self.pool_frame > 1):
            raise ValueError("keep_cls with pooling: a CLS token has no place on the patch grid")
        if not self.blocks:
            raise ValueError("blocks is empty: name at least one transformer block")

    @property
    def grid(self) -> int:
        """Patches along one side of the encoder input."""
        return self.image_size // self.patch_size

    def pool(self, array: str) -> int:
        """Side of the pooling window for `array`, patches."""
        return {"image": self.pool_image, "frame": self.pool_frame}[array]

    def tokens(self, array: str) -> int:
        """Tokens in one row of `array`."""
        return (self.grid // self.pool(array)) ** 2 + self.keep_cls

    def row_bytes(self, array: str) -> int:
        """Stored bytes of one row of `array`, without its checksum."""
        return row_bytes(self.codec, self.tokens(array), self.width)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the canonical JSON of every hashed field.

        A field added in a later version enters only where it is not its default, so that older
        spaces keep their name.
        """
        hashed = {
            k: v
            for k, v in self.to_json().items()
            if k not in _NOT_HASHED and not (k in _LATER and v == _LATER[k])
        }
        text = json.dumps(hashed, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def name(self) -> str:
        """The space's folder name."""
        return f"{self.encoder}-{self.codec}-{self.fingerprint[:8]}"

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, in order."""
        return {
            k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()
        }

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> FeatureSpec:
        """The inverse of `to_json`.

        Raises:
            ValueError: a key is unknown (written by a newer version) or a value is impossible.
        """
        known = {f.name for f in dataclasses.fields(FeatureSpec)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown keys {', '.join(unknown)}: written by a newer version?")
        missing = sorted(
            f.name
            for f in dataclasses.fields(FeatureSpec)
            if f.default is dataclasses.MISSING and f.name not in values
        )
        if missing:
            raise ValueError(f"missing keys {', '.join(missing)}")
        fields: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return FeatureSpec(**fields)
