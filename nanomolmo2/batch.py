"""Samples on their way to a model: their text, and the stored rows of their images and videos.

    batch = data.collate([data[0], data[1]])     # what a DataLoader does
    batch.messages[0]                            # [{"role": "user", "content": "<image>What is this?"}, ...]
    features = batch.features("cuda")            # rows are copied as stored, and unpacked there
    features[0]                                  # of the first sample: one tensor for each image and video
    features.flat                                # (N, width): all of them, one after the other
    tokens, mask = features.padded()             # (S, L, width), (S, L)

S samples, M media of all samples together, F rows of these (one for an image, one for each frame of a video),
R distinct rows of one array, N feature tokens of all F rows, L feature tokens of the sample with most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache.format import codec
from cache.format.media_marks import split_at_marks
from cache.format.spec import ARRAY_OF, FeatureSpec
from cache.store.references import MEDIA_KINDS, VIDEO, edges_of, within
from nanomolmo2.clip import Clip
from nanomolmo2.memory import Handover
from nanomolmo2.unpack import unpack

Ints = npt.NDArray[np.int64]
Conversation = list[dict[str, str]]
"""Turns with `role` (system, user or assistant) and `content`, as chat templates take them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One sample."""

    id: str
    """`<data set>/<id>`."""
    messages: Conversation
    """Its turns. `<image>` and `<video>` of a user stand for its media, see `texts`."""
    turn_weights: list[float]
    """Factor on the loss of each turn's tokens."""
    weight: float
    """Factor on the loss of the sample."""
    task: str
    """Type of question; '' where the data set has none."""
    keys: list[str]
    """Key of each of its images and videos."""
    kinds: list[str]
    """`image` or `video`, of each."""
    times: list[npt.NDArray[np.float64] | None]
    """Of each, the times of the frames of a video in seconds; None for an image."""
    codes: list[npt.NDArray[np.uint8]]
    """Of each, the rows as stored: (1 or frames, row_bytes). They may be part of the memory of a batch."""
    spec: FeatureSpec
    """How the rows were made."""

    @property
    def features(self) -> list[npt.NDArray[np.float16] | Clip]:
        """Features of each image, (tokens, width) float16, and of each video, a `Clip`; unpacked by numpy."""
        result: list[npt.NDArray[np.float16] | Clip] = []
        for kind, rows, times in zip(self.kinds, self.codes, self.times, strict=True):
            tokens = self.spec.tokens(ARRAY_OF[kind])
            values = codec.unpack(rows, self.spec.codec, tokens, self.spec.width)
            result.append(values[0] if times is None else Clip(values, times))
        return result

    @property
    def texts(self) -> list[list[str]]:
        """Of each turn the texts before, between and after its media: k + 1 for k media in it.

        Raises:
            ValueError: there are fewer marks than media, but at least one.
        """
        return _texts(self.id, self.messages, len(self.keys))


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch(Sequence[Example]):
    """S samples. `batch[i]` is one of them."""

    spec: FeatureSpec
    """How the rows were made."""
    ids: list[str]
    """S names, `<data set>/<id>`."""
    messages: list[Conversation]
    """S conversations. `<image>` and `<video>` of a user stand for the sample's media, see `texts`."""
    turn_weights: list[list[float]]
    """S lists of a factor on the loss of each turn's tokens."""
    weights: Tensor
    """(S,) float32, factors on the loss of each sample."""
    tasks: list[str]
    """S types of question; '' where the data set has none."""
    codes: Mapping[str, Tensor]
    """`image` and `frame` -> (R, row_bytes) uint8, the distinct rows of the batch as stored."""
    media: Ints
    """(S + 1,) sample i has media[i] to media[i + 1] of the M."""
    media_keys: npt.NDArray[np.uint8]
    """(M, 32) the sha256 of each."""
    media_kinds: npt.NDArray[np.uint8]
    """(M,) 0 for an image, 1 for a video."""
    frames: Ints
    """(M + 1,) media item j has the rows frames[j] to frames[j + 1] of the F."""
    picks: Ints
    """(F,) the row in `codes` of the array of its kind."""
    frame_times: npt.NDArray[np.float64]
    """(F,) seconds after the first frame of the video; NaN for images."""

    @property
    def keys(self) -> list[list[str]]:
        """S lists of the keys of the sample's images and videos."""
        return [[self._key(j) for j in each] for each in self._samples()]

    @property
    def kinds(self) -> list[list[str]]:
        """S lists of `image` or `video` for each of the sample's media."""
        return [[MEDIA_KINDS[self.media_kinds[j]] for j in each] for each in self._samples()]

    @property
    def times(self) -> list[list[npt.NDArray[np.float64] | None]]:
        """S lists: for each of the sample's media the times of its frames; None for an image."""
        return [[self._times(j) for j in each] for each in self._samples()]

    @property
    def texts(self) -> list[list[list[str]]]:
        """S lists: of each turn the texts before, between and after its media; k + 1 for k media in it.

        Raises:
            ValueError: a sample has fewer marks than media, but at least one.
        """
        counts = np.diff(self.media).tolist()
        each = zip(self.ids, self.messages, counts, strict=True)
        return [_texts(name, messages, count) for name, messages, count in each]

    def features(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float16
    ) -> Features:
        """Copy the rows to `device` as they are stored, and unpack them there.

        The values are those of float16 for every `dtype`, because the codec defines float16 values. Each call
        unpacks again.
        """
        spec, device = self.spec, torch.device(device)
        parts = {}
        for array, codes in self.codes.items():
            if len(codes):
                rows = codes.to(device, non_blocking=codes.is_pinned())
                parts[array] = unpack(rows, spec.codec, spec.tokens(array), spec.width, dtype)
        kinds = np.repeat(self.media_kinds, np.diff(self.frames))  # (F,)
        tokens = np.array([spec.tokens(ARRAY_OF[kind]) for kind in MEDIA_KINDS])[kinds]
        if not parts:
            flat = torch.empty((0, spec.width), dtype=dtype, device=device)
        elif len(parts) == 1:
            (flat,) = parts.values()  # (R, tokens, width)
            if len(self.picks) != len(flat) or (np.diff(self.picks) != 1).any():
                flat = flat.index_select(0, torch.from_numpy(self.picks).to(device))
            flat = flat.flatten(0, 1)
        else:
            before = {MEDIA_KINDS.index("image"): 0, VIDEO: parts["image"].shape[:2].numel()}
            first = self.picks * tokens + np.array([before[kind] for kind in range(2)])[kinds]
            order = torch.from_numpy(within(first, tokens))
            flat = torch.cat([parts[array].flatten(0, 1) for array in ARRAY_OF.values()])
            flat = flat.index_select(0, order.to(device))
        edges = edges_of(tokens)[self.frames]  # (M + 1,)
        return Features(
            flat=flat, offsets=edges, media=self.media, kinds=self.media_kinds, frames=self.frames
        )

    def pin_memory(self) -> Batch:
        """Return the batch with its rows in page-locked memory. `DataLoader(pin_memory=True)` calls it."""
        return replace(self, codes={array: rows.pin_memory() for array, rows in self.codes.items()})

    def __getstate__(self) -> dict[str, Any]:
        codes = {array: Handover.of(rows) or rows for array, rows in self.codes.items()}
        return {**vars(self), "codes": codes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        codes = {
            array: rows.rows() if isinstance(rows, Handover) else rows
            for array, rows in state["codes"].items()
        }
        vars(self).update(state, codes=codes)

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        i = range(len(self))[index]
        media = range(self.media[i], self.media[i + 1])
        return Example(
            id=self.ids[i],
            messages=self.messages[i],
            turn_weights=self.turn_weights[i],
            weight=float(self.weights[i]),
            task=self.tasks[i],
            keys=[self._key(j) for j in media],
            kinds=[MEDIA_KINDS[self.media_kinds[j]] for j in media],
            times=[self._times(j) for j in media],
            codes=[self._codes_of(j) for j in media],
            spec=self.spec,
        )

    def _key(self, item: int) -> str:
        """Return the key of one media item."""
        return bytes(self.media_keys[item]).hex()

    def _times(self, item: int) -> npt.NDArray[np.float64] | None:
        """Return the times of the frames of one media item; None for an image."""
        if self.media_kinds[item] != VIDEO:
            return None
        return self.frame_times[self.frames[item] : self.frames[item + 1]]

    def _codes_of(self, item: int) -> npt.NDArray[np.uint8]:
        """Return the stored rows of one media item, in their order."""
        picks = self.picks[self.frames[item] : self.frames[item + 1]]
        array = ARRAY_OF[MEDIA_KINDS[self.media_kinds[item]]]
        codes: npt.NDArray[np.uint8] = self.codes[array].numpy()
        if (np.diff(picks) == 1).all():  # as nearly always: no copy
            return codes[picks[0] : picks[0] + len(picks)] if len(picks) else codes[:0]
        return codes[picks]

    def _samples(self) -> Iterator[range]:
        """Yield the media items of each sample."""
        return map(range, self.media[:-1].tolist(), self.media[1:].tolist())


@dataclass(frozen=True, kw_only=True, eq=False)
class Features(Sequence[list[Tensor]]):
    """Features of S samples on a device. `features[i]` has one tensor for each media item of sample i:

    (tokens, width) for an image, (frames, tokens, width) for a video. It is empty for a sample without media.
    """

    flat: Tensor
    """(N, width): the tokens of all media, in the order of samples, media, frames and tokens."""
    offsets: Ints
    """(M + 1,) media item j has the tokens offsets[j] to offsets[j + 1] of `flat`."""
    media: Ints
    """(S + 1,) sample i has the media media[i] to media[i + 1]."""
    kinds: npt.NDArray[np.uint8]
    """(M,) 0 for an image, 1 for a video."""
    frames: Ints
    """(M + 1,) running count of frames; an image counts as one."""

    @property
    def lengths(self) -> Ints:
        """(S,) number of feature tokens of each sample."""
        return np.diff(self.offsets[self.media])

    def padded(self) -> tuple[Tensor, Tensor]:
        """Return the tokens of each sample (S, L, width), and which of them are real, (S, L) bool.

        The tokens of all media of a sample are one after the other. The rest is 0.
        """
        lengths = torch.from_numpy(self.lengths).to(self.flat.device)
        longest = int(self.lengths.max(initial=0))
        mask = torch.arange(longest, device=self.flat.device) < lengths[:, None]
        tokens = self.flat.new_zeros((len(self), longest, self.flat.shape[1]))
        tokens[mask] = self.flat  # both in the order of samples, then tokens
        return tokens, mask

    def __len__(self) -> int:
        return len(self.media) - 1

    @overload
    def __getitem__(self, index: int) -> list[Tensor]: ...

    @overload
    def __getitem__(self, index: slice) -> list[list[Tensor]]: ...

    def __getitem__(self, index: int | slice) -> list[Tensor] | list[list[Tensor]]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        i = range(len(self))[index]
        result = []
        for j in range(self.media[i], self.media[i + 1]):
            tokens = self.flat[self.offsets[j] : self.offsets[j + 1]]
            count = int(self.frames[j + 1] - self.frames[j])
            result.append(
                tokens.view(count, -1, tokens.shape[1]) if self.kinds[j] == VIDEO else tokens
            )
        return result


def conversation_of(turns: Sequence[Mapping[str, Any]]) -> Conversation:
    """Return the turns of one sample without what only training needs."""
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def collate(examples: Sequence[Example]) -> Batch:
    """Return samples as one batch: the `collate_fn` of a DataLoader.

    What `FeatureDataset.__getitems__` read together is a batch already, and is returned as it is.

    Raises:
        ValueError: there is no sample, or they are of different spaces.
    """
    if isinstance(examples, Batch):
        return examples
    if not examples:
        raise ValueError("a batch of no samples")
    spec = examples[0].spec
    if any(example.spec != spec for example in examples):
        raise ValueError("samples of different spaces do not fit in one batch")
    kinds = np.array([MEDIA_KINDS.index(k) for e in examples for k in e.kinds], np.uint8)
    rows = [rows for e in examples for rows in e.codes]
    counts = np.array([len(each) for each in rows], np.int64)
    picks = np.zeros(int(counts.sum()), np.int64)
    codes: dict[str, Any] = {}
    of_row = np.repeat(kinds, counts)
    for kind, name in enumerate(MEDIA_KINDS):
        of_kind = [each for each, k in zip(rows, kinds, strict=True) if k == kind]
        empty = np.empty((0, spec.row_bytes(ARRAY_OF[name])), np.uint8)
        codes[ARRAY_OF[name]] = torch.from_numpy(np.concatenate([empty, *of_kind]))
        picks[of_row == kind] = np.arange(np.count_nonzero(of_row == kind))
    times = [np.full(1, np.nan) if t is None else t for e in examples for t in e.times]
    keys = bytes.fromhex("".join(key for e in examples for key in e.keys))
    return Batch(
        spec=spec,
        ids=[e.id for e in examples],
        messages=[e.messages for e in examples],
        turn_weights=[e.turn_weights for e in examples],
        weights=torch.tensor([e.weight for e in examples], dtype=torch.float32),
        tasks=[e.task for e in examples],
        codes=codes,
        media=edges_of(np.array([len(e.keys) for e in examples])),
        media_keys=np.frombuffer(keys, np.uint8).reshape(-1, 32),
        media_kinds=kinds,
        frames=edges_of(counts),
        picks=picks,
        frame_times=np.concatenate([np.empty(0), *times]),
    )


def _texts(name: str, messages: Conversation, media: int) -> list[list[str]]:
    try:
        return split_at_marks([(turn["role"], turn["content"]) for turn in messages], media)
    except ValueError as error:
        raise ValueError(f"sample {name}: {error}") from None
