"""The content of space.json: the spec of a space, how to load its encoder, and the rows of a shard.

info = new_info(spec, load={"encoder": {...}}, shard_bytes=SHARD_BYTES)
path.write_bytes(info_bytes(info))
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cache.format.checksums import sealed_json
from cache.format.shard import Geometry
from cache.format.spec import ARRAYS, FORMAT, FeatureSpec
from cache.format.tar_shard import TarGeometry
from cache.format.zarr_shard import ZarrGeometry

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
