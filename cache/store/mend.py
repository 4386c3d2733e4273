"""Metadata put back as it was.

A sealed file contains the sha256 of its own bytes. So where a single bit has flipped, the commonest damage by
memory or disk, every bit can be tried: when the seal fits again, those are the bytes that were written,
beyond any doubt. (Rows are not mended: a crc32c has 32 bits, a row millions; a flip that fits is no proof.)
What space.json said can be proven in other ways, too: every commit carries the fingerprint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cache.format.space_info import MAX_SLOTS, SpaceInfo
from cache.format.spec import ARRAYS, FeatureSpec
from cache.store.commits import read_commit
from cache.store.paths import SEAL, Corrupt, SpacePaths, check_seal

MOST_BYTES = 256 << 10
"""Longest file tried: the commit of 4,096 rows. The work grows with the square of it."""


def flip_back(data: bytes) -> bytes | None:
    """The sealed bytes that `data` was before one bit of it flipped; None when it was not just that."""
    if not 0 < len(data) <= MOST_BYTES:
        return None
    return _in_the_word(data) or _around_the_seal(data)


def _in_the_word(data: bytes) -> bytes | None:
    """The flip is in the word before the seal, so that no seal was found, or another one, that is quoted."""
    # Only one of its letters is wrong: look wherever its first three or its last three stand.
    places = {at - offset for offset in (0, 4) for at in _all(data, SEAL[offset : offset + 3])}
    for start in sorted(places):
        for place in range(max(start, 0), min(start + len(SEAL), len(data))):
            for bit in range(8):
                tried = _flipped(data, place, bit)
                if tried[start : start + len(SEAL)] == SEAL and _fits(tried):
                    return tried
    return None


def _around_the_seal(data: bytes) -> bytes | None:
    """The flip is in the seal's digits, or in what it is the hash of."""
    at = data.rfind(SEAL) + len(SEAL)
    if at < len(SEAL) or len(data) < at + 64:
        return None
    zeroed = data[:at] + b"0" * 64 + data[at + 64 :]
    digest = hashlib.sha256(zeroed).hexdigest().encode()
    if (int.from_bytes(digest) ^ int.from_bytes(data[at : at + 64])).bit_count() == 1:
        return data[:at] + digest + data[at + 64 :]
    try:
        seal = bytes.fromhex(data[at : at + 64].decode())
    except ValueError:
        return None
    before = hashlib.sha256()  # of all that stands before the byte that is tried
    for place in range(len(data)):
        behind = zeroed[place + 1 :]
        for bit in range(8) if not at <= place < at + 64 else ():
            tried = before.copy()
            tried.update(bytes([data[place] ^ 1 << bit]))
            tried.update(behind)
            if tried.digest() == seal:
                return _flipped(data, place, bit)
        before.update(zeroed[place : place + 1])
    return None


def _flipped(data: bytes, place: int, bit: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def _fits(data: bytes) -> bool:
    try:
        check_seal(data, Path())
    except Corrupt:
        return False
    return True


def _all(data: bytes, what: bytes) -> list[int]:
    found, at = [], data.find(what)
    while at >= 0:
        found.append(at)
        at = data.find(what, at + 1)
    return found


def commits_fingerprint(paths: SpacePaths) -> str | None:
    """The one that all intact commits of a space carry; None when there are none, or several."""
    found = set()
    for array in ARRAYS:
        for number in paths.committed(array):
            data = paths.commit(array, number).read_bytes()
            try:
                check_seal(data, paths.commit(array, number))
            except Corrupt:
                continue
            found.add(pq.read_metadata(pa.BufferReader(data)).metadata[b"space"].decode())
    return found.pop() if len(found) == 1 else None


def rebuild_info(data: bytes, fingerprint: str) -> SpaceInfo | None:
    """What a damaged space.json said, as far as `fingerprint` (of the commits) proves it: all of the spec.

    How to load the encoder is not part of the fingerprint; wrong, it loads an encoder of another one, which
    is noticed. Rows per shard are checked against every commit. None when the text is not understood, or
    describes another space.
    """
    try:
        values = json.loads(data)
        spec = FeatureSpec.from_json(values["spec"])
        slots = {array: int(values["rows_per_shard"][array]) for array in ARRAYS}
        info = SpaceInfo(spec=spec, load=dict(values["load"]), slots=slots)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return info if spec.fingerprint == fingerprint and min(slots.values()) > 0 else None


def fitting_info(paths: SpacePaths, info: SpaceInfo) -> SpaceInfo:
    """`info`, with as many rows per shard as the commits that are here already were made with.

    For a space whose space.json was lost, while its rows were not.

    Raises:
        Corrupt: the commits are of another space.
    """
    slots = {}
    for array, usual in info.slots.items():
        slots[array] = usual
        if not (numbers := paths.committed(array)):
            continue
        for guess in (usual, *(1 << power for power in range(MAX_SLOTS.bit_length()))):
            guessed = replace(info, slots={**info.slots, array: guess})
            with contextlib.suppress(Corrupt):
                read_commit(paths, guessed, array, numbers[-1])
                slots[array] = guess
                break
        else:
            read_commit(paths, info, array, numbers[-1])  # raises what is wrong with it
    return replace(info, slots=slots)
