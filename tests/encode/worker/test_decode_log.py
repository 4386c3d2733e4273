"""The decode log: what each thread decodes, readable after its worker has crashed.

with DecodeLog(path, threads=2).decoding("/a.png", key):
    read_entries(path)          # [DecodeEntry(source="/a.png", ...)]
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cache.store.paths import SpacePaths
from encode.worker.decode_log import DecodeLog, clear_decode_log, decode_log_file, read_entries


def test_an_entry_exists_while_its_block_runs(tmp_path: Path) -> None:
    paths = SpacePaths(tmp_path / "cache" / "spaces" / "s")
    log = DecodeLog(decode_log_file(paths, 3), threads=2)
    long = "https://a.test/" + "ä" * 32_000 + '"\\\n.png'  # of more than 64 kB
    with log.decoding(long, "ab"):
        with log.decoding("/short.png", "cd"):
            found = read_entries(decode_log_file(paths, 3))
            assert {e.source for e in found} == {long, "/short.png"}
            assert all(0 <= time.time() - e.since < 5 for e in found)
        assert [e.source for e in read_entries(decode_log_file(paths, 3))] == [long]
        with pytest.raises(ValueError, match="boom"), log.decoding("/second.png", "ef"):
            raise ValueError("boom")
    assert read_entries(decode_log_file(paths, 3)) == []
    log.close()
    assert not decode_log_file(paths, 3).exists()


def test_the_next_job_finds_the_entries_of_a_dead_worker(tmp_path: Path) -> None:
    paths = SpacePaths(tmp_path / "cache" / "spaces" / "s")
    log = DecodeLog(decode_log_file(paths, 3), threads=2)
    with log.decoding("/a.png", "ab"):
        assert [e.source for e in clear_decode_log(paths)] == ["/a.png"]
        assert clear_decode_log(paths) == []
    log.close()


def test_a_torn_entry_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "w.decoding"
    path.write_bytes(b'{"source": "/a.png", "key": "ab", "sin')
    assert read_entries(path) == []
    assert read_entries(tmp_path / "never") == []
