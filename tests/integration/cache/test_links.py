"""No command that writes follows a link that somebody put into a cache.

tar xf theirs.tar               # theirs/garbage -> /home/me/photos
python -m cache.gc --delete --features theirs        # removes the link
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import configs
from cache.errors import CacheError, CorruptError
from cache.format.checksums import sealed_json
from cache.format.space_info import info_bytes
from cache.maintenance.checks import verify
from cache.store.locks import DriverLock, WorkerLease, driver_token
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.samples import dataset_names
from cache.store.space import Space, find_space, read_info
from encode.worker.decode_log import decode_log_file
from tests.support.encode_jobs import TINY, draw

WRITERS = {
    "gc": ["cache.gc", "--delete"],
    "gc, all": ["cache.gc", "--unreferenced", "--damaged", "--delete"],
    "repair": ["cache.verify", "--deep", "--repair"],
    "merge into it": ["cache.merge", "--source", "OTHER"],
    "merge it": ["cache.merge", "--source", "HERE", "--features", "NEW"],
    "convert": ["cache.convert", "--codec", "int4"],
    "share": ["cache.share"],
    "encode": ["encode.run", "--dataset", "folder:PHOTOS", "--encoder", "tiny", "--device", "cpu"],
    "fetch": [
        "encode.run",
        "--dataset",
        "folder:PHOTOS",
        "--encoder",
        "tiny",
        "--fetch-only",
        "--keep-media",
        "KEEP",
    ],
}


def run(
    made: Path, world: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Run a command on `world`/cache in this process; its exit code, and what it prints."""
    names = {
        "OTHER": world / "other",
        "HERE": world / "cache",
        "NEW": world / "new",
        "KEEP": world / "cache" / "kept",
        "folder:PHOTOS": f"folder:{made / 'photos'}",
    }
    words = [str(names.get(word, word)) for word in words]
    if "--features" not in words:
        words += ["--features", str(world / "cache")]
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", words)
        configs.command(import_module(words[0]).main, errors=(CacheError,))
    out, err = capsys.readouterr()
    code = ended.value.code
    assert isinstance(code, int)
    assert code in (0, 1, 2), (words, out, err)  # 1: rows are damaged
    if code == 2:
        assert err.splitlines()[-1].startswith("error: "), err
    return code, out + err


def contents(folder: Path) -> dict[str, tuple[int, bytes | str]]:
    """Path -> mode and content of everything below a folder, links themselves."""
    found: dict[str, tuple[int, bytes | str]] = {}
    for here, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(here, name)
            mode = path.lstat().st_mode
            what: bytes | str = b""
            if stat.S_ISLNK(mode):
                what = str(path.readlink())
            elif stat.S_ISREG(mode):
                what = path.read_bytes()
            found[str(path.relative_to(folder))] = mode, what
    return found


@pytest.fixture(scope="module", autouse=True)
def _tiny(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Make `tiny` an encoder of the configs."""
    folder = tmp_path_factory.mktemp("configs")
    values = yaml.safe_load(configs.dump(TINY))
    values.pop("name")
    (folder / "encoders.yaml").write_text(yaml.safe_dump({"tiny": values}))
    (folder / "datasets.yaml").write_text("datasets: {}\ngroups: {}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "FOLDER", folder)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a cache that has one of everything, another one, and the photos they are of."""
    world = tmp_path_factory.mktemp("made")
    draw(world / "photos", 2, side=8)
    words = ["--dataset", f"folder:{world / 'photos'}", "--encoder", "tiny", "--device", "cpu"]
    words += ["--codec", "fp16", "--features", str(world / "cache")]
    assert import_module("encode.run").main(words) == 0
    root = CacheRoot(world / "cache")
    (name,) = root.space_names()
    space = Space.open(root.space(name))
    paths = space.paths
    half = paths.shard_dir("image", space.next_shard("image")) / "0"
    half.mkdir(parents=True)
    (half / "0.partial").write_bytes(b"never committed")
    paths.index_dir.mkdir()
    paths.index("image").write_bytes(b"of other commits")
    for late in (
        root.damaged_dir / "spaces" / "gone" / "space.json",
        root.garbage_dir / "half-1a2b3c4d" / "space.json",
        root.samples_dir / "photos" / "part-00000.parquet.ab.partial",
        root.media_dir / "part-1.parquet.ab.partial",
        decode_log_file(paths, 3),
    ):
        late.parent.mkdir(parents=True, exist_ok=True)
        late.write_bytes(b"left")
        os.utime(late, (1, 1))
    with DriverLock(paths, "job") as lock, WorkerLease(paths, lock.token, "7"):
        pass
    assert import_module("cache.share").share(root)
    draw(world / "more", 3, side=9)
    words[1] = f"folder:{world / 'more'}"
    words[-1] = str(world / "other")
    assert import_module("encode.run").main(words) == 0
    return world


def places(made: Path) -> list[str]:
    """Every folder and file of the cache, as a path below it."""
    return sorted(contents(made / "cache"))


def copy_with(made: Path, world: Path, place: str, put: Callable[[Path, Path], object]) -> Path:
    """Copy both caches; move what is at one place of the first away, and put something else there."""
    for name in ("cache", "other"):
        shutil.copytree(made / name, world / name)
    path, target = world / "cache" / place, world / "outside" / Path(place).name
    target.parent.mkdir()
    (world / "outside" / "beside").write_text("a file of the user")
    path.rename(target)
    put(path, target)
    return path


PUT: dict[str, Callable[[Path, Path], object]] = {
    "link": lambda path, target: path.symlink_to(target),
    "link to nothing": lambda path, target: path.symlink_to(target.with_name("nothing")),
    "FIFO": lambda path, _: os.mkfifo(path),
}


def changes(before: dict[str, tuple[int, bytes | str]], world: Path) -> list[str]:
    """What is not as before, outside of the cache and of a new one."""
    after = contents(world)
    paths = sorted(before.keys() | after.keys())
    return [
        path
        for path in paths
        if before.get(path) != after.get(path) and path.split("/")[0] not in ("cache", "new")
    ]


@pytest.mark.soak_counted
@pytest.mark.parametrize("command", WRITERS)
def test_a_link_at_any_place_is_not_followed(
    made: Path,
    tmp_path: Path,
    command: str,
    capsys: pytest.CaptureFixture[str],
    soak: Callable[[int, int], int],
) -> None:
    """In `make test` each place for some of the commands."""
    codes, share = set(), soak(6, 1)
    for number, place in enumerate(places(made)):
        if number % share != list(WRITERS).index(command) % share:
            continue
        world = tmp_path / str(number)
        copy_with(made, world, place, PUT["link"])
        before = contents(world)
        code, said = run(made, world, WRITERS[command], capsys)
        assert not changes(before, world), (place, said)
        codes.add(code)
        shutil.rmtree(world)
    assert number > 35
    assert codes == ({0} if command.startswith("gc") else codes | {2}), "a link is an error"


ODD = [
    *(("link to nothing", name) for name in ("repair", "merge into it", "convert", "encode")),
    *(("FIFO", name) for name in ("gc", "merge into it", "encode")),
]


@pytest.mark.soak_counted
@pytest.mark.parametrize(("kind", "command"), ODD)
def test_neither_is_anything_else(
    made: Path,
    tmp_path: Path,
    command: str,
    kind: str,
    capsys: pytest.CaptureFixture[str],
    soak: Callable[[int, int], int],
) -> None:
    """In `make test` each place for one of these or two."""
    share, mine = soak(5, 1), ODD.index((kind, command))
    for number, place in enumerate(places(made)):
        if number % share != mine % share:
            continue
        if not (made / "cache" / place).is_dir() and not place.startswith("locks"):
            continue
        world = tmp_path / str(number)
        copy_with(made, world, place, PUT[kind])
        before = contents(world)
        _, said = run(made, world, WRITERS[command], capsys)
        assert not changes(before, world), (place, said)
        shutil.rmtree(world)


def test_gc_removes_the_links_and_then_the_rest(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = tmp_path / "world"
    copy_with(made, world, "garbage", PUT["link"])
    cache = world / "cache"
    (cache / "damaged" / "deep").mkdir()
    (cache / "damaged" / "deep" / "x").symlink_to("/")
    os.mkfifo(cache / "media" / "part-2.parquet")
    before = contents(world)
    names = ["damaged/deep/x", "garbage", "media/part-2.parquet"]
    kinds = ["a link", "a link", "a FIFO"]
    listed = [f"{cache}/{n}: {k}; a cache has none" for n, k in zip(names, kinds, strict=True)]
    _, said = run(made, world, ["cache.gc"], capsys)
    assert said.splitlines()[:-1] == listed and contents(world) == before
    _, said = run(made, world, ["cache.gc", "--delete"], capsys)
    assert said.splitlines()[:-1] == listed
    assert "the same command again" in said.splitlines()[-1]
    left = contents(world)
    assert before.keys() - left.keys() == {f"cache/{name}" for name in names}
    _, said = run(made, world, ["cache.gc", "--delete"], capsys)
    assert "never committed" in said and "never finished" in said
    assert (world / "outside" / "garbage" / "half-1a2b3c4d" / "space.json").exists()
    assert not verify(CacheRoot(cache)).broken


def test_a_lock_that_is_a_link_does_not_truncate_its_target(made: Path, tmp_path: Path) -> None:
    for name, holds in (
        ("driver.lock", lambda paths: DriverLock(paths, "job")),
        ("workers.lock", lambda paths: DriverLock(paths, "job")),
        ("worker-1.lock", lambda paths: WorkerLease(paths, driver_token(paths) or "", "1")),
    ):
        world = tmp_path / name
        (cache,) = (CacheRoot(made / "cache"),)
        lock = cache.space(cache.space_names()[0]).locks_dir / name
        if not lock.exists():
            lock.write_text("")
        path = copy_with(made, world, str(lock.relative_to(cache.path)), PUT["link"])
        target = path.readlink()
        target.write_text("precious")
        paths = CacheRoot(world / "cache").space(cache.space_names()[0])
        with pytest.raises(CorruptError, match=f"{name}: a link, refused"), holds(paths):
            pass
        assert target.read_text() == "precious"
        path.unlink()
        os.link(target, path)
        with pytest.raises(CorruptError, match=f"{name}: it has several names"), holds(paths):
            pass
        assert target.read_text() == "precious"


def test_the_folder_that_the_user_names_may_be_a_link(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made / "cache", tmp_path / "elsewhere")
    shutil.copytree(made / "other", tmp_path / "other")
    (tmp_path / "cache").symlink_to(tmp_path / "elsewhere")
    for command, words in WRITERS.items():
        code, said = run(made, tmp_path, words, capsys)
        assert code == 0, (command, said)
    assert (tmp_path / "cache").is_symlink()
    assert len(CacheRoot(tmp_path / "elsewhere").space_names()) == 3


NAMES = [
    "../x",
    "../../../x",
    "/absolute/x",
    "a/../../x",
    "..",
    "a..b",
    "",
    ".hidden",
    "-x",
    "a" * 5000,
    "\x1b[2J",
    "a\n",
    "a\0b",
    "a b",
    "\u202ex",
]


@pytest.mark.parametrize("command", ["merge it", "convert", "encode", "repair", "gc", "share"])
def test_a_space_cannot_name_a_folder_elsewhere(
    made: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(NAMES):
        world = tmp_path / str(number) / "world"
        for folder in ("cache", "other"):
            shutil.copytree(made / folder, world / folder)
        root = CacheRoot(world / "cache")
        paths = root.space(root.space_names()[0])
        info = read_info(paths)
        values = json.loads(info_bytes(info))
        values["spec"]["encoder"] = name
        values["name"] = f"{name}-fp16-{info.spec.fingerprint[:8]}"
        values.pop("seal")
        paths.space_json.write_bytes(sealed_json(values))
        before = contents(world.parent)
        code, said = run(made, world, WRITERS[command], capsys)
        after = contents(world.parent)
        changed = {path for path in after if before.get(path) != after[path]}
        assert all(path.startswith(("world/cache/", "world/new")) for path in changed), changed
        if command in ("merge it", "convert", "share"):
            assert code == 2
            assert "space.json: encoder" in said
            assert len(said) < 1000 and said[:-1].isprintable() and said.endswith("\n")
        shutil.rmtree(world)


def test_odd_folders_among_the_spaces_and_samples_are_not_used(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "cache", tmp_path / "cache")
    root = CacheRoot(tmp_path / "cache")
    (name,) = root.space_names()
    for odd in ("lost+found", ".hidden", "a b", "\x1b[2J", "a\nb", "..."):
        shutil.copytree(root.spaces_dir / name, root.spaces_dir / odd)
        shutil.copytree(root.samples_dir / "photos", root.samples_dir / odd)
        with pytest.raises(CacheError, match="space name") as caught:
            root.space(odd)
        assert "\n" not in str(caught.value)
    assert root.space_names() == [name]
    assert [space.name for space in root.space_folders()] == [name]
    assert dataset_names(root) == ["photos"]
    shutil.move(root.spaces_dir / name, root.spaces_dir / "renamed")
    assert FeatureReader(find_space(root, "renamed")).rows("image") == 2
    (root.spaces_dir / "linked").symlink_to(root.spaces_dir / "renamed")
    for listing in (root.space_names, root.space_folders):
        with pytest.raises(CorruptError, match=r"spaces/linked: a link, refused.*mount --bind"):
            listing()
