"""How fast images become rows: decoding, the tower alone, the encoder, and a whole job."""

from __future__ import annotations

import contextlib
import io
import os
import re
import time
from pathlib import Path

import torch

from encode.run import main as encode
from model import quantize
from model.vision.encoder import VisionEncoder
from model.vision.pipeline import Pipeline
from tests.gpu.encoding import encoder_of
from tests.gpu.lines import Lines, Scale, median_s
from tests.gpu.worlds import Decoder, write_jpegs
from tests.support import tiny_clip

LARGE_BATCH = 64


def measure_encoding(lines: Lines, scale: Scale, folder: Path) -> None:
    """Measure images per second of every stage."""
    with lines.part("encode: speed"):
        encoder = encoder_of(scale)
        decode = decoding(lines, scale, encoder)
        alone = forward(lines, scale, encoder)
    with lines.part("encode: speed of a job"):
        job(lines, scale, folder, decode, alone)


def decoding(lines: Lines, scale: Scale, encoder: VisionEncoder) -> float:
    """Decode JPEG files of 640 x 480 and fit them to the encoder; return images per second of all threads."""
    decoder = Decoder(encoder, ahead=0)
    try:
        one = median_s(decoder.one, torch.device("cpu"), rounds=3, each=4)
        count = 16 * (os.cpu_count() or 1) if scale.on_gpu else 4
        every = median_s(lambda: decoder.take(count), torch.device("cpu"), rounds=3) / count
    finally:
        decoder.close()
    lines.note("decode and fit, 640 x 480 JPEG, one thread, images/s", f"{1 / one:.0f}")
    lines.note(f"decode and fit, {os.cpu_count()} threads, images/s", f"{1 / every:.0f}")
    return 1 / every


def forward(lines: Lines, scale: Scale, encoder: VisionEncoder) -> float:
    """Time the tower alone, then from pixels to rows; return the tower's images per second."""
    batch = encoder.spec("int8").batch_size
    rounds = 7 if scale.on_gpu else 1
    rates = {}
    for size in (batch, LARGE_BATCH) if scale.on_gpu else (batch,):
        pixels = tiny_clip.noise(size, encoder.tower.image_size)
        x = encoder.normalize(pixels).to(encoder.dtype)
        with torch.no_grad():
            seconds = median_s(lambda x=x: encoder.tower(x), scale.device, rounds, each=scale.steps)
        rates[size] = size / seconds
        lines.note(f"tower alone, batch of {size}, images/s", f"{rates[size]:.0f}")
    pixels = tiny_clip.noise(batch, encoder.tower.image_size)
    seconds = median_s(
        lambda: quantize.pack(encoder.encode(pixels), "int8").rows.cpu(),
        scale.device,
        rounds,
        each=scale.steps,
    )
    lines.note("one after another, pixels to int8 rows, images/s", f"{batch / seconds:.0f}")
    pipeline: Pipeline[None] = Pipeline(encoder, "int8")
    inputs, batches = list(pixels), 8 * scale.steps

    def in_flight() -> None:
        for _ in range(batches):
            pipeline.put(inputs, "image", None)
        pipeline.drain()

    rate = batches * batch / median_s(in_flight, scale.device, rounds)
    lines.note(f"two batches of {batch} in flight, to rows on the host, images/s", f"{rate:.0f}")
    if scale.on_gpu:
        lines.at_least("two in flight, pixels to rows / tower alone", rate / rates[batch], 0.95)
        larger = rates[LARGE_BATCH] / rates[batch]
        lines.note(f"tower, batch of {LARGE_BATCH} / of {batch}, times", f"{larger:.2f}")
    return rates[batch]


def job(lines: Lines, scale: Scale, folder: Path, decode: float, alone: float) -> None:
    """Encode a folder of JPEG files by the command; compare with what its slowest stage allows."""
    count = 1536 if scale.on_gpu else 16
    write_jpegs(folder / "photographs", count)
    words = ["--dataset", f"folder:{folder / 'photographs'}", "--encoder", scale.encoder]
    words += ["--features", str(folder / "job"), "--workers", "0", "--device", str(scale.device)]
    if scale.encoder != "demo":
        words.append("--random-weights")
    said = io.StringIO()
    started = time.perf_counter()
    with contextlib.redirect_stdout(said):
        code = encode(words)
    whole = time.perf_counter() - started
    print(*said.getvalue().splitlines()[-3:], sep="\n")
    assert code == 0
    found = re.search(r"images/s=([\d.,]+) bound=(\w+)", said.getvalue())
    assert found is not None, said.getvalue()
    rate = float(found[1].replace(",", ""))
    lines.note(f"encode.run, {count} files, start included, s", f"{whole:.1f}")
    lines.note(f"encode.run, images/s (bound by {found[2]})", f"{rate:.0f}")
    if scale.on_gpu:  # on a CPU both share the cores
        lines.at_least("encode.run / bare forward, or decoding", rate / min(decode, alone), 0.95)
