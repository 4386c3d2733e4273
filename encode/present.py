"""Which rows a space has already: of images their keys, of videos every view."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Self

from cache.format.frame_sampling import FULL, MAX_FRAMES, frame_views
from cache.format.spec import ARRAY_OF
from cache.store.commits import key_bytes
from cache.store.row_index import Identities, RowIndex
from cache.store.writer import Space

IMAGE, VIDEO = "image", "video"


class Keys(Collection[str]):
    """The keys of the images in an index: no string is held for any of them."""

    def __init__(self, index: RowIndex):
        self._identities = Identities(index)

    def __contains__(self, key: object) -> bool:
        return (key, FULL) in self._identities

    def __iter__(self) -> Iterator[str]:
        return (key for key, view in self._identities if view == FULL)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Present:
    """A space's rows as they were when this was made."""

    def __init__(
        self,
        images: Collection[str] = frozenset(),
        frames: RowIndex | None = None,
        *,
        max_frames: int = MAX_FRAMES,
    ):
        self.images = images
        """Keys."""
        self._frames, self._max_frames = frames, max_frames

    @classmethod
    def of(cls, space: Space, *, max_frames: int = MAX_FRAMES) -> Self:
        """What is committed in `space` now."""
        frames = space.index(ARRAY_OF[VIDEO])
        return cls(
            Keys(space.index(ARRAY_OF[IMAGE])),
            frames if len(frames) else None,
            max_frames=max_frames,
        )

    def has(self, kind: str, key: str | None, duration_s: float | None) -> bool:
        """Whether every view of this media is here. A video of unknown length never is."""
        if key is None:
            return False
        if kind == IMAGE:
            return key in self.images
        return duration_s is not None and not self.missing(
            key, frame_views(duration_s, self._max_frames)
        )

    def missing(self, key: str, views: Sequence[str]) -> list[str]:
        """Those of a video's views that are not here."""
        if self._frames is None:
            return list(views)
        keys = key_bytes([key]).repeat(len(views), axis=0)
        rows = self._frames.lookup_pairs(keys, views).tolist()
        return [view for view, row in zip(views, rows, strict=True) if row < 0]
