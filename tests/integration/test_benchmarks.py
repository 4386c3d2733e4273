"""Benchmarks in small: every requirement is measured, and a store that is not installed is skipped.

python -m tests.benchmarks.store --rows 40 --rounds 3
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cache.store.paths import CacheRoot
from tests.benchmarks import loaders, scale, store
from tests.benchmarks.bench import Requirements
from tests.benchmarks.peers import stores


class Missing(stores.Store):
    """A store whose library is not installed."""

    name = "missing"

    def write(self, *_: object) -> None:
        raise ImportError("No module named 'missing'\nand a second line")


@pytest.mark.slow
def test_the_store_benchmark_measures_every_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store, "PEERS", (Missing, stores.ZarrPython, stores.SafeTensors))
    monkeypatch.setattr(
        store, "SHAPES", {"fp16": (16, 64), "int8": (16, 33), "int4": (16, 17), "frames": (4, 64)}
    )
    options = store.Options(rows=34, rounds=3, folder=tmp_path)
    figures, peers = store.measure(options, tmp_path)
    assert "missing: skipped: No module named 'missing'" in capsys.readouterr().out.splitlines()
    assert [peer.name for peer in peers] == ["zarr-python", "safetensors"]
    lines = store.requirements(figures, peers)
    assert len(lines) == 4 * (5 * 2 + 1) + 2 * 6
    assert all(math.isfinite(value) and value > 0 for _, value, _ in lines)
    text = store.tables(figures)
    assert text.count("| ours, checked |") == 4
    assert text.count("–") == 4 * (5 + 5), "five readers do not write, and `ours` only writes"
    assert list(tmp_path.iterdir()) == []


def test_every_store_returns_the_bytes_written(tmp_path: Path) -> None:
    """The stores whose libraries the product installs."""
    shape = (16, 64)
    row = store.make_rows(shape)
    ours = stores.Ours(tmp_path / "ours", shape)
    ours.prepare()
    ours.write(row, 40)
    ours.space.grow("image")
    safe = stores.SafeTensors(tmp_path / "safe", shape)
    safe.prepare()
    safe.write(row, 40)
    readers = [stores.Raw(ours.folder, shape, threads=2), ours, safe]
    rows = store.np.random.default_rng(0).permutation(40)[:32]
    for reader in [*readers, stores.ZarrPython(ours.folder, shape)]:
        reader.open()
        for read in (reader.singles, reader.batches):
            reader.out[:] = 0
            read(rows)
            assert all((reader.out[i] == row(n)).all() for i, n in enumerate(rows)), reader.name


def test_the_scale_benchmark_finds_its_keys(tmp_path: Path) -> None:
    root, rows = CacheRoot(tmp_path), 66 * scale.ROWS_A_SHARD
    scale.build(root, rows)
    rebuilt = scale.open_space(root, rows)
    assert scale.save(root, rows)["bytes"] < 54, "bytes a row"
    assert scale.open_space(root, rows).keys() == rebuilt.keys()
    scale.add(root, rows)
    assert scale.open_space(root, rows)["seconds"] > 0
    assert scale.schedule(root, 1000)["random_seconds"] > 0


@pytest.mark.slow
def test_the_loaders_benchmark_measures_ours_and_skips_what_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = replace(loaders.CLIP, image_size=56, pool_frame=1, width=64)  # 16 tokens
    monkeypatch.setattr(loaders, "CLIP", small)
    monkeypatch.setattr(loaders.peers.Lance, "module", "no_such_library")
    monkeypatch.setattr(loaders, "PEERS", (loaders.peers.Lance,))
    requirements = Requirements("loaders")
    options = loaders.Options(rows=70, rounds=2, batches=4, workers=1, folder=tmp_path)
    loaders.measure(options, tmp_path, requirements)
    out = capsys.readouterr().out
    assert "Lance: skipped: no_such_library is not installed" in out.splitlines()
    assert requirements.total == 2
    assert out.count(" samples/s ") == 3


def test_the_loaders_benchmark_gives_each_library_the_same_batches(tmp_path: Path) -> None:
    """Ours; the others are in the `[bench]` extra."""
    pytest.importorskip("datasets")
    options = loaders.Options(rows=66)
    made = loaders.make_peer(loaders.peers.HuggingFace, tmp_path, options)
    codes, conversations = made.__getitems__([5, 0])
    np.testing.assert_array_equal(codes[0].numpy(), loaders.row_of(5))
    assert conversations[1][0]["content"] == loaders.text_of(0)[0]
