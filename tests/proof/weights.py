"""Packages to model folders of transformers: the tower from ONNX, the language model from GGUF."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 224


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
        if node.op_type == "MatMul" and node.input[1] in held and node.name.startswith("/backbone/"):
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul")
            name = layer.replace("/", ".") + ".weight"
            tensors[_once(name)] = torch.from_numpy(held[node.input[1]].T.copy())
    positions = next(v for k, v in held.items() if v.shape == (1, 1369, 384))
    first = next(v for k, v in held.items() if k.startswith("onnx::Concat") and v.shape == (1, 1, 384))
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
    return ".".join(p for i, p in enumerate(parts) if i == 0 or p != parts[i - 1] or p == "attention")


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
    outputs = [n.output[0] for n in graph.graph.node if n.name.startswith(last.name.rpartition("/")[0])]
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
