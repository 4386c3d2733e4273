"""Which views a media has: `full` for an image, one a sampled frame (`t:<microseconds>`) for a video.

A view is named by the time the rule asks for, a pure function of the video's length, so that encoder and
trainer agree without opening the file. The frame nearest to it is taken; its own time is kept in the
commit (`time_s`). Raising the limit of a video that was short enough for the old one asks for nothing new.
"""

from __future__ import annotations

FULL = "full"
"""The one view of an image."""

FRAMES_PER_SECOND = 2.0
"""At most; Molmo2's rate."""

MAX_FRAMES = 128
"""Of one video unless told otherwise: Molmo2's limit in fine-tuning (384 for long context)."""

_US = 1_000_000
_PREFIX = "t:"


def sample_times(
    duration_s: float, max_frames: int, fps: float = FRAMES_PER_SECOND
) -> tuple[int, ...]:
    """Times to take frames at, in whole microseconds from the first frame, ascending, all different.

    Molmo2's rule: `fps` frames a second and the last one; of a video too long for that, `max_frames`
    at equal distances from the first frame to the last.

    Args:
        duration_s: time of the last frame, seconds after the first.
        max_frames: at most so many, 1 or more.
        fps: at most so many a second.
    """
    if max_frames < 1 or fps <= 0 or not duration_s >= 0:
        raise ValueError(f"{max_frames} frames at {fps} a second of {duration_s} s")
    last = round(duration_s * _US)
    if max_frames == 1:
        return (0,)
    if (max_frames - 1) / fps < duration_s:
        times = [round(last * i / (max_frames - 1)) for i in range(max_frames)]
    else:
        step = _US / fps
        times = [round(i * step) for i in range(int(last / step) + 1)]
        times.append(last)
    return tuple(sorted(set(times)))


def frame_views(
    duration_s: float, max_frames: int, fps: float = FRAMES_PER_SECOND
) -> tuple[str, ...]:
    """The views of a video, in time order."""
    return tuple(time_view(us) for us in sample_times(duration_s, max_frames, fps))


def time_view(microseconds: int) -> str:
    """Name of the view at a time."""
    return f"{_PREFIX}{microseconds}"
