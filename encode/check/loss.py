"""What a trained model loses by reading features instead of computing them: nothing, shown on samples.

python -m encode.check.loss --run demo --features cache --samples 16

Images and videos of a few samples are read from their files and encoded again. The model's loss on them
is compared with its loss on the stored rows. It fails when the two are apart, so it also notices an encoder,
a library or a machine that no longer computes what the space was made with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import configs
from cache.format.frame_sampling import FULL, MAX_FRAMES, frame_views, sample_times, time_view
from cache.format.spec import ARRAY_OF, FeatureSpec
from cache.store.ledger import MediaRecord, read_media
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.samples import MediaRef, Sample, dataset_names, read_samples
from cache.store.space import find_space
from configs import UserError
from encode.download.urls import is_url
from model.attention.batch import PackedBatch
from model.io.saved_model import find_run, load_final
from model.language.chat_template import Message, fill_places, tokenize_messages, video_ids
from model.language.tokenizer import IMAGE_TOKEN, token_id
from model.media import video
from model.media.images import BadMediaError, decode_image
from model.quantize import pack, unpack
from model.vision.encoder import VisionEncoder, rebuild_encoder

PROG = "python -m encode.check.loss"
TOLERANCE = 0.01
"""Largest difference of the losses, relative. Where precision and library are the same it is 0."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare a model's loss on stored features with its loss on features computed now."""

    run: str = "default"
    """Name of the run, below runs/, or a path."""
    features: Path = Path("cache")
    """Folder of the feature cache."""
    samples: int = 16
    """How many samples, evenly from all data sets."""
    weights: str | None = None
    """File or folder with the encoder's weights, where they are not where they were."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps: where images are encoded."""
    max_frames: int | None = None
    """Frames of one video, at most; as in the model's training when not given."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples {self.samples} is below 1")
        if self.max_frames is not None and self.max_frames < 1:
            raise ValueError(f"max_frames {self.max_frames} is below 1")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Losses are means a supervised token, nats."""

    samples: int
    images: int
    """Images and frames looked at."""
    videos: int
    """Videos among their media."""
    same_rows: int
    """Images and frames whose newly encoded rows equal the stored ones to the bit."""
    cached: float
    """On stored rows."""
    live: float
    """On rows encoded now, and rounded as the codec rounds."""
    unrounded: float
    """On what the encoder gives, before the codec."""

    @property
    def difference(self) -> float:
        """Of cached and live, relative."""
        return abs(self.cached - self.live) / max(self.cached, 1e-6)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns 1 when the losses differ."""
    options = configs.parse(Options, argv, prog=PROG, description=__doc__)
    result = compare(options)
    agree = result.difference <= TOLERANCE
    print(
        f"{result.samples} samples: {result.same_rows} of {result.images} "
        f"{'images and frames' if result.videos else 'images'} give the stored row "
        f"to the bit; loss before the codec's rounding {result.unrounded:.6f}\n"
        f"cached loss {'=' if agree else 'is not'} live loss: {result.cached:.6f} and {result.live:.6f} "
        f"(relative difference {result.difference:.1e})"
    )
    return 0 if agree else 1


def compare(options: Options) -> Comparison:
    """Measure.

    Raises:
        UserError: no such run or space, no sample whose images are in it, another encoder.
    """
    vlm, tokenizer, meta = load_final(find_run(options.run))
    root = CacheRoot(options.features)
    reader = FeatureReader(find_space(root, meta["space"]["name"]))
    spec = reader.spec
    ledger = read_media(root)
    most = options.max_frames or meta.get("max_frames", MAX_FRAMES)
    chosen = list(islice(_usable(root, reader, ledger, most), options.samples))
    if not chosen:
        raise UserError(
            f"{reader.path}: no sample has all its features, a text, and its media in files of this "
            f"machine; python -m encode.run --dataset folder:PATH --features {options.features}"
        )
    encoder = rebuild_encoder(reader.load, spec, device=options.device, weights=options.weights)
    losses = np.zeros(3)
    weights, rows, same = 0.0, 0, 0
    for sample in chosen:
        messages = [(m.role, m.content, m.weight) for m in sample.messages]
        stored = [stored_media(reader, ref.kind, ledger[ref.source], most) for ref in sample.media]
        computed = [
            encode_file(encoder, ref, one) for ref, one in zip(sample.media, stored, strict=True)
        ]
        again = [pack(features, spec.layout).rows.cpu() for features in computed]
        rows += sum(len(one.rows) for one in stored)
        same += sum(
            int((one.rows == new).all(1).sum()) for one, new in zip(stored, again, strict=True)
        )
        batch = alone(tokenizer, messages, stored, spec)
        as_stored = [
            [
                unpack(codes, spec.layout, spec.tokens(one.array), spec.width)
                for codes, one in zip(of, stored, strict=True)
            ]
            for of in ([one.rows for one in stored], again)
        ]
        with torch.inference_mode():
            for i, features in enumerate((*as_stored, [one.cpu() for one in computed])):
                total, weight = vlm.loss(batch, torch.cat([one.flatten(0, 1) for one in features]))
                losses[i] += float(total)
        weights += float(weight)
    cached, live, unrounded = (losses / weights).tolist()
    return Comparison(
        samples=len(chosen),
        images=rows,
        videos=sum(ref.kind == "video" for sample in chosen for ref in sample.media),
        same_rows=same,
        cached=cached,
        live=live,
        unrounded=unrounded,
    )


def _usable(
    root: CacheRoot, reader: FeatureReader, ledger: Mapping[str, MediaRecord], max_frames: int
) -> Iterator[Sample]:
    """Samples with a text to predict, whose media are files and in the space: from each data set in turn.

    What came from the web was encoded as it streamed by: there is nothing to look at again.
    """

    def is_here(ref: MediaRef) -> bool:
        record = ledger.get(ref.source)
        return (
            record is not None
            and record.key is not None
            and not is_url(ref.source)
            and len(rows := row_numbers(reader, ref.kind, record, max_frames)) > 0
            and bool((rows >= 0).all())
        )

    def of(dataset: str) -> Iterator[Sample]:
        for sample in read_samples(root, dataset):
            if (
                sample.media
                and any(m.role == "assistant" and m.weight > 0 for m in sample.messages)
                and all(map(is_here, sample.media))
            ):
                yield sample

    queues = [of(name) for name in dataset_names(root)]
    while queues:
        for queue in list(queues):
            sample = next(queue, None)
            if sample is None:
                queues.remove(queue)
            else:
                yield sample


def row_numbers(
    reader: FeatureReader, kind: str, record: MediaRecord, max_frames: int
) -> npt.NDArray[np.int64]:
    """Rows of all views a media has, -1 where there is none; empty for a video of unknown length."""
    if kind == "image":
        return reader.lookup(ARRAY_OF[kind], [record.key or ""])
    if record.duration_s is None:
        return np.empty(0, dtype=np.int64)
    views = frame_views(record.duration_s, max_frames)
    return reader.lookup_pairs(ARRAY_OF[kind], [record.key or ""] * len(views), views)


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredMedia:
    """What the space has of one image or video."""

    array: str
    """Where its rows are."""
    asked_us: tuple[int, ...]
    """Times its frames were asked for at, microseconds; empty for an image."""
    times_s: tuple[float, ...]
    """When its frames really are, as stored; empty for an image."""
    rows: torch.Tensor
    """(R, row_bytes) uint8: one for an image, one a different frame for a video."""

    @property
    def views(self) -> tuple[str, ...]:
        """(R,) their names."""
        return tuple(map(time_view, self.asked_us)) or (FULL,)


def stored_media(
    reader: FeatureReader, kind: str, record: MediaRecord, max_frames: int
) -> StoredMedia:
    """Read them; a frame that two times asked for stands once."""
    array = ARRAY_OF[kind]
    numbers = row_numbers(reader, kind, record, max_frames)
    times: npt.NDArray[np.float64] = np.empty(0)
    asked: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
    if kind == "video":
        assert record.duration_s is not None, "a video without a length has no rows"
        times = reader.times(array, numbers)
        first = np.append(True, times[1:] != times[:-1])
        asked = np.array(sample_times(record.duration_s, max_frames))[first]
        numbers, times = numbers[first], times[first]
    rows = np.empty((len(numbers), reader.spec.row_bytes(array)), np.uint8)
    reader.read_into(array, numbers, rows)
    return StoredMedia(
        array=array,
        asked_us=tuple(asked.tolist()),
        times_s=tuple(times.tolist()),
        rows=torch.from_numpy(rows),
    )


def alone(
    tokenizer: Any, messages: Sequence[Message], media: Sequence[StoredMedia], spec: FeatureSpec
) -> PackedBatch:
    """One sample as a batch: nothing is shared, nothing left out."""
    text = tokenize_messages(tokenizer, messages, len(media))
    image = token_id(tokenizer, IMAGE_TOKEN)
    contents = [
        video_ids(tokenizer, one.times_s, spec.tokens(one.array))
        if one.times_s
        else np.full(spec.tokens(one.array), image, dtype=np.int32)
        for one in media
    ]
    filled, repeats = fill_places(text.ids, image, contents)
    ids = torch.from_numpy(filled.astype(np.int64))
    weights = torch.from_numpy(np.repeat(text.weights, repeats))
    targets = weights.nonzero().squeeze(1)
    return PackedBatch(
        input_ids=ids,
        position_ids=torch.arange(len(ids)),
        image_slots=(ids == image).nonzero().squeeze(1),
        loss_positions=targets - 1,
        targets=ids[targets],
        loss_weights=weights[targets],
        units=torch.tensor([[0, len(ids), 0, 0]]),
    )


def encode_file(encoder: VisionEncoder, ref: MediaRef, stored: StoredMedia) -> torch.Tensor:
    """(R, M, V) float32 features of a file, the same views as are stored.

    Raises:
        UserError: it is not there any more, or cannot be decoded any more.
    """
    path = Path(ref.source)
    try:
        if ref.kind == "video":
            with path.open("rb"):
                pass
            pixels = inputs_of(encoder, path, stored)
        else:
            pixels = inputs_of(encoder, path.read_bytes(), stored)
    except OSError as error:
        raise UserError(f"{path}: cannot be read to encode it again: {error.strerror}") from None
    except BadMediaError as error:
        raise UserError(f"{path}: {error}; it has changed since it was encoded") from None
    return encoder.encode(pixels, stored.array)


def inputs_of(
    encoder: VisionEncoder, data: bytes | Path, stored: StoredMedia
) -> npt.NDArray[np.uint8]:
    """Encoder inputs (R, S, S, 3) of the views that are stored; `data` may be a file where it is a video.

    Raises:
        BadMediaError: it cannot be decoded.
        OSError: it cannot be read.
    """
    if stored.array == ARRAY_OF["image"]:
        assert isinstance(data, bytes), "images are read whole"
        return encoder.prepare(decode_image(data))[None]
    found = video.frames(data, stored.asked_us, video.probe(data))
    return np.stack([encoder.prepare(frame.image) for frame in found])


if __name__ == "__main__":
    configs.command(main)
