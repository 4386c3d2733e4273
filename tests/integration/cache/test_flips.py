"""Any flipped bit is found and never returned as good; repair and encode restore the same content.

python -m cache.verify --deep --repair
python -m encode.run --dataset NAME
"""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from cache.errors import CorruptError
from cache.format.space_info import new_info
from cache.format.spec import ARRAYS
from cache.maintenance.checks import verify
from cache.maintenance.repair import Repair, Repaired
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.space import Space
from tests.support.encode_jobs import CONFIG, Result, draw, encode
from tests.support.faults import flip
from tests.support.videos import make_video

SEED = 4
SLOTS = 4
"""Rows of a full shard."""
EACH = 10
"""Flips that one copy of the cache goes through, one after the other."""


@dataclass(frozen=True)
class World:
    """A cache of ten images and two videos, made by an encode job, in shards of four rows."""

    root: CacheRoot
    media: str
    config = replace(CONFIG, commit_every_s=60.0)

    @property
    def logical_hash(self) -> str:
        return self.reader.logical_hash()

    @property
    def reader(self) -> FeatureReader:
        return FeatureReader(self.root.space(self.root.space_names()[0]))

    def encode(self) -> Result:
        with contextlib.redirect_stdout(io.StringIO()):  # a thousand plans
            return encode(self.root.path, self.media, config=self.config)

    def repair(self) -> Repaired:
        repair = Repair(self.root, deep=True, tell=lambda _: None, progress=lambda _: None)
        report = repair.run(None)
        if self.root.space_names():
            assert not report.broken, report.all_findings
        return repair.done

    def copy(self, folder: Path) -> World:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.root.path, folder)
        return replace(self, root=CacheRoot(folder))

    def rows(self) -> dict[tuple[str, str, str], bytes]:
        """(array, key, view) -> stored bytes, of all rows that a checked read returns."""
        try:
            reader = self.reader
        except CorruptError:
            return {}
        found = {}
        for kind in ARRAYS:
            index = reader.index[kind]
            out = np.empty((1, reader.spec.row_bytes(kind)), np.uint8)
            for position in range(index.stored):
                try:
                    reader.read_into(kind, index.rows(np.array([position])), out)
                except CorruptError:
                    continue
                found[(kind, *index.identity(position))] = out.tobytes()
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    images = tmp_path_factory.mktemp("media") / "images"
    draw(images, 10)
    for number in range(2):
        make_video(images / f"video-{number}.mp4", frames=5 + number, size=(32, 32))
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        made = World(CacheRoot(Path(folder) / "cache"), f"folder:{images}")
        first = made.encode()
        spec, load = first.job.spec, first.reader.load
        shutil.rmtree(made.root.spaces_dir)  # again, in smaller shards
        space = Space.create(made.root, spec, load, shard_bytes=SLOTS * spec.row_bytes("image"))
        assert space.info == new_info(spec, load, 4 * spec.row_bytes("image"))
        made.encode()
        yield made


def pick(root: CacheRoot, dice: random.Random) -> tuple[Path, int]:
    """A bit of a file, of each kind of file as often, though shards have most of the bytes."""
    files: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(root.path.rglob("*")):
        if path.is_file() and not {"damaged", "locks"} & {*path.relative_to(root.path).parts}:
            files[path.suffix].append(path)
    path = dice.choice(files[dice.choice(["", *sorted(files)])])
    return path, dice.randrange(8 * path.stat().st_size)


@pytest.mark.soak_counted
def test_flips_are_found_never_returned_and_repaired(
    world: World, soak: Callable[[int, int], int]
) -> None:
    dice = random.Random(SEED)
    clean, rows = world.logical_hash, world.rows()
    assert len(rows) > 14
    flips, redone = Counter[str](), Counter[str]()
    count = soak(40, 1000)
    for number in range(count):
        if number % EACH == 0:
            here = world.copy(world.root.path.with_name("copy"))
        path, bit = pick(here.root, dice)
        what = path.suffix or "shard"
        flips[what] += 1
        before = here.rows()
        assert before == rows
        flip(path, bit)
        report = verify(here.root, deep=True)
        broken = [finding.path for finding in report.all_findings if finding.broken]
        assert broken == [str(path)], f"bit {bit} of {path}"
        returned = here.rows()
        assert returned.items() <= rows.items(), f"bit {bit} of {path} was returned as good"
        done = here.repair()
        if here.root.space_names():
            after = verify(here.root, deep=True)
            assert after.all_findings == [], f"bit {bit} of {path}"
            left = here.rows()
        else:
            assert path.name == "space.json", "set aside; the encode job writes it again"
            left = rows
        assert left.items() <= rows.items()
        if path.parent.name == "commits":
            assert len(left) >= len(rows) - SLOTS, "whose rows they were is lost with the commit"
        else:
            assert len(left) >= len(rows) - 1, "one flip costs one row at most"
            assert sum(done.lost.values()) == len(rows) - len(left)
        result = here.encode()
        redone[what] += result.job._tracker.encoded
        assert result.job._tracker.encoded == len({key for _, key, _ in rows.keys() - left.keys()})
        assert here.logical_hash == clean, f"bit {bit} of {path}"
    print(f"{count} flips: {dict(flips)}; media encoded again: {dict(redone)}")
    assert set(flips) >= {"shard", ".parquet", ".json"}
