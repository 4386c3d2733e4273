"""The memory of all decoding threads together: items wait for room, in the order of their turns.

budget = DecodeBudget(total=100, little=0)
with budget.room(budget.turn(), 60, waiting=lambda: True):
    ...                                 # another item of 60 bytes waits meanwhile
"""

from __future__ import annotations

import io
import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from encode.worker import decode_budget, prefetch
from encode.worker.decode_budget import ITEM_BYTES, DecodeBudget
from encode.worker.decode_log import DecodeLog
from encode.worker.media_item import EncoderInput, MediaItem, Pixels
from encode.worker.messages import SourceTask
from encode.worker.prefetch import Prefetcher
from model.media.images import BadMediaError, DecodedImage, decode_noted
from tests.support.encode_jobs import CONFIG


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def start(budget: DecodeBudget, turn: int, nbytes: int, inside: list[int]) -> threading.Event:
    """Take a turn in a thread, which is in `inside` while it has room, and ends after the event is set."""
    end = threading.Event()

    def work() -> None:
        with budget.room(turn, nbytes, lambda: True):
            inside.append(turn)
            end.wait(20)
            inside.remove(turn)

    threading.Thread(target=work, daemon=True).start()
    return end


def test_items_wait_for_room_in_the_order_of_their_turns() -> None:
    budget, inside = DecodeBudget(100, little=0), list[int]()
    turns = [budget.turn() for _ in range(4)]
    # Of the second and third only one fits beside the first; the last would fit, and is not their turn.
    ends = [
        start(budget, t, n, inside)
        for t, n in reversed(list(zip(turns, (40, 50, 70, 10), strict=True)))
    ]
    ends.reverse()
    wait_until(lambda: sorted(inside) == [0, 1] and budget.used == 90)
    ends[0].set()
    time.sleep(0.02)
    assert inside == [1]
    ends[1].set()
    wait_until(lambda: sorted(inside) == [2, 3] and budget.used == 80)
    for end in ends:
        end.set()
    wait_until(lambda: budget.used == 0)


def test_an_item_that_needs_little_waits_for_nothing_and_passes_its_turn_on() -> None:
    budget, inside = DecodeBudget(100, little=10), list[int]()
    turns = [budget.turn() for _ in range(4)]
    little = [start(budget, turns[number], 10, inside) for number in (3, 1)]
    wait_until(lambda: sorted(inside) == [1, 3])
    assert budget.used == 0
    last = start(budget, turns[2], 90, inside)  # behind the first, which has not come
    first = start(budget, turns[0], 90, inside)
    wait_until(lambda: sorted(inside) == [0, 1, 3])
    assert budget.used == 90
    first.set()
    wait_until(lambda: sorted(inside) == [1, 2, 3])
    for end in (*little, last):
        end.set()
    wait_until(lambda: not inside and budget.used == 0)
    with budget.room(budget.turn(), 100, lambda: True):  # all turns before it are used
        assert budget.used == 100


def test_an_item_above_the_budget_is_decoded_alone() -> None:
    budget, inside = DecodeBudget(100, little=0), list[int]()
    ends = [start(budget, budget.turn(), n, inside) for n in (1, 1000, 1)]
    for number, end in enumerate(ends):
        wait_until(lambda number=number: inside == [number])
        end.set()


def test_an_item_above_the_limit_fails_in_one_line_and_passes_its_turn_on() -> None:
    budget = DecodeBudget(100, little=0)
    with (
        pytest.raises(
            BadMediaError, match=r"needs 8\.6 GB to be decoded, at most 4\.3 GB are used"
        ) as bad,
        budget.room(budget.turn(), 2 * ITEM_BYTES, lambda: True),
    ):
        pass
    assert bad.value.stage == "decode" and budget.used == 0
    with budget.room(budget.turn(), 1, lambda: True):
        assert budget.used == 1
    late = budget.turn() + 1
    with budget.room(late, 1, lambda: False):  # the job ends
        pass


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((40, 50, 3), number, np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_the_threads_of_a_worker_decode_what_fits_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 12 images each needs half of the budget, by its header; one is no image."""
    monkeypatch.setattr(
        decode_budget.DecodeBudget.__init__, "__defaults__", (40 * 50 * 9 * 2 + 1000, 0)
    )
    running, most, lock = itertools.count(), [0, 0], threading.Lock()

    class Worker:
        def reserve(self, ids: list[str]) -> list[bool]:
            return [True] * len(ids)

        def decode(self, data: bytes) -> DecodedImage:
            if data[:3] == b"GIF":
                return decode_noted(data)
            with lock:
                most[0] += 1
                most[1] = max(most)
            time.sleep(0.01)
            with lock:
                most[0] -= 1
            next(running)
            return decode_noted(data)

        def prepare(self, image: DecodedImage) -> Pixels:
            return np.asarray(image.image)

    names = [tmp_path / f"{number}.png" for number in range(12)]
    for number, name in enumerate(names):
        name.write_bytes(b"GIF89a" if number == 5 else png(number))
    log = DecodeLog(tmp_path / "worker.decoding", threads=4)
    config = prefetch.replace(CONFIG, threads=4)
    prefetcher = Prefetcher(Worker(), config, log, ahead=20, batch_size=4)  # type: ignore[arg-type]
    got: list[EncoderInput | MediaItem] = []
    for name in names:
        prefetcher.put(SourceTask(source=str(name)))
    while sum(isinstance(one, MediaItem) for one in got) < len(names):
        if (one := prefetcher.get(timeout_s=20)) is not None:
            got.append(one)
    prefetcher.close()
    log.close()
    assert most[1] == 2
    items = [one for one in got if isinstance(one, MediaItem)]
    assert [Path(item.task.source).stem for item in items] == [str(n) for n in range(12)]
    assert [item.failure is not None for item in items] == [n == 5 for n in range(12)]
