"""A trainer of your own on clips, without a language model: a small transformer answers about videos.

    python -m encode.run --dataset demo --encoder demo        # once: features of 1,500 videos
    python docs/recipes/clips.py --datasets demo-videos

A clip is (frames, tokens, width) with the time of each frame, and each video has its own number of frames. A
batch holds the frames of all its videos one after the other; `padded` puts them side by side for attention.

S videos in a batch, L feature tokens of the longest, W words of the longest question, V width of a feature,
D width of the model.
"""

import argparse
import functools
import itertools

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

import nanomolmo2 as nm

OPTIONS = {  # each is a flag: --batch 8
    "features": "cache", "datasets": "demo-videos", "steps": 1000, "batch": 32, "rate": 1e-3,
    "width": 128, "layers": 2, "validate_every": 100, "workers": 2, "seed": 0,
}  # fmt: skip


class Words:
    """Questions as word numbers and answers as classes, by the text of the training samples alone."""

    def __init__(self, conversations):
        pairs = [self.pair(messages) for messages in conversations]
        known = sorted({word for question, _ in pairs for word in question.split()})
        self.numbers = {
            word: i for i, word in enumerate(known, 1)
        }  # 0: padding, and any other word
        self.answers = sorted({answer for _, answer in pairs})

    @staticmethod
    def pair(messages):
        """Return the first question of a conversation and its answer."""
        said = {turn["role"]: turn["content"] for turn in reversed(messages)}
        return said["user"], said["assistant"]

    def __call__(self, conversations):
        """Return questions (S, W), and the class of each answer (S,); -1 for one never seen in training."""
        pairs = [self.pair(messages) for messages in conversations]
        rows = [torch.tensor([self.numbers.get(w, 0) for w in q.split()]) for q, _ in pairs]
        classes = [self.answers.index(a) if a in self.answers else -1 for _, a in pairs]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor(classes)


def collate(words, samples):
    """Return a batch, the time of each feature token (S, L), questions (S, W) and classes (S,)."""
    batch = nm.collate(samples)
    tokens = batch.spec.tokens("frame")
    rows = [np.repeat(np.concatenate(clips), tokens) for clips in batch.times]
    times = nn.utils.rnn.pad_sequence(
        [torch.from_numpy(row).float() for row in rows], batch_first=True
    )
    return batch, times, *words(batch.messages)


class ClipReader(nn.Module):
    """A transformer over the words of a question and the feature tokens of a clip."""

    def __init__(self, spec, words, width, layers):
        super().__init__()
        self.tokens = spec.tokens("frame")
        self.feature = nn.Linear(spec.width, width)  # V -> D
        self.place = nn.Embedding(self.tokens, width)  # where in its frame a token is
        self.word = nn.Embedding(len(words.numbers) + 1, width)
        self.order = nn.Embedding(64, width)  # where in the question a word is
        block = nn.TransformerEncoderLayer(
            width, 4, 4 * width, 0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.answer = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(words.answers)))

    def forward(self, features, times, questions):
        """Return a score for each answer: (S, L, V) ragged, (S, L), (S, W) -> (S, answers)."""
        tokens, real = features.padded()  # (S, L, V), and (S, L): which are no padding
        # Every sample begins with a whole frame, so the place follows from the number of the token.
        places = self.place(torch.arange(tokens.shape[1], device=tokens.device) % self.tokens)
        clip = self.feature(tokens.float()) + places + waves(times, places.shape[1])
        ends = self.order(torch.arange(questions.shape[1], device=tokens.device))
        sequence = torch.cat([self.word(questions) + ends, clip], dim=1)
        padding = torch.cat([torch.zeros_like(questions, dtype=torch.bool), ~real], dim=1)
        return self.answer(self.blocks(sequence, src_key_padding_mask=padding)[:, 0])


def waves(times, width):
    """Return seconds as sines and cosines of 1/8 to 4 turns a second: (S, L) -> (S, L, D)."""
    rates = torch.logspace(-3, 2, width // 2, base=2, device=times.device) * 2 * torch.pi
    angles = times[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def scores(model, batch, times, questions):
    """Run the model on a batch; the stored bytes are copied to its device and unpacked there."""
    device = next(model.parameters()).device
    return model(batch.features(device), times.to(device), questions.to(device)).cpu()


@torch.no_grad()
def validate(model, loader):
    """Return the share of right answers."""
    model.eval()
    right = [
        scores(model, batch, times, questions).argmax(1) == classes
        for batch, times, questions, classes in loader
    ]
    model.train()
    return float(torch.cat(right).float().mean())


def main(options):
    """Train, and print the share of right answers about held-out videos."""
    torch.manual_seed(options.seed)
    cache = nm.open(options.features)
    names = options.datasets.split(",")
    data, held_out = cache.dataset(names, "train"), cache.dataset(names, "val")
    words = Words(data.messages)  # text alone: no features are read for it
    model = ClipReader(cache.spec, words, options.width, options.layers)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    shared = {"num_workers": options.workers, "collate_fn": functools.partial(collate, words)}
    loader = DataLoader(data, options.batch, shuffle=True, drop_last=True, **shared)
    validation = DataLoader(held_out, options.batch, **shared)
    optimizer = torch.optim.AdamW(model.parameters(), options.rate)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, options.steps)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))  # pass after pass
    for step, part in enumerate(itertools.islice(batches, options.steps), 1):
        *inputs, classes = part
        loss = nn.functional.cross_entropy(scores(model, *inputs), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        if step % options.validate_every == 0 or step == options.steps:
            print(
                f"step {step}: loss {loss:.3f}, right {validate(model, validation):.2f}", flush=True
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, default in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    main(parser.parse_args())
