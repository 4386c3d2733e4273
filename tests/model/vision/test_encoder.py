"""The frozen encoder: features equal those of transformers, wrong weights are refused, the spec is complete.

encoder = load_encoder(encoder_config("demo"), device="cpu")
features = encoder.encode(np.stack([encoder.prepare(image)]))     # (1, M, V) float32
encoder.spec("int8").fingerprint                                  # names everything they depend on
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from configs import UserError, load
from model.io.tensors import hash_tensors, seeded_weights
from model.vision.config import DemoTowerConfig, EncoderConfig, encoder_config
from model.vision.encoder import VisionEncoder, load_encoder, rebuild_encoder
from tests.support import tiny_clip


@pytest.fixture(scope="module", autouse=True)
def _tiny_is_known(tmp_path_factory: pytest.TempPathFactory) -> None:
    tiny_clip.register(tmp_path_factory.mktemp("open_clip"))


def noise(count: int, side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def normalised(pixels: np.ndarray, encoder: VisionEncoder) -> torch.Tensor:
    spec = encoder.spec("fp16")
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    return (x - torch.tensor(spec.mean).view(3, 1, 1)) / torch.tensor(spec.std).view(3, 1, 1)


def demo(**overrides: object) -> VisionEncoder:
    return load_encoder(encoder_config("demo", **overrides), device="cpu")


# ---- equal to other implementations----------------------------------------------------------------


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


@pytest.mark.slow
def test_full_size_clip_equals_transformers(tmp_path: Path) -> None:
    """CLIP ViT-L/14@336, block 22 = hidden_states[-2]."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    theirs = tiny_clip.hugging_face(**sizes, num_attention_heads=16, image_size=336, patch_size=14)
    save_file(dict(theirs.state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(theirs.config.to_json_string())
    config = encoder_config("clip-vit-l14-336", batch_size=1, compute_dtype="float32")
    ours = load_encoder(config, device="cpu", weights=str(tmp_path))
    assert 303.5e6 <= ours.parameters <= 304.3e6
    pixels = noise(1, 336)
    expected = hidden_states(theirs, normalised(pixels, ours))[-2][:, 1:]
    features = ours.encode(pixels)
    assert features.shape == (1, 576, 1024)
    assert (features - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_timm_tower_equals_transformers_siglip() -> None:
    """SigLIP2 has no CLS token and an exact GELU; blocks are in the order asked for."""
    config = EncoderConfig(
        name="siglip2-b16",
        library="open_clip",
        model="ViT-B-16-SigLIP2",
        pretrained="webli",
        activation="gelu",
        blocks=(3, 1),
        pool_frame=2,
        batch_size=2,
        compute_dtype="float32",
    )
    ours = load_encoder(config, device="cpu", random_weights=True)
    theirs = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=4,
            num_attention_heads=12,
            image_size=224,
            patch_size=16,
            hidden_act="gelu",
            vision_use_head=False,
        )
    ).eval()
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
    config = tiny_clip.entry(
        model="PE-Core-T-16-384",
        pretrained="meta",
        activation="gelu",
        blocks=(1,),
        mean=None,
        std=None,
    )
    encoder = load_encoder(config, device="cpu", random_weights=True)
    features = encoder.encode(noise(2, 384))
    assert features.shape == (2, 576, 192) and torch.isfinite(features).all()
    assert torch.equal(
        load_encoder(config, device="cpu", random_weights=True).encode(noise(2, 384)), features
    )


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


# ---- properties of encode -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tower", ["tiny", "demo"])
def test_a_row_does_not_depend_on_the_batch(tower: str, dtype: str) -> None:
    """Its bits do not depend on its place in the batch, on the other images, or on their number."""
    if tower == "demo":
        encoder = demo(batch_size=4, compute_dtype=dtype)
    else:
        config = tiny_clip.entry(batch_size=4, compute_dtype=dtype)
        encoder = load_encoder(config, device="cpu", random_weights=True)
    pixels = noise(7, encoder.spec("fp16").image_size)
    features = encoder.encode(pixels)
    order = np.random.default_rng(1).permutation(7)
    assert torch.equal(encoder.encode(pixels[order]), features[torch.from_numpy(order)])
    one_by_one = torch.cat([encoder.encode(pixels[i : i + 1]) for i in range(7)])
    assert torch.equal(one_by_one, features)
    assert features.std() > 0.1


def test_pooling_is_the_mean_of_neighbouring_patches() -> None:
    single = load_encoder(tiny_clip.entry(), device="cpu", random_weights=True)
    double = load_encoder(tiny_clip.entry(pool_image=2), device="cpu", random_weights=True)
    pixels = noise(2, tiny_clip.SIDE)
    grid = (
        single.encode(pixels).half().float().view(2, 4, 4, 64)
    )  # pooling acts on values as stored
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


# ---- spec: each change makes another space --------------------------------------------------------


def test_each_relevant_change_changes_the_fingerprint() -> None:
    def spec_of(codec: str = "fp16", **overrides: object) -> str:
        config = tiny_clip.entry(**overrides)
        return load_encoder(config, device="cpu", random_weights=True).spec(codec).fingerprint

    changes: list[dict[str, object]] = [
        {},
        {"seed": 1},
        {"blocks": (1,)},
        {"blocks": (2, 1)},
        {"blocks": (1, 2)},
        {"fit": "pad"},
        {"fit": "crop"},
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
    encoder = load_encoder(tiny_clip.entry(), device="cpu", random_weights=True)
    assert encoder.spec("int8").name.startswith("random-tiny-clip-int8-")
    assert demo().spec("fp16").encoder == "random-demo"


def test_demo_features_of_a_block_do_not_depend_on_the_other_blocks() -> None:
    depth = encoder_config("demo").tower.depth
    last, both = demo(blocks=(depth - 1,)), demo(blocks=(depth - 1, 0))
    pixels = noise(2, last.spec("fp16").image_size)
    assert torch.equal(both.encode(pixels)[..., : last.spec("fp16").width], last.encode(pixels))
    assert demo(blocks=(0,)).parameters == last.parameters >= demo(blocks=(0,)).parameters_used


def test_random_weights_have_equal_bits_on_every_machine() -> None:
    weights = seeded_weights((3, 5), 2.0, seed=7, name="a.weight")
    assert (
        hash_tensors({"w": weights})
        == "97b73812e25f583ebfc15caeaf09fdc184b668ec0ba550b76fa48334bc76ec95"
    )
    large = seeded_weights((400, 500), 2.0, seed=7, name="b.weight")
    assert abs(large.mean()) < 0.02 and abs(large.std() - 2) < 0.02
    assert not torch.equal(large, seeded_weights((400, 500), 2.0, seed=8, name="b.weight"))


def test_the_hash_depends_on_name_dtype_shape_and_every_bit() -> None:
    x = torch.arange(6, dtype=torch.float32)
    flipped = x.clone()
    flipped.view(torch.int32)[3] ^= 1
    variants = [
        {"a": x},
        {"b": x},
        {"a": x.view(2, 3)},
        {"a": x.half()},
        {"a": flipped},
        {"a": x, "b": x},
    ]
    assert len({hash_tensors(v) for v in variants}) == len(variants)
    assert hash_tensors({"a": x, "b": flipped}) == hash_tensors({"b": flipped, "a": x})
    assert hash_tensors({"a": x.view(2, 3).T}) == hash_tensors({"a": x.view(2, 3).T.contiguous()})


# ---- weights from files ---------------------------------------------------------------------------


def fingerprint_from(path: Path, **overrides: object) -> str:
    config = tiny_clip.entry(**overrides)
    return load_encoder(config, device="cpu", weights=str(path)).spec("fp16").fingerprint


def test_equal_weights_have_one_hash_in_every_format(tmp_path: Path) -> None:
    checkpoint = tiny_clip.open_clip_checkpoint()
    save_file(checkpoint, tmp_path / "open_clip_model.safetensors")
    torch.save(checkpoint, tmp_path / "plain.pt")
    wrapped = {"state_dict": {f"module.{k}": v for k, v in checkpoint.items()}, "epoch": 3}
    torch.save(wrapped, tmp_path / "training.pt")
    torch.save(wrapped, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    files = [tmp_path, *(tmp_path / f"{name}.pt" for name in ("plain", "training", "old"))]
    assert len({fingerprint_from(path) for path in files}) == 1


def test_both_kinds_of_hugging_face_folders_are_supported(tmp_path: Path) -> None:
    theirs = tiny_clip.hugging_face()
    theirs.save_pretrained(tmp_path / "vision")
    state = {
        f"vision_model.{k.removeprefix('vision_model.')}": v for k, v in theirs.state_dict().items()
    }
    state["text_model.encoder.layers.9.layer_norm1.weight"] = torch.ones(3)
    (tmp_path / "whole").mkdir()
    save_file(state, tmp_path / "whole" / "model.safetensors")
    whole = {"vision_config": {"hidden_act": "quick_gelu"}}
    (tmp_path / "whole" / "config.json").write_text(json.dumps(whole))
    assert fingerprint_from(tmp_path / "vision") == fingerprint_from(tmp_path / "whole")


def test_only_tensors_the_features_depend_on_are_hashed(tmp_path: Path) -> None:
    checkpoint = tiny_clip.open_clip_checkpoint()
    save_file(checkpoint, tmp_path / "a.safetensors")
    first = fingerprint_from(tmp_path / "a.safetensors")
    unused = (
        "visual.transformer.resblocks.3.",
        "visual.ln_post.",
        "visual.proj",
        "transformer.",
        "token",
    )
    for name, tensor in checkpoint.items():
        changed = {k: v.clone() for k, v in checkpoint.items()}
        changed[name].view(-1)[-1] += 1
        save_file(changed, tmp_path / "b.safetensors")
        is_unused = name.startswith(unused) or not name.startswith("visual.")
        assert (fingerprint_from(tmp_path / "b.safetensors") == first) == is_unused, name
        assert tensor.numel()


def refusal(config: EncoderConfig, weights: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_encoder(config, device="cpu", weights=str(weights) if weights else None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_entry_that_contradicts_the_built_model_is_refused() -> None:
    message = refusal(tiny_clip.entry(activation="gelu"))
    assert "activation gelu" in message and "quick_gelu" in message and "tiny-clip" in message


@pytest.mark.parametrize("model", ["ViT-B-32", "ViT-L-14", "ViT-L-14-336"])
def test_openai_tags_need_a_quickgelu_model(model: str) -> None:
    """open_clip itself only warns, and the features would be wrong."""
    message = refusal(tiny_clip.entry(model=model, activation="gelu", pretrained="openai"))
    assert "were trained with quick_gelu" in message and f"model: {model}-quickgelu" in message


def test_local_weights_of_another_activation_are_refused(tmp_path: Path) -> None:
    """Known from a config beside them (two formats), from OpenAI's tensors, or from all published weights."""
    checkpoint = tiny_clip.open_clip_checkpoint()
    exact = tiny_clip.entry(model="tiny", activation="gelu")
    marks = {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save({**checkpoint, **marks}, tmp_path / "ViT.pt")
    message = refusal(exact, tmp_path / "ViT.pt")
    assert "OpenAI" in message and "model: tiny-quickgelu and activation: quick_gelu" in message
    assert fingerprint_from(tmp_path / "ViT.pt")

    tiny_clip.hugging_face().save_pretrained(tmp_path / "hf")
    assert "according to config.json" in refusal(exact, tmp_path / "hf")

    (tmp_path / "oc").mkdir()
    save_file(checkpoint, tmp_path / "oc" / "open_clip_model.safetensors")
    note = tmp_path / "oc" / "open_clip_config.json"
    note.write_text(json.dumps({"model_cfg": {"embed_dim": 32, "vision_cfg": {}}}))
    assert "trained with gelu" in refusal(tiny_clip.entry(), tmp_path / "oc")
    note.write_text(json.dumps({"model_cfg": {"quick_gelu": True, "vision_cfg": {}}}))
    assert fingerprint_from(tmp_path / "oc")
    note.write_text("{")
    assert "not readable as JSON" in refusal(tiny_clip.entry(), tmp_path / "oc")

    save_file(checkpoint, tmp_path / "bare.safetensors")
    config = tiny_clip.entry(model="ViT-L-14-336", activation="gelu", blocks=(22,), pool_frame=3)
    assert "all published weights of ViT-L-14-336" in refusal(config, tmp_path / "bare.safetensors")


def test_a_bare_file_gets_the_activation_of_the_entry_and_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file(tiny_clip.open_clip_checkpoint(), tmp_path / "bare.safetensors")
    assert fingerprint_from(tmp_path / "bare.safetensors")
    assert "does not name its activation; using quick_gelu" in caplog.text


def test_another_activation_changes_the_features(tmp_path: Path) -> None:
    """Equal weights with another activation give other features and no error: the reason for these checks."""
    save_file(tiny_clip.open_clip_checkpoint(), tmp_path / "bare.safetensors")
    pixels = noise(2, tiny_clip.SIDE)
    quick, exact = (
        load_encoder(config, device="cpu", weights=str(tmp_path / "bare.safetensors")).encode(
            pixels
        )
        for config in (tiny_clip.entry(), tiny_clip.entry(model="tiny", activation="gelu"))
    )
    assert (quick - exact).norm() / quick.norm() > 1e-3


def test_colours_that_differ_from_the_training_are_refused(tmp_path: Path) -> None:
    save_file(tiny_clip.open_clip_checkpoint(), tmp_path / "open_clip_model.safetensors")
    model = {"quick_gelu": True, "vision_cfg": {}}
    note = {"model_cfg": model, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(note))
    assert "mean [0.5, 0.5, 0.5]" in refusal(tiny_clip.entry(), tmp_path)
    assert fingerprint_from(tmp_path, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert "give both" in refusal(tiny_clip.entry(mean=None))


def test_files_without_weights_for_this_tower_are_refused(tmp_path: Path) -> None:
    checkpoint = tiny_clip.open_clip_checkpoint()
    gone = {k: v for k, v in checkpoint.items() if k != "visual.conv1.weight"}
    wider = {**checkpoint, "visual.positional_embedding": torch.zeros(26, 64)}
    for name, state, message in (
        ("gone", gone, "tensor visual.conv1.weight is missing"),
        ("wider", wider, "(26, 64), the encoder's is (17, 64)"),
        ("other", {"weight": torch.zeros(1)}, "no tensors named visual."),
    ):
        save_file(state, tmp_path / f"{name}.safetensors")
        assert message in refusal(tiny_clip.entry(), tmp_path / f"{name}.safetensors")
    for name in ("garbage.safetensors", "garbage.pt", "empty.pt", "empty.safetensors"):
        (tmp_path / name).write_bytes(b"" if name.startswith("empty") else b"garbage" * 99)
        assert "not a readable weights file" in refusal(tiny_clip.entry(), tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    assert "holds list" in refusal(tiny_clip.entry(), tmp_path / "list.pt")
    torch.save({"model": Path("x")}, tmp_path / "objects.pt")  # unpickling it would run code
    assert "not a readable weights file" in refusal(tiny_clip.entry(), tmp_path / "objects.pt")
    assert "no such file" in refusal(tiny_clip.entry(), tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    assert "none of open_clip_model.safetensors" in refusal(tiny_clip.entry(), tmp_path / "folder")


def test_torchscript_files_are_refused_with_an_alternative(tmp_path: Path) -> None:
    """OpenAI's own downloads are programs with weights inside, which only deprecated calls can open."""
    with zipfile.ZipFile(tmp_path / "ViT-L-14-336px.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"ViT-L-14-336px/{name}", b"")
    message = refusal(tiny_clip.entry(), tmp_path / "ViT-L-14-336px.pt")
    assert "TorchScript" in message and "safetensors" in message


# ---- rebuilding -----------------------------------------------------------------------------------


def test_an_encoder_is_rebuilt_from_the_record_of_its_space(tmp_path: Path) -> None:
    save_file(tiny_clip.open_clip_checkpoint(), tmp_path / "a.safetensors")
    encoder = load_encoder(tiny_clip.entry(), device="cpu", weights=str(tmp_path / "a.safetensors"))
    random = load_encoder(tiny_clip.entry(seed=4), device="cpu", random_weights=True)
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


# ---- entries --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", load("encoders"))
def test_every_entry_builds(name: str) -> None:
    encoder = encoder_config(name)
    assert encoder.name == name
    if encoder.library == "open_clip":
        from model.vision.activation_check import check_entry
        from model.vision.clip_tower import ClipTower

        tower = ClipTower(encoder.model, encoder.blocks)  # on the meta device: no weights
        check_entry(tower, encoder)
        assert all(tensor.is_meta for tensor in tower.tensors().values())
        assert tower.image_size // tower.patch_size % encoder.pool_frame == 0
        assert tower.width % 64 == 0
    else:
        assert demo().spec("int8").tokens("frame")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"blocks": (9,)}, "has 4 blocks, 0 to 3"),
        ({"model": "tiny-quickgelo"}, "nearest: tiny-quickgelu"),
        ({"model": "RN50-quickgelu"}, "not a Vision Transformer"),
        ({"model": "hf-hub:org/name"}, "no model 'hf-hub:org/name'"),
        ({"pool_image": 3}, "does not divide"),
        ({"model": "ViT-B-32-quickgelu", "pretrained": "opneai"}, "it has: openai"),
    ],
)
def test_invalid_encoders_are_refused_before_weights_are_loaded(
    overrides: dict[str, object], message: str
) -> None:
    assert message in refusal(tiny_clip.entry(**overrides))


def test_demo_blocks_are_checked_and_codecs_fit() -> None:
    with pytest.raises(UserError, match="the demo tower has"):
        demo(blocks=(99,))
    with pytest.raises(UserError, match="multiple of 64"):
        sizes = DemoTowerConfig(image_size=16, patch_size=8, width=8, depth=1, heads=2)
        config = EncoderConfig(
            name="x", library="demo", activation="gelu", blocks=(0,), pool_frame=1, tower=sizes
        )
        load_encoder(config, device="cpu").spec("int8")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"fitt": "pad"}, "unknown key 'fitt'; nearest: fit"),
        ({"fit": "pda"}, "none of squash, pad, crop; nearest: pad"),
        ({"blocks": [-2]}, "count from 0"),
        ({"blocks": []}, "at least one"),
        ({"blocks": [1, 1]}, "each block once"),
        ({"batch_size": 0}, "at least 1"),
        ({"library": "timm"}, "none of open_clip, demo"),
        ({"activation": "quick_gelu"}, "the demo tower computes gelu"),
        ({"library": "open_clip", "model": "x"}, "needs a tower"),
    ],
)
def test_invalid_values_in_an_entry_are_refused(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        encoder_config("demo", **overrides)


def test_unknown_encoders_are_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match="nearest: clip-vit-l14-336"):
        encoder_config("clip-vit-l14-366")
    assert encoder_config("demo", fit=None, seed=None) == encoder_config("demo")


@pytest.mark.slow
def test_open_clip_is_not_imported_for_the_demo_tower() -> None:
    """Importing it takes seconds in every worker."""
    import subprocess
    import sys

    code = (
        "import sys; from model.vision.config import encoder_config;"
        "from model.vision.encoder import load_encoder;"
        "load_encoder(encoder_config('demo'), device='cpu');"
        "sys.exit('open_clip' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_full_size_random_tower_has_the_published_size() -> None:
    encoder = load_encoder(encoder_config("clip-vit-l14-336"), device="cpu", random_weights=True)
    assert 303.5e6 <= encoder.parameters <= 304.3e6
    without_projection, block, last_norm = 303_507_456, 12_596_224, 2_048
    assert encoder.parameters_used == without_projection - block - last_norm
    assert encoder.spec("int8").row_bytes("image") == 576 * 1024 + 2 * 576 * 16 + 2 * 1024
