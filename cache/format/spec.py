"""FeatureSpec: everything that decides the bytes of a row and the files that hold it, and its fingerprint.

    spec = FeatureSpec(encoder="clip-vit-l14-336", codec="int8", ...)
    spec.name                           # "clip-vit-l14-336-int8-1a2b3c4d", the folder of the space

Rows made under equal specs are interchangeable. Whatever can change a value changes the fingerprint, and
with it the space that holds the row. So a cache never returns a row that was made in another way.

Encoders round features to float16 before they pool and pack them. So `cache.convert` makes the same rows
from an fp16 space as encoding makes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta

from cache.format.codec import CODECS, row_bytes
from cache.format.gate import fit
from cache.format.tail import Tail

FORMAT = 1
"""Version of the on-disk format."""
ARRAYS = ("image", "frame")
"""The arrays of a space: rows of images, and rows of video frames."""

ARRAY_OF = {"image": "image", "video": "frame"}
"""Media kind -> the array that has its rows."""

FITS = ("squash", "pad", "crop")
DECODES = ("whole", "reduced")
CONTAINERS = ("zarr", "webdataset")
SHORTER_SIDE = ":shorter-side-"
"""In `resize`, before the pixels of the shorter side."""
NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.)){0,199}")
"""A name from a file that may become the name of a folder of ours."""
MAX_ENCODER = 100
"""Characters of `encoder`, at most."""
MAX_ROW_BYTES = 1 << 30
"""Bytes of a row, at most. One of 577 tokens of ViT-L is a thousandth of that."""

Text = Annotated[str, Meta(min_length=1, max_length=500)]
Side = Annotated[int, Meta(ge=1, le=1 << 16)]
Block = Annotated[int, Meta(ge=0, le=9999)]
# The ranges are those of `from_json`; whoever builds a spec of their own states what its encoder has.

_NOT_HASHED = frozenset({"encoder", "tail"})
# A display name, since `weights` and `architecture` identify it; and what no row depends on.
_HASHED_UNLESS = {"container": "zarr", "decode": "whole"}
"""Fields that are hashed only if they differ from this value."""
# A new optional field belongs here, so that the fingerprints of existing spaces do not change.
_CHOICES = {"codec": CODECS, "fit": FITS, "container": CONTAINERS, "decode": DECODES}


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """One way of encoding. Its fingerprint is of all but `encoder`, `tail`, and the defaults of `container`
    and `decode`."""

    encoder: str
    """Display name, the first part of the space's folder name: `clip-vit-l14-336`, `random-demo`."""
    # Nothing vouches for it, so it is checked: cache.merge and cache.convert create a folder of this name.
    architecture: Text
    """Library and model: `open_clip:ViT-L-14-336-quickgelu`."""
    weights: Annotated[str, Meta(pattern="^[0-9a-f]{64}$", max_length=64)]
    """sha256 (hex) of the sorted (name, dtype, shape, bytes) of the tensors that the features depend on."""
    activation: Text
    """Activation of the MLPs as built: `quick_gelu`, `gelu`, `gelu_tanh`."""
    blocks: Annotated[tuple[Block, ...], Meta(min_length=1, max_length=256)]
    """Transformer blocks (0-based) whose outputs are concatenated in this order."""
    keep_cls: bool = False
    """Whether each row starts with the CLS token."""
    image_size: Side
    """Side of the square input of the encoder, pixels."""
    patch_size: Side
    """Side of one patch, pixels."""
    width: Annotated[int, Meta(ge=1, le=1 << 24)]
    """Values per token, over all blocks."""
    fit: str
    """How an image becomes square: `squash`, `pad` or `crop`."""
    resize: Text
    """Resampling filter and the library that computes it; with `crop`, also the side before the cut."""
    # pillow:bicubic, pillow:bicubic:shorter-side-256
    mean: tuple[float, float, float]
    """Mean per channel, subtracted from pixels in [0, 1]."""
    std: tuple[float, float, float]
    """Standard deviation per channel, which divides the pixels after that."""
    pool_image: Side = 1
    """Side n of the n x n patches of an image that are averaged into one token."""
    pool_frame: Side = 3
    """Side n of the n x n patches of a video frame that are averaged into one token."""
    compute_dtype: Text
    """Data type that the encoder computes in."""
    # Relative error to float32 at block 22: 1.2 % in bfloat16, 0.15 % in float16.
    batch_size: Side
    """Images in each batch of the encoder; the last batch is padded to this size."""
    # Part of the spec because in bfloat16 the features of batches of 1 and of 8 differ by 1 %.
    codec: str
    """How rows are stored: `fp16`, `int8` or `int4`."""
    format: int = FORMAT
    """Version of the on-disk format."""
    container: str = "zarr"
    """Format of a shard: `zarr` (of a Zarr v3 array) or `webdataset` (a tar)."""
    decode: str = "whole"
    """`whole`, or `reduced`: a JPEG far larger than the input is decoded at 1/2, 1/4 or 1/8 of its size."""
    # How far is decided in model.media.fit. Another rule there needs another word here.
    tail: Tail | None = None
    """Blocks behind the stored one, which training computes; None: the rows are what the connector gets."""

    def __post_init__(self) -> None:
        name: object = self.encoder  # it may be from a file
        if not (isinstance(name, str) and NAME.fullmatch(name) and len(name) <= MAX_ENCODER):
            raise ValueError(
                f"encoder {str(name)[:MAX_ENCODER]!r}: a name has letters, digits, '.', '_' and '-', "
                f"begins with a letter or digit, has no '..', and takes at most {MAX_ENCODER} characters"
            )
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} {str(value)[:40]!r} is none of {', '.join(choices)}")
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
            raise ValueError("keep_cls with pooling: the CLS token is not on the grid of patches")
        if self.tail is not None:
            if (self.pool_image, self.pool_frame) != (1, 1):
                raise ValueError("tail with pooled rows: its blocks need every patch")
            self.tail.check(self.blocks, self.width, self.grid, self.activation)
        if not self.blocks:
            raise ValueError("blocks is empty: name at least one transformer block")
        if not all(map(math.isfinite, (*self.mean, *self.std))) or 0 in self.std:
            raise ValueError(f"mean {self.mean}, std {self.std}: no image can be scaled by that")

    @property
    def grid(self) -> int:
        """Patches along one side of the encoder's input."""
        return self.image_size // self.patch_size

    @property
    def shorter_side(self) -> int:
        """Pixels of an image's shorter side before the middle is cut out, for `fit: crop`."""
        _, mark, number = self.resize.rpartition(SHORTER_SIDE)
        return int(number) if mark and number.isdecimal() else self.image_size

    def pool(self, array: str) -> int:
        """Return the side of the pooling window of `array`, patches."""
        return {"image": self.pool_image, "frame": self.pool_frame}[array]

    def tokens(self, array: str) -> int:
        """Return the tokens of one row of `array`."""
        return (self.grid // self.pool(array)) ** 2 + self.keep_cls

    def row_bytes(self, array: str) -> int:
        """Return the stored bytes of one row of `array`, without its checksum."""
        return row_bytes(self.codec, self.tokens(array), self.width)

    @functools.cached_property
    def seen(self) -> FeatureSpec:
        """The spec of what the connector gets: behind the tail, without CLS, pooled. Without one, itself."""
        if self.tail is None:
            return self
        return dataclasses.replace(
            self,
            blocks=self.tail.blocks,
            width=self.width * len(self.tail.blocks),
            keep_cls=False,
            pool_image=self.tail.pool_image,
            pool_frame=self.tail.pool_frame,
            tail=None,
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the canonical JSON of every hashed field."""
        hashed = {
            k: v
            for k, v in self.to_json().items()
            if k not in _NOT_HASHED and v != _HASHED_UNLESS.get(k)
        }
        text = json.dumps(hashed, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def name(self) -> str:
        """The space's folder name."""
        return f"{self.encoder}-{self.codec}-{self.fingerprint[:8]}"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, in order; without `tail` if there is none."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        tail = values.pop("tail")
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return values | ({} if tail is None else {"tail": tail.to_json()})

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> FeatureSpec:
        """Return the spec that has these fields; the inverse of `to_json`.

        Raises:
            ValueError: a key is missing or unknown (a newer version wrote it), or a value is invalid.
        """
        known = {f.name for f in dataclasses.fields(FeatureSpec)}
        unknown = sorted(set(values) - known)
        if isinstance(tail := values.get("tail"), Mapping):
            unknown += sorted(set(tail) - {f.name for f in dataclasses.fields(Tail)})
        if unknown:
            raise ValueError(
                f"unknown keys {', '.join(unknown)[:200]!s}: written by a newer version?"
            )
        missing = sorted(
            f.name
            for f in dataclasses.fields(FeatureSpec)
            if f.default is dataclasses.MISSING and f.name not in values
        )
        if missing:
            raise ValueError(f"missing keys {', '.join(missing)}")
        fitted = fit(dict(values), FeatureSpec)
        # The numbers as written: 1 and 1.0 have two fingerprints.
        fields: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        fields["tail"] = fitted.tail
        spec = FeatureSpec(**fields)
        if max(map(spec.row_bytes, ARRAYS)) > MAX_ROW_BYTES:
            raise ValueError(f"rows of more than {MAX_ROW_BYTES:,} bytes")
        return spec
