"""The seal of a file breaks with any flipped bit, any missing end and any added byte.

data = seal(b"... " + UNSEALED.encode())
check_seal(data, path)
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.errors import CorruptError
from cache.format.checksums import (
    UNSEALED,
    check_seal,
    check_seal_file,
    read_sealed_json,
    seal,
    seal_file,
    sealed_json,
)
from cache.store.files import new_file
from tests.support.spaces import fill, make_space

HERE = Path("somewhere")


def test_every_flipped_bit_of_every_sealed_file_breaks_its_seal(tmp_path: Path) -> None:
    space = make_space(tmp_path)
    fill(space, [1])
    space.grow("image")
    sealed = [p for p in space.paths.root.rglob("*") if p.suffix in (".json", ".parquet")]
    assert len(sealed) == 5  # space.json, three zarr.json, one commit
    for path in sealed:
        data = bytearray(path.read_bytes())
        check_seal(bytes(data), path)
        for at in range(len(data)):
            for bit in range(8):
                data[at] ^= 1 << bit
                with pytest.raises(CorruptError):
                    check_seal(bytes(data), path)
                data[at] ^= 1 << bit


@given(st.binary(), st.binary().filter(lambda tail: b"sha256:" not in tail))
def test_a_seal_may_be_anywhere_but_only_the_last_one_counts(head: bytes, tail: bytes) -> None:
    data = seal(head + UNSEALED.encode() + tail)
    assert len(data) == len(head) + len(UNSEALED) + len(tail)
    check_seal(data, HERE)
    for changed in (data + b"x", data[:-1], b"x" + data, data[1:]):
        with pytest.raises(CorruptError):
            check_seal(changed, HERE)


def test_a_seal_survives_quoted_seals_in_the_text() -> None:
    data = sealed_json({"text": "sha256:" + "1" * 64, "unsealed": UNSEALED})
    check_seal(data, HERE)
    assert json.loads(data)["text"] == "sha256:" + "1" * 64


def test_sealing_a_file_equals_sealing_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    data = b"a" * 100_000 + UNSEALED.encode() + b"z"
    with new_file(path) as file:
        file.write(data)
        seal_file(file)
    assert path.read_bytes() == seal(data)
    check_seal_file(path)
    path.write_bytes(b"")
    with pytest.raises(CorruptError, match="empty"):
        check_seal_file(path)


def test_a_missing_or_changed_json_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "space.json"
    with pytest.raises(CorruptError, match=r"space\.json: missing"):
        read_sealed_json(path)
    path.write_bytes(sealed_json({"n": 1}).replace(b'"n": 1', b'"n": 2'))
    with pytest.raises(
        CorruptError, match=r"space\.json: .*seal.*; .* --repair removes it, then encode\.run"
    ):
        read_sealed_json(path)


def test_a_corrupt_error_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(CorruptError(HERE, "what", "way out")))
    assert (error.path, error.what, error.way_out) == (HERE, "what", "way out")
    assert str(error) == "somewhere: what; way out"
