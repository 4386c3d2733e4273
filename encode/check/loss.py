"""Compare a trained model's loss on stored features with its loss on features computed now.

python -m encode.check.loss --run demo --features cache --samples 16

The command encodes the images and videos of a few samples again, from their files. It fails if the two
losses differ, so it also detects an encoder, a library or a machine that no longer computes what the space
was made with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import configs
from cache.errors import CacheError
from configs.signals import importing
from configs.text import say
from model.io.runs import find_run

PROG = "python -m encode.check.loss"
TOLERANCE = 0.01
"""Largest relative difference of the two losses. It is 0 where precision and libraries are unchanged."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare a model's loss on stored features with its loss on features computed now."""

    run: str = "default"
    """Name of the run below runs/, or a path."""
    features: Path = Path("cache")
    """Folder of the feature cache."""
    samples: int = 16
    """Number of samples, taken from all data sets in turn."""
    weights: str | None = None
    """File or folder with the encoder's weights; when not given, the recorded place, or the hub."""
    device: str = "auto"
    """Device of the encoder: auto, cpu, cuda, cuda:N or mps."""
    max_frames: int | None = None
    """Largest number of frames of one video; when not given, as in the model's training."""
    media: Path | None = None
    """Folder of media that were not encoded on this machine, or have moved: they are opened, too."""

    def __post_init__(self) -> None:
        for name in ("samples", "max_frames"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} {value} is below 1")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if the losses differ."""
    options = configs.parse(Options, argv, prog=PROG, description=__doc__)
    find_run(options.run)
    with importing():
        from encode.check.losses import compare

    result = compare(**vars(options))
    agree = result.difference <= TOLERANCE
    for why, count in result.skipped.items():
        say(f"left out {count:,} media: {why}")
    print(
        f"{result.samples} samples: {result.same_rows} of {result.rows} rows are equal to the bit; "
        f"loss before the codec's rounding {result.unrounded:.6f}\n"
        f"cached loss {'=' if agree else 'is not'} live loss: {result.cached:.6f} and {result.live:.6f} "
        f"(relative difference {result.difference:.1e})"
    )
    return 0 if agree else 1


if __name__ == "__main__":
    configs.command(main, errors=(CacheError,))
