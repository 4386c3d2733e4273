"""`model.export`: each supported kind is loaded by transformers' own classes and answers as trained.

python -m model.export --run default --out exported
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
)

from configs import UserError
from model.attention.batch import PackedBatch
from model.export import compare as comparison
from model.export.__main__ import main
from model.export.compare import Expected, MismatchError
from model.inference import answer, expand_prompt, through_tail
from model.io.saved_model import load_final
from model.language.tokenizer import IMAGE_TOKEN, byte_tokenizer, token_id
from model.vision.config import encoder_config
from model.vision.encoder import VisionEncoder, load_encoder
from model.vlm import VLM
from tests.support import tiny_clip

pytestmark = pytest.mark.slow

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "clip, linear, pad": {"fit": "pad", "codec": "int8"},
    "clip, mlp, squash": {"connector": "mlp", "codec": "int4"},
    "clip, crop": {"fit": "crop", "connector": "mlp"},
    "clip, two blocks, the last one first": {"blocks": (3, 1), "connector": "mlp", "fit": "pad"},
    "clip, the first block, exact GELU": {"blocks": (0,), "model": "tiny", "activation": "gelu"},
    "siglip, linear": {"model": "tiny-siglip", "activation": "gelu", "fit": "pad"},
    "siglip, two blocks": {
        "model": "tiny-siglip",
        "activation": "gelu",
        "blocks": (1, 3),
        "connector": "mlp",
    },
    "pooled, linear": {"pool_image": 2, "fit": "pad", "codec": "int8"},
    "pooled, mlp, untied": {
        "pool_image": 4,
        "blocks": (3, 1),
        "connector": "mlp",
        "llm": LlamaConfig(**SIZES, tie_word_embeddings=False),
    },
    "clip with a tail, int8": {"block": 1, "blocks": (3,), "fit": "pad", "codec": "int8"},
    "siglip with a tail, two blocks, pooled": {
        "block": 0,
        "blocks": (2, 3),
        "model": "tiny-siglip",
        "activation": "gelu",
        "pool_image": 2,
        "connector": "mlp",
    },
    "clip of transformers with a tail": {
        "block": 2,
        "tower": "clip",
        "blocks": (3,),
        "pool_image": 1,
    },
    "pooled siglip": {"pool_image": 2, "model": "tiny-siglip", "activation": "gelu"},
    "dinov2 of transformers, pooled, tied llama": {
        "tower": "dinov2",
        "pool_image": 4,
        "connector": "mlp",
        "codec": "int8",
        "llm": LlamaConfig(**SIZES, tie_word_embeddings=True),
    },
    "dinov2 of transformers, two blocks, at another size than trained": {
        "tower": "dinov2",
        "blocks": (3, 0),
        "image_size": 48,
        "fit": "crop",
        "shorter_side": 55,
    },
    "dinov2 of transformers, gated": {"tower": "dinov2-gated", "connector": "mlp"},
    "dinov2 with registers": {"tower": "dinov2-registers", "connector": "mlp"},
    "dinov3, pooled": {"tower": "dinov3", "pool_image": 2, "blocks": (1, 2)},
    "clip of transformers": {"tower": "clip", "fit": "pad", "codec": "int4"},
    "siglip of transformers, the last block": {"tower": "siglip", "blocks": (3,)},
    "untied llama": {"llm": LlamaConfig(**SIZES, tie_word_embeddings=False)},
    "tied qwen2": {"llm": Qwen2Config(**SIZES, tie_word_embeddings=True), "connector": "mlp"},
}


def photographs() -> list[Image.Image]:
    """Two real photographs and a strip, none of them square."""
    coffee, cat = Image.fromarray(data.coffee()), Image.fromarray(data.chelsea())
    return [coffee.crop((0, 0, 600, 131)), cat.crop((90, 0, 203, 300)), cat]


def make_run(folder: Path, kind: dict[str, Any]) -> tuple[VLM, VisionEncoder]:
    """Write a run of a kind, with the encoder's weights in a file."""
    kind = dict(kind)
    block = kind.pop("block", None)
    connector, codec = kind.pop("connector", "linear"), kind.pop("codec", "fp16")
    llm = kind.pop("llm", "random:qwen3-tiny")
    if not isinstance(llm, str):
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(llm).save_pretrained(folder / "llm")
        byte_tokenizer().save_pretrained(folder / "llm")
        config = folder / "llm/tokenizer_config.json"
        values = json.loads(config.read_text())
        del values["padding_side"]  # most models do not state it
        config.write_text(json.dumps(values))
        llm = str(folder / "llm")
    if "tower" in kind:
        tower = tiny_clip.transformers_tower(kind.pop("tower"))
        tiny_clip.save_tower(folder / "tower", tower)
        sizes = {"compute_dtype": "float32", "batch_size": 3, "pool_frame": 2}
        entry = encoder_config(f"hf:{folder / 'tower'}", **sizes, **kind)
        entry = entry if block is None else entry.with_tail(block)
        eyes = load_encoder(entry, device="cpu")
    else:
        entry = tiny_clip.entry(**kind)
        entry = entry if block is None else entry.with_tail(block)
        weights = tiny_clip.write_weights(folder / "weights", entry.model)
        eyes = load_encoder(entry, device="cpu", weights=str(weights))
    return tiny_clip.save_trained(folder / "run", eyes, connector, codec=codec, llm=llm), eyes


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, VLM, VisionEncoder]:
    folder = tmp_path_factory.mktemp("export")
    vlm, eyes = make_run(folder, request.param)
    assert main(["--run", str(folder / "run"), "--out", str(folder / "out")]) == 0
    return folder / "out", vlm, eyes


def test_transformers_own_classes_compute_the_same(
    exported: tuple[Path, VLM, VisionEncoder],
) -> None:
    """Logits of every token, image tokens included, against the packed attention of training."""
    folder, vlm, eyes = exported
    _, tokenizer, _ = load_final(folder.parent / "run/stage1/final")
    pooled = (folder / "pooled_llava.py").exists()
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=pooled
    ).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=pooled)
    assert (type(model) is LlavaForConditionalGeneration) is not pooled
    last = []
    for images in ([photographs()[0]], [photographs()[1]], photographs()[1:]):
        text = "<image>" * len(images) + " what?\n"
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        inputs = processor(text=inputs, images=images, return_tensors="pt")
        features = eyes.encode(np.stack([eyes.prepare(image) for image in images]))
        prompt = through_tail(vlm, ([("user", text, 1.0)], features))
        ids, _, flat = expand_prompt(tokenizer, prompt)
        assert inputs["input_ids"][0].tolist() == ids.tolist()
        batch = PackedBatch.one_sample(ids, torch.zeros(len(ids)), token_id(tokenizer, IMAGE_TOKEN))
        with torch.inference_mode():
            ours = vlm.language.get_output_embeddings()(vlm.hidden(batch, flat))
            theirs = model(**inputs).logits[0]
            made = model.generate(**inputs, max_new_tokens=12)
        assert (ours - theirs).abs().max() <= 1e-4
        words = [([("user", text, 1.0)], features)]
        expected = answer(vlm, tokenizer, words, max_new_tokens=12)
        last.append(theirs[-1])
        new = made[:, inputs["input_ids"].shape[1] :]
        assert processor.batch_decode(new, skip_special_tokens=True) == expected
    assert (last[0] - last[1]).abs().max() > 0.01, "images change the logits"


def test_the_default_processor_differs_by_rounding(
    exported: tuple[Path, VLM, VisionEncoder],
) -> None:
    folder, _, eyes = exported
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    for image in photographs():
        theirs = processor(text="<image>", images=[image], return_tensors="pt")["pixel_values"]
        ours = eyes.normalize(eyes.prepare(image)[None])
        std = torch.tensor(processor.image_processor.image_std).view(1, 3, 1, 1)
        assert ((theirs - ours) * std * 255).abs().max() < 1.01


def test_a_batch_of_prompts_is_padded_on_the_left(
    exported: tuple[Path, VLM, VisionEncoder],
) -> None:
    folder, _, _ = exported
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=True)
    assert processor.tokenizer.padding_side == "left"
    talks = [[{"role": "user", "content": text}] for text in ("a", "a much longer question")]
    one, both = (
        processor.apply_chat_template(
            which,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        )
        for which in (talks[:1], talks)
    )
    alone = model.generate(**one, max_new_tokens=8)[0, one["input_ids"].shape[1] :]
    beside = model.generate(**both, max_new_tokens=8)[0, both["input_ids"].shape[1] :]
    assert alone.tolist() == beside.tolist()[: len(alone)]


def test_code_of_the_folder_runs_only_if_it_is_trusted(tmp_path: Path) -> None:
    """transformers does not load a pooled model as a LLaVA that does not pool."""
    tiny_clip.save_trained(tmp_path / "run", load_encoder(encoder_config("demo"), device="cpu"))
    assert main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert "trust_remote_code=True" in (tmp_path / "out/README.md").read_text()


def test_the_demo_tower_is_exported_as_siglip(tmp_path: Path) -> None:
    config = encoder_config("demo", pool_image=1, blocks=(1, 0), fit="pad")
    eyes = load_encoder(config, device="cpu")
    tiny_clip.save_trained(tmp_path / "run", eyes, "mlp")
    assert main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert values["vision_config"]["model_type"] == "siglip_vision_model"
    assert values["vision_feature_layer"] == [-1, -2]


def test_random_weights_are_exported_without_a_file(tmp_path: Path) -> None:
    eyes = load_encoder(tiny_clip.entry(), device="cpu", random_weights=True)
    tiny_clip.save_trained(tmp_path / "run", eyes)
    assert main(["--run", str(tmp_path / "run/stage1/final"), "--out", str(tmp_path / "out")]) == 0


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that can be exported, and the encoder's weights in `weights`."""
    make_run(tmp_path, KINDS["clip, linear, pad"])
    return tmp_path / "run"


def test_equal_runs_give_equal_bytes(run: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        assert main(["--run", str(run), "--out", str(tmp_path / name / "model")]) == 0
    first, second = tmp_path / "first/model", tmp_path / "second/model"
    names = {path.name for path in first.iterdir()}
    assert names == {path.name for path in second.iterdir()}
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    assert str(tmp_path) not in "".join(
        path.read_text() for path in first.iterdir() if path.suffix != ".safetensors"
    )


@pytest.mark.parametrize("part", ["folder.projector_tensors", "folder.language_tensors"])
def test_a_model_that_differs_is_not_exported(
    part: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One weight of one tensor is changed on its way into the file."""
    from model.export import folder

    name = part.partition(".")[2]
    inner = getattr(folder, name)

    def changed(module: Any) -> dict[str, torch.Tensor]:
        tensors = {key: value.clone() for key, value in inner(module).items()}
        next(iter(tensors.values())).view(-1)[7 * 32 + 5 :] += 0.05
        return tensors

    monkeypatch.setattr(folder, name, changed)
    assert main(["--run", str(run), "--out", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: not exported") and message.count("\n") == 1
    assert "a logit differs by" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "weights"]


@pytest.mark.parametrize(
    "kind",
    [
        "clip, mlp, squash",
        "pooled, mlp, untied",
        "siglip with a tail, two blocks, pooled",
        "dinov2 of transformers, two blocks, at another size than trained",
        "dinov3, pooled",
    ],
)
def test_where_float32_rounds_by_more_than_the_limit_float64_decides(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the exported model of `make proof-quick` does on a processor without AVX-512."""
    make_run(tmp_path, KINDS[kind])
    real, rounding = comparison._compare_logits, 2e-4

    def compared(model: Any, number: int, inputs: Any, ours: Expected) -> float:
        is_float32 = model.dtype == torch.float32
        moved = replace(ours, logits=ours.logits + rounding * is_float32)
        return real(model, number, inputs, moved)

    monkeypatch.setattr(comparison, "_compare_logits", compared)
    words = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "again in float64: in float32, prompt 1: a logit differs by 0.0002" in said
    within = re.search(r"logits within (\S+),", said)
    assert within is not None and float(within[1]) < 1e-6


def test_a_tensor_that_is_missing_is_noticed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would draw it at random."""
    from model.export import folder

    inner = folder.save_file

    def cut(tensors: dict[str, torch.Tensor], *rest: Any, **more: Any) -> None:
        inner(dict(list(tensors.items())[:-1]), *rest, **more)

    monkeypatch.setattr(folder, "save_file", cut)
    from model.export.exporter import export
    from model.export.options import Options
    from model.io.runs import find_run

    with pytest.raises(MismatchError, match=r"missing_keys: model\.multi_modal_projector"):
        export(find_run(str(run)), Options(out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_folder_with_files_is_left_as_it_is(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not an empty folder; choose another: --out"):
        main(["--run", str(run), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out/mine.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert main(["--run", str(run), "--out", str(tmp_path / "empty")]) == 0


def test_weights_that_moved_are_named_and_others_refused(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.move(tmp_path / "weights", moved)
    words = ["--run", str(run), "--out", str(tmp_path / "out"), "--weights"]
    other = tiny_clip.write_weights(tmp_path / "other", seed=4)
    with pytest.raises(UserError, match=r"made with weights .*; give the right ones: --weights"):
        main([*words, str(other)])
    assert main([*words, str(moved)]) == 0
