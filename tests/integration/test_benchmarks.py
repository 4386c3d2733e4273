"""Benchmarks in small: every requirement is measured, and a store that is not installed is skipped.

python -m tests.benchmarks.store --rows 40 --rounds 3
"""

from __future__ import annotations

import json
import math
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.space import find_space
from model.language.model import load_tokenizer
from tests.benchmarks import loaders, store
from tests.benchmarks.bench import Requirements
from tests.benchmarks.encode import bound, peers
from tests.benchmarks.encode.jobs import Jobs, Photos, Speed
from tests.benchmarks.encode.photos import make_photos
from tests.benchmarks.peers import stores
from tests.benchmarks.scale import rows as scale
from tests.benchmarks.train import __main__ as train
from tests.benchmarks.train import break_even, models, ranks
from tests.gpu.worlds import World


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


@pytest.mark.slow
def test_the_training_benchmark_measures_every_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requirements = Requirements("train")
    train.measure(train.Options(small=True), tmp_path, requirements)
    out = capsys.readouterr().out.splitlines()
    table = [line for line in out if line.startswith("| 16 tokens, int8 |")]
    # Three places with one and two ranks at a pace, two without one, and bare reads.
    assert len(table) == 3 * (2 + 1) + 1
    assert [line.split(" | ")[1] for line in table[::3]] == ["warm", "remote", "cold", "cold"]
    assert sum(line.startswith(("| 5.6: ", "| 1: ")) for line in out) == 8
    assert sum(line.startswith("| 20 | ") for line in out) == 2
    assert requirements.total == (2 + 1 + 1) + 1 + 1 + 2 + 6 + 4
    same = [line for line in out if "losses of the ways" in line]
    assert len(same) == 2
    assert all(line.endswith("ok") for line in same), same
    assert not (tmp_path / "fed").exists(), "gigabytes were left"


@pytest.mark.slow
def test_the_encode_benchmark_measures_jobs_beside_their_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = make_photos(tmp_path / "photos", 12, largest=420)
    assert len({path.read_bytes() for path in paths}) == 12
    photos = Photos.of(tmp_path / "jobs", paths, 4, 12)
    encoder = bound.load_encoder(bound.CHEAP, device="cpu")
    jobs = Jobs(tmp_path / "cheap", bound.CHEAP, encoder)

    def inline() -> Speed:
        return photos.measure(
            lambda name: jobs.run(
                photos.folder / name, 4 if name == "short" else 12, "--workers", "0"
            )
        )

    found = bound.measure_rounds("cheap", encoder, photos, {"inline": inline}, rounds=1, batches=1)
    assert math.isfinite(found.share("inline"))  # eight images more can take less time than four
    assert min(found.encode_s + found.decode_s + found.store_s) > 0
    with pytest.raises(SystemExit, match="encoded=4 "):
        jobs.run(photos.folder / "short", 5, "--workers", "0")
    capsys.readouterr()
    monkeypatch.setattr(peers, "PEERS", {"clip_retrieval": "clip-retrieval"})
    found_here = peers.available(photos, bound.CHEAP)
    missing = "clip-retrieval: not installed (No module named 'clip_retrieval')\n"
    assert capsys.readouterr().out == ("" if found_here else missing)


def test_ours_and_a_peer_take_turns_to_be_first() -> None:
    order: list[str] = []

    def work(name: str, *seconds: float) -> Callable[[], Speed]:
        left = iter(seconds)

        def measure() -> Speed:
            order.append(name)
            return Speed(image_s=next(left), start_s=0.0)

        return measure

    pair = bound.Pair(work("ours", 1.0, 2.0), work("theirs", 1.5, 4.0))
    assert [pair.measure().image_s for _ in range(2)] == [1.5, 4.0]
    assert order == ["ours", "theirs", "theirs", "ours"]
    assert pair.ratios == [1.5, 2.0]


def test_a_peer_encodes_a_batch_before_it_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = Photos.of(tmp_path / "jobs", make_photos(tmp_path / "photos", 12, largest=420), 9, 12)
    jobs: list[dict[str, Any]] = []

    def run(peer: str, job: str) -> subprocess.CompletedProcess[str]:
        jobs.append(json.loads(job))
        took = json.dumps({"first": 11.0, "short": 10.0, "long": 13.0})
        return subprocess.CompletedProcess([peer], 0, f"a library's own line\n{took}\n", "")

    monkeypatch.setattr(peers, "_run", run)
    speed = peers.measure("dataloader", photos, bound.CHEAP)
    assert speed == Speed(image_s=1.0, start_s=3.0)  # of 11 s, eight images took one each
    assert [len(jobs[0][name]) for name in ("first", "short", "long")] == [8, 9, 12]
    assert jobs[0]["first"] == jobs[0]["short"][:8]


class SlowReader(FeatureReader):
    """A reader that takes 20 ms longer for the rows of a micro-batch."""

    def read_into(self, *given: Any) -> None:
        time.sleep(0.02)
        super().read_into(*given)


def test_a_device_waits_for_a_slow_reader_only(tmp_path: Path) -> None:
    world = World.make(tmp_path, models.SMALL.fed_spec, "image", 60)
    schedule, _ = world.schedule(load_tokenizer(models.TOKENIZER), models.SMALL.window)
    space = find_space(world.root, None)
    feed = ranks.Feed(
        schedule=schedule,
        open_reader=partial(SlowReader, space),
        ranks=1,
        rate=60,
        window=models.SMALL.window,
        threads=1,
        ahead=2,
        seconds=60.0,
        steps=10,
    )
    each = schedule.samples_per_step
    paced = ranks.load(feed, 0, lambda: None)
    assert paced.images == 7 * each  # of 10 steps, two read ahead; the last one ends the time
    assert paced.wall_s >= 0.98 * 7 * each / 60 > paced.wait_s * 2
    assert 0 <= paced.idle < 0.5
    fast = ranks.load(replace(feed, rate=60_000), 0, lambda: None)
    assert fast.wall_s >= 7 * 0.02
    assert fast.waits > 0.5
    assert fast.idle > 0.9


def test_when_a_cache_has_paid() -> None:
    assert break_even.experiments_until(2.0, cached_s=1.0, live_s=2.0) == 2.0
    assert break_even.experiments_until(2.0, cached_s=1.0, live_s=1.0) == math.inf
    lines = break_even.table(0.36, 0.036, {"live": 0.36}, 610_304)
    assert lines[2] == "| 1 | 11.00 | 10.00 | 0.91 | 61, once |"
    assert lines[-1] == "| 20 | 30.00 | 200.00 | 6.67 | 61, once |"
