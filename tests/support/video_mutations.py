"""Damage files; decode damaged videos one after another, in a child process because FFmpeg may crash.

python -m tests.support.video_mutations FOLDER FIRST LAST
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cache.format.frame_sampling import sample_times
from model.media.images import BadMediaError
from model.media.video import frames
from model.media.video_index import probe
from model.media.video_open import MAX_FRAME_PIXELS

TIMEOUT_S = 20
"""Longest decode of one video, seconds; a longer one ends the child."""


class Outcome(NamedTuple):
    """The outcome of one damaged video."""

    number: int
    reason: str
    """`frames`, or the reason of BadMediaError."""
    seconds: float
    megabytes: int
    """Peak memory of the process so far."""


def mutated(number: int, files: Sequence[bytes]) -> bytes:
    """Return damaged file `number`: bytes changed, inserted, deleted, from another file, or cut off."""
    rng = np.random.default_rng(number)
    changed = bytearray(files[number % len(files)])
    for _ in range(rng.integers(1, 8)):
        where = int(len(changed) * rng.random() ** (1 if rng.random() < 0.5 else 4))
        match rng.integers(9):
            case 0 | 1 | 2:
                changed[where : where + 1] = bytes([rng.integers(256)])
            case 3:
                changed[where : where + 4] = rng.bytes(4)
            case 4:
                changed[where:where] = rng.bytes(int(rng.integers(1, 40)))
            case 5:
                del changed[where : where + int(rng.integers(1, 400))]
            case 6:
                extremes = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\x80\0\0\0"]
                changed[where : where + 4] = extremes[rng.integers(4)]
            case 7:
                other = files[rng.integers(len(files))]
                length = int(rng.integers(1, 600))
                changed[where : where + length] = other[:length]
            case 8:
                if rng.random() < 0.3:
                    del changed[max(1, where) :]
        changed = changed or bytearray(b"\0")
    return bytes(changed)


def outcome(data: bytes) -> str:
    """Return `frames`, or the reason of BadMediaError. Anything else raises: it is a bug."""
    try:
        info = probe(data)
        shown = list(frames(data, sample_times(info.duration_s, 6), info))
    except BadMediaError as error:
        assert error.reason and "\n" not in error.reason and len(error.reason) <= 250
        assert error.stage == "decode"
        return error.reason
    assert shown and info.frames >= 1 and (info.note is None or "\n" not in info.note)
    for frame in shown:
        assert frame.image.mode == "RGB"
        assert frame.image.width * frame.image.height <= MAX_FRAME_PIXELS
        assert 0 <= frame.time_s <= info.duration_s + 1e-9
    return "frames"


def main() -> None:
    """Print the Outcome of each number as a line of JSON."""
    folder, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    files = [path.read_bytes() for path in sorted(folder.iterdir())]
    for number in range(first, last):
        signal.alarm(TIMEOUT_S)  # not handled: it ends this process even inside FFmpeg
        started = time.monotonic()
        reason = outcome(mutated(number, files))
        seconds = time.monotonic() - started
        print(json.dumps(Outcome(number, reason, seconds, peak_megabytes())), flush=True)


def peak_megabytes() -> int:
    """Return the peak memory of this process. `getrusage` would include the parent's before the fork."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


if __name__ == "__main__":
    main()
