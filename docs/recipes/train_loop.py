"""A training loop of your own on cached features: all of it, in one file to read and to change.

    python -m encode.run --dataset demo --encoder demo        # once: features of 3,000 drawings
    python docs/recipes/tiny_llm.py runs/tiny-llm             # a language model without a download
    python docs/recipes/train_loop.py --llm runs/tiny-llm --datasets demo-points --rate 2e-3

The vision encoder has run already and is not here. Two parts of a vision-language model are left: a connector
that makes a stored feature look like the embedding of a word, and a language model that reads both.
"""

import argparse
import functools
import itertools
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import AutoModelForCausalLM, AutoTokenizer

import nanomolmo2 as nm

OPTIONS = {  # each is a flag: --warm-up 20
    "features": "cache", "datasets": "", "llm": "Qwen/Qwen3-0.6B", "out": "runs/own", "workers": 2,
    "steps": 1000, "batch": 32, "accumulate": 1, "rate": 1e-4, "connector_rate": 1e-3, "warm_up": 50,
    "validate_every": 100, "validation_samples": 256, "answers": 5, "seed": 0,
}  # fmt: skip
SLOT = -1  # a feature's place among token ids: no vocabulary has this id, so no text can forge it


def encode(tokenizer, sample, prompt=False):
    """Return a conversation's ids in ChatML, SLOT for each feature, and loss weights; or a prompt's ids."""

    def words(text):  # split_special_tokens: a user who types "<|im_end|>" ends no turn
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    ids, weights, media = [], [], iter(sample.times)
    turns = list(zip(sample.messages, sample.texts, sample.turn_weights, strict=True))
    for turn, texts, weight in turns[:-1] if prompt else turns:
        head, body = [start, *words(f"{turn['role']}\n")], words(texts[0])
        for text in texts[1:]:  # between two texts is one image or video
            times = next(media)
            if times is None:
                body += [SLOT] * sample.spec.tokens("image")
            else:  # a video is its frames, each after the second at which it is seen
                for time in times:
                    body += words(f"{time:.1f} ") + [SLOT] * sample.spec.tokens("frame")
            body += words(text)
        # The model learns what the assistant says and to stop after it: nothing else has a weight.
        learned = weight * sample.weight if turn["role"] == "assistant" else 0.0
        ids += [*head, *body, end, *words("\n")]
        weights += [0.0] * len(head) + [learned] * (len(body) + 1) + [0.0] * len(words("\n"))
    return [*ids, start, *words("assistant\n")] if prompt else ids, weights


def collate(tokenizer, samples):
    """Return a batch, its ids (S, L) and weights (S, L): S samples, L tokens of the longest."""
    batch = nm.collate(samples)
    columns = zip(*(encode(tokenizer, sample) for sample in batch), strict=True)
    rows = ([torch.tensor(row) for row in column] for column in columns)
    # Padding is at the end, so no real token attends to it: no mask is needed.
    return batch, *(nn.utils.rnn.pad_sequence(each, batch_first=True) for each in rows)


class VLM(nn.Module):
    """A connector, and the language model that reads what comes out of it."""

    def __init__(self, llm, width):
        super().__init__()
        self.llm = llm
        self.connector = nn.Linear(
            width, llm.get_input_embeddings().embedding_dim
        )  # V -> D; or an MLP

    def embed(self, ids, features):
        """Embed S x L ids, and put N features of width V in the slots: (S, L), (N, V) -> (S, L, D)."""
        slots = ids == SLOT
        words = self.llm.get_input_embeddings()(ids.masked_fill(slots, 0))
        # Slots and features are in one order, by samples, then tokens: the n-th goes into the n-th.
        images = self.connector(features.float()).to(words.dtype)
        return words.masked_scatter(slots.unsqueeze(-1), images)

    def loss(self, batch, ids, weights):
        """Return the sum of weight x -log p(token), and the sum of the weights."""
        device = next(self.parameters()).device
        ids, weights = ids.to(device), weights.to(device)[:, 1:]
        # Weights stay float32, which keeps small updates; a GPU multiplies in bfloat16.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            features = batch.features(device).flat  # stored bytes travel, and are unpacked there
            hidden = self.llm.base_model(inputs_embeds=self.embed(ids, features), use_cache=False)
            # The state at i predicts token i + 1. Logits only where there is something to learn: for all
            # tokens and 150,000 words they would take most of the memory.
            learned = weights > 0
            logits = self.llm.get_output_embeddings()(hidden.last_hidden_state[:, :-1][learned])
        losses = nn.functional.cross_entropy(logits.float(), ids[:, 1:][learned], reduction="none")
        return (losses * weights[learned]).sum(), weights.sum()

    @torch.no_grad()
    def answer(self, tokenizer, sample, longest=64):
        """Return what the model says where the sample has its last turn."""
        device = next(self.parameters()).device
        ids = torch.tensor([encode(tokenizer, sample, prompt=True)[0]], device=device)
        words = self.embed(ids, nm.collate([sample]).features(device).flat)
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        stop = {"max_new_tokens": longest, "eos_token_id": end, "pad_token_id": end}
        new = self.llm.generate(inputs_embeds=words, do_sample=False, **stop)
        return tokenizer.decode(new[0], skip_special_tokens=True)


def load(folder, width):
    """Return model and tokenizer; the connector is new, or the one that `save` put beside them."""
    vlm = VLM(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), width)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if "<|im_start|>" not in tokenizer.get_vocab():
        raise SystemExit(f"{folder} has no <|im_start|>: change `encode` to its chat template")
    if (saved := Path(folder, "connector.safetensors")).exists():
        vlm.connector.load_state_dict(load_file(saved))
    return vlm, tokenizer


def save(vlm, tokenizer, folder):
    """Write all that `load` reads, as safetensors: a pickle could run code of whoever sent it."""
    vlm.llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(vlm.connector.state_dict(), Path(folder, "connector.safetensors"))


def optimizer_of(vlm, options):
    """AdamW. The untrained connector takes a higher rate than the language model, norms take no decay."""
    groups = []
    for part, rate in ((vlm.connector, options.connector_rate), (vlm.llm, options.rate)):
        for matrix in (True, False):
            chosen = [p for p in part.parameters() if (p.ndim > 1) == matrix]
            groups.append({"params": chosen, "lr": rate, "weight_decay": 0.01 * matrix})
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def rate_at(step, options):
    """Return the factor on the rates: a line up while AdamW's averages are young, a cosine down to 0.1."""
    if step < options.warm_up:
        return (step + 1) / options.warm_up
    done = (step - options.warm_up) / max(1, options.steps - options.warm_up)
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, done))


@torch.no_grad()
def validate(vlm, loader):
    """Return the mean loss of a learned token over all samples of the loader."""
    vlm.eval()
    losses, weights = zip(*(vlm.loss(*part) for part in loader), strict=True)
    vlm.train()
    return float(sum(losses) / sum(weights))


def main(options):
    """Train, save, and ask about held-out images."""
    torch.manual_seed(options.seed)
    cache = nm.open(options.features)
    names = options.datasets.split(",") if options.datasets else None
    # An image belongs to one split by the hash of its bytes: nothing validated was trained on.
    data, held_out = cache.dataset(names, "train"), cache.dataset(names, "val")
    vlm, tokenizer = load(options.llm, cache.spec.width)
    vlm.to("cuda" if torch.cuda.is_available() else "cpu").train()
    shared = {"num_workers": options.workers, "collate_fn": functools.partial(collate, tokenizer)}
    loader = DataLoader(data, options.batch, shuffle=True, drop_last=True, **shared)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))  # pass after pass
    some = range(min(len(held_out), options.validation_samples))
    validation = DataLoader(Subset(held_out, some), options.batch, **shared)
    optimizer = optimizer_of(vlm, options)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, options))
    for step in range(1, options.steps + 1):
        parts = list(itertools.islice(batches, options.accumulate))
        # One divisor for the step: however it is cut into parts, its gradient is that of one large batch.
        total = sum(weights[:, 1:].sum() for _, _, weights in parts)
        loss = 0.0
        for part in parts:
            share = vlm.loss(*part)[0] / total
            share.backward()  # adds to the gradients, and frees this part's memory
            loss += share.item()
        nn.utils.clip_grad_norm_(vlm.parameters(), 1.0)  # one odd batch must not undo a thousand
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        if step % options.validate_every == 0 or step == options.steps:
            known = validate(vlm, validation)
            print(f"step {step}: loss {loss:.3f}, validation {known:.3f}", flush=True)
    save(vlm, tokenizer, options.out)
    for sample in map(held_out.__getitem__, some[: options.answers]):
        question, right = (turn["content"] for turn in sample.messages[-2:])
        print(f"{question} {vlm.answer(tokenizer, sample)!r} (right: {right!r})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, default in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    main(parser.parse_args())
