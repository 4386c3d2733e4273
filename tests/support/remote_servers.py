"""Servers on the loopback that share a cache: a web server, and moto's S3. Their requests fail on demand.

with WebServer(folder) as server:               # serves a folder over http, with Range requests
    server.url                                  # http://127.0.0.1:PORT
    server.failure_rate = 0.1                   # share of requests that fail: 500, 429, a reset, a short body
    server.row_bytes                            # bytes of shards that were sent

with RawServer(lambda: forever(b"HTTP/1.1 200 OK\\r\\nX: ", b"a")) as server:
    ...                                         # answers with these bytes, one every few milliseconds
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

FAILURES = ("500", "429", "reset", "short")


class LocalServer:
    """A server in a thread, the rate at which its requests fail, and counts of them."""

    def __init__(self, server: Any, seed: int = 0) -> None:
        self.failure_rate = 0.0
        """Share of the requests that fail, from 0 to 1."""
        self.latency_s = 0.0
        """Seconds before each answer."""
        self.row_bytes = 0
        """Bytes of shards that were sent."""
        self.failures: Counter[str] = Counter()
        """Failures, by kind."""
        self.requests: list[tuple[str, str | None]] = []
        """(path, Range header) of all requests."""
        self.lock = threading.Lock()
        self._random = random.Random(seed)
        self._server = server
        self._thread = threading.Thread(target=server.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def record(self, path: str, span: str | None) -> str | None:
        """Record a request; return how it is to fail, or None."""
        time.sleep(self.latency_s)
        with self.lock:
            self.requests.append((path, span))
            if self._random.random() >= self.failure_rate:
                return None
            failure = FAILURES[self.failures.total() % len(FAILURES)]
            self.failures[failure] += 1
            return failure

    def sent(self, path: str, nbytes: int) -> None:
        if is_shard(path):
            with self.lock:
                self.row_bytes += nbytes

    def shard_requests(self) -> list[tuple[str, str | None]]:
        return [request for request in self.requests if is_shard(request[0])]


def is_shard(path: str) -> bool:
    return "/c/" in path and urlsplit(path).path.endswith("/0/0")


def reset(connection: socket.socket) -> None:
    """Close a connection so that the other side receives a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


# ---- a web server


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def do_GET(self) -> None:
        world: WebServer = self.server.world
        path = unquote(urlsplit(self.path).path)
        world.headers.append(dict(self.headers))
        failure = world.record(path, self.headers.get("Range"))
        for prefix, act in world.acts.items():
            if path.startswith(prefix) and act(self, path) is not False:
                return
        if failure == "reset":
            self.close_connection = True
            reset(self.connection)
        elif failure in ("500", "429"):
            self.answer(int(failure), b"not now", {"Retry-After": "0"})
        else:
            self.file(world.folder / path.lstrip("/"), short=failure == "short")

    def file(self, file: Path, short: bool = False) -> None:
        if not file.is_file():
            self.answer(404, b"nothing here")
            return
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not found:
            self.answer(200, file.read_bytes(), short=short)
            return
        size = file.stat().st_size
        start, stop = int(found[1]), min(int(found[2]) + 1, size)
        with file.open("rb") as shard:
            data = os.pread(shard.fileno(), stop - start, start)
        span = {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        self.answer(206, data, span, short=short)

    def answer(
        self, status: int, data: bytes, headers: dict[str, str] | None = None, short: bool = False
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        body = data[: len(data) // 2] if short else data
        if status in (200, 206):
            self.server.world.sent(self.path, len(body))  # before: the receiver may check the count
        self.wfile.write(body)
        if short:
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Silence."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore that the client closed the connection."""


Act = Callable[[Handler, str], bool | None]
"""Answers a request for a path, or returns False."""


def first(count: int, act: Act) -> Act:
    """Return an act that answers the first `count` requests only."""
    left = iter(range(count))
    return lambda handler, path: next(left, None) is not None and act(handler, path)


class WebServer(LocalServer):
    """Serves the files of a folder, except where `acts` answers instead."""

    def __init__(self, folder: Path, seed: int = 0, tls: Path | None = None) -> None:
        """Listen on a free port; with `tls`, a file with a certificate and its key, for https."""
        super().__init__(_Server(("127.0.0.1", 0), Handler), seed)
        self._server.world = self
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.folder = folder
        self.acts: dict[str, Act] = {}
        """Path prefix -> what answers instead."""
        self.headers: list[dict[str, str]] = []
        """Headers of all requests."""


# ---- bytes of any kind


def forever(*pieces: bytes) -> Iterator[bytes]:
    """Yield the pieces, and the last one again and again."""
    yield from pieces
    while True:
        yield pieces[-1]


class RawServer:
    """Answers requests with pieces of bytes, which need not be HTTP."""

    def __init__(
        self,
        answer: Callable[[], Iterable[bytes]],
        pause_s: float = 0.02,
        others: Mapping[bytes, Callable[[], Iterable[bytes]]] | None = None,
    ) -> None:
        """Listen on a free port.

        Args:
            answer: returns the pieces.
            pause_s: seconds between two of them.
            others: part of a request -> what returns the pieces for such requests instead.
        """
        self._answer, self._pause_s, self._others = answer, pause_s, others or {}
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ended = threading.Event()
        self.accepted = threading.Event()
        """Set once a client has connected."""
        self.sent = 0
        """Bytes sent so far."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        self.accepted.set()
        with connection, contextlib.suppress(OSError):
            connection.settimeout(20)
            request = connection.recv(65536)
            found = (other for part, other in self._others.items() if part in request)
            for piece in next(found, self._answer)():
                connection.sendall(piece)
                self.sent += len(piece)
                if self._pause_s and self._ended.wait(self._pause_s):
                    return


# ---- the hub


def as_hub(server: WebServer, repo: str, commit: str = "c" * 40, *, moved: str = "/cdn") -> None:
    """Make a WebServer answer like the hub for one data set repository: its API, and redirects to files."""
    files = server.folder

    def api(handler: Handler, path: str) -> None:
        start = f"/api/datasets/{repo}"
        if not path.startswith(start):
            handler.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        values: Any = {"id": repo, "sha": commit, "siblings": [], "private": False, "tags": []}
        if path.startswith(f"{start}/tree/"):
            values = [entry(file) for file in sorted(files.rglob("*")) if file.is_file()]
        handler.answer(200, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def entry(file: Path) -> dict[str, Any]:
        data, path = file.read_bytes(), file.relative_to(files).as_posix()
        oid, size = hashlib.sha1(data).hexdigest(), len(data)
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 130}
        more = {} if file.suffix == ".json" else {"lfs": lfs}
        return {"type": "file", "path": path, "size": size, "oid": oid, **more}

    def resolve(handler: Handler, path: str) -> None:
        name = path.removeprefix(f"/datasets/{repo}/resolve/{commit}/")
        handler.answer(302, b"", {"Location": f"{moved}/{name}?signature=s3cret"})

    def cdn(handler: Handler, path: str) -> None:
        handler.file(files / path.removeprefix(f"{moved}/"))

    server.acts |= {"/api/": api, f"/datasets/{repo}/resolve/": resolve, moved: cdn}


# ---- S3


class FaultyS3(LocalServer):
    """moto's S3 server with failures and counts."""

    def __init__(self, seed: int = 0) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            protocol_version = "HTTP/1.1"

            def log(self, *_: Any) -> None:
                """Silence."""

            def make_environ(self) -> dict[str, Any]:
                return {**super().make_environ(), "test.socket": self.connection}

        self._moto = DomainDispatcherApplication(create_backend_app)
        server: Any = make_server("127.0.0.1", 0, self._app, threaded=True, request_handler=Quiet)
        server.daemon_threads = True
        super().__init__(server, seed)

    def _app(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        failure = self.record(path, environ.get("HTTP_RANGE"))
        if environ["REQUEST_METHOD"] != "GET":
            return list(self._moto(environ, start))
        if failure == "reset":
            environ["test.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError
        if failure in ("500", "429"):
            start(f"{failure} Not now", [("Content-Length", "0")])
            return [b""]
        data = b"".join(self._moto(environ, start))
        body = data[: len(data) // 2] if failure == "short" else data
        self.sent(path, len(body))
        return [body] if body is data else self._broken(body, environ["test.socket"])

    def _broken(self, body: bytes, connection: socket.socket) -> Iterator[bytes]:
        yield body
        connection.shutdown(socket.SHUT_RDWR)


def environment(endpoint: str) -> dict[str, str]:
    """Return the environment variables that lead AWS tools to a local server."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def upload(folder: Path, url: str) -> None:
    """Create a bucket and upload every file below a folder, to the server that the environment names."""
    import boto3

    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    s3 = boto3.client("s3")
    s3.create_bucket(Bucket=bucket)
    for file in folder.rglob("*"):
        if file.is_file():
            name = (Path(prefix) / file.relative_to(folder)).as_posix()
            s3.put_object(Bucket=bucket, Key=name, Body=file.read_bytes())
