"""Tokenised text: made once per (samples, tokenizer, template), then memory-mapped by every run.

Lives beside the runs, never in the cache: a folder a data set, named by what decides its content.

    runs/.tokens/<id>/ids.bin       int32    tokens of all samples, an image or video counting as one
                      weights.bin   float32  loss weight of each token (0: not supervised)
                      samples.bin   SAMPLE   one record a sample
                      meta.json     written last, with the sizes of the others
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from cache.store.paths import CacheRoot
from cache.store.samples import Sample, read_samples, samples_digest
from configs import UserError
from model.language.chat_template import TEMPLATE_VERSION, TokenizedSample, tokenize_messages
from model.language.tokenizer import IMAGE_TOKEN, tokenizer_digest

log = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]

STORE_VERSION = 2
SAMPLE = np.dtype(
    [
        ("end", "<i8"),  # of its tokens in ids.bin; it starts where the one before ends
        ("loss_weight", "<f8"),  # sum over its tokens
        ("prefix_hash", "<u8"),  # of its tokens up to and with the last image
        ("prefix", "<i4"),  # how many those are
        ("used", "<i4"),  # how many of its tokens are worth reading, see `used_tokens`
        ("images", "<i4"),
    ]
)
PROGRESS_S = 30.0
FILES = ("ids.bin", "weights.bin", "samples.bin")


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefixes:
    """What samples that share images may share: their tokens up to the last image."""

    length: Ints
    """(n,) tokens, an image counting as one; 0 without images."""
    hash: npt.NDArray[np.uint64]
    """(n,) of those tokens."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Store:
    """One data set's mapped files."""

    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    samples: npt.NDArray[Any]


class TokenStore:
    """The tokenised text of several data sets. Use `TokenStore.open`."""

    def __init__(self, stores: Sequence[_Store], image_token_id: int) -> None:
        self._stores = list(stores)
        self.image_token_id = image_token_id

    @staticmethod
    def open(root: CacheRoot, names: Sequence[str], tokenizer: Any, *, folder: Path) -> TokenStore:
        """Map the text of the data sets `names`, tokenising first what `folder` does not have yet."""
        vocabulary = tokenizer_digest(tokenizer)
        stores = []
        for name in names:
            identity = [STORE_VERSION, samples_digest(root, name), vocabulary, TEMPLATE_VERSION]
            digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
            path = folder / digest[:16]
            if not _is_whole(path):
                _write(path, name, read_samples(root, name), tokenizer)
            stores.append(_map(path))
        return TokenStore(stores, _image_token_id(tokenizer))

    def sample(self, dataset: int, index: int) -> TokenizedSample:
        """Tokens and loss weights of one sample, as views of the file."""
        store = self._stores[dataset]
        first = int(store.samples["end"][index - 1]) if index else 0
        end = int(store.samples["end"][index])
        return TokenizedSample(ids=store.ids[first:end], weights=store.weights[first:end])

    def lengths(self, dataset: npt.NDArray[np.int16], index: Ints) -> Ints:
        """(n,) tokens of samples that a sequence holds, an image counting as one."""
        return self._gather(dataset, index, lambda s: s.samples["used"]).astype(np.int64)

    def loss_weights(self, dataset: npt.NDArray[np.int16], index: Ints) -> npt.NDArray[np.float64]:
        """(n,) sums of the samples' loss weights, without the sample's own factor."""
        return self._gather(dataset, index, lambda s: s.samples["loss_weight"])

    def prefixes(self, dataset: npt.NDArray[np.int16], index: Ints) -> Prefixes:
        """What the samples may share."""
        return Prefixes(
            length=self._gather(dataset, index, lambda s: s.samples["prefix"]).astype(np.int64),
            hash=self._gather(dataset, index, lambda s: s.samples["prefix_hash"]),
        )

    def _gather(self, dataset: npt.NDArray[np.int16], index: Ints, column: Any) -> Any:
        """A column of the samples records, for samples of several data sets."""
        parts = [column(store) for store in self._stores]
        result = np.empty(len(index), dtype=parts[0].dtype)
        for number, part in enumerate(parts):
            here = dataset == number
            result[here] = part[index[here]]
        return result


def messages_of(sample: Sample) -> list[tuple[str, str, float]]:
    """A sample's messages as the template takes them."""
    return [(m.role, m.content, m.weight) for m in sample.messages]


def _image_token_id(tokenizer: Any) -> int:
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


def _is_whole(path: Path) -> bool:
    """Whether a store is there with every byte it had when it was finished."""
    try:
        sizes = json.loads((path / "meta.json").read_text())["bytes"]
        return all((path / name).stat().st_size == sizes[name] for name in FILES)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def _map(path: Path) -> _Store:
    def mapped(name: str, dtype: Any) -> Any:
        if not (path / name).stat().st_size:  # an empty file cannot be mapped
            return np.empty(0, dtype=dtype)
        return np.memmap(path / name, dtype=dtype, mode="r")

    return _Store(
        ids=mapped("ids.bin", "<i4"),
        weights=mapped("weights.bin", "<f4"),
        samples=mapped("samples.bin", SAMPLE),
    )


def _write(path: Path, name: str, samples: Iterable[Sample], tokenizer: Any) -> None:
    """Tokenise into a folder beside `path`, which then takes its name: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{path.name}.", suffix=".partial", dir=path.parent))
    try:
        with (
            (temporary / "ids.bin").open("wb") as ids,
            (temporary / "weights.bin").open("wb") as weights,
            (temporary / "samples.bin").open("wb") as records,
        ):
            count = _tokenize(name, samples, tokenizer, ids, weights, records)
            for file in (ids, weights, records):
                file.flush()
                os.fsync(file.fileno())
        sizes = {n: (temporary / n).stat().st_size for n in FILES}
        meta = {"dataset": name, "samples": count, "template": TEMPLATE_VERSION, "bytes": sizes}
        (temporary / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        if path.exists() and not _is_whole(path):
            shutil.rmtree(path)
        try:
            temporary.rename(path)
        except OSError:  # another process finished the same store first
            if not _is_whole(path):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tokenize(
    name: str,
    samples: Iterable[Sample],
    tokenizer: Any,
    ids: BinaryIO,
    weights: BinaryIO,
    records: BinaryIO,
) -> int:
    """Append every sample's tokens to the files; returns how many samples there were."""
    image = _image_token_id(tokenizer)
    started = reported = time.monotonic()
    end = count = 0
    for sample in samples:
        text = tokenize_sample(sample, tokenizer)
        end += len(text.ids)
        count += 1
        ids.write(text.ids.astype("<i4", copy=False).data)
        weights.write(text.weights.astype("<f4", copy=False).data)
        records.write(_record(text, end, image).data)
        if time.monotonic() - reported > PROGRESS_S:
            reported = time.monotonic()
            rate = count / (reported - started)
            log.info("%s: %s samples tokenised (%s a second)", name, f"{count:,}", f"{rate:,.0f}")
    log.info("%s: %s samples, %s tokens of text", name, f"{count:,}", f"{end:,}")
    return count


def tokenize_sample(sample: Sample, tokenizer: Any) -> TokenizedSample:
    """Tokens and loss weights of one sample.

    Raises:
        UserError: its messages and images do not fit together.
    """
    try:
        return tokenize_messages(tokenizer, messages_of(sample), len(sample.media))
    except ValueError as error:
        raise UserError(
            f"sample {sample.dataset}/{sample.id}: {error}; mend its messages and encode again: "
            f"python -m encode.run --dataset {sample.dataset}"
        ) from None


def used_tokens(weights: npt.NDArray[np.float32], prefix: int) -> int:
    """How many of a sample's tokens need to be read: up to the one that predicts the last supervised one.

    What follows (an answer's end mark and its newline, at least) predicts nothing and nothing looks back at
    it, so without it every loss and gradient is the same. What branches share stays whole.
    """
    supervised = np.flatnonzero(weights[1:] > 0)  # token k + 1 is predicted from token k
    last = int(supervised[-1]) + 1 if len(supervised) else len(weights)
    return max(last, prefix)


def _record(text: TokenizedSample, end: int, image: int) -> npt.NDArray[Any]:
    places = np.flatnonzero(text.ids == image)
    prefix = int(places[-1]) + 1 if len(places) else 0
    head = hashlib.blake2b(text.ids[:prefix].tobytes(), digest_size=8).digest()
    # The first token is predicted from nothing, so its weight never counts.
    loss_weight = float(text.weights[1:].sum(dtype=np.float64))
    used = used_tokens(text.weights, prefix)
    record = (end, loss_weight, int.from_bytes(head), prefix, used, len(places))
    return np.array([record], dtype=SAMPLE)
