"""The pictures and questions of the proof: emoji of one artist for testing, of others for training.

    concepts = read_concepts(names, icons)           # 857 of them, or some
    write_drawings(folder, concepts, icons, ...)     # PNG files, and LLaVA records beside them

A concept is one emoji: its name, its subcategory, and one drawing by each artist. Variants (turned, mirrored,
smaller, grey) are files of their own, as an encoder that runs once sees only files.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageEnhance, ImageOps

CATEGORIES = ("Animals & Nature", "Food & Drink", "Travel & Places", "Objects", "Activities")
"""Of emoji.json; faces, people, flags and symbols are left out."""
TEST_ARTIST = "twemoji"
NAME, KIND = "What is this?", "What kind of thing is it?"
"""The two questions."""
SIDE = 224
"""Pixels of a drawing: what the tower sees."""
VALIDATION = 10
"""Every tenth drawing of the test artist or so is for choosing the recipe; the others are opened once."""


@dataclass(frozen=True)
class Concept:
    """One emoji."""

    code: str
    """Its code points, lower case hex with `-` between."""
    name: str
    kind: str
    """Its subcategory."""
    icons: Mapping[str, str]
    """Artist -> name of the drawing in the artist's package."""

    @property
    def is_validation(self) -> bool:
        """Whether the test artist's drawing is for validation: by its code, so never by the size of a run."""
        return int(self.code.split("-")[0], 16) * 2654435761 % 2**32 < 2**32 // VALIDATION


def read_concepts(emoji: Sequence[Mapping[str, Any]], packages: Mapping[str, Any]) -> list[Concept]:
    """Return the concepts that every package with code points has, in emoji.json's own order.

    Args:
        emoji: emoji.json.
        packages: artist -> {"icons": icons.json, "chars": chars.json}. An artist without `chars` is
            matched by name and may lack concepts.
    """
    plain = {
        artist: {code.replace("-fe0f", ""): name for code, name in package["chars"].items()}
        for artist, package in packages.items()
    }
    by_name = {artist: _normal_names(package["icons"]) for artist, package in packages.items()}
    concepts: dict[str, Concept] = {}
    for entry in sorted(emoji, key=lambda entry: entry["sort_order"]):
        code = entry["unified"].lower().replace("-fe0f", "")
        if entry["category"] not in CATEGORIES or code not in plain[TEST_ARTIST]:
            continue
        called = [plain[TEST_ARTIST][code], *entry["short_names"], entry["name"]]
        icons = {}
        for artist, codes in plain.items():
            if codes:
                found = codes.get(code)
            else:
                found = next(filter(None, (by_name[artist].get(_normal(c)) for c in called)), None)
            if found is not None:
                icons[artist] = found
        name = plain_name(entry["short_name"])
        if name not in concepts:
            concepts[name] = Concept(code, name, plain_name(entry["subcategory"]), icons)
    return list(concepts.values())


def plain_name(text: str) -> str:
    """Return `mountain_railway` as `mountain railway`, `animal-bird` as `animal bird`."""
    return re.sub(r"[_-]+", " ", text).strip()


def _normal(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _normal_names(icons: Mapping[str, Any]) -> dict[str, str]:
    return {_normal(name): name for name in [*icons["icons"], *icons.get("aliases", {})]}


def svg(icons: Mapping[str, Any], name: str) -> str:
    """Return one icon of an icons.json as a square SVG document."""
    while name not in icons["icons"]:
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    size = [icon.get(side, icons.get(side, 16)) for side in ("width", "height")]
    longer = max(size)
    start = [
        icon.get(name, 0) - (longer - length) / 2
        for name, length in zip(("left", "top"), size, strict=True)
    ]
    box = " ".join(map(str, (*start, longer, longer)))
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'


def render(document: str, side: int = SIDE) -> Image.Image:
    """Return an SVG document as an RGB image on white."""
    import resvg_py  # of the extra `proof`; the rest of this file does without it

    png = resvg_py.svg_to_bytes(svg_string=document, width=side, height=side, background="white")
    return Image.open(io.BytesIO(bytes(png))).convert("RGB")


# ---- variants


def variant(image: Image.Image, number: int) -> Image.Image:
    """Return a variant of a drawing; 0 is the drawing itself."""
    mirrored, degrees, scale, grey = VARIANTS[number]
    if mirrored:
        image = ImageOps.mirror(image)
    if grey:
        image = ImageEnhance.Color(image).enhance(0.0)
    if degrees or scale != 1:
        side = round(SIDE * scale)
        small = image.resize((side, side), Image.Resampling.LANCZOS)
        place = Image.new("RGB", (SIDE, SIDE), "white")
        place.paste(small, ((SIDE - side) // 2, (SIDE - side) // 2))
        image = place.rotate(degrees, Image.Resampling.BICUBIC, fillcolor="white")
    return image


VARIANTS = (
    (False, 0, 1.0, False),
    (True, 8, 0.85, False),
    (False, -12, 0.9, False),
    (True, 0, 1.0, True),
    (False, 15, 0.75, False),
    (True, -6, 0.95, False),
)
"""(mirrored, turned by degrees, scaled, grey)."""


# ---- files


def record(image: str, concept: Concept) -> list[dict[str, Any]]:
    """Return the LLaVA records of one drawing: a question each."""
    return [
        {
            "image": image,
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": answer},
            ],
        }
        for question, answer in ((NAME, concept.name), (KIND, concept.kind))
    ]


def write_drawings(
    folder: Path,
    concepts: Sequence[Concept],
    packages: Mapping[str, Any],
    artists: Sequence[str],
    variants: int,
) -> dict[str, int]:
    """Write drawings as PNG and train.json, validation.json and test.json; return the drawings of each.

    Files that exist are kept: the same arguments write the same bytes.
    """
    records: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    counts = dict.fromkeys(records, 0)
    for artist in (*artists, TEST_ARTIST):
        is_test = artist == TEST_ARTIST
        (folder / artist).mkdir(parents=True, exist_ok=True)
        for concept in concepts:
            if artist not in concept.icons:
                continue
            paths = [
                folder / artist / f"{concept.code}-{number}.png"
                for number in range(1 if is_test else variants)
            ]
            if not all(path.exists() for path in paths):
                drawn = render(svg(packages[artist]["icons"], concept.icons[artist]))
                for number, path in enumerate(paths):
                    variant(drawn, number).save(path)
            split = ("validation" if concept.is_validation else "test") if is_test else "train"
            counts[split] += len(paths)
            for path in paths:
                records[split] += record(str(path.relative_to(folder)), concept)
    for split, lines in records.items():
        text = json.dumps(lines, indent=0, ensure_ascii=False)
        (folder / f"{split}.json").write_text(text + "\n", encoding="utf-8")
    return counts
