"""Write a trained model as a Hugging Face folder, and put it in its place once it is compared: `export`."""

from __future__ import annotations

import dataclasses
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from cache.format.spec import FeatureSpec
from configs.console import bytes_text
from configs.text import say
from model.export.card import decode_note, find_card, frames_note, model_card, own_class_note
from model.export.compare import (
    Comparison,
    LogitsError,
    answers_of,
    compare,
    exact_logits,
    sample_questions,
)
from model.export.folder import WEIGHTS, check_exportable, write_folder
from model.export.gguf import check_gguf, write_gguf
from model.export.mmproj import image_note, tower_note
from model.export.options import Options
from model.export.push import push
from model.export.towers import ExportedTower, export_tower, with_tail
from model.io.runs import read_meta
from model.io.saved_model import load_final
from model.language.folder_template import attached
from model.vision.encoder import rebuild_encoder
from model.vlm import VLM


def export(source: Path, options: Options) -> Comparison:
    """Write the folder, compare it with our own model, and put it in its place.

    Args:
        source: the folder `final` of the run.
        options: what to write beside it, and where.

    Raises:
        UserError: the run or the encoder's weights cannot be used, or the model is of a kind that cannot be
            exported.
        MismatchError: the exported model is not the trained one.
    """
    out = options.out
    meta = read_meta(source)
    stored = FeatureSpec.from_json(meta["space"]["spec"])
    check_exportable(stored)
    spec = stored.seen  # of what the exported tower computes, the blocks of a tail included
    if options.gguf:
        check_gguf(spec)
    card = find_card(source)
    say(f"model     {source}: stage {meta['stage']}, step {meta['step']:,}")
    if note := decode_note(spec):
        say(f"images    {note}")
    if note := frames_note(spec, card):
        say(f"videos    {note}")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.absolute().parent) as place:
        folder = Path(place) / out.name
        folder.mkdir()
        found = _write_compared(folder, source, meta, stored, card, options)
        if out.is_dir():
            out.rmdir()
        folder.rename(out)
    say(f"exported  {out}: {bytes_text(_size(out))}; its README.md says how to load it")
    if options.push is not None:
        url = push(out, options.push, public=options.public)
        say(f"pushed    {url} ({'public' if options.public else 'private'})")
    return found


def _write_compared(
    folder: Path,
    source: Path,
    meta: dict[str, Any],
    stored: FeatureSpec,
    card: dict[str, Any],
    options: Options,
) -> Comparison:
    """Write all files into `folder`; raise MismatchError unless transformers loads the trained model."""
    name, spec = options.out.absolute().name, stored.seen
    in_float32 = dataclasses.replace(stored, compute_dtype="float32")
    load = partial(
        rebuild_encoder, meta["space"]["load"], in_float32, device="cpu", weights=options.weights
    )
    encoder = load()
    tower = export_tower(encoder)
    say(f"tower     {_tower_text(spec, tower)}")
    own_class = own_class_note(spec, tower)
    if own_class:
        say(f"class     {own_class}")
    vlm, tokenizer, _ = load_final(source)
    if vlm.tail is not None:
        tower = with_tail(tower, vlm.tail)
    write_folder(folder, vlm, tokenizer, tower, spec)
    say(f"weights   {WEIGHTS}: {bytes_text((folder / WEIGHTS).stat().st_size)}, float32")
    pair = _write_pair(folder, name, vlm, tokenizer, tower, spec, options) if options.gguf else ""
    questions = sample_questions()
    say(f"comparing {len(questions)} prompts on the CPU: minutes for a large model", flush=True)
    expected = answers_of(vlm, tokenizer, encoder, spec.codec, questions)
    del vlm, encoder  # before the same weights are loaded once more
    template = attached(tokenizer)
    as_text = template is not None and template.content == "text"
    against = partial(compare, folder, questions, own_code=bool(own_class), as_text=as_text)
    try:
        found = against(expected)
    except LogitsError as error:
        say(f"comparing again in float64: in float32, {error}, which rounding alone may explain")
        vlm, tokenizer, _ = load_final(source)
        found = against(exact_logits(vlm, tokenizer, load(), questions, expected), exact=True)
    say(
        f"compared  {found.prompts} prompts: logits within {found.logits:.1e}, {found.tokens} greedy tokens "
        f"equal; the codec {spec.codec} of the cache changes logits by up to {found.rounded:.1e}"
    )
    text = model_card(name, meta, spec, tower, card, found, gguf=pair, as_text=as_text)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return found


def _write_pair(
    folder: Path,
    name: str,
    vlm: VLM,
    tokenizer: PreTrainedTokenizerFast,
    tower: ExportedTower,
    spec: FeatureSpec,
    options: Options,
) -> str:
    """Write the files for llama.cpp; return the name of that of the language model."""
    files = write_gguf(folder, name, vlm, tokenizer, tower, spec, kind=options.gguf_type)
    sizes = [f"{file.name} ({bytes_text(file.stat().st_size)})" for file in files]
    say(f"gguf      {' and '.join(sizes)}, read back equal")
    if note := tower_note(tower):
        say(f"llama.cpp {note}")
    if note := image_note(spec):
        say(f"images    {note}")
    return files[0].name


def _tower_text(spec: FeatureSpec, tower: ExportedTower) -> str:
    kind = type(tower.config).__name__.removesuffix("Config")
    return f"{spec.encoder} as {kind}, {tower.config.num_hidden_layers} blocks, features of {tower.layers}"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
