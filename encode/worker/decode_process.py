"""Decode media in a process of its own, where a decoder crashes, hangs and holds Python's lock alone.

    Setup, then for small images:     LoadImages (and bytes) -> Pictures     pixels in the slots, in order
    for another media item:           Load (and its bytes)  ->  Needs        how much memory it takes
                                      DecodeImage           ->  Picture      its pixels are in slot 0
                                      ReadSize              ->  Picture      no pixels
                                      Probe                 ->  Found        of a video
                                      TakeFrames            ->  FrameReady for each, Over

`encode.worker.decoders` starts the process and talks to it through a socket; pixels are in memory that both
share. A message is its length in 4 bytes and msgpack. The process decodes what strangers made, so the other
side checks the types of its answers and unpickles nothing. This module imports no torch: the process takes
0.3 s to start and 60 MB; with compiled loops 0.6 s and 190 MB, of which other processes share a part.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
from PIL import Image

from configs.hardware import keep_memory
from model.media.fit import InputFit
from model.media.images import BadMediaError, DecodedImage, decoding_bytes, image_size
from model.media.video import frames
from model.media.video_index import VideoInfo, probe
from model.media.video_open import open_video

SLOTS = 4
"""Inputs that fit into the shared memory: small images that are sent together, or a video's frames, of which
some are copied out of it while the next one is decoded."""

MAX_MESSAGE = 1 << 20
"""Bytes of a message, at most. Paths and reasons are the longest parts."""

PROGRESS_EVERY_S = 1.0
"""Seconds between two signs of life of a decode that makes progress."""

VIDEO_BYTES_A_PIXEL = 60
"""Memory of decoding a video for each pixel of its frame: 16 frames that a decoder keeps, those that its
threads work on, and the copies that become an image."""

_SET_PDEATHSIG = 1  # of <sys/prctl.h>

A = TypeVar("A")


class Setup(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """What the process is for."""

    fit: InputFit
    """How the bytes of an image become an encoder input."""
    nice: int = 0
    """Added to the niceness of the process."""

    @property
    def slot_bytes(self) -> int:
        """Bytes of one encoder input."""
        return self.fit.size * self.fit.size * 3


class Load(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The next media item. Its bytes follow the message, unless it names a file."""

    kind: str
    nbytes: int = 0
    path: bytes | None = None


class LoadImages(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """At most SLOTS images, whose bytes follow the message; each is decoded if that takes little memory."""

    sizes: tuple[int, ...]
    """Bytes of each."""
    at_once: int
    """Memory that decoding one may take, bytes."""


class DecodeImage(msgspec.Struct, tag=True, frozen=True):
    """Decode the image, put its encoder input into slot 0, and forget its bytes."""


class ReadSize(msgspec.Struct, tag=True, frozen=True):
    """Read the size of the image from its header."""


class Probe(msgspec.Struct, tag=True, frozen=True):
    """Scan the video."""


class TakeFrames(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Decode the frames nearest to these times, microseconds, ascending, and forget the video."""

    wanted_us: tuple[int, ...]


class Copied(msgspec.Struct, tag=True, frozen=True):
    """A frame has been copied, so its slot is free."""


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The process has started."""


class Needs(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The memory that decoding takes, by the header; 0 if that is damaged, which decoding will report."""

    nbytes: int


class Picture(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """An image: its upright size, (0, 0) if unknown, and a defect that it has nevertheless."""

    width: int
    height: int
    note: str | None = None


class Found(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """A video, as `model.media.video_index.VideoInfo` has it."""

    width: int
    height: int
    duration_s: float
    note: str | None


class FrameReady(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The encoder input of a frame is in a slot."""

    slot: int
    wanted_us: int
    time_s: float


class Over(msgspec.Struct, tag=True, frozen=True):
    """All frames that can be decoded have been sent."""


class Progress(msgspec.Struct, tag=True, frozen=True):
    """The decode makes progress."""


class Bad(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """A BadMediaError."""

    reason: str
    stage: str


class Broken(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Another error, which is not the media's."""

    error: str


class Pictures(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """What became of each image of LoadImages."""

    found: tuple[Picture | Needs | Bad | Broken, ...]
    """`Needs` of one that is not decoded, and forgotten: it is to be sent alone."""


Request = Setup | Load | LoadImages | DecodeImage | ReadSize | Probe | TakeFrames | Copied
Answer = Ready | Needs | Picture | Pictures | Found | FrameReady | Over | Progress | Bad | Broken
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


class GoneError(Exception):
    """The other side of a channel has closed it, or has ended."""


class Channel:
    """Messages through a socket. One thread uses an end. Every method may raise GoneError."""

    def __init__(self, end: socket.socket, poll_s: float = 0.0) -> None:
        """Use a blocking socket; `poll_s`: seconds after which `answer` returns None, 0: never."""
        self.end = end
        self._got = bytearray()
        # The kernel counts the time. Python's own time-outs take a second system call.
        seconds, micros = divmod(round(poll_s * 1e6), 1_000_000)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            end.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", seconds, micros))

    def send(self, message: Request | Answer, *data: bytes, timeout_s: float = 0.0) -> None:
        """Send a message, and bytes behind it; give up when nothing has been taken for `timeout_s`."""
        # One call: each lets go of Python's lock, for which the worker's other threads wait.
        text = msgspec.msgpack.encode(message)
        left = [memoryview(len(text).to_bytes(4, "big") + text), *(memoryview(one) for one in data)]
        since = time.monotonic()
        while left:
            try:
                sent = self.end.sendmsg(left)
            except BlockingIOError as error:
                if time.monotonic() - since > timeout_s:
                    raise GoneError from error
                continue
            except OSError as error:
                raise GoneError from error
            since = time.monotonic()
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if left:
                left[0] = left[0][sent:]

    def answer(self) -> Answer | None:
        """Return the next answer; None if the time is over first."""
        text = self._message()
        try:
            return None if text is None else _answers.decode(text)
        except msgspec.MsgspecError as error:  # bytes of a process that is out of control
            raise GoneError from error

    def request(self) -> Request:
        """Return the next request."""
        text = self._message()
        assert text is not None, "this end has no time-out"
        return _requests.decode(text)

    def data(self, nbytes: int) -> bytes:
        """Return the bytes behind a message."""
        got = bytearray(nbytes)
        first = min(nbytes, len(self._got))
        got[:first] = self._got[:first]
        del self._got[:first]
        with memoryview(got) as rest:
            while first < nbytes:
                read = self.end.recv_into(rest[first:])
                if not read:
                    raise GoneError
                first += read
        return bytes(got)

    def _message(self) -> bytes | None:
        while True:
            if len(self._got) >= 4:
                length = int.from_bytes(self._got[:4], "big")
                if length > MAX_MESSAGE:
                    raise GoneError
                if len(self._got) >= 4 + length:
                    text = bytes(self._got[4 : 4 + length])
                    del self._got[: 4 + length]
                    return text
            try:
                more = self.end.recv(1 << 16)
            except BlockingIOError:
                return None
            except ConnectionError:
                more = b""
            if not more:
                raise GoneError
            self._got += more


def needed_bytes(kind: str, data: bytes | Path) -> int:
    """Return the memory that decoding takes, bytes, estimated from the header.

    Raises:
        BadMediaError: the header cannot be read.
    """
    if kind == "video":
        with open_video(data) as video:
            return video.stream.width * video.stream.height * VIDEO_BYTES_A_PIXEL
    assert isinstance(data, bytes), "images are read whole"
    return decoding_bytes(data)


class Server:
    """Answers the requests of one worker's thread."""

    def __init__(self, channel: Channel, setup: Setup, memory: mmap.mmap) -> None:
        self._channel, self._setup, self._memory = channel, setup, memory
        self._kind = "image"  # of the media item
        self._data: bytes | Path = b""
        self._info: VideoInfo | None = None
        self._sent_s = 0.0

    def run(self) -> None:
        """Answer until the other side is gone."""
        self._channel.send(Ready())
        while True:
            request = self._channel.request()
            self._sent_s = time.monotonic()
            answer = self._try(partial(self._answer, request))
            if answer is not None:
                self._channel.send(answer)

    def _try(self, step: Callable[[], A]) -> A | Bad | Broken:
        """Return what `step` returns, or the answer that tells its error."""
        try:
            return step()
        except BadMediaError as error:
            return Bad(reason=error.reason, stage=error.stage)
        except GoneError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            return Broken(error=f"{type(error).__name__}: {text}")

    def _answer(self, request: Request) -> Answer | None:
        match request:
            case Load():
                return self._load(request)
            case LoadImages():
                return self._images(request)
            case DecodeImage():
                return self._image()
            case ReadSize():
                return self._size()
            case Probe():
                info = self._probe()
                return Found(
                    width=info.width,
                    height=info.height,
                    duration_s=info.duration_s,
                    note=info.note,
                )
            case TakeFrames():
                return self._frames(request.wanted_us)
        return None  # Copied, of one of the last frames

    def _load(self, request: Load) -> Answer:
        self._kind, self._info = request.kind, None
        if request.path is not None:
            self._data = Path(os.fsdecode(request.path))
        else:
            self._data = self._channel.data(request.nbytes)
        return self._needs()

    def _images(self, request: LoadImages) -> Pictures:
        assert len(request.sizes) <= SLOTS, request
        # All are taken before one is decoded: the other side waits until they are.
        images = [self._channel.data(size) for size in request.sizes]
        self._kind, self._info = "image", None
        found: list[Picture | Needs | Bad | Broken] = []
        for slot, data in enumerate(images):
            self._data = data
            needs = self._needs()
            if needs.nbytes <= request.at_once:
                found.append(self._try(partial(self._image, slot)))
            else:
                found.append(needs)
            self._progress()
        self._data = b""
        return Pictures(found=tuple(found))

    def _needs(self) -> Needs:
        try:
            return Needs(nbytes=needed_bytes(self._kind, self._data))
        except Exception:  # decoding reports what is wrong
            return Needs(nbytes=0)

    def _image(self, slot: int = 0) -> Picture:
        assert isinstance(self._data, bytes), "images are sent whole"
        data, self._data = self._data, b""  # its memory is given back with its turn
        decoded = self._setup.fit.decode(data)
        self._put(slot, decoded)
        width, height = decoded.size
        return Picture(width=width, height=height, note=decoded.note)

    def _size(self) -> Answer:
        assert isinstance(self._data, bytes), "images are sent whole"
        try:
            width, height = image_size(self._data)
        except BadMediaError:  # a duplicate: the source that is decoded reports it
            width = height = 0
        return Picture(width=width, height=height)

    def _probe(self) -> VideoInfo:
        if self._info is None:
            self._info = probe(self._data, on_progress=self._progress)
        return self._info

    def _frames(self, wanted_us: tuple[int, ...]) -> Answer:
        ahead = 0  # sent, and not known to be copied
        found = frames(self._data, wanted_us, self._probe(), on_progress=self._progress)
        for number, frame in enumerate(found):
            if ahead == SLOTS:
                copied = self._channel.request()  # the encoder may be slow
                assert isinstance(copied, Copied), copied
                ahead -= 1
            self._put(number % SLOTS, frame.image)
            self._channel.send(
                FrameReady(slot=number % SLOTS, wanted_us=frame.wanted_us, time_s=frame.time_s)
            )
            self._sent_s = time.monotonic()
            ahead += 1
        self._data, self._info = b"", None
        return Over()

    def _put(self, slot: int, image: Image.Image | DecodedImage) -> None:
        size, side = self._setup.slot_bytes, self._setup.fit.size
        there = np.frombuffer(self._memory, np.uint8, size, slot * size)
        there.reshape(side, side, 3)[:] = self._setup.fit.prepare(image)

    def _progress(self) -> None:
        if time.monotonic() - self._sent_s > PROGRESS_EVERY_S:
            self._sent_s = time.monotonic()
            self._channel.send(Progress())


def end_with_parent(parent: int) -> None:
    """Let the kernel end this process with the thread that started it, also while a decoder hangs."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended meanwhile
        os._exit(0)


def main(parent: int, socket_fd: int, memory_fd: int) -> None:
    """Run the process.

    Args:
        parent: id of the process that started it.
        socket_fd: its end of the socket.
        memory_fd: the memory that both share.
    """
    end_with_parent(parent)
    keep_memory()
    channel = Channel(socket.socket(fileno=socket_fd))
    with contextlib.suppress(GoneError):
        setup = channel.request()
        assert isinstance(setup, Setup), setup
        with contextlib.suppress(OSError):  # then it competes with the encoder
            os.nice(setup.nice)
        setup.fit.compile()
        Server(channel, setup, mmap.mmap(memory_fd, SLOTS * setup.slot_bytes)).run()
