"""The table of presets in TRAINING_PIPELINE has the estimates that the code computes.

When an estimate changes, the failing test prints the row as it has to be.
"""

from __future__ import annotations

import re

import pytest

import configs
from configs.hardware import card_of, gpus_of
from model.verify.tables import MODELS, all_settings, estimate_text, how_text, known_sizes, step_of
from tests.support import ROOT

GUIDE = (ROOT / "docs" / "TRAINING_PIPELINE.md").read_text()
ROWS = re.findall(r"^\| [^|]+ \| `(\w+)` \|.*$", GUIDE, re.MULTILINE)


def wanted_row(name: str) -> str:
    """Return the row of a preset: its machine, how it saves memory, and GiB of the stages for each model."""
    card, gpus = card_of(name), gpus_of(name)
    machine = "no GPU"
    if card is not None:
        machine = f"{gpus or 1} × {card.name} ({card.gib} GB)"
    stages = configs.load("train")["stages"]
    how = {how_text(step_of(s, preset)) for _, preset, s in all_settings() if preset == name}
    cells = [
        " / ".join(estimate_text(known_sizes(source, "linear", 1024), n, name) for n in stages)
        for source in MODELS.values()
    ]
    if card is None:  # whether it fits depends on this machine
        cells = [cell.replace("(", "").replace(")", "") for cell in cells]
    return f"| {machine} | `{name}` | {', '.join(how)} | {' | '.join(cells)} |"


@pytest.mark.parametrize("name", list(configs.load("train")["hardware"]))
def test_the_table_has_the_estimates_of_the_code(name: str) -> None:
    assert wanted_row(name) in GUIDE.splitlines()


def test_the_table_has_every_preset_and_says_that_it_estimates() -> None:
    assert list(configs.load("train")["hardware"]) == ROWS
    section = GUIDE.split("### Which preset for which machine")[1].split("\n## ")[0]
    assert "estimate" in section
    assert [f" {model} " in section for model in MODELS] == [True] * len(MODELS)
