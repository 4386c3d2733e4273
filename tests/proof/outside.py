"""The trained model out of the house: exported, and asked in an environment that has nothing of ours."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cache.store.files import write_atomic
from tests.proof import training
from tests.proof.work import HERE, Line, Work, as_json

PACKAGES = ("torch", "torchvision", "transformers", "pillow")
"""What the clean environment has, in the versions of ours."""


def leave(work: Work, space: str, environment: Path) -> dict[str, Any]:
    """Export the main run, ask it in a clean environment, and compare with our answers in float32."""
    exported = work.folder / "exported"
    shutil.rmtree(exported, ignore_errors=True)
    work.run("model.export", {"run": work.folder / training.MAIN, "out": exported})
    about, ours = training.ask(work, space, fast=False)
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
    same = sum(a.strip() == b.strip() for a, b in zip(ours, theirs, strict=True))
    line = Line(
        "exported: answers of ask.py without our package equal ours",
        f"{same} of {len(ours)}",
        "all",
        same == len(ours),
    )
    different = [
        {**q, "ours": a, "theirs": b}
        for q, a, b in zip(asked, ours, theirs, strict=True)
        if a.strip() != b.strip()
    ]
    return {"lines": [as_json(line)], "different": different}


def clean_environment(folder: Path) -> Path:
    """Return the Python of an environment with PACKAGES and nothing of ours; make it unless it is there."""
    python = folder / "bin" / "python"
    wanted = [f"{name}=={version(name)}" for name in PACKAGES]
    mark = folder / "proof.json"
    if not mark.exists() or json.loads(mark.read_text(encoding="utf-8")) != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        print(f"\n$ python -m venv {folder} && pip install {' '.join(wanted)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
        write_atomic(mark, json.dumps(wanted).encode())
    return python
