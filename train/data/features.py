"""Read the features of one sample's images and videos from the cache, in the form `model.inference` takes.

features = read_features(samples, samples.media_of(0).tolist(), reader)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cache.format.spec import ARRAY_OF, FeatureSpec
from cache.store.reader import FeatureReader
from model.inference import Video
from nanomolmo2.unpack import unpack
from train.data.loader import feature_order
from train.data.sample_list import SampleList


def feature_bytes(samples: SampleList, media: Sequence[int], spec: FeatureSpec) -> int:
    """Return the bytes of the features of some media, unpacked to float16."""
    tokens = sum(len(samples.rows_of(m)) * spec.tokens(_array(samples, m)) for m in media)
    return 2 * tokens * spec.width


def read_features(
    samples: SampleList, media: Sequence[int], reader: FeatureReader
) -> list[torch.Tensor | Video]:
    """Return the features of some media items, in order; each row is read once.

    An image is a (tokens, width) float16 tensor; a video is a Video with (frames, tokens, width) features.
    """
    spec = reader.spec
    rows, order = feature_order(samples, np.array(media, dtype=np.int64), spec)
    parts = [torch.empty(0, spec.width, dtype=torch.float16)]
    for array, numbers in rows.items():
        if not len(numbers):
            continue
        codes = np.empty((len(numbers), spec.row_bytes(array)), np.uint8)
        reader.read_into(array, numbers, codes)
        features = unpack(torch.from_numpy(codes), spec.codec, spec.tokens(array), spec.width)
        parts.append(features.flatten(0, 1))
    found = torch.cat(parts).index_select(0, torch.from_numpy(order))
    result: list[torch.Tensor | Video] = []
    at = 0
    for m in media:
        count, tokens = len(samples.rows_of(m)), spec.tokens(_array(samples, m))
        here = found[at : at + count * tokens]
        at += len(here)
        if samples.is_video(m):
            times = tuple(samples.times_of(m).tolist())
            result.append(Video(times_s=times, features=here.unflatten(0, (count, tokens))))
        else:
            result.append(here)
    return result


def _array(samples: SampleList, item: int) -> str:
    """Return the name of the array that has a media item's rows."""
    return ARRAY_OF["video" if samples.is_video(item) else "image"]
