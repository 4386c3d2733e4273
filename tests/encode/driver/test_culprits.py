"""Finding the file that crashes or hangs its worker.

rejected, retried = Culprits().judge(decoding, alone=None, hung=False)
"""

from __future__ import annotations

from pathlib import Path

import pytest

from configs import UserError
from encode.driver.culprits import Culprits, HangWatch, rejection
from encode.worker.decode_log import DecodeEntry
from encode.worker.local_files import identify
from encode.worker.messages import SourceTask
from model.media.images import Failure


def test_a_file_is_rejected_only_when_decoded_alone_and_after_two_crashes() -> None:
    a, b = SourceTask(source="/a"), SourceTask(source="/b")
    culprits = Culprits()
    assert culprits.judge([a, b], None, hung=False) == ([], [a, b])
    assert culprits.judge([a, b], None, hung=True) == ([], [a, b]), "either of them may hang"
    assert culprits.judge([a], a, hung=False) == ([], [a])
    assert culprits.judge([], a, hung=False) == ([], []), "it was not decoding the file"
    assert culprits.judge([a], a, hung=False) == ([a], [])
    assert culprits.judge([b], b, hung=True) == ([b], [])


def test_crashes_without_progress_stop_the_job() -> None:
    culprits = Culprits()
    for settled in (0, 0, 0, 0, 0, 7, 7, 7, 7, 7):
        culprits.count_crash(settled, "why")
    with pytest.raises(UserError, match=r"6 workers in a row .* the last one: out of memory"):
        culprits.count_crash(7, "out of memory")


def test_a_rejection_is_valid_until_the_bytes_change(tmp_path: Path) -> None:
    path = tmp_path / "deadly.png"
    path.write_bytes(b"boom")
    record = rejection(SourceTask(source=str(path), attempts=1), "", hung=False).failed_record()
    assert (record.status, record.stage, record.attempts) == ("failed", "decode", 2)
    assert record.error == "crashed its worker, also when decoded alone"
    identity = identify(str(path))
    assert identity is not None
    assert identity.matches(record)
    path.unlink()
    hung = rejection(SourceTask(source=str(path)), "", hung=True)
    assert hung.failure == Failure("decode", "hung its worker, also when decoded alone")
    linked = rejection(SourceTask(source="https://host/a.jpg"), "ab" * 32, hung=True)
    assert linked.record.key == "ab" * 32


def test_hanging_is_measured_by_this_machines_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("encode.driver.culprits.time.monotonic", lambda: clock[0])
    watch = HangWatch(60.0)

    def entry(source: str, since: float) -> DecodeEntry:
        return DecodeEntry(source=source, key="ab", since=since)

    a, b = entry("/a", 5.0), entry("/b", 9e9)  # clocks of other nodes may be years off
    assert watch.hanging(1, [a, b]) == []
    clock[0] += 59.0
    assert watch.hanging(1, [a, b]) == []
    clock[0] += 2.0
    assert watch.hanging(1, [a, entry("/b", 9e9 + 1)]) == [a], "the other one has made progress"
    assert watch.hanging(2, [a]) == [], "another worker decodes it"
    watch.forget(1)
    assert watch.hanging(1, [a]) == []
