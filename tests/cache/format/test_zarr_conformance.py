"""zarr-python reads our arrays, also where the working directory has another package `cache`.

zarr.open_array(space.paths.array("image"), mode="r")[row]          # (tokens, width) float16
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from cache.format.codec import CODECS
from cache.format.zarr import codec as zarr_codec
from cache.format.zarr import shard as zarr_shard
from cache.store.reader import FeatureReader
from cache.store.space import Space
from cache.store.writer import ShardWriter
from tests.support.spaces import SLOTS, features, fill, key, make_space


@pytest.fixture(params=CODECS)
def space(request: pytest.FixtureRequest, tmp_path: Path) -> Space:
    """Return a space with a full shard, an uncommitted one and one of two rows; and one frame.

    The rows of images have 36 tokens, so int8 and int4 store a mean token.
    """
    space = make_space(tmp_path, request.param, image_size=12)
    fill(space, range(SLOTS))
    ShardWriter(space, "image", 1)
    fill(space, [5, 4])
    fill(space, [7], array="frame")
    space.grow("image")
    space.grow("frame")
    return space


ERRORS = {"fp16": 5e-4, "int8": 8e-3, "int4": 0.1}
"""Largest relative error of a row of normal values."""

ROWS = {0: 0, 1: 1, 2: 2, 3: 3, 5: 8, 4: 9}


def test_zarr_and_our_reader_read_equal_values(space: Space) -> None:
    reader = FeatureReader(space.paths)
    group = zarr.open_group(space.paths.root / "features", mode="r")
    images, frames = group["image"], group["frame"]
    assert isinstance(images, zarr.Array)
    assert isinstance(frames, zarr.Array)
    assert (images.shape, images.dtype) == ((3 * SLOTS, 36, 64), np.float16)
    assert images.metadata.dimension_names == ("row", "token", "channel")
    for number, row in ROWS.items():
        ours = reader.read("image", key(number))
        np.testing.assert_array_equal(images[row], ours)
        exact = features(number, spec=space.spec)
        error = np.linalg.norm(ours.astype(np.float32) - exact)
        assert error <= ERRORS[space.spec.codec] * np.linalg.norm(exact)
    np.testing.assert_array_equal(frames[0], reader.read("frame", key(7)))
    missing = sorted(set(range(3 * SLOTS)) - set(ROWS.values()))
    whole = np.asarray(images[:])
    assert np.isnan(whole[missing]).all()
    assert np.isfinite(whole[sorted(ROWS.values())]).all()


def test_zarr_detects_a_flipped_bit(space: Space) -> None:
    path = space.paths.shard("image", 0)
    data = bytearray(path.read_bytes())
    for at in (5, len(data) - 7):  # a row; the index
        data[at] ^= 1
        path.write_bytes(data)
        data[at] ^= 1
        images = zarr.open_array(space.paths.array("image"), mode="r")
        with pytest.raises(ValueError, match="checksum"):
            images[0]


def test_zarr_writes_equal_bytes(space: Space, tmp_path: Path) -> None:
    """zarr-python writes the array from our zarr.json."""
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "zarr.json").write_bytes(space.paths.array_json("image").read_bytes())
    array = zarr.open_array(copy, mode="r+")
    values = [features(number, spec=space.spec) for number in range(SLOTS)]
    array[:SLOTS] = np.stack(values).astype(np.float16)
    theirs = (copy / "c" / "0" / "0" / "0").read_bytes()
    ours = space.paths.shard("image", 0).read_bytes()
    assert len(theirs) == len(ours)
    if space.spec.codec == "fp16":
        assert theirs == ours
    else:  # zarr gets the values as float16, so codes may differ by one step
        index = space.info.geometry("image").tail_bytes
        assert theirs[-index:] == ours[-index:]


STRANGER = """
import sys, numpy, zarr
assert "cache" not in sys.modules
import cache
assert cache.MINE
array = zarr.open_array(sys.argv[1], mode="r")
numpy.save("values.npy", numpy.asarray(array[:]))
"""


def test_zarr_reads_them_beside_another_package_cache(space: Space, tmp_path: Path) -> None:
    folder = tmp_path / "stranger"
    (folder / "cache").mkdir(parents=True)
    (folder / "cache" / "__init__.py").write_text("MINE = True\n")
    (folder / "read.py").write_text(STRANGER)
    command = [sys.executable, "read.py", str(space.paths.array("image"))]
    subprocess.run(command, cwd=folder, check=True)
    values = np.load(folder / "values.npy")
    reader = FeatureReader(space.paths)
    for number, row in ROWS.items():
        np.testing.assert_array_equal(values[row], reader.read("image", key(number)))


def test_the_codec_name_is_the_same_in_both_modules() -> None:
    assert zarr_shard.ROW_CODEC == zarr_codec.NAME
