"""When has a cache paid? Wall time and disk of 1, 2, 5 and 20 experiments on the same images.

Measured: seconds of encoding an image by `encode.run` (the slope between a short and a long job, so that its
start does not count), and of one pass over an image in each way to train (speed.py). Computed from them: an
experiment is one pass over every image; the cached way encodes once before the first one.
"""

from __future__ import annotations

import contextlib
import io
import statistics
from collections.abc import Mapping
from pathlib import Path

import yaml

from encode.run import main as encode
from tests.benchmarks.bench import Requirements, seconds
from tests.benchmarks.train.models import Scale
from tests.benchmarks.train.speed import (
    LIVE_PADDED,
    LIVE_TREES,
    ONE,
    ONE_LIVE,
    ONE_PADDED,
    TREES,
    Speeds,
)
from tests.gpu.worlds import write_jpegs

EXPERIMENTS = (1, 2, 5, 20)
IMAGES = 100_000
"""Images of the tables."""


def experiments_until(encode_s: float, cached_s: float, live_s: float) -> float:
    """Return after how many experiments encoding once has taken no more time than encoding in each.

    Infinite if a cached step is no faster than a live one.
    """
    saved = live_s - cached_s
    return encode_s / saved if saved > 0 else float("inf")


def table(encode_s: float, cached_s: float, live: Mapping[str, float], row_bytes: int) -> list[str]:
    """Return the lines of a table: hours for IMAGES images, and gigabytes of features.

    Args:
        encode_s: seconds of encoding an image once.
        cached_s: seconds of an image in one experiment on the cache.
        live: name -> seconds of an image in one experiment with the encoder in it.
        row_bytes: bytes of an image's features.
    """
    names = " | ".join(f"{name}, h | / cached" for name in live)
    lines = [f"| experiments | encode once, cached, h | {names} | features, GB |"]
    lines.append("|" + "---|" * (3 + 2 * len(live)))
    hours = IMAGES / 3600
    for count in EXPERIMENTS:
        cached = encode_s + count * cached_s
        cells = [str(count), f"{cached * hours:.2f}"]
        for each in live.values():
            cells += [f"{count * each * hours:.2f}", f"{count * each / cached:.2f}"]
        lines.append("| " + " | ".join([*cells, f"{row_bytes * IMAGES / 1e9:.0f}, once"]) + " |")
    return lines


def measure_break_even(
    scale: Scale, folder: Path, speeds: Speeds, requirements: Requirements
) -> None:
    """Time encode jobs, then print the tables and the requirements."""
    encode_s = encoding_s(scale, folder)
    row_bytes = scale.load_encoder().spec("int8").row_bytes("image")
    print(f"encode.run: {encode_s * 1e3:.0f} ms an image", flush=True)
    of = speeds.image_s
    for what, cached, live in (
        ("5.6 annotations an image", TREES, (LIVE_TREES, LIVE_PADDED)),
        ("1 annotation an image", ONE, (ONE_LIVE, ONE_PADDED)),
    ):
        ways = {name.split(": ")[1]: of[name] for name in live}
        print(f"\n{what}; computed from the measured parts, {IMAGES:,} images")
        print("\n".join(table(encode_s, of[cached], ways, row_bytes)), flush=True)
        for name, live_s in ways.items():
            found = experiments_until(encode_s, of[cached], live_s)
            label = f"{what.split(' ')[0]}: experiments until paid, {name}"
            requirements.at_most(label, found, 2.0)


def encoding_s(scale: Scale, folder: Path) -> float:
    """Return the seconds that one more image takes in an encode job: the median over rounds."""
    settings = folder / "encoders.yaml"
    config = scale.config()
    entry = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in vars(config).items()
        if value is not None and key not in ("name", "tower")
    }
    if config.tower is not None:
        entry["tower"] = vars(config.tower)
    settings.write_text(yaml.safe_dump({"encoders": {"cut": entry}}))
    short, long = scale.encoded
    for count in scale.encoded:
        write_jpegs(folder / f"{count}", count)
    slopes = []
    for number in range(scale.rounds):
        taken = {
            count: job(folder, settings, count, f"{number}-{count}", bool(config.tower))
            for count in (scale.encoded if number % 2 else scale.encoded[::-1])
        }
        slopes.append((taken[long] - taken[short]) / (long - short))
    return statistics.median(slopes)


def job(folder: Path, settings: Path, count: int, name: str, is_demo: bool) -> float:
    """Encode a folder of JPEG files by the command; return its seconds."""
    words = ["--dataset", f"folder:{folder / str(count)}", "--encoder", "cut", "--codec", "int8"]
    words += ["--config", str(settings), "--features", str(folder / f"job-{name}")]
    words += ["--workers", "0", "--device", "cpu", *([] if is_demo else ["--random-weights"])]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        taken = seconds(lambda: encode(words))
    if f"encoded={count} " not in said.getvalue():
        raise SystemExit(said.getvalue())
    return taken
