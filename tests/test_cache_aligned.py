"""A file written in large aligned calls: the bytes asked for, whatever the sizes and whatever fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache import aligned
from cache.aligned import AlignedFile

PAGE, CALL = 16, 48


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aligned, "HUGE_PAGE", PAGE)
    monkeypatch.setattr(aligned, "CALL_BYTES", CALL)
    monkeypatch.setattr(aligned, "CALL_BUFFERS", 5)


class Disk:
    """Every call: where, and how long; now and then one fails, before or after some of it was written."""

    def __init__(self, fails: Iterator[bool], half: bool):
        self.real, self.fails, self.half = os.pwritev, fails, half
        self.calls: list[tuple[int, int]] = []

    def __call__(self, fd: int, buffers: list[Any], at: int) -> int:
        assert len(buffers) <= 5
        data = b"".join(buffers)
        if next(self.fails):
            if self.half:
                os.pwrite(fd, data[: len(data) // 2], at)
            raise OSError(28, "No space left on device")
        self.calls.append((at, len(data)))
        return self.real(fd, buffers, at)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    asked=st.lists(st.lists(st.binary(max_size=70), max_size=8), max_size=12),
    tail=st.binary(max_size=40),
    failing=st.lists(st.booleans(), max_size=10),
    half=st.booleans(),
)
def test_the_bytes_asked_for_in_aligned_calls(
    tmp_path_factory: pytest.TempPathFactory,
    asked: list[list[bytes]],
    tail: bytes,
    failing: list[bool],
    half: bool,
) -> None:
    path = tmp_path_factory.mktemp("aligned") / "file"
    disk = Disk((failing.pop() if failing else False for _ in iter(int, 1)), half)
    file, expected = AlignedFile(path), b""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwritev", disk)
        for buffers in asked:
            lent = [bytearray(buffer) for buffer in buffers]
            try:
                file.extend(lent)
                expected += b"".join(buffers)
            except OSError:
                pass
            for buffer in lent:
                buffer[:] = b"?" * len(buffer)
        rows = [call for call in disk.calls if call[1]]
        assert all(at % PAGE == length % PAGE == 0 and length <= CALL for at, length in rows)
        while True:
            try:
                file.finish(tail)
                break
            except OSError:
                pass
    file.close()
    file.close()
    assert path.read_bytes() == expected + tail


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"other")
    with pytest.raises(FileExistsError):
        AlignedFile(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"other"
