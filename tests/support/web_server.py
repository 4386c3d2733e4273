"""A web server on the loopback address with photographs and 39 kinds of failing URLs.

    with TroubleServer() as server:
        server.url("404")              # a URL of this kind
        server.entries()               # all paths, with kind, sha256 and expected outcome
        server.counts["/404"]          # requests so far
        server.heal()                  # from now on every path serves its image

Every path has an image of its own, so that a body shows which path served it. Only the `same-...` kinds share
one image.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import email.utils
import functools
import gzip
import hashlib
import io
import socket
import ssl
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from encode.download.client import Fetched, Fetcher
from encode.download.config import DownloadConfig
from model.media.images import BadMediaError
from tests.support.photos import make_folder, png_file

MakeFetcher = Callable[..., Fetcher]
"""Makes a fetcher with QUICK limits, some of them changed: the fixture `fetcher`."""

QUICK: dict[str, Any] = {
    "connect_s": 2,
    "read_s": 0.8,
    "total_s": 2.0,
    "backoff_s": 0.02,
    "retry_after_s": 2,
    "max_bytes": 1 << 20,
    "budget_bytes": 64 << 20,
    "allow_private": True,
}
"""Limits for downloads from this server: short times, and the loopback address is allowed."""

YEAR_S = 365 * 24 * 3600
HUGE = 200 << 20
PHOTOS = ("astronaut.jpg", "china.jpg", "flower.jpg", "rocket.jpg", "chelsea.webp", "text.png")
SIZE = (160, 120)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One path of the server, as a data set would list it."""

    path: str
    """`/404`."""
    kind: str
    """`404`."""
    sha256: str | None
    """The sha256 that the data set states; None if it states none."""
    expected: str
    """`ok`, or the stage at which it fails until the server is healed."""
    image: bytes = field(repr=False)
    """What it serves once the server is healed."""
    act: Act | None
    """How it answers before; None: with the image."""


@functools.cache
def photographs() -> tuple[Image.Image, ...]:
    """Return some small RGB photographs."""
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder))
        images = []
        for name in PHOTOS:
            with Image.open(Path(folder) / name) as image:
                images.append(image.convert("RGB").resize((SIZE[0] * 2, SIZE[1] * 2)))
    return tuple(images)


@functools.cache
def photo(number: int, form: str = "JPEG") -> bytes:
    """Return a file with a detail of a photograph, a different one for each number."""
    images = photographs()
    place = number // len(images)
    left, top = place * 7 % SIZE[0], place * 5 % SIZE[1]
    detail = images[number % len(images)].crop((left, top, left + SIZE[0], top + SIZE[1]))
    return _save(detail, form)


def _save(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def _upright(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(photo(number)))
    return _save(image.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif)


def _animated(number: int) -> bytes:
    frames = [Image.open(io.BytesIO(photo(number + i * 6))) for i in range(3)]
    return _save(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100)


def _deep(number: int) -> bytes:
    grey = np.asarray(Image.open(io.BytesIO(photo(number))).convert("L")).astype(np.uint16)
    return _save(Image.fromarray(grey * 257), "PNG")


def _bomb() -> bytes:
    """Return a PNG whose header states 60000 x 60000 pixels."""
    return png_file(60_000, 60_000, bytes(1000))


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        world = self.server.world
        with world.lock:
            world.counts[path] += 1
            world.headers[path] = dict(self.headers)
            count = world.counts[path]
        found = world.kinds.get(path)
        if found is None:
            self.send(b"nothing here", status=404, kind="text/plain")
        elif found.act is None or world.healed:
            self.send(found.image)
        else:
            found.act(self, found.image, count)

    def send(
        self, data: bytes, *, status: int = 200, kind: str = "image/jpeg", **headers: str
    ) -> None:
        """Send a complete response."""
        self.head(status, kind=kind, length=len(data), **headers)
        self.wfile.write(data)

    def head(
        self, status: int, *, kind: str = "image/jpeg", length: int | None = None, **headers: str
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.flush()

    def wait(self, seconds: float = 3600) -> bool:
        """Wait; return True if the server closes meanwhile."""
        return self.server.world.closing.wait(seconds)

    def hang_up(self, *, reset: bool = False) -> None:
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


Act = Callable[[Handler, bytes, int], None]


def status(number: int, **headers: str) -> Act:
    return lambda h, _, __: h.send(b"sorry", status=number, kind="text/plain", **headers)


def at_first(number: int, times: int, **headers: str) -> Act:
    """Send status `number` this many times, then the image."""

    def act(h: Handler, image: bytes, count: int) -> None:
        if count <= times:
            h.send(b"not yet", status=number, kind="text/plain", **headers)
        else:
            h.send(image)

    return act


def instead(data: bytes, kind: str = "image/jpeg", **headers: str) -> Act:
    return lambda h, _, __: h.send(data, kind=kind, **headers)


def redirect(location: str, number: int = 302) -> Act:
    return lambda h, _, __: h.send(b"", status=number, kind="text/html", Location=location)


def trickle(h: Handler, image: bytes, _: int) -> None:
    """Send one byte every 50 ms, so that no read times out."""
    h.head(200, length=len(image))
    for i in range(len(image)):
        if h.wait(0.05):
            return
        h.wfile.write(image[i : i + 1])


def stall(h: Handler, image: bytes, _: int) -> None:
    h.head(200, length=len(image))
    h.wfile.write(image[:100])
    h.wait()
    h.close_connection = True


def silent(h: Handler, _: bytes, __: int) -> None:
    h.wait()
    h.close_connection = True


def truncated(h: Handler, image: bytes, _: int) -> None:
    h.head(200, length=len(image))
    h.wfile.write(image[: len(image) // 2])
    h.hang_up()


def truncated_chunks(h: Handler, image: bytes, _: int) -> None:
    h.head(200, length=None, Transfer_Encoding="chunked")
    h.wfile.write(b"%x\r\n" % len(image) + image[:500])
    h.hang_up()


def reset(h: Handler, _: bytes, __: int) -> None:
    h.hang_up(reset=True)


def reset_in_body(h: Handler, image: bytes, _: int) -> None:
    h.head(200, length=len(image))
    h.wfile.write(image[:1000])
    h.hang_up(reset=True)


def garbage(h: Handler, _: bytes, __: int) -> None:
    h.wfile.write(bytes(range(256)) * 4)
    h.hang_up()


def huge(h: Handler, image: bytes, _: int) -> None:
    h.head(200, length=HUGE)
    h.wfile.write(image)
    h.wait(1)
    h.hang_up()


def endless(h: Handler, image: bytes, _: int) -> None:
    """Send 200 MB without a Content-Length."""
    h.head(200, length=None)
    block = image + bytes((1 << 20) - len(image))
    for _i in range(HUGE >> 20):
        h.wfile.write(block)
        if h.wait(0):
            return


def chunked(h: Handler, image: bytes, _: int) -> None:
    h.head(200, length=None, Transfer_Encoding="chunked")
    for start in range(0, len(image), 1000):
        part = image[start : start + 1000]
        h.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
    h.wfile.write(b"0\r\n\r\n")


def until_closed(h: Handler, image: bytes, _: int) -> None:
    """Send no length, as HTTP/1.0 servers do."""
    h.head(200, length=None)
    h.wfile.write(image)


def late_date(h: Handler, _: bytes, __: int) -> None:
    date = email.utils.formatdate(time.time() + YEAR_S, usegmt=True)
    h.send(b"later", status=503, kind="text/plain", Retry_After=date)


def cookie_wall(h: Handler, image: bytes, _: int) -> None:
    if "Cookie" in h.headers:
        h.send(image)
    else:
        h.send(b"", status=302, Location=h.path, Set_Cookie="seen=yes")


PAGE = b"<!DOCTYPE html><html><body>This image has moved.</body></html>"
NOISE = np.random.default_rng(5).bytes(20_000)

TROUBLES: dict[str, tuple[str, Act]] = {
    "404": ("fetch", status(404)),
    "403": ("fetch", status(403)),
    "410": ("fetch", status(410)),
    "451": ("fetch", status(451)),
    "500": ("fetch", status(500)),
    "204": ("fetch", lambda h, _, __: h.head(204, length=0)),
    "206": ("fetch", status(206)),
    "429-for-a-year": ("fetch", status(429, Retry_After=str(YEAR_S))),
    "503-until-a-date": ("fetch", late_date),
    "slow": ("fetch", trickle),
    "stall": ("fetch", stall),
    "silent": ("fetch", silent),
    "truncated": ("fetch", truncated),
    "truncated-chunks": ("fetch", truncated_chunks),
    "reset": ("fetch", reset),
    "reset-in-body": ("fetch", reset_in_body),
    "hang-up": ("fetch", lambda h, _, __: h.hang_up()),
    "garbage": ("fetch", garbage),
    "200-mb": ("fetch", huge),
    "200-mb-unsaid": ("fetch", endless),
    "redirect-loop": ("fetch", redirect("/redirect-loop")),
    "redirect-circle": ("fetch", redirect("/redirect-circle-back")),
    "redirect-to-private": ("fetch", redirect("http://127.0.0.1:1/secret.jpg")),
    "redirect-to-link-local": ("fetch", redirect("http://169.254.169.254/latest/meta-data")),
    "redirect-to-file": ("fetch", redirect("file:///etc/passwd")),
    "redirect-with-password": ("fetch", redirect("http://user:secret@127.0.0.1/")),
    "redirect-to-nowhere": ("fetch", redirect("http://no-such-host.invalid/a.jpg")),
    "redirect-without-location": ("fetch", status(302)),
    "cookie-wall": ("fetch", cookie_wall),
    "gzip": (
        "fetch",
        lambda h, image, _: h.send(gzip.compress(image), Content_Encoding="gzip"),
    ),
    "wrong-sha": ("verify", instead(b"other bytes")),
    "html-as-jpeg": ("decode", instead(PAGE)),
    "text-as-jpeg": ("decode", instead(b"Hotlinking is not allowed.\n")),
    "svg": ("decode", instead(b'<svg xmlns="http://www.w3.org/2000/svg"/>', "image/svg+xml")),
    "empty": ("decode", instead(b"")),
    "random-bytes": ("decode", instead(NOISE)),
    "half-a-jpeg": ("decode", lambda h, image, _: h.send(image[: len(image) // 2])),
    "bomb": ("decode", instead(_bomb(), "image/png")),
}
"""Kind -> stage at which it fails, and how the server answers."""

PASSING: dict[str, Act] = {
    "500-then-fine": at_first(500, 1),
    "503-then-fine": at_first(503, 2, Retry_After="0"),
    "429-then-fine": at_first(429, 1, Retry_After="1"),
    "reset-then-fine": lambda h, image, n: reset(h, image, n) if n == 1 else h.send(image),
    "truncated-then-fine": lambda h, image, n: (truncated if n == 1 else chunked)(h, image, n),
    "chunked": chunked,
    "until-closed": until_closed,
    "redirect": redirect("/photo-0"),
    "redirect-thrice": redirect("/redirect-twice", 301),
    "redirect-twice": redirect("redirect", 307),
    "as-html": lambda h, image, _: h.send(image, kind="text/html"),
}
"""Kinds that succeed, some of them after a retry."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    world: TroubleServer

    def get_request(self) -> tuple[socket.socket, Any]:
        request, address = super().get_request()
        with self.world.lock:
            self.world.connections += 1
            self.world.sockets.append(request)
        return request, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore that the client closed the connection."""


# A self-signed certificate for localhost and 127.0.0.1, valid until 2126, only for these tests.
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgpslZxRfOQrGBPiLp
spYF8DHXnj/R8zKuRLIQU1p747qhRANCAAToNe2bxS32MizKGtrilfmB+MsRoi/G
GcJRHZUxhviPddWDzBVW1N/ZswZgxsH7rU/Iy/bN7SsuZi6YyAuYyBAG
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBmjCCAUGgAwIBAgIUGRlacPWmmJutKPhxOVdV2Z/1La0wCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMzA4MDQzM1oYDzIxMjYxMDMw
MDgwNDMzWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAToNe2bxS32MizKGtrilfmB+MsRoi/GGcJRHZUxhviPddWDzBVW1N/Z
swZgxsH7rU/Iy/bN7SsuZi6YyAuYyBAGo28wbTAdBgNVHQ4EFgQU1kGGyIcwO6hv
qsH3tjaRRUoKTaEwHwYDVR0jBBgwFoAU1kGGyIcwO6hvqsH3tjaRRUoKTaEwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDRwAwRAIgboolOi6tuOeplzXfR+G79GzRaRgYTFRSNzXYG69/8a8CIA0/
KWdvZny2HzkFb39d8s2wKxdH8Z0oK7af1gZ20/qZ
-----END CERTIFICATE-----
"""


class TroubleServer:
    """The server, as a context manager."""

    def __init__(
        self, photos: int = 20, extra: dict[str, Act] | None = None, tls: Path | None = None
    ) -> None:
        """Listen on a free port.

        Args:
            photos: number of good photographs beside all other kinds.
            extra: more kinds, which are expected to succeed.
            tls: use https with the certificate and key in this file.
        """
        self.counts: Counter[str] = Counter()
        """Path -> number of requests."""
        self.headers: dict[str, dict[str, str]] = {}
        """Path -> headers of its last request."""
        self.connections = 0
        """Number of accepted connections."""
        self.healed = False
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.sockets: list[socket.socket] = []
        self.kinds: dict[str, Entry] = {}
        self._number = 0
        self._add_good(photos)
        for kind, act in (PASSING | (extra or {})).items():
            self._add(kind, "ok", act)
        for kind, (stage, act) in TROUBLES.items():
            self._add(kind, stage, act)
        self._add("redirect-circle-back", "fetch", redirect("/redirect-circle"))
        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.world = self
        self._scheme = "https" if tls else "http"
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    @property
    def base(self) -> str:
        """http://127.0.0.1:PORT"""
        return f"{self._scheme}://127.0.0.1:{self._server.server_address[1]}"

    def url(self, kind: str) -> str:
        """Return the URL of a kind."""
        assert f"/{kind}" in self.kinds, f"{kind} is none of {', '.join(self.kinds)}"
        return f"{self.base}/{kind}"

    def image(self, kind: str) -> bytes:
        """Return the image of a kind: what its path serves if it is good or healed."""
        if kind.startswith("redirect") and not self.healed and kind in PASSING:
            kind = "photo-0"
        return self.kinds[f"/{kind}"].image

    def entries(self) -> list[Entry]:
        """Return all paths."""
        return list(self.kinds.values())

    def heal(self) -> None:
        """Let every path serve its image from now on."""
        self.healed = True

    def __enter__(self) -> TroubleServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        for connection in self.sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _add_good(self, photos: int) -> None:
        for i in range(photos):
            self._add(f"photo-{i}", "ok", None, claimed=i % 2 == 0)
        cmyk = Image.open(io.BytesIO(photo(1000))).convert("CMYK")
        forms = {
            "cmyk": _save(cmyk, "JPEG"),
            "sideways": _upright(1001),
            "animated-gif": _animated(1002),
            "webp": photo(1003, "WEBP"),
            "deep-png": _deep(1004),
            "one-pixel": _save(Image.new("RGB", (1, 1), "red"), "PNG"),
        }
        for kind, image in forms.items():
            self._add(kind, "ok", None, image=image)
        for i in range(3):
            self._add(f"same-{i}", "ok", None, image=photo(1005))

    def _add(
        self,
        kind: str,
        expected: str,
        act: Act | None,
        *,
        image: bytes | None = None,
        claimed: bool = False,
    ) -> None:
        if image is None:
            image = photo(self._number)
            self._number += 1
        sha256 = hashlib.sha256(image).hexdigest()
        self.kinds[f"/{kind}"] = Entry(
            path=f"/{kind}",
            kind=kind,
            sha256=sha256 if claimed or expected == "verify" else None,
            expected=expected,
            image=image,
            act=act,
        )


# ---- downloads from it


def quick_config(**changed: Any) -> DownloadConfig:
    """Return QUICK with some values changed."""
    return DownloadConfig(**(QUICK | changed))


def outcome(future: concurrent.futures.Future[Fetched]) -> Fetched | BadMediaError:
    """Wait for a download and return its body, released, or its error."""
    try:
        fetched = future.result(30)
    except BadMediaError as error:
        return error
    fetched.release()
    return fetched


def wait_until(reached: Callable[[], bool]) -> None:
    """Wait until a condition holds, 10 s at most."""
    deadline = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.005)
