"""The frozen encoder: features equal those of transformers, wrong weights are refused, the spec is complete.

encoder = load_encoder(encoder_config("demo"), device="cpu")
features = encoder.encode(np.stack([encoder.prepare(image)]))     # (1, M, V) float32
encoder.spec("int8").fingerprint                                  # names everything they depend on
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from configs import UserError
from model.vision.config import DemoTowerConfig, EncoderConfig, encoder_config
from model.vision.encoder import VisionEncoder, load_encoder, rebuild_encoder
from tests.support import tiny_clip
from tests.support.tiny_clip import noise

pytestmark = pytest.mark.slow


def normalised(pixels: np.ndarray, encoder: VisionEncoder) -> torch.Tensor:
    spec = encoder.spec("fp16")
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    return (x - torch.tensor(spec.mean).view(3, 1, 1)) / torch.tensor(spec.std).view(3, 1, 1)


def demo(**overrides: object) -> VisionEncoder:
    return load_encoder(encoder_config("demo", **overrides), device="cpu")


def tiny(**overrides: object) -> VisionEncoder:
    return load_encoder(tiny_clip.entry(**overrides), device="cpu", random_weights=True)


def test_float32_features_are_not_computed_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default cuDNN computes convolutions of float32 in TF32: 3 digits."""
    encoder = demo(compute_dtype="float32")
    seen = []
    forward = encoder._tower.forward

    def spy(x: torch.Tensor) -> list[torch.Tensor]:
        seen.append((torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32))
        return forward(x)

    monkeypatch.setattr(encoder._tower, "forward", spy)
    before = torch.backends.cudnn.allow_tf32
    encoder.encode(noise(1, encoder.tower.image_size))
    assert seen == [(True, False)]
    assert torch.backends.cudnn.allow_tf32 == before


# ---- equal to other implementations --------------------------------------------------------------


def hidden_states(model: CLIPVisionModel, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        states: tuple[torch.Tensor, ...] = model(x, output_hidden_states=True).hidden_states
    return states


@pytest.mark.parametrize("blocks", [(2,), (3,), (0, 1), (2, 0), (3, 1, 2)])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_tiny_clip_equals_transformers(
    activation: str, blocks: tuple[int, ...], tmp_path: Path
) -> None:
    """Block i is `hidden_states[i + 1]` without CLS; several are concatenated in the configured order."""
    theirs = tiny_clip.hugging_face(activation=activation)
    theirs.save_pretrained(tmp_path)
    model = "tiny-quickgelu" if activation == "quick_gelu" else "tiny"
    config = tiny_clip.entry(model=model, activation=activation, blocks=blocks)
    ours = load_encoder(config, device="cpu", weights=str(tmp_path))
    pixels = noise(4, tiny_clip.SIDE)
    states = hidden_states(theirs, normalised(pixels, ours))
    expected = torch.cat([states[block + 1][:, 1:] for block in blocks], dim=-1)
    features = ours.encode(pixels)
    assert features.dtype == torch.float32 and features.shape == expected.shape
    assert torch.allclose(features, expected, atol=1e-5, rtol=1e-5)
    assert states[-2].std() > 0.5  # large enough that not everything agrees


def test_full_size_clip_equals_transformers(tmp_path: Path) -> None:
    """CLIP ViT-L/14@336, block 22 = hidden_states[-2]; it has the published sizes."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    theirs = tiny_clip.hugging_face(**sizes, num_attention_heads=16, image_size=336, patch_size=14)
    save_file(dict(theirs.state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(theirs.config.to_json_string())
    config = encoder_config("clip-vit-l14-336", batch_size=1, compute_dtype="float32")
    ours = load_encoder(config, device="cpu", weights=str(tmp_path))
    assert 303.5e6 <= ours.parameters <= 304.3e6
    without_projection, block, last_norm = 303_507_456, 12_596_224, 2_048
    assert ours.parameters_used == without_projection - block - last_norm
    assert ours.spec("int8").row_bytes("image") == 576 * 1024 + 2 * 576 * 16 + 2 * 1024
    pixels = noise(1, 336)
    expected = hidden_states(theirs, normalised(pixels, ours))[-2][:, 1:]
    features = ours.encode(pixels)
    assert features.shape == (1, 576, 1024)
    assert (features - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_timm_tower_equals_transformers_siglip() -> None:
    """SigLIP2 has no CLS token and an exact GELU; blocks are in the order asked for."""
    entry = {"model": "ViT-B-16-SigLIP2", "pretrained": "webli", "activation": "gelu"}
    ours = tiny(**entry, blocks=(3, 1), mean=None, std=None)
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 12, "image_size": 224, "patch_size": 16}
    config = SiglipVisionConfig(**sizes, hidden_act="gelu", vision_use_head=False)
    theirs = SiglipVisionModel(config).eval()
    state = theirs.state_dict()
    prefix = "vision_model." if any(k.startswith("vision_model.") for k in state) else ""
    theirs.load_state_dict(
        {f"{prefix}{k}": v for k, v in in_siglip_names(ours._tower.tensors()).items()}, strict=False
    )
    pixels = noise(2, 224)
    with torch.no_grad():
        states = theirs(normalised(pixels, ours), output_hidden_states=True).hidden_states
    expected = torch.cat([states[4], states[2]], dim=-1)
    features = ours.encode(pixels)
    assert features.shape == (2, 196, 1536)
    assert (features - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert ours.spec("fp16").mean == (0.5, 0.5, 0.5)


def in_siglip_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {
        "embeddings.patch_embedding.weight": tensors["patch_embed.proj.weight"],
        "embeddings.patch_embedding.bias": tensors["patch_embed.proj.bias"],
        "embeddings.position_embedding.weight": tensors["pos_embed"][0],
    }
    parts = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj"}
    parts |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for index in range(4):
        for kind in ("weight", "bias"):
            for here, there in parts.items():
                name = f"encoder.layers.{index}.{there}.{kind}"
                renamed[name] = tensors[f"blocks.{index}.{here}.{kind}"]
            thirds = tensors[f"blocks.{index}.attn.qkv.{kind}"].chunk(3)
            for part, third in zip("qkv", thirds, strict=True):
                renamed[f"encoder.layers.{index}.self_attn.{part}_proj.{kind}"] = third
    return renamed


def test_a_tower_with_computed_positions_runs() -> None:
    """timm's rotary tables are in no weights file, and on the meta device they would have no values."""
    entry = {"model": "PE-Core-T-16-384", "pretrained": "meta", "activation": "gelu"}
    entry |= {"blocks": (1,), "mean": None, "std": None}
    features = tiny(**entry).encode(noise(2, 384))
    assert features.shape == (2, 576, 192) and torch.isfinite(features).all()
    assert torch.equal(tiny(**entry).encode(noise(2, 384)), features)


def test_demo_tower_is_a_plain_pre_norm_transformer() -> None:
    sizes = DemoTowerConfig(image_size=16, patch_size=8, width=8, depth=2, heads=2, mlp_ratio=2)
    config = EncoderConfig(
        name="demo",
        library="demo",
        activation="gelu",
        blocks=(1,),
        pool_frame=1,
        compute_dtype="float32",  # by default bf16 on CPUs that have it
        tower=sizes,
    )
    encoder = load_encoder(config, device="cpu")
    pixels = noise(3, 16)
    weight = dict(encoder._tower.named_parameters())
    patches = normalised(pixels, encoder).unfold(2, 8, 8).unfold(3, 8, 8)  # (3, 3, 2, 2, 8, 8)
    x = patches.permute(0, 2, 3, 1, 4, 5).reshape(3, 4, 192) @ weight["patches.weight"].flatten(1).T
    x = x + weight["positions"]
    for index in range(2):
        w = {n.split(".")[2]: p for n, p in weight.items() if n.startswith(f"blocks.{index}.")}
        y = F.layer_norm(x, (8,))
        both, v = y @ w["queries_keys"].T, y @ w["values"].T
        heads = []
        for head in range(2):
            at = slice(4 * head, 4 * head + 4)
            q, k = both[..., :8][..., at], both[..., 8:][..., at]
            heads.append(torch.softmax(q @ k.transpose(1, 2) / 2, dim=-1) @ v[..., at])
        x = x + torch.cat(heads, dim=-1) @ w["attended"].T
        x = x + F.gelu(F.layer_norm(x, (8,)) @ w["expand"].T) @ w["contract"].T
    assert torch.allclose(encoder.encode(pixels), x, atol=1e-5)


# ---- properties of encode ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tower", ["tiny", "demo"])
def test_a_row_does_not_depend_on_the_batch(tower: str, dtype: str) -> None:
    """Its bits do not depend on its place in the batch, on the other images, or on their number."""
    encoder = (demo if tower == "demo" else tiny)(batch_size=4, compute_dtype=dtype)
    pixels = noise(7, encoder.spec("fp16").image_size)
    features = encoder.encode(pixels)
    order = np.random.default_rng(1).permutation(7)
    assert torch.equal(encoder.encode(pixels[order]), features[torch.from_numpy(order)])
    one_by_one = torch.cat([encoder.encode(pixels[i : i + 1]) for i in range(7)])
    assert torch.equal(one_by_one, features)
    assert features.std() > 0.1


def test_pooling_is_the_mean_of_neighbouring_patches() -> None:
    single = tiny()
    double = tiny(pool_image=2)
    pixels = noise(2, tiny_clip.SIDE)
    # Pooling acts on values as stored.
    grid = single.encode(pixels).half().float().view(2, 4, 4, 64)
    corner = grid[:, :2, 2:].mean((1, 2))  # upper right window of 2 x 2
    for pooled in (double.encode(pixels), single.encode(pixels, "frame")):
        assert pooled.shape == (2, 4, 64)
        assert torch.allclose(pooled[:, 1], corner, atol=1e-6)


def test_no_images_give_no_rows_and_wrong_pixels_are_refused() -> None:
    encoder = demo()
    spec = encoder.spec("fp16")
    side = spec.image_size
    empty = encoder.encode(np.empty((0, side, side, 3), np.uint8))
    assert empty.shape == (0, spec.tokens("image"), spec.width)
    for wrong in (noise(1, side + 1), noise(1, side).astype(np.float32)):
        with pytest.raises(ValueError, match="expected"):
            encoder.encode(wrong)


def test_prepare_returns_the_input_of_encode() -> None:
    encoder = demo(fit="pad")
    side = encoder.spec("fp16").image_size
    wide = Image.new("RGB", (2 * side, side), (255, 0, 0))
    pixels = encoder.prepare(wide)
    assert pixels.shape == (side, side, 3) and pixels.dtype == np.uint8
    assert tuple(pixels[0, 0]) == (242, 242, 242)  # int(255 * .95), the demo tower's mean colour
    assert torch.isfinite(encoder.encode(pixels[None])).all()


def test_features_have_no_gradient_and_can_be_trained_on() -> None:
    encoder = demo()
    features = encoder.encode(noise(1, encoder.spec("fp16").image_size))
    assert not features.requires_grad
    probe = torch.nn.Linear(features.shape[-1], 1)
    probe(features).sum().backward()  # an inference-mode tensor would raise
    assert probe.weight.grad is not None


# ---- spec: each change makes another space -------------------------------------------------------


def test_each_relevant_change_changes_the_fingerprint() -> None:
    def spec_of(codec: str = "fp16", **overrides: object) -> str:
        return tiny(**overrides).spec(codec).fingerprint

    changes: list[dict[str, object]] = [
        {},
        {"seed": 1},
        {"blocks": (1,)},
        {"blocks": (2, 1)},
        {"blocks": (1, 2)},
        {"fit": "pad"},
        {"fit": "crop"},
        {"fit": "crop", "shorter_side": 40},
        {"decode": "reduced"},
        {"codec": "int8"},
        {"pool_image": 2},
        {"pool_frame": 4},
        {"batch_size": 4},
        {"compute_dtype": "bfloat16"},
        {"mean": (0.5, 0.5, 0.5)},
        {"std": (0.5, 0.5, 0.5)},
        {"model": "tiny", "activation": "gelu"},
    ]
    fingerprints = [spec_of(**change) for change in changes]
    assert len(set(fingerprints)) == len(changes)
    assert spec_of() == fingerprints[0] == spec_of(name="other")


def test_names_of_random_towers_say_so() -> None:
    encoder = tiny()
    assert encoder.spec("int8").name.startswith("random-tiny-clip-int8-")
    assert demo().spec("fp16").encoder == "random-demo"


def test_demo_features_of_a_block_do_not_depend_on_the_other_blocks() -> None:
    depth = encoder_config("demo").tower.depth
    last, both = demo(blocks=(depth - 1,)), demo(blocks=(depth - 1, 0))
    pixels = noise(2, last.spec("fp16").image_size)
    assert torch.equal(both.encode(pixels)[..., : last.spec("fp16").width], last.encode(pixels))
    assert demo(blocks=(0,)).parameters == last.parameters >= demo(blocks=(0,)).parameters_used


# ---- rebuilding ----------------------------------------------------------------------------------


def test_an_encoder_is_rebuilt_from_the_record_of_its_space(tmp_path: Path) -> None:
    save_file(tiny_clip.open_clip_checkpoint(), tmp_path / "a.safetensors")
    encoder = load_encoder(tiny_clip.entry(), device="cpu", weights=str(tmp_path / "a.safetensors"))
    random = tiny(seed=4)
    for made in (encoder, random, demo()):
        recorded = json.loads(json.dumps(made.load_info()))
        again = rebuild_encoder(recorded, made.spec("int8"), device="cpu")
        pixels = noise(2, made.spec("fp16").image_size)
        assert torch.equal(again.encode(pixels), made.encode(pixels))
        assert again.spec("int8") == made.spec("int8")


def test_rebuilding_with_other_weights_is_refused(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        save_file(tiny_clip.open_clip_checkpoint(seed), tmp_path / f"{name}.safetensors")
    first = tmp_path / "a.safetensors"
    encoder = load_encoder(tiny_clip.entry(), device="cpu", weights=str(first))
    spec, recorded = encoder.spec("int8"), encoder.load_info()
    with pytest.raises(UserError, match=r"b\.safetensors holds .*--weights PATH"):
        rebuild_encoder(recorded, spec, device="cpu", weights=str(tmp_path / "b.safetensors"))
    first.rename(tmp_path / "moved.safetensors")
    with pytest.raises(UserError, match="--weights PATH"):
        rebuild_encoder(recorded, spec, device="cpu")
    moved = str(tmp_path / "moved.safetensors")
    assert rebuild_encoder(recorded, spec, device="cpu", weights=moved).spec("int8") == spec


def test_rebuilding_names_differences_and_allows_another_precision(
    caplog: pytest.LogCaptureFixture,
) -> None:
    encoder = demo()
    spec, recorded = encoder.spec("int8"), encoder.load_info()
    other = dataclasses.replace(spec, fit="crop")
    with pytest.raises(UserError, match="fit crop there, squash here"):
        rebuild_encoder(recorded, other, device="cpu")
    with pytest.raises(UserError, match="does not record how"):
        rebuild_encoder({}, spec, device="cpu")
    on_gpu = dataclasses.replace(spec, compute_dtype="float16")
    assert rebuild_encoder(recorded, on_gpu, device="cpu").dtype != torch.float16
    assert "was made in float16" in caplog.text


def test_open_clip_is_not_imported_for_the_demo_tower() -> None:
    """Importing it takes seconds in every worker."""
    code = (
        "import sys; from model.vision.config import encoder_config;"
        "from model.vision.encoder import load_encoder;"
        "load_encoder(encoder_config('demo'), device='cpu');"
        "sys.exit('open_clip' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
