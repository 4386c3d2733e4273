"""The way in and out: a LLaVA of somebody else is trained, resumed, asked, exported, and imported again.

python -m encode.run --dataset photos=json:talk.json --encoder hf:llava
python -m train.run --from llava
python -m model.export --run default --out exported
python -m train.run --from exported --run again
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    Qwen3Config,
    dynamic_module_utils,
)

from configs import UserError
from encode import run as encode_run
from model.export.__main__ import main as export
from model.generate import __main__ as generate
from model.io.saved_model import load_final
from model.language.folder_template import attached
from model.vision.config import encoder_config
from model.vision.encoder import VisionEncoder, load_encoder
from tests.support import tiny_clip
from tests.support.trained_runs import losses, photographs, talk
from train import run
from train.evaluate import __main__ as evaluate

pytestmark = pytest.mark.slow

BASE = [
    *("--hardware", "cpu", "--device", "cpu", "--held-out", "0", "--batch-size", "5"),
    *("--max-sequence-length", "256", "--learning-rate", "3e-3", "--log-every", "1000"),
]
STILL = ["--learning-rate", "0", "--connector-learning-rate", "0", "--max-steps", "1"]
CARD = "README.md"
"""What differs between two exports of equal weights: it names the run and its steps."""


@pytest.fixture(scope="module", autouse=True)
def _tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The tiny towers, and a folder for the code of exports."""
    tiny_clip.register(tmp_path_factory.mktemp("open_clip"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        place = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", place)
        yield


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != CARD}


def again(place: Path, exported: Path, features: Path, name: str) -> Path:
    """Import an export, change nothing, and export it; return the folder."""
    words = [*BASE, *STILL, "--features", str(features), "--from", str(exported)]
    assert run.main([*words, "--run", str(place / "runs" / name)]) == 0
    assert export(["--run", str(place / "runs" / name), "--out", str(place / name)]) == 0
    return place / name


@pytest.mark.parametrize(
    "kind",
    [
        {"style": "vicuna", "fit": "crop", "act": "relu"},
        {
            "style": "chatml",
            "tower": "siglip",
            "llm": Qwen3Config,
            "tied": True,
            "fit": "squash",
            "lora": 4,
        },
    ],
    ids=["clip, vicuna", "siglip, chatml, tied, by adapters"],
)
def test_a_stranger_is_trained_resumed_asked_and_exported(
    kind: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    lora = kind.get("lora", 0)
    kind = {key: value for key, value in kind.items() if key != "lora"}
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    stranger = tiny_clip.write_llava(Path("llava"), **kind)
    pictures = photographs(Path("pictures"))
    rows = [
        {
            "image": path.name,
            "conversations": [
                {"from": "human", "value": f"<image>\nWhat is this {number}?"},
                {"from": "gpt", "value": f"a cat and {number} dogs"},
            ],
        }
        for number, path in enumerate(pictures)
    ]
    Path("pictures/talk.json").write_text(json.dumps(rows))
    words = [
        "--dataset",
        "talk=json:pictures/talk.json",
        "--encoder",
        "hf:llava",
        "--device",
        "cpu",
    ]
    assert encode_run.main([*words, "--codec", "fp16"]) == 0
    train = [*BASE, "--from", "llava", "--save-every", "2", "--max-steps", "10"]
    train += ["--lora", str(lora)]
    assert run.main([*train, "--run", "one"]) == 0
    stage = Path("runs/one/stage1")
    before = losses(stage)
    assert before[-1] < before[0]
    final = load_file(stage / "final" / weights)
    assert (stage / "final/model.safetensors").exists() == (not lora)

    # Killed after step 8, and the folder is gone: the run has what it needs.
    shutil.rmtree(stage / "final")
    shutil.rmtree(stage / "checkpoints/step-00000010")
    Path("llava").rename("elsewhere")
    assert run.main(["--run", "one", "--resume"]) == 0
    assert losses(stage) == before
    resumed = load_file(stage / "final" / weights)
    assert all(torch.equal(resumed[name], value) for name, value in final.items())
    assert (
        run.main(
            [
                *BASE,
                "--from",
                f"{stage}/checkpoints/step-00000008",
                "--max-steps",
                "2",
                "--run",
                "two",
            ]
        )
        == 0
    )
    assert losses(Path("runs/two/stage1"))[0] == pytest.approx(before[8], abs=1e-5)
    Path("elsewhere").rename("llava")

    _, tokenizer, _ = load_final(stage / "final")
    template = attached(tokenizer)
    assert template is not None and template.text == tiny_clip.TEMPLATES[kind["style"]]
    assert evaluate.main(["--run", "one", "--split", "train", "--device", "cpu"]) == 0
    capsys.readouterr()
    asked = ["--run", "one", "--image", str(pictures[0]), "--prompt", "What is this 0?"]
    assert generate.main([*asked, "--max-new-tokens", "6", "--device", "cpu"]) == 0
    answer = capsys.readouterr().out.rstrip("\n")

    assert export(["--run", "one", "--out", "exported"]) == 0
    model = AutoModelForImageTextToText.from_pretrained("exported", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained("exported", backend="pil")
    assert processor.chat_template == tiny_clip.TEMPLATES[kind["style"]]
    assert model.config.projector_hidden_act == stranger.config.projector_hidden_act
    text = template.prompt([("user", "What is this 0?", 1.0)], 0)
    assert processor.tokenizer.decode(text)
    content: Any = [{"type": "image"}, {"type": "text", "text": "What is this 0?"}]
    content = "<image>What is this 0?" if template.content == "text" else content
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    with Image.open(pictures[0]) as image:
        inputs = processor(text=prompt, images=[image.convert("RGB")], return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(made, skip_special_tokens=True) == answer

    # llama.cpp's pair has the stranger's template; not every tokenizer can be written for it.
    pair = ["--run", "one", "--out", "pair", "--gguf"]
    if kind.get("act") == "relu":
        with pytest.raises(UserError, match="the tokenizer cuts text in a way that is not known"):
            export(pair)
    else:
        assert export(pair) == 0
        written = GGUFReader("pair/pair-F32.gguf")
        assert written.fields["tokenizer.chat_template"].contents() == template.text
        assert len(written.fields["tokenizer.ggml.tokens"].contents()) >= len(tokenizer)

    # An export is a folder like any other, and its cache is that of the stranger's tower.
    assert files_of(again(tmp_path, Path("exported"), Path("cache"), "again")) == files_of(
        Path("exported")
    )


OWN: dict[str, dict[str, Any]] = {
    "clip, linear": {"fit": "pad"},
    "siglip, mlp, llama": {
        "model": "tiny-siglip",
        "activation": "gelu",
        "blocks": (1, 3),
        "connector": "mlp",
        "llm": "llama",
    },
    "pooled": {"pool_image": 2, "connector": "mlp", "codec": "int8"},
    "demo": {"demo": True},
}


@pytest.mark.parametrize("kind", OWN.values(), ids=OWN)
def test_an_export_that_is_imported_and_exported_again_has_equal_bytes(
    kind: dict[str, Any], tmp_path: Path
) -> None:
    kind = dict(kind)
    connector, codec = kind.pop("connector", "linear"), kind.pop("codec", "fp16")
    llm = kind.pop("llm", "random:qwen3-tiny")
    if kind.pop("demo", False):
        eyes = load_encoder(
            dataclasses.replace(encoder_config("demo"), compute_dtype="float32"), device="cpu"
        )
    else:
        entry = tiny_clip.entry(**kind)
        weights = tiny_clip.write_weights(tmp_path / "weights", entry.model)
        eyes = load_encoder(entry, device="cpu", weights=str(weights))
    if llm == "llama":
        llm = str(write_llama(tmp_path / "llm"))
    spec = eyes.spec(codec)
    root = talk(tmp_path, spec, lambda image: features(eyes, image), eyes.load_info())
    vlm = tiny_clip.save_trained(tmp_path / "run", eyes, connector, codec=codec, llm=llm)
    assert export(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "exported")]) == 0
    second = again(tmp_path, tmp_path / "exported", root.path, "second")
    assert files_of(second) == files_of(tmp_path / "exported")
    imported, tokenizer, meta = load_final(tmp_path / "runs/second/stage1/final")
    assert attached(tokenizer) is None and meta["connector"] == connector
    for (name, value), other in zip(vlm.named_parameters(), imported.parameters(), strict=True):
        assert torch.equal(value, other), name


def features(eyes: VisionEncoder, image: Image.Image) -> Tensor:
    return eyes.encode(eyes.prepare(image)[None])[0]


def write_llama(folder: Path) -> Path:
    from transformers import AutoModelForCausalLM

    from model.language.tokenizer import byte_tokenizer

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, **heads, vocab_size=320, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_another_tower_is_refused_with_the_command_that_encodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The command is run as it is printed."""
    import shlex

    monkeypatch.chdir(tmp_path)
    tiny_clip.write_llava(Path("llava one"), "vicuna")
    tiny_clip.write_llava(Path("other"), "vicuna", seed=1)
    for number, path in enumerate(photographs(Path("pictures"))):
        path.with_suffix(".txt").write_text(f"a cat and {number} dogs")
    words = ["--dataset", "photos=folder:pictures", "--device", "cpu", "--codec", "fp16"]
    assert encode_run.main([*words, "--encoder", "hf:other"]) == 0
    train = [*BASE, "--from", "llava one", "--max-steps", "1"]
    with pytest.raises(UserError) as caught:
        run.main(train)
    message = str(caught.value)
    assert "is not made by its vision tower (weights " in message and "\n" not in message
    command = shlex.split(message.partition("python -m encode.run ")[2])
    assert encode_run.main([*command, "--device", "cpu"]) == 0
    with pytest.raises(UserError, match="choose the one that is: --space hf-llava-one") as caught:
        run.main([*train, "--space", "hf-other"])
    named = str(caught.value).rpartition("--space ")[2]
    assert run.main([*train, "--space", named]) == 0


def test_the_code_of_the_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a template that takes text only, too."""
    monkeypatch.chdir(tmp_path)
    tiny_clip.write_llava(Path("llava"), "llama3")
    for number, path in enumerate(photographs(Path("pictures"))):
        path.with_suffix(".txt").write_text(f"a cat and {number} dogs")
    words = ["--dataset", "photos=folder:pictures", "--encoder", "hf:llava", "--codec", "fp16"]
    assert encode_run.main([*words, "--device", "cpu"]) == 0
    assert run.main([*BASE, *STILL, "--from", "llava", "--run", "one"]) == 0
    assert export(["--run", "one", "--out", "exported"]) == 0
    Image.new("RGB", (40, 30), "red").save("exported/cat.jpg")
    code = Path("exported/README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir("exported")
    said: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the card leaves a file open
        exec(code, {"print": said.append})
    assert len(said) == 1 and "<image>" not in said[0]
