"""Answer a question about files: decode and encode them, round as the cache does, and generate.

text = generate(Options(run="demo", image=(Path("cat.png"),), prompt="How many shapes?"))
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image
from torch import Tensor

from cache.format.frame_sampling import MAX_FRAMES, sample_times
from cache.format.gate import read_regular
from cache.format.media_marks import MARK
from cache.format.spec import ARRAY_OF, FeatureSpec
from configs import UserError
from configs.text import say
from model.generate.options import Options
from model.inference import Video, answer
from model.io.device import pick_device
from model.io.runs import find_run, read_meta
from model.io.saved_model import load_final
from model.media.fit import InputFit
from model.media.images import BadMediaError, DecodedImage
from model.media.video import frames
from model.media.video_index import VideoInfo, probe
from model.quantize import pack
from model.vision.encoder import VisionEncoder, rebuild_encoder
from nanomolmo2.unpack import unpack

MAX_IMAGE_BYTES = 1 << 30
"""Bytes of an image, at most."""


class Stopwatch:
    """Prints to standard error how long each part took, if `on`."""

    def __init__(self, on: bool) -> None:
        self.on, self.since = on, time.perf_counter()

    def lap(self, what: str) -> None:
        """Print the seconds since the last lap, with a name for what was done."""
        now = time.perf_counter()
        if self.on:
            print(f"{now - self.since:7.2f} s  {what}", file=sys.stderr)
        self.since = now


def generate(options: Options) -> str:
    """Return the model's answer.

    Raises:
        UserError: the run, a file or the device cannot be used.
    """
    watch = Stopwatch(options.verbose)
    folder = find_run(options.run, options.stage)
    meta = read_meta(folder)
    media: list[Tensor | Video] = []
    if options.image or options.video:
        images, videos = [], []
        spec = FeatureSpec.from_json(meta["space"]["spec"])
        for path in options.image:
            with _user_errors(path, "JPEG, PNG, WebP, GIF, BMP or TIFF"):
                decoded = InputFit.of(spec).decode(read_regular(path, most=MAX_IMAGE_BYTES))
                images.append(decoded)
                _tell(path, decoded.note)
        for path in options.video:
            with _user_errors(path, "video file"):
                videos.append((path, info := probe(path)))
                _tell(path, info.note)
        encoder = rebuild_encoder(
            meta["space"]["load"],
            spec,
            device=options.device,
            weights=options.weights,
        )
        watch.lap(
            f"encoder {encoder.config.library}: {encoder.parameters_used:,} parameters on {encoder.device}"
        )
        max_frames = options.max_frames or meta.get("max_frames", MAX_FRAMES)
        media += _encode(encoder, meta["space"], images, videos, max_frames, watch)
    device = pick_device(options.device)
    vlm, tokenizer, _ = load_final(folder, device)
    watch.lap(f"{folder}: {sum(p.numel() for p in vlm.parameters()):,} parameters on {device}")
    (text,) = answer(
        vlm,
        tokenizer,
        [([("user", options.prompt, 1.0)], order_media(options, media))],
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
    )
    watch.lap(f"answer, {len(text)} characters")
    return text


def _tell(path: Path, note: str | None) -> None:
    """Print to standard error what is wrong with a file that is used nevertheless."""
    if note is not None:
        say(f"{path}: {note}", file=sys.stderr)


def order_media(options: Options, media: Sequence[Tensor | Video]) -> list[Tensor | Video]:
    """Return the media in the order of the prompt's marks.

    If there are as many `<image>` marks as images and `<video>` marks as videos, each takes the next of its
    kind. Otherwise the media keep their order.

    Args:
        options: images, videos, and the prompt with marks for them.
        media: all images, then all videos.
    """
    marks = MARK.findall(options.prompt)
    if (marks.count("<image>"), marks.count("<video>")) != (len(options.image), len(options.video)):
        return list(media)
    images, videos = iter(media[: len(options.image)]), iter(media[len(options.image) :])
    return [next(images if mark == "<image>" else videos) for mark in marks]


@contextlib.contextmanager
def _user_errors(path: Path, wanted: str) -> Iterator[None]:
    """Raise UserError with a way out for a file that cannot be read or decoded."""
    try:
        yield
    except (BadMediaError, OSError) as error:
        reason = str(error.strerror if isinstance(error, OSError) else error)
        # Some reasons say what to do, such as to install the reader of a format.
        way_out = "" if "; " in reason else f"; give an intact {wanted}"
        raise UserError(f"{path}: {reason}{way_out}") from None


def live_video(
    encoder: VisionEncoder, space: Mapping[str, Any], path: Path, info: VideoInfo, max_frames: int
) -> Video:
    """Encode a video: the frames that encode.run would take, each once, with `live_features`.

    Args:
        encoder: that of the space.
        space: content of space.json.
        path: video file.
        info: its `probe`.
        max_frames: most frames.

    Raises:
        BadMediaError: it cannot be decoded.
    """
    times: list[float] = []

    def images() -> Iterator[Image]:  # full-size frames are in memory one at a time
        for frame in frames(path, sample_times(info.duration_s, max_frames), info):
            if not times or frame.time_s != times[-1]:  # two times may have one nearest frame
                times.append(frame.time_s)
                yield frame.image

    features = live_features(encoder, space, images(), ARRAY_OF["video"])
    return Video(times_s=times, features=features)


def _encode(
    encoder: VisionEncoder,
    space: Mapping[str, Any],
    images: Sequence[Image | DecodedImage],
    videos: Sequence[tuple[Path, VideoInfo]],
    max_frames: int,
    watch: Stopwatch,
) -> Iterator[Tensor | Video]:
    """Yield the features of all images, then of all videos."""
    if images:
        features = live_features(encoder, space, images)
        watch.lap(f"{len(images)} images, {features.shape[1]} tokens each")
        yield from features
    for path, info in videos:
        with _user_errors(path, "video file"):
            video = live_video(encoder, space, path, info, max_frames)
        watch.lap(f"{path}: {len(video.times_s)} frames, {video.features.shape[1]} tokens each")
        yield video


def live_features(
    encoder: VisionEncoder,
    space: Mapping[str, Any],
    images: Iterable[Image | DecodedImage],
    array: str = "image",
) -> Tensor:
    """Encode n images and pass the features through the space's codec: (n, M, V) float16.

    Args:
        encoder: that of the space, see `model.vision.encoder.rebuild_encoder`.
        space: content of space.json.
        images: RGB, or decoded as the space says.
        array: `image`, or `frame` for frames of videos, which have their own pooling.

    Raises:
        UserError: the features of an image are not finite.
    """
    spec = FeatureSpec.from_json(space["spec"])
    features = encoder.encode(np.stack([encoder.prepare(image) for image in images]), array)
    packed = pack(features, spec.codec)
    if not bool(packed.finite.all()):
        number = int((~packed.finite).nonzero()[0])
        raise UserError(f"{array} {number + 1}: the encoder overflows on it; try --device cpu")
    return unpack(packed.rows, spec.codec, spec.tokens(array), spec.width)
