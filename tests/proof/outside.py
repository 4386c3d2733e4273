"""The trained model out of the house: exported, and asked in an environment that has nothing of ours."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from cache.format.spec import FeatureSpec
from cache.store.files import write_atomic
from model.inference import answer
from model.io.runs import find_run, read_meta
from model.io.saved_model import load_final
from model.vision.encoder import rebuild_encoder
from tests.proof import training
from tests.proof.work import HERE, Line, Work, as_json
from train.evaluate.questions import Question

PACKAGES = ("torch", "torchvision", "transformers", "pillow")
"""What the clean environment has, in the versions of ours."""


def leave(work: Work, space: str, environment: Path) -> dict[str, Any]:
    """Export the main run, ask it in a clean environment, and compare with our answers in float32.

    Both run the tower, so that only the export is compared. Our answers from stored features are a line of
    their own: rounding to float16 may turn one whose two likeliest tokens are nearly alike.
    """
    exported = work.folder / "exported"
    shutil.rmtree(exported, ignore_errors=True)
    work.run("model.export", {"run": work.folder / training.MAIN, "out": exported})
    about, stored = training.ask(work, space, fast=False)
    ours = live_answers(work, about)
    asked = [
        {
            "image": one.sample.media[0].source,
            "question": one.prompt[-1][1].removeprefix("<image>").strip(),
        }
        for one in about
    ]
    place = work.folder / "outside"
    place.mkdir(exist_ok=True)
    write_atomic(place / "questions.json", json.dumps(asked).encode())
    shutil.copyfile(HERE / "ask.py", place / "ask.py")
    python = clean_environment(environment)
    words = [
        python.absolute(),
        "-I",
        "ask.py",
        exported.resolve(),
        "questions.json",
        "answers.json",
    ]
    print(f"\n$ {' '.join(map(str, words))}", flush=True)
    subprocess.run(words, cwd=place, check=True)
    theirs = json.loads((place / "answers.json").read_text(encoding="utf-8"))
    lines = [
        Line(
            "exported: answers of ask.py without our package equal ours",
            f"{equal(ours, theirs)} of {len(ours)}",
            "all",
            equal(ours, theirs) == len(ours),
        ),
        Line("equal to ours from stored features", f"{equal(stored, theirs)} of {len(ours)}", ""),
    ]
    different = [
        {**question, "live": live, "stored": ours_stored, "theirs": told}
        for question, live, ours_stored, told in zip(asked, ours, stored, theirs, strict=True)
        if len({live.strip(), ours_stored.strip(), told.strip()}) > 1
    ]
    return {"lines": [as_json(line) for line in lines], "different": different}


def live_answers(work: Work, about: Sequence[Question]) -> list[str]:
    """Return our answers about drawings, each encoded again, without rounding its features."""
    folder = find_run(str(work.folder / training.MAIN), None)
    space = read_meta(folder)["space"]
    encoder = rebuild_encoder(space["load"], FeatureSpec.from_json(space["spec"]), device="cpu")
    drawings = list(dict.fromkeys(one.sample.media[0].source for one in about))
    decoded = [encoder.decode(Path(drawing).read_bytes()) for drawing in drawings]
    features = encoder.encode(np.stack([encoder.prepare(image) for image in decoded]))
    of = dict(zip(drawings, features, strict=True))
    vlm, tokenizer, _ = load_final(folder)
    prompts = [(one.prompt, [of[one.sample.media[0].source]]) for one in about]
    return answer(vlm, tokenizer, prompts, max_new_tokens=training.LONGEST)


def equal(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """Return how many answers are equal."""
    return sum(a.strip() == b.strip() for a, b in zip(ours, theirs, strict=True))


def clean_environment(folder: Path) -> Path:
    """Return the Python of an environment with PACKAGES and nothing of ours; make it unless it is there."""
    python = folder / "bin" / "python"
    wanted = [f"{name}=={version(name)}" for name in PACKAGES]
    mark = folder / "proof.json"
    if not mark.exists() or json.loads(mark.read_text(encoding="utf-8")) != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        print(f"\n$ python -m venv {folder} && pip install {' '.join(wanted)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        # Most modules are never imported, so none is compiled beforehand.
        words = [python, "-m", "pip", "install", "--quiet", "--no-compile", *wanted]
        subprocess.run(words, check=True)
        write_atomic(mark, json.dumps(wanted).encode())
    return python
