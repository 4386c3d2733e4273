"""A run that somebody else made: no link, FIFO or odd value in it is followed, waited for or believed.

python -m train.evaluate --run theirs       # error: theirs/stage1/config.yaml: a link, not a file; ...
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cache.format.checksums import sealed_json
from configs import UserError
from model.export.card import find_card
from model.generate import __main__ as generate
from model.io.runs import read_meta
from model.io.saved_model import load_final
from tests.support import trained_runs
from tests.support.faults import NO_FILES, in_time, put_in_place
from tests.support.trained_runs import BASE
from train import run
from train.compare import __main__ as comparing
from train.data.sample_list import read_frozen
from train.evaluate import __main__ as evaluation
from train.evaluate.result import read
from train.evaluate.run_options import trained_with
from train.metrics import read_metrics
from train.report import __main__ as reporting
from train.stage import run_folder
from train.stage.origin import find_origin

pytestmark = pytest.mark.slow

NEWEST = "checkpoints/step-00000002"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a cache and runs/theirs, which is finished, evaluated and has checkpoints."""
    place = tmp_path_factory.mktemp("theirs")
    root = trained_runs.make(place, 20)
    words = [*BASE, "--features", str(root.path), "--max-steps", "2", "--save-every", "1"]
    assert run.main([*words, "--run", str(place / "runs" / "theirs")]) == 0
    assert reporting.main(["--run", str(place / "runs" / "theirs"), "--device", "cpu"]) == 0
    return place


@pytest.fixture
def stage(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the stage in a copy, beside which nothing may change."""
    shutil.copytree(place / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "theirs" / "stage1"


def words_of(place: Path) -> dict[str, tuple[ModuleType, list[str]]]:
    features = ["--features", str(place / "cache")]
    steps = [*BASE, *features, "--max-steps", "2", "--save-every", "1"]
    return {
        "resume": (run, [*steps, "--run", "theirs", "--resume"]),
        "from": (run, [*steps, "--run", "mine", "--from", "theirs"]),
        "evaluate": (evaluation, ["--run", "theirs", *features]),
        "report": (reporting, ["--run", "theirs", *features]),
        "compare": (comparing, ["theirs", str(place / "runs" / "theirs")]),
        "generate": (generate, ["--run", "theirs", "--prompt", "Hello"]),
    }


FILES = (
    "card.json",
    "config.yaml",
    "evaluation-val.json",
    "metrics.jsonl",
    "run.json",
    "samples.safetensors",
    "lock",
    "report.html",
    "final/connector.safetensors",
    "final/config.json",
    "final/model.safetensors",
    "final/nanomolmo2.json",
    "final/tokenizer.json",
    "checkpoints/step-00000002/COMMITTED",
    "checkpoints/step-00000002/model.safetensors",
    "checkpoints/step-00000002/optimizer.safetensors",
    "checkpoints/step-00000002/state.json",
)


@pytest.mark.parametrize("what", [what for what in NO_FILES if what != "a folder"])
@pytest.mark.parametrize("file", FILES)
def test_a_link_or_a_special_file_in_a_run_is_named(
    place: Path, stage: Path, file: str, what: str
) -> None:
    assert (stage / file).is_file()
    put_in_place(stage / file, what)
    kind = "a link" if (stage / file).is_symlink() else what
    unfinished = file == "final/nanomolmo2.json"
    for name, (module, words) in words_of(place).items():
        with in_time(), pytest.raises(UserError) as refused:
            module.main(words)
        if not unfinished or name == "resume":
            assert f"stage1/{file}: {kind}, not a file; a run has" in str(refused.value), name
        assert "\n" not in str(refused.value)


READERS: dict[str, Callable[[Path], Any]] = {
    "card.json": lambda stage: find_card(stage / "final"),
    "config.yaml": lambda stage: trained_with(stage / "final"),
    "evaluation-val.json": lambda stage: read(stage / "evaluation-val.json"),
    "metrics.jsonl": read_metrics,
    "run.json": run_folder.read_facts,
    "samples.safetensors": lambda stage: read_frozen(stage / "samples.safetensors", ("colors",)),
    "final/nanomolmo2.json": lambda stage: read_meta(stage / "final"),
    "final/config.json": lambda stage: load_final(stage / "final"),
    "final/tokenizer.json": lambda stage: load_final(stage / "final"),
    "final/connector.safetensors": lambda stage: load_final(stage / "final"),
    "final/model.safetensors": lambda stage: load_final(stage / "final"),
    f"{NEWEST}/COMMITTED": lambda stage: find_origin(str(stage / NEWEST)).load(),
    f"{NEWEST}/state.json": lambda stage: find_origin(str(stage / NEWEST)).load(),
    f"{NEWEST}/model.safetensors": lambda stage: find_origin(str(stage / NEWEST)).load(),
}
"""File -> what reads it, for any of the commands."""


@pytest.mark.parametrize("what", ["a folder", "empty", "zeros", "10 GB"])
@pytest.mark.parametrize("file", READERS)
def test_another_file_in_its_place_is_named(stage: Path, file: str, what: str) -> None:
    put_in_place(stage / file, what)
    if file == "metrics.jsonl" and what in ("empty", "zeros"):  # a line without an end
        assert read_metrics(stage) == []
        return
    with in_time(), pytest.raises(UserError) as refused:
        READERS[file](stage)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 1000


def test_links_lead_nothing_out_of_a_run(place: Path, stage: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    for file in ("metrics.jsonl", "report.html"):
        (stage / file).rename(stage / "kept")
        (stage / file).symlink_to(outside)
        for module, words in words_of(place).values():
            with pytest.raises(UserError, match="a link, not a file"):
                module.main(words)
        (stage / file).unlink()
        (stage / "kept").rename(stage / file)
    assert outside.read_text() == "mine"


def changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    values = change(values) or values
    values.pop("seal", None) if isinstance(values, dict) else None
    data = json.dumps(values).encode()
    path.write_bytes(sealed_json(values) if path.name == "nanomolmo2.json" else data)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("run.json", lambda v: [v]),
        ("run.json", lambda v: v.pop("id") and None),
        ("run.json", lambda v: v.update(id="../../x")),
        ("run.json", lambda v: v.update(origin=["a"])),
        ("run.json", lambda v: v.update(command="rm -r")),
        ("run.json", lambda v: v.update(samples={"colors": "many"})),
        ("card.json", lambda v: v.update(stages={"a": 1})),
        ("evaluation-val.json", lambda v: [1]),
        ("evaluation-val.json", lambda v: v.update(step="2")),
        (
            "final/nanomolmo2.json",
            lambda v: v.update(files={"../../../outside": {"bytes": 1, "crc32c": 1}}),
        ),
        ("final/nanomolmo2.json", lambda v: v.update(files=3)),
        ("final/nanomolmo2.json", lambda v: v.update(vision_width=1 << 40)),
        ("final/nanomolmo2.json", lambda v: v.update(vision_width="64")),
        ("final/nanomolmo2.json", lambda v: v.update(space={"name": "../x"})),
        ("final/nanomolmo2.json", lambda v: v.update(step=None)),
        ("final/nanomolmo2.json", lambda v: v.update(template=["v1"])),
        ("final/nanomolmo2.json", lambda v: v.update(template="folder-1")),
        ("final/nanomolmo2.json", lambda v: v.pop("connector") and None),
        ("final/nanomolmo2.json", lambda v: v.update(format={"a": 2})),
    ],
)
def test_values_that_we_do_not_write_end_in_one_line(
    stage: Path, file: str, change: Callable[[dict[str, Any]], Any]
) -> None:
    changed(stage / file, change)
    with in_time(), pytest.raises(UserError) as refused:
        READERS[file](stage)
    assert f"{file}: " in str(refused.value) and "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("state.json", lambda v: v.update(origin=["x", "y", "z"])),
        ("state.json", lambda v: v.update(step=-1)),
        ("state.json", lambda v: v.update(vision_width=0)),
        ("state.json", lambda v: v.pop("seed") and None),
        ("COMMITTED", lambda v: v.update({"../../../config.yaml": 3})),
        ("COMMITTED", lambda v: v.clear()),
        ("COMMITTED", lambda v: [1]),
    ],
)
def test_a_checkpoint_with_other_values_ends_in_one_line(
    stage: Path, file: str, change: Callable[[dict[str, Any]], Any]
) -> None:
    shutil.rmtree(stage / "final")
    changed(stage / "checkpoints/step-00000002" / file, change)
    with in_time(60), pytest.raises(UserError) as refused:
        find_origin("theirs").load()
    assert f"step-00000002/{file}: " in str(refused.value) and "\n" not in str(refused.value)


def test_a_checkpoint_that_started_from_itself_has_an_end(stage: Path) -> None:
    shutil.rmtree(stage / "final")
    path = stage / "checkpoints/step-00000002"
    changed(path / "state.json", lambda v: v.update(origin=[str(path), str(path)]))
    sizes = {p.name: p.stat().st_size for p in path.iterdir() if p.name != "COMMITTED"}
    (path / "COMMITTED").write_text(json.dumps(sizes))
    with in_time(60), pytest.raises(UserError, match="started from have no end"):
        find_origin("theirs").load()
