"""The private folder of a Ray: who can enter it, and what becomes of those that killed drivers have left.

with private_folder() as folder, ray_environment(folder / "token"):
    ray.init(..., _temp_dir=str(folder / "ray"))
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs import UserError
from encode.driver.ray_session import (
    SESSION,
    SOCKET,
    SOCKET_BYTES,
    private_folder,
    ray_environment,
    remove_dead,
)
from tests.support import ROOT


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of temporary files: one with a short path, which pytest's own is not."""
    with tempfile.TemporaryDirectory(prefix="g", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_the_folder_is_private_and_is_removed(parent: Path) -> None:
    tokens = []
    before = os.umask(0)
    try:
        for _ in range(2):
            with private_folder() as folder:
                assert folder.parent == parent
                assert mode(folder) == 0o700
                assert mode(folder / "token") == 0o600
                tokens.append(bytes.fromhex((folder / "token").read_text()))
                (folder / "ray" / "logs").mkdir(parents=True)
                (folder / "ray" / "logs" / "raylet.out").write_text("text")
            assert list(parent.iterdir()) == []
    finally:
        os.umask(before)
    assert len(tokens[0]) == 32
    assert tokens[0] != tokens[1]


def test_the_folder_is_removed_after_an_error(parent: Path) -> None:
    with pytest.raises(KeyboardInterrupt), private_folder():
        raise KeyboardInterrupt
    assert list(parent.iterdir()) == []


KILLED = """
import os, signal
from encode.driver.ray_session import private_folder
with private_folder() as folder:
    (folder / "ray").mkdir()
    (folder / "ray" / "session_latest").symlink_to("OUTSIDE")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_folder_of_a_killed_driver_is_removed_by_the_next(parent: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("kept")
    code = KILLED.replace("OUTSIDE", str(outside))
    with private_folder() as alive:
        killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
        assert killed.returncode == -signal.SIGKILL
        assert len(list(parent.iterdir())) == 2
        with private_folder() as new:
            assert set(parent.iterdir()) == {alive, new}, (
                "the dead one is gone, the live one is not"
            )
    assert list(parent.iterdir()) == []
    assert (outside / "file").read_text() == "kept"


def dead(parent: Path, name: str = "nm2-aaaaaaaa") -> Path:
    """Create what a killed driver leaves behind."""
    folder = parent / name
    folder.mkdir(mode=0o700)
    (folder / SESSION).touch()
    (folder / "ray").mkdir()
    return folder


def test_a_dead_folder_is_removed_whatever_is_in_it(parent: Path) -> None:
    (dead(parent) / "ray" / "file").touch()
    remove_dead(parent)
    assert list(parent.iterdir()) == []


def test_a_folder_half_removed_is_removed(parent: Path) -> None:
    (dead(parent) / "ray").rmdir()
    remove_dead(parent)
    assert list(parent.iterdir()) == []


def test_a_folder_that_cannot_be_removed_is_removed_later(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rmtree = shutil.rmtree

    def fail_for_ray(path: Path, *, ignore_errors: bool) -> None:
        if path.name != "ray":
            rmtree(path, ignore_errors=ignore_errors)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail_for_ray)
        with private_folder() as folder:
            (folder / "ray").mkdir()
        assert folder.exists()
    remove_dead(parent)
    assert list(parent.iterdir()) == []


def other_name(folder: Path) -> Path:
    return folder.rename(folder.with_name("results"))


def no_mark(folder: Path) -> Path:
    (folder / SESSION).unlink()
    return folder


def open_to_the_group(folder: Path) -> Path:
    folder.chmod(0o750)
    return folder


def fifo_as_mark(folder: Path) -> Path:
    os.mkfifo(no_mark(folder) / SESSION)
    return folder


def folder_as_mark(folder: Path) -> Path:
    (no_mark(folder) / SESSION).mkdir()
    return folder


def linked_mark(folder: Path) -> Path:
    (folder / SESSION).rename(folder / "other")
    (folder / SESSION).symlink_to("other")
    return folder


def linked_folder(folder: Path) -> Path:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")
    return folder


def a_file(folder: Path) -> Path:
    folder.rename(folder.with_name("elsewhere"))
    folder.touch(mode=0o600)
    return folder


@pytest.mark.parametrize(
    "change",
    [
        *(other_name, no_mark, open_to_the_group, linked_folder, a_file),
        *(linked_mark, fifo_as_mark, folder_as_mark),
    ],
)
def test_nothing_else_is_removed(parent: Path, change: object) -> None:
    assert callable(change)
    kept = change(dead(parent))
    before = sorted(parent.rglob("*"))
    second = dead(parent, "nm2-bbbbbbbb")
    remove_dead(parent)
    assert not second.exists(), "one that is kept does not keep the others"
    assert sorted(parent.rglob("*")) == before
    assert os.path.lexists(kept)


def test_the_folder_of_another_user_is_kept(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = dead(parent)
    monkeypatch.setattr(os, "geteuid", lambda: kept.stat().st_uid + 1)
    remove_dead(parent)
    assert kept.exists()


def test_a_locked_folder_is_kept_until_its_driver_ends(parent: Path) -> None:
    folder = dead(parent)
    with (folder / SESSION).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_dead(parent)
        assert folder.exists()
    remove_dead(parent)
    assert not folder.exists()


def test_a_file_system_without_locks(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with private_folder() as first, private_folder() as second:
        assert first.exists(), "it is not known to be dead"
        assert second.exists()
    assert list(parent.iterdir()) == []


@pytest.mark.parametrize("name", ["a", "ä"])
def test_the_path_of_a_socket_is_short_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / (name * 60)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with private_folder() as private:
        assert len(os.fsencode(private.parent)) + 1 + len(SOCKET) <= SOCKET_BYTES
        assert private.parent == Path("/tmp")
    assert not private.exists()


def test_a_folder_of_just_the_right_length_is_used(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = SOCKET_BYTES - 1 - len(SOCKET) - len(os.fsencode(parent)) - 1
    fits, too_long = parent / ("a" * room), parent / ("a" * (room + 1))
    for folder, used in ((fits, fits), (too_long, Path("/tmp"))):
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        with private_folder() as private:
            assert private.parent == used


def test_no_folder_for_temporary_files_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/missing")
    with pytest.raises(UserError, match=r"/missing.*: set TMPDIR to one .* --workers 0$"):
        private_folder().__enter__()


def test_the_environment_is_as_before_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of another Ray")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    before = dict(os.environ)
    with ray_environment(tmp_path / "token"):
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "token")
        assert "RAY_AUTH_TOKEN" not in os.environ
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert dict(os.environ) == before
