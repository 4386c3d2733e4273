"""Media that a cache names are opened below the folders that this machine encoded, and nowhere else.

remember(root, [Path("/photos")])
LocalMedia(root).read("/photos/a.png", key, most=1 << 20)
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache.errors import CacheError, CorruptError
from cache.format.embedded.names import member_source, row_source
from cache.maintenance.local_media import (
    LocalMedia,
    MediaFileError,
    NotAllowedError,
    remember,
    remembered,
)
from cache.store.paths import CacheRoot

DATA = b"the bytes of a photograph"
KEY = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's state folder."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (folder := tmp_path / "photos").mkdir()
    (folder / "a.png").write_bytes(DATA)
    return folder


@pytest.fixture
def root(tmp_path: Path, state: Path, photos: Path) -> CacheRoot:
    """A cache whose data set was encoded from `photos`."""
    found = CacheRoot(tmp_path / "cache")
    remember(found, [photos])
    return found


def read(root: CacheRoot, source: object, **named: Path) -> bytes:
    return LocalMedia(root, **named).read(str(source), KEY, most=1 << 20)


def test_files_below_the_encoded_folders_are_read(root: CacheRoot, photos: Path) -> None:
    assert read(root, photos / "a.png") == DATA
    assert LocalMedia(root).video(str(photos / "a.png"), KEY, size=len(DATA)) == photos / "a.png"
    (root.path / "demo").mkdir()
    (root.path / "demo" / "a.png").write_bytes(DATA)
    assert read(root, root.path / "demo" / "a.png") == DATA


def test_media_inside_files_are_read(root: CacheRoot, photos: Path, tmp_path: Path) -> None:
    tar, table = photos / "a.tar", photos / "a#%.parquet"
    with tarfile.open(tar, "w", format=tarfile.GNU_FORMAT) as file:
        file.add(photos / "a.png", "a.png")
    pq.write_table(pa.table({"image": [DATA]}), table)
    for folder in (photos, tmp_path / "elsewhere"):
        sources = (
            member_source(str(folder / tar.name), tarfile.BLOCKSIZE, len(DATA), "a.png"),
            row_source("parquet", str(folder / table.name), "image", 0),
        )
        for source in sources:
            if folder == photos:
                assert read(root, source) == DATA
            else:
                shutil.copytree(photos, folder, dirs_exist_ok=True)
                with pytest.raises(NotAllowedError):
                    read(root, source)
                assert read(root, source, media=folder) == DATA


def outside(folder: Path, photos: Path) -> list[str]:
    """Names that lead out of `photos`; each would have the right bytes."""
    shutil.copytree(photos, folder)
    (photos / "link.png").symlink_to(folder / "a.png")
    (photos / "linked").symlink_to(folder)
    return [
        str(folder / "a.png"),
        str(photos / "link.png"),
        str(photos / "linked" / "a.png"),
        f"{photos}/../{folder.name}/a.png",
        os.path.relpath(photos / "a.png"),
        f"{photos}-2/a.png",
        str(photos),
        "",
        "/",
        f"{photos}/a.png\0",
        "/dev/zero",
        "tar:/dev/zero#512+10:a",
        "parquet:/proc/self/environ#image:0",
        f"tar:{photos}/..%2F{folder.name}/a.png#512+10:a",
        "file:///etc/hostname",
    ]


def test_names_that_lead_elsewhere_are_not_opened(
    root: CacheRoot, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = outside(tmp_path / "private", photos)
    opened: list[object] = []
    real = os.open

    def watched(path: object, *args: int, **named: int) -> int:
        opened.append(path)
        return real(path, *args, **named)  # type: ignore[arg-type]

    local = LocalMedia(root)
    monkeypatch.setattr(os, "open", watched)
    for name in names:
        for way in (local.read, local.video):
            with pytest.raises(MediaFileError) as refused:
                way(name, KEY, **({"most": 1 << 20} if way == local.read else {}))  # type: ignore[operator]
            if name != str(photos):  # a folder is no regular file
                line = f"the cache names {name}, which was not opened; --media DIR allows it"
                assert str(refused.value) == line
    assert [path for path in opened if path != photos] == []
    assert "was not opened" in local.note()


def test_a_link_is_followed_where_both_ends_are_allowed(
    root: CacheRoot, photos: Path, tmp_path: Path
) -> None:
    names = outside(tmp_path / "private", photos)
    local = LocalMedia(root, media=tmp_path / "private")
    assert [local.read(name, KEY, most=99) for name in names[:4]] == [DATA] * 4


def test_the_folder_may_be_named_by_a_link(root: CacheRoot, tmp_path: Path, photos: Path) -> None:
    moved = photos.rename(tmp_path / "disk")
    photos.symlink_to(moved)
    assert read(root, photos / "a.png") == DATA  # the folder of that name was encoded
    assert read(root, moved / "a.png") == DATA


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _other(path: Path) -> None:
    path.write_bytes(DATA + b"x")


def _same_length(path: Path) -> None:
    path.write_bytes(DATA[::-1])


def _large(path: Path) -> None:
    path.touch()
    os.truncate(path, (1 << 40) + 1)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_fifo, "cannot be read: a FIFO, refused"),
        (_device, "which was not opened"),
        (_other, "has changed since it was encoded"),
        (_same_length, "has changed since it was encoded"),
        (_large, "are read"),
        (Path.mkdir, "cannot be read: a folder, refused"),
        (lambda path: None, "not on this machine"),
    ],
)
def test_what_is_not_the_encoded_file_is_not_read(
    root: CacheRoot, photos: Path, make: Callable[[Path], None], reason: str
) -> None:
    make(photos / "b.png")
    with pytest.raises(MediaFileError, match=reason):
        read(root, photos / "b.png")
    with pytest.raises(MediaFileError, match=reason):
        LocalMedia(root).video(str(photos / "b.png"), KEY)


def test_a_file_of_another_size_is_not_even_hashed(root: CacheRoot, photos: Path) -> None:
    (photos / "b.mp4").touch()
    os.truncate(photos / "b.mp4", 1 << 39)  # hashing it would take minutes
    with pytest.raises(MediaFileError, match="has changed"):
        LocalMedia(root).video(str(photos / "b.mp4"), KEY, size=100)


def test_without_a_sha256_nothing_is_read(root: CacheRoot, photos: Path) -> None:
    for call in (LocalMedia(root).video, lambda *a: LocalMedia(root).read(*a, most=99)):
        with pytest.raises(MediaFileError, match="the cache has no sha256"):
            call(str(photos / "a.png"), None)


# ---- what is recorded


def test_a_cache_that_moved_has_no_folders(root: CacheRoot, photos: Path, tmp_path: Path) -> None:
    moved = CacheRoot(root.path.rename(tmp_path / "moved"))
    with pytest.raises(NotAllowedError):
        read(moved, photos / "a.png")
    assert read(moved, photos / "a.png", media=photos) == DATA
    remember(moved, [photos])  # encoding again
    assert read(moved, photos / "a.png") == DATA


def test_another_cache_at_the_same_path_has_no_folders(root: CacheRoot, photos: Path) -> None:
    own = (root.path / "locks" / "id").read_text()
    for forged in (None, "", "0" * 32, own[:-1], f"../{own}", "\udcff", own * 1000):
        shutil.rmtree(root.path)
        (root.path / "locks").mkdir(parents=True)
        if forged is not None:
            (root.path / "locks" / "id").write_text(forged, errors="surrogateescape")
        assert remembered(root) == []
        with pytest.raises(NotAllowedError):
            read(root, photos / "a.png")


def test_a_stranger_cannot_name_another_cache_of_the_user(
    root: CacheRoot, photos: Path, tmp_path: Path
) -> None:
    """He copies the id of a published cache into his own."""
    other = CacheRoot(tmp_path / "download")
    shutil.copytree(root.path, other.path)
    with pytest.raises(NotAllowedError):
        read(other, photos / "a.png")


@pytest.mark.parametrize("special", ["fifo", "link"])
def test_special_files_as_id_are_none(
    root: CacheRoot, photos: Path, tmp_path: Path, special: str
) -> None:
    file = root.path / "locks" / "id"
    file.rename(tmp_path / "id")
    if special == "fifo":
        os.mkfifo(file)
    else:
        file.symlink_to(tmp_path / "id")
    assert remembered(root) == []
    with pytest.raises(CorruptError, match="refused"):
        remember(root, [photos])
    assert remembered(root) == []


def test_a_linked_folder_of_locks_is_refused(state: Path, tmp_path: Path, photos: Path) -> None:
    root = CacheRoot(tmp_path / "cache")
    root.path.mkdir()
    (outside := tmp_path / "outside").mkdir()
    (root.path / "locks").symlink_to(outside)
    with pytest.raises(CorruptError, match="a link, refused"):
        remember(root, [photos])
    assert list(outside.iterdir()) == []


def test_folders_add_up(root: CacheRoot, photos: Path, tmp_path: Path, state: Path) -> None:
    (odd := tmp_path / os.fsdecode(b"caf\xe9 ")).mkdir()
    remember(root, [odd, photos])
    assert remembered(root) == sorted([odd, photos])
    (file,) = state.rglob("*.json")
    assert file.stat().st_mode & 0o077 == 0 or file.parent.stat().st_mode & 0o077 == 0
    before = file.stat().st_mtime_ns
    remember(root, [photos])
    assert file.stat().st_mtime_ns == before  # nothing new: not written again


def test_a_damaged_record_is_replaced(
    root: CacheRoot, photos: Path, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (file,) = state.rglob("*.json")
    record = json.loads(file.read_text())
    for text in ("", "[]", "{", json.dumps(record | {"folders": [1]}), json.dumps({"cache": 1})):
        file.write_text(text)
        caplog.clear()
        assert remembered(root) == []
        assert "the next encode.run replaces it" in caplog.text
        remember(root, [photos])
        assert remembered(root) == [photos]


def test_a_state_folder_that_cannot_be_written_is_a_warning(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        remember(CacheRoot(tmp_path / "cache"), [photos])
    assert "will need --media DIR" in caplog.text
    assert remembered(CacheRoot(tmp_path / "cache")) == []


def test_a_relative_state_folder_is_not_used(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The XDG specification: paths that are not absolute are ignored."""
    monkeypatch.setenv("XDG_STATE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    remember(CacheRoot(tmp_path / "cache"), [photos])
    assert len(list((tmp_path / "home" / ".local" / "state" / "nanomolmo2").rglob("*.json"))) == 1
    assert not (tmp_path / "here").exists()


def test_a_missing_folder_of_media_is_an_error(root: CacheRoot, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no such folder"):
        LocalMedia(root, media=tmp_path / "nowhere")


def test_a_huge_member_is_refused_before_it_is_read(root: CacheRoot, photos: Path) -> None:
    header = tarfile.TarInfo("a.png")
    header.size = 1 << 33
    (photos / "a.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT))
    os.truncate(photos / "a.tar", (1 << 33) + 1024)
    with pytest.raises(MediaFileError):
        read(root, member_source(str(photos / "a.tar"), 512, 1 << 33, "a.png"))
