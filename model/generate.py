"""Ask a trained model about pictures: the whole model, encoder included.

python -m model.generate --run demo --image cat.png --prompt "How many shapes?"
python -m model.generate --image a.jpg --image b.jpg --prompt "<image> and <image>: what differs?"
python -m model.generate --prompt "No picture at all." --temperature 0.7 --verbose

The encoder is rebuilt as the features' space says, its weights checked against the space's, and its
features pass through the space's codec: a picture looks exactly as it did from the cache. Only the answer
goes to standard output.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image
from torch import Tensor

import configs
from cache.spec import FeatureSpec
from configs import UserError
from model.answer import answer
from model.device import pick_device
from model.load import find_run, load_final, read_meta
from model.media import BadMedia, decode_picture
from model.quantize import pack, unpack
from model.tokenizer import IMAGE
from model.vision import VisionEncoder, rebuild_encoder

PROG = "python -m model.generate"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Ask a trained model about pictures."""

    prompt: str = ""
    """What to ask; `<image>` marks say where the pictures stand, without them they come first."""
    image: tuple[Path, ...] = ()
    """Picture files, in the order of their marks."""
    run: str = "default"
    """Name of the run, below runs/, or a path."""
    stage: int | None = None
    """Which stage's model; the newest finished one when not given."""
    max_new_tokens: int = 256
    """Longest answer, tokens."""
    temperature: float = 0.0
    """0: the likeliest word each time; above: sampled, the wilder the higher."""
    seed: int = 0
    """Of the sampling."""
    weights: str | None = None
    """File or folder of the encoder's weights, where they lie elsewhere than when encoding."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    verbose: bool = False
    """Say on standard error what was loaded and how long each part took."""

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("no --prompt: what should the model answer?")
        if self.temperature < 0:
            raise ValueError(f"temperature {self.temperature} is below 0")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} is below 1")
        marks = self.prompt.count(IMAGE)
        if self.image and marks not in (0, len(self.image)):
            raise ValueError(
                f"{len(self.image)} --image but {marks} {IMAGE} marks in the prompt; "
                "give one mark for each picture, or none"
            )


class Stopwatch:
    """Says on standard error how long each part took, when asked to."""

    def __init__(self, on: bool) -> None:
        self.on, self.since = on, time.perf_counter()

    def lap(self, what: str) -> None:
        """Name what was done since the last lap."""
        now = time.perf_counter()
        if self.on:
            print(f"{now - self.since:7.2f} s  {what}", file=sys.stderr)
        self.since = now


def main(argv: Sequence[str] | None = None) -> int:
    """Print one answer."""
    options = configs.parse(Options, argv, prog=PROG, description=__doc__)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    print(generate(options))
    return 0


def generate(options: Options) -> str:
    """The model's answer."""
    watch = Stopwatch(options.verbose)
    folder = find_run(options.run, options.stage)
    meta = read_meta(folder)
    features = None
    if options.image:
        pictures = [_read_picture(path) for path in options.image]
        encoder = rebuild_encoder(
            meta["space"]["load"],
            FeatureSpec.from_json(meta["space"]["spec"]),
            device=options.device,
            weights=options.weights,
        )
        watch.lap(
            f"encoder {encoder.config.library}: {encoder.parameters_used:,} parameters on {encoder.device}"
        )
        features = live_features(encoder, meta["space"], pictures)
        watch.lap(f"{len(pictures)} pictures, {features.shape[1]} tokens each")
    device = pick_device(options.device)
    vlm, tokenizer, _ = load_final(folder, device)
    watch.lap(f"{folder}: {sum(p.numel() for p in vlm.parameters()):,} parameters on {device}")
    (said,) = answer(
        vlm,
        tokenizer,
        [([("user", options.prompt, 1.0)], features)],
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
    )
    watch.lap(f"answer, {len(said)} characters")
    return said


def _read_picture(path: Path) -> Image:
    try:
        return decode_picture(path.read_bytes())
    except BadMedia as error:
        raise UserError(
            f"{path}: {error}; give a sound JPEG, PNG, WebP, GIF, BMP or TIFF"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; --image takes picture files") from None


def live_features(
    encoder: VisionEncoder, space: Mapping[str, Any], pictures: Sequence[Image]
) -> Tensor:
    """(P, M, V) float16 features of pictures, with what the space's codec does to them.

    Args:
        encoder: that of the space, see `model.vision.rebuild_encoder`.
        space: the content of space.json.
        pictures: RGB.
    """
    spec = FeatureSpec.from_json(space["spec"])
    features = encoder.encode(np.stack([encoder.prepare(picture) for picture in pictures]))
    packed = pack(features, spec.codec)
    if not bool(packed.finite.all()):
        number = int((~packed.finite).nonzero()[0])
        raise UserError(f"picture {number + 1}: the encoder overflows on it; try --device cpu")
    return unpack(packed.rows, spec.codec, spec.tokens("picture"), spec.width)


if __name__ == "__main__":
    configs.command(main)
