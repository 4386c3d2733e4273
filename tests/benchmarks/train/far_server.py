"""A web server some milliseconds away, which takes little of the processor that it shares with its readers.

with serve(folder, latency_s=0.03) as server:
    server.url

It answers GET, with and without a Range, as nginx would: `sendfile`, one thread a connection.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import socket
import socketserver
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

FORK = multiprocessing.get_context("fork")
PROCESSES = 2
"""Processes of the server: Python's lock binds one alone below the pace of several devices."""
_RANGE = re.compile(rb"\r\nrange: bytes=([0-9]+)-([0-9]+)\r\n", re.IGNORECASE)


@dataclass(frozen=True)
class Server:
    """A web server in processes of its own."""

    url: str
    pids: list[int]

    def cpu_seconds(self) -> float:
        """Return the processor time that it has used."""
        lines = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1] for pid in self.pids]
        ticks = sum(int(tick) for line in lines for tick in line.split()[11:13])  # user and system
        return ticks / os.sysconf("SC_CLK_TCK")


class _Listener(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, latency_s: float) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.socket.setblocking(False)  # another process may have accepted a connection first
        self.folder, self.latency_s = folder, latency_s


class _Connection(socketserver.BaseRequestHandler):
    request: socket.socket
    server: _Listener

    def handle(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        received = b""
        with contextlib.suppress(ConnectionError):
            while more := self.request.recv(1 << 16):
                *asked, received = (received + more).split(b"\r\n\r\n")
                for head in asked:
                    time.sleep(self.server.latency_s)
                    self.answer(head + b"\r\n")

    def answer(self, head: bytes) -> None:
        """Send what a request's line and headers ask for."""
        path = self.server.folder / unquote(head.split()[1].decode()).lstrip("/")
        if not path.is_file():
            self.request.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        with path.open("rb") as file:
            size, found = os.fstat(file.fileno()).st_size, _RANGE.search(head)
            start, stop = (int(found[1]), min(int(found[2]) + 1, size)) if found else (0, size)
            lines = [f"HTTP/1.1 {'206 Partial Content' if found else '200 OK'}"]
            lines += [f"Content-Range: bytes {start}-{stop - 1}/{size}"] if found else []
            lines += [f"Content-Length: {stop - start}", "", ""]
            self.request.sendall("\r\n".join(lines).encode(), socket.MSG_MORE)
            while start < stop:
                start += os.sendfile(self.request.fileno(), file.fileno(), start, stop - start)


@contextlib.contextmanager
def serve(folder: Path, latency_s: float) -> Iterator[Server]:
    """Serve a folder over HTTP from this machine, each answer `latency_s` late."""
    listener = _Listener(folder, latency_s)
    pairs = [FORK.Pipe() for _ in range(PROCESSES)]
    processes = [FORK.Process(target=_serve, args=(listener, theirs)) for _, theirs in pairs]
    for process in processes:
        process.start()
    try:
        url = f"http://127.0.0.1:{listener.server_address[1]}"
        yield Server(url, [process.pid for process in processes if process.pid])
    finally:
        for ours, _ in pairs:
            ours.send(None)
        for process in processes:
            process.join()
        listener.server_close()


def _serve(listener: _Listener, end: Connection) -> None:
    Thread(target=listener.serve_forever, args=(0.01,), daemon=True).start()
    end.recv()
