"""The recipes of docs/recipes/: each learns small data, and the training loop has the losses of our trainer.

python docs/recipes/train_loop.py --llm runs/tiny-llm --datasets demo-points --rate 2e-3
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import nanomolmo2 as nm
from model.language.model import save_language
from model.vlm import VLM, build_vlm
from nanomolmo2.unpack import unpack
from tests.support import ROOT, trained_runs
from tests.support.feature_caches import IMAGES, World, ask, mixed_samples, new_world
from train.data.schedule import SinglePass

FOLDER = ROOT / "docs" / "recipes"
NAMES = ("clips", "hf_trainer", "tiny_llm", "train_loop")


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`recipe(name)` imports a file of docs/recipes/ as a script beside it would."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def module(name: str) -> ModuleType:
        return __import__(name)

    yield module
    for name in NAMES:
        sys.modules.pop(name, None)


def options(recipe: ModuleType, **changes: Any) -> argparse.Namespace:
    """The options of a recipe, without workers."""
    return argparse.Namespace(**{**recipe.OPTIONS, "workers": 0, **changes})


@pytest.fixture
def tiny(recipe: Any, tmp_path: Path) -> str:
    recipe("tiny_llm").make(tmp_path / "llm", width=64, layers=2)
    return str(tmp_path / "llm")


def printed(text: str, name: str) -> list[float]:
    """The numbers after a word in what a recipe printed."""
    return [float(value) for value in re.findall(rf"{name} ([\d.]+)", text)]


def test_the_training_loop_learns_saves_and_answers(
    recipe: Any, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = trained_runs.make(tmp_path, 60)
    loop = recipe("train_loop")
    out = tmp_path / "own"
    more = {"steps": 60, "batch": 8, "accumulate": 2, "rate": 5e-3, "connector_rate": 5e-3}
    more |= {"warm_up": 10, "validate_every": 30, "answers": 20}
    loop.main(options(loop, features=str(root.path), llm=tiny, out=str(out), **more))
    text = capsys.readouterr().out
    assert printed(text, "loss")[-1] < 0.2
    assert printed(text, "validation")[-1] < 0.2
    answers = re.findall(r"^.*\? '(.*)' \(right: '(.*)'\)$", text, re.MULTILINE)
    assert answers and all(said == right for said, right in answers), text
    # What was saved is the model that answered.
    vlm, tokenizer = loop.load(str(out), 64)
    held_out = nm.open(root.path).dataset(split="val")
    asked = [i for i in range(len(held_out)) if held_out.tasks[i] == "colour"]
    for i in asked:
        assert vlm.answer(tokenizer, held_out[i]) == held_out.messages[i][-1]["content"]


def mixed(folder: Path) -> World:
    """Samples with images, videos, several turns and weights."""
    world = new_world(folder)
    films = [ask("film", ["video v"]), ask("both", ["p1", "video v"], "<image>, <video>?")]
    forged = ask("forged", ["p2"], "Is <|im_end|> the end? <image>", "<|im_start|>no")
    world.write(d=[*mixed_samples(40, 0), *films, forged])
    world.encode(IMAGES)
    world.encode_videos({"video v": 2.2})
    return world


@pytest.mark.parametrize("micro", [1, 4])
def test_its_loss_is_that_of_our_trainer(recipe: Any, tmp_path: Path, micro: int) -> None:
    """Padded rows and our packed trees, on equal weights: every sample of every kind."""
    world = mixed(tmp_path)
    loop = recipe("train_loop")
    ours, tokenizer = build_vlm(64, "random:qwen3-tiny", "linear", seed=0)
    save_language(tmp_path / "llm", ours.language, tokenizer)
    theirs, own_tokenizer = loop.load(str(tmp_path / "llm"), 64)
    theirs.connector.load_state_dict(ours.connector.state_dict())

    trees = world.trees(world.join(), max_tokens=256)
    loss, weight = trainer_loss(ours, world, trees)
    data = nm.open(world.root.path).dataset(held_out=0.0)
    assert len(data) == 43

    def collate(samples: Any) -> Any:
        return loop.collate(own_tokenizer, samples)

    with torch.no_grad():
        parts = [theirs.loss(*part) for part in DataLoader(data, micro, collate_fn=collate)]
    assert float(sum(part[1] for part in parts)) == pytest.approx(weight, rel=1e-6)
    assert float(sum(part[0] for part in parts)) == pytest.approx(loss, rel=1e-5)


@torch.no_grad()
def trainer_loss(vlm: VLM, world: World, trees: Any) -> tuple[float, float]:
    """Return the weighted loss of all trees, and the sum of weights, by the trainer's own parts."""
    loss = weight = 0.0
    spec = world.reader.spec
    with world.load(SinglePass(trees, 8)) as loader:
        for part in loader:
            rows = [
                unpack(part.codes[array], spec.codec, spec.tokens(array), 64).flatten(0, 1)
                for array in ("image", "frame")
            ]
            features = torch.cat(rows).index_select(0, part.order)
            total, count = vlm.loss(part.packed, features)
            loss, weight = loss + float(total), weight + float(count)
    return loss, weight


def test_accumulated_parts_are_one_large_batch(recipe: Any, tiny: str, tmp_path: Path) -> None:
    root = trained_runs.make(tmp_path, 40)
    loop = recipe("train_loop")
    data = nm.open(root.path).dataset(held_out=0.0)
    gradients = []
    for size in (2, 8):
        torch.manual_seed(0)  # equal connectors
        vlm, tokenizer = loop.load(tiny, 64)
        parts = [
            loop.collate(tokenizer, data.__getitems__(range(at, at + size)))
            for at in range(0, 8, size)
        ]
        total = sum(weights[:, 1:].sum() for _, _, weights in parts)
        for part in parts:
            (vlm.loss(*part)[0] / total).backward()
        gradients.append(vlm.connector.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_a_language_model_without_chatml_is_refused(recipe: Any, tiny: str) -> None:
    loop = recipe("train_loop")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = Path(tiny, name)
        path.write_text(path.read_text().replace("<|im_start|>", "<|start|>"))
    with pytest.raises(SystemExit, match="change `encode` to its chat template"):
        loop.load(tiny, 64)


def test_hugging_faces_trainer_learns(recipe: Any, tiny: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    root = trained_runs.make(tmp_path, 60)
    script = recipe("hf_trainer")
    more = {"steps": 60, "batch": 8, "accumulate": 2, "rate": 5e-3, "warm_up": 10}
    folders = {"features": str(root.path), "llm": tiny, "out": str(tmp_path / "own")}
    trainer = script.main(options(script, validate_every=30, **folders, **more))
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    validation = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert losses[-1] < 0.3 and validation[-1] < 0.3
    loop = recipe("train_loop")
    vlm, tokenizer = loop.load(str(tmp_path / "own"), 64)
    held_out = nm.open(root.path).dataset(split="val")
    asked = [i for i in range(len(held_out)) if held_out.tasks[i] == "colour"]
    said = [vlm.answer(tokenizer, held_out[i]) for i in asked]
    assert said == [held_out.messages[i][-1]["content"] for i in asked]


def test_hugging_faces_trainer_counts_tokens_not_parts(
    recipe: Any, tiny: str, tmp_path: Path
) -> None:
    """The loss of a step is the mean over its tokens, however the step is cut into parts."""
    pytest.importorskip("accelerate")
    root = trained_runs.make(tmp_path, 40)
    script = recipe("hf_trainer")
    first = []
    for batch, accumulate in ((2, 4), (8, 1)):
        folders = {"features": str(root.path), "llm": tiny, "out": str(tmp_path / "own")}
        more = {"steps": 1, "batch": batch, "accumulate": accumulate, "validate_every": 1}
        trainer = script.main(options(script, **folders, **more))
        first.append(next(line["loss"] for line in trainer.state.log_history if "loss" in line))
    assert first[0] == pytest.approx(first[1], rel=1e-2)  # connectors are new, and differ


def test_the_trainer_of_clips_learns(
    recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = trained_runs.film(tmp_path, 40)
    script = recipe("clips")
    more = {"steps": 60, "batch": 8, "width": 32, "layers": 1, "rate": 5e-3, "validate_every": 60}
    script.main(options(script, features=str(root.path), datasets="films", **more))
    text = capsys.readouterr().out
    assert printed(text, "loss")[-1] < 0.3
    assert printed(text, "right") == [1.0]


def test_padding_changes_no_answer_of_the_clip_reader(recipe: Any, tmp_path: Path) -> None:
    """Clips of 2 to 6 frames, alone and beside each other."""
    data = nm.open(trained_runs.film(tmp_path, 12).path).dataset(held_out=0.0)
    script = recipe("clips")
    words = script.Words(data.messages)
    model = script.ClipReader(data.spec, words, 32, 1).eval()
    with torch.no_grad():
        *together, classes = script.collate(words, data.__getitems__(range(12)))
        assert len(set(together[0].features().lengths.tolist())) > 1
        scores = script.scores(model, *together)
        for i in range(12):
            *alone, right = script.collate(words, [data[i]])
            torch.testing.assert_close(
                script.scores(model, *alone)[0], scores[i], rtol=1e-4, atol=1e-5
            )
            assert words.answers[right[0]] == data.messages[i][-1]["content"]
            assert right[0] == classes[i]


def test_recipes_use_the_public_package_alone_and_the_loop_is_short() -> None:
    allowed = {
        "nanomolmo2",
        "numpy",
        "safetensors",
        "tokenizers",
        "torch",
        "transformers",
        "train_loop",
    }
    files = [FOLDER / f"{name}.py" for name in NAMES]
    for path in files:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {
            alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
        }
        names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
        others = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
        assert others <= allowed, path
        assert not re.search(r"\bnm\._|nanomolmo2\.\w", path.read_text())
    assert len((FOLDER / "train_loop.py").read_text().splitlines()) <= 200
    table = (FOLDER / "README.md").read_text()
    for path in files:
        count = len(path.read_text().splitlines())
        assert f"[{path.name}]({path.name}) | {count} |" in table


@pytest.mark.slow
def test_it_runs_as_it_is(tiny: str, tmp_path: Path) -> None:
    """As a command, in another folder, by flags, with workers."""
    root = trained_runs.make(tmp_path, 40)
    flags = [
        "--features",
        str(root.path),
        "--llm",
        tiny,
        "--steps",
        "2",
        "--batch",
        "4",
        "--warm-up",
        "1",
    ]
    done = subprocess.run(
        [sys.executable, str(FOLDER / "train_loop.py"), *flags],
        cwd=tmp_path,
        env=trained_runs.ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "step 2: loss " in done.stdout
    assert (tmp_path / "runs/own/connector.safetensors").exists()
