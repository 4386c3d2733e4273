"""Ways to train the same model on the same images and annotations; a step of each has all of them once.

    packed trees     the trainer's loader, layout, attention and loss: each image once with its annotations
    packed           the same with each annotation a sample of its own, and a copy of the image in each
    padded           as LLaVA and Hugging Face's `Trainer` do it: rows padded to the longest, attention and
                     loss of transformers, gradients accumulated over micro-batches

Features come from the cache, or from the encoder in the step. All have AdamW and clip the gradient; each has
a copy of the model. The padded loop gets its text tokenised beforehand, and images decoded by all cores.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cache.store.reader import FeatureReader
from model.media.images import decode_image
from model.vision.encoder import VisionEncoder
from model.vlm import VLM
from nanomolmo2.unpack import unpack
from tests.gpu.worlds import DIFFERENT, World, jpeg
from train.data.loader import FeatureLoader, MicroBatch, feature_order
from train.data.sample_list import SampleList
from train.data.schedule import TrainingSchedule
from train.step import Forward

WINDOW = 4096
"""Tokens of a packed micro-batch, as in stage 1."""
PADDED_ROWS = 6
"""Annotations of a padded micro-batch: about as many tokens."""
IGNORED = -100
"""Label of tokens that are not learned, in transformers."""
CPU = torch.device("cpu")


class Live:
    """Encodes JPEG files in the training step."""

    def __init__(self, encoder: VisionEncoder) -> None:
        self._encoder = encoder
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1)

    def features(self, images: Sequence[int]) -> Tensor:
        """Decode, fit and encode images: (n, tokens, width) float16."""
        pixels = np.stack(list(self._pool.map(self.pixels, images)))
        parts = []
        with torch.no_grad():
            for at in range(0, len(pixels), 8):
                x = self._encoder.normalize(pixels[at : at + 8]).to(self._encoder.dtype)
                blocks = self._encoder.tower(x)
                parts.append(torch.cat([block.float() for block in blocks], dim=-1).half())
        return torch.cat(parts)

    def pixels(self, image: int) -> np.ndarray:
        """Decode one file and fit it to the encoder."""
        return self._encoder.prepare(decode_image(jpeg(image % DIFFERENT)))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


class Loop:
    """What all ways share: a copy of the model, its optimizer, and counts of a step."""

    def __init__(self, vlm: VLM) -> None:
        self.vlm = copy.deepcopy(vlm)
        self.vlm.train()
        self.optimizer = torch.optim.AdamW(self.vlm.parameters(), lr=1e-5)
        self.tokens = 0
        """Tokens that the language model computes in a step, padding included."""

    def update(self) -> None:
        """Clip the gradient, and let the optimizer take its step."""
        nn.utils.clip_grad_norm_(self.vlm.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> float:
        """Train on every annotation once; return the loss for each learned token, nats."""
        raise NotImplementedError

    def close(self) -> None:
        """End the threads."""


@dataclass(frozen=True, kw_only=True)
class LiveForward(Forward):
    """The trainer's forward pass with the encoder in it."""

    live: Live
    samples: SampleList

    def features(self, micro: MicroBatch) -> Tensor | None:
        """Encode the images whose rows the micro-batch has, each once."""
        media = np.array([m for tree in micro.layouts for m in tree.media], dtype=np.int64)
        rows, _ = feature_order(self.samples, media, self.spec)
        features = self.live.features(rows["image"].tolist())  # row n is that of image n
        return features.flatten(0, 1).index_select(0, micro.order)


class Packed(Loop):
    """The trainer's own steps."""

    def __init__(
        self, vlm: VLM, world: World, tokenizer: Any, branches: int, live: Live | None = None
    ) -> None:
        super().__init__(vlm)
        trees, reader = world.trees(tokenizer, WINDOW, branches)
        common: dict[str, Any] = {
            "vlm": self.vlm,
            "spec": reader.spec,
            "device": CPU,
            "autocast": None,
        }
        self.forward = Forward(**common)
        if live is not None:
            self.forward = LiveForward(**common, live=live, samples=trees.samples)
        schedule = TrainingSchedule(trees, len(trees.members), seed=0)
        self.loader = FeatureLoader(schedule, reader, max_tokens=WINDOW, threads=2, ahead=2)

    def step(self) -> float:
        """Take the micro-batches of one step."""
        loss, self.tokens = 0.0, 0
        for micro in self.loader:
            part = self.forward.loss(micro)
            part.backward()
            loss, self.tokens = loss + float(part.detach()), self.tokens + micro.tokens
            if micro.last:
                break
        self.update()
        return loss

    def close(self) -> None:
        self.loader.close()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One annotation as a sequence of its own."""

    ids: Tensor
    """(T,) int64; the id of `<image>` where a feature goes."""
    labels: Tensor
    """(T,) int64 tokens to learn, IGNORED elsewhere."""
    image: int
    """Number of its image, which is that of its row."""


def annotation_rows(world: World, tokenizer: Any) -> tuple[list[Row], FeatureReader, int]:
    """Return every annotation as a row, a reader of the features, and the id of `<image>`."""
    trees, reader = world.trees(tokenizer, WINDOW, 1)
    schedule = TrainingSchedule(trees, len(trees.members), seed=0)
    rows = []
    with FeatureLoader(schedule, reader, max_tokens=WINDOW, stop=1) as loader:
        for micro in loader:
            packed = micro.packed
            for tree in micro.layouts:
                ((first, end, _),) = tree.branches
                own = (packed.loss_positions >= first) & (packed.loss_positions < end)
                at, targets = packed.loss_positions[own] - first, packed.targets[own]
                # The last token is only predicted, so a packed sequence does not have it.
                ids = torch.cat([packed.input_ids[first:end], targets[-1:]])
                labels = torch.full_like(ids, IGNORED)
                labels[at + 1] = targets
                (image,) = trees.samples.rows_of(tree.media[0]).tolist()
                rows.append(Row(ids=ids, labels=labels, image=image))
    return rows, reader, trees.tokens.image_token_id


class Padded(Loop):
    """A row for every annotation, as in transformers."""

    def __init__(self, vlm: VLM, world: World, tokenizer: Any, live: Live | None = None) -> None:
        super().__init__(vlm)
        self.vlm.language.set_attn_implementation("sdpa")
        self.rows, self.reader, self.image_id = annotation_rows(world, tokenizer)
        self.live, self.order = live, random.Random(0)

    def step(self) -> float:
        """Accumulate the gradients of micro-batches of PADDED_ROWS rows."""
        rows = self.order.sample(self.rows, len(self.rows))
        learned = sum(int((row.labels != IGNORED).sum()) for row in rows)
        loss, self.tokens = 0.0, 0
        for at in range(0, len(rows), PADDED_ROWS):
            part = self.loss(rows[at : at + PADDED_ROWS], learned)
            part.backward()
            loss += float(part.detach())
        self.update()
        return loss

    def loss(self, rows: Sequence[Row], learned: int) -> Tensor:
        """Return a micro-batch's part of the loss, by transformers' own loss function."""
        pad = nn.utils.rnn.pad_sequence
        ids = pad([row.ids for row in rows], batch_first=True)
        labels = pad([row.labels for row in rows], batch_first=True, padding_value=IGNORED)
        mask = pad([torch.ones_like(row.ids) for row in rows], batch_first=True)
        self.tokens += ids.numel()
        images = [row.image for row in rows]
        features = self.live.features(images) if self.live else self.stored(images)
        words = self.vlm.language.get_input_embeddings()(ids)
        slots = ((ids == self.image_id) & (mask == 1)).unsqueeze(-1)
        words = words.masked_scatter(slots, self.vlm.connector(features.float()))
        output = self.vlm.language(
            inputs_embeds=words,
            attention_mask=mask,
            labels=labels,
            num_items_in_batch=learned,
            use_cache=False,
        )
        loss: Tensor = output.loss
        return loss

    def stored(self, images: Sequence[int]) -> Tensor:
        """Read and unpack the features of images: (n, tokens, width) float16."""
        spec = self.reader.spec
        codes = np.empty((len(images), spec.row_bytes("image")), np.uint8)
        self.reader.read_into("image", np.array(images), codes)
        return unpack(torch.from_numpy(codes), spec.codec, spec.tokens("image"), spec.width)
