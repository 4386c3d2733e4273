"""`cache.verify --repair` removes damage and keeps the rest; the next encode run recreates the difference.

python -m cache.verify --deep --repair
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.errors import CorruptError, InUseError
from cache.format import codec
from cache.format.checksums import read_sealed_json, sealed_json
from cache.format.codec import CODECS
from cache.maintenance.checks import verify
from cache.maintenance.compaction import rewrite_shards
from cache.maintenance.repair import Repair, Repaired
from cache.maintenance.row_checks import Finite, outliers
from cache.store import index_file
from cache.store.commits import read_commits
from cache.store.ledger import MediaRecord, append_media
from cache.store.locks import DriverLock
from cache.store.paths import CacheRoot, SpacePaths
from cache.store.reader import FeatureReader
from cache.store.samples import Origin, Sample, write_samples
from cache.store.space import Space
from cache.store.writer import ShardWriter
from cache.verify import main
from tests.support.encode_jobs import CONFIG, draw, encode
from tests.support.faults import flip, garble
from tests.support.spaces import SPEC, fill, key, make_space, row

pytestmark = pytest.mark.slow


@pytest.fixture
def root(tmp_path: Path) -> CacheRoot:
    """Images 0-3, 4-6 and 7-8 in three shards, frames of 0-2; samples and media."""
    root = CacheRoot(tmp_path / "cache")
    space = make_space(root.path)
    for numbers in ([0, 1, 2, 3], [4, 5, 6], [7, 8]):
        fill(space, numbers)
    fill(space, [0, 1, 2], array="frame", view="t:0")
    space.grow("image")
    space.grow("frame")
    write_samples(root, "toy", [])
    append_media(root, [MediaRecord(source=str(n), key=key(n)) for n in range(9)], "job")
    return root


def only_space(root: CacheRoot) -> SpacePaths:
    return root.space(root.space_names()[0])


def new_repair(root: CacheRoot, said: list[str]) -> Repair:
    return Repair(root, deep=True, tell=said.append, progress=lambda _: None)


def repair(root: CacheRoot) -> tuple[Repaired, list[str]]:
    """Repair, and be sure that nothing is broken any more."""
    said: list[str] = []
    job = new_repair(root, said)
    assert not job.run(None).broken
    assert verify(root, deep=True).all_findings == []
    return job.done, said


def images(root: CacheRoot) -> set[int]:
    space = Space.open(only_space(root))
    return {n for n in range(20) if (key(n), "full") in space.keys("image")}


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and "locks" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_damaged_index_file_is_written_again_and_costs_no_row(
    root: CacheRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_file, "WORTH_COMMITS", 1)
    space = Space.open(only_space(root))
    index_file.save_index(space.paths, space.info)
    path, hash_before = space.paths.index("image"), FeatureReader(space.paths).logical_hash()
    for bit in np.random.default_rng(0).integers(0, 8 * path.stat().st_size, 12).tolist():
        flip(path, bit)
        (finding,) = verify(root, deep=True).all_findings
        assert (finding.path, finding.broken) == (str(path), True)
        done, said = repair(root)
        assert (done.steps, len(said)) == (1, 1)
        assert FeatureReader(space.paths).logical_hash() == hash_before


def test_an_intact_cache_is_not_changed(root: CacheRoot) -> None:
    before = contents(root.path)
    done, said = repair(root)
    assert (done.steps, said) == (0, [])
    assert contents(root.path) == before


@pytest.mark.parametrize(
    ("hurt", "lost"),
    [
        (lambda path: garble(path, 268 * 2 + 5), {6}),
        (lambda path: garble(path, 268 - 10), {4, 5}),  # across two rows
        (lambda path: garble(path, 265, 2), set()),  # the crc beside a row: the row is intact
        (lambda path: garble(path, path.stat().st_size - 30), set()),  # the index
        (lambda path: path.write_bytes(path.read_bytes()[: 268 + 100]), {5, 6}),  # cut short
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), set()),
        (lambda path: path.write_bytes(b""), {4, 5, 6}),
        (lambda path: path.unlink(), {4, 5, 6}),
    ],
)
def test_the_intact_rows_of_a_damaged_shard_are_kept(
    root: CacheRoot, hurt: Any, lost: set[int]
) -> None:
    paths = only_space(root)
    shard = paths.shard("image", 1)
    hurt(shard)
    damaged = shard.read_bytes() if shard.exists() else None
    others = {n: paths.shard("image", n).read_bytes() for n in (0, 2)}
    done, said = repair(root)
    assert images(root) == set(range(9)) - lost
    assert len(said) == done.steps
    assert f"its {3 - len(lost)} intact rows" in said[0] or len(lost) == 3
    assert (done.kept["image"], done.lost["image"]) == (3 - len(lost), len(lost))
    assert others == {n: paths.shard("image", n).read_bytes() for n in others}
    reader = FeatureReader(paths)
    for number in set(range(9)) - lost:
        reader.read("image", key(number))
    aside = root.damaged_dir / shard.relative_to(root.path)
    assert (aside.read_bytes() if aside.exists() else None) == damaged, "set aside, not deleted"
    assert not shard.exists()


def test_a_damaged_commit_is_set_aside_with_its_shard(root: CacheRoot) -> None:
    paths = only_space(root)
    garble(paths.commit("image", 0), 60)
    done, said = repair(root)
    assert images(root) == set(range(4, 9))
    assert done.spaces == {paths.name}
    assert "rows are unknown without it" in said[0]
    for path in (paths.commit("image", 0), paths.shard("image", 0)):
        assert (root.damaged_dir / path.relative_to(root.path)).exists()


def test_space_json_gets_the_rows_per_shard_of_the_commits(root: CacheRoot) -> None:
    """With a wrong number, every commit would look damaged."""
    paths = only_space(root)
    data = paths.space_json.read_bytes()
    wrong = data.replace(b'"image": 4', b'"image": 6', 1)
    assert wrong != data
    paths.space_json.write_bytes(wrong)
    repair(root)
    assert paths.space_json.read_bytes() == data
    assert images(root) == set(range(9))


def test_space_json_is_rebuilt_if_the_commits_prove_its_spec(root: CacheRoot) -> None:
    paths = only_space(root)
    data = paths.space_json.read_bytes()
    seal = data.rindex(b"sha256:")
    garble(paths.space_json, seal + 10)  # the spec is intact, as the commits' fingerprint shows
    _, said = repair(root)
    assert "has the commits' fingerprint" in said[0]
    assert paths.space_json.read_bytes() == data
    values = read_sealed_json(paths.space_json)
    del values["seal"]
    values["spec"]["patch_size"] = 1
    paths.space_json.write_bytes(sealed_json(values))
    garble(paths.space_json, 5, 4)  # neither text nor spec
    job = new_repair(root, [])
    (left,) = job.run(None).all_findings
    assert (left.path, left.what) == (str(paths.space_json), "missing")
    assert "encode.run with the same encoder and codec" in left.way_out
    assert job.done.spaces == {paths.name}
    make_space(root.path)  # what encode.run does
    assert paths.space_json.read_bytes() == data
    assert images(root) == set(range(9))
    repair(root)


def test_a_new_space_json_fits_the_existing_shards(root: CacheRoot) -> None:
    paths = only_space(root)
    made = Space.open(paths)
    for keep in ("image-00000002", "image-00000000"):  # the number says, or the size
        paths.space_json.unlink()
        Space.create(root, made.spec, made.load, shard_bytes=1 << 20)
        assert Space.open(paths).info.slots["image"] == made.info.slots["image"], keep
        for number in (1, 2):
            paths.commit("image", number).unlink(missing_ok=True)
    paths.space_json.unlink()
    spec = dataclasses.replace(made.spec, mean=(0.0, 0.0, 0.0))
    shutil.move(paths.root, root.space(spec.name).root)
    with pytest.raises(CorruptError, match="or of another space"):
        Space.create(root, spec, made.load)


def test_zarr_json_files_are_written_again(root: CacheRoot) -> None:
    paths = only_space(root)
    before = contents(root.path)
    garble(paths.array_json("image"), 30)
    shutil.copy(paths.group_json, paths.array_json("frame"))
    paths.group_json.unlink()
    repair(root)
    assert contents(root.path) == before


def test_an_unreadable_file_among_the_index_files_is_removed(root: CacheRoot) -> None:
    before = contents(root.path)
    folder = only_space(root).root / "index"
    folder.mkdir()
    (folder / "snapshot").write_bytes(b"nobody can read this")
    _, said = repair(root)
    assert len(said) == 1
    assert contents(root.path) == before


def test_damaged_tables_are_set_aside_and_named(root: CacheRoot) -> None:
    samples, (media,) = root.samples("toy"), root.media_dir.glob("*.parquet")
    for path in (samples, media):
        garble(path, 40)
    lost = {path.relative_to(root.path): path.read_bytes() for path in (samples, media)}
    done, said = repair(root)
    assert (done.datasets, done.media, len(said)) == ({"toy"}, True, 2)
    for name, data in lost.items():
        assert (root.damaged_dir / name).read_bytes() == data
        assert not (root.path / name).exists()
    write_samples(root, "toy", [])
    garble(samples, 40)
    repair(root)
    again = root.damaged_dir / "samples" / "toy" / f"{samples.name}.1"
    assert again.exists(), "none is overwritten"


def test_rows_with_nan_are_removed(tmp_path: Path) -> None:
    for codec_name, at in (("fp16", 2 * 70), ("int8", 256 + 2)):
        root = CacheRoot(tmp_path / codec_name)
        space = make_space(root.path, codec_name)
        writer = ShardWriter(space, "image", 0)
        for number in range(3):
            stored = row(number, spec=space.spec).copy()
            if number == 1:
                stored[at : at + 2] = np.array([np.nan], "<f2").view(np.uint8)
            writer.append(key(number), "full", stored)
        writer.commit()
        space.grow("image")
        assert not verify(root).broken
        (finding,) = verify(root, deep=True).all_findings
        assert finding.what == "1 of 3 rows hold NaN or Inf (row 1 first)"
        repair(root)
        assert images(root) == {0, 2}


def test_of_equal_rows_the_oldest_that_is_intact_is_kept(root: CacheRoot) -> None:
    space = Space.open(only_space(root))
    fill(space, [1, 4, 10])
    fill(space, [4, 5])
    space.grow("image")
    assert not verify(root, deep=True).broken
    garble(space.paths.shard("image", 1), 5)  # 4, as it was first
    garble(space.paths.shard("image", 4), 268 + 5)  # 5, as it is again
    done, said = repair(root)
    assert images(root) == {*range(9), 10}
    assert (done.lost["image"], done.spaces) == (0, set())
    index = FeatureReader(space.paths).index["image"]
    assert (len(index), len(index.doubled)) == (10, 0)
    assert [line.split("/")[-3] for line in said] == ["4", "3", "1"], "newest first"
    assert "1 of its rows are in other shards, too" in said[1]


def test_a_quick_repair_reads_the_rows_that_are_stored_twice(root: CacheRoot) -> None:
    """It must not remove the only intact copy because of damage elsewhere."""
    space = Space.open(only_space(root))
    fill(space, [1, 4, 10])
    space.grow("image")
    garble(space.paths.shard("image", 1), 5)  # 4, as it was first: only a deep check finds it
    garble(space.paths.shard("image", 2), space.paths.shard("image", 2).stat().st_size - 30)
    quick = Repair(root, deep=False, tell=lambda _: None, progress=lambda _: None)
    assert not quick.run(None).broken
    assert verify(root, deep=True).all_findings == []
    assert images(root) == {*range(9), 10}
    assert quick.done.lost["image"] == 0


def test_a_row_whose_copies_are_all_damaged_is_lost_once(root: CacheRoot) -> None:
    space = Space.open(only_space(root))
    fill(space, [4])
    space.grow("image")
    for number in (1, 3):
        garble(space.paths.shard("image", number), 5)
    done, _ = repair(root)
    assert images(root) == set(range(9)) - {4}
    assert (done.lost["image"], done.spaces) == (1, {space.paths.name})


def test_a_shard_that_exists_again_is_checked_like_any_other(root: CacheRoot) -> None:
    """The commit that replaced it is damaged, its files are still there: as after a gc that was killed."""
    space = Space.open(only_space(root))
    keep = np.array([True, False, True, True])
    old = read_commits(space.paths, space.info, "image")[0]
    files = (space.paths.commit("image", 0), space.paths.shard("image", 0))
    kept_files = {path: path.read_bytes() for path in files}
    rewrite_shards(space, "image", [(old, keep)], Path.unlink)
    for path, data in kept_files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert images(root) == set(range(9)) - {1}
    garble(space.paths.commit("image", 3), 60)
    garble(space.paths.shard("image", 0), 268 * 2)
    repair(root)
    assert images(root) == set(range(9)) - {2}


def test_shard_numbers_are_not_used_again_after_a_repair(root: CacheRoot) -> None:
    space = Space.open(only_space(root))
    space.paths.shard("image", 2).unlink()
    garble(space.paths.shard("image", 2 - 1), 0, 3 * 268)
    garble(space.paths.commit("frame", 0), 60)
    repair(root)
    assert images(root) == {0, 1, 2, 3}
    assert (space.next_shard("image"), space.next_shard("frame")) == (3, 1)


def test_only_the_requested_space_is_repaired(root: CacheRoot) -> None:
    other = make_space(root.path, "fp16")
    fill(other, [0])
    other.grow("image")
    garble(other.paths.shard("image", 0), 5)
    garble(root.samples("toy"), 40)
    here = root.space(next(name for name in root.space_names() if "int8" in name))
    garble(here.shard("image", 0), 5)
    before = contents(other.paths.root), contents(root.samples_dir)
    job = new_repair(root, [])
    assert not job.run(here).broken
    assert (contents(other.paths.root), contents(root.samples_dir)) == before


def test_a_space_of_a_newer_version_is_not_changed(root: CacheRoot) -> None:
    paths = only_space(root)
    values = read_sealed_json(paths.space_json)
    del values["seal"]
    paths.space_json.write_bytes(sealed_json({**values, "format": 99}))
    before = contents(paths.root)
    job = new_repair(root, [])
    report = job.run(None)
    assert job.done.steps == 0
    assert "format 99" in report.all_findings[0].what
    assert contents(paths.root) == before


def test_a_repair_is_refused_while_a_job_writes(root: CacheRoot) -> None:
    garble(only_space(root).shard("image", 0), 5)
    before = contents(root.path)
    with (
        DriverLock(only_space(root), "process 7 on node-3"),
        pytest.raises(InUseError, match="is being written by process 7 on node-3; wait"),
    ):
        new_repair(root, []).run(None)
    assert contents(root.path) == before


def test_a_row_with_a_far_larger_codec_error_is_a_note(tmp_path: Path) -> None:
    space = make_space(tmp_path)
    errors = {n: 0.004 + 0.00005 * n for n in range(40)} | {17: 0.2, 30: float("nan")}
    for first in range(0, 40, 4):
        fill(space, range(first, first + 4), errors=errors)
    space.grow("image")
    report = verify(CacheRoot(tmp_path), deep=True)
    assert not report.broken
    assert report.spaces[0].logical_hash is not None
    assert [(f.path, f.what.split(",")[0]) for f in report.all_findings] == [
        (str(space.paths.shard("image", 7)), f"{key(30)} full: its codec's error is nan"),
        (str(space.paths.shard("image", 4)), f"{key(17)} full: its codec's error is 0.2"),
    ]


def test_outliers_do_not_depend_on_the_scale() -> None:
    dice = np.random.default_rng(0)
    errors = np.exp(dice.normal(-5, 0.2, 100_000)).astype(np.float32)
    assert len(outliers(errors)) == 0
    errors[[5, 99]] = errors.max() * np.array([20, 30], np.float32)
    for factor in (1, 1000):
        assert outliers(errors * np.float32(factor)).tolist() == [99, 5], "worst first"
    assert outliers(np.zeros(5, np.float32)).tolist() == []
    assert outliers(np.full(5, 0.004, np.float32)).tolist() == []
    assert outliers(np.empty(0, np.float32)).tolist() == []


# ---- with encode jobs


def test_an_encode_job_restores_what_a_repair_removed(tmp_path: Path) -> None:
    draw(tmp_path / "images", 12)
    media = f"folder:{tmp_path / 'images'}"
    config = dataclasses.replace(CONFIG, commit_every_s=60.0)
    first = encode(tmp_path / "cache", media, config=config)
    root, paths, whole = first.root, first.paths, first.reader.logical_hash()
    kept = FeatureReader(paths).index["image"].keys[[0, 1, *range(3, 12)]]
    garble(paths.shard("image", 0), 2 * 268 + 7)
    done, _ = repair(root)
    assert (done.lost["image"], done.kept["image"]) == (1, 11)
    assert (FeatureReader(paths).index["image"].keys == kept).all()
    again = encode(root.path, media, config=config)
    assert (again.job._tracker.encoded, again.reader.logical_hash()) == (1, whole)
    garble(paths.space_json, 0, 400)
    garble(paths.commit("image", 2), 60)  # of the one row encoded last
    new_repair(root, []).run(None)
    assert root.space_names() == []
    again = encode(root.path, media, config=config)
    assert (again.job._tracker.encoded, again.plan.reused) == (1, 11), "the others are known"
    assert again.reader.logical_hash() == whole
    for path in (root.samples("images"), *root.media_dir.glob("*.parquet")):
        garble(path, 40)
    repair(root)
    again = encode(root.path, media, config=config)
    assert again.job._tracker.encoded == 0
    assert len(again.ledger) == 12
    assert again.reader.logical_hash() == whole
    assert verify(root, deep=True).all_findings == []


# ---- the command


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *argv: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["cache.verify", *argv])
    code = main()
    return code, *capsys.readouterr()


def test_the_command_prints_its_steps_and_the_next_command(
    root: CacheRoot, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = only_space(root)
    at = ("--features", str(root.path), "--deep")
    garble(paths.shard("image", 1), 5)
    origin = Origin(words=("--dataset", "toy=folder:/my photos"))
    write_samples(root, "toy", [Sample(id="1", dataset="toy", messages=())], origin)
    garble(root.samples("toy"), 40)
    code, out, _ = run(monkeypatch, capsys, *at)
    assert (code, out.count("cache.verify --deep --repair")) == (1, 2)
    code, out, err = run(monkeypatch, capsys, *at, "--repair")
    assert code == 0
    lines = out.splitlines()
    why = "its bytes do not match its seal (sha256)"
    assert lines[0] == f"REPAIR: {root.samples('toy')}: {why}; set aside in {root.damaged_dir}"
    why = "1 of 3 rows fail their checksum (row 4 first)"
    todo = "its 2 intact rows are copied to a new shard"
    assert lines[1] == f"REPAIR: {paths.shard('image', 1)}: {why}; {todo}"
    line = next(line for line in lines if line.startswith("repaired: "))
    assert line.startswith("repaired: 2 findings, 2 rows kept, 1 removed; ")
    assert f"python -m cache.gc --damaged --delete --features {root.path}" in line
    encode = "    python -m encode.run --dataset 'toy=folder:/my photos' --encoder "
    lost = lines.index("samples of toy were lost; to read them again, run")
    assert lines[lost + 1].startswith(encode)
    assert lines[-1] == f"{paths.name} lacks rows now; to create them again, run"
    assert err.startswith("read ")
    assert err.rstrip().endswith("/s")
    code, out, _ = run(monkeypatch, capsys, *at, "--repair")
    assert (code, out.splitlines()[-1]) == (0, "nothing to repair")
    garble(paths.commit("image", 0), 60)
    code, out, err = run(monkeypatch, capsys, *at, "--repair", "--json", "--space", "toy")
    values = json.loads(out)
    assert (code, values["broken"], values["repaired"]["spaces"]) == (0, False, [paths.name])
    assert "REPAIR: " in err


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("kind", ["image", "frame"])
def test_a_packed_row_is_finite_with_any_codec(name: str, kind: str) -> None:
    # 36 tokens: a mean, too.
    spec = dataclasses.replace(SPEC, codec=name, image_size=12, pool_frame=1)
    finite, tokens = Finite(spec, kind), spec.tokens(kind)
    values = np.random.default_rng(1).normal(size=(20, tokens, spec.width)) * 10.0
    values[0] *= 1e5  # more than a float16 holds
    _, scales_end, size = codec.row_parts(spec.codec, tokens, spec.width)
    for packed in codec.pack(values.astype(np.float32), spec.codec):
        assert finite(packed)
        # A mean token may have any sign.
        assert (packed[scales_end:size].view("<f2") < 0).any() == (scales_end < size)
        for end in (len(packed), scales_end, size):
            for bad in (np.nan, np.inf, -np.inf):
                damaged = packed.copy()
                damaged[end - 2 : end] = np.array([bad], "<f2").view(np.uint8)
                assert not finite(damaged)
