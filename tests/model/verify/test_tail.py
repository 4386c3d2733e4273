"""The memory of a tail, as `model.verify` estimates it, is that of running blocks; the command counts it.

python -m model.verify --encoder demo-clip --llm random:qwen3-demo --train-vision-blocks 3
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

from cache.format.spec import FeatureSpec
from cache.format.tail import Tail
from configs import UserError
from model.language.model import LanguagePreset, load_language
from model.tail import StoredRows, VisionTail
from model.verify import __main__ as verify
from model.verify.memory import Sizes, Step, sizes_of, state_bytes, step_bytes
from model.verify.tail import block_bytes, tail_sizes
from model.vision.config import encoder_config
from model.vision.encoder import load_encoder
from model.vision.tail_blocks import make_tail, spec_with_tail
from tests.benchmarks.real_size import OFF, Case, allocated_peak, train_steps
from tests.support.spaces import SPEC

pytestmark = pytest.mark.slow


def spec(width: int, hidden: int, grid: int, pool_frame: int, **changes: Any) -> FeatureSpec:
    """Return the spec of rows with CLS, and of three blocks behind them."""
    tail = Tail(
        first=1,
        blocks=(3,),
        heads=4,
        hidden=hidden,
        eps=1e-5,
        pool_image=1,
        pool_frame=pool_frame,
        sha256="0" * 64,
    )
    sides = {"image_size": 2 * grid, "patch_size": 2, "pool_image": 1, "pool_frame": 1}
    return dataclasses.replace(
        SPEC, width=width, codec="fp16", keep_cls=True, tail=tail, **sides, **changes
    )


# ---- activations


def held_bytes(tail: VisionTail, trained: int, autocast: bool) -> int:
    """Return the bytes that autograd holds after a forward pass of 3 rows, each storage once."""
    tail.freeze(trained)
    weights = {p.untyped_storage().data_ptr() for p in tail.parameters()}
    shapes = {shape for p in tail.parameters() for shape in (p.shape, p.shape[::-1])}
    held: dict[int, Any] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        # Copies of weights in bfloat16 are estimated apart.
        if storage.data_ptr() not in weights and x.shape not in shapes:
            held[storage.data_ptr()] = storage
        return x

    rows = torch.randn(3, tail.spec.tokens("image"), tail.spec.width)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        seen = tail({"image": rows})
    assert seen.requires_grad
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("autocast", [True, False])
def test_activations_equal_the_formula(autocast: bool, activation: str) -> None:
    """Two more blocks that train hold exactly twice `block_bytes` more for each stored token."""
    tail = VisionTail(spec(64, 80, grid=4, pool_frame=2, activation=activation))
    one, three = (held_bytes(tail, trained, autocast) for trained in (1, 3))
    wanted = block_bytes(tail_sizes(tail.spec, 3), autocast)
    assert (three - one) / 2 / (3 * 17) == wanted


# ---- peaks

LLM = LanguagePreset(
    hidden_size=96, layers=2, heads=4, kv_heads=2, head_dim=24, intermediate_size=192
)
CASES: dict[str, tuple[Case, str, int]] = {
    "frozen": (Case(llm=LLM, tokens=256), "image", 0),
    "one block": (Case(llm=LLM, tokens=256), "image", 1),
    "three blocks": (Case(llm=LLM, tokens=1024), "image", 3),
    "frames": (Case(llm=LLM, tokens=256), "frame", 3),
    "frames, one micro-batch": (Case(llm=LLM, tokens=256, micro_batches=1), "frame", 2),
    "frames, recomputed": (Case(llm=LLM, tokens=256, checkpointing=True), "frame", 3),
    "frames, frozen language model": (Case(llm=LLM, tokens=256, train_llm=False), "frame", 3),
    "adapters": (Case(llm=LLM, tokens=512, lora=8), "image", 3),
}
"""What trains, of which array the rows are, and how many of the blocks train."""


@pytest.mark.parametrize(("case", "array", "trained"), CASES.values(), ids=CASES)
def test_the_estimate_is_within_15_percent_of_the_peak(
    case: Case, array: str, trained: int
) -> None:
    """All tensors of two steps, with 65 stored tokens a row, of which 64 (images) or 4 (frames) are seen."""
    if case.lora:
        pytest.importorskip("peft")
    case = dataclasses.replace(case, supervised=1.0, llm=dataclasses.replace(LLM, vocab_rows=1024))
    where = spec(128, 512, grid=8, pool_frame=4)
    rows = case.tokens // 2 // where.seen.tokens(array)
    found: list[Sizes] = []

    def work() -> None:
        vlm, sizes = case.build(where.seen.width)
        vlm.tail = VisionTail(where)
        vlm.tail.checkpointing = case.checkpointing
        vlm.tail.freeze(trained)
        found.append(dataclasses.replace(sizes, tail=tail_sizes(where, trained, array)))
        stored = torch.randn(rows, where.tokens(array), where.width).half()
        order = torch.arange(case.tokens // 2)
        train_steps(case, vlm, features=StoredRows(rows={array: stored}, order=order))

    measured = allocated_peak(work)
    parts = step_bytes(found[0], dataclasses.replace(case.step(), rows=rows))
    estimated = parts["total"] - parts["process"]
    assert estimated == pytest.approx(measured, rel=OFF), (estimated / measured, parts)


# ---- what counts


def qwen3(trained: int, array: str = "image") -> Sizes:
    """Return the sizes of Qwen3-0.6B behind the last blocks of ViT-L/14@336."""
    model = load_language("random:qwen3-0.6b", device="meta")[0]
    tail = Tail(first=20, blocks=(22,), heads=16, hidden=4096, eps=1e-5, pool_image=1, pool_frame=3)
    clip = dataclasses.replace(
        *(SPEC,),
        blocks=(19,),
        image_size=336,
        patch_size=14,
        width=1024,
        codec="int8",
        keep_cls=True,
        pool_frame=1,
        activation="quick_gelu",
        tail=tail,
    )
    sizes = sizes_of(model.config, sum(p.numel() for p in model.parameters()), 1_049_600)
    return dataclasses.replace(sizes, tail=tail_sizes(clip, trained, array))


def test_weights_gradients_and_moments_of_the_blocks_count() -> None:
    step = Step(tokens=4096, checkpointing=True, gpu=True)
    a_block = 12_596_224  # of ViT-L, as published
    plain, frozen, trained = (
        state_bytes(sizes, step)
        for sizes in (dataclasses.replace(qwen3(0), tail=None), qwen3(0), qwen3(2))
    )
    assert frozen["weights"] - plain["weights"] == trained["weights"] - plain["weights"]
    assert frozen["weights"] - plain["weights"] == 4 * 3 * a_block
    assert frozen["gradients"] == plain["gradients"]
    assert trained["gradients"] - plain["gradients"] == 4 * 2 * a_block
    assert trained["AdamW"] - plain["AdamW"] == 8 * 2 * a_block


def test_frames_need_more_than_images_and_recomputing_less() -> None:
    step = Step(tokens=8192, checkpointing=False, gpu=True)
    images, frames = (step_bytes(qwen3(3, array), step)["total"] for array in ("image", "frame"))
    # 577 stored tokens are computed for 576 of an image, or for 64 of a frame: 9 times as many.
    assert frames - images > 5 * (images - step_bytes(qwen3(0), step)["total"])
    again = dataclasses.replace(step, checkpointing=True)
    less = [step_bytes(qwen3(3, "frame"), one)["activations"] for one in (again, step)]
    assert less[0] < 0.2 * less[1]


# ---- the command

SMALL = ["--encoder", "demo-clip", "--llm", "random:qwen3-tiny", "--device", "cpu"]


def test_the_spec_is_that_of_the_space(capsys: pytest.CaptureFixture[str]) -> None:
    """As `encode.run --block 2 --tail` makes it, without reading weights again."""
    eyes = load_encoder(encoder_config("demo-clip"), device="cpu")
    found = spec_with_tail(eyes, "int8", 3)
    entry = encoder_config("demo-clip").with_tail(2)
    space = load_encoder(entry, device="cpu").spec("int8")
    made, _ = make_tail(entry, space)
    assert found.tail == dataclasses.replace(made, sha256="")
    assert found.seen.width == eyes.spec("int8").width
    assert dataclasses.replace(found, tail=None, weights="") == dataclasses.replace(
        space, weights=""
    )


def test_the_report_counts_the_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for more in ([], ["--train-vision-blocks", "3"]):
        assert verify.main([*SMALL, *more]) == 0
        said.append(capsys.readouterr().out)
    lines = [line for line in said[1].splitlines() if line.startswith(("tail:", "GiB in stages"))]
    a_block = 128 * (4 * 128 + 2 * 512 + 9) + 512
    assert lines[0] == (
        f"tail: 3 of 3 blocks train (--train-vision-blocks 3), {3 * a_block:,} of {3 * a_block:,} "
        "parameters; all estimates include them"
    )
    assert re.search(r"full of images, each 37 tokens as stored and 9 behind the tail: ", lines[1])
    assert re.search(r"full of video frames, each 37 tokens as stored and 9 behind", lines[2])
    assert len(lines) == 3 and "GiB in stages" not in said[0]
    rows = [
        [line.split() for line in text.splitlines() if line.startswith("stage 3 ")] for text in said
    ]
    # stage 3 hardware tokens how weights gradients AdamW bf16 gathered activations ...
    assert rows[0] != rows[1]
    disk = [re.search(r"100 GB hold ([\d,]+) images", text) for text in said]
    images = [int(found[1].replace(",", "")) for found in disk if found]
    assert 3.5 < images[0] / images[1] < 4.5, "37 tokens instead of 9"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*SMALL, "--train-vision-blocks", "6"], "give --train-vision-blocks 5"),
        ([*SMALL, "--train-vision-blocks", "-1"], "train_vision_blocks -1 is below 0"),
        (["--encoder", "demo", *SMALL[2:], "--train-vision-blocks", "1"], "a small CLIP is"),
    ],
)
def test_blocks_that_cannot_train_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        verify.main(words)
    assert "\n" not in str(caught.value)
