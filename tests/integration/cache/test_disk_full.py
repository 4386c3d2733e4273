"""A disk that is really full gives one clear line and loses nothing committed; the same command continues."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cache.errors import DiskError, InUseError
from cache.maintenance.checks import verify
from cache.store.files import disk_full
from cache.store.ledger import read_media
from cache.store.locks import DriverLock
from cache.store.paths import CacheRoot
from encode.worker.worker import Worker
from tests.support.encode_jobs import CONFIG, draw, encode

SIZE = 80 << 20
"""More than a job leaves free (`configs.console.SPARE_BYTES`), or it would be refused beforehand."""


class Disk:
    """A small file system, or a folder that behaves like one where none may be mounted."""

    def __init__(self, folder: Path, mounted: bool, monkeypatch: pytest.MonkeyPatch):
        self.folder, self._mounted = folder, mounted
        self._ballast = folder / "ballast"
        self._full = False
        if not mounted:  # every write of ours beneath it is refused while it is full
            for call in ("pwritev", "pwrite"):
                monkeypatch.setattr(os, call, self._guarded(getattr(os, call)))

    def _guarded(self, real: object) -> object:
        def guarded(*args: object) -> object:
            if self._full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args)  # type: ignore[operator]

        return guarded

    def fill(self) -> None:
        """Somebody else's file takes all that is left."""
        self._full = True
        if not self._mounted:
            return
        with self._ballast.open("wb", buffering=0) as file:
            for piece in (1 << 16, 1 << 12, 1):
                try:
                    while file.write(b"x" * piece):
                        pass
                except OSError as error:
                    assert error.errno == errno.ENOSPC

    def free(self) -> None:
        self._full = False
        self._ballast.unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    print("a real tmpfs" if mounted else "no right to mount: refused writes instead")
    yield Disk(folder, mounted, monkeypatch)
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_an_encode_job_on_a_disk_that_fills_up(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path / "images", 24)
    media = f"folder:{tmp_path / 'images'}"
    config = replace(CONFIG, encoder=replace(CONFIG.encoder, batch_size=2))
    whole = encode(tmp_path / "whole", media, config=config).reader.logical_hash()
    cache = disk.folder / "cache"

    class Greedy(Worker):
        """After eight images, the disk is full."""

        seen = 0

        def decode(self, data: bytes) -> object:
            Greedy.seen += 1
            if Greedy.seen == 8:
                disk.fill()
            return super().decode(data)

    with pytest.raises(DiskError) as full:
        try:
            encode(cache, media, config=config, worker_class=Greedy)
        except OSError as error:  # as encode.run's main does
            raise (disk_full(error, cache) or error) from error
    assert str(full.value).startswith(f"disk full ({cache}")
    assert "\n" not in str(full.value)
    report = verify(CacheRoot(cache), deep=True)
    assert not report.broken
    kept = sum(report.spaces[0].rows.values())
    disk.free()
    result = encode(cache, media, config=config)
    assert result.job._tracker.encoded == 24 - kept
    assert 0 < kept < 24
    assert result.reader.logical_hash() == whole
    assert len(read_media(CacheRoot(cache))) == 24


def test_the_error_of_a_second_job_names_the_first_and_nothing_changes(tmp_path: Path) -> None:
    draw(tmp_path / "images", 2)
    first = encode(tmp_path / "cache", f"folder:{tmp_path / 'images'}")
    draw(tmp_path / "images", 4)
    whole = first.reader.logical_hash()
    with (
        DriverLock(first.paths, "process 7 on node-3"),
        pytest.raises(InUseError, match="is being written by process 7 on node-3; wait until that"),
    ):
        encode(tmp_path / "cache", f"folder:{tmp_path / 'images'}")
    assert first.reader.logical_hash() == whole
    assert not verify(first.root, deep=True).broken
    assert encode(tmp_path / "cache", f"folder:{tmp_path / 'images'}").job._tracker.encoded == 2
