"""What a trained model loses by reading features instead of computing them: nothing, shown on samples.

python -m encode.live --run demo --features cache --samples 16

Pictures of a few samples are read from their files and encoded again. The model's loss on them is compared
with its loss on the stored rows. It fails when the two are apart, so it also notices an encoder, a library
or a machine that no longer computes what the space was made with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

import configs
from cache.layout import CacheRoot
from cache.reader import FeatureReader, find_space
from cache.tables import MediaRecord, Sample, dataset_names, read_media, read_samples
from configs import UserError
from model.load import find_run, load_final
from model.media import decode_picture
from model.packed import PackedBatch
from model.quantize import pack, unpack
from model.template import TokenizedSample, tokenize_messages
from model.tokenizer import IMAGE, token_id
from model.vision import VisionEncoder, rebuild_encoder

PROG = "python -m encode.live"
KIND = "picture"
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
    """auto, cpu, cuda, cuda:N or mps: where pictures are encoded."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples {self.samples} is below 1")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Losses are means a supervised token, nats."""

    samples: int
    pictures: int
    same_rows: int
    """Pictures whose newly encoded rows equal the stored ones to the bit."""
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
        f"{result.samples} samples: {result.same_rows} of {result.pictures} pictures give the stored row "
        f"to the bit; loss before the codec's rounding {result.unrounded:.6f}\n"
        f"cached loss {'=' if agree else 'is not'} live loss: {result.cached:.6f} and {result.live:.6f} "
        f"(relative difference {result.difference:.1e})"
    )
    return 0 if agree else 1


def compare(options: Options) -> Comparison:
    """Measure.

    Raises:
        UserError: no such run or space, no sample whose pictures are in it, another encoder.
    """
    vlm, tokenizer, meta = load_final(find_run(options.run))
    root = CacheRoot(options.features)
    reader = FeatureReader(find_space(root, meta["space"]["name"]))
    spec = reader.spec
    ledger = read_media(root)
    chosen = list(islice(_usable(root, reader, ledger), options.samples))
    if not chosen:
        raise UserError(
            f"{reader.path}: no sample has all its features and a text; "
            f"python -m encode.run --dataset NAME --features {options.features}"
        )
    encoder = rebuild_encoder(reader.load, spec, device=options.device, weights=options.weights)
    image = token_id(tokenizer, IMAGE)
    losses = np.zeros(3)
    weights, pictures, same = 0.0, 0, 0
    for sample in chosen:
        messages = [(m.role, m.content, m.weight) for m in sample.messages]
        text = tokenize_messages(tokenizer, messages, len(sample.media))
        batch = alone(text, image, spec.tokens(KIND))
        rows = stored_rows(reader, [ledger[ref.source] for ref in sample.media])
        computed = encode_files(encoder, [ref.source for ref in sample.media])
        again = pack(computed, spec.codec).rows.cpu()
        pictures += len(rows)
        same += int((rows == again).all(1).sum())
        as_stored = (unpack(r, spec.codec, spec.tokens(KIND), spec.width) for r in (rows, again))
        with torch.inference_mode():
            for i, features in enumerate((*as_stored, computed.cpu())):
                total, weight = vlm.loss(batch, features)
                losses[i] += float(total)
        weights += float(weight)
    cached, live, unrounded = (losses / weights).tolist()
    return Comparison(
        samples=len(chosen),
        pictures=pictures,
        same_rows=same,
        cached=cached,
        live=live,
        unrounded=unrounded,
    )


def _usable(
    root: CacheRoot, reader: FeatureReader, ledger: Mapping[str, MediaRecord]
) -> Iterator[Sample]:
    """Samples with a text to predict, whose pictures are all in the space: from each data set in turn."""

    def of(dataset: str) -> Iterator[Sample]:
        for sample in read_samples(root, dataset):
            found = [ledger.get(ref.source) for ref in sample.media]
            keys = [record.key for record in found if record is not None and record.key]
            if (
                keys
                and len(keys) == len(sample.media)
                and (reader.lookup(KIND, keys) >= 0).all()
                and any(m.role == "assistant" and m.weight > 0 for m in sample.messages)
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


def alone(text: TokenizedSample, image: int, tokens: int) -> PackedBatch:
    """One sample as a batch: each `<image>` is `tokens` feature slots, nothing is shared."""
    repeats = np.where(text.ids == image, tokens, 1)
    ids = torch.from_numpy(np.repeat(text.ids, repeats).astype(np.int64))
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


def stored_rows(reader: FeatureReader, records: Sequence[MediaRecord]) -> torch.Tensor:
    """(P, row_bytes) uint8 of these media."""
    numbers = reader.lookup(KIND, [record.key for record in records if record.key])
    rows = np.empty((len(numbers), reader.spec.row_bytes(KIND)), np.uint8)
    reader.read_into(KIND, numbers, rows)
    return torch.from_numpy(rows)


def encode_files(encoder: VisionEncoder, paths: Sequence[str]) -> torch.Tensor:
    """(P, M, V) float32 features of these files.

    Raises:
        UserError: a file is not there any more.
    """
    pixels = []
    for path in paths:
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read to encode it again: {error.strerror}"
            ) from None
        pixels.append(encoder.prepare(decode_picture(data)))
    return encoder.encode(np.stack(pixels), KIND)


if __name__ == "__main__":
    configs.command(main)
