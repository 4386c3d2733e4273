"""Decode in a process of its own, which is started again when it crashes or hangs. The worker's side.

    decoder = ProcessDecoder(setup, timeout_s=120.0, running=lambda: True)
    decoder.take(item)
    decoder.needed()            # starts the process, and sends it the item
    decoder.image()
    decoder.images(items, at_once=32 << 20)    # small ones together, with one request

The other side is decode_process.py. A media item that a process crashes or hangs on is tried once more, in a
new process; then it has failed. If the process is killed from outside, by the system when memory runs out,
the item is tried twice more, and the failure is ours. If images that were sent together lose a process, each
of them is tried alone, as if it were the first time.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from encode.worker.decode_process import (
    SLOTS,
    Answer,
    Bad,
    Broken,
    Channel,
    Copied,
    DecodeImage,
    Found,
    FrameReady,
    GoneError,
    Load,
    LoadImages,
    Needs,
    Over,
    Picture,
    Pictures,
    Probe,
    Progress,
    ReadSize,
    Ready,
    Request,
    Setup,
    TakeFrames,
)
from encode.worker.decoders import Decoded, DecodedFrame, Decoder
from encode.worker.media_item import MediaItem, Pixels
from model.media.images import BadMediaError

START_S = 120.0
"""Seconds that a process may take to start, on a loaded machine."""

POLL_S = 0.5
"""Seconds between two looks at whether the job ends."""

LEAST_SHARE = 0.1
"""A process that is ready to run, and has had less of a core than this, is waiting for one."""

TRIES = 2
"""A media item has failed once this many processes have crashed or hung on it."""

KILLS = 3
"""After being killed this many times with one media item, a process is not started again for it. The system
kills when memory runs out, so this is an error of ours."""

KILLED = (signal.SIGKILL, signal.SIGTERM)
"""Signals that do not come from a decoder."""

# Run by `python -c`: the module search path of this process, and what `main` takes.
PROGRAM = """
import json, sys
path, *numbers = json.loads(sys.argv[1])
sys.path[:] = path
from encode.worker.decode_process import main
main(*numbers)
"""

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Environment of the processes: numpy's libraries start no threads, which nothing there would use."""

A = TypeVar("A", bound=Answer)
T = TypeVar("T")


class DecodeProcessError(Exception):
    """An error in a decoding process that is not the media's."""


class _LostError(Exception):
    """The process has ended, or has been ended, in the middle of a media item."""

    def __init__(self, how: str, detail: str) -> None:
        super().__init__(how, detail)
        self.how = how
        """What the item did to it: `crashed` or `hung`; or `killed`, if somebody else ended it."""
        self.detail = detail


class ProcessDecoder(Decoder):
    """Decodes in a process of its own, which is started again when it crashes or hangs."""

    def __init__(self, setup: Setup, timeout_s: float, running: Callable[[], bool]):
        """Start nothing before the first item.

        Args:
            setup: how images become encoder inputs.
            timeout_s: seconds without progress after which a process counts as hanging.
            running: whether to go on waiting for an answer. Once it returns False, every call fails soon.
        """
        self._setup, self._timeout_s, self._running = setup, timeout_s, running
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._loaded = False
        self._losses: list[_LostError] = []
        self._memory_fd = _shared_memory(SLOTS * setup.slot_bytes)
        self._memory = mmap.mmap(self._memory_fd, SLOTS * setup.slot_bytes)

    def take(self, item: MediaItem) -> None:
        """Decode this item from now on."""
        super().take(item)
        self._loaded, self._losses = False, []

    def images(self, items: Sequence[MediaItem], at_once: int) -> list[Decoded | Exception | None]:
        """Decode small images with one request. If that loses the process, each is to be taken alone."""
        self._loaded, self.touch = False, lambda: None
        data = [item.data for item in items if isinstance(item.data, bytes)]
        assert len(data) == len(items) <= SLOTS, "images are read whole"
        request = LoadImages(sizes=tuple(map(len, data)), at_once=at_once)
        try:
            if self._process is None:
                self._start()
            self._send(request, *data)
            answer = self._answer()
            if not isinstance(answer, Pictures) or len(answer.found) != len(items):
                raise self._astray(answer)
        except _LostError:  # it is not known by which of them
            return [None] * len(items)
        return [self._found(slot, one) for slot, one in enumerate(answer.found)]

    def _found(
        self, slot: int, answer: Picture | Needs | Bad | Broken
    ) -> Decoded | Exception | None:
        match answer:
            case Picture():
                size = answer.width, answer.height
                return Decoded(pixels=self._copy(slot), size=size, note=answer.note)
            case Bad():
                return BadMediaError(answer.reason, answer.stage)
            case Broken():
                return DecodeProcessError(answer.error)
        return None

    def needed(self) -> int:
        """Send the item to the process; return the memory that decoding takes."""
        return self._try(self._load)

    def image(self) -> Decoded:
        """Decode an image."""
        answer = self._try(lambda: self._ask(DecodeImage(), Picture))
        self._loaded = False
        size = answer.width, answer.height
        return Decoded(pixels=self._copy(0), size=size, note=answer.note)

    def size(self) -> tuple[int, int]:
        """Return the size of an image by its header."""
        answer = self._try(lambda: self._ask(ReadSize(), Picture))
        return answer.width, answer.height

    def probe(self) -> Found:
        """Read a video once."""
        return self._try(lambda: self._ask(Probe(), Found))

    def frames(self, wanted_us: Sequence[int]) -> Iterator[DecodedFrame]:
        """Yield the frames nearest to these times."""
        left = tuple(wanted_us)
        try:
            while left:
                try:
                    for frame in self._frames(left):
                        left = left[1:]
                        yield frame
                    break
                except _LostError as lost:
                    self._count(lost)  # a frame does not depend on which others are asked for
        except GeneratorExit:
            self._end()  # it would go on with frames that nobody wants
            raise

    def close(self) -> None:
        """End the process."""
        self._end()
        self._memory.close()
        os.close(self._memory_fd)

    # ---- requests and answers

    def _try(self, step: Callable[[], T]) -> T:
        """Return what `step` returns; repeat it with a new process if this one is lost."""
        while True:
            try:
                return step()
            except _LostError as lost:
                self._count(lost)

    def _frames(self, wanted_us: tuple[int, ...]) -> Iterator[DecodedFrame]:
        if not self._loaded:
            self._load()
        self._send(TakeFrames(wanted_us=wanted_us))
        while not isinstance(answer := self._answer(), Over):
            if not isinstance(answer, FrameReady):
                raise self._astray(answer)
            pixels = self._copy(answer.slot)
            self._send(Copied())
            yield DecodedFrame(pixels=pixels, wanted_us=answer.wanted_us, time_s=answer.time_s)
        self._loaded = False

    def _ask(self, request: Request, expected: type[A]) -> A:
        if not self._loaded:
            self._load()
        self._send(request)
        answer = self._answer()
        if not isinstance(answer, expected):
            raise self._astray(answer)
        return answer

    def _load(self) -> int:
        if self._process is None:
            self._start()
        data, kind = self.item.data, self.item.task.kind
        if isinstance(data, Path):
            self._send(Load(kind=kind, path=os.fsencode(data)))
        else:
            self._send(Load(kind=kind, nbytes=len(data)), data)
        answer = self._answer()
        if not isinstance(answer, Needs):
            raise self._astray(answer)
        self._loaded = True
        return answer.nbytes

    def _send(self, request: Request, *data: bytes) -> None:
        assert self._channel is not None, "the process runs"
        try:
            self._channel.send(request, *data, timeout_s=self._timeout_s)
        except GoneError as error:
            hung = isinstance(error.__cause__, BlockingIOError)
            raise self._lost(hung=hung) from None

    def _answer(self, timeout_s: float | None = None) -> Answer:
        """Return the next answer that is no sign of life.

        Raises:
            _LostError: the process has crashed, has been killed, or hangs.
            BadMediaError, DecodeProcessError: it has raised an error.
        """
        assert self._channel is not None and self._process is not None, "the process runs"
        since, used_s = time.monotonic(), None
        while True:
            try:
                answer = self._channel.answer()
            except GoneError:
                raise self._lost(hung=False) from None
            self.touch()
            if answer is None:
                if not self._running():
                    self._end()
                    raise DecodeProcessError("the job ends")
                waited = time.monotonic() - since
                used_s = _core_s(self._process.pid) if used_s is None else used_s
                if waited > (timeout_s or self._timeout_s):
                    more = _core_s(self._process.pid)
                    # One that waits for a core, behind other programs, makes no progress and does not hang.
                    if used_s is None or more is None or more - used_s > LEAST_SHARE * waited:
                        raise self._lost(hung=True)
            elif isinstance(answer, Progress):
                since, used_s = time.monotonic(), None
            elif isinstance(answer, Bad):
                raise BadMediaError(answer.reason, answer.stage)
            elif isinstance(answer, Broken):
                raise DecodeProcessError(answer.error)
            else:
                return answer

    def _copy(self, slot: int) -> Pixels:
        if not 0 <= slot < SLOTS:
            raise self._astray(slot)
        size, side = self._setup.slot_bytes, self._setup.fit.size
        there = np.frombuffer(self._memory, np.uint8, size, slot * size)
        return there.reshape(side, side, 3).copy()

    # ---- the process

    def _start(self) -> None:
        """Start the process and wait until it is ready."""
        ours, its = socket.socketpair()
        with its:
            words = [sys.path, os.getpid(), its.fileno(), self._memory_fd]
            self._process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, json.dumps(words)],
                pass_fds=(its.fileno(), self._memory_fd),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C on a terminal reaches the job alone, which ends it
                env={**os.environ, **ONE_THREAD},
            )
        self._channel = Channel(ours, POLL_S)
        try:
            self._send(self._setup)
            ready = self._answer(START_S)
        except _LostError as lost:
            if lost.how == "killed":
                raise
            raise DecodeProcessError(
                f"a process for decoding does not start ({lost.detail})"
            ) from None
        assert isinstance(ready, Ready), ready

    def _lost(self, *, hung: bool) -> _LostError:
        """End the process, and return what happened to it."""
        process = self._process
        assert process is not None, "the process runs"
        if hung:
            self._end()
            return _LostError("hung", f"no progress for {self._timeout_s:.0f} s")
        with contextlib.suppress(subprocess.TimeoutExpired):  # it has closed its end, and goes on
            process.wait(POLL_S)
        code = process.returncode
        self._end()
        if code is not None and -code in KILLED:
            return _LostError("killed", signal.Signals(-code).name)
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):  # a real-time signal
                return _LostError("crashed", signal.Signals(-code).name)
        why = "its answers make no sense" if code is None else f"exit code {code}"
        return _LostError("crashed", why)

    def _astray(self, answer: object) -> _LostError:
        """End a process that answers what was not asked: a damaged one, like one that has crashed."""
        self._end()
        return _LostError("crashed", f"answered {type(answer).__name__}")

    def _count(self, lost: _LostError) -> None:
        """Count a lost process.

        Raises:
            BadMediaError: the media item is the cause.
            DecodeProcessError: the cause is unknown.
        """
        self._losses.append(lost)
        if sum(one.how == "killed" for one in self._losses) >= KILLS:
            raise DecodeProcessError(
                f"the process that decodes it was killed {KILLS} times ({lost.detail}); if memory ran out, "
                "decode fewer at a time: --threads N"
            )
        if sum(one.how != "killed" for one in self._losses) >= TRIES:
            raise BadMediaError(
                f"{lost.how} the process that decodes it, also at a second try ({lost.detail})"
            )

    def _end(self) -> None:
        self._loaded = False
        if self._channel is not None:
            self._channel.end.close()
            self._channel = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _core_s(process: int) -> float | None:
    """Return the seconds of a core that a process has used; None if it waits for something else, or is gone.

    Only Linux tells.
    """
    try:
        words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK") if words[0] == "R" else None


def _shared_memory(nbytes: int) -> int:
    """Return a descriptor of memory without a name, so that nothing is left when its users end."""
    if sys.platform == "linux":
        fd = os.memfd_create("decoded", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, nbytes)
        # Reading behind the end of memory that the other side has cut would end this process.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    else:
        with tempfile.TemporaryFile() as file:
            os.ftruncate(file.fileno(), nbytes)
            fd = os.dup(file.fileno())
    return fd
