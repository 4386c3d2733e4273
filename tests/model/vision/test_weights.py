"""Trained weights: equal hashes in every format, and wrong activations, colours and files are refused.

encoder = load_encoder(encoder_config("clip-vit-l14-336"), weights="open_clip_model.safetensors")
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.vision.encoder import load_encoder
from tests.support import tiny_clip
from tests.support.tiny_clip import noise, refusal


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
