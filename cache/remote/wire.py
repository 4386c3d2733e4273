"""A connection whose every wait ends by a deadline, and which receives a limited number of bytes.

    wire = Wire.connect(info, deadline, 20)            # info: from getaddrinfo; 20 s without a byte
    wire.start_tls(context, "host.example")
    wire.begin(deadline, most=64 << 10)                # for each exchange
    connection.sock = wire                             # of http.client

http.client reads lines until a server stops sending them. Its socket's own time limit covers one call of
`recv`, so a server that sends a byte now and then could keep it busy without end. Here the limit covers the
exchange: connecting, TLS, the request, and every byte of the answer.
"""

from __future__ import annotations

import errno
import io
import os
import select
import socket
import ssl
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from cache.errors import RequestError
from cache.remote.deadline import Deadline

T = TypeVar("T")

AddressInfo = tuple[Any, Any, int, str, tuple[Any, ...]]
"""An element of what `socket.getaddrinfo` returns."""


class Wire:
    """A connected socket, with the methods that http.client calls."""

    def __init__(self, opened: socket.socket, deadline: Deadline, read_s: float) -> None:
        """Take over a socket that does not block."""
        self._socket, self._deadline, self._read_s = opened, deadline, read_s
        self._left = 0

    @classmethod
    def connect(cls, info: AddressInfo, deadline: Deadline, read_s: float) -> Wire:
        """Connect to an address.

        Args:
            info: the address, an element of what `socket.getaddrinfo` returns.
            deadline: of this, and of `start_tls`.
            read_s: seconds without a byte after which an exchange fails.

        Raises:
            RequestError: it takes too long.
            OSError: the address does not accept the connection.
        """
        family, kind, protocol, _, address = info
        opened = socket.socket(family, kind, protocol)
        try:
            opened.setblocking(False)
            wire = cls(opened, deadline, read_s)
            code = opened.connect_ex(address)
            if code == errno.EINPROGRESS:
                wire._wait(select.POLLOUT)
                code = opened.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return wire
        except BaseException:
            opened.close()
            raise

    def start_tls(self, context: ssl.SSLContext, host: str) -> None:
        """Do the TLS handshake.

        Raises:
            RequestError: it takes too long.
            OSError: it fails, as for an invalid certificate.
        """
        wrapped = context.wrap_socket(
            self._socket, server_hostname=host, do_handshake_on_connect=False
        )
        self._socket = wrapped
        self._until_done(wrapped.do_handshake, select.POLLIN)

    def begin(self, deadline: Deadline, most: int) -> None:
        """Begin an exchange, or the body of its answer: from now on at most `most` bytes are received."""
        self._deadline, self._left = deadline, most

    def sendall(self, data: bytes) -> None:
        """Send all of `data`."""
        rest = data
        while rest:
            rest = rest[self._until_done(partial(self._socket.send, rest), select.POLLOUT) :]

    def receive(self, buffer: Any) -> int:
        """Receive some bytes; 0 at the end.

        Raises:
            RequestError: no byte for `read_s` seconds, the deadline is over, or there are too many bytes.
        """
        if self._left <= 0:
            raise RequestError("no valid answer (too many bytes beside its content)", again=False)
        count = self._until_done(lambda: self._socket.recv_into(buffer), select.POLLIN)
        self._left -= count
        return count

    def makefile(self, _mode: str) -> io.BufferedReader:
        """Return the incoming bytes as a file."""
        return io.BufferedReader(_Incoming(self, self._socket.makefile("rb", buffering=0)))

    def close(self) -> None:
        """Close the socket, once the files made of it are closed."""
        self._socket.close()

    def _until_done(self, call: Callable[[], T], event: int) -> T:
        """Repeat a call that does not block until it is done."""
        while True:
            self._deadline.left()
            try:
                return call()
            except ssl.SSLWantReadError:
                wanted = select.POLLIN
            except ssl.SSLWantWriteError:
                wanted = select.POLLOUT
            except BlockingIOError:
                wanted = event
            self._wait(wanted, self._read_s)

    def _wait(self, event: int, seconds: float = float("inf")) -> None:
        poll = select.poll()  # `select` knows no file numbers above 1,023
        poll.register(self._socket, event)
        self._deadline.wait(lambda s: bool(poll.poll(max(0.0, s) * 1000)), seconds)


class _Incoming(io.RawIOBase):
    """The bytes that a Wire receives. Closing it lets go of the socket."""

    def __init__(self, wire: Wire, hold: io.RawIOBase | Any) -> None:
        self._wire, self._hold = wire, hold

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._wire.receive(buffer)

    def close(self) -> None:
        self._hold.close()
        super().close()
