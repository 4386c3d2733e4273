"""Compare an exported folder, loaded by transformers' own classes, with our own model.

    questions = sample_questions()
    expected = answers_of(vlm, tokenizer, encoder, "int8", questions)
    found = compare(folder, questions, expected)     # MismatchError unless they are equal

Both sides compute in float32 on the CPU. Features of an image are computed from its pixels on both sides, not
passed through the codec of a cache; what the codec changes is measured beside it. Where float32 itself rounds
by more than the limit, each side by as much, logits are computed once more in float64, by `exact_logits`, and
compared with `compare(..., exact=True)`. The limit is the same.

L tokens of a prompt, T of them text, R rows of the output layer, n images.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from configs import UserError
from model.export.template import as_parts
from model.inference import answer_ids, before_end, expand_prompt, generation_mode, through_tail
from model.language.loading import quiet
from model.language.tokenizer import image_id
from model.media.images import decode_image
from model.quantize import pack
from model.vision.encoder import VisionEncoder
from model.vlm import VLM
from nanomolmo2.unpack import unpack

LOGITS_LIMIT = 1e-4
"""Largest difference of a logit."""
PIXELS_LIMIT = 1e-5
"""Largest difference of a normalised pixel, for equal resizing."""
LEVELS_LIMIT = 2.01
"""Largest difference of a pixel in 8-bit levels, for torchvision's resizing: it rounds differently, which is
one level in all images tried."""
NEW_TOKENS = 16
"""Tokens of each answer that is compared."""
PHOTOGRAPHS = ("coffee.png", "chelsea.png", "rocket.jpg", "text.png")
"""Photographs that scikit-image installs: 600 x 400, 451 x 300, 640 x 427 and 448 x 172 pixels."""
SHAPES = ((301, 37), (121, 500), (64, 63), (431, 290))
"""Width and height of images that are drawn if scikit-image is not installed; the first two always."""


class MismatchError(Exception):
    """The exported model differs from our own; the message says where."""


class LogitsError(MismatchError):
    """A logit differs."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One prompt."""

    text: str
    """Question of the user."""
    images: tuple[Image.Image, ...]
    """RGB images, at the start of the text."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Expected:
    """What our own model computes for a prompt."""

    ids: list[int]
    """(L,) tokens of the prompt."""
    logits: Tensor
    """(T, R) logits at each token of text, float32, or of `exact_logits` float64."""
    answer: list[int]
    """Tokens of the greedy answer."""
    pixels: Tensor
    """(n, 3, S, S) normalised pixels of the images."""
    rounded: float
    """How much the codec of the cache changes a logit at most."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far an exported model is from our own."""

    prompts: int
    """Number of prompts."""
    logits: float
    """Largest difference of a logit."""
    tokens: int
    """Tokens of greedy answers, all equal."""
    levels: float
    """Largest difference of a pixel in 8-bit levels with the processor that transformers takes by default."""
    rounded: float
    """How much the codec of the cache changes a logit at most."""


def sample_questions() -> list[Question]:
    """Return prompts about images of odd aspect ratios, about two images, and about none."""
    images = list(_images())
    questions = [Question(text="What is this?", images=(image,)) for image in images]
    questions.append(Question(text="What differs between the two?", images=tuple(images[-2:])))
    questions.append(Question(text="Say something.", images=()))
    return questions


def _images() -> Iterator[Image.Image]:
    """Yield photographs of scikit-image, if it is installed, and drawn images."""
    found = importlib.util.find_spec("skimage")
    photographs = [
        Path(place) / "data" / name
        for place in (found.submodule_search_locations or () if found else ())
        for name in PHOTOGRAPHS
    ]
    photographs = [path for path in photographs if path.is_file()]
    for path in photographs[:3]:
        yield decode_image(path.read_bytes())
    for number, (width, height) in enumerate(SHAPES[:2] if photographs else SHAPES):
        random = np.random.default_rng(number)
        coarse = random.integers(0, 256, (6, 5, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        noise = random.integers(-20, 21, (height, width, 3))
        yield Image.fromarray(np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8))


def answers_of(
    vlm: VLM,
    tokenizer: PreTrainedTokenizerFast,
    encoder: VisionEncoder,
    codec: str,
    questions: Sequence[Question],
) -> list[Expected]:
    """Return what our own model computes for each prompt.

    Args:
        vlm: on the CPU, in float32.
        tokenizer: its tokenizer.
        encoder: that of the space, on the CPU, in float32.
        codec: of the space.
        questions: prompts.

    Raises:
        UserError: the features of an image are not finite.
    """
    images = _distinct(questions)
    prepared = np.stack([encoder.prepare(image) for image in images])
    # All in one call: the encoder fills up each batch, so that an image alone takes as long as eight.
    encoded = encoder.encode(prepared)
    packed = pack(encoded, codec)
    if not bool(packed.finite.all()):
        raise UserError(
            "the encoder's features of a photograph are not finite: are the weights damaged? Give intact "
            "ones: --weights PATH"
        )
    stored = unpack(packed.rows, codec, *encoded.shape[1:])
    result = []
    for question in questions:
        pixels = torch.empty(0)
        features = rounded = None
        if which := _places(question, images):
            pixels = encoder.normalize(prepared[which])
            features, rounded = encoded[which], stored[which]
        messages = [("user", question.text, 1.0)]
        ids, logits = _logits(vlm, tokenizer, (messages, features))
        (answer,) = answer_ids(vlm, tokenizer, [(messages, features)], max_new_tokens=NEW_TOKENS)
        change = 0.0
        if rounded is not None:
            _, others = _logits(vlm, tokenizer, (messages, rounded))
            change = float((logits - others).abs().max())
        result.append(
            Expected(ids=ids, logits=logits, answer=answer, pixels=pixels, rounded=change)
        )
    return result


def exact_logits(
    vlm: VLM,
    tokenizer: PreTrainedTokenizerFast,
    encoder: VisionEncoder,
    questions: Sequence[Question],
    expected: Sequence[Expected],
) -> list[Expected]:
    """Return `expected` with logits that our own model computes in float64. It is left in float64.

    Args:
        vlm: on the CPU, in float32.
        tokenizer: its tokenizer.
        encoder: that of the space, on the CPU, in float32.
        questions: prompts.
        expected: what `answers_of` returned for them.
    """
    images = _distinct(questions)
    with encoder.in_float64():
        encoded = encoder.encode(np.stack([encoder.prepare(image) for image in images]))
    vlm.double()
    result = []
    for question, ours in zip(questions, expected, strict=True):
        which = _places(question, images)
        prompt = [("user", question.text, 1.0)], encoded[which].double() if which else None
        result.append(replace(ours, logits=_logits(vlm, tokenizer, prompt)[1]))
    return result


def _distinct(questions: Sequence[Question]) -> list[Image.Image]:
    """Return the images of all questions, each once."""
    return list({id(image): image for question in questions for image in question.images}.values())


def _places(question: Question, images: Sequence[Image.Image]) -> list[int]:
    """Return which of `images` are those of a question."""
    return [next(i for i, one in enumerate(images) if one is x) for x in question.images]


def _logits(
    vlm: VLM, tokenizer: PreTrainedTokenizerFast, prompt: tuple[Any, Tensor | None]
) -> tuple[list[int], Tensor]:
    """Return the (L,) tokens of a prompt and the (T, R) logits of those that are text."""
    ids, slots, features = expand_prompt(tokenizer, through_tail(vlm, prompt))
    with generation_mode(vlm), torch.inference_mode():
        embedded = vlm.embed(ids, slots, features).unsqueeze(0)  # (L,) -> (1, L, D)
        hidden = vlm.language.base_model(inputs_embeds=embedded, use_cache=False)
        is_text = ids != image_id(tokenizer)
        head = vlm.language.get_output_embeddings()
        logits = head(hidden.last_hidden_state[0, is_text])
    return ids.tolist(), logits.clone()


def compare(
    folder: Path,
    questions: Sequence[Question],
    expected: Sequence[Expected],
    *,
    own_code: bool = False,
    as_text: bool = False,
    exact: bool = False,
) -> Comparison:
    """Load a folder with transformers' Auto classes and compare it with our own model.

    Args:
        folder: the exported model.
        questions: prompts.
        expected: what our own model computes for them.
        own_code: whether the model's class is in the folder, from us.
        as_text: whether the chat template takes content as text, not as a list of parts.
        exact: whether the logits are those of `exact_logits`.

    Raises:
        LogitsError: logits differ.
        MismatchError: tensors are missing or left over, or tokens, pixels or answers differ.
    """
    with quiet():
        model, report = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=own_code
        )
        # The trained resizing is Pillow's; transformers takes torchvision's unless told.
        processor = AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=own_code)
        default = AutoProcessor.from_pretrained(folder, trust_remote_code=own_code)
    _check_loaded(model, report)
    model.eval()
    levels = 0.0
    all_inputs = []
    for number, (question, ours) in enumerate(zip(questions, expected, strict=True), 1):
        where = f"prompt {number}"
        inputs = _inputs(processor, question, as_text)
        if inputs["input_ids"][0].tolist() != ours.ids:
            raise MismatchError(f"{where}: its tokens are not those of our own template")
        if question.images:
            pixels = float((inputs["pixel_values"] - ours.pixels).abs().max())
            if not pixels <= PIXELS_LIMIT:
                raise MismatchError(
                    f"{where}: a pixel differs by {pixels:.2g} (limit {PIXELS_LIMIT:g})"
                )
            levels = max(levels, _levels(default, question, ours, as_text))
        all_inputs.append(inputs)
    if exact:
        model.double()
    logits = max(map(partial(_compare_logits, model), count(1), all_inputs, expected))
    model.float()
    compare_answer = partial(_compare_answer, model, processor.tokenizer)
    tokens = sum(map(compare_answer, count(1), all_inputs, expected))
    if not levels <= LEVELS_LIMIT:
        raise MismatchError(f"pixels of the default processor differ by {levels:.2f} 8-bit levels")
    return Comparison(
        prompts=len(questions),
        logits=logits,
        tokens=tokens,
        levels=levels,
        rounded=max(one.rounded for one in expected),
    )


def _check_loaded(model: Any, report: Mapping[str, Any]) -> None:
    """Raise MismatchError unless the class is LLaVA's and every tensor of it was in the file."""
    if not isinstance(model, LlavaForConditionalGeneration):
        raise MismatchError(f"transformers loads it as {type(model).__name__}")
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if names := sorted(map(str, report[what])):
            raise MismatchError(f"transformers reports {what}: {', '.join(names[:3])}")


def _inputs(processor: Any, question: Question, as_text: bool = False) -> Any:
    """Return a prompt as the model's inputs; `as_text`: the template takes content as text."""
    images = list(question.images)
    if as_text:
        content = processor.image_token * len(images) + question.text
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        bos = processor.tokenizer.bos_token
        special = not (bos and text.startswith(bos))
        return processor(
            text=text, images=images or None, add_special_tokens=special, return_tensors="pt"
        )
    messages = as_parts([("user", question.text, 1.0)], len(images))
    left = iter(images)
    for part in messages[0]["content"]:
        if part["type"] == "image":
            part["image"] = next(left)
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def _levels(processor: Any, question: Question, ours: Expected, as_text: bool) -> float:
    """Return the largest difference of a pixel, in 8-bit levels."""
    std = torch.tensor(processor.image_processor.image_std).view(1, 3, 1, 1)
    different = _inputs(processor, question, as_text)["pixel_values"] - ours.pixels
    return float((different * std * 255).abs().max())


def _compare_logits(model: Any, number: int, inputs: Mapping[str, Tensor], ours: Expected) -> float:
    """Return the largest difference of a logit at a token of text."""
    is_text = inputs["input_ids"][0] != model.config.image_token_index
    given = {k: x.to(model.dtype) if x.is_floating_point() else x for k, x in inputs.items()}
    with torch.inference_mode():
        theirs = model(**given).logits[0, is_text]
    different = float((theirs - ours.logits).abs().max())
    if not different <= LOGITS_LIMIT:
        raise LogitsError(
            f"prompt {number}: a logit differs by {different:.2g} (limit {LOGITS_LIMIT:g})"
        )
    return different


def _compare_answer(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    number: int,
    inputs: Mapping[str, Tensor],
    ours: Expected,
) -> int:
    """Return the number of tokens of the greedy answer."""
    with torch.inference_mode():
        rows = model.generate(**inputs, max_new_tokens=NEW_TOKENS)
    answer = before_end(tokenizer, rows[0, inputs["input_ids"].shape[1] :].tolist())
    if answer != ours.answer:
        raise MismatchError(
            f"prompt {number}: its greedy answer is {tokenizer.decode(answer)!r}, ours "
            f"{tokenizer.decode(ours.answer)!r}"
        )
    return len(answer)
