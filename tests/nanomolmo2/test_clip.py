"""A clip is an array that keeps the times of its frames only where frames are chosen.

clip[::2].times
"""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from nanomolmo2.clip import Clip

FEATURES = np.arange(24, dtype=np.float16).reshape(4, 2, 3)
TIMES = np.array([0.0, 0.5, 1.0, 1.48])


def test_choosing_frames_keeps_their_times() -> None:
    clip = Clip(FEATURES, TIMES)
    assert clip.times.tolist() == TIMES.tolist()
    for index in (slice(1, 3), slice(None, None, -1), [3, 0], np.array([True, False, False, True])):
        assert isinstance(clip[index], Clip)
        assert clip[index].times.tolist() == TIMES[index].tolist()
        assert (np.asarray(clip[index]) == FEATURES[index]).all()


def test_anything_else_has_no_times() -> None:
    clip = Clip(FEATURES, TIMES)
    for plain in (clip[0], clip[:, 0], clip[0, 0]):
        assert not isinstance(plain, Clip)
    assert isinstance(clip[0, 0, 0], np.float16)
    for computed in (
        clip + 1,
        np.take(clip, [1, 0, 2, 3], axis=0),
        clip.reshape(4, 6),
        clip.copy(),
    ):
        with pytest.raises(ValueError, match="has no times; take those of the clip"):
            computed.times  # noqa: B018


def test_a_clip_travels_with_its_times() -> None:
    clip = Clip(FEATURES, TIMES)
    for again in (pickle.loads(pickle.dumps(clip)), copy.deepcopy(clip), copy.copy(clip)):
        assert again.times.tolist() == TIMES.tolist()
        assert (again == FEATURES).all()
    assert torch.from_numpy(clip).shape == (4, 2, 3)


def test_times_fit_the_frames() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        Clip(FEATURES, TIMES[:3])
