"""The tokens that represent an image or a video in a sequence, and their number.

    placeholders = Placeholders.of(reader.spec, tokenizer)
    placeholders.contents(samples, [3, 0])    # the (n,) tokens of two media items
    placeholders.lengths(samples)             # (K,) the number of tokens of each media item

K media items of a sample list, W feature rows of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cache.format.spec import ARRAY_OF, FeatureSpec
from cache.store.references import IMAGE, edges_of
from model.language.chat_template import timestamp_ids, video_token_ids
from model.language.tokenizer import image_id
from train.data.sample_list import Ints, SampleList

TIE = 1e-6
"""Times whose tenths of a second are within this of a tie are formatted one by one, because rounding a
multiple of ten and formatting a float may disagree there."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Placeholders:
    """The placeholder tokens of one space and one tokenizer."""

    tokenizer: Any
    """The language model's tokenizer."""
    image_tokens: int
    """Feature tokens of an image."""
    frame_tokens: int
    """Feature tokens of a frame; its timestamp precedes them as text."""

    @staticmethod
    def of(spec: FeatureSpec, tokenizer: Any) -> Placeholders:
        """Return the placeholders for the rows of a space, of what the connector gets."""
        return Placeholders(
            tokenizer=tokenizer,
            image_tokens=spec.seen.tokens(ARRAY_OF["image"]),
            frame_tokens=spec.seen.tokens(ARRAY_OF["video"]),
        )

    def contents(self, samples: SampleList, media: Iterable[int]) -> list[npt.NDArray[np.int32]]:
        """Return the (n,) tokens of each of some media items.

        An image is one image token for each feature token; a video has for each frame its time as text,
        then its image tokens.
        """
        image = np.full(self.image_tokens, image_id(self.tokenizer), dtype=np.int32)
        return [
            video_token_ids(self.tokenizer, samples.times_of(m).tolist(), self.frame_tokens)
            if samples.is_video(m)
            else image
            for m in media
        ]

    def lengths(self, samples: SampleList) -> Ints:
        """Return the (K,) numbers of tokens that `contents` makes of each media item."""
        result = np.full(len(samples.kinds), self.image_tokens, dtype=np.int64)
        videos = samples.kinds != IMAGE
        if not videos.any():
            return result
        tenths, of = np.unique(tenths_of(samples.times), return_inverse=True)
        # Timestamps are tokenised separately from the text around them, so equal times have equal lengths.
        stamps = [
            len(timestamp_ids(self.tokenizer, f"{t // 10}.{t % 10} ")) if t >= 0 else 0
            for t in tenths.tolist()
        ]
        frames = np.array(stamps, dtype=np.int64)[of] + self.frame_tokens
        result[videos] = np.diff(edges_of(frames)[samples.starts])[videos]
        return result


def tenths_of(times_s: npt.NDArray[np.float64]) -> Ints:
    """Return times in tenths of a second, rounded as `timestamp_text` prints them; -1 for NaN."""
    times_s = np.where(times_s < 0, 0.0, times_s)
    scaled = np.where(np.isnan(times_s), -1.0, times_s * 10)
    tenths = np.rint(scaled).astype(np.int64)
    ties = np.flatnonzero(np.abs(scaled - np.floor(scaled) - 0.5) < TIE)
    values, of = np.unique(times_s[ties], return_inverse=True)
    exact = [int(f"{value:.1f}".replace(".", "")) for value in values.tolist()]
    tenths[ties] = np.array(exact, dtype=np.int64)[of]
    return tenths
