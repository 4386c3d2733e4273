"""Read and decode some media in a process of its own, and say what each cost.

python -c "from encode.plan.probe_items import main; main()" < request.json   # a line of JSON for each item

A file that crashes or hangs its decoder ends this process and not the job that plans: see `probe.py`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from cache.format.frame_sampling import sample_times
from configs.hardware import keep_memory
from encode.worker.local_files import read_local
from encode.worker.messages import SourceTask
from model.media.fit import InputFit
from model.media.video import frames
from model.media.video_index import probe

FRAMES = 8
"""Frames of a video that are decoded. Their cost is taken for that of the others."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What to probe."""

    items: list[tuple[str, str]]
    """(source, kind) of each media item: a path, or a name of embedded media."""
    fit: InputFit
    """How an image becomes the encoder's input."""
    max_frames: int
    """Frames of one video, at most."""
    stop_s: float
    """Seconds after which no further item is begun."""
    nice: int = 0
    """Added to the niceness of the process: that of the processes that decode in a job."""


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """What one media item cost."""

    number: int
    """Its place in the request."""
    read_s: float = 0.0
    """Seconds to open, read and hash it."""
    cpu_s: float = 0.0
    """Processor seconds to read and decode it; of a video, without its frames."""
    frame_cpu_s: float = 0.0
    """Processor seconds to decode one frame of a video."""
    decode_s: float = 0.0
    """Seconds to decode what was decoded; more than its processor seconds if others use the cores."""
    decode_cpu_s: float = 0.0
    """Processor seconds of that."""
    duration_s: float | None = None
    """Length of a video, seconds."""
    failed: bool = False
    """Whether it cannot be used."""


@dataclass
class _Clock:
    """Measures the processor seconds between calls."""

    last: float = 0.0

    def lap(self) -> float:
        now = time.process_time()
        before, self.last = self.last, now
        return now - before


def probe_items(request: Request) -> Iterator[Item]:
    """Yield what each item cost, in order, until the time is up."""
    request.fit.compile()
    deadline = time.monotonic() + request.stop_s
    for number, (source, kind) in enumerate(request.items):
        if time.monotonic() > deadline:
            return
        yield _probe(number, SourceTask(source=source, kind=kind), request)


def _probe(number: int, task: SourceTask, request: Request) -> Item:
    clock, start = _Clock(time.process_time()), time.perf_counter()
    read_s = read_cpu_s = 0.0
    try:
        data, _ = read_local(task)
        read_s, read_cpu_s = time.perf_counter() - start, clock.lap()
        if task.kind == "image":
            assert isinstance(data, bytes), "images are read whole"
            request.fit.prepare(request.fit.decode(data))
            cpu_s, frame_cpu_s, duration_s = clock.lap(), 0.0, None
            decode_cpu_s = cpu_s
        else:
            info = probe(data)
            cpu_s, duration_s = clock.lap(), info.duration_s
            wanted = sample_times(info.duration_s, request.max_frames)[:FRAMES]
            for frame in frames(data, wanted, info):
                request.fit.prepare(frame.image)
            decode_cpu_s = clock.lap()
            frame_cpu_s = decode_cpu_s / len(wanted)
            decode_cpu_s += cpu_s
        return Item(
            number=number,
            read_s=read_s,
            cpu_s=read_cpu_s + cpu_s,
            frame_cpu_s=frame_cpu_s,
            decode_s=time.perf_counter() - start - read_s,
            decode_cpu_s=decode_cpu_s,
            duration_s=duration_s,
        )
    except Exception:  # of our own code, too: the job records it; here it costs what it cost
        return Item(number=number, read_s=read_s, cpu_s=read_cpu_s + clock.lap(), failed=True)


def main() -> None:
    """Answer the request on the standard input."""
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
    keep_memory()
    with contextlib.suppress(OSError):
        os.nice(request.nice)
    for item in probe_items(request):
        sys.stdout.buffer.write(msgspec.json.encode(item) + b"\n")
        sys.stdout.buffer.flush()
