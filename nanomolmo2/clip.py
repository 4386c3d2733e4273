"""The features of a video: an array with the times of its frames.

    clip = cache["videos/cat.mp4"]        # (frames, tokens, width) float16
    clip.times                            # (frames,) float64, seconds after the first frame
    clip[::2].times                       # those of every second frame
    np.asarray(clip)                      # a plain array

Choosing frames keeps the times, and so do `copy.copy` and pickle. Any other result has no times.
"""

from __future__ import annotations

from typing import Any, Self, SupportsIndex

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]


class Clip(np.ndarray[tuple[int, int, int], np.dtype[np.float16]]):
    """(frames, tokens, width) float16, the frames in time order, with their `times`."""

    _times: Times | None

    def __new__(cls, features: npt.NDArray[np.float16], times: Times) -> Self:
        """View `features` as a clip with `times` (frames,)."""
        if features.ndim != 3 or times.shape != features.shape[:1]:
            raise ValueError(f"features {features.shape} and times {times.shape} do not fit")
        clip = features.view(cls)
        clip._times = times
        return clip

    def __array_finalize__(self, _source: npt.NDArray[Any] | None, /) -> None:
        self._times = None  # numpy calls this for each new array, whose frames may be others

    @property
    def times(self) -> Times:
        """(frames,) time of each frame, in seconds after the first frame of the video.

        Raises:
            ValueError: this array was computed from a clip in another way than by choosing frames.
        """
        if self._times is None:
            raise ValueError("an array computed from a clip has no times; take those of the clip")
        return self._times

    def __getitem__(self, index: Any, /) -> Any:
        """Return what an array returns; a choice of frames is a clip, anything else a plain array."""
        found = super().__getitem__(index)
        if not isinstance(found, Clip):
            return found
        if self._times is not None and found.ndim == 3 and not isinstance(index, tuple):
            found._times = self._times[index]
            return found
        return np.asarray(found)

    def __copy__(self) -> Self:
        return self._restored(np.array(self), self._times)

    def __deepcopy__(self, _memo: dict[int, Any] | None, /) -> Self:
        return self.__copy__()

    def __reduce__(self) -> tuple[Any, ...]:
        return self._restored, (np.asarray(self), self._times)

    def __reduce_ex__(self, _protocol: SupportsIndex, /) -> tuple[Any, ...]:
        return self.__reduce__()

    @classmethod
    def _restored(cls, features: npt.NDArray[np.float16], times: Times | None) -> Self:
        return features.view(cls) if times is None else cls(features, times)
