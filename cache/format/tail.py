"""The blocks of an encoder behind the stored one, which training computes: `tail.safetensors` of a space.

    tail = dataclasses.replace(tail, sha256=file_sha256(data := file_bytes(tail, arrays, width)))
    arrays = read_tail(path, root, tail, width)      # {"blocks.20.norm_1.weight": (V,) float32, ...}

The file is safetensors, written here so that equal tensors give equal bytes on every machine. All that its
header says follows from the `Tail` in space.json. So a reader computes the header, compares it, and parses
nothing; it allocates what `nbytes` says and no more.

V width of a token, H width of the MLP's hidden layer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from cache.errors import CorruptError
from cache.format.gate import read_file

TAIL = "tail.safetensors"
"""Name of the file in the folder of a space."""
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_tanh")
"""Activations of the MLPs that a tail may have."""
MAX_BLOCKS = 64
"""Blocks of a tail, at most."""
MAX_TAIL_BYTES = 4 << 30
"""Bytes of the file, at most. Three blocks of ViT-L are 0.15 GB."""

Arrays = Mapping[str, npt.NDArray[np.float32]]
Count = Annotated[int, Meta(ge=1, le=1 << 20)]
Block = Annotated[int, Meta(ge=0, le=9999)]


@dataclass(frozen=True, kw_only=True)
class Tail:
    """Pre-norm transformer blocks from `first` on, and what becomes of their outputs."""

    first: Block
    """The first of the blocks (0-based); its input is the stored row."""
    blocks: Annotated[tuple[Block, ...], Meta(min_length=1, max_length=MAX_BLOCKS)]
    """Blocks whose outputs are concatenated in this order; `first - 1` is the stored row itself."""
    heads: Count
    """Attention heads of each block."""
    hidden: Count
    """Width of the hidden layer of each MLP."""
    eps: Annotated[float, Meta(gt=0, lt=1)]
    """What each layer norm adds to the variance."""
    pool_image: Count
    """Side n of the n x n patches of an image that are averaged into one token, behind the last block."""
    pool_frame: Count
    """Side n of the n x n patches of a video frame that are averaged into one token."""
    sha256: Annotated[str, Meta(pattern="^(?:[0-9a-f]{64})?$", max_length=64)] = ""
    """Of the file; empty as long as there is none."""

    @property
    def numbers(self) -> range:
        """The numbers of the blocks."""
        return range(self.first, max(self.blocks) + 1)

    def check(self, stored: tuple[int, ...], width: int, grid: int, activation: str) -> None:
        """Raise ValueError unless the blocks continue the stored features of a space.

        Args:
            stored: the blocks whose outputs are stored.
            width: values per stored token.
            grid: patches along one side of an image.
            activation: of the MLPs.
        """
        if activation not in ACTIVATIONS:
            raise ValueError(f"tail: activation {activation} is none of {', '.join(ACTIVATIONS)}")
        if stored != (self.first - 1,):
            raise ValueError(f"tail: begins with block {self.first}, and stored are {list(stored)}")
        if min(self.blocks) < self.first - 1 or max(self.blocks) < self.first:
            raise ValueError(f"tail: blocks {list(self.blocks)} are not behind the stored one")
        if len(set(self.blocks)) != len(self.blocks) or len(self.numbers) > MAX_BLOCKS:
            raise ValueError(
                f"tail: blocks {list(self.blocks)}: each once, at most {MAX_BLOCKS} in all"
            )
        if width % self.heads:
            raise ValueError(f"tail: {self.heads} heads do not divide the width {width}")
        for name in ("pool_image", "pool_frame"):
            if grid % getattr(self, name):
                raise ValueError(
                    f"{name} {getattr(self, name)} does not divide the grid of {grid} x {grid} patches"
                )
        if self.nbytes(width) > MAX_TAIL_BYTES:
            raise ValueError(f"tail: more than {MAX_TAIL_BYTES:,} bytes")

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor, by its name, in the order of the file."""
        v, h = width, self.hidden
        layers = {
            "norm_1": (v,),
            "qkv": (3 * v, v),  # queries, keys, values
            "out": (v, v),
            "norm_2": (v,),
            "up": (h, v),
            "down": (v, h),
        }
        return {
            f"blocks.{number}.{layer}.{kind}": shape if kind == "weight" else shape[:1]
            for number in self.numbers
            for layer, shape in layers.items()
            for kind in ("weight", "bias")
        }

    def nbytes(self, width: int) -> int:
        """Return the bytes of all tensors together. This allocates nothing, whatever the numbers are."""
        per_block = width * (4 * width + 2 * self.hidden + 9) + self.hidden
        return 4 * per_block * len(self.numbers)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, in order."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"blocks": list(self.blocks)}


def _header(tail: Tail, width: int) -> bytes:
    """Return the first bytes of the file: everything before the tensors."""
    stated = {k: v for k, v in tail.to_json().items() if k != "sha256"}
    header: dict[str, Any] = {"__metadata__": {"tail": json.dumps(stated, sort_keys=True)}}
    at = 0
    for name, shape in tail.shapes(width).items():
        end = at + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_bytes(tail: Tail, arrays: Arrays, width: int) -> bytes:
    """Return the bytes of the file.

    Args:
        tail: what the blocks are; its sha256 does not matter.
        arrays: (…) float32 of each name in `tail.shapes(width)`.
        width: values per token.
    """
    shapes = tail.shapes(width)
    assert {name: value.shape for name, value in arrays.items()} == shapes, "other tensors"
    values = (np.ascontiguousarray(arrays[name], "<f4").tobytes() for name in shapes)
    return b"".join([_header(tail, width), *values])


def file_sha256(data: bytes) -> str:
    """Return what `Tail.sha256` is for the bytes of a file."""
    return hashlib.sha256(data).hexdigest()


def read_tail_bytes(path: Path, root: Path, tail: Tail, width: int) -> bytes:
    """Return the bytes of a space's file, after comparing them with what its space.json says.

    Args:
        path: the file.
        root: the cache's folder.
        tail: of the spec in space.json, which has checked it.
        width: values per stored token.

    Raises:
        CorruptError: it is missing, has another size, hash or header, or has a value that is not finite.
    """
    header = _header(tail, width)
    wanted = len(header) + tail.nbytes(width)
    try:
        data = read_file(path, root, most=wanted)
    except FileNotFoundError:
        raise CorruptError(path, "missing") from None
    if len(data) != wanted:
        raise CorruptError(path, f"{len(data):,} bytes, not {wanted:,}")
    if file_sha256(data) != tail.sha256:
        raise CorruptError(path, "its sha256 is not that in space.json")
    if not data.startswith(header):
        raise CorruptError(path, "its header describes other tensors than space.json")
    if not np.isfinite(np.frombuffer(data, "<f4", offset=len(header)).sum(dtype=np.float64)):
        raise CorruptError(path, "has values that are not finite")
    return data


def read_tail(path: Path, root: Path, tail: Tail, width: int) -> dict[str, npt.NDArray[np.float32]]:
    """Return the tensors of a space's file, read-only, by name; arguments and errors: `read_tail_bytes`."""
    data = read_tail_bytes(path, root, tail, width)
    at, arrays = len(_header(tail, width)), {}
    for name, shape in tail.shapes(width).items():
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(data, "<f4", count, at).reshape(shape)
        at += 4 * count
    return arrays
