"""The views of a media item: `full` for an image, `t:<microseconds>` for each sampled frame of a video.

    frame_views(2.0, max_frames=128)    # ("t:0", "t:500000", "t:1000000", "t:1500000", "t:2000000")

A frame's view is the time that the sampling rule requests. It depends on the video's length alone, so
encoder and trainer agree without opening the file. The row is that of the frame nearest to this time; the
commit records the frame's own time (`time_s`). A higher limit changes nothing for videos below the old one.
"""

from __future__ import annotations

FULL = "full"
"""The one view of an image."""

FRAMES_PER_SECOND = 2.0
"""Frames per second at most. Molmo2 uses 2."""

MAX_FRAMES = 128
"""Frames of one video by default. Molmo2 uses 128 in fine-tuning, and 384 for long context."""

_US = 1_000_000
_PREFIX = "t:"


def sample_times(
    duration_s: float, max_frames: int, fps: float = FRAMES_PER_SECOND
) -> tuple[int, ...]:
    """Return the times to sample frames at: microseconds after the first frame, ascending, all different.

    This is Molmo2's rule: `fps` frames a second and the last frame. If these are more than `max_frames`, the
    times are `max_frames` at equal distances from the first frame to the last.

    Args:
        duration_s: seconds from the first frame to the last.
        max_frames: frames at most, 1 or more.
        fps: frames per second at most.

    Raises:
        ValueError: an argument is out of range, or the duration is NaN.
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
    """Return the views of a video in time order. The arguments are those of `sample_times`."""
    return tuple(time_view(us) for us in sample_times(duration_s, max_frames, fps))


def time_view(microseconds: int) -> str:
    """Return the view of the frame at a time."""
    return f"{_PREFIX}{microseconds}"
