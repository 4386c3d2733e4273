"""A space with a tail: its file is created, checked, repaired, converted, merged, shared and collected.

python -m encode.run --dataset folder:photos --block 19 --tail
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from cache import convert, gc, merge, verify
from cache.errors import CacheError, CorruptError
from cache.format.checksums import sealed_json
from cache.format.tail import MAX_TAIL_BYTES, read_tail
from cache.maintenance import checks
from cache.maintenance.encode_command import encode_command
from cache.remote.listing import is_sealed, is_table, read_listing
from cache.remote.open import RemoteCache, RemoteOptions
from cache.remote.retry import RetryPolicy
from cache.share import share
from cache.store.paths import LISTING, CacheRoot
from cache.store.space import Space, read_info, rebuild_info, tail_bytes
from tests.support.faults import garble
from tests.support.remote_servers import WebServer
from tests.support.spaces import fill, make_space, tail_of

PLAIN = {"pool_frame": 1, "keep_cls": True}
"""The rows before a tail: unpooled, with CLS."""


def tailed(folder: Path, seed: int = 0, codec: str = "fp16", **changes: Any) -> Space:
    """A space of two images with a tail."""
    tail, data = tail_of(seed, **changes)
    space = make_space(folder, codec, tail=tail, tail_file=data, **PLAIN)
    if not space.paths.has_commits:
        fill(space, [0, 1])
    for array in ("image", "frame"):
        space.grow(array)
    return space


def run(module: Any, *argv: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *map(str, argv)])
        return module.main() or 0


def broken(folder: Path) -> list[str]:
    return [f.what for f in checks.verify(CacheRoot(folder), deep=True).all_findings]


# ---- created


def test_a_space_keeps_its_tail_and_refuses_another(tmp_path: Path) -> None:
    space = tailed(tmp_path)
    assert space.spec.tail == tail_of()[0]
    assert tail_bytes(space.paths, space.spec) == tail_of()[1]
    assert broken(tmp_path) == []
    tailed(tmp_path)  # again: nothing changes
    for seed, changes in ((1, {}), (0, {"pool_frame": 1}), (0, {"blocks": (2,)})):
        with pytest.raises(
            CacheError, match=r"the space has another tail \(.* there, .* here"
        ) as e:
            tailed(tmp_path, seed, **changes)
        assert "\n" not in str(e.value)
    assert broken(tmp_path) == []
    # Its rows are those of a space without: that is one space.
    assert make_space(tmp_path, "fp16", **PLAIN).spec.tail == tail_of()[0]


def test_a_space_without_a_tail_is_given_one(tmp_path: Path) -> None:
    plain = make_space(tmp_path, "fp16", **PLAIN)
    fill(plain, [0])
    plain.grow("image")
    # A job that ended before space.json named the file left one of its own.
    plain.paths.tail.write_bytes(tail_of(1)[1])
    assert broken(tmp_path) == ["is no file of ours"]
    space = tailed(tmp_path)
    assert space.spec.tail == tail_of()[0]
    assert space.rows_per_shard("image") == plain.rows_per_shard("image")
    assert tail_bytes(space.paths, space.spec) == tail_of()[1]
    assert broken(tmp_path) == []


# ---- damaged


def test_verify_finds_a_damaged_tail_and_repair_sets_it_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = tailed(tmp_path)
    where = ("--features", tmp_path)
    assert run(verify, *where) == 0
    garble(space.paths.tail, 5000)
    assert run(verify, *where) == 1
    said = capsys.readouterr().out
    assert f"BROKEN: {space.paths.tail}: its sha256 is not that in space.json; python -m" in said
    assert run(verify, "--repair", *where) == 1, "it is missing until encode.run writes it again"
    said = capsys.readouterr().out
    assert "set aside; encode.run writes it again" in said
    assert f"{space.spec.name} lacks its tail now; to write it again, run" in said
    assert "--block 0 --tail" in said
    assert (tmp_path / "damaged" / space.paths.tail.relative_to(tmp_path)).exists()
    assert broken(tmp_path) == ["missing"]
    tailed(tmp_path)
    assert run(verify, "--deep", *where) == 0


def test_a_damaged_description_is_rebuilt_only_with_its_tail(tmp_path: Path) -> None:
    space = tailed(tmp_path)
    path = space.paths.space_json
    text = path.read_bytes()
    before, _, seal = text.rpartition(b"sha256:")
    path.write_bytes(before + b"sha255:" + seal)
    assert rebuild_info(space.paths) == space.info
    for old, new in ((b'"pool_frame": 2', b'"pool_frame": 1'), (b'"heads": 4', b'"heads": 2')):
        changed = text.replace(old, new)
        assert changed != text, "the text has it"
        path.write_bytes(changed)
        assert rebuild_info(space.paths) is None, new
    path.write_bytes(text)
    garble(space.paths.tail, 5000)
    path.write_bytes(before + b"sha255:" + seal)
    assert rebuild_info(space.paths) is None


# ---- copied


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_convert_keeps_the_tail(tmp_path: Path, codec: str) -> None:
    source = tailed(tmp_path)
    assert run(convert, "--features", tmp_path, "--codec", codec) == 0
    (name,) = (n for n in CacheRoot(tmp_path).space_names() if codec in n)
    target = CacheRoot(tmp_path).space(name)
    assert read_info(target).spec.tail == source.spec.tail
    assert target.tail.read_bytes() == source.paths.tail.read_bytes()
    assert broken(tmp_path) == []
    with pytest.raises(Exception, match="CLS"):
        run(convert, "--features", tmp_path, "--space", source.spec.name, "--pool", "2")


def test_merge_keeps_the_tail_and_refuses_another(tmp_path: Path) -> None:
    there = tailed(tmp_path / "there")
    assert run(merge, "--source", tmp_path / "there", "--features", tmp_path / "new") == 0
    copy = CacheRoot(tmp_path / "new").space(there.spec.name)
    assert copy.tail.read_bytes() == there.paths.tail.read_bytes()
    assert broken(tmp_path / "new") == []
    # Into the same rows without a tail, and from there.
    fill(make_space(tmp_path / "plain", "fp16", **PLAIN), [5])
    assert run(merge, "--source", tmp_path / "plain", "--features", tmp_path / "new") == 0
    assert read_info(copy).spec.tail == there.spec.tail
    assert run(merge, "--source", tmp_path / "there", "--features", tmp_path / "plain") == 0
    assert read_info(CacheRoot(tmp_path / "plain").space(copy.name)).spec.tail == there.spec.tail
    assert broken(tmp_path / "plain") == broken(tmp_path / "new") == []
    tailed(tmp_path / "other", seed=1)
    with pytest.raises(CacheError, match="the space has another tail"):
        run(merge, "--source", tmp_path / "other", "--features", tmp_path / "new")
    garble(there.paths.tail, 5000)
    with pytest.raises(CorruptError, match="its sha256"):
        run(merge, "--source", tmp_path / "there", "--features", tmp_path / "another")


def test_gc_keeps_the_tail_and_an_encode_command_names_it(tmp_path: Path) -> None:
    space = tailed(tmp_path)
    left = space.paths.tail.with_name("tail.safetensors.12345678.partial")
    left.write_bytes(b"half")
    run(gc, "--features", tmp_path, "--delete")
    assert space.paths.tail.exists()
    assert not left.exists()
    command = encode_command(CacheRoot(tmp_path), "photos", space)
    assert "--encoder toy --codec fp16 --block 0 --tail --pool 1 --frame-pool 2" in command


# ---- over a network


def test_a_remote_tail_is_copied_for_training_alone(tmp_path: Path) -> None:
    space = tailed(tmp_path / "there")
    other = tailed(tmp_path / "there", codec="int8")
    root = CacheRoot(tmp_path / "there")
    name = space.paths.tail.relative_to(root.path).as_posix()
    assert is_table(name)
    assert not is_sealed(name)
    assert not is_table(name.replace("tail", "tails"))
    assert not is_table(name.replace("spaces/", "spaces/../"))
    share(root)
    assert name in read_listing((root.path / LISTING).read_bytes(), "here")
    policy = RetryPolicy(backoff_s=0.01, max_backoff_s=0.02, give_up_after_s=0.3)
    options = RemoteOptions(mirror=tmp_path / "mirror", allow_private=True)
    with WebServer(root.path) as server:

        def here() -> RemoteCache:
            return RemoteCache(server.url, options, policy)

        copied = here().copy_tables()  # as cache.ls
        assert not copied.space(space.spec.name).tail.exists()
        reader = here().open_reader(space.spec.name)
        spec, paths = reader.spec, reader.paths
        assert spec.tail is not None
        assert paths.tail.read_bytes() == space.paths.tail.read_bytes()
        assert not copied.space(other.spec.name).tail.exists(), "of the space that is opened"
        read_tail(paths.tail, paths.cache_root, spec.tail, spec.width)
        # A copy that was damaged is fetched again.
        garble(paths.tail, 5000)
        here().open_reader(space.spec.name)
        assert paths.tail.read_bytes() == space.paths.tail.read_bytes()
        # One that is not the listed one is not taken.
        garble(space.paths.tail, 5000)
        garble(paths.tail, 5000)
        with pytest.raises(CacheError, match="its sha256 differs from the listed one"):
            here().open_reader(space.spec.name)


def test_no_listed_tail_is_larger_than_any_tail(tmp_path: Path) -> None:
    name = "spaces/a/tail.safetensors"
    for nbytes, fine in ((MAX_TAIL_BYTES, True), (MAX_TAIL_BYTES + (2 << 20), False)):
        data = sealed_json({"format": 1, "files": {name: [nbytes, "0" * 64]}})
        if fine:
            assert read_listing(data, "u")[name].nbytes == nbytes
        else:
            with pytest.raises(CacheError, match="bytes, at most"):
                read_listing(data, "u")
