"""Metadata put back as it was.

A sealed file contains the sha256 of its own bytes. So where a single bit has flipped, the commonest damage by
memory or disk, every bit can be tried: when the seal fits again, those are the bytes that were written,
beyond any doubt. (Rows are not mended: a crc32c has 32 bits, a row millions; a flip that fits is no proof.)
What space.json said can be proven in other ways, too: every commit carries the fingerprint.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from cache.errors import CorruptError
from cache.format.checksums import SEAL, check_seal

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
    except CorruptError:
        return False
    return True


def _all(data: bytes, what: bytes) -> list[int]:
    found, at = [], data.find(what)
    while at >= 0:
        found.append(at)
        at = data.find(what, at + 1)
    return found
