"""A cache that a model can be trained on in seconds, made without an encoder.

    root = make(tmp_path)    # data set `colors`: 60 images, each with a question and a caption
    root = film(tmp_path)    # data set `films`: 40 videos, each with a question
    root = talk(tmp_path, spec, encode)    # data set `talk`: 5 photographs, two conversations about each

An image is a PNG file of one colour, and its features are that colour's code plus noise, so a model can learn
to name the colour.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from cache.format import codec
from cache.format.frame_sampling import sample_times, time_view
from cache.format.spec import FeatureSpec
from cache.maintenance.local_media import remember
from cache.store.ledger import MediaRecord, append_media
from cache.store.paths import CacheRoot
from cache.store.samples import MediaRef, Message, Sample, write_samples
from cache.store.space import Space
from cache.store.writer import ShardWriter
from model.attention.batch import PackedBatch
from model.io.saved_model import save_final
from model.media.images import decode_image
from model.vision.encoder import VisionEncoder
from model.vlm import build_vlm
from tests.support import ROOT
from tests.support.spaces import SPEC
from train.metrics import read_metrics

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "white": (240, 240, 240),
}


BASE = [
    *("--llm", "random:qwen3-tiny", "--hardware", "cpu", "--device", "cpu"),
    *("--batch-size", "8", "--learning-rate", "3e-3", "--held-out", "0.2", "--log-every", "1000"),
]
"""Options of a short run of train.run on a CPU."""


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
"""Environment of a command that runs in another folder."""


def turns(*contents: str, weight: float = 1.0) -> tuple[Message, ...]:
    """Return a conversation: the user's turns and the assistant's, one after the other."""
    return tuple(
        Message(role=("user", "assistant")[i % 2], content=text, weight=weight)
        for i, text in enumerate(contents)
    )


def spec(**changes: object) -> FeatureSpec:
    """Return a spec of 4 tokens of 64 values per image, stored as float16, with `changes`."""
    return dataclasses.replace(SPEC, **{"codec": "fp16", **changes})  # type: ignore[arg-type]


def png(color: tuple[int, int, int], number: int, side: int = 24) -> bytes:
    """Return a PNG file of one colour, with `number` in its last pixel, so that files differ."""
    rows = bytearray()
    for y in range(side):
        row = bytearray(bytes(color) * side)
        if y == side - 1:
            row[-3:] = number.to_bytes(3, "big")
        rows += b"\0" + row

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(rows))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def features(color: str, number: int) -> np.ndarray:
    """Return (4, 64) float32 features: the code of the colour in every token, plus noise by `number`."""
    noise = np.random.default_rng(number).normal(size=(4, 64)) * 0.3
    code = np.zeros(64)
    code[list(COLORS).index(color) * 8 : list(COLORS).index(color) * 8 + 8] = 3.0
    return (noise + code).astype(np.float32)


def make(
    folder: Path,
    images: int = 60,
    *,
    first: int = 0,
    dataset: str = "colors",
    answered: int = 0,
    broken: int = -1,
    tail_file: bytes | None = None,
    **changes: object,
) -> CacheRoot:
    """Make a cache below `folder`, or extend it, and encode images [first, images).

    Args:
        folder: where the cache is; if it exists, it is extended.
        images: number of images, including those of earlier calls.
        first: first image to encode.
        dataset: name of the data set.
        answered: number of images that have samples, if more than `images`.
        broken: the image whose features are NaN.
        tail_file: bytes of the tail that `changes` give the spec.
        changes: fields of the space's spec.
    """
    root = CacheRoot(folder / "cache")
    files = folder / "images"
    files.mkdir(parents=True, exist_ok=True)
    load = {"library": "none"}
    space = Space.create(root, spec(**changes), load, shard_bytes=1 << 16, tail=tail_file)
    shard = ShardWriter(space, "image", space.next_shard("image"))
    records: list[MediaRecord] = []
    for number in range(first, images):
        color = list(COLORS)[number % len(COLORS)]
        data = png(COLORS[color], number)
        path = files / f"{number}.png"
        path.write_bytes(data)
        key = hashlib.sha256(data).hexdigest()
        row = codec.pack(features(color, number), space.spec.codec)
        if number == broken:
            row = np.full(4 * 64, np.nan, np.float16).view(np.uint8)
        shard.append(key, "full", row)
        records.append(MediaRecord(source=str(path), key=key, bytes=len(data), width=24, height=24))
    shard.commit()
    space.grow("image")
    append_media(root, records, "test")
    write_samples(root, dataset, samples(files, max(images, answered), dataset))
    remember(root, [files])
    return root


def film(folder: Path, videos: int = 40, *, dataset: str = "films") -> CacheRoot:
    """Add videos of one colour to a cache below `folder`: only frame features, without files.

    The first frame of a video has features of 0, the others those of its colour. Videos last 1 to 3 seconds.
    """
    root = CacheRoot(folder / "cache")
    space = Space.create(root, spec(), {"library": "none"}, shard_bytes=1 << 16)
    shard = ShardWriter(space, "frame", space.next_shard("frame"))
    records: list[MediaRecord] = []
    asked: list[Sample] = []
    for number in range(videos):
        color = list(COLORS)[number % len(COLORS)]
        key = hashlib.sha256(f"film {number}".encode()).hexdigest()
        duration = float(1 + number // 4 % 3)
        for microseconds in sample_times(duration, 128):
            values = features(color, number)[:1] * (microseconds > 0)
            row = codec.pack(values, space.spec.codec)
            shard.append(key, time_view(microseconds), row, time_s=microseconds / 1e6)
        source = str(folder / "films" / f"{number}.mp4")
        records.append(MediaRecord(source=source, key=key, kind="video", duration_s=duration))
        media = (MediaRef(source=source, kind="video"),)
        talk = turns("Which colour is it then?", color)
        asked.append(
            Sample(id=str(number), dataset=dataset, messages=talk, media=media, task="film")
        )
    shard.commit()
    space.grow("frame")
    append_media(root, records, "films")
    write_samples(root, dataset, asked)
    return root


TALKERS = ("a cat", "two dogs, it shows", "three", "one picture of colours", "please describe it")


def photographs(folder: Path) -> list[Path]:
    """Write five images of odd shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, (width, height) in enumerate(((40, 33), (61, 20), (32, 32), (18, 70), (90, 64))):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        paths.append(folder / f"{number}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def conversations(paths: Sequence[Path]) -> list[Sample]:
    """Return two conversations about each of five images, the second one with two answers."""
    result = []
    for number, path in enumerate(paths):
        said = TALKERS[number]
        talks = (
            ("What is this?", said),
            ("<image>Describe it, please!", TALKERS[-1], "And?", said),
        )
        for which, texts in enumerate(talks):
            media = (MediaRef(source=str(path)),)
            name = f"{number}-{which}"
            result.append(Sample(id=name, dataset="talk", messages=turns(*texts), media=media))
    return result


def talk(
    folder: Path,
    encoded: FeatureSpec,
    encode: Callable[[Image.Image], Tensor],
    load: Mapping[str, object] = MappingProxyType({}),
    tail: bytes | None = None,
) -> CacheRoot:
    """Make a cache below `folder` of five photographs, with the features that a real encoder gives.

    Args:
        folder: where the cache and the images are.
        encoded: spec of the features.
        encode: RGB image -> (M, V) features.
        load: how the encoder is built, for space.json.
        tail: bytes of the tail that the spec has.
    """
    root = CacheRoot(folder / "cache")
    space = Space.create(root, encoded, dict(load), shard_bytes=1 << 20, tail=tail)
    shard = ShardWriter(space, "image", space.next_shard("image"))
    records: list[MediaRecord] = []
    paths = photographs(folder / "images")
    for path in paths:
        data = path.read_bytes()
        image = decode_image(data)
        key = hashlib.sha256(data).hexdigest()
        shard.append(key, "full", codec.pack(encode(image).float().numpy(), encoded.codec))
        size = {"width": image.width, "height": image.height}
        records.append(MediaRecord(source=str(path), key=key, bytes=len(data), **size))
    shard.commit()
    space.grow("image")
    append_media(root, records, "photographs")
    write_samples(root, "talk", conversations(paths))
    remember(root, [folder / "images"])
    return root


def samples(files: Path, images: int, dataset: str) -> list[Sample]:
    """Return a question about the colour, and a caption, for each image."""
    result: list[Sample] = []
    for number in range(images):
        color = list(COLORS)[number % len(COLORS)]
        media = (MediaRef(source=str(files / f"{number}.png")),)
        asked = {"colour": ("Which colour?", color), "caption": ("Describe.", f"all {color}")}
        result += [
            Sample(
                id=f"{number}-{task}",
                dataset=dataset,
                messages=turns(*talk),
                media=media,
                task=task,
            )
            for task, talk in asked.items()
        ]
    return result


def drawings(folder: Path, encoder: VisionEncoder) -> dict[str, Tensor]:
    """Draw three images, red.png and others; return their features (M, V) by colour, not rounded."""
    paths = []
    for i, colour in enumerate(("red", "lime", "blue")):
        image = Image.new("RGB", (150 + 40 * i, 120), "white")
        ImageDraw.Draw(image).ellipse((20 * i, 10, 60 + 30 * i, 90), fill=colour)
        paths.append(folder / f"{colour}.png")
        image.save(paths[-1])
    pixels = [encoder.prepare(decode_image(path.read_bytes())) for path in paths]
    features = encoder.encode(np.stack(pixels))
    return dict(zip((path.stem for path in paths), features, strict=True))


def answering(
    final: Path, encoder: VisionEncoder, codec: str, drawn: Mapping[str, Tensor], stage: int
) -> None:
    """Save a random model, untrained, that answers differently about each of `drawings`."""
    vlm, tokenizer = build_vlm(encoder.spec(codec).width, "random:qwen3-tiny", "linear", seed=6)
    generator = torch.Generator().manual_seed(11)
    for p in vlm.language.parameters():
        p.data += (0.3 if p.dim() == 1 else 0.1) * torch.randn(p.shape, generator=generator)
    # Remove the mean of the features and enlarge the rest, or the answers would be equal.
    common = torch.stack(list(drawn.values())).mean((0, 1))
    vlm.connector.weight.data *= 20
    vlm.connector.bias.data = -vlm.connector.weight.data @ common
    space = {"spec": encoder.spec(codec).to_json(), "load": encoder.load_info()}
    meta = {"connector": "linear", "llm": "random:qwen3-tiny", "space": space}
    save_final(final, vlm, tokenizer, meta | {"stage": stage, "step": 3})


def losses(folder: Path, name: str = "loss") -> list[float]:
    """Return the training loss, or another value, of every step of a stage that has it."""
    return [line[name] for line in read_metrics(folder) if name in line]


TRACKERS = {
    "wandb": {
        "init": "entity project dir id name notes tags config config_exclude_keys config_include_keys "
        "allow_val_change group job_type mode force reinit resume resume_from fork_from save_code "
        "tensorboard sync_tensorboard monitor_gym settings",
        "log": "data step commit",
        "finish": "exit_code",
    },
    "trackio": {
        "init": "project name group space_id server_url dataset_id bucket_id config resume settings private "
        "embed auto_log_gpu gpu_log_interval auto_log_cpu cpu_log_interval webhook_url webhook_min_level",
        "log": "metrics step",
        "finish": "",
    },
}
"""Parameters of the functions of wandb 0.31 and trackio 0.43 that we call."""


def record_tracker(
    monkeypatch: pytest.MonkeyPatch, name: str, **instead: Callable[..., object]
) -> dict[str, list[dict[str, Any]]]:
    """Put a module that records its calls in the place of a tracker; return function -> its calls.

    The functions take the parameters of the real ones. `instead` replaces some of them.
    """
    calls: dict[str, list[dict[str, Any]]] = {function: [] for function in TRACKERS[name]}
    running: ContextVar[bool] = ContextVar("running", default=False)  # as in trackio

    def function(of: str, parameters: list[str]) -> Callable[..., None]:
        def recorded(*args: object, **kwargs: object) -> None:
            assert of == "init" or running.get(), f"{name}.init() before {name}.{of}()"
            given = dict(zip(parameters, args, strict=False)) | kwargs
            assert given.keys() <= set(parameters), given
            if of == "init":
                json.dumps(given["config"])
                running.set(True)
            if of == "log":
                given["values"] = given.pop(parameters[0])
            calls[of].append(given)

        return recorded

    module = ModuleType(name)
    for of, parameters in TRACKERS[name].items():
        setattr(module, of, instead.get(of) or function(of, parameters.split()))
    monkeypatch.setitem(sys.modules, name, module)
    return calls


class Toy(nn.Module):
    """A small model with the two parts that the optimizer groups."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.connector = nn.Linear(3, width)
        self.language = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.language(self.connector(x))


# ---- one small batch

VISION = 24
"""Width of the features."""
IMAGE = 39
"""Token id at the places of features; any id that no other token has."""


def one_sample(images: int = 1, tokens: int = 3) -> PackedBatch:
    """Return one sample of 12 tokens: features from the second token on, the last four supervised."""
    ids = torch.arange(40, 52)
    ids[1 : 1 + images * tokens] = IMAGE
    weights = torch.zeros(12)
    weights[8:] = torch.tensor([1.0, 0.5, 0.5, 2.0])
    return PackedBatch.one_sample(ids, weights, IMAGE)


def random_features(count: int = 1, tokens: int = 3) -> Tensor:
    """Return the random features of some images, (count, tokens, VISION)."""
    return torch.randn(count, tokens, VISION, generator=torch.Generator().manual_seed(count))
