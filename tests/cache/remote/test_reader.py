"""A remote reader returns the stored rows, whatever the network does, and keeps them on the local disk.

reader = open_reader("https://host/features", None, RemoteOptions())
reader.read("image", key)
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
import pytest

from cache.errors import CacheError, RequestError, UnreachableError
from cache.format.checksums import crc32c
from cache.format.codec import CODECS
from cache.format.spec import CONTAINERS
from cache.remote.deadline import Deadline
from cache.remote.http import HttpStore
from cache.remote.open import RemoteCache, RemoteOptions, open_reader
from cache.remote.reader import RemoteReader
from cache.remote.retry import RetryPolicy
from cache.remote.row_cache import RowCache
from cache.share import share
from cache.store import index_file
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.space import find_space
from cache.store.writer import ShardWriter
from tests.support.faults import garble
from tests.support.remote_servers import Act, Handler, WebServer, first
from tests.support.spaces import SLOTS, SPEC, fill, key, make_space
from tests.support.spaces import row as stored_row

pytestmark = pytest.mark.slow


ROWS = 3 * SLOTS
ROW_BYTES = SPEC.row_bytes("image")
POLICY = RetryPolicy(backoff_s=0.01, max_backoff_s=0.02, give_up_after_s=0.3, max_retry_after_s=0.2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> CacheRoot:
    root = CacheRoot(tmp_path_factory.mktemp("there"))
    space = make_space(root.path)
    for start in range(0, ROWS, SLOTS):
        fill(space, range(start, start + SLOTS))
    share(root)
    return root


@pytest.fixture
def server(cache: CacheRoot) -> Iterator[WebServer]:
    with WebServer(cache.path) as running:
        yield running


@pytest.fixture
def reader(server: WebServer, tmp_path: Path) -> RemoteReader:
    return open_remote(server, tmp_path)


@pytest.fixture
def local(cache: CacheRoot) -> FeatureReader:
    return FeatureReader(find_space(cache, None))


def open_remote(server: WebServer, folder: Path, name: str | None = None) -> RemoteReader:
    return RemoteCache(server.url, RemoteOptions(mirror=folder), POLICY).open_reader(name)


def read(reader: FeatureReader, rows: list[int]) -> np.ndarray:
    out = np.zeros((len(rows), ROW_BYTES), np.uint8)
    reader.read_into("image", np.array(rows), out)
    return out


def spans(server: WebServer) -> list[str | None]:
    return [span for _, span in server.shard_requests()]


# ---- requests


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("codec_name", CODECS)
def test_every_format_and_codec_can_be_read(
    tmp_path: Path, container: str, codec_name: str
) -> None:
    space = make_space(tmp_path / "there", codec_name, container=container)
    fill(space, range(SLOTS))
    fill(space, [SLOTS])
    share(CacheRoot(tmp_path / "there"))
    local = FeatureReader(space.paths)
    with WebServer(tmp_path / "there") as server:
        remote = open_remote(server, tmp_path / "here")
        for number in range(SLOTS + 1):
            expected = local.read("image", key(number))
            np.testing.assert_array_equal(remote.read("image", key(number)), expected)
        assert remote.logical_hash() == local.logical_hash()


def test_of_rows_that_are_stored_twice_the_oldest_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_file, "WORTH_COMMITS", 1)
    space = make_space(tmp_path / "there")
    fill(space, [0, 1])
    expected = FeatureReader(space.paths)
    index_file.save_index(space.paths, space.info)
    for numbers in ([1], [1, 0]):  # with other bytes, after the index was saved
        writer = ShardWriter(space, "image", space.next_shard("image"))
        for number in numbers:
            writer.append(key(number), "full", stored_row(100 + number))
        writer.commit()
    share(CacheRoot(tmp_path / "there"))
    with WebServer(tmp_path / "there") as server:
        remote = open_remote(server, tmp_path / "here")
        assert (remote.rows("image"), remote.index["image"].stored) == (2, 5)
        assert remote.logical_hash() == expected.logical_hash()
        assert remote.lookup("image", [key(1), key(0)]).tolist() == [1, 0]
        assert server.row_bytes < 3 * ROW_BYTES, "no other copy is fetched"


def test_rows_equal_those_of_a_local_reader_in_any_order(
    local: FeatureReader, reader: RemoteReader
) -> None:
    for rows in ([5], [11, 0, 7, 7, 0, 3, 4], list(range(ROWS)), []):
        assert (read(reader, rows) == read(local, rows)).all()
    assert reader.logical_hash() == local.logical_hash()
    numbers = [key(i) for i in (3, 999, 0)]
    assert (reader.lookup("image", numbers) == local.lookup("image", numbers)).all()


def test_adjacent_rows_are_one_request_and_no_row_is_fetched_twice(
    server: WebServer, reader: RemoteReader
) -> None:
    read(reader, [2, 0, 1, 1, 6, 4, 3])
    stride = ROW_BYTES + 4
    ranges = ((0, 4 * stride - 5), (0, ROW_BYTES - 1), (2 * stride, 2 * stride + ROW_BYTES - 1))
    assert set(spans(server)) == {f"bytes={start}-{stop}" for start, stop in ranges}
    read(reader, list(range(7)))  # only 5 is new
    assert len(spans(server)) == 4
    assert (reader.stats.rows_fetched, reader.stats.rows_cached) == (7, 6)


def test_only_needed_and_changed_tables_are_copied(tmp_path: Path) -> None:
    there = CacheRoot(tmp_path / "there")
    space = make_space(there.path)
    other = make_space(there.path, "fp16")
    fill(space, [1, 2])
    fill(other, [1, 2])
    share(there)
    int8 = space.paths.name
    with WebServer(there.path) as server:
        open_space = partial(open_remote, server, tmp_path / "here")
        with pytest.raises(CacheError, match=f"2 spaces under {server.url}/, say which: --space"):
            open_space()
        open_space(int8)
        assert not [p for p, _ in server.requests if f"{other.paths.name}/commits" in p]

        server.requests.clear()
        open_space(int8)
        assert [path for path, _ in server.requests] == ["/listing.json"]

        fill(space, [3])
        share(there)
        server.requests.clear()
        assert open_space(int8).rows("image") == 3
        fetched = {path.split("/")[-1] for path, _ in server.requests}
        assert fetched == {"listing.json", "image-00000001.parquet"}

        space.paths.commit("image", 0).unlink()  # as cache.gc does with a replaced shard
        share(there)
        assert open_space(int8).rows("image") == 1


def test_a_damaged_local_copy_is_copied_again(server: WebServer, tmp_path: Path) -> None:
    path = open_remote(server, tmp_path).paths.commit("image", 1)
    garble(path, 40)
    server.requests.clear()
    assert open_remote(server, tmp_path).rows("image") == ROWS
    assert [p.split("/")[-1] for p, _ in server.requests] == ["listing.json", path.name]


# ---- a bad network


def test_a_broken_body_is_continued_where_it_ended(
    server: WebServer, reader: RemoteReader, cache: CacheRoot
) -> None:
    def half(handler: Handler, path: str) -> None:
        handler.file(cache.path / path.lstrip("/"), short=True)

    server.acts["/spaces"] = first(1, half)
    read(reader, [0])
    half_way = ROW_BYTES // 2
    assert spans(server) == [f"bytes=0-{ROW_BYTES - 1}", f"bytes={half_way}-{ROW_BYTES - 1}"]
    assert server.row_bytes == ROW_BYTES


def test_retry_after_is_obeyed_up_to_the_limit(server: WebServer, reader: RemoteReader) -> None:
    wait = {"Retry-After": "31536000"}
    server.acts["/spaces"] = first(1, lambda handler, _: handler.answer(429, b"later", wait))
    started = time.monotonic()
    read(reader, [0])
    assert POLICY.max_retry_after_s <= time.monotonic() - started < 60


def test_a_read_without_progress_ends_with_one_line(
    server: WebServer, reader: RemoteReader
) -> None:
    server.acts["/spaces"] = lambda handler, _: handler.answer(503, b"")
    with pytest.raises(UnreachableError) as error:
        read(reader, [0, 5, 9])
    text = str(error.value)
    assert text.startswith(f"{server.url}/spaces/") and "503 Service Unavailable" in text
    assert "tried" in text and "\n" not in text


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, b""), r"/c/0/0/0: 404 Not Found from 127.0.0.1$"),
        ((200, bytes(10_000)), "ignores Range requests"),
        (
            (206, bytes(ROW_BYTES), {"Content-Range": f"bytes 0-{ROW_BYTES - 1}/{10**9}"}),
            "1,000,000,000 bytes, not the .* of its commit",
        ),
    ],
)
def test_an_answer_that_stays_wrong_is_reported_after_one_request(
    server: WebServer, reader: RemoteReader, answer: Any, message: str
) -> None:
    server.acts["/spaces"] = lambda handler, _: handler.answer(*answer)
    with pytest.raises(UnreachableError, match=message):
        read(reader, [0])
    assert len(spans(server)) == 1


def test_cancelled_reads_end_soon(server: WebServer, tmp_path: Path) -> None:
    policy = RetryPolicy(backoff_s=60, give_up_after_s=600)
    reader = RemoteCache(server.url, RemoteOptions(mirror=tmp_path), policy).open_reader(None)
    server.acts["/spaces"] = lambda handler, _: handler.answer(503, b"")
    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(read, reader, [0, 5])
        while len(spans(server)) < 2:
            time.sleep(0.005)
        while not reading.done():  # both reads must be waiting first
            reader.cancel_reads()
            time.sleep(0.02)
    with pytest.raises(UnreachableError, match="was cancelled"):
        reading.result()


def hang(handler: Handler, path: str) -> None:
    """Send the head of the right answer, then a byte of its body now and then."""
    size = (handler.server.world.folder / path.lstrip("/")).stat().st_size
    start, last = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
    handler.send_response(206)
    handler.send_header("Content-Length", str(last + 1 - start))
    handler.send_header("Content-Range", f"bytes {start}-{last}/{size}")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b"x")
        time.sleep(0.05)


@pytest.mark.parametrize("rows", [[0], [0, 5, 9]])
def test_requests_under_way_are_cancelled_too(
    rows: list[int], server: WebServer, reader: RemoteReader
) -> None:
    server.acts["/spaces"] = hang
    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(read, reader, rows)
        while len(spans(server)) < len(rows):
            time.sleep(0.005)
        started = time.monotonic()
        while not reading.done():
            reader.cancel_reads()
            time.sleep(0.02)
    assert time.monotonic() - started < 3
    with pytest.raises(UnreachableError):
        reading.result()


@pytest.mark.parametrize("rows", [[0], [0, 5, 9]])
def test_one_ctrl_c_ends_a_read(rows: list[int], server: WebServer, reader: RemoteReader) -> None:
    server.acts["/spaces"] = hang
    pressed = Timer(0.3, os.kill, [os.getpid(), signal.SIGINT])  # as a terminal does
    pressed.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        read(reader, rows)
    assert time.monotonic() - started < 3


def damaged(handler: Handler, path: str) -> None:
    """Answer with the first byte changed, as a faulty proxy does."""
    data = (handler.server.world.folder / path.lstrip("/")).read_bytes()
    start, stop = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
    body = bytes([data[start] ^ 1]) + data[start + 1 : stop + 1]
    handler.answer(206, body, {"Content-Range": f"bytes {start}-{stop}/{len(data)}"})


def test_a_row_changed_on_the_way_is_fetched_again_alone(
    local: FeatureReader, server: WebServer, reader: RemoteReader
) -> None:
    server.acts["/spaces"] = first(2, damaged)
    assert (read(reader, [0, 1, 2]) == read(local, [0, 1, 2])).all()
    alone = f"bytes=0-{ROW_BYTES - 1}"
    assert spans(server) == [f"bytes=0-{2 * (ROW_BYTES + 4) + ROW_BYTES - 1}", alone, alone]


def test_a_row_damaged_at_its_source_is_named_and_not_kept(
    server: WebServer, reader: RemoteReader
) -> None:
    server.acts["/spaces"] = damaged
    with pytest.raises(UnreachableError) as error:
        read(reader, [6])
    place = f"{reader.path.name}/features/image/c/1/0/0"
    assert f"{place}: row 6 fails its checksum" in str(error.value)
    server.acts.clear()
    read(reader, [6])
    assert reader.stats.rows_cached == 0


# ---- redirects and addresses


def redirect(to: str) -> Act:
    return lambda handler, path: handler.answer(302, b"", {"Location": to + path})


def test_redirects_are_followed_and_the_last_one_is_remembered(
    server: WebServer, reader: RemoteReader
) -> None:
    server.acts["/spaces"] = redirect("/moved")

    server.acts["/moved"] = lambda handler, path: handler.file(
        server.folder / path.removeprefix("/moved/")
    )
    read(reader, [0])
    read(reader, [2])
    assert [path.startswith("/moved") for path, _ in server.shard_requests()] == [0, 1, 1]
    # The signature expires: the first URL is requested again.
    server.acts["/moved"] = lambda handler, _: handler.answer(403, b"")
    server.acts["/spaces"] = lambda *_: False
    read(reader, [3])


@pytest.mark.parametrize(
    ("to", "what"),
    [
        ("", "more than 5 redirects"),
        ("http://10.1.2.3:1", "a redirect to plain http"),
        ("http://169.254.169.254", "a redirect to plain http"),
        ("https://10.1.2.3:1", "a private address 10.1.2.3"),
        ("https://169.254.169.254", "a link-local address"),
        ("ftp://127.0.0.1", "a redirect to no valid URL"),
        ("http://user:secret@127.0.0.1", "a redirect to no valid URL"),
    ],
)
def test_forbidden_redirects_are_refused(server: WebServer, to: str, what: str) -> None:
    store = HttpStore(server.url, POLICY)
    server.acts["/spaces"] = redirect(to)
    # An open connection, because this store would refuse to connect to the loopback.
    connection = store._pool._connect(store._origin, Deadline(9))
    store._pool._idle[store._origin] = [(connection, time.monotonic() + 60)] * 9
    store._pool._allow_private = False  # as for a server on the open web
    target = memoryview(bytearray(4))
    with pytest.raises(RequestError) as failure:
        store.read("spaces/x", 0, target, None)
    assert what in failure.value.reason and not failure.value.again
    assert "secret" not in failure.value.reason


def test_an_authorization_is_sent_only_to_its_host(cache: CacheRoot, server: WebServer) -> None:
    store = HttpStore(server.url, POLICY, headers={"Authorization": "Bearer hf_secret"})
    with WebServer(cache.path) as other:
        server.acts["/spaces"] = redirect(other.url)
        (path,) = cache.path.rglob("space.json")
        store.read_file(path.relative_to(cache.path).as_posix(), 10**6)
        assert server.headers[-1]["Authorization"] == "Bearer hf_secret"
        assert "Authorization" not in other.headers[-1]


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("http://host.example/features", "plain http"),
        ("http://10.0.0.1/features", "plain http"),
        ("https://user:secret@host.example/features", "a password"),
        ("https://host.example/features?token=secret", "a query"),
        ("s3:///prefix", "no valid URL"),
        ("gs://bucket/prefix", "read from https://, s3://, hf:// or a folder"),
    ],
)
def test_unsuitable_urls_are_refused(url: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=what):
        open_reader(url, None, RemoteOptions(mirror=tmp_path))


def test_a_host_name_with_a_private_address_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [(2, 1, 6, "", ("192.168.7.7", 443))]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: found)
    with pytest.raises(UnreachableError, match=r"192\.168\.7\.7; if you trust it: --allow-private"):
        open_reader("https://features.example/cache", None, RemoteOptions(mirror=tmp_path))


# ---- rows kept on the local disk


def row(number: int) -> tuple[int, memoryview]:
    data = np.random.default_rng(number).bytes(1000)
    return crc32c(data), memoryview(data)


def put(rows: RowCache, *numbers: int) -> None:
    for number in numbers:
        rows.put("image", number, *row(number))


def kept(rows: RowCache, *numbers: int) -> list[bool]:
    target = memoryview(bytearray(1000))
    found = []
    for number in numbers:
        crc, data = row(number)
        here = rows.get("image", number, crc, target)
        assert not here or target == data
        found.append(here)
    return found


def test_the_least_recently_used_rows_are_evicted(tmp_path: Path) -> None:
    rows = RowCache(tmp_path, 10_000, protected_s=0)
    put(rows, *range(10))
    for age, number in enumerate([3, 5, *(n for n in range(10) if n not in (3, 5))]):
        crc, _ = row(number)
        os.utime(rows._path("image", number, crc), (0, time.time() - 1000 + age))
    assert kept(rows, 3) == [True]  # used now
    put(rows, 10)
    assert kept(rows, 3, 5, 0, 1, 10) == [True, False, False, True, True]
    assert total(tmp_path) <= 10_000


def test_rows_used_lately_are_not_evicted(tmp_path: Path) -> None:
    rows = RowCache(tmp_path, 10_000)
    put(rows, *range(20))
    assert sum(kept(rows, *range(20))) == 10
    assert kept(rows, *range(10)) == [True] * 10


def test_a_damaged_file_or_another_row_is_not_returned(tmp_path: Path) -> None:
    rows = RowCache(tmp_path, 100_000)
    put(rows, 1, 2, 3)
    paths = {n: rows._path("image", n, row(n)[0]) for n in (1, 2, 3)}
    garble(paths[1], 500)
    paths[2].write_bytes(paths[2].read_bytes()[:999])
    assert kept(rows, 1, 2, 3) == [False, False, True]
    assert not paths[1].exists() and not paths[2].exists()
    target = memoryview(bytearray(1000))
    assert not rows.get("image", 3, row(4)[0], target)  # another cache's row of that number


def test_rows_are_read_when_none_can_be_kept(
    server: WebServer, tmp_path: Path, local: FeatureReader, caplog: pytest.LogCaptureFixture
) -> None:
    reader = open_remote(server, tmp_path)
    reader._rows._folder.parent.mkdir(parents=True, exist_ok=True)
    reader._rows._folder.mkdir()
    (reader._rows._folder / "image").write_bytes(b"")  # blocks the folder of the array
    assert (read(reader, [0, 1, 8]) == read(local, [0, 1, 8])).all()
    assert "no more rows are kept here" in caplog.text


def _work(folder: Path, limit: int, seed: int) -> None:
    rows = RowCache(folder, limit, protected_s=0)
    for number in np.random.default_rng(seed).integers(0, 60, 120).tolist():
        if kept(rows, number) == [False]:
            put(rows, number)
        assert total(folder) <= limit + 3 * (limit // 16 + 1000)


def test_processes_share_a_folder(tmp_path: Path) -> None:
    with ProcessPoolExecutor(3, multiprocessing.get_context("fork")) as processes:
        list(processes.map(_work, [tmp_path] * 3, [30_000] * 3, range(3)))
    rows = RowCache(tmp_path, 30_000)
    assert sum(kept(rows, *range(60))) > 5  # and `kept` compares each with its bytes


def total(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*-*"):
        try:
            size += path.stat().st_size
        except FileNotFoundError:
            continue
    return size


def test_odd_files_in_place_of_rows_are_replaced(tmp_path: Path) -> None:
    rows = RowCache(tmp_path / "rows", 100_000)
    put(rows, 1, 2, 3)
    outside = tmp_path / "outside"
    outside.write_bytes(row(2)[1])
    fifo, link = (rows._path("image", number, row(number)[0]) for number in (1, 2))
    fifo.unlink()
    os.mkfifo(fifo)
    link.unlink()
    link.symlink_to(outside)
    assert kept(rows, 1, 2, 3) == [False, False, True]
    put(rows, 1, 2)
    assert kept(rows, 1, 2, 3) == [True] * 3
    assert outside.read_bytes() == row(2)[1]
