"""A server made to harm: what it sends is the cache, or ends in one line; nothing else is written.

RemoteCache(url, RemoteOptions()).copy_tables()          # CacheError
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cache.errors import CacheError, DiskError, UnreachableError
from cache.format.checksums import sealed_json
from cache.remote import mirror
from cache.remote.open import RemoteCache, RemoteOptions
from cache.remote.retry import RetryPolicy
from cache.share import share
from cache.store.paths import LISTING, CacheRoot
from cache.store.reader import FeatureReader
from cache.store.space import find_space
from tests.support.faults import in_time
from tests.support.remote_servers import (
    Handler,
    WebServer,
    first,
    reset,
)
from tests.support.spaces import SLOTS, fill, key, make_space

DIGEST = "0" * 64
POLICY = RetryPolicy(give_up_after_s=0.05, backoff_s=0.01, max_backoff_s=0.02)
HASTY = dataclasses.replace(POLICY, read_s=0.2, request_s=0.4, damage_tries=2, connections=3)
"""For answers that are drawn, many of which end in a wait."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> CacheRoot:
    root = CacheRoot(tmp_path_factory.mktemp("there"))
    space = make_space(root.path)
    for start in range(0, 3 * SLOTS, SLOTS):
        fill(space, range(start, start + SLOTS))
    share(root)
    return root


@pytest.fixture
def server(cache: CacheRoot) -> Iterator[WebServer]:
    with WebServer(cache.path) as running:
        yield running


def here(url: str, tmp_path: Path) -> RemoteCache:
    return RemoteCache(url, RemoteOptions(mirror=tmp_path / "mirror"), POLICY)


def test_more_than_the_disk_has_is_refused_before_anything_is_copied(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    files = {f"samples/a/part-{i:05}.parquet": [2**37, DIGEST] for i in range(9000)}
    (there / LISTING).write_bytes(sealed_json({"format": 1, "files": files}))
    with (
        WebServer(there) as server,
        in_time(20),
        pytest.raises(DiskError, match=r"need .* GB, .* free"),
    ):
        here(server.url, tmp_path).copy_tables()
    assert [p.name for p in (tmp_path / "mirror").rglob("*") if p.is_file()] == ["lock"]


# ---- a table that cannot be had


def answers(status: int, body: bytes = b"", **headers: str) -> Callable[[Handler, str], None]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, _: handler.answer(status, body, named)


def other_bytes(handler: Handler, path: str) -> None:
    data = (handler.server.world.folder / path.lstrip("/")).read_bytes()
    start, stop = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
    span = {"Content-Range": f"bytes {start}-{stop}/{len(data)}"}
    handler.answer(206, bytes(stop + 1 - start), span)


def hang_up(handler: Handler, _path: str) -> None:
    handler.close_connection = True
    reset(handler.connection)


TROUBLES: dict[str, Callable[[Handler, str], None]] = {
    **{str(status): answers(status) for status in (204, 304, 400, 401, 403, 404, 410, 416, 500)},
    "whole": lambda handler, path: handler.answer(200, bytes(10**5)),
    "no range": answers(206, b"x"),
    "another range": answers(206, b"x", Content_Range="bytes 7-7/8"),
    "a long range": answers(206, b"x", Content_Range=f"bytes 0-{'9' * 5000}/{'9' * 5000}"),
    "another length": answers(206, b"x", Content_Range="bytes 0-0/1"),
    "redirect to itself": lambda handler, path: handler.answer(302, b"", {"Location": path}),
    "long redirect": answers(302, Location="/" + "x" * 20_000),
    "odd redirect": answers(302, Location="http://[::1"),
    "redirect to an odd host": answers(302, Location="http://a\x1b[31m b/"),
    "compressed": answers(206, b"x", Content_Range="bytes 0-0/1", Content_Encoding="gzip"),
    "reset": hang_up,
    "other bytes": other_bytes,
}


@pytest.mark.parametrize("kind", TROUBLES)
def test_a_table_that_cannot_be_had_is_one_line(
    kind: str, server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.acts["/spaces"] = TROUBLES[kind]
    for piece in (mirror.PIECE_BYTES, 100):  # small tables side by side; and large ones in pieces
        monkeypatch.setattr(mirror, "PIECE_BYTES", piece)
        with in_time(20), pytest.raises(UnreachableError) as error:
            here(server.url, tmp_path).copy_tables()
        text = str(error.value)
        assert "\n" not in text and text.isprintable() and text.startswith(f"{server.url}/spaces/")
    assert [p.name for p in (tmp_path / "mirror").rglob("*") if p.is_file()] == ["lock"]


def test_one_bad_piece_of_many_ends_the_others(
    server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "PIECE_BYTES", 100)
    server.acts["/spaces"] = first(1, answers(404))
    server.latency_s = 0.02
    with in_time(20), pytest.raises(UnreachableError, match="404 Not Found"):
        here(server.url, tmp_path).copy_tables()


def test_a_disk_that_fills_up_is_one_line(
    server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mirror.os, "pwrite", full)
    with in_time(20), pytest.raises(DiskError, match="disk full"):
        here(server.url, tmp_path).copy_tables()
    assert not list(tmp_path.rglob("*.partial"))


def test_odd_local_files_are_copied_again(
    server: WebServer, cache: CacheRoot, tmp_path: Path
) -> None:
    remote = here(server.url, tmp_path)
    root = remote.copy_tables()
    space = next(root.path.rglob("space.json"))
    copied = root.path.parent / mirror.COPIED
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    space.unlink()
    space.symlink_to(outside)
    copied.write_text("[" * 10**5)
    (root.path / "spaces" / "x.partial").write_bytes(b"left by a kill")
    with in_time(20):
        here(server.url, tmp_path).copy_tables()
    assert outside.read_bytes() == b"mine" and not space.is_symlink()
    assert not list(root.path.rglob("*.partial"))
    for odd in (space, copied):
        odd.unlink()
        os.mkfifo(odd)
    with in_time(20):
        assert here(server.url, tmp_path).open_reader(None).rows("image") == 3 * SLOTS


# ---- anything


ODD = (
    *(
        b"\r\n",
        b"\n",
        b"\r\n\r\n",
        b"0",
        b"-1",
        b"9" * 30,
        b"\x00",
        b"\xff",
        b"\x1b[2J",
        b";",
        b",",
    ),
    *(
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Length: 5\r\n",
    ),
    *(
        b"Connection: close\r\n",
        b"X: " + b"y" * 70_000 + b"\r\n",
        b"X: y\r\n" * 200,
        b"bytes 0-0/1",
    ),
    *(
        b"Location: /x\r\n",
        b"HTTP/1.1 302 Moved\r\nLocation: /y\r\n",
        b"null",
        b"[",
        b'"',
        b"2**70",
    ),
)


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Return the bytes of an answer after one to three changes, most of them in its head."""
    for _ in range(draw.randint(1, 3)):
        most = len(data) if draw.random() < 0.3 else min(len(data), 150)
        start = draw.randint(0, most)
        stop = min(len(data), start + draw.choice((0, 0, 1, 1, 5, 40)))
        odd = draw.choice((*ODD, b"", draw.randbytes(draw.randint(1, 8))))
        data = data[:start] + odd + data[stop:]
    return data[: draw.randint(0, len(data))] if draw.random() < 0.2 else data


def mutated_listing(data: bytes, draw: random.Random) -> bytes:
    """Return a listing with one to three other names, sizes or types, sealed."""
    values = json.loads(data)
    files = values["files"]
    odd = [None, True, -1, 0, 2**60, 2**70, 1.5, "", "x", [], {}, [1, 2], [4, DIGEST], DIGEST]
    for _ in range(draw.randint(1, 3)):
        name = draw.choice(sorted(files))
        match draw.randrange(6):
            case 0:
                files[name] = draw.choice(odd)
            case 1:
                files[name] = [draw.choice(odd), DIGEST]
            case 2:
                files[
                    name.replace(draw.choice("/-.0a"), draw.choice(("..", "/", "\n", "9" * 300)))
                ] = [4, DIGEST]
            case 3:
                values[draw.choice(("format", "files", "more"))] = draw.choice(odd)
                break
            case 4:
                del files[name]
                break
            case 5:
                files[name] = [files[name][0] + draw.choice((-1, 1, 10**6)), DIGEST]
    del values["seal"]
    return sealed_json(values)


def test_any_answers_are_the_cache_or_one_line(
    cache: CacheRoot, server: WebServer, tmp_path: Path, soak: Callable[[int, int], int]
) -> None:
    """Drawn: which files are answered oddly, and how. What is read is always what was written."""
    local = FeatureReader(find_space(cache, None))
    keys = [key(i) for i in (0, 1, 2, 7)]
    expected = [local.read("image", k) for k in keys]
    read = refused = 0
    for seed in range(soak(25, 1000)):
        draw = random.Random(seed)
        how = draw.choice(("listing", "listing", "answers", "drip"))
        rate = draw.choice((0.05, 0.3, 1.0))

        def act(handler: Handler, path: str) -> bool:
            data = (cache.path / path.lstrip("/")).read_bytes() if path.lstrip("/") else b""
            if how == "listing":  # noqa: B023
                if path != f"/{LISTING}":
                    return False
                handler.answer(200, mutated_listing(data, draw))  # noqa: B023
                return True
            if draw.random() > rate:  # noqa: B023
                return False
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(data)}\r\n\r\n".encode()
            if span := handler.headers.get("Range"):
                start, stop = map(int, span.removeprefix("bytes=").split("-"))
                part = data[start : stop + 1]
                head = (
                    f"HTTP/1.1 206 Partial Content\r\nContent-Length: {len(part)}\r\n"
                    f"Content-Range: bytes {start}-{stop}/{len(data)}\r\n\r\n"
                ).encode()
                data = part
            answer = mutated(head + data, draw)  # noqa: B023
            handler.close_connection = draw.random() < 0.5  # noqa: B023
            if how == "drip":  # noqa: B023
                for at in range(draw.randint(1, 60)):  # noqa: B023
                    handler.wfile.write(answer[at : at + 1])
                return True
            handler.wfile.write(answer)
            return True

        server.acts = {"/": act}
        folder = tmp_path / f"{seed}"
        with in_time(20):
            try:
                remote = RemoteCache(server.url, RemoteOptions(mirror=folder), HASTY)
                reader = remote.open_reader(None)
                # A listing may leave out commits, and with them rows.
                have = [i for i, k in enumerate(keys) if reader.contains("image", k)]
                for i in have:
                    np.testing.assert_array_equal(reader.read("image", keys[i]), expected[i])
            except CacheError as error:
                text = str(error)
                assert "\n" not in text and text.isprintable() and len(text) < 700, seed
                refused += 1
            else:
                read += bool(have)
    assert read and refused
