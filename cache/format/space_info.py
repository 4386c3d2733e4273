"""space.json: what a space is, how its encoder is rebuilt, and how many rows its shards hold."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cache.format.shard import Container, Geometry
from cache.format.spec import ARRAYS, FORMAT, FeatureSpec
from cache.format.tar_shard import WdsContainer
from cache.format.zarr_shard import ZarrContainer
from cache.store.paths import Corrupt, SpacePaths, read_sealed_json, sealed_json
from configs import UserError

_CONTAINERS: Mapping[str, Container] = {"zarr": ZarrContainer(), "webdataset": WdsContainer()}

SHARD_BYTES = 256 << 20
"""About the size of a shard."""

MAX_SLOTS = 4096
"""Rows in a shard at most: they are lost together when a job dies."""


@dataclass(frozen=True, kw_only=True)
class SpaceInfo:
    """The content of space.json."""

    spec: FeatureSpec
    """How pixels became rows."""
    load: Mapping[str, Any]
    """How to load the encoder again: JSON, not part of the fingerprint."""
    slots: Mapping[str, int]
    """Array -> rows per shard."""

    @property
    def container(self) -> Container:
        """The on-disk format of its shards."""
        return _CONTAINERS[self.spec.container]

    @functools.cached_property
    def _geometries(self) -> Mapping[str, Geometry]:
        make = self.container.geometry
        return {array: make(self.spec, array, slots) for array, slots in self.slots.items()}

    def geometry(self, array: str) -> Geometry:
        """Where things stand in the shards of `array`."""
        return self._geometries[array]


def slot_bytes(spec: FeatureSpec, array: str) -> int:
    """Bytes a row of `array` takes in a shard, with what stands around it."""
    return _CONTAINERS[spec.container].geometry(spec, array, 1).slot_bytes


def new_info(spec: FeatureSpec, load: Mapping[str, Any], shard_bytes: int) -> SpaceInfo:
    """The description of a new space: shards of about `shard_bytes`, a power of two of rows."""
    slots = {}
    for array in ARRAYS:
        power = round(math.log2(max(1.0, shard_bytes / spec.row_bytes(array))))
        slots[array] = min(MAX_SLOTS, 2**power)
    return SpaceInfo(spec=spec, load=load, slots=slots)


def info_bytes(info: SpaceInfo) -> bytes:
    """The file space.json."""
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


def read_info(paths: SpacePaths) -> SpaceInfo:
    """space.json, checked.

    Raises:
        UserError: there is no space here, or it is of another format.
        Corrupt: the file has changed since it was written.
    """
    if not paths.space_json.exists():
        raise UserError(f"no feature space at {paths.root} (looked for {paths.space_json.name})")
    values = read_sealed_json(paths.space_json)
    if values["format"] != FORMAT:
        raise UserError(
            f"{paths.space_json}: format {values['format']}, this version reads {FORMAT}; "
            "use the version of nanomolmo2 that wrote it"
        )
    try:
        spec = FeatureSpec.from_json(values["spec"])
    except ValueError as error:
        raise UserError(f"{paths.space_json}: {error}") from None
    if spec.fingerprint != values["fingerprint"]:
        raise Corrupt(paths.space_json, "the fingerprint is not that of the spec beside it")
    return SpaceInfo(spec=spec, load=values["load"], slots=values["rows_per_shard"])
