"""Convert rows in several processes, so that all cores work.

    with Converters(conversion, batch_rows=3, slots=6, workers=2) as converters:
        converters.source(0, 3)[:] = ...                     # (3, source_bytes): rows to convert
        rows, errors, seconds = converters.convert(0, 3)     # any thread; waits for a free process

numpy releases the interpreter's lock for a few microseconds at a time, which is too short for many threads.
Rows are in slots of a memory that all processes map. A process reads lines from its standard input, each with
the number of a slot and of its rows, and answers each with a line: no row passes through a pipe. It ends when
its input does, so also when the main process is killed. With one worker there is no process: the caller's
thread converts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import mmap
import os
import queue
import signal
import subprocess
import sys
import tempfile
import time
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from cache.errors import LostProcessError
from cache.maintenance.convert_rows import Conversion, Rows

END_S = 10.0
"""Seconds in which a process that is idle must end."""

PROGRAM = (
    "import sys; sys.path[:] = sys.argv[1:]; from cache.maintenance.processes import serve; serve()"
)
"""What a process runs. Its words are the path on which the main process finds this package."""

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Environment of a process: numpy's libraries start no threads in it."""

KEPT_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
}
"""Environment of a process, unless the user says else: glibc keeps what is freed, for the next row."""

Errors = npt.NDArray[np.float32]


class _Slots:
    """Places for batches of rows in a memory: rows of the source, rows of the target, and their errors."""

    def __init__(self, memory: mmap.mmap, conversion: Conversion, batch_rows: int):
        self.memory, self._conversion, self._batch_rows = memory, conversion, batch_rows

    @staticmethod
    def nbytes(conversion: Conversion, batch_rows: int) -> int:
        """Return the bytes of one slot, a multiple of 64."""
        row = conversion.source_bytes + conversion.target_bytes + 4
        return -(-batch_rows * row // 64) * 64

    def views(self, slot: int, count: int) -> tuple[Rows, Rows, Errors]:
        """Return a slot's first rows: (count, source_bytes), (count, target_bytes), and errors (count,)."""
        sizes = self._conversion.source_bytes, self._conversion.target_bytes, 4
        start = slot * self.nbytes(self._conversion, self._batch_rows)
        parts = []
        for size in sizes:
            part = np.frombuffer(self.memory, np.uint8, count * size, start)
            parts.append(part.reshape(count, size))
            start += self._batch_rows * size
        source, target, errors = parts
        return source, target, errors.view(np.float32)[:, 0]


class Converters:
    """Processes that convert batches of rows. Threads may share it."""

    def __init__(self, conversion: Conversion, *, batch_rows: int, slots: int, workers: int):
        """Start the processes.

        Args:
            conversion: what they do.
            batch_rows: rows of a batch, at most.
            slots: batches that exist at the same time.
            workers: processes; 1: none is started.

        Raises:
            OSError: there is no memory, or no process can be started.
        """
        self._conversion = conversion
        nbytes = slots * _Slots.nbytes(conversion, batch_rows)
        self._processes: list[_Process] = []
        self._free: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        if workers == 1:
            self._slots = _Slots(mmap.mmap(-1, nbytes), conversion, batch_rows)
            return
        with contextlib.ExitStack() as undo:
            fd = _nameless_file()
            undo.callback(os.close, fd)
            os.ftruncate(fd, nbytes)
            self._slots = _Slots(mmap.mmap(fd, nbytes), conversion, batch_rows)
            undo.push(self.__exit__)
            task = {
                "conversion": dataclasses.asdict(conversion),
                "batch_rows": batch_rows,
                "fd": fd,
                "nbytes": nbytes,
            }
            for _ in range(workers):
                self._processes.append(_Process(task, fd))
            undo.pop_all()
            os.close(fd)  # the processes have it, and the mapping does not need it
        for process in self._processes:
            self._free.put(process)

    def source(self, slot: int, count: int) -> Rows:
        """Return the memory (count, source_bytes) for the rows of a batch."""
        return self._slots.views(slot, count)[0]

    def convert(self, slot: int, count: int) -> tuple[Rows, Errors, float]:
        """Convert the first `count` rows of a slot.

        Returns:
            Rows (count, target_bytes), their errors (count,), and the seconds that it took. The rows are
            valid until the slot is used again.

        Raises:
            LostProcessError: the process has ended, or it failed.
        """
        source, target, errors = self._slots.views(slot, count)
        if not self._processes:
            start = time.perf_counter()
            errors[:] = self._conversion(source, target)
            return target, errors, time.perf_counter() - start
        process = self._free.get()
        try:
            seconds = process.convert(slot, count)
        finally:
            self._free.put(
                process
            )  # a lost one, too: whoever gets it is told, and nobody waits for ever
        return target, errors, seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None
    ) -> None:
        for process in self._processes:
            process.end(now=kind is not None)
        for process in self._processes:
            process.wait()


class _Process:
    """One process that converts rows. Only one thread may use it at a time."""

    def __init__(self, task: dict[str, object], fd: int):
        self._popen = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(fd,),
            env={**KEPT_MEMORY, **os.environ, **ONE_THREAD},
            process_group=0,  # Ctrl-C in a terminal is for the main process alone
        )
        with contextlib.suppress(OSError):  # it has ended already, which `convert` reports
            self._send(json.dumps(task))

    def _send(self, line: str) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.write(f"{line}\n".encode())
        self._popen.stdin.flush()

    def convert(self, slot: int, count: int) -> float:
        """Convert a batch; return the seconds that it took.

        Raises:
            LostProcessError: the process has ended, or it failed.
        """
        assert self._popen.stdout is not None
        answer = b""
        with contextlib.suppress(OSError):
            self._send(f"{slot} {count}")
            answer = self._popen.stdout.readline()
        if not answer.endswith(b"\n"):
            raise LostProcessError(f"a process that converts rows {_how_it_ended(self._popen)}")
        try:
            return float(answer)
        except ValueError:
            what = answer.decode(errors="replace").strip()
            raise LostProcessError(f"a process that converts rows failed: {what}") from None

    def end(self, *, now: bool) -> None:
        """Tell the process to end: after its batch, or now."""
        assert self._popen.stdin is not None and self._popen.stdout is not None
        if now:
            self._popen.kill()
        for pipe in (self._popen.stdin, self._popen.stdout):
            with contextlib.suppress(OSError):
                pipe.close()

    def wait(self) -> None:
        """Wait until the process has ended."""
        try:
            self._popen.wait(END_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()


def _how_it_ended(popen: subprocess.Popen[bytes]) -> str:
    try:
        code = popen.wait(END_S)
    except subprocess.TimeoutExpired:
        return "does not answer"
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL), as the system does when memory is full"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _nameless_file() -> int:
    """Return the descriptor of an empty file in memory, or, where there is no such thing, on disk."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("rows")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def serve() -> None:
    """Convert the batches that standard input names, until it ends."""
    task = json.loads(sys.stdin.buffer.readline())
    conversion = Conversion(**task["conversion"])
    memory = mmap.mmap(task["fd"], task["nbytes"])
    os.close(task["fd"])
    slots = _Slots(memory, conversion, task["batch_rows"])
    is_compiled = False
    for line in sys.stdin.buffer:
        start = time.perf_counter()
        try:
            if not is_compiled:
                conversion.compile()
                is_compiled = True
            slot, count = map(int, line.split())
            source, target, errors = slots.views(slot, count)
            errors[:] = conversion(source, target)
            answer = repr(time.perf_counter() - start)
        except Exception as error:  # the main process reports it
            answer = f"{type(error).__name__}: {error}".replace("\n", " ")
        with contextlib.suppress(BrokenPipeError):  # the main process has ended
            os.write(sys.stdout.fileno(), f"{answer}\n".encode())
