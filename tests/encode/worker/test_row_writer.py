"""The writer thread: which rows share a shard, and waiting for room.

writer = RowWriter(space, next_shard=..., fence=..., done=outcomes.append, commit_every_s=60.0)
writer.put(item)
writer.commit()         # outcomes has the item's Outcome now
"""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

from cache.store.ledger import MediaRecord
from cache.store.space import Space
from cache.store.writer import NewRow
from encode.worker.media_item import MediaItem
from encode.worker.messages import Outcome, SourceTask
from encode.worker.row_writer import RowWriter
from tests.support.spaces import committed_rows, key, make_space, row


def writer_of(made: Space) -> tuple[RowWriter, list[Outcome]]:
    """Return a writer of this space, and the list of its outcomes."""
    numbers = itertools.count()
    done: list[Outcome] = []
    writer = RowWriter(
        made,
        next_shard=lambda _: next(numbers),
        fence=lambda: None,
        done=done.append,
        commit_every_s=60.0,
    )
    return writer, done


def test_a_video_that_does_not_fit_into_the_open_shard_starts_a_new_one(tmp_path: Path) -> None:
    """The first video leaves room for one row. A video larger than a shard continues in the next shard."""
    made = make_space(tmp_path)
    slots = made.rows_per_shard("frame")
    lengths = (slots - 1, slots - 1, slots + 2, 2)
    writer, done = writer_of(made)
    for video, length in enumerate(lengths):
        task = SourceTask(source=f"/{video}", kind="video")
        record = MediaRecord(source=task.source, kind="video", key=key(video))
        rows = [
            NewRow(key=key(video), view=f"t:{i}", time_s=float(i), payload=row(i, "frame"))
            for i in range(length)
        ]
        writer.put(MediaItem(task=task, record=record, rows=rows))
    writer.commit()
    writer.close()
    assert [outcome.task.source for outcome in done] == ["/0", "/1", "/2", "/3"]
    assert all(outcome.result == "ok" for outcome in done)
    table = committed_rows(made, "frame")
    found = dict(zip(table["row"].to_pylist(), table["key"].to_pylist(), strict=True))
    starts = (0, slots, 2 * slots - 1, 3 * slots + 1)
    assert found == {
        first + i: bytes.fromhex(key(video))
        for video, (first, length) in enumerate(zip(starts, lengths, strict=True))
        for i in range(length)
    }


def test_more_rows_than_may_wait_are_written(tmp_path: Path) -> None:
    """`put` waits for room, and never forever."""
    made = make_space(tmp_path)
    writer, done = writer_of(made)

    def put_all() -> None:
        for number in range(200):
            task = SourceTask(source=f"/{number}")
            record = MediaRecord(source=task.source, key=key(number))
            only = NewRow(key=key(number), view="full", payload=row(number))
            writer.put(MediaItem(task=task, record=record, rows=[only]))

    thread = threading.Thread(target=put_all)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    writer.commit()
    writer.close()
    assert len(done) == 200
