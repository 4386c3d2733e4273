"""Tokenise the text of data sets once, into files that every run maps into memory.

    tokens = TokenStore.open(root, ["demo"], tokenizer, folder=Path("runs/.tokens"))
    tokens.sample(0, 17).ids     # the tokens of sample 17 of the first data set
    tokens.of(samples, 3).ids    # those of the sample, or part of a sample, at a position of a list

A sample without text to learn, or whose media do not fit its messages, has no tokens.

The files are in one folder for each (texts, tokenizer, template version), beside the runs and never in the
cache, which may be read-only or shared:

    runs/.tokens/<id>/ids.bin       int32    tokens of all samples; an image or video is one token
                      weights.bin   float32  loss weight of each token; 0: not supervised
                      samples.bin   SAMPLE   one record for each sample
                      meta.json     written last: the sizes of the other files, and what is wrong with samples
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from cache.store.paths import CacheRoot
from cache.store.samples import Sample, read_samples, samples_digest
from configs import UserError
from configs.progress import Meter, counted, number_text
from model.io.run_files import Count, read_json, refuse_links
from model.language.chat_template import (
    TokenizedSample,
    Turn,
    cut_turns,
    find_turns,
    has_answer,
    template_digest,
    tokenize_messages,
)
from model.language.folder_template import attached
from model.language.tokenizer import image_id, tokenizer_digest
from train.data.sample_list import Ints, SampleList

log = logging.getLogger(__name__)

STORE_VERSION = 3
"""Version of the file layout; part of the folder's id."""
SAMPLE = np.dtype(
    [
        # End of its tokens in ids.bin; they start at the end of the previous sample.
        ("end", "<i8"),
        ("loss_weight", "<f8"),  # sum of the weights of its tokens, without the sample's weight
        ("prefix_hash", "<u8"),  # hash of its tokens up to and including the last media item
        ("prefix", "<i4"),  # number of those tokens; 0 without media
        ("used", "<i4"),  # number of its tokens that a sequence needs, see `used_tokens`
        ("images", "<i4"),  # number of its images and videos
        ("fault", "<i4"),  # 1: its messages and media do not fit
    ]
)
FAULTS_KEPT = 1000
"""Samples of a data set of which the reason of their fault is kept; the others are only counted."""
FILES = ("ids.bin", "weights.bin", "samples.bin")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Store:
    """The mapped files of one data set."""

    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    samples: npt.NDArray[Any]
    faults: Mapping[str, str]
    """Number of a sample -> what is wrong with it, for the first FAULTS_KEPT."""


class TokenStore:
    """The tokenised text of several data sets. Make one by `TokenStore.open`."""

    def __init__(self, stores: Sequence[_Store], tokenizer: Any) -> None:
        self._stores = list(stores)
        self._tokenizer = tokenizer
        self.image_token_id = image_id(tokenizer)
        self.has_own_template = attached(tokenizer) is None
        """Whether samples can be cut between turns; with the template of an imported folder they cannot."""

    @staticmethod
    def open(root: CacheRoot, names: Sequence[str], tokenizer: Any, *, folder: Path) -> TokenStore:
        """Map the text of the data sets `names`; tokenise first those that `folder` does not have."""
        vocabulary, template = tokenizer_digest(tokenizer), template_digest(tokenizer)
        stores = []
        for name in names:
            identity = [STORE_VERSION, samples_digest(root, name), vocabulary, template]
            digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
            path = folder / digest[:16]
            if not _is_whole(path):
                _write(path, name, read_samples(root, name), tokenizer)
            stores.append(_map(path))
        return TokenStore(stores, tokenizer)

    def sample(self, dataset: int, index: int) -> TokenizedSample:
        """Return the tokens and loss weights of one sample, as views of the mapped files."""
        store = self._stores[dataset]
        first = int(store.samples["end"][index - 1]) if index else 0
        end = int(store.samples["end"][index])
        return TokenizedSample(ids=store.ids[first:end], weights=store.weights[first:end])

    def records(self, dataset: npt.NDArray[np.int16], index: Ints) -> npt.NDArray[Any]:
        """Return the (n,) records, of type SAMPLE, of samples of several data sets."""
        result = np.zeros(len(index), dtype=SAMPLE)
        for number, store in enumerate(self._stores):
            here = dataset == number
            result[here] = store.samples[index[here]]
        return result

    def of(self, samples: SampleList, number: int) -> TokenizedSample:
        """Return the tokens and loss weights of the sample, or part, at a position of a list."""
        text = self.sample(int(samples.dataset[number]), int(samples.index[number]))
        if not (end := int(samples.end_turn[number])):
            return text
        return self.cut(text, self.turns(text), int(samples.first_turn[number]), end)

    def measure(self, samples: SampleList) -> npt.NDArray[Any]:
        """Return the (S,) records, of type SAMPLE, of a list; those of parts say nothing of `end`."""
        result = self.records(samples.dataset, samples.index)
        for part in np.flatnonzero(samples.end_turn).tolist():
            result[part] = self.record(self.of(samples, part))
        return result

    def turns(self, text: TokenizedSample) -> list[Turn]:
        """Return the turns of a tokenised sample."""
        return find_turns(self._tokenizer, text.ids)

    def cut(
        self, text: TokenizedSample, turns: Sequence[Turn], first: int, end: int
    ) -> TokenizedSample:
        """Return turns [first, end) of a sample with their context, see `cut_turns`."""
        return cut_turns(text, turns, first, end, self.image_token_id)

    def record(self, text: TokenizedSample) -> Any:
        """Return the record of a sample or part, without `end`."""
        return _record(text, 0, self.image_token_id)[0]

    def fault(self, samples: SampleList, number: int) -> str:
        """Return what is wrong with a sample whose messages and media do not fit."""
        faults = self._stores[int(samples.dataset[number])].faults
        return faults.get(str(int(samples.index[number])), "its messages and media do not fit")


def messages_of(sample: Sample) -> list[tuple[str, str, float]]:
    """Return a sample's messages as (role, content, weight), as the chat template takes them."""
    return [(m.role, m.content, m.weight) for m in sample.messages]


class _Meta(TypedDict):
    """Content of meta.json."""

    bytes: dict[str, Count]
    faults: dict[str, str]


def _is_whole(path: Path) -> bool:
    """Whether a store exists, and its files have the sizes that they had when it was finished."""
    try:
        refuse_links(path)
        sizes = read_json(path / "meta.json", _Meta, "")["bytes"]
        if any((path / name).stat().st_size != sizes[name] for name in FILES):
            return False
        store = _map(path)
        ends = store.samples["end"]
        last = int(ends[-1]) if len(ends) else 0
        in_order = bool((np.diff(ends, prepend=0) >= 0).all())
        return in_order and last == len(store.ids) == len(store.weights)
    except (OSError, ValueError, KeyError, UserError):
        return False


def _map(path: Path) -> _Store:
    def mapped(name: str, dtype: Any) -> Any:
        if not (path / name).stat().st_size:  # an empty file cannot be mapped
            return np.empty(0, dtype=dtype)
        # A plain array of the same memory: a slice of it takes 0.1 microseconds, of a memmap 2.
        return np.asarray(np.memmap(path / name, dtype=dtype, mode="r"))

    return _Store(
        faults=read_json(path / "meta.json", _Meta, f"remove {path}")["faults"],
        ids=mapped("ids.bin", "<i4"),
        weights=mapped("weights.bin", "<f4"),
        samples=mapped("samples.bin", SAMPLE),
    )


def _write(path: Path, name: str, samples: Iterable[Sample], tokenizer: Any) -> None:
    """Tokenise into a temporary folder and rename it to `path`: the store is complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{path.name}.", suffix=".partial", dir=path.parent))
    try:
        count, faults = _tokenize(temporary, name, samples, tokenizer)
        sizes = {n: (temporary / n).stat().st_size for n in FILES}
        meta = {
            "dataset": name,
            "samples": count,
            "template": template_digest(tokenizer),
            "bytes": sizes,
        }
        meta["faults"] = faults
        (temporary / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        if not _is_whole(path):
            if path.is_symlink() or path.is_file():
                path.unlink()
            elif path.exists():
                shutil.rmtree(path)
        try:
            temporary.rename(path)
        except OSError:  # another process finished the same store first
            if not _is_whole(path):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tokenize(
    folder: Path, name: str, samples: Iterable[Sample], tokenizer: Any
) -> tuple[int, dict[str, str]]:
    """Write the tokens of every sample to FILES in `folder`.

    Returns:
        The number of samples; and number -> what is wrong, for the first FAULTS_KEPT that have no tokens
        because their messages and media do not fit.
    """
    image = image_id(tokenizer)
    end = count = 0
    faults: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((folder / file).open("wb")) for file in FILES]
        ids, weights, records = files
        meter = stack.enter_context(Meter(f"tokenise {name}", None, text=number_text))
        for sample in counted(samples, meter):
            text, fault = tokenize_sample(sample, tokenizer)
            if fault and len(faults) < FAULTS_KEPT:
                faults[str(count)] = fault
            end += len(text.ids)
            count += 1
            ids.write(text.ids.astype("<i4", copy=False).data)
            weights.write(text.weights.astype("<f4", copy=False).data)
            record = _record(text, end, image)
            record["fault"] = bool(fault)
            records.write(record.data)
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    log.info("%s: %s samples, %s tokens of text", name, f"{count:,}", f"{end:,}")
    return count, faults


def tokenize_sample(sample: Sample, tokenizer: Any) -> tuple[TokenizedSample, str]:
    """Return the tokens and loss weights of one sample, and what is wrong with it.

    There are no tokens if something is wrong, or if there is no text to learn.
    """
    nothing = TokenizedSample(ids=np.zeros(0, np.int32), weights=np.zeros(0, np.float32))
    messages = messages_of(sample)
    if not has_answer(messages):
        return nothing, ""
    try:
        return tokenize_messages(tokenizer, messages, len(sample.media)), ""
    except ValueError as error:
        return nothing, str(error)


def used_tokens(weights: npt.NDArray[np.float32], prefix: int) -> int:
    """Return how many of a sample's tokens a sequence needs: up to the predictor of the last supervised one.

    The tokens after it (at least an answer's end mark and newline) predict nothing, and no token attends to
    them, so leaving them out changes no loss and no gradient. The `prefix` tokens that branches share are
    always kept, and a sample without a supervised token is kept whole.
    """
    supervised = np.flatnonzero(weights[1:] > 0)  # token k + 1 is predicted from token k
    last = int(supervised[-1]) + 1 if len(supervised) else len(weights)
    return max(last, prefix)


def _record(text: TokenizedSample, end: int, image: int) -> npt.NDArray[Any]:
    media = np.flatnonzero(text.ids == image)
    prefix = int(media[-1]) + 1 if len(media) else 0
    head = hashlib.blake2b(text.ids[:prefix].tobytes(), digest_size=8).digest()
    # No token predicts the first one, so its weight never counts.
    loss_weight = float(text.weights[1:].sum(dtype=np.float64))
    used = used_tokens(text.weights, prefix)
    record = (end, loss_weight, int.from_bytes(head), prefix, used, len(media), 0)
    return np.array([record], dtype=SAMPLE)
