"""What a model sees of one sample's images and videos, from the cache, as `model.inference` wants it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cache.format.spec import ARRAY_OF, FeatureSpec
from cache.store.reader import FeatureReader
from model.inference import Video
from model.quantize import unpack
from train.data.loader import feature_order
from train.data.sample_list import Join


def feature_bytes(joined: Join, media: Sequence[int], spec: FeatureSpec) -> int:
    """Of some media of a join, unpacked to float16."""
    tokens = sum(len(joined.rows_of(m)) * spec.tokens(array_of(joined, m)) for m in media)
    return 2 * tokens * spec.width


def looked_at(
    joined: Join, media: Sequence[int], reader: FeatureReader
) -> list[torch.Tensor | Video]:
    """Features of some media of a join as `answer` wants them, as stored; each row is read once."""
    spec = reader.spec
    rows, order = feature_order(joined, np.array(media, dtype=np.int64), spec)
    parts = [torch.empty(0, spec.width, dtype=torch.float16)]
    for array, numbers in rows.items():
        if not len(numbers):
            continue
        codes = np.empty((len(numbers), spec.row_bytes(array)), np.uint8)
        reader.read_into(array, numbers, codes)
        features = unpack(torch.from_numpy(codes), spec.layout, spec.tokens(array), spec.width)
        parts.append(features.flatten(0, 1))
    found = torch.cat(parts).index_select(0, torch.from_numpy(order))
    result: list[torch.Tensor | Video] = []
    at = 0
    for m in media:
        video, count = joined.is_video(m), len(joined.rows_of(m))
        tokens = spec.tokens(array_of(joined, m))
        here = found[at : at + count * tokens]
        at += len(here)
        if video:
            times = tuple(joined.times_of(m).tolist())
            result.append(Video(times_s=times, features=here.unflatten(0, (count, tokens))))
        else:
            result.append(here)
    return result


def array_of(joined: Join, media: int) -> str:
    """The array that its rows are in."""
    return ARRAY_OF["video" if joined.is_video(media) else "image"]
