"""`encode.check.loss` compares a model's loss on stored rows with its loss on rows encoded now.

python -m encode.check.loss --run demo --features cache --samples 16
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from cache.store.ledger import MediaRecord, append_media, read_media
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.samples import (
    MediaRef,
    Message,
    Sample,
    dataset_names,
    read_samples,
    write_samples,
)
from cache.store.space import find_space
from configs import UserError
from encode import run as encode_run
from encode.check import loss, losses, media
from model.io.saved_model import save_final
from model.language.chat_template import tokenize_messages
from model.language.model import load_tokenizer
from model.language.tokenizer import IMAGE_TOKEN, token_id
from model.media.images import BadMediaError, DecodedImage
from model.vision.encoder import VisionEncoder
from model.vlm import build_vlm
from tests.support import trained_runs

pytestmark = pytest.mark.slow


FRAMES = 4
"""Frames of each demo video, two a second; --max-frames 5 takes all."""


@dataclass(frozen=True)
class Trained:
    """An untrained model and the cache of images and videos that it belongs to."""

    model: Path
    features: Path

    def check(self, *words: str) -> int:
        return loss.main(["--run", str(self.model), "--features", str(self.features), *words])

    def compare(self, **options: Any) -> losses.Comparison:
        return losses.compare(
            **vars(loss.Options(run=str(self.model), features=self.features, **options))
        )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Return six samples about six drawings, and six about two videos."""
    folder = tmp_path_factory.mktemp("loss")
    features = folder / "cache"
    command = ["--dataset", "demo-captions", "demo-videos", "--encoder", "demo", "--limit", "6"]
    command += ["--max-frames", "5", "--features", str(features), "--workers", "0"]
    assert encode_run.main(command) == 0
    reader = FeatureReader(find_space(CacheRoot(features), None))
    vlm, tokenizer = build_vlm(reader.spec.width, "random:qwen3-tiny", "linear", seed=0)
    space = json.loads(reader.paths.space_json.read_text())
    meta = {"connector": "linear", "llm": "x", "space": space, "stage": 1, "step": 0}
    save_final(folder / "final", vlm, tokenizer, meta | {"max_frames": 5})
    return Trained(folder / "final", features)


def test_cached_loss_is_live_loss(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert trained.check("--samples", "8") == 0
    out = capsys.readouterr().out
    assert out.startswith("8 samples: 20 of 20 rows are equal to the bit; loss before the codec's")
    assert "\ncached loss = live loss: " in out
    result = trained.compare(samples=8)
    assert result.rows == result.same_rows == 4 + 4 * FRAMES
    assert result.cached == result.live
    assert result.cached == pytest.approx(result.unrounded, rel=0.01)


def test_an_encoder_that_computes_something_else_is_detected(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def inverted(encoder: VisionEncoder, image: Image.Image) -> npt.NDArray[np.uint8]:
        pixels: npt.NDArray[np.uint8] = 255 - prepare(encoder, image)
        return pixels

    prepare = VisionEncoder.prepare
    monkeypatch.setattr(VisionEncoder, "prepare", inverted)
    monkeypatch.setattr(
        loss, "TOLERANCE", 0.0
    )  # an untrained model's loss depends little on images
    assert trained.check("--samples", "1") == 1
    out = capsys.readouterr().out
    assert "0 of 1 rows are equal" in out and "cached loss is not live loss" in out


def test_videos_with_other_frames_than_the_stored_ones_are_left_out(trained: Trained) -> None:
    result = trained.compare(samples=20, max_frames=3)
    assert (result.samples, result.rows) == (6, 6)  # the images


def test_media_from_the_web_are_left_out_and_counted(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    root = CacheRoot(trained.features)
    sample = next(iter(read_samples(root, "demo-videos")))
    url = "https://a.example/video.y4m"
    append_media(root, [replace(read_media(root)[sample.media[0].source], source=url)], "test")
    ref = MediaRef(source=url, kind="video")
    write_samples(root, "web", [replace(sample, dataset="web", media=(ref,))])
    assert trained.check("--samples", "50") == 0
    out = capsys.readouterr().out
    assert "left out 1 media: from the web, and not kept on this disk\n12 samples: " in out


def test_a_file_that_cannot_be_decoded_any_more_is_an_error(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_encoder: VisionEncoder, _data: bytes) -> DecodedImage:
        raise BadMediaError("no decoder")

    monkeypatch.setattr(VisionEncoder, "decode", refuse)
    with pytest.raises(UserError, match=r"\(.*png\): cannot be decoded any more: no decoder"):
        trained.compare(samples=2)


def test_without_any_usable_sample_the_error_says_what_to_do(trained: Trained) -> None:
    root = CacheRoot(trained.features)
    stored = {name: list(read_samples(root, name)) for name in dataset_names(root)}
    answer = Message(role="assistant", content="A cat.")  # no user turn for the image
    for messages in (
        (),
        (answer,),
        (Message(role="user", content="hm"), replace(answer, content="")),
    ):
        for name, samples in stored.items():
            write_samples(root, name, [replace(sample, messages=messages) for sample in samples])
        with pytest.raises(
            UserError, match=r"no sample has a text.*encode\.run --dataset demo-captions"
        ):
            trained.compare()
    for name, samples in stored.items():
        write_samples(root, name, samples)


def test_one_sample_is_a_batch_of_its_own() -> None:
    tokenizer = load_tokenizer("random:qwen3-tiny")
    image_id = token_id(tokenizer, IMAGE_TOKEN)
    turns = (
        Message(role="user", content="a"),
        Message(role="assistant", content="b", weight=0.5),
    )
    text = tokenize_messages(tokenizer, [(m.role, m.content, m.weight) for m in turns], 1)
    spec = trained_runs.spec()
    image = media.LoadedMedia(
        record=MediaRecord(source="a"),
        array="image",
        views=("full",),
        times_s=(),
        rows=torch.zeros(1, spec.row_bytes("image"), dtype=torch.uint8),
        pixels=np.zeros((1, 2, 2, 3), np.uint8),
    )
    assert spec.tokens("image") == 4
    sample = Sample(id="0", dataset="d", messages=turns, media=(MediaRef(source="a"),))
    batch = losses.sample_batch(tokenizer, sample, [image], spec)
    assert len(batch.input_ids) == len(text.ids) + 3
    first = int((torch.from_numpy(text.ids) == image_id).nonzero()[0])
    assert batch.image_slots.tolist() == [first, first + 1, first + 2, first + 3]
    assert tokenizer.decode(batch.targets.tolist()) == "b<|im_end|>"
    assert torch.equal(batch.input_ids[batch.loss_positions + 1], batch.targets)
    assert batch.loss_weights.tolist() == [0.5, 0.5]
    assert batch.units.tolist() == [[0, len(batch.input_ids), 0, 0]]
