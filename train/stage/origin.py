"""Find and load the model that `--from` names. A folder is recognised by its content, not by its name.

    origin = find_origin("first")               # a run below runs/, or the path of one: its newest model
    origin = find_origin("backup/best")         # a finished model or a checkpoint, under any name
    origin = find_origin("llava-1.5-7b-hf")     # somebody else's LLaVA: a folder, or a hub id
    vlm = origin.load()

A checkpoint contains the parameters that were trained. The others, the tokenizer and the sizes of the model
come from what its run started from, which its state.json names.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerFast

from cache.format.gate import fit
from configs import UserError, nearest
from model.io.llava_folder import is_llava, open_llava, other_model
from model.io.run_files import META, refuse_links
from model.io.runs import RUNS, Meta, check_template_version, read_meta
from model.io.saved_model import load_final, saved_tokenizer
from model.language.lora import check_packages
from model.language.model import load_tokenizer, max_positions, saved_positions
from model.language.records import FOLDER_TEMPLATE
from model.language.sources import local_folder
from model.tail import VisionTail
from model.vlm import VLM, build_vlm
from train.stage import checkpoint, llava
from train.stage.files import CHECKPOINTS, FINAL, RUN

log = logging.getLogger(__name__)

HUB_WAY_OUT = (
    "give a local folder: --from PATH, with config.json, tokenizer.json, model.safetensors"
)
"""End of an error about a hub id that cannot be had."""


class _State(Meta):
    """state.json of a checkpoint that is a starting point."""

    seed: int
    origin: tuple[str, str] | None


NEEDED = (
    *("llm", "connector", "space", "stage", "step", "template", "vision_width", "seed"),
    "origin",
)
"""What the state.json of a checkpoint needs to be a starting point."""
MOST_ORIGINS = 100
"""Checkpoints that started from another, one after the other. One that names itself would have no end."""
SHOWN = 6
"""Names of files that an error lists at most."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A model that a stage starts from."""

    path: Path
    """A `final` folder, the folder of a checkpoint, or a LLaVA."""
    kind: Literal["final", "checkpoint", "llava"]
    """How the folder is read."""
    meta: dict[str, Any]
    """nanomolmo2.json or state.json: `llm`, `connector`, `space`, `stage`, `step` and others. A LLaVA has no
    space, and its stage and step are 0."""

    depth: int = 0
    """Checkpoints that started from this model, one from the other, as far as it was found by them."""

    def __str__(self) -> str:
        return str(self.path)

    @property
    def base(self) -> Origin | None:
        """What the run of a checkpoint started from; None for a language model, or a whole model."""
        if self.kind != "checkpoint":
            return None
        if self.depth > MOST_ORIGINS:
            raise UserError(f"{self.path}: the models that it started from have no end")
        found = recorded(self.meta["origin"], self.path.parent.parent)
        return found and replace(found, depth=self.depth + 1)

    @property
    def language(self) -> str:
        """The folder or id with the language model's config and tokenizer."""
        if self.kind != "checkpoint":
            return str(self.path)
        return base.language if (base := self.base) else str(self.meta["llm"])

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the tokenizer, with the template that the model was trained with.

        Raises:
            UserError: it is missing or damaged.
        """
        if self.kind == "llava":
            return llava.load_tokenizer(self.path)
        if self.kind == "final":
            return saved_tokenizer(self.path, self.meta)
        return base.tokenizer() if (base := self.base) else load_tokenizer(str(self.meta["llm"]))

    def max_positions(self) -> int | None:
        """Return the longest sequence in the language model's config, tokens; None if there is none.

        Raises:
            UserError: the language model is missing or damaged.
        """
        if self.kind == "llava":
            return open_llava(self.path).max_positions
        if self.kind == "final":
            if "lora" in self.meta:
                return self.meta.get("positions")
            is_own = self.meta["template"] != FOLDER_TEMPLATE
            return max_positions(str(self.path)) if is_own else saved_positions(self.path)
        return base.max_positions() if (base := self.base) else max_positions(str(self.meta["llm"]))

    def load(self, tail: VisionTail | None = None) -> VLM:
        """Return the model with its weights, and adapters merged.

        Args:
            tail: the encoder's last blocks as encoded, for a model that starts without blocks of its own.

        Raises:
            UserError: a file is missing, damaged, or of another version or model.
        """
        if self.kind == "llava":
            vlm = llava.load(self.path)[0]
            vlm.tail = tail
            return vlm
        if self.kind == "final":
            return load_final(self.path)[0]
        if base := self.base:
            vlm = base.load(tail)
        else:
            meta = self.meta
            vlm, _ = build_vlm(meta["vision_width"], meta["llm"], meta["connector"], meta["seed"])
            vlm.tail = tail
        if "lora" not in self.meta:
            checkpoint.load_weights(self.path, vlm)
            return vlm
        check_packages(load_in_4bit=False)
        vlm.add_adapters(self.meta["lora"]["rank"], self.meta["seed"])
        checkpoint.load_weights(self.path, vlm)
        vlm.merge_adapters()
        return vlm

    def record(self, folder: Path) -> list[str]:
        """Return where the model is, for files of a stage's `folder`: the absolute and the relative path."""
        return [str(self.path.absolute()), os.path.relpath(self.path, folder)]


def recorded(record: list[str] | None, folder: Path) -> Origin | None:
    """Return the model that `Origin.record` named, for the same stage's `folder`; None for None.

    Raises:
        UserError: the model has been removed.
    """
    if record is None:
        return None
    # The absolute path first: a copied checkpoint belongs to the model that its run started from. The
    # relative one finds it when all runs have been moved together.
    for place in (Path(record[0]), folder / record[1]):
        if origin := recognise(place):
            return origin
    raise UserError(
        f"{folder}: the model that this run started from is not at {record[0]} any more; put it back there "
        "(its tokenizer and frozen parameters are needed)"
    )


def find_origin(text: str) -> Origin:
    """Return the model that `--from` names: of a run its last stage, of an unfinished stage its newest
    checkpoint.

    Args:
        text: the name of a run below runs/, the path of a run, a stage, a checkpoint or a `final` folder, or
            a LLaVA: a folder or a hub id.

    Raises:
        UserError: there is no such folder, or no model in it. The message says what is there.
    """
    places = [Path(text)]
    if len(places[0].parts) == 1:
        places.append(RUNS / text)
    for place in places:
        if origin := recognise(place):
            if origin.path != place:
                what = "the newest checkpoint, of step" if origin.kind == "checkpoint" else "step"
                log.info(
                    "--from %s: stage %s, %s %s",
                    text,
                    origin.meta["stage"],
                    what,
                    origin.meta["step"],
                )
            if origin.kind == "llava" and len(places) > 1 and places[1].exists():
                log.info("--from %s: the LLaVA in this folder, not the run %s", text, places[1])
            return origin
    present = [place for place in places if place.exists()]
    if not present and _may_be_hub_id(text):
        folder = local_folder(text, weights=True, way_out=HUB_WAY_OUT)
        if origin := recognise(folder):
            return replace(origin, meta={**origin.meta, "llm": text})
        present = [folder]
    if not present:
        names = sorted(p.name for p in RUNS.glob("*") if any(p.glob("stage*")))
        beside = [p.name for p in checkpoint.committed(places[0].parent)]
        there = f"; there are the runs {', '.join(names)}" if names else ""
        there = f"; there are {', '.join(beside)}" if beside else there
        raise UserError(
            f"--from {text}: no run {text} (looked in {' and '.join(map(str, places))})"
            f"{nearest(text, names)}{there}"
        )
    raise UserError(
        f"--from {present[0]}: {describe(present[0])}. Give a run, the folder of a stage, a checkpoint "
        f"(.../{CHECKPOINTS}/step-00001000) or a `{FINAL}` folder"
    )


def recognise(folder: Path) -> Origin | None:
    """Return the newest model in the folder of a run, a stage, a checkpoint or a finished model, if any."""
    if (folder / META).is_file():
        return Origin(path=folder, kind="final", meta=read_meta(folder))
    if (folder / checkpoint.COMMITTED).is_file():
        return Origin(path=folder, kind="checkpoint", meta=_read_state(folder))
    if (folder / FINAL / META).is_file():
        refuse_links(folder)
        return recognise(folder / FINAL)
    if is_llava(folder):
        kind = open_llava(folder).kind
        meta = {"llm": str(folder), "connector": str(kind), "space": None, "stage": 0, "step": 0}
        return Origin(path=folder, kind="llava", meta=meta)
    for parent in (folder, folder / CHECKPOINTS):
        if newest := checkpoint.newest(parent):
            if parent != folder:
                refuse_links(folder)
            return recognise(newest)
    for stage in sorted(folder.glob("stage[0-9]"), reverse=True):
        if found := recognise(stage):
            return found
    return None


def describe(place: Path) -> str:
    """Return what is at a place that has no model of ours to start from."""
    if place.is_file():
        parent = place.parent
        inside = f"; the model is its folder, {parent}" if recognise(parent) else ""
        return f"a file, not a folder{inside}"
    names = sorted(p.name for p in place.iterdir())
    if "config.json" in names and (kind := other_model(place)):
        return kind
    if "config.json" in names and any(n.endswith(".safetensors") for n in names):
        return f"a language model, not a run of ours (give it as --llm {place})"
    if "spaces" in names:
        return f"a feature cache, not a run (give it as --features {place})"
    if checkpoint.STATE in names or any(map(checkpoint.TENSORS.fullmatch, names)):
        return "a checkpoint or a model that was not written to its end"
    if any((p / RUN).is_file() for p in (place, *place.glob("stage[0-9]"))):
        return "a run without a whole checkpoint, so nothing that it learned was saved"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"no model in it (there: {', '.join(names[:SHOWN]) or 'nothing'}{more})"


def _may_be_hub_id(text: str) -> bool:
    """Whether a name without a folder may be an id of the hub: ORG/NAME, and no folder ORG is here."""
    org, slash, name = text.partition("/")
    return (
        bool(slash and org and name)
        and not re.search(r"[/~\\]|^\.", name + org)
        and not Path(org).exists()
    )


def _read_state(folder: Path) -> dict[str, Any]:
    """Return the state.json of a checkpoint.

    Raises:
        UserError: it is damaged, or of another version.
    """
    refuse_links(folder)
    path, state = folder / checkpoint.STATE, checkpoint.read_state(folder)
    if missing := [k for k in NEEDED if k not in state]:
        raise UserError(
            f"{path}: has no {', '.join(missing)}; another version of this package wrote it"
        )
    try:
        fit(state, _State)
    except ValueError as error:
        raise UserError(f"{path}: {error}; take another checkpoint") from None
    check_template_version(path, state["template"])
    return state
