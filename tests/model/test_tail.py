"""The blocks behind a stored one compute what the encoder computes, and learn where they are told to.

tail = load_tail(spec, read_tail(paths.tail, root, spec.tail, spec.width))
tokens = tail({"image": rows})
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import Block
from torch import Tensor
from torch.nn import functional as F

from cache.format.spec import FeatureSpec
from cache.format.tail import TAIL, read_tail
from configs import UserError
from model.quantize import pack
from model.tail import StoredRows, VisionTail, block_tensors, load_tail
from model.vision.config import EncoderConfig, encoder_config
from model.vision.encoder import VisionEncoder, load_encoder
from model.vision.tail_blocks import make_tail
from model.vlm import VLM, build_vlm
from nanomolmo2.unpack import unpack
from tests.support import tiny_clip
from tests.support.trained_runs import one_sample

TOWERS: dict[str, dict[str, Any]] = {
    "open_clip, quick_gelu": {"blocks": (3,)},
    "open_clip, exact GELU, two blocks": {"model": "tiny", "activation": "gelu", "blocks": (3, 1)},
    "open_clip, the stored block is a feature too": {"blocks": (1, 2)},
    "siglip of timm": {"model": "tiny-siglip", "activation": "gelu", "blocks": (3,)},
    "clip of transformers": {"tower": "clip", "blocks": (3,)},
    "siglip of transformers": {"tower": "siglip", "blocks": (3, 2)},
}


@pytest.fixture(scope="module", autouse=True)
def _register(tmp_path_factory: pytest.TempPathFactory) -> None:
    tiny_clip.register(tmp_path_factory.mktemp("open_clip"))


def entry_of(folder: Path, kind: dict[str, Any]) -> tuple[EncoderConfig, str | None]:
    """The entry of a tiny tower whose weights are in a file, and that file."""
    kind = dict(kind)
    if "tower" in kind:
        tower = tiny_clip.transformers_tower(kind.pop("tower"))
        where = tiny_clip.save_tower(folder / "tower", tower)
        sizes = {"compute_dtype": "float32", "batch_size": 3, "pool_image": 1, "pool_frame": 2}
        return encoder_config(f"hf:{where}", **sizes, **kind), None
    entry = tiny_clip.entry(**kind)
    return entry, str(tiny_clip.write_weights(folder / "weights", entry.model))


def with_tail(
    folder: Path, entry: EncoderConfig, weights: str | None, block: int = 1, codec: str = "fp16"
) -> tuple[VisionEncoder, FeatureSpec, VisionTail]:
    """The encoder of a tail space, its spec, and the tail as its file has it."""
    config = entry.with_tail(block)
    eyes = load_encoder(config, device="cpu", weights=weights)
    spec = eyes.spec(codec)
    tail, data = make_tail(config, spec, weights=weights)
    spec = dataclasses.replace(spec, tail=tail)
    path = folder / TAIL
    path.write_bytes(data)
    return eyes, spec, load_tail(spec, read_tail(path, folder, tail, spec.width))


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().norm() / wanted.norm())


@pytest.mark.parametrize("kind", TOWERS.values(), ids=TOWERS)
def test_the_untrained_tail_is_the_encoder(kind: dict[str, Any], tmp_path: Path) -> None:
    entry, weights = entry_of(tmp_path, kind)
    eyes, spec, tail = with_tail(tmp_path, entry, weights)
    assert (spec.blocks, spec.pool_image, spec.pool_frame) == ((1,), 1, 1)
    assert spec.keep_cls == ("siglip" not in str(kind))
    whole = load_encoder(entry, device="cpu", weights=weights)
    pixels = tiny_clip.noise(5, eyes.spec("fp16").image_size)
    stored = eyes.encode(pixels)
    assert stored.shape == (5, 16 + spec.keep_cls, 64)
    wanted = whole.encode(pixels)
    with torch.inference_mode():
        assert relative(tail.see(stored, "image"), wanted) <= 1e-6
        # Frames are pooled behind the tail; in the encoder they are rounded to float16 before.
        frames = tail.see(stored, "frame")
        assert frames.shape == (5, 4, spec.seen.width)
        assert relative(frames, whole.encode(pixels, "frame")) <= 1e-3
        lost = {}
        for codec in ("fp16", "int8", "int4"):
            rows = unpack(pack(stored, codec).rows, codec, *stored.shape[1:], torch.float32)
            lost[codec] = relative(tail.see(rows, "image"), wanted)
    print(f"{spec.architecture}: " + ", ".join(f"{k} {v:.1e}" for k, v in lost.items()))
    assert lost["fp16"] <= 1e-3
    assert lost["fp16"] < lost["int8"] < lost["int4"] < 0.5


def test_attention_needs_cls(tmp_path: Path) -> None:
    """Without it, the blocks behind a stored one compute something else."""
    entry, weights = entry_of(tmp_path, TOWERS["open_clip, quick_gelu"])
    eyes, _, tail = with_tail(tmp_path, entry, weights)
    stored = eyes.encode(tiny_clip.noise(2, 32))
    with torch.inference_mode():
        wanted = tail.see(stored, "image")
        stored[:, 0] = 0
        assert relative(tail.see(stored, "image"), wanted) > 0.01


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[VisionEncoder, FeatureSpec, Path]:
    """demo-clip with three blocks behind a stored one, and the folder of the file."""
    folder = tmp_path_factory.mktemp("demo")
    eyes, spec, _ = with_tail(folder, encoder_config("demo-clip", compute_dtype="float32"), None, 2)
    return eyes, spec, folder


@pytest.fixture
def tail(demo: tuple[VisionEncoder, FeatureSpec, Path]) -> Iterator[VisionTail]:
    _, spec, folder = demo
    assert spec.tail is not None
    yield load_tail(spec, read_tail(folder / TAIL, folder, spec.tail, spec.width))


def rows_of(spec: FeatureSpec, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, spec.tokens("image"), spec.width, generator=generator)


def vlm_with(tail: VisionTail) -> VLM:
    vlm, _ = build_vlm(tail.spec.seen.width, "random:qwen3-tiny", "linear", seed=0)
    vlm.tail = tail
    return vlm


def test_the_demo_clip_is_seeded(demo: tuple[VisionEncoder, FeatureSpec, Path]) -> None:
    """Its names and the sha256 of its blocks are equal on every machine."""
    _, spec, _ = demo
    assert spec.encoder == "random-demo-clip"
    assert spec.tail is not None
    assert (spec.tail.first, spec.tail.blocks, spec.tail.heads) == (3, (5,), 4)
    again = encoder_config("demo-clip", compute_dtype="float32").with_tail(2)
    assert make_tail(again, dataclasses.replace(spec, tail=None))[0] == spec.tail


def test_only_the_last_blocks_learn(tail: VisionTail) -> None:
    vlm = vlm_with(tail)
    one = sum(p.numel() for p in tail.blocks["3"].parameters())
    for trained in (0, 1, 3):
        counts = vlm.freeze(True, False, trained)
        assert counts["tail"] == (trained * one, 3 * one)
        assert tail.trained == [3, 4, 5][3 - trained :]
        vlm.zero_grad(set_to_none=True)
        rows = StoredRows(rows={"image": rows_of(tail.spec, 1)}, order=torch.arange(3))
        vlm.loss(one_sample(), rows)[0].backward()
        for number, block in tail.blocks.items():
            learned = [p.grad is not None for p in block.parameters()]
            assert learned == [int(number) in tail.trained] * len(learned), number
            if int(number) in tail.trained:
                assert all(float(p.grad.abs().sum()) > 0 for p in block.parameters() if p.ndim > 1)


def test_a_batch_without_media_gives_every_part_a_gradient_of_zero(tail: VisionTail) -> None:
    vlm = vlm_with(tail)
    vlm.freeze(True, False, 2)
    alone = vlm.loss(one_sample(images=0), None)[0]
    alone.backward()
    learns = [p for p in vlm.parameters() if p.requires_grad]
    assert learns
    assert all(p.grad is not None and not p.grad.any() for p in learns)
    vlm.tail = None
    assert torch.equal(vlm.loss(one_sample(images=0), None)[0], alone)


def test_trained_blocks_learn_what_pooled_features_have_lost(tmp_path: Path) -> None:
    """On which side a square is: of one token for a whole image, 50 steps with the blocks and without."""
    entry = encoder_config("demo-clip", compute_dtype="float32", pool_image=6)
    eyes, spec, _ = with_tail(tmp_path, entry, None, 2)
    random = np.random.default_rng(0)
    pixels = np.full((24, 96, 96, 3), 255, np.uint8)
    for number, image in enumerate(pixels):
        y, x = random.integers(0, 72), random.integers(0, 24) + 48 * (number % 2)
        image[y : y + 24, x : x + 24] = random.integers(0, 80, 3)
    stored, sides = eyes.encode(pixels), torch.arange(24) % 2
    losses = {}
    for trained in (0, 3):
        assert spec.tail is not None
        tail = load_tail(spec, read_tail(tmp_path / TAIL, tmp_path, spec.tail, spec.width))
        tail.freeze(trained)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            head = torch.nn.Linear(spec.seen.width, 2)
        groups = [{"params": head.parameters(), "lr": 3e-3}]
        groups += [{"params": [p for p in tail.parameters() if p.requires_grad]}] if trained else []
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
        for _ in range(50):
            loss = F.cross_entropy(head(tail({"image": stored})), sides)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[trained] = float(loss.detach())
    print(
        f"cross-entropy after 50 steps: frozen {losses[0]:.3f}, three blocks trained {losses[3]:.3f}"
    )
    assert losses[3] < 0.5 * losses[0]


def test_chunks_and_checkpoints_change_no_value(
    tail: VisionTail, monkeypatch: pytest.MonkeyPatch
) -> None:
    tail.freeze(2)
    rows = {"image": rows_of(tail.spec, 5), "frame": rows_of(tail.spec, 4, seed=1)}
    results = []
    for chunk, checkpointing in ((1 << 14, False), (1 << 14, True), (80, False), (80, True)):
        monkeypatch.setattr("model.tail.CHUNK_TOKENS", chunk)
        tail.checkpointing = checkpointing
        tail.train().zero_grad(set_to_none=True)
        out = tail(rows)
        out.square().sum().backward()
        grads = torch.cat([p.grad.flatten() for p in tail.parameters() if p.grad is not None])
        results.append((out.detach(), grads))
    (first, gradient), *others = results
    assert first.shape == (9 * 9, tail.spec.seen.width)
    for found, grads in others:
        torch.testing.assert_close(found, first)
        torch.testing.assert_close(grads, gradient, rtol=1e-4, atol=1e-4)


def test_order_counts_the_tokens_behind_the_tail(tail: VisionTail) -> None:
    """Of all images and then of all frames, as the loader makes it."""
    rows = {"image": rows_of(tail.spec, 2), "frame": rows_of(tail.spec, 3, seed=1)}
    with torch.inference_mode():
        both = tail(rows)
        parts = [tail.see(some, array).flatten(0, 1) for array, some in rows.items()]
    torch.testing.assert_close(both, torch.cat(parts))


def test_transformers_names_hold_every_tensor(tail: VisionTail) -> None:
    named = block_tensors(tail)
    assert sum(v.numel() for v in named.values()) == sum(p.numel() for p in tail.parameters())
    assert named["encoder.layers.4.self_attn.k_proj.weight"].shape == (128, 128)
    third = tail.blocks["4"].qkv.weight[128:256]
    assert torch.equal(named["encoder.layers.4.self_attn.k_proj.weight"], third)


# ---- refused


def test_towers_of_another_kind_are_refused(tmp_path: Path) -> None:
    def refusal(make: Any) -> str:
        with pytest.raises(UserError) as caught:
            make()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "a small CLIP is --encoder demo-clip" in refusal(
        lambda: encoder_config("demo").with_tail(0)
    )
    clip = encoder_config("demo-clip")
    for block in (5, 6, -1):
        said = refusal(lambda block=block: clip.with_tail(block))
        assert "the blocks that this is computed from are 0 to 4" in said
    molmo = encoder_config("siglip2-so400m-14-378")
    assert molmo.with_tail(18).tail == (24, 18)
    assert "computed from are 0 to 18" in refusal(lambda: molmo.with_tail(19))
    tower = tiny_clip.save_tower(tmp_path, tiny_clip.transformers_tower("dinov2"))
    eyes = encoder_config(f"hf:{tower}").with_tail(1)
    said = refusal(lambda: load_encoder(eyes, device="cpu"))
    assert "is a Dinov2Model; training computes the blocks of CLIPVisionModel and Siglip" in said
    assert "encode without --block and --tail" in said


def test_blocks_that_compute_something_else_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever their tensors are called: outputs are compared before a file is written."""
    entry, weights = entry_of(tmp_path, TOWERS["siglip of timm"])

    def post_norm(self: Any, x: Tensor, **_: Any) -> Tensor:
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))

    monkeypatch.setattr(Block, "forward", post_norm)
    with pytest.raises(UserError, match=r"not those of CLIP and SigLIP.*outputs differ by"):
        with_tail(tmp_path, entry, weights)


def test_the_weights_of_the_tail_are_those_of_the_file(tmp_path: Path) -> None:
    """Weights with equal first blocks and other last ones give another sha256."""
    entry, weights = entry_of(tmp_path, TOWERS["open_clip, quick_gelu"])
    _, spec, _ = with_tail(tmp_path, entry, weights)
    state = load_file(weights)
    name = "visual.transformer.resblocks.3.mlp.c_fc.bias"
    save_file({**state, name: state[name] + 1}, weights)
    _, other, _ = with_tail(tmp_path, entry, weights)
    assert other.fingerprint == spec.fingerprint
    assert other.tail != spec.tail
