"""A row with a mean token has the same bytes, and the same values, in every format.

codec.unpack(row, "int8", tokens, width)
"""

from __future__ import annotations

import gc
import io
import json
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
from cache.format.spec import CONTAINERS
from cache.maintenance.checks import verify
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.space import Space
from cache.store.writer import ShardWriter
from model.quantize import unpack
from tests.support.spaces import key, make_space

TOKENS = 36
"""Enough for a mean token."""


def features(number: int) -> np.ndarray:
    """(36, 64) float16, mostly the same in all tokens."""
    shared = 5 * np.random.default_rng(1000).standard_normal(64)
    return (shared + np.random.default_rng(number).standard_normal((TOKENS, 64))).astype(np.float16)


def fill(folder: Path, container: str) -> tuple[Space, np.ndarray]:
    """A space of six images, and its rows (6, row_bytes)."""
    space = make_space(folder, "int8", container, image_size=12)
    rows = codec.pack(np.stack([features(number) for number in range(6)]), "int8")
    shard = ShardWriter(space, "image", 0)
    for number, row in enumerate(rows):
        if shard.full:
            shard.commit()
            shard = ShardWriter(space, "image", space.next_shard("image"))
        shard.append(key(number), "full", row, error=0.005)
    shard.commit()
    space.grow("image")
    return space, rows


@pytest.fixture(params=CONTAINERS)
def container(request: pytest.FixtureRequest) -> str:
    return request.param


def test_it_is_read_and_verified(tmp_path: Path, container: str) -> None:
    space, rows = fill(tmp_path, container)
    assert rows.shape[1] == space.spec.row_bytes("image") == 36 * 66 + 128
    reader = FeatureReader(space.paths)
    stored = np.empty_like(rows)
    reader.read_into("image", np.arange(6), stored)
    np.testing.assert_array_equal(stored, rows)
    on_device = unpack(torch.from_numpy(stored), "int8", TOKENS, 64).numpy()
    for number, row in enumerate(rows):
        expected = codec.unpack(row, "int8", TOKENS, 64)
        np.testing.assert_array_equal(reader.read("image", key(number)), expected)
        np.testing.assert_array_equal(on_device[number], expected)
    assert verify(CacheRoot(tmp_path), deep=True).all_findings == []


def test_zarr_python_reads_it(tmp_path: Path) -> None:
    space, rows = fill(tmp_path, "zarr")
    described = json.loads(space.paths.array_json("image").read_text())
    assert described["codecs"][0]["configuration"]["codecs"][0] == {
        "name": "nanomolmo2.row",
        "configuration": {"codec": "int8"},
    }
    array = zarr.open_array(space.paths.array("image"), mode="r")
    for number, row in enumerate(rows):
        expected = codec.unpack(row, "int8", TOKENS, 64)
        np.testing.assert_array_equal(np.asarray(array[number]), expected)


def test_a_tar_member_states_how_to_unpack_it(tmp_path: Path) -> None:
    space, rows = fill(tmp_path, "webdataset")
    with tarfile.open(space.paths.shard("image", 0)) as tar:
        about = json.load(tar.extractfile(f"{key(0)}.full.json"))  # type: ignore[arg-type]
        member = tar.extractfile(f"{key(0)}.full.npy").read()  # type: ignore[union-attr]
    assert (about["codec"], about["tokens"], about["width"]) == ("int8", TOKENS, 64)
    np.testing.assert_array_equal(np.load(io.BytesIO(member)), rows[0])


def test_exports_state_how_to_unpack_it(tmp_path: Path, container: str) -> None:
    def export_to(out: Path, *words: str) -> Path:
        export.main(["--features", str(tmp_path / "cache"), "--out", str(out), *words])
        return out

    _, rows = fill(tmp_path / "cache", container)
    out = export_to(tmp_path / "st", "--to", "safetensors")
    about = json.loads((out / "export.json").read_text())
    assert (about["codec"], about["stored_as"], about["spec"]["codec"]) == ("int8",) * 3
    with safe_open(out / "image-00000.safetensors", "numpy") as file:
        assert file.metadata()["codec"] == "int8"
        np.testing.assert_array_equal(file.get_tensor(f"{key(3)}/full"), rows[3])
    out = export_to(tmp_path / "tars", "--to", "webdataset", "--unpack")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        tars = sorted(map(str, out.glob("*.tar")))
        samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
        gc.collect(1)
    for sample, row in zip(samples, rows, strict=True):
        expected = codec.unpack(row, "int8", TOKENS, 64)
        np.testing.assert_array_equal(sample["full.npy"], expected)
