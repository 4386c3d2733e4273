"""What stands in a sequence for an image or a video, and how long it is.

K distinct media of a join, W rows of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cache.format.spec import ARRAY_OF, FeatureSpec
from cache.store.references import IMAGE
from model.language.chat_template import stamp_ids, video_ids
from model.language.tokenizer import IMAGE_TOKEN, token_id
from train.data.sample_list import Ints, Join

TIE = 1e-6
"""Times this near to the middle of two tenths are rounded as text is, one by one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Placeholders:
    """The rule, for one space and one tokenizer."""

    tokenizer: Any
    """Of the language model."""
    image_tokens: int
    """Feature tokens of an image."""
    frame_tokens: int
    """Feature tokens of a frame; its time stands before them as text."""

    @staticmethod
    def of(spec: FeatureSpec, tokenizer: Any) -> Placeholders:
        """Those of a space."""
        return Placeholders(
            tokenizer=tokenizer,
            image_tokens=spec.tokens(ARRAY_OF["image"]),
            frame_tokens=spec.tokens(ARRAY_OF["video"]),
        )

    @property
    def image_token_id(self) -> int:
        """What stands where a feature goes."""
        return token_id(self.tokenizer, IMAGE_TOKEN)

    def image(self) -> npt.NDArray[np.int32]:
        """Tokens of an image."""
        return np.full(self.image_tokens, self.image_token_id, dtype=np.int32)

    def video(self, times_s: Iterable[float]) -> npt.NDArray[np.int32]:
        """Tokens of a video with frames at these times."""
        return video_ids(self.tokenizer, times_s, self.frame_tokens)

    def contents(self, join: Join, media: Iterable[int]) -> list[npt.NDArray[np.int32]]:
        """Tokens of some media of a join."""
        return [
            self.video(join.times_of(m).tolist()) if join.is_video(m) else self.image()
            for m in media
        ]

    def lengths(self, join: Join) -> Ints:
        """(K,) tokens that each distinct media of a join becomes; the same as `contents` would make."""
        result = np.full(len(join.kinds), self.image_tokens, dtype=np.int64)
        videos = join.kinds != IMAGE
        if not videos.any():
            return result
        tenths, of = np.unique(tenths_of(join.times), return_inverse=True)
        # A stamp is as long as its own tokens; nothing is joined across the places beside it.
        stamps = [
            len(stamp_ids(self.tokenizer, f"{t // 10}.{t % 10} ")) if t >= 0 else 0
            for t in tenths.tolist()
        ]
        frames = np.array(stamps, dtype=np.int64)[of] + self.frame_tokens
        edges = np.concatenate([[0], np.cumsum(frames)])[join.starts]
        result[videos] = np.diff(edges)[videos]
        return result


def tenths_of(times_s: npt.NDArray[np.float64]) -> Ints:
    """Tenths of seconds exactly as `model.language.chat_template.stamp` rounds them; -1 for NaN."""
    times_s = np.where(times_s < 0, 0.0, times_s)
    scaled = np.where(np.isnan(times_s), -1.0, times_s * 10)
    tenths = np.rint(scaled).astype(np.int64)
    ties = np.flatnonzero(np.abs(scaled - np.floor(scaled) - 0.5) < TIE)
    values, of = np.unique(times_s[ties], return_inverse=True)
    exact = [int(f"{value:.1f}".replace(".", "")) for value in values.tolist()]
    tenths[ties] = np.array(exact, dtype=np.int64)[of]
    return tenths
