"""Reservations, shard numbers and timings.

registrar = Registrar(committed=["a"], next_shard={"image": 7})
registrar.reserve(1, ["a", "b"])        # [False, True]
registrar.next_shard(1, "image")        # 7
"""

from __future__ import annotations

import pytest

from cache.errors import StaleJobError
from encode.worker.messages import Registrar, Timings


def test_each_media_item_and_each_shard_number_is_given_once() -> None:
    registrar = Registrar(["a"], {"image": 7})
    assert registrar.reserve(1, ["a", "b", "b", "c"]) == [False, True, False, True]
    assert registrar.reserve(2, ["b", "d"]) == [False, True]
    assert [registrar.next_shard(w, "image") for w in (1, 2, 1)] == [7, 8, 9]
    assert registrar.shards(1) == [("image", 7), ("image", 9)]
    assert registrar.release(1, {"b"}) == ["c"]
    assert registrar.reserve(2, ["b", "c"]) == [False, True]
    assert registrar.report(2, Timings(media=3))
    registrar.stop()
    assert not registrar.report(1, Timings(media=4))
    assert registrar.timings().media == 7


def test_a_worker_that_was_released_gets_nothing() -> None:
    """Its process may run on, on a node that cannot be reached. Nobody would encode what it reserves."""
    registrar = Registrar([], {"image": 0})
    assert registrar.reserve(1, ["a"]) == [True]
    assert registrar.report(1, Timings(media=1))
    assert set(registrar.silent_s()) == {1}
    assert registrar.release(1, ()) == ["a"]
    with pytest.raises(StaleJobError, match="worker 1 was replaced by its driver"):
        registrar.reserve(1, ["b"])
    assert not registrar.report(1, Timings(media=2))
    assert registrar.reserve(2, ["a", "b"]) == [True, True]
    assert registrar.by_worker() == {1: Timings(media=2)}


def test_the_bound_is_the_slowest_stage() -> None:
    assert Timings(wait_s=1, encode_s=5, write_s=2).bound() == "encode"
    assert Timings(wait_s=1, encode_s=2, write_s=5).bound() == "write"
    assert Timings(wait_s=9, encode_s=2, write_s=5, read_s=7, decode_s=3).bound() == "read"
    assert Timings(wait_s=9, encode_s=2, write_s=5, read_s=3, decode_s=7).bound() == "decode"
