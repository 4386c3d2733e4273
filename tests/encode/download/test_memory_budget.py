"""Bodies in memory stay within the budget, and every download gets its share in the end.

reservation = Reservation(MemoryBudget(512 << 20), asyncio.get_running_loop())
await reservation.acquire()         # the first share
reservation.grow(length, length)    # the whole body, or OverBudgetError
reservation.release()
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import random
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encode.download.client import Fetched
from encode.download.memory_budget import FIRST_SHARE, MemoryBudget, Reservation
from encode.errors import OverBudgetError
from tests.support.web_server import (
    Act,
    Handler,
    MakeFetcher,
    TroubleServer,
    chunked,
    instead,
    outcome,
    until_closed,
    wait_until,
)

pytestmark = pytest.mark.slow


KB = 1 << 10
BODY = 200 * KB
LIMIT = 256 * KB
Futures = list[concurrent.futures.Future[Fetched]]


# ---- reservations


def reservations(budget: MemoryBudget, count: int) -> list[Reservation]:
    return [Reservation(budget, asyncio.get_running_loop()) for _ in range(count)]


async def run_loop() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_downloads_that_do_not_fit_wait_in_order() -> None:
    async def scenario() -> None:
        budget = MemoryBudget(8 * FIRST_SHARE)
        many = reservations(budget, 6)
        waiting = [asyncio.ensure_future(reservation.acquire()) for reservation in many]
        await run_loop()
        assert [w.done() for w in waiting] == [True] * 4 + [
            False
        ] * 2  # the first half of the budget
        many[0].shrink(10)
        await run_loop()
        assert not waiting[4].done()  # a small body is still in memory
        many[0].release()
        many[0].release()
        await run_loop()
        assert [w.done() for w in waiting] == [True] * 5 + [False]
        waiting[5].cancel()
        await run_loop()
        for reservation in many[:5]:
            reservation.release()
        assert budget.used == 0

    asyncio.run(scenario())


def test_a_body_without_room_to_grow_starts_again_with_all_it_needs() -> None:
    async def scenario() -> None:
        budget = MemoryBudget(10 * FIRST_SHARE)
        one, two = reservations(budget, 2)
        await one.acquire()
        await two.acquire()
        one.grow(6 * FIRST_SHARE, 6 * FIRST_SHARE)
        with pytest.raises(OverBudgetError):
            two.grow(4 * FIRST_SHARE + 1, 9 * FIRST_SHARE)
        assert two.held == 0 and budget.used == one.held
        again = asyncio.ensure_future(two.acquire())
        await run_loop()
        assert not again.done()
        one.shrink(FIRST_SHARE)
        await run_loop()
        assert again.done() and two.held == 9 * FIRST_SHARE
        two.grow(9 * FIRST_SHARE, 9 * FIRST_SHARE)

    asyncio.run(scenario())


def test_one_awaited_body_at_a_time_may_exceed_the_budget() -> None:
    async def scenario() -> None:
        budget = MemoryBudget(4 * FIRST_SHARE)
        full, one, two, three = reservations(budget, 4)
        await full.acquire()
        full.grow(4 * FIRST_SHARE, 4 * FIRST_SHARE)
        waiting = [
            asyncio.ensure_future(reservation.acquire()) for reservation in (one, two, three)
        ]
        await run_loop()
        assert not any(w.done() for w in waiting)
        two.prioritize()
        three.prioritize()
        await run_loop()
        assert [w.done() for w in waiting] == [False, True, False]
        two.grow(4 * FIRST_SHARE, 4 * FIRST_SHARE)
        two.shrink(3 * FIRST_SHARE)
        await run_loop()
        assert [w.done() for w in waiting] == [False, True, True]
        one.prioritize()
        await run_loop()
        assert not waiting[0].done()
        three.release()
        await run_loop()
        assert waiting[0].done()

    asyncio.run(scenario())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12), st.booleans(), st.booleans())
def test_any_downloads_finish_within_the_budget(
    seed: int, bodies: int, in_order: bool, known: bool
) -> None:
    """Sizes and delays are random; the consumer takes bodies in order, or as they arrive."""
    chance = random.Random(seed)
    largest = 20 * FIRST_SHARE
    total = largest * chance.choice([1, 2, 4])
    sizes = [chance.choice([0, 100, FIRST_SHARE, 3 * FIRST_SHARE, largest]) for _ in range(bodies)]

    async def fetch(reservation: Reservation, size: int, places: asyncio.Semaphore) -> None:
        while True:
            await reservation.acquire()
            try:
                async with places:
                    await asyncio.sleep(0)
                    reservation.check_room()
                    if known:
                        reservation.grow(size, size)
                    got = 0
                    while got < size:
                        await asyncio.sleep(0)
                        got = min(size, got + FIRST_SHARE)
                        if got > reservation.held:
                            reservation.grow(min(largest, 2 * got), largest)
                reservation.shrink(size)
                return
            except OverBudgetError:
                continue

    async def scenario() -> None:
        budget = MemoryBudget(total)
        places = asyncio.Semaphore(chance.randint(1, 4))
        many = reservations(budget, bodies)
        jobs = [
            asyncio.ensure_future(fetch(reservation, size, places))
            for reservation, size in zip(many, sizes, strict=True)
        ]
        if not in_order:
            for reservation, job in zip(many, jobs, strict=True):
                job.add_done_callback(lambda _, reservation=reservation: reservation.release())
            await asyncio.wait(jobs)
        for reservation, job in zip(many, jobs, strict=True):
            reservation.prioritize()
            await job
            assert budget.used <= total + largest
            reservation.release()
        assert budget.used == 0
        assert not budget._queue

    asyncio.run(asyncio.wait_for(scenario(), 10))


# ---- with a server


def late(h: Handler, _: bytes, __: int) -> None:
    h.wait(0.3)
    h.send(bytes(BODY))


ARRAYS: dict[str, Act] = {
    "large": instead(bytes(BODY)),
    "in-chunks": lambda h, _, n: chunked(h, bytes(BODY), n),
    "unsaid": lambda h, _, n: until_closed(h, bytes(BODY), n),
    "late": late,
    "flaky": lambda h, _, n: h.send(b"", status=503) if n <= 2 else h.send(bytes(BODY)),
}


@pytest.fixture(scope="module")
def server() -> Iterator[TroubleServer]:
    with TroubleServer(photos=1, extra=ARRAYS) as one:
        yield one


@pytest.fixture
def small_fetcher(fetcher: MakeFetcher) -> MakeFetcher:
    small = {"max_bytes": LIMIT, "budget_bytes": 3 * LIMIT, "read_s": 5, "total_s": 10}
    return lambda **changed: fetcher(**(small | changed))


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list with the largest number of bytes that any budget had reserved."""
    most = [0]
    hold = MemoryBudget._hold

    def held(self: MemoryBudget, reservation: Reservation, size: int) -> None:
        hold(self, reservation, size)
        most[0] = max(most[0], self.used)

    monkeypatch.setattr(MemoryBudget, "_hold", held)
    return most


def in_order(futures: Futures) -> int:
    for future in futures:
        fetched = future.result(20)
        assert len(fetched.data) == BODY
        fetched.release()
    return len(futures)


def as_they_come(futures: Futures) -> int:
    return sum(in_order([future]) for future in concurrent.futures.as_completed(futures, 20))


def in_threads(futures: Futures) -> int:
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        return sum(pool.map(lambda future: in_order([future]), futures))


@pytest.mark.parametrize("consume", [in_order, as_they_come, in_threads])
def test_more_bodies_than_fit_are_all_downloaded(
    server: TroubleServer,
    watch: list[int],
    small_fetcher: MakeFetcher,
    consume: Callable[[Futures], int],
) -> None:
    one = small_fetcher()
    kinds = ["late", *(kind for _ in range(8) for kind in ARRAYS)]
    assert consume([one.submit(server.url(kind)) for kind in kinds]) == len(kinds)
    wait_until(lambda: one._budget.used == 0)
    beyond = LIMIT if consume is not as_they_come else 0
    if consume is in_threads:  # each of six threads holds one
        beyond = 6 * LIMIT
    assert BODY < watch[0] <= 3 * LIMIT + beyond


def test_a_consumer_may_collect_more_bodies_than_fit(
    server: TroubleServer, small_fetcher: MakeFetcher
) -> None:
    """The consumer waits for each body while it keeps the others, so the budget is exceeded."""
    one = small_fetcher(budget_bytes=LIMIT)
    futures = [one.submit(server.url("large")) for _ in range(12)]
    fetched = [future.result(20) for future in futures]
    assert sum(len(f.data) for f in fetched) == 12 * BODY
    for got in fetched:
        got.release()
    wait_until(lambda: one._budget.used == 0)


def test_nothing_is_downloaded_ahead_while_the_budget_is_used_up(
    server: TroubleServer, small_fetcher: MakeFetcher
) -> None:
    one = small_fetcher()
    futures = [one.submit(server.url("large")) for _ in range(20)]
    # No thread waits for a result: an awaited body may exceed the budget.
    wait_until(lambda: any(future.done() for future in futures))
    time.sleep(0.5)
    finished = [future for future in futures if future.done()]
    assert len(finished) * BODY <= 3 * LIMIT
    before = server.counts["/large"]
    time.sleep(0.3)
    assert server.counts["/large"] == before  # nor are requests repeated
    assert one._budget.used <= 3 * LIMIT
    assert in_order(futures) == 20


def test_a_dropped_body_is_released(server: TroubleServer, small_fetcher: MakeFetcher) -> None:
    one = small_fetcher()
    for _ in range(30):
        one.submit(server.url("large")).result(10)
    gc.collect()
    wait_until(lambda: one._budget.used == 0)
    kept = one.submit(server.url("large")).result(10)
    time.sleep(0.05)
    assert one._budget.used == len(kept.data) == BODY
    kept.release()
    kept.release()
    wait_until(lambda: one._budget.used == 0)
    one.close()
    kept.release()


def test_failed_and_cancelled_downloads_release_their_memory(
    server: TroubleServer, small_fetcher: MakeFetcher
) -> None:
    one = small_fetcher(read_s=0.3, total_s=0.5, tries=2)
    kinds = ("404", "500", "truncated", "200-mb", "200-mb-unsaid", "stall", "slow", "wrong-sha")
    futures = [one.submit(server.url(kind), sha256="0" * 64) for kind in kinds]
    cancelled = [one.submit(server.url("late")) for _ in range(10)]
    time.sleep(0.1)
    for future in cancelled:
        future.cancel()
    assert not any(isinstance(outcome(future), Fetched) for future in futures)
    wait_until(lambda: one._budget.used == 0)
    assert not one._budget._queue


def test_many_threads_may_submit_and_wait_for_results(
    server: TroubleServer, small_fetcher: MakeFetcher
) -> None:
    one = small_fetcher()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        done = pool.map(lambda _: in_order([one.submit(server.url("large"))]), range(32))
        assert sum(done) == 32
