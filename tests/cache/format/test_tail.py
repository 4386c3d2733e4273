"""The file of a tail is safetensors with one possible header; everything else is refused before it is used.

data = file_bytes(tail, arrays, width)
arrays = read_tail(path, root, tail, width)
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from cache.errors import CorruptError
from cache.format.spec import FeatureSpec
from cache.format.tail import MAX_TAIL_BYTES, Tail, file_bytes, file_sha256, read_tail
from tests.support.faults import in_time
from tests.support.spaces import SPEC, TAIL, tail_arrays, tail_of

WIDTH = SPEC.width


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Tail]:
    tail, data = tail_of()
    (tmp_path / "tail.safetensors").write_bytes(data)
    return tmp_path / "tail.safetensors", tail


def read(path: Path, tail: Tail) -> dict[str, Any]:
    return read_tail(path, path.parent, tail, WIDTH)


def test_any_reader_of_safetensors_reads_the_file(written: tuple[Path, Tail]) -> None:
    path, tail = written
    theirs, ours = safetensors.numpy.load(path.read_bytes()), read(path, tail)
    assert theirs.keys() == ours.keys() == tail_arrays().keys()
    for name, value in tail_arrays().items():
        np.testing.assert_array_equal(theirs[name], value)
        np.testing.assert_array_equal(ours[name], value)
    assert len(path.read_bytes()) - tail.nbytes(WIDTH) < 4096, "the rest is the header"
    assert file_bytes(tail, tail_arrays(), WIDTH) == path.read_bytes()


def test_every_flipped_bit_is_noticed(written: tuple[Path, Tail]) -> None:
    path, tail = written
    data = bytearray(path.read_bytes())
    for at in (0, 7, 9, 200, 1500, len(data) // 2, len(data) - 1):
        data[at] ^= 4
        path.write_bytes(data)
        with pytest.raises(CorruptError, match=r"its sha256 is not that in space\.json"):
            read(path, tail)
        data[at] ^= 4
    path.write_bytes(data)
    read(path, tail)


def test_another_size_is_refused_before_the_file_is_read(written: tuple[Path, Tail]) -> None:
    path, tail = written
    data = path.read_bytes()
    for changed in (data[:-1], b"", data[:8]):
        path.write_bytes(changed)
        with pytest.raises(CorruptError, match=f"{len(changed):,} bytes, not {len(data):,}"):
            read(path, tail)
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    with in_time(memory=1 << 27), pytest.raises(CorruptError, match=f"at most {len(data):,} are"):
        read(path, tail)
    path.unlink()
    with pytest.raises(CorruptError, match=r"missing; python -m cache\.verify"):
        read(path, tail)
    path.symlink_to(path.with_name("elsewhere"))
    with pytest.raises(CorruptError, match="a link, refused"):
        read(path, tail)


def sealed(path: Path, tail: Tail, data: bytes) -> Tail:
    """Write what a stranger would: other bytes, and their hash in space.json."""
    path.write_bytes(data)
    return dataclasses.replace(tail, sha256=file_sha256(data))


def test_a_strangers_file_has_the_tensors_that_space_json_states(
    written: tuple[Path, Tail],
) -> None:
    path, tail = written
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    for change in (
        lambda h: h[names[0]].update(dtype="I32"),
        lambda h: h[names[0]].update(shape=[32, 2]),
        lambda h: h[names[0]].update(data_offsets=[0, 1 << 60]),
        lambda h: h.update({"other": h.pop(names[0])}),
        lambda h: h.pop("__metadata__"),
        lambda h: h["__metadata__"].update(tail="{}"),
    ):
        other = json.loads(json.dumps(header))
        change(other)
        text = json.dumps(other, separators=(",", ":")).encode()[:size].ljust(size)
        with pytest.raises(CorruptError, match="its header describes other tensors"):
            read(path, sealed(path, tail, data[:8] + text + data[8 + size :]))
    for value in (np.nan, np.inf, -np.inf):
        arrays = tail_arrays()
        arrays["blocks.2.up.bias"][3] = value
        with pytest.raises(CorruptError, match="has values that are not finite"):
            read(path, sealed(path, tail, file_bytes(tail, arrays, WIDTH)))


# ---- what space.json says


def spec_with(**changes: Any) -> dict[str, Any]:
    """The JSON of a spec with a tail, of which some values are others."""
    spec = dataclasses.replace(SPEC, pool_frame=1, tail=TAIL)
    values = json.loads(json.dumps(spec.to_json()))
    values["tail"] |= changes
    return values


def test_a_tail_is_no_part_of_the_fingerprint() -> None:
    plain = dataclasses.replace(SPEC, pool_frame=1)
    spec = dataclasses.replace(plain, tail=TAIL)
    assert spec.fingerprint == plain.fingerprint
    assert spec.name == plain.name
    assert "tail" not in plain.to_json()
    assert FeatureSpec.from_json(spec_with()) == spec
    assert plain.seen is plain


def test_the_connector_gets_pooled_patches_without_cls() -> None:
    spec = dataclasses.replace(SPEC, pool_frame=1, keep_cls=True, tail=TAIL)
    assert (spec.tokens("image"), spec.tokens("frame"), spec.width) == (5, 5, 64)
    assert (spec.seen.tokens("image"), spec.seen.tokens("frame")) == (4, 1)
    assert (spec.seen.blocks, spec.seen.width, spec.seen.tail) == ((2, 1), 128, None)


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"first": 2}, "begins with block 2, and stored are"),
    ({"first": 0}, ">= 0"),
    ({"blocks": []}, "length >= 1"),
    ({"blocks": [0]}, "are not behind the stored one"),
    ({"blocks": [2, 2]}, "each once"),
    ({"blocks": [9999]}, "each once, at most 64 in all"),
    ({"blocks": [2.5]}, "Expected `int`"),
    ({"heads": 7}, "7 heads do not divide the width 64"),
    ({"heads": 0}, ">= 1"),
    ({"hidden": 1 << 20, "blocks": [60]}, f"more than {MAX_TAIL_BYTES:,} bytes"),
    ({"hidden": 1 << 60}, "<= 1048576"),
    ({"hidden": "256"}, "Expected `int`"),
    ({"eps": 0}, "> 0"),
    ({"eps": "small"}, "Expected `float`"),
    ({"pool_frame": 3}, "pool_frame 3 does not divide the grid of 2 x 2 patches"),
    ({"pool_image": -1}, ">= 1"),
    ({"sha256": "../../etc"}, "sha256"),
    ({"sha256": "0" * 63}, "sha256"),
    ({"shiny": 1}, "unknown keys shiny: written by a newer version"),
]


@pytest.mark.parametrize(("changes", "why"), HOSTILE, ids=lambda value: str(value)[:40])
def test_what_a_stranger_states_is_checked(changes: dict[str, Any], why: str) -> None:
    if changes.get("first") == 0:
        why = "begins with block 0"
    with in_time(memory=1 << 27), pytest.raises(ValueError) as caught:
        FeatureSpec.from_json(spec_with(**changes))
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"blocks": [0, 1]}, "begins with block 1, and stored are [0, 1]"),
        ({"pool_image": 2}, "tail with pooled rows"),
        ({"activation": "swiglu"}, "activation swiglu is none of quick_gelu, gelu, gelu_tanh"),
        ({"tail": 3}, "Expected `object | null`"),
        ({"tail": {}}, "missing required field `first`"),
    ],
)
def test_rows_and_tail_belong_together(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError) as caught:
        FeatureSpec.from_json(spec_with() | changes)
    assert why in str(caught.value)
