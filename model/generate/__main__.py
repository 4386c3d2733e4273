"""Ask a trained model about images and videos. Runs the whole model, encoder included.

python -m model.generate --run demo --image cat.png --prompt "How many shapes?"
python -m model.generate --image a.jpg --image b.jpg --prompt "<image> and <image>: what differs?"
python -m model.generate --video video.mp4 --prompt "What happens?"
python -m model.generate --image a.jpg --video b.mp4 --prompt "In <video>, where is <image>?"
python -m model.generate --prompt "No image at all." --temperature 0.7 --verbose

The encoder is rebuilt from the record of the run's feature space, and its weights are compared with that
record. Features pass through the space's codec, so the model gets what it would read from the cache.
Frames of a video are sampled as for training. Only the answer is printed to standard output.

`<image>` marks the place of an image in the prompt and `<video>` that of a video, in the order given. If the
number of marks of a kind differs from that of its files, either mark is replaced by the next file: images
first, then videos.
Without marks, images are put first, then videos, then the text.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import configs
from configs.signals import importing
from model.generate.options import Options
from model.io.runs import find_run

PROG = "python -m model.generate"


def main(argv: Sequence[str] | None = None) -> int:
    """Print one answer."""
    options = configs.parse(Options, argv, prog=PROG, description=__doc__)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    find_run(options.run, options.stage)
    with importing():
        from model.generate.live import generate

    print(generate(options))  # the guard of standard output escapes what is in an answer
    return 0


if __name__ == "__main__":
    configs.command(main)
