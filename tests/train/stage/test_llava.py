"""`--from HF_FOLDER`: a LLaVA of somebody else trains from its own weights, with its own template and tokens.

python -m train.run --from llava-1.5-7b-hf --features cache
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from cache.format.spec import FeatureSpec
from cache.remote.open import RemoteOptions, open_reader
from cache.store.paths import CacheRoot
from cache.store.samples import Sample
from configs import UserError
from model.io.saved_model import load_final
from model.io.tower_config import read_tower_config
from model.io.tower_folder import architecture, tower_hash
from model.media.fit import resize_text
from model.media.images import decode_image
from model.vision.config import encoder_config
from model.vision.encoder import load_encoder
from model.vision.tail_blocks import make_tail
from tests.support import tiny_clip
from tests.support.trained_runs import conversations, losses, photographs, talk
from train import run
from train.stage.llava import check_tower
from train.stage.origin import find_origin

pytestmark = pytest.mark.slow

BASE = [
    *("--hardware", "cpu", "--device", "cpu", "--held-out", "0", "--batch-size", "10"),
    *("--max-sequence-length", "256", "--learning-rate", "3e-3", "--log-every", "1000"),
]
KINDS: dict[str, dict[str, Any]] = {
    "clip, vicuna": {"style": "vicuna"},
    "siglip, chatml": {"style": "chatml", "tower": "siglip", "llm": Qwen2Config, "tied": True},
    "two blocks, llama 3, no bias": {
        "style": "llama3",
        "layers": [-2, -1],
        "act": "silu",
        "multimodal_projector_bias": False,
        "fit": "squash",
    },
    "siglip, mistral, two layers without an activation": {
        "style": "mistral",
        "tower": "siglip",
        "llm": MistralConfig,
        "act": "linear",
    },
    "clip, cut out of the middle": {"style": "llama3", "fit": "crop"},
    "qwen3, tanh": {"style": "chatml", "llm": Qwen3Config, "act": "gelu_pytorch_tanh"},
}


def make_cache(place: Path, folder: Path, model: LlavaForConditionalGeneration) -> CacheRoot:
    """A cache of features that transformers' own tower computes, as float16."""
    tower = read_tower_config(folder)
    assert tower.mean is not None and tower.std is not None
    processor = AutoProcessor.from_pretrained(folder, backend="pil").image_processor
    layers = model.config.vision_feature_layer
    first = int(model.config.vision_feature_select_strategy == "default")
    spec = FeatureSpec(
        encoder="hf-tiny",
        architecture=architecture(tower),
        weights=tower_hash(folder, tower.blocks),
        activation=tower.activation,
        blocks=tower.blocks,
        image_size=tower.image_size,
        patch_size=tower.patch_size,
        width=tower.width * len(tower.blocks),
        fit=tower.fit,
        resize=resize_text(tower.fit, tower.shorter_side),
        mean=tower.mean,
        std=tower.std,
        pool_frame=1,
        compute_dtype="float32",
        batch_size=1,
        codec="fp16",
    )

    def encode(image: Image.Image) -> Tensor:
        pixels = processor(images=[image], return_tensors="pt")
        with torch.inference_mode():
            hidden = model.model.vision_tower(**pixels, output_hidden_states=True).hidden_states
        wanted = layers if isinstance(layers, list) else [layers]
        return torch.cat([hidden[k][0, first:] for k in wanted], -1)

    return talk(place, spec, encode)


def reference(
    folder: Path, model: LlavaForConditionalGeneration, samples: Sequence[Sample]
) -> float:
    """The mean loss by transformers' own processor and model, one sample after the other."""
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    as_text = "['type']" not in processor.chat_template and "'type'" not in processor.chat_template
    total = count = 0.0
    for sample in samples:
        image = decode_image(Path(sample.media[0].source).read_bytes())
        said: list[dict[str, Any]] = []
        for number, message in enumerate(sample.messages):
            text = message.content.removeprefix("<image>")
            parts: list[dict[str, Any]] = [{"type": "image"}] if not number else []
            content = (
                "<image>" * (not number) + text
                if as_text
                else [*parts, {"type": "text", "text": text}]
            )
            said.append({"role": message.role, "content": content})
        text = processor.apply_chat_template(said)
        bos = processor.tokenizer.bos_token
        special = {"add_special_tokens": not (bos and text.startswith(bos))}
        inputs = processor(text=text, images=[image], return_tensors="pt", **special)
        labels = torch.full_like(inputs["input_ids"], -100)
        images = (tiny_clip.SIDE // tiny_clip.PATCH) ** 2
        offsets = processor.tokenizer(text, return_offsets_mapping=True, **special)[
            "offset_mapping"
        ]
        ids = processor.tokenizer(text, **special)["input_ids"]
        image_at = ids.index(model.config.image_token_index)
        for turn in range(1, len(said), 2):
            start = len(processor.apply_chat_template(said[:turn], add_generation_prompt=True))
            end = len(processor.apply_chat_template(said[: turn + 1]))
            for at, (first, last) in enumerate(offsets):
                if start <= first < end and last > first:
                    place = at + (images - 1) * (at > image_at)
                    labels[0, place] = inputs["input_ids"][0, place]
        with torch.inference_mode():
            loss = model(**inputs, labels=labels).loss
        number = int((labels != -100).sum())
        total, count = total + float(loss) * number, count + number
    return total / count


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def stranger(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, CacheRoot, LlavaForConditionalGeneration]:
    """A folder, a cache of its tower's features, and the model."""
    place = tmp_path_factory.mktemp("llava")
    model = tiny_clip.write_llava(place / "folder", **request.param)
    return place / "folder", make_cache(place, place / "folder", model), model


def train(folder: Path | str, root: CacheRoot, name: Path, *words: str, steps: int = 10) -> Path:
    words = (*BASE, "--features", str(root.path), "--max-steps", str(steps), *words)
    start = [] if "--resume" in words else ["--from", str(folder)]
    assert run.main([*words, *start, "--run", str(name)]) == 0
    return name / "stage1"


def test_the_loss_before_training_is_that_of_transformers(
    stranger: tuple[Path, CacheRoot, LlavaForConditionalGeneration], tmp_path: Path
) -> None:
    folder, root, model = stranger
    stage = train(folder, root, tmp_path / "run")
    measured = losses(stage)
    expected = reference(folder, model, conversations(photographs(tmp_path / "images")))
    assert measured[0] == pytest.approx(expected, abs=1e-4)
    assert measured[-1] < measured[0] - 0.1
    vlm, tokenizer, _ = load_final(stage / "final")
    assert tokenizer.chat_template == (folder / "chat_template.jinja").read_text()
    assert vlm.language.config.vocab_size == model.config.text_config.vocab_size


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `llava`, and a cache of its tower's features."""
    place = tmp_path_factory.mktemp("small")
    model = tiny_clip.write_llava(place / "llava", "chatml")
    make_cache(place, place / "llava", model)
    return place


@pytest.fixture
def here(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(small, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_a_llava_whose_last_blocks_train(small: Path, tmp_path: Path) -> None:
    """Its tower's last blocks, behind what is stored, give the loss of transformers, and learn."""
    folder = small / "llava"
    config = encoder_config(f"hf:{folder}", compute_dtype="float32", pool_frame=1).with_tail(0)
    eyes = load_encoder(config, device="cpu")
    plain = eyes.spec("fp16")
    tail, data = make_tail(config, plain)
    spec = dataclasses.replace(plain, tail=tail)

    def encode(image: Image.Image) -> Tensor:
        return eyes.encode(eyes.prepare(image)[None])[0]

    root = talk(tmp_path, spec, encode, eyes.load_info(), data)
    more = ("--train-vision-blocks", "1", "--vision-learning-rate", "1e-3")
    stage = train(folder, root, tmp_path / "run", *more, steps=2)
    with torch.random.fork_rng(devices=[]):
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    expected = reference(folder, model, conversations(photographs(tmp_path / "images")))
    assert losses(stage)[0] == pytest.approx(expected, abs=2e-3)  # float16 rows
    stored, trained = (
        load_file(root.space(spec.name).tail),
        load_file(stage / "final/tail.safetensors"),
    )
    assert not any(torch.equal(stored[name], trained[name]) for name in stored)
    # Other blocks behind the same stored one are refused.
    changed = load_file(folder / "model.safetensors")
    name = next(n for n in changed if n.endswith("encoder.layers.1.mlp.fc1.bias"))
    shutil.copytree(folder, tmp_path / "other")
    save_file({**changed, name: changed[name] + 1}, tmp_path / "other/model.safetensors")
    with pytest.raises(
        UserError, match=r"tail: 1 other tensors, such as encoder\.layers\.1"
    ) as caught:
        train(tmp_path / "other", root, tmp_path / "refused")
    assert "--block 0 --tail" in str(caught.value)


def test_a_folder_and_a_run_of_one_name(here: Path, caplog: Any) -> None:
    """The folder counts, and it is said; the path of the run is the run."""
    caplog.set_level(logging.INFO)
    train("llava", CacheRoot(here / "cache"), Path("runs/llava"), steps=1)
    assert caplog.messages[0] == "starting from llava (a LLaVA)"
    origin = find_origin("llava")
    assert (origin.kind, origin.path) == ("llava", Path("llava"))
    assert caplog.messages[-1] == "--from llava: the LLaVA in this folder, not the run runs/llava"
    assert find_origin("runs/llava").kind == "final"
    # A model that this package saved has a config.json, too.
    assert find_origin("runs/llava/stage1/final").kind == "final"


def test_a_template_without_an_end_is_said(here: Path, caplog: Any) -> None:
    """As that of LLaVA-1.5."""
    find_origin("llava").tokenizer()
    assert not caplog.messages
    text = tiny_clip.TEMPLATES["chatml"].replace("+ '<|im_end|>' +", "+")
    (here / "llava/chat_template.jinja").write_text(text)
    find_origin("llava").tokenizer()
    assert caplog.messages[0].startswith(
        "llava: its chat template writes no control token behind an"
    )


def test_a_run_keeps_what_its_card_needs(here: Path) -> None:
    stage = train("llava", CacheRoot(here / "cache"), Path("runs/one"), steps=1)
    card = json.loads((stage / "card.json").read_text())
    assert [one["llm"] for one in card["stages"]] == ["llava"]
    meta = json.loads((stage / "final/nanomolmo2.json").read_text())
    assert (meta["connector"], meta["template"], meta["llm"]) == ("mlp", "folder-1", "llava")
    assert meta["space"]["spec"]["encoder"] == "hf-tiny"
    # The next stage starts from the first, with its template.
    words = [*BASE, "--features", "cache", "--max-steps", "1", "--run", "runs/one", "--stage", "2"]
    assert run.main(words) == 0
    _, tokenizer, _ = load_final(Path("runs/one/stage2/final"))
    assert tokenizer.chat_template == tiny_clip.TEMPLATES["chatml"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vision_feature_layer": -1}, "blocks [2] there, [1] here"),
        (
            {"vision_feature_layer": [-2, -1]},
            "linear_1.weight is (32, 32), by config.json it is (32, 64)",
        ),
    ],
)
def test_other_blocks_are_refused(here: Path, change: dict[str, Any], reason: str) -> None:
    path = here / "llava/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as caught:
        train("llava", CacheRoot(here / "cache"), Path("runs/one"))
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"do_pad": False}, "fit squash there, pad here"),
        ({"size": {"height": 24, "width": 24}}, "image_size 24 there, 32 here"),
        ({"image_mean": [0.5, 0.5, 0.5]}, "mean [0.5, 0.5, 0.5] there, [0.48145466,"),
    ],
)
def test_images_that_are_prepared_otherwise_are_refused(
    here: Path, change: dict[str, Any], reason: str
) -> None:
    path = here / "llava/processor_config.json"
    values = json.loads(path.read_text())
    values["image_processor"] |= change
    path.write_text(json.dumps(values))
    with pytest.raises(UserError) as caught:
        check_tower(Path("llava"), open_reader(str(here / "cache"), None, RemoteOptions()))
    message = str(caught.value)
    assert reason in message and "\n" not in message
    assert " --encoder hf:llava --codec fp16 --features " in message


def test_a_cache_without_features_names_the_folder_s_encoder(here: Path) -> None:
    shutil.rmtree(here / "cache/spaces")
    with pytest.raises(
        UserError, match=r"no feature space under .*\. Make one: python -m encode\.run .*"
    ) as caught:
        train("llava", CacheRoot(here / "cache"), Path("runs/one"))
    assert " --encoder hf:llava --features " in str(caught.value)


def test_one_changed_weight_of_the_tower_is_another_tower(here: Path) -> None:
    path = here / "llava/model.safetensors"
    state = load_file(path)
    name = next(name for name in state if "layers.0" in name and "vision" in name)
    state[name].view(-1)[0] += 1e-3
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"not made by its vision tower \(weights "):
        train("llava", CacheRoot(here / "cache"), Path("runs/one"))


def test_what_the_command_line_cannot_change(here: Path) -> None:
    root = CacheRoot(here / "cache")
    for words, reason in (
        (
            ("--over-long", "split"),
            "cannot be cut; leave too long samples out: --over-long leave-out",
        ),
        (("--llm", "other"), "its llm is llava, not other; leave --llm out"),
        (("--connector", "linear"), "its connector is mlp, not linear"),
        (
            ("--max-sequence-length", "20"),
            "Raise --max-sequence-length to 106, or leave them out (--over-long leave-out)",
        ),
        (("--max-sequence-length", "513"), "513 is more than the 512 positions of llava"),
    ):
        with pytest.raises(UserError) as caught:
            train("llava", root, Path("runs/one"), *words)
        assert reason in str(caught.value)


def test_names_that_are_no_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        find_origin("llava-hf/llava-1.5-7b-hf")
    message = str(caught.value)
    assert message.startswith(
        "llava-hf/llava-1.5-7b-hf: no such folder, not downloaded before, HF_HUB"
    )
    assert message.endswith("--from PATH, with config.json, tokenizer.json, model.safetensors")
    Path("runs").mkdir()
    with pytest.raises(UserError, match=r"--from runs/none: no run runs/none"):
        find_origin("runs/none")
    path = here / "llava/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "llava_next"}))
    with pytest.raises(UserError, match="a llava_next, and of vision-language models only a Llava"):
        find_origin("llava")


def test_a_text_that_the_template_refuses_is_counted_and_left_out(here: Path, caplog: Any) -> None:
    template = tiny_clip.TEMPLATES["chatml"].replace(
        "{% for message",
        "{% if messages | length > 2 %}{{ raise_exception('too much') }}{% endif %}{% for message",
        1,
    )
    (here / "llava/chat_template.jinja").write_text(template)
    train("llava", CacheRoot(here / "cache"), Path("runs/one"), steps=1)
    (line,) = [line for line in caplog.messages if "left out" in line]
    assert line.startswith(
        "5 samples: left out, because they cannot be written with the folder's chat"
    )
    assert line.endswith("the folder's chat template refuses it (too much)")
