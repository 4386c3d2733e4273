"""Checksums: crc32c of rows, the sha256 seal of metadata files, and a mixing function for hash tables.

data = sealed_json({"format": 1})
values = read_sealed_json(path)         # CorruptError if any byte has changed
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from awscrt import checksums

from cache.errors import CorruptError
from cache.format.gate import MAX_JSON_BYTES, decode, open_file, read_file

# awscrt is the fastest library for crc32c. It folds 64 bytes an instruction on processors with AVX-512 and
# VPCLMULQDQ: 32 GB/s from memory and 53 GB/s from the processor's cache, where PyPI's `crc32c` reaches 17 and
# 27 (one core of an AMD EPYC, 2026-11-24). Both take memoryviews without a copy and release the GIL.
crc32c: Callable[..., int] = checksums.crc32c
"""`crc32c(data)` is the crc32c of a buffer; `crc32c(data, value)` that of earlier bytes, whose crc32c is
`value`, and of `data`."""

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""Increment of splitmix64: 2**64 divided by the golden ratio, made odd."""


def mix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Apply the finaliser of splitmix64, a bijection of 64-bit numbers, in place; return `x`.

    Each bit of the input changes about half the bits of the output.
    """
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


SEAL = b"sha256:"
"""Beginning of the seal of a file: the sha256 of that file with the 64 digits of the seal as zeros.

Any changed byte, and any missing end, breaks the seal. It is the last text of this form in the file, so a
quoted one does no harm."""


UNSEALED = "sha256:" + "0" * 64
"""The text that a writer puts where the seal belongs."""


def seal(data: bytes) -> bytes:
    """Return `data` with its last `UNSEALED` replaced by its seal."""
    sealed = bytearray(data)
    _seal_in_place(sealed)
    return bytes(sealed)


def seal_file(file: BinaryIO) -> None:
    """Replace the last `UNSEALED` of an open file of any size by the file's seal."""
    file.flush()
    with mmap.mmap(file.fileno(), 0) as data:
        _seal_in_place(data)


def _seal_in_place(data: bytearray | mmap.mmap) -> None:
    at = data.rfind(SEAL) + len(SEAL)
    assert data[at : at + 64] == b"0" * 64, "nothing to seal"
    data[at : at + 64] = _digest(data, at)


def check_seal(data: bytes | mmap.mmap, path: Path) -> bytes:
    """Return the seal (32 bytes) of `data`, which was read from `path`.

    Raises:
        CorruptError: `data` has no seal, or is not exactly what was sealed.
    """
    at = data.rfind(SEAL) + len(SEAL)
    if at < len(SEAL):
        raise CorruptError(path, "its seal (sha256:...) is missing")
    if data[at : at + 64] != _digest(data, at):
        raise CorruptError(path, "its bytes do not match its seal (sha256)")
    return bytes.fromhex(
        data[at : at + 64].decode()
    )  # hex digits, since they are those of a digest


def check_seal_file(path: Path, root: Path | None = None) -> None:
    """Check the seal of a file of any size.

    Args:
        path: the file.
        root: the cache that it is in, see `cache.format.gate.open_file`.

    Raises:
        CorruptError: the file is empty, has no seal, is not exactly what was sealed, or is no file.
        OSError: the file cannot be read.
    """
    map_sealed(path, root)


def map_sealed(path: Path, root: Path | None = None) -> mmap.mmap:
    """Return the bytes of a file of any size, mapped, after checking its seal; see `check_seal_file`.

    The mapping ends with the last reference to it, or to what was read from it without a copy.
    """
    with open_file(path, root) as file:
        if not os.fstat(file.fileno()).st_size:
            raise CorruptError(path, "empty file")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    check_seal(data, path)
    return data


def _digest(data: bytes | bytearray | mmap.mmap, at: int) -> bytes:
    digest = hashlib.sha256()
    with memoryview(data) as whole, whole[:at] as before, whole[at + 64 :] as after:
        digest.update(before)
        digest.update(b"0" * 64)
        digest.update(after)
    return digest.hexdigest().encode()


def sealed_json(values: Mapping[str, Any]) -> bytes:
    """Return `values` as JSON text with the seal in its last key."""
    text = json.dumps({**values, "seal": UNSEALED}, indent=2, allow_nan=False)
    return seal(text.encode() + b"\n")


def read_sealed_json(
    path: Path, root: Path | None = None, *, most: int = MAX_JSON_BYTES
) -> dict[str, Any]:
    """Return the values of a sealed JSON file, without checking what they are.

    Args:
        path: the file.
        root: the cache that it is in, see `cache.format.gate.open_file`.
        most: bytes that it may have.

    Raises:
        CorruptError: the file is missing, its bytes have changed, or they are no object of strict JSON.
    """
    try:
        data = read_file(path, root, most=most)
    except FileNotFoundError:
        raise CorruptError(path, "missing") from None
    check_seal(data, path)
    return decode(data, dict[str, Any], path)
