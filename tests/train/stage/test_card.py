"""card.json: what a model was trained on, written when a stage is finished.

python -m train.run --stage 1 --features cache --run first      # runs/first/stage1/card.json
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cache.store.ledger import MediaRecord, append_media
from cache.store.samples import read_samples
from model.export.card import find_card
from tests.support import trained_runs
from tests.support.trained_runs import BASE
from train import run
from train.stage.card import CARD

pytestmark = pytest.mark.slow


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a cache of 20 encoded images, 4 that failed and 2 that are not encoded yet."""
    root = trained_runs.make(tmp_path, 20, answered=26)
    sources = list(
        dict.fromkeys(s.media[0].source for s in read_samples(root, "colors") if s.media)
    )
    failures = zip(sources[20:24], ("fetch", "fetch", "fetch", "decode"), strict=True)
    records = [MediaRecord(source=s, status="failed", stage=e, error="x") for s, e in failures]
    append_media(root, records, "test")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*words: str, run_name: str = "first", stage: int = 1) -> dict[str, Any]:
    """Train two steps; return the card."""
    named = ["--run", run_name, "--stage", str(stage), "--max-steps", "2", "--min-coverage", "0.5"]
    assert run.main([*BASE, "--features", "cache", *named, *words]) == 0
    card: dict[str, Any] = json.loads(Path(f"runs/{run_name}/stage{stage}/{CARD}").read_text())
    return card


def test_a_card_has_data_sets_counts_and_failures(here: Path) -> None:
    (stage,) = train("--eval-every", "1", "--connector", "mlp")["stages"]
    assert (stage["stage"], stage["steps"], stage["connector"]) == (1, 2, "mlp")
    assert stage["llm"] == "random:qwen3-tiny"
    (colors,) = stage["data_sets"]
    per_image = colors["samples"] // 26
    assert colors["name"] == "colors" and colors["share"] is None
    assert colors["with_features"] == 20 * per_image
    assert colors["with_failed_media"] == 4 * per_image
    assert colors["without_features"] == 2 * per_image
    assert colors["failed_media"] == {"fetch": 3, "decode": 1}
    assert 0 < colors["trained_on"] < colors["with_features"], "some are held out"
    assert stage["media"] == {"images": colors["trained_on"] // per_image, "videos": 0, "frames": 0}
    assert stage["space"]["rows"]["image"] == 20
    assert stage["held_out_loss"] > 0
    text = (here / "runs/first/stage1" / CARD).read_text()
    assert str(here) not in text and "images/" not in text, "a card is published"


def test_a_later_stage_has_the_stages_before_it(here: Path) -> None:
    first = train()
    second = train(stage=2)
    assert second["stages"][:1] == first["stages"]
    assert [stage["stage"] for stage in second["stages"]] == [1, 2]
    other = train("--from", "first", run_name="other")
    assert [stage["stage"] for stage in other["stages"]] == [1, 2, 1]


def test_a_stage_from_a_model_without_a_card_says_so(here: Path) -> None:
    train("--save-every", "1")
    shutil.copytree("runs/first/stage1/final", "model")
    from_copy = train("--from", "model", run_name="copy")["stages"]
    from_checkpoint = train(
        "--from", "runs/first/stage1/checkpoints/step-00000001", run_name="checkpoint"
    )["stages"]
    for stages, step in ((from_copy, 2), (from_checkpoint, 1)):
        assert len(stages) == 2
        assert stages[0]["incomplete"] and stages[0]["step"] == step


def test_videos_and_their_frames_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_runs.film(tmp_path, 10)
    monkeypatch.chdir(tmp_path)
    (stage,) = train()["stages"]
    assert stage["media"]["images"] == 0
    assert stage["media"]["frames"] > stage["media"]["videos"] > 0


def test_export_finds_the_card_beside_the_model(here: Path) -> None:
    card = train()
    assert find_card(Path("runs/first/stage1/final")) == card
