"""report.html: the lines, test drawings with their answers, and who made what."""

from __future__ import annotations

import itertools
import json
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cache.store.files import write_atomic
from cache.view import page
from cache.view.thumbnails import png
from tests.proof.drawings import TEST_ARTIST
from tests.proof.packages import PACKAGES
from tests.proof.work import HERE, Line, Work

SHOWN = 48
"""Test drawings on the page, every n-th of all."""
SIDE = 112
"""Pixels of a drawing on the page."""


def write(work: Work, lines: Sequence[Line]) -> Path:
    """Write the report of all steps; return its file."""
    output = work.folder / "report.html"
    counted = [line for line in lines if line.required]
    short = sum(line.verdict == "short" for line in counted)
    html = page.render(
        HERE / "report.html",
        title="The proof with real models",
        summary=f"{len(counted) - short} of {len(counted)} figures are as required; {short} fall short.",
        figures=figures(work),
        lines=[(one.name, one.measured, one.required, one.verdict) for one in lines],
        seconds=[(name, f"{seconds:,.0f} s") for name, seconds in durations(work)],
        shown=examples(work),
        credits=[
            (f"{p.name} {p.version}", p.gives, p.credit, p.licence, f"{p.size / 1e6:,.1f} MB")
            for name, p in PACKAGES.items()
            if name in _used(work)
        ],
        recipe=json.dumps(work.recipe, indent=1),
    )
    write_atomic(output, html.encode())
    return output


def figures(work: Work) -> list[tuple[str, str, str]]:
    """Return the large figures at the top: value, label, note."""
    found = _read(work, "prepare")
    counts = found["counts"]
    total = sum(seconds for _, seconds in durations(work))
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {version('torch')}"
    return [
        (f"{found['concepts']:,}", "concepts", f"of {found['kinds']} subcategories"),
        (f"{counts['train']:,}", "drawings to train on", ", ".join(work.recipe["artists"])),
        (f"{counts['test']:,}", "drawings to test on", TEST_ARTIST),
        (f"{total / 60:,.0f} min", time.strftime("%Y-%m-%d", time.gmtime()), machine),
    ]


def durations(work: Work) -> list[tuple[str, float]]:
    """Return the seconds of each step, in the order in which they ended."""
    files = [path for path in work.folder.glob("*.json") if path.name != "recipe.json"]
    found = [
        (path.stem, json.loads(path.read_text(encoding="utf-8")).get("seconds_of_step"))
        for path in sorted(files, key=lambda path: path.stat().st_mtime)
    ]
    return [(name, seconds) for name, seconds in found if seconds and "paired-" not in name]


def examples(work: Work) -> list[dict[str, Any]]:
    """Return test drawings with the questions about them."""
    answers = _read(work, "scores")["answers"]
    by_image = itertools.groupby(sorted(answers, key=_image), key=_image)
    groups = [(image, list(about)) for image, about in by_image]
    every = max(1, len(groups) // SHOWN)
    return [{"uri": _thumbnail(Path(image)), "answers": about} for image, about in groups[::every]][
        :SHOWN
    ]


def _image(answer: dict[str, Any]) -> str:
    return str(answer["media"][0])


def _thumbnail(path: Path) -> str:
    with Image.open(path) as image:
        return png(np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)))


def _read(work: Work, step: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((work.folder / f"{step}.json").read_text(encoding="utf-8"))
    return found


def _used(work: Work) -> tuple[str, ...]:
    return ("names", TEST_ARTIST, *work.recipe["artists"], "tower", "language", "book")
