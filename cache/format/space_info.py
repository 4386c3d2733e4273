"""The content of space.json: the spec of a space, how to load its encoder, and the rows of a shard.

info = new_info(spec, load={"encoder": {...}}, shard_bytes=SHARD_BYTES)
path.write_bytes(info_bytes(info))
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from cache.format.checksums import sealed_json
from cache.format.gate import fit
from cache.format.shard import Geometry
from cache.format.spec import ARRAYS, FORMAT, FeatureSpec
from cache.format.tar_shard import TarGeometry
from cache.format.zarr.shard import ZarrGeometry

_GEOMETRIES: Mapping[str, type[Geometry]] = {"zarr": ZarrGeometry, "webdataset": TarGeometry}

SHARD_BYTES = 256 << 20
"""Approximate bytes of a full shard."""

MAX_SLOTS = 4096
"""Rows of a shard at most. A job that dies loses the rows of its unfinished shards."""


@dataclass(frozen=True, kw_only=True)
class SpaceInfo:
    """What space.json says."""

    spec: FeatureSpec
    """How pixels become rows."""
    load: Mapping[str, Any]
    """How to load the encoder again: JSON values, not part of the fingerprint."""
    slots: Mapping[str, int]
    """Array -> rows per shard."""

    @functools.cached_property
    def _geometries(self) -> Mapping[str, Geometry]:
        return {array: _geometry(self.spec, array, slots) for array, slots in self.slots.items()}

    def geometry(self, array: str) -> Geometry:
        """Return the geometry of the shards of `array`."""
        return self._geometries[array]


def _geometry(spec: FeatureSpec, array: str, slots: int) -> Geometry:
    return _GEOMETRIES[spec.container](spec=spec, array=array, slots=slots)


def slot_bytes(spec: FeatureSpec, array: str) -> int:
    """Return the bytes that a row of `array` takes in a shard, with the bytes around it."""
    return _geometry(spec, array, 1).slot_bytes


def new_info(spec: FeatureSpec, load: Mapping[str, Any], shard_bytes: int) -> SpaceInfo:
    """Describe a new space. A shard has about `shard_bytes`, and a power of two of rows."""
    slots = {}
    for array in ARRAYS:
        power = round(math.log2(max(1.0, shard_bytes / spec.row_bytes(array))))
        slots[array] = min(MAX_SLOTS, 2**power)
    return SpaceInfo(spec=spec, load=load, slots=slots)


MAX_INFO_BYTES = 1 << 20
"""Bytes of space.json, at most."""
MAX_DEPTH = 32
"""Lists and objects inside one another in `load`, at most."""


class _Stated(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The keys of space.json."""

    format: int
    name: str
    fingerprint: str
    spec: dict[str, Any]
    load: dict[str, Any]
    rows_per_shard: dict[str, Annotated[int, msgspec.Meta(ge=1, le=MAX_SLOTS)]]
    seal: str

    def __post_init__(self) -> None:
        if self.rows_per_shard.keys() != set(ARRAYS):
            raise ValueError("rows_per_shard lacks an array")
        values: list[Any] = [self.load]
        for _ in range(MAX_DEPTH):
            inner = [v.values() if isinstance(v, dict) else v for v in values]
            values = [v for of in inner for v in of if isinstance(v, dict | list)]
        if values:
            raise ValueError("load is nested too deeply")


def info_of(values: Mapping[str, Any]) -> SpaceInfo:
    """Return what the values of a space.json say; the inverse of `info_bytes`.

    Raises:
        ValueError: a key is missing or unknown, or a value is none that this program writes.
    """
    stated = fit(dict(values), _Stated)
    spec = FeatureSpec.from_json(stated.spec)
    if (stated.fingerprint, stated.name) != (spec.fingerprint, spec.name):
        raise ValueError("the fingerprint is not that of the spec beside it")
    return SpaceInfo(spec=spec, load=stated.load, slots=stated.rows_per_shard)


def info_bytes(info: SpaceInfo) -> bytes:
    """Return the bytes of space.json."""
    return sealed_json(
        {
            "format": FORMAT,
            "name": info.spec.name,
            "fingerprint": info.spec.fingerprint,
            "spec": info.spec.to_json(),
            "load": dict(info.load),
            "rows_per_shard": dict(info.slots),
        }
    )
