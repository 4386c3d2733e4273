"""What `--from` names: recognised by content, under any name, and loaded with every parameter.

origin = find_origin("first")
vlm = origin.load()
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configs import UserError
from model.io.run_files import META
from model.io.saved_model import load_final
from tests.support import trained_runs
from tests.support.trained_runs import BASE
from train import run
from train.stage import checkpoint
from train.stage.origin import find_origin, recorded

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/done, a finished run, and runs/cut, one with checkpoints 3 and 4 of stage 1."""
    place = tmp_path_factory.mktemp("origins")
    root = trained_runs.make(place, 20)
    words = [*BASE, "--features", str(root.path), "--max-steps", "4", "--save-every", "1"]
    for name in ("done", "cut"):
        assert run.main([*words, "--run", str(place / "runs" / name)]) == 0
    shutil.rmtree(place / "runs/cut/stage1/final")
    return place


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, in which the test runs."""
    shutil.copytree(place, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def train(*words: str) -> Path:
    """Train two steps on the cache of this folder; return the folder of the stage."""
    named = dict(zip(words[::2], words[1::2], strict=False))
    assert run.main([*BASE, "--features", "cache", "--max-steps", "2", *words]) == 0
    return Path("runs") / named["--run"] / f"stage{named.get('--stage', 1)}"


CUT = "runs/cut/stage1/checkpoints"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("done", "runs/done/stage1/final"),
        ("runs/done", "runs/done/stage1/final"),
        ("runs/done/", "runs/done/stage1/final"),
        ("runs/done/stage1", "runs/done/stage1/final"),
        ("./runs/done/stage1/final", "runs/done/stage1/final"),
        (
            "runs/done/stage1/checkpoints/step-00000003",
            "runs/done/stage1/checkpoints/step-00000003",
        ),
        ("cut", f"{CUT}/step-00000004"),
        ("runs/cut/stage1", f"{CUT}/step-00000004"),
        (CUT, f"{CUT}/step-00000004"),
        (f"{CUT}/step-00000003", f"{CUT}/step-00000003"),
    ],
)
def test_a_run_a_stage_a_checkpoint_or_a_final_folder(here: Path, text: str, path: str) -> None:
    assert find_origin(text).path == Path(path)
    assert find_origin(str(here / path)).path == here / path


def test_a_folder_is_recognised_by_its_content(here: Path) -> None:
    for old, new in (
        (f"{CUT}/step-00000003", "best é"),
        ("runs/done/stage1/final", "my model"),
        ("runs/done", "elsewhere"),
    ):
        shutil.copytree(old, new)
        origin = find_origin(new)
        assert origin.path.parts[0] == new
        assert origin.load().connector.weight.shape == (64, 64)


def test_the_newest_checkpoint_of_an_unfinished_stage_is_said(here: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    find_origin("cut")
    assert caplog.messages == ["--from cut: stage 1, the newest checkpoint, of step 4"]


def test_a_checkpoint_has_the_weights_of_that_step(here: Path) -> None:
    vlm = find_origin(f"{CUT}/step-00000004").load()
    final, _, _ = load_final(Path("runs/done/stage1/final"))  # the same training
    for (name, value), other in zip(vlm.named_parameters(), final.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_a_run_from_a_checkpoint_outlives_it(here: Path) -> None:
    """Its own folder has a copy, for --resume and for other runs that start from its checkpoints."""
    words = ["--run", "next", "--from", "cut", "--no-train-llm"]
    folder = train(*words)
    shutil.rmtree("runs/cut")
    shutil.rmtree(folder / "final")
    assert run.main([*BASE, "--features", "cache", "--max-steps", "2", *words, "--resume"]) == 0
    shutil.copytree(folder / "checkpoints" / "step-00000002", "copy")
    again = find_origin("copy").load()
    expected, _, _ = load_final(folder / "final")
    for (name, value), other in zip(again.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(value, other), name
    # Moved with its run, it is found by the relative path.
    shutil.move("runs", "moved")
    assert find_origin("moved/next/stage1/checkpoints/step-00000002").language.startswith("moved")
    shutil.rmtree("moved/next/stage1/start")
    with pytest.raises(UserError, match=r"started from is not at .*stage1/start any more"):
        find_origin("copy").load()


def test_stage_2_from_a_checkpoint_of_stage_1_and_stage_1_again(here: Path) -> None:
    for stage in ("1", "2"):
        folder = train("--run", f"from-{stage}", "--stage", stage, "--from", "cut")
        assert (folder / "final" / META).is_file()


def test_no_model_of_an_absent_run() -> None:
    assert recorded(None, Path("x")) is None


def empty(place: Path) -> str:
    place.mkdir()
    return "no model in it (there: nothing)"


def missing(place: Path) -> str:
    return "no run odd (looked in odd and runs/odd); nearest: od; there are the runs cut, done, od"


def language_model(place: Path) -> str:
    place.mkdir()
    for name in ("config.json", "model.safetensors"):
        (place / name).write_text("{}")
    return "a language model, not a run of ours (give it as --llm odd)"


def feature_cache(place: Path) -> str:
    shutil.copytree("cache", place)
    return "a feature cache, not a run (give it as --features odd)"


def file(place: Path) -> str:
    place.write_text("x")
    return "a file, not a folder"


def half_a_checkpoint(place: Path) -> str:
    shutil.copytree(f"{CUT}/step-00000003", place)
    (place / checkpoint.COMMITTED).unlink()
    return "a checkpoint or a model that was not written to its end"


def begun(place: Path) -> str:
    shutil.copytree("runs/cut", place)
    shutil.rmtree(place / "stage1" / "checkpoints")
    return "a run without a whole checkpoint, so nothing that it learned was saved"


def only_diverged(place: Path) -> str:
    shutil.copytree("runs/cut", place)
    for path in checkpoint.committed(place / "stage1" / "checkpoints"):
        checkpoint.set_aside(path)
    return "a run without a whole checkpoint, so nothing that it learned was saved"


def other_version(place: Path) -> str:
    shutil.copytree(f"{CUT}/step-00000003", place)
    (place / checkpoint.STATE).write_text('{"step": 3, "samples_digest": ""}')
    return "state.json: has no llm, connector, space"


def broken_json(place: Path) -> str:
    shutil.copytree(f"{CUT}/step-00000003", place)
    (place / checkpoint.STATE).write_text('{"step": 3')
    return "state.json: cannot be read"


def pictures(place: Path) -> str:
    shutil.copytree("images", place)
    return "no model in it (there: 0.png, 1.png, 10.png, 11.png, 12.png, 13.png and 14 more)"


@pytest.mark.parametrize(
    "make",
    [
        *(empty, missing, language_model, feature_cache, file, half_a_checkpoint, begun),
        *(only_diverged, other_version, broken_json, pictures),
    ],
)
def test_anything_else_is_named(here: Path, make: Callable[[Path], str]) -> None:
    if make is missing:
        shutil.copytree("runs/done", "runs/od")
    found = make(Path("odd"))
    with pytest.raises(UserError) as refused:
        train("--run", "new", "--from", "odd")
    assert found in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not Path("runs/new").exists()


def test_the_file_of_a_model_leads_to_its_folder(here: Path) -> None:
    with pytest.raises(
        UserError, match=r"a file, not a folder; the model is its folder, .*step-00000003"
    ):
        find_origin(f"{CUT}/step-00000003/model.safetensors")


def test_a_checkpoint_that_is_not_there_names_the_others(here: Path) -> None:
    with pytest.raises(UserError, match="there are step-00000003, step-00000004"):
        find_origin(f"{CUT}/step-00000001")


def test_a_cut_checkpoint_is_refused(here: Path) -> None:
    path = Path(CUT) / "step-00000003" / checkpoint.MODEL
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="bytes, should be"):
        train("--run", "new", "--from", f"{CUT}/step-00000003")
    assert not Path("runs/new").exists()
