"""Inference: greedy answers equal the training forward token by token, in any batch.

(text,) = answer(vlm, tokenizer, [([("user", "What is it?", 1.0)], features)], max_new_tokens=16)
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedTokenizerFast

from model import inference
from model.attention.batch import PackedBatch
from model.inference import Prompt, Video, answer, decode, expand_prompt
from model.language.tokenizer import eos_ids, token_id
from model.vlm import VLM, build_vlm

VISION = 24
TOKENS = 3


@pytest.fixture(scope="module")
def model() -> tuple[VLM, PreTrainedTokenizerFast]:
    vlm, tok = build_vlm(VISION, "random:qwen3-tiny", "mlp", seed=3)
    generator = torch.Generator().manual_seed(11)
    for p in vlm.language.parameters():  # a new model repeats its last token
        p.data += (0.3 if p.dim() == 1 else 0.1) * torch.randn(p.shape, generator=generator)
    return vlm, tok


def prompts(count: int) -> list[Prompt]:
    """Return prompts of different lengths, with none to two images."""
    g = torch.Generator().manual_seed(2)
    result: list[Prompt] = []
    for i in range(count):
        features = torch.randn(i % 3, TOKENS, VISION, generator=g) if i % 3 else None
        result.append(([("user", "why? " * (1 + 5 * i % 7), 1.0)], features))
    return result


def full_forward(
    vlm: VLM, tok: PreTrainedTokenizerFast, ids: list[int], features: Tensor | None, longest: int
) -> str:
    """Return the greedy answer, each token by a training forward of the whole sequence."""
    image = token_id(tok, "<image>")
    start, ids = len(ids), list(ids)
    with torch.no_grad():
        while len(ids) < start + longest:
            row = torch.tensor(ids)
            batch = PackedBatch.one_sample(row, torch.zeros(len(row)), image)
            logits = vlm.language.lm_head(vlm.hidden(batch, features)[-1])
            logits[len(tok) :] = logits[image] = float("-inf")
            ids.append(int(logits.argmax()))
            if ids[-1] in eos_ids(tok):
                break
    return decode(tok, ids[start:])


def test_answers_about_videos_equal_the_full_forward(
    model: tuple[VLM, PreTrainedTokenizerFast],
) -> None:
    """Frames follow their times as text; videos and images are in the order of their marks."""
    vlm, tok = model
    ask = [("user", "<image> or <image>?", 1.0)]
    film = "".join(f"{time_s} <image><image>" for time_s in ("0.0", "0.5", "12.3"))
    answers = []
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        frames = 9 * torch.randn(3, 2, VISION, generator=g)
        image = 9 * torch.randn(TOKENS, VISION, generator=g)
        given: list[tuple[str, Tensor | Video, Tensor]] = [
            (film, Video(times_s=(0.0, 0.5, 12.34), features=frames), frames.flatten(0, 1)),
            ("<image>" * TOKENS, image, image),
        ]
        texts, media, features = zip(*(given if seed % 2 else given[::-1]), strict=True)
        text = f"<|im_start|>user\n{' or '.join(texts)}?<|im_end|>\n<|im_start|>assistant\n"
        ids = tok(text, add_special_tokens=False)["input_ids"]
        wanted = full_forward(vlm, tok, ids, torch.cat(features), 12)
        assert answer(vlm, tok, [(ask, media)], max_new_tokens=12) == [wanted]
        assert answer(vlm, tok, [*prompts(3), (ask, media)], max_new_tokens=12)[3] == wanted
        answers.append(wanted)
    assert len(set(answers)) > 2, "the answers depend on the features"


def test_stored_features_are_answered_about_in_bfloat16(
    model: tuple[VLM, PreTrainedTokenizerFast],
) -> None:
    """Stored features are float16, and a run trained in bfloat16 is evaluated in it."""
    vlm, tok = model
    image = torch.randn(TOKENS, VISION).half()
    film = Video(times_s=(0.0, 0.5), features=torch.randn(2, 2, VISION).half())
    asked: list[Prompt] = [
        ([("user", "<image>what?", 1.0)], [image]),
        ([("user", "<image> and <video>?", 1.0)], [image, film]),
    ]
    with torch.autocast("cpu", torch.bfloat16):
        assert len(answer(vlm, tok, asked, max_new_tokens=3)) == 2


def test_batches_of_long_prompts_are_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [10, 10, 20, 30, 90, 200]
    monkeypatch.setattr(inference, "MAX_PADDED_TOKENS", 60)
    batches = list(inference._batches(range(6), lengths, 8))
    assert batches == [[0, 1, 2], [3], [4], [5]]
    assert list(inference._batches(range(6), [1] * 6, 4)) == [[0, 1, 2, 3], [4, 5]]


def test_greedy_answers_equal_the_full_forward(model: tuple[VLM, PreTrainedTokenizerFast]) -> None:
    vlm, tok = model
    given = prompts(6)
    expanded = [expand_prompt(tok, prompt) for prompt in given]
    wanted = [full_forward(vlm, tok, ids.tolist(), rows, 12) for ids, _, rows in expanded]
    assert len(set(wanted)) > 3, "the answers differ"
    assert [answer(vlm, tok, [p], max_new_tokens=12)[0] for p in given] == wanted
    assert answer(vlm, tok, given, max_new_tokens=12) == wanted
    assert answer(vlm, tok, given, max_new_tokens=12, batch_size=4) == wanted


def favoured(vlm: VLM, ids: list[int]) -> RemovableHandle:
    """Give these ids the largest logits, until the returned hook is removed."""
    return vlm.language.lm_head.register_forward_hook(
        lambda _m, _i, out: out.index_fill(-1, torch.tensor(ids), 1e4)
    )


def test_an_answer_ends_at_the_end_token(model: tuple[VLM, PreTrainedTokenizerFast]) -> None:
    """A model that always predicts the end token gives empty answers."""
    vlm, tok = model
    end, pad, word = token_id(tok, "<|im_end|>"), tok.pad_token_id, 97
    assert decode(tok, [word, end, word, word]) == "a"
    assert decode(tok, [word, pad, word]) == "a"
    assert decode(tok, [end]) == ""
    assert decode(tok, [word, token_id(tok, "<|im_start|>"), word]) == "aa"
    with favoured(vlm, [end]):
        assert answer(vlm, tok, prompts(3), max_new_tokens=5) == ["", "", ""]


def test_images_and_unused_rows_are_never_generated(
    model: tuple[VLM, PreTrainedTokenizerFast],
) -> None:
    """The embedding has more rows than the tokenizer has ids. Those rows are never chosen, however likely."""
    vlm, tok = model
    rows = vlm.language.lm_head.weight.shape[0]
    assert rows > len(tok)
    wanted = answer(vlm, tok, prompts(2), max_new_tokens=6)
    with favoured(vlm, [token_id(tok, "<image>"), len(tok), rows - 1]):
        assert answer(vlm, tok, prompts(2), max_new_tokens=6) == wanted


def test_sampling_depends_on_its_seed_only(model: tuple[VLM, PreTrainedTokenizerFast]) -> None:
    vlm, tok = model
    torch.manual_seed(9)
    state = torch.get_rng_state()
    runs = [
        answer(vlm, tok, prompts(3), max_new_tokens=12, temperature=1.0, seed=s) for s in (1, 1, 2)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert runs[0] == runs[1] != runs[2]
    cold = answer(vlm, tok, prompts(3), max_new_tokens=12, temperature=1e-4, seed=5)
    assert cold == answer(vlm, tok, prompts(3), max_new_tokens=12)


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_mode_and_attention_are_restored(
    model: tuple[VLM, PreTrainedTokenizerFast],
    training: bool,
    fails: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vlm, tok = model
    vlm.train(training)
    vlm.gradient_checkpointing(training)
    modes = {name: m.training for name, m in vlm.named_modules()}
    before = [p.clone() for p in vlm.parameters()]
    if fails:
        monkeypatch.setattr(vlm.language, "generate", None)
    with pytest.raises(TypeError) if fails else contextlib.nullcontext():
        answer(vlm, tok, prompts(2), max_new_tokens=3)
    assert {name: m.training for name, m in vlm.named_modules()} == modes
    assert vlm.language.config._attn_implementation == "nano_packed"
    assert all(torch.equal(a, b) for a, b in zip(before, vlm.parameters(), strict=True))
    vlm.gradient_checkpointing(False)
    vlm.eval()


def test_no_prompts_give_no_answers(model: tuple[VLM, PreTrainedTokenizerFast]) -> None:
    assert answer(*model, [], max_new_tokens=3) == []


def test_prompts_of_similar_length_share_a_batch(
    model: tuple[VLM, PreTrainedTokenizerFast], monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm, tok = model
    lengths: list[list[int]] = []
    padded = inference._left_padded

    def spy(rows: list[tuple[Tensor, Tensor, Tensor | None]], *rest: object) -> object:
        lengths.append([len(ids) for ids, _, _ in rows])
        return padded(rows, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(inference, "_left_padded", spy)
    answer(vlm, tok, prompts(7), max_new_tokens=1, batch_size=3)
    flat = [n for part in lengths for n in part]
    assert flat == sorted(flat)
    assert [len(part) for part in lengths] == [3, 3, 1]
