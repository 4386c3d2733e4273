"""Tokenise the text of data sets once, into files that every run maps into memory.

    tokens = TokenStore.open(root, ["demo"], tokenizer, folder=Path("runs/.tokens"))
    tokens.sample(0, 17).ids     # the tokens of sample 17 of the first data set

The files are in one folder for each (texts, tokenizer, template version), beside the runs and never in the
cache, which may be read-only or shared:

    runs/.tokens/<id>/ids.bin       int32    tokens of all samples; an image or video is one token
                      weights.bin   float32  loss weight of each token; 0: not supervised
                      samples.bin   SAMPLE   one record for each sample
                      meta.json     written last, with the sizes of the other files
"""

from __future__ import annotations

import contextlib
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
from typing import Any

import numpy as np
import numpy.typing as npt

from cache.store.paths import CacheRoot
from cache.store.samples import Sample, read_samples, samples_digest
from configs import UserError
from model.language.chat_template import TEMPLATE_VERSION, TokenizedSample, tokenize_messages
from model.language.tokenizer import IMAGE_TOKEN, token_id, tokenizer_digest
from train.data.sample_list import Ints

log = logging.getLogger(__name__)

STORE_VERSION = 2
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
    ]
)
PROGRESS_S = 30.0
"""Seconds between progress lines while tokenising."""
FILES = ("ids.bin", "weights.bin", "samples.bin")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Store:
    """The mapped files of one data set."""

    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    samples: npt.NDArray[Any]


class TokenStore:
    """The tokenised text of several data sets. Make one by `TokenStore.open`."""

    def __init__(self, stores: Sequence[_Store], image_token_id: int) -> None:
        self._stores = list(stores)
        self.image_token_id = image_token_id

    @staticmethod
    def open(root: CacheRoot, names: Sequence[str], tokenizer: Any, *, folder: Path) -> TokenStore:
        """Map the text of the data sets `names`; tokenise first those that `folder` does not have.

        Raises:
            UserError: the messages and media of a sample do not match.
        """
        vocabulary = tokenizer_digest(tokenizer)
        stores = []
        for name in names:
            identity = [STORE_VERSION, samples_digest(root, name), vocabulary, TEMPLATE_VERSION]
            digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
            path = folder / digest[:16]
            if not _is_whole(path):
                _write(path, name, read_samples(root, name), tokenizer)
            stores.append(_map(path))
        return TokenStore(stores, token_id(tokenizer, IMAGE_TOKEN))

    def sample(self, dataset: int, index: int) -> TokenizedSample:
        """Return the tokens and loss weights of one sample, as views of the mapped files."""
        store = self._stores[dataset]
        first = int(store.samples["end"][index - 1]) if index else 0
        end = int(store.samples["end"][index])
        return TokenizedSample(ids=store.ids[first:end], weights=store.weights[first:end])

    def field(self, name: str, dataset: npt.NDArray[np.int16], index: Ints) -> Any:
        """Return the (n,) values of one field of SAMPLE, for samples of several data sets."""
        parts = [store.samples[name] for store in self._stores]
        result = np.empty(len(index), dtype=parts[0].dtype)
        for number, part in enumerate(parts):
            here = dataset == number
            result[here] = part[index[here]]
        return result


def messages_of(sample: Sample) -> list[tuple[str, str, float]]:
    """Return a sample's messages as (role, content, weight), as the chat template takes them."""
    return [(m.role, m.content, m.weight) for m in sample.messages]


def _is_whole(path: Path) -> bool:
    """Whether a store exists and its files have the sizes they had when it was finished."""
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
    """Tokenise into a temporary folder and rename it to `path`: the store is complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{path.name}.", suffix=".partial", dir=path.parent))
    try:
        count = _tokenize(temporary, name, samples, tokenizer)
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


def _tokenize(folder: Path, name: str, samples: Iterable[Sample], tokenizer: Any) -> int:
    """Write the tokens of every sample to FILES in `folder`; return the number of samples."""
    image = token_id(tokenizer, IMAGE_TOKEN)
    started = reported = time.monotonic()
    end = count = 0
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((folder / file).open("wb")) for file in FILES]
        ids, weights, records = files
        for sample in samples:
            text = tokenize_sample(sample, tokenizer)
            end += len(text.ids)
            count += 1
            ids.write(text.ids.astype("<i4", copy=False).data)
            weights.write(text.weights.astype("<f4", copy=False).data)
            records.write(_record(text, end, image).data)
            if time.monotonic() - reported > PROGRESS_S:
                reported = time.monotonic()
                rate = f"{count / (reported - started):,.0f}"
                log.info("%s: %s samples tokenised (%s a second)", name, f"{count:,}", rate)
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    log.info("%s: %s samples, %s tokens of text", name, f"{count:,}", f"{end:,}")
    return count


def tokenize_sample(sample: Sample, tokenizer: Any) -> TokenizedSample:
    """Return the tokens and loss weights of one sample.

    Raises:
        UserError: the sample has more media than `<image>` marks, or an unknown role.
    """
    try:
        return tokenize_messages(tokenizer, messages_of(sample), len(sample.media))
    except ValueError as error:
        raise UserError(
            f"sample {sample.dataset}/{sample.id}: {error}; correct its messages and encode again: "
            f"python -m encode.run --dataset {sample.dataset}"
        ) from None


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
    record = (end, loss_weight, int.from_bytes(head), prefix, used, len(media))
    return np.array([record], dtype=SAMPLE)
