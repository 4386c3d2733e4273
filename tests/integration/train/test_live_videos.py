"""`model.generate` gives the model the same features of a video file as training reads from the cache.

python -m model.generate --run demo --video a.mp4 --prompt "What happens?"
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from cache.format.frame_sampling import sample_times
from cache.store.ledger import read_media
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.space import find_space
from configs import UserError
from encode import run as encode_run
from model.generate import __main__ as generate
from model.generate import live
from model.generate.live import live_video, order_media
from model.generate.options import Options
from model.inference import answer
from model.io.saved_model import load_final, save_final
from model.media.video_index import probe
from model.vision.encoder import rebuild_encoder
from model.vlm import build_vlm
from tests.support.videos import make_video
from train.data.features import read_features
from train.data.join import join
from train.data.sample_list import SampleList

LIMIT = 5
"""Largest number of frames of a video."""


@dataclass(frozen=True)
class Live:
    """A cache of video and image files, and an untrained model whose answers depend on them."""

    folder: Path
    model: Path
    features: Path

    @property
    def joined(self) -> SampleList:
        names = {"demo-videos": None, "demo-captions": None}
        return join(
            CacheRoot(self.features),
            self.reader,
            names,
            split="train",
            held_out=0.0,
            min_coverage=1.0,
            max_frames=LIMIT,
        )

    @property
    def reader(self) -> FeatureReader:
        return FeatureReader(find_space(CacheRoot(self.features), None))

    def features_of(self, path: Path, limit: int) -> live.Video:
        """Return the features of a video file, as `model.generate` computes them."""
        reader = self.reader
        encoder = rebuild_encoder(reader.load, reader.spec, device="cpu")
        space = json.loads(reader.paths.space_json.read_text())
        return live_video(encoder, space, path, probe(path), limit)

    def source(self, joined: SampleList, media: int) -> Path:
        ledger = read_media(CacheRoot(self.features)).values()
        return Path(next(r.source for r in ledger if r.key == joined.key(media)))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Live:
    folder = tmp_path_factory.mktemp("live-videos")
    features = folder / "cache"
    command = ["--dataset", "demo-videos", "demo-captions", "--encoder", "demo", "--limit", "6"]
    command += ["--max-frames", str(LIMIT), "--features", str(features), "--workers", "0"]
    assert encode_run.main(command) == 0
    reader = FeatureReader(find_space(CacheRoot(features), None))
    vlm, tokenizer = build_vlm(reader.spec.width, "random:qwen3-tiny", "linear", seed=6)
    generator = torch.Generator().manual_seed(11)
    for p in vlm.language.parameters():
        p.data += (0.3 if p.dim() == 1 else 0.1) * torch.randn(p.shape, generator=generator)
    # The connector removes what frames have in common and enlarges the rest; otherwise all answers are equal.
    views = [
        (key, "t:0") for key in {r.key for r in read_media(CacheRoot(features)).values()} if key
    ]
    seen = [reader.read("frame", *v) for v in views if reader.contains("frame", *v)]
    vlm.connector.weight.data *= 20
    common = torch.from_numpy(np.concatenate(seen).astype(np.float32).mean(0))
    vlm.connector.bias.data = -vlm.connector.weight.data @ common
    space = json.loads(reader.paths.space_json.read_text())
    meta = {"connector": "linear", "llm": "x", "space": space, "stage": 1, "step": 0}
    save_final(folder / "run/stage1/final", vlm, tokenizer, meta | {"max_frames": LIMIT})
    return Live(folder, folder / "run/stage1/final", features)


def test_features_of_a_video_file_equal_those_in_the_cache(world: Live) -> None:
    """Frames, times and features are equal bit for bit."""
    joined, reader = world.joined, world.reader
    videos = [m for m in range(len(joined.kinds)) if joined.is_video(m)]
    assert len(videos) >= 2
    for m in videos:
        found = world.features_of(world.source(joined, m), LIMIT)
        (cached,) = read_features(joined, [m], reader)
        assert not isinstance(cached, torch.Tensor)
        assert list(found.times_s) == list(cached.times_s)
        assert torch.equal(found.features, cached.features)


def test_answers_about_video_files_equal_those_from_the_cache(
    world: Live, capsys: pytest.CaptureFixture[str]
) -> None:
    joined, reader = world.joined, world.reader
    vlm, tokenizer, _ = load_final(world.model)
    video = next(m for m in range(len(joined.kinds)) if joined.is_video(m))
    other = next(m for m in range(video + 1, len(joined.kinds)) if joined.is_video(m))
    image = next(m for m in range(len(joined.kinds)) if not joined.is_video(m))
    files = {m: str(world.source(joined, m)) for m in (video, other, image)}
    both = ["--video", files[video], "--image", files[image]]
    said = set()
    for words, prompt, order in (
        (["--video", files[video]], "what?", [video]),
        (["--video", files[other]], "what?", [other]),
        (["--video", files[video], files[other]], "<video> or <video>?", [video, other]),
        (both, "In <video> see <image>?", [video, image]),
        (both, "see?", [image, video]),
    ):
        capsys.readouterr()
        command = ["--run", str(world.model), "--max-new-tokens", "12", "--prompt", prompt]
        assert generate.main([*command, *words]) == 0
        asked = prompt.replace("<video>", "<image>")
        features = read_features(joined, order, reader)
        wanted = answer(vlm, tokenizer, [([("user", asked, 1.0)], features)], max_new_tokens=12)
        out, err = capsys.readouterr()
        assert (out, err) == (wanted[0] + "\n", "")
        said.add(out)
    assert len(said) >= 4, "the answer depends on videos, their order and their place"


def test_frames_are_those_of_training(world: Live, tmp_path: Path) -> None:
    """A real container, with few and with many frames; each frame is used once."""
    path = make_video(tmp_path / "video.mp4", frames=30, fps=Fraction(10))
    few = world.features_of(path, 3)
    assert list(few.times_s) == pytest.approx([0.0, 1.4, 2.9], abs=0.051)
    many = world.features_of(path, 128)
    assert list(many.times_s) == pytest.approx([us / 1e6 for us in sample_times(2.9, 128)])
    short = make_video(tmp_path / "short.mp4", frames=2, times_ms=[0, 980])
    assert len(sample_times(probe(short).duration_s, 128)) == 3  # 0, 0.5, 0.98
    found = world.features_of(short, 128)
    assert list(found.times_s) == [0.0, 0.98]
    assert len(found.features) == 2
    assert np.isfinite(found.features.numpy()).all()


def test_media_are_ordered_by_their_placeholders() -> None:
    images = [torch.zeros(1, 1), torch.ones(1, 1)]
    videos = [live.Video(times_s=[0.0], features=torch.full((1, 1, 1), float(i))) for i in (2, 3)]
    files = {"image": (Path("a"), Path("b")), "video": (Path("c"), Path("d"))}
    options = Options(prompt="<video>x<image> <image><video>", **files)
    assert order_media(options, [*images, *videos]) == [videos[0], *images, videos[1]]
    # Marks of other kinds than the files, or none: the order given.
    for prompt in ("<video><video><video><image>", "<image>" * 4, "what?"):
        assert order_media(Options(prompt=prompt, **files), [*images, *videos]) == [
            *images,
            *videos,
        ]
    either = Options(prompt="<video> or <image>", image=files["image"])
    assert order_media(either, images) == images
    assert order_media(Options(prompt="a <video> and <image> word"), []) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--video", "nowhere.mp4", "--prompt", "x"], r"nowhere\.mp4: cannot be read: No such"),
        (["--video", "a.mp4", "--prompt", "<image><video>?"], "0 --image .* but 2 marks"),
        (
            ["--video", "a", "b", "--prompt", "<video>?"],
            "0 --image and 2 --video but 1 marks",
        ),
        (["--video", "a", "--prompt", "x", "--max-frames", "0"], "max_frames 0 is below 1"),
        (["--video", __file__, "--prompt", "x"], r"\.py: .*; give an intact video file"),
    ],
)
def test_mistakes_are_reported_in_one_line(world: Live, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        generate.main(["--run", str(world.model), *words])
    assert "\n" not in str(caught.value)
