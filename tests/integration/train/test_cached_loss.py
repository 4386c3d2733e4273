"""Training on stored features gives the losses of training with the encoder in the loop, step by step.

python -m train.run --stage 1       # cached; `LiveForward` encodes each micro-batch instead
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cache.store.ledger import MediaRecord, append_media
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.samples import MediaRef, Sample, write_samples
from cache.store.space import Space
from cache.store.writer import ShardWriter
from encode.sources.demo import questions
from encode.sources.demo_drawings import DemoWorld, draw, shapes_in
from model.language.model import load_tokenizer
from model.media.images import decode_image
from model.quantize import pack
from model.vision.config import encoder_config
from model.vision.encoder import VisionEncoder, load_encoder
from tests.support.trained_runs import losses, turns
from train.config import Options
from train.data.loader import MicroBatch
from train.data.sample_list import SampleList
from train.stage import run_folder, setup
from train.step import Forward
from train.training import train

WORLD = DemoWorld(images=24)
STEPS = 5


@dataclass(frozen=True, kw_only=True)
class LiveForward(Forward):
    """A forward pass that encodes the images of a micro-batch from their files."""

    encoder: VisionEncoder
    joined: SampleList
    files: dict[str, Path]
    """Key -> image file."""
    rounded: bool

    def features(self, micro: MicroBatch) -> torch.Tensor | None:
        media = [number for tree in micro.layouts for number in tree.media]
        images = [decode_image(self.files[self.joined.key(m)].read_bytes()) for m in media]
        pixels = [self.encoder.prepare(image)[None] for image in images]
        computed = torch.cat([self.encoder.encode(one) for one in pixels])
        return computed.half() if self.rounded else computed


def encode_all(
    folder: Path, encoder: VisionEncoder, codec: str
) -> tuple[CacheRoot, dict[str, Path]]:
    """Draw images, encode them, and write their questions as samples."""
    root = CacheRoot(folder / "cache")
    space = Space.create(root, encoder.spec(codec), encoder.load_info(), shard_bytes=1 << 20)
    shard = ShardWriter(space, "image", 0)
    files, samples = {}, []
    for number in range(WORLD.images):
        data = draw(WORLD, number)
        path = folder / f"{number}.png"
        path.write_bytes(data)
        key = hashlib.sha256(data).hexdigest()
        files[key] = path
        computed = encoder.encode(encoder.prepare(decode_image(data))[None])
        shard.append(key, "full", pack(computed, codec).rows[0].numpy())
        append_media(root, [MediaRecord(source=str(path), key=key)], "test")
        for i, (task, question, answer) in enumerate(questions(shapes_in(WORLD, number))):
            talk, media = turns(question, answer), (MediaRef(source=str(path)),)
            samples.append(
                Sample(id=f"{number}-{i}", dataset="drawn", messages=talk, media=media, task=task)
            )
    shard.commit()
    space.grow("image")
    write_samples(root, "drawn", samples)
    return root, files


@pytest.mark.parametrize(
    ("codec", "rounded", "relative"),
    [("fp16", True, 0.0), ("fp16", False, 1e-4), ("int8", False, 1e-2), ("int4", False, 0.1)],
)
def test_cached_training_equals_live_training(
    tmp_path: Path, codec: str, rounded: bool, relative: float
) -> None:
    encoder = load_encoder(encoder_config("demo", compute_dtype="float32"), device="cpu")
    root, files = encode_all(tmp_path, encoder, codec)
    reader = FeatureReader(root.space(encoder.spec(codec).name))
    options = Options(
        features=root.path,
        llm="random:qwen3-tiny",
        connector="linear",
        batch_size_per_gpu=8,
        max_sequence_length=512,
        max_tokens=512,
        max_steps=STEPS,
        warmup_steps=0,
        learning_rate=3e-3,
        eval_every=0,
        use_gradient_checkpointing=False,
    )
    cpu = torch.device("cpu")
    found = {}
    for name in ("cached", "live"):
        folder = run_folder.stage_folder(str(tmp_path / name), 1)
        vlm = setup.build_model(options, None, reader.spec, cpu)
        data = setup.load_data(options, reader, load_tokenizer("random:qwen3-tiny"), folder)
        forward = Forward(vlm=vlm, spec=reader.spec, device=cpu, autocast=None)
        if name == "live":
            forward = LiveForward(
                **vars(forward), encoder=encoder, joined=data.train, files=files, rounded=rounded
            )
        assert train(folder, options, reader, data, forward, run_id="test") == STEPS
        found[name] = losses(folder)
    assert len(found["live"]) == STEPS and found["live"][-1] < found["live"][0] - 0.1
    assert found["cached"] == pytest.approx(found["live"], rel=relative, abs=0)
