"""`int8` spaces of both row layouts: the first ones, without mean tokens, stay readable to the bit."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
import zarr
from safetensors import safe_open

from cache.export import __main__ as export
from cache.format import codec
from cache.format.checksums import read_sealed_json, sealed_json
from cache.format.spec import CONTAINERS
from cache.maintenance.checks import verify
from cache.merge import main as merge_main
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.space import Space
from cache.store.writer import ShardWriter
from model.quantize import unpack
from tests.support.spaces import key, make_space

TOKENS = 36
"""Enough for a mean token."""
LAYOUT = {"float32": "int8", "float16": "int8m"}
"""What of a space's features was packed -> how its int8 rows are laid out."""
FIRST_NAME = "toy-int8-dfdebf3c"
"""Of the space below, as the first version named it."""


def features(number: int) -> np.ndarray:
    """(36, 64) float16 of which most is the same in all tokens."""
    shared = 5 * np.random.default_rng(1000).standard_normal(64)
    return (shared + np.random.default_rng(number).standard_normal((TOKENS, 64))).astype(np.float16)


def first_row(x: np.ndarray) -> bytes:
    """A row as the first version packed it, by hand: codes, then scales."""
    h = np.ones((1, 1))
    while len(h) < 64:
        h = np.block([[h, h], [h, -h]])
    signs = np.unpackbits(np.frombuffer(bytes.fromhex("7783de06c5ca1b3e"), np.uint8)) * 2.0 - 1
    blocks = (x.astype(np.float64).reshape(-1, 64) * signs) @ h / 8
    scales = (np.abs(blocks).max(axis=1) / 127).astype("<f2")
    codes = np.rint(blocks / scales.astype(np.float64)[:, None]).clip(-127, 127).astype(np.int8)
    return codes.tobytes() + scales.tobytes()


def new_row(x: np.ndarray) -> bytes:
    """A row as it is packed now."""
    return codec.pack(x, "int8m").tobytes()


def unpacked(row: bytes) -> np.ndarray:
    """What a row of the first version has always stood for."""
    codes = np.frombuffer(row, np.int8, TOKENS * 64).reshape(TOKENS, 64).astype(np.float64)
    scales = np.frombuffer(row, "<f2", TOKENS, TOKENS * 64).astype(np.float64)
    values = codes @ codec.hadamard() * scales[:, None] / 8 * codec.rotation_signs()
    return values.astype(np.float16)


def fill(folder: Path, container: str, packed_from: str) -> tuple[Space, list[bytes]]:
    """A space of six images, and its rows. As the first version made it: `packed_from` is absent, and rows
    are packed without any code of ours."""
    space = make_space(folder, "int8", container, image_size=12, packed_from=packed_from)
    if packed_from == "float32":
        values = read_sealed_json(space.paths.space_json)
        del values["spec"]["packed_from"]
        space.paths.space_json.write_bytes(sealed_json(values))
        space = Space.open(space.paths)
    pack = first_row if packed_from == "float32" else new_row
    rows = [pack(features(number)) for number in range(6)]
    shard = ShardWriter(space, "image", 0)
    for number, row in enumerate(rows):
        if shard.full:
            shard.commit()
            shard = ShardWriter(space, "image", space.next_shard("image"))
        shard.append(key(number), "full", np.frombuffer(row, np.uint8), error=0.005)
    shard.commit()
    space.grow("image")
    return space, rows


def values_of(row: bytes, layout: str) -> np.ndarray:
    """What it stands for."""
    if layout == "int8":
        return unpacked(row)
    return codec.unpack(np.frombuffer(row, np.uint8), layout, TOKENS, 64)


@pytest.fixture(params=LAYOUT)
def packed_from(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=CONTAINERS)
def container(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_space_reads_and_verifies(tmp_path: Path, container: str, packed_from: str) -> None:
    space, rows = fill(tmp_path, container, packed_from)
    layout = LAYOUT[packed_from]
    assert (space.spec.codec, space.spec.layout) == ("int8", layout)
    assert len(rows[0]) == space.spec.row_bytes("image") == 36 * 66 + 128 * (layout == "int8m")
    reader = FeatureReader(space.paths)
    stored = np.empty((6, len(rows[0])), np.uint8)
    reader.read_into("image", np.arange(6), stored)
    assert stored.tobytes() == b"".join(rows)
    on_device = unpack(torch.from_numpy(stored), reader.spec.layout, TOKENS, 64).numpy()
    for number, row in enumerate(rows):
        expected = values_of(row, layout)
        np.testing.assert_array_equal(reader.read("image", key(number)), expected)
        np.testing.assert_array_equal(on_device[number], expected)
    report = verify(CacheRoot(tmp_path), deep=True)
    assert report.all_findings == []


def test_the_first_spaces_are_as_they_were(tmp_path: Path) -> None:
    """Name, recipe and what strangers unpack by, literally."""
    space, rows = fill(tmp_path, "zarr", "float32")
    assert space.paths.name == FIRST_NAME
    assert "packed_from" not in read_sealed_json(space.paths.space_json)["spec"]
    configuration = json.loads(space.paths.array_json("image").read_text())
    (sharding,) = configuration["codecs"]
    assert sharding["configuration"]["codecs"][0] == {
        "name": "nanomolmo2.row",
        "configuration": {"codec": "int8"},
    }
    # Packed by hand in float64, and by the codec in float32: the same codes but for ties.
    ours = codec.pack(features(0), "int8")
    assert (ours != np.frombuffer(rows[0], np.uint8)).mean() < 0.001


def test_zarr_opens_it(tmp_path: Path, packed_from: str) -> None:
    space, rows = fill(tmp_path, "zarr", packed_from)
    array = zarr.open_array(space.paths.array("image"), mode="r")
    for number, row in enumerate(rows):
        expected = values_of(row, LAYOUT[packed_from])
        np.testing.assert_array_equal(np.asarray(array[number]), expected)


def test_a_tar_says_how_to_unpack_it(tmp_path: Path, packed_from: str) -> None:
    space, rows = fill(tmp_path, "webdataset", packed_from)
    with tarfile.open(space.paths.shard("image", 0)) as tar:
        about = json.load(tar.extractfile(f"{key(0)}.full.json"))  # type: ignore[arg-type]
        member = tar.extractfile(f"{key(0)}.full.npy").read()  # type: ignore[union-attr]
    assert about["codec"] == LAYOUT[packed_from]
    row = np.load(io.BytesIO(member))
    assert row.tobytes() == rows[0]
    values = codec.unpack(row, about["codec"], about["tokens"], about["width"])
    np.testing.assert_array_equal(values, values_of(rows[0], LAYOUT[packed_from]))


def export_to(folder: Path, out: Path, *words: str) -> Path:
    export.main(["--features", str(folder), "--out", str(out), *words])
    return out


def test_exports_say_how_to_unpack_them(tmp_path: Path, container: str, packed_from: str) -> None:
    cache = tmp_path / "cache"
    _, rows = fill(cache, container, packed_from)
    layout = LAYOUT[packed_from]
    out = export_to(cache, tmp_path / "st", "--to", "safetensors")
    about = json.loads((out / "export.json").read_text())
    assert (about["codec"], about["stored_as"], about["spec"]["codec"]) == (layout, layout, "int8")
    with safe_open(out / "image-00000.safetensors", "numpy") as file:
        assert file.metadata()["codec"] == layout
        assert file.get_tensor(f"{key(3)}/full").tobytes() == rows[3]
    out = export_to(cache, tmp_path / "tars", "--to", "webdataset", "--unpack")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        tars = sorted(map(str, out.glob("*.tar")))
        samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
        gc.collect(1)
    for sample, row in zip(samples, rows, strict=True):
        np.testing.assert_array_equal(sample["full.npy"], values_of(row, layout))


def test_merged_rows_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: str, packed_from: str
) -> None:
    there, rows = fill(tmp_path / "there", container, packed_from)
    words = ["cache.merge", "--source", str(tmp_path / "there"), "--features", str(tmp_path / "b")]
    CacheRoot(tmp_path / "b").path.mkdir()
    monkeypatch.setattr(sys, "argv", words)
    merge_main()
    reader = FeatureReader(CacheRoot(tmp_path / "b").space(there.paths.name))
    found = reader.lookup("image", [key(number) for number in range(6)])
    stored = np.empty((6, len(rows[0])), np.uint8)
    reader.read_into("image", found, stored)
    assert hashlib.sha256(stored).digest() == hashlib.sha256(b"".join(rows)).digest()


def test_the_mean_token_is_what_the_new_layout_gains(tmp_path: Path) -> None:
    """On rows whose tokens share most of their energy the first layout is clearly worse."""
    errors: dict[str, list[float]] = {}
    for packed_from, layout in LAYOUT.items():
        space, _ = fill(tmp_path / layout, "zarr", packed_from)
        reader = FeatureReader(space.paths)
        for number in range(6):
            x = features(number).astype(np.float64)
            off = reader.read("image", key(number)).astype(np.float64) - x
            errors.setdefault(layout, []).append(float(np.linalg.norm(off) / np.linalg.norm(x)))
    assert max(errors["int8m"]) < 0.5 * min(errors["int8"])
    assert max(errors["int8m"]) <= 0.006
