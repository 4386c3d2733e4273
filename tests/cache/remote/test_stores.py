"""Lists of files that the hub or S3 answers with are typed, ranged and bounded.

RemoteCache("hf://datasets/ORG/NAME", RemoteOptions()).copy_tables()
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfFileSystem, constants

from cache.errors import CacheError
from cache.remote import stores
from cache.remote.open import RemoteCache, RemoteOptions
from cache.remote.retry import RetryPolicy
from tests.support.faults import in_time
from tests.support.remote_servers import (
    Handler,
    RawServer,
    WebServer,
    as_hub,
    environment,
)

assert (
    HfFileSystem
)  # imported here, which takes seconds on a busy machine, and not within a time limit

TABLE = "samples/a/part-00000.parquet"
POLICY = RetryPolicy(
    connect_s=2, read_s=0.2, request_s=0.4, give_up_after_s=0.05, backoff_s=0.01, max_backoff_s=0.02
)


def tree(handler: Handler, _path: str, values: Any, link: str = "") -> None:
    data = values if isinstance(values, bytes) else json.dumps(values).encode()
    handler.answer(200, data, {"Link": link} if link else {})


ENTRY = {"type": "file", "path": TABLE, "size": 4, "oid": "a" * 40}


@pytest.mark.parametrize(
    ("values", "link", "what"),
    [
        *[
            (values, "", "is not valid")
            for values in (
                *(b"", b"no JSON", b"\xff", b"[" * 10**5, {}, 7, None, [7], [[]], [{}]),
                *([{**ENTRY, key: bad}] for key in ENTRY for bad in (None, 7.5, [], {}, True)),
                [{**ENTRY, "size": -1}],
                [{**ENTRY, "size": 2**70}],
                [{**ENTRY, "lfs": {"oid": "short"}}],
                [{**ENTRY, "lfs": []}],
                b'[{"type": "file", "type": "file", "path": "x"}]',
            )
        ],
        ([{**ENTRY, "size": 2**52}], "", "bytes, at most"),
        ([ENTRY], '<http://127.0.0.1:9/x>; rel="next"', "is not valid"),
        ([ENTRY], '<http://[::1>; rel="next"', "is not valid"),
        ([], '</api/datasets/us/x/tree/c>; rel="next"', "does not end"),
        ([ENTRY], '</api/datasets/us/x/tree/c>; rel="next"', "does not end"),
    ],
)
def test_odd_lists_of_the_hub_are_one_line(
    values: Any,
    link: str,
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stores, "MAX_PAGES", 20)
    policy = RetryPolicy(give_up_after_s=20, request_s=20)
    with WebServer(tmp_path) as server:
        as_hub(server, "us/x")
        server.acts = {
            f"/api/datasets/us/x/tree/{'c' * 40}": lambda h, p: tree(h, p, values, link),
            "/api/datasets/us/x/tree/c": lambda h, p: tree(h, p, values, link),
            **server.acts,
        }
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        options = RemoteOptions(mirror=tmp_path / "mirror")
        with in_time(20, memory=4 << 30), pytest.raises(CacheError, match=what) as error:
            RemoteCache("hf://datasets/us/x", options, policy).copy_tables()
    assert "\n" not in str(error.value)


PAGE = """<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><Name>b</Name><IsTruncated>true\
</IsTruncated><NextContinuationToken>again</NextContinuationToken>%s</ListBucketResult>"""
OBJECT = """<Contents><Key>x/%s</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>\
<ETag>&quot;e&quot;</ETag><Size>%s</Size></Contents>"""


@pytest.mark.parametrize(
    "page",
    [
        *("", PAGE % "", PAGE % (OBJECT % (TABLE, 4)), PAGE % (OBJECT % (TABLE, 2**60))),
        *(PAGE % (OBJECT % (TABLE, -1)), PAGE % (OBJECT % ("../../x", 4)), "<" * 10**5, "\x1b[31m"),
    ],
)
def test_odd_lists_of_s3_are_one_line(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer() -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\nConnection: close\r\n"
        yield f"Content-Length: {len(page)}\r\n\r\n{page}".encode()

    missing = b"HTTP/1.1 404 No\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    with RawServer(answer, 0, {b"listing.json": lambda: [missing]}) as server:
        for name, value in environment(server.url).items():
            monkeypatch.setenv(name, value)
        with in_time(20, memory=4 << 30), pytest.raises(CacheError) as error:
            RemoteCache("s3://b/x", RemoteOptions(mirror=tmp_path), POLICY).copy_tables()
    assert "\n" not in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize(
    "values",
    [
        *(b"", b"\xff", b"[" * 10**5, b'"x"', b"7", b"null", b"[]", b"{}"),
        *({"id": "us/x", "sha": sha} for sha in (None, 7, [], "", "../../x", "c" * 40 + "\n")),
        *({"id": "us/x", "sha": "c" * 40, "siblings": odd} for odd in (7, [7], [None], {"a": 1})),
        *({"id": "us/x", "sha": "c" * 40, "lastModified": odd} for odd in (7, "x", [])),
    ],
)
def test_odd_answers_about_a_repository_are_one_line(
    values: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with WebServer(tmp_path) as server:
        as_hub(server, "us/x")
        act = server.acts["/api/"]
        server.acts["/api/"] = lambda h, p: act(h, p) if "/tree/" in p else tree(h, p, values)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        with in_time(20, memory=4 << 30), pytest.raises(CacheError) as error:
            RemoteCache("hf://datasets/us/x", RemoteOptions(mirror=tmp_path), POLICY).copy_tables()
    assert "\n" not in str(error.value) and str(error.value).isprintable()
