"""Training without a cache and without our code: transformers' own classes, the tower live.

Read top to bottom, this is what a student would write. `losses` trains on given batches; the proof hands it
the batches and rates of a run of ours and compares the losses of every step.

B samples of a step, L tokens, M tokens of an image, V width of the tower, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Model

Record = tuple[str, str, str]
"""Path of a drawing, question, answer."""
IGNORED = -100


def losses(
    tower_folder: Path,
    language_folder: Path,
    batches: Sequence[Sequence[Record]],
    rates: Sequence[tuple[float, float]],
    *,
    block: int,
    pool: int,
    seed: int = 0,
) -> list[float]:
    """Train a linear connector and a language model; return the loss of every step.

    Args:
        tower_folder: of a Dinov2Model.
        language_folder: of a causal language model with ChatML's tokens.
        batches: the records of each step.
        rates: learning rates of connector and language model, a pair each step.
        block: block of the tower whose output is taken, from 0.
        pool: side of the windows of patches that are averaged.
        seed: of the connector's weights.
    """
    tower = Dinov2Model.from_pretrained(tower_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(language_folder)
    language = AutoModelForCausalLM.from_pretrained(language_folder, dtype=torch.float32).train()
    torch.manual_seed(seed)
    connector = nn.Linear(tower.config.hidden_size, language.config.hidden_size)
    matrices, others = [], []
    for p in language.parameters():
        (matrices if p.ndim >= 2 else others).append(p)
    groups = [
        {"params": [connector.weight], "part": 0, "weight_decay": 0.01},
        {"params": [connector.bias], "part": 0, "weight_decay": 0.0},
        {"params": matrices, "part": 1, "weight_decay": 0.01},
        {"params": others, "part": 1, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    everything = [*connector.parameters(), *language.parameters()]
    words = language.get_input_embeddings()
    found = []
    for batch, step_rates in zip(batches, rates, strict=True):
        images = connector(see(tower, [path for path, _, _ in batch], block, pool))  # (B, M, D)
        rows, targets = [], []
        for image, (_, question, answer) in zip(images, batch, strict=True):
            before = tokenizer("<|im_start|>user\n", return_tensors="pt").input_ids[0]
            asked = f"\n{question}<|im_end|>\n<|im_start|>assistant\n"
            prompt = tokenizer(asked, return_tensors="pt").input_ids[0]
            said = tokenizer(f"{answer}<|im_end|>", return_tensors="pt").input_ids[0]
            rows.append(torch.cat([words(before), image, words(prompt), words(said)]))  # (L, D)
            labels = torch.full((len(rows[-1]),), IGNORED)
            labels[-len(said) :] = said
            targets.append(labels)
        mask = [torch.ones(len(row), dtype=torch.long) for row in rows]
        logits = language(
            inputs_embeds=nn.utils.rnn.pad_sequence(rows, batch_first=True),
            attention_mask=nn.utils.rnn.pad_sequence(mask, batch_first=True),
            use_cache=False,
        ).logits
        wanted = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORED)
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten(), ignore_index=IGNORED
        )
        loss.backward()
        nn.utils.clip_grad_norm_(everything, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = step_rates[group["part"]]
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@torch.no_grad()
def see(tower: Dinov2Model, paths: Sequence[str], block: int, pool: int) -> torch.Tensor:
    """Return the pooled features of drawings, (B, M, V), rounded as a cache of fp16 rounds them."""
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    x = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    patches = tower(x, output_hidden_states=True).hidden_states[block + 1][:, 1:]  # without CLS
    side = round(patches.shape[1] ** 0.5) // pool
    windows = patches.half().float().unflatten(1, (side, pool, side, pool))
    return windows.mean((2, 4)).flatten(1, 2).half().float()
