"""Answer prompts from features, for `model.generate` and `train.evaluate`.

M tokens of an image or frame, F frames of a video, N feature tokens of one prompt, V vision width, D language
width, B prompts in a batch, L tokens of the longest of them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from cache.format.spec import ARRAY_OF
from model.attention.kernels import ATTENTION
from model.language.chat_template import Message, fill_placeholders, prompt_ids, video_token_ids
from model.language.tokenizer import eos_ids, image_id
from model.vlm import VLM

MAX_PADDED_TOKENS = 1 << 16
"""Most tokens of a batch of prompts, padding included: prompts with videos are long. A single prompt may have
more."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Video:
    """The encoded frames of one video."""

    times_s: Sequence[float]
    """(F,) times of the frames, seconds after the first, ascending."""
    features: Tensor
    """(F, M, V) features of the frames."""


Prompt = tuple[Sequence[Message], Iterable[Tensor | Video] | None]
"""Messages, and the media for their placeholders, in order: (M, V) stored features of an image, or a Video.

An (images, M, V) tensor counts as a sequence of images.
"""


def answer(
    vlm: VLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
) -> list[str]:
    """Return the model's answer to each prompt, in order.

    Args:
        vlm: on any device, in any mode. Mode and attention are restored afterwards.
        tokenizer: the model's tokenizer.
        prompts: conversations that end in a user turn, with the features of their images and videos.
        max_new_tokens: longest answer, tokens.
        temperature: 0: the likeliest token each time; above 0: sampled.
        seed: of the sampling. A greedy answer does not depend on the rest of the batch; a sampled one does.
        batch_size: most prompts in a batch; prompts of similar length share one.
    """
    rows = answer_ids(
        vlm,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
    )
    return [decode(tokenizer, row) for row in rows]


def answer_ids(
    vlm: VLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
) -> list[list[int]]:
    """Return the tokens of each answer, as `answer` does its text, without the token that ends it."""
    prepared = [expand_prompt(tokenizer, through_tail(vlm, prompt)) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prepared[i][0]))
    answers: list[list[int]] = [[] for _ in prompts]
    device = vlm.language.get_input_embeddings().weight.device
    devices = [device] if device.type == "cuda" else []
    config = generation_config(vlm.language, tokenizer, max_new_tokens, temperature)
    with generation_mode(vlm), torch.random.fork_rng(devices), torch.inference_mode():
        torch.manual_seed(seed)
        for chosen in _batches(order, [len(ids) for ids, _, _ in prepared], batch_size):
            embeddings, mask = _left_padded([prepared[i] for i in chosen], vlm, device)
            ids = vlm.language.generate(
                inputs_embeds=embeddings, attention_mask=mask, generation_config=config
            )
            for i, row in zip(chosen, ids.tolist(), strict=True):
                answers[i] = before_end(tokenizer, row)
    return answers


def through_tail(vlm: VLM, prompt: Prompt) -> Prompt:
    """Return a prompt with what the connector gets of its stored features; itself without a tail."""
    messages, given = prompt
    tail = vlm.tail
    if tail is None or given is None:
        return prompt
    device = next(tail.parameters()).device
    media: list[Tensor | Video] = []
    with torch.inference_mode():
        for one in given:
            if isinstance(one, Video):
                seen = tail.see(one.features.to(device), ARRAY_OF["video"])
                media.append(Video(times_s=one.times_s, features=seen))
            else:
                media.append(tail.see(one.to(device).unsqueeze(0), ARRAY_OF["image"])[0])
    return messages, media


def _batches(order: Sequence[int], lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Cut `order`, shortest prompts first, into batches of at most `most` and `MAX_PADDED_TOKENS`."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == most or (len(batch) + 1) * lengths[i] > MAX_PADDED_TOKENS):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def expand_prompt(
    tokenizer: PreTrainedTokenizerFast, prompt: Prompt
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Replace the placeholders of a prompt by the tokens of its images and videos.

    Returns:
        (L,) token ids, (N,) indices of the tokens that features replace, and the (N, V) features.
    """
    messages, given = prompt
    media = [] if given is None else list(given)
    image = image_id(tokenizer)
    contents = [
        video_token_ids(tokenizer, one.times_s, one.features.shape[1])
        if isinstance(one, Video)
        else np.full(len(one), image, dtype=np.int32)
        for one in media
    ]
    text = np.array(prompt_ids(tokenizer, messages, len(media)), dtype=np.int32)
    row = torch.from_numpy(fill_placeholders(text, image, contents)[0]).long()
    # In float32: under autocast to bfloat16, torch.cat refuses float16.
    features = [
        (one.features.flatten(0, 1) if isinstance(one, Video) else one).float() for one in media
    ]
    return row, (row == image).nonzero().squeeze(1), torch.cat(features) if features else None


def _left_padded(
    rows: Sequence[tuple[Tensor, Tensor, Tensor | None]], vlm: VLM, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return (B, L, D) embeddings and a (B, L) mask. Padding is on the left: all answers start at L."""
    embedded = [
        vlm.embed(ids.to(device), slots.to(device), None if given is None else given.to(device))
        for ids, slots, given in rows
    ]
    mask = [torch.ones(len(one), dtype=torch.int64, device=device) for one in embedded]
    pad = functools.partial(pad_sequence, batch_first=True, padding_side="left")
    return pad(embedded), pad(mask)


def generation_config(
    language: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    max_new_tokens: int,
    temperature: float,
) -> GenerationConfig:
    """Return settings for greedy decoding, or for sampling from the whole distribution."""
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    vocabulary = language.get_output_embeddings().weight.shape[0]
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        **sampling,
        eos_token_id=list(eos_ids(tokenizer)),
        pad_token_id=tokenizer.pad_token_id,
        # An answer has no images, and embedding rows beyond the tokenizer's ids have no text.
        suppress_tokens=[image_id(tokenizer), *range(len(tokenizer), vocabulary)],
        use_cache=True,
    )


def decode(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """Return the text before the first end-of-answer token, without other control tokens."""
    return str(tokenizer.decode(before_end(tokenizer, ids), skip_special_tokens=True))


def before_end(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[int]:
    """Return the tokens before the first one that ends an answer."""
    ends = eos_ids(tokenizer)
    stop = next((i for i, one in enumerate(ids) if one in ends), len(ids))
    return list(ids[:stop])


@contextlib.contextmanager
def generation_mode(vlm: VLM) -> Iterator[None]:
    """Switch to evaluation mode and to SDPA, which supports padding masks and the KV cache; restore both."""
    training = vlm.training
    vlm.eval()
    vlm.language.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        vlm.language.set_attn_implementation(ATTENTION)
        vlm.train(training)
