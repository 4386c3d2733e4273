"""Encoding: towers, codecs and batches on the device against the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

import nanomolmo2 as nm
from cache.format import codec
from cache.format.spec import ARRAYS
from cache.store.paths import CacheRoot
from cache.verify import main as verify
from encode.run import main as encode
from model import quantize
from model.io.device import DTYPES, native_dtype
from model.media.images import decode_image
from model.vision.config import EncoderConfig, encoder_config
from model.vision.encoder import VisionEncoder, _pool, load_encoder
from model.vision.pipeline import IN_FLIGHT, Pipeline
from nanomolmo2.unpack import unpack
from tests.gpu.lines import Lines, Scale, difference, unequal_rows
from tests.support import tiny_clip
from tests.support.feature_caches import IMAGES, ask, mixed_samples, new_world

LIMITS = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-4}
"""Relative error of features in a precision. `rebuild_encoder` promises 0.2 % for float16; with TF32 anywhere
that of float32 would be several times this."""


def check_encoding(lines: Lines, scale: Scale, folder: Path) -> None:
    """Check everything about encoding."""
    with lines.part("encode: the tower"):
        check_tower(lines, scale)
    with lines.part("encode: two batches in flight"):
        check_pipeline(lines, scale)
    with lines.part("encode: tiny towers"):
        check_tiny_towers(lines, scale, folder / "towers")
    with lines.part("encode: a job"):
        check_job(lines, scale, folder / "job")
    with lines.part("codecs"):
        check_codecs(lines, scale)
    with lines.part("nanomolmo2: batches"):
        check_batches(lines, scale, folder / "batches")


def check_tower(lines: Lines, scale: Scale) -> None:
    """Compare the tower with float32 on the CPU, and batches of one image with another."""
    entry = encoder_config(scale.encoder, pool_image=1)
    encoder = load_encoder(entry, device=str(scale.device), random_weights=True)
    exact = dataclasses.replace(entry, compute_dtype="float32")
    reference = load_encoder(exact, device="cpu", random_weights=True)
    pixels = tiny_clip.noise(4, encoder.tower.image_size)
    ours = encoder.encode(pixels)
    name = f"{scale.encoder}, {str(encoder.dtype).removeprefix('torch.')}"
    error = max(map(difference, ours, reference.encode(pixels)))
    limit = LIMITS[encoder.dtype]
    lines.at_most(f"encode: {name}: off float32 on the CPU", error, limit)
    lines.at_most("encode: again: rows that differ", unequal_rows(ours, encoder.encode(pixels)), 0)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        x = encoder.normalize(pixels[:1].repeat(encoder.spec("fp16").batch_size, axis=0))
        plain = torch.cat([b.float() for b in encoder.tower(x.to(encoder.dtype))], dim=-1)
    lines.equal("encode: attention is computed in one kernel", is_fused(encoder), True)
    repeated = encoder.encode(pixels[:1].repeat(len(plain), axis=0))
    lines.at_most("encode: replayed or not: rows that differ", unequal_rows(repeated, plain), 0)
    alone = torch.cat([encoder.encode(pixels[i : i + 1]) for i in range(len(pixels))])
    lines.at_most("encode: alone in a batch: rows that differ", unequal_rows(ours, alone), 0)
    pooled = encoder.encode(pixels, "frame")
    by_cpu, _ = _pool(ours.cpu(), encoder.spec("fp16").pool("frame"))
    lines.at_most("encode: pooled here or later: rows that differ", unequal_rows(pooled, by_cpu), 0)


def is_fused(encoder: VisionEncoder) -> bool:
    """Return whether torch computes attention by one of its fused kernels, by the names of what it calls."""
    spec = encoder.spec("fp16")
    pixels = tiny_clip.noise(spec.batch_size, spec.image_size)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        encoder.features(torch.from_numpy(pixels).to(encoder.device), "image")
    names = " ".join(event.key for event in seen.key_averages())
    return any(f"{kind}_attention" in names for kind in ("flash", "efficient", "cudnn"))


def check_pipeline(lines: Lines, scale: Scale) -> None:
    """Compare rows of batches in flight with those of one after another; nothing in a batch may wait."""
    encoder = encoder_of(scale)
    batch = encoder.spec("fp16").batch_size
    pixels = tiny_clip.noise(2 * batch + 1, encoder.tower.image_size)
    parts = [pixels[at : at + batch] for at in range(0, len(pixels), batch)]
    wrong, waited = 0, []
    for name in codec.CODECS:
        for array in ARRAYS:
            one_by_one = quantize.pack(encoder.encode(pixels, array), name).rows
            pipeline: Pipeline[int] = Pipeline(encoder, name)
            done = [one for part in parts for one in pipeline.put(list(part), array, 0)]
            done += pipeline.drain()
            with no_waiting(scale):  # the work is recorded by now
                for part in parts[:IN_FLIGHT]:
                    assert pipeline.put(list(part), array, 1) == []
            done += pipeline.drain()
            waited += [str(one.failure) for one in done if one.failure is not None]
            rows = np.concatenate([one.rows for one in done if one.label == 0])
            again = np.concatenate([one.rows for one in done if one.label == 1])
            wrong += unequal_rows(torch.from_numpy(rows), one_by_one)
            wrong += unequal_rows(torch.from_numpy(again), one_by_one[: len(again)])
    for reason in dict.fromkeys(waited):
        print(reason)
    lines.at_most("encode: in flight: batches that wait for the device", len(waited), 0)
    lines.at_most("encode: in flight: rows that differ", wrong, 0)


@contextlib.contextmanager
def no_waiting(scale: Scale) -> Iterator[None]:
    """Make torch raise where the host would wait for a GPU: for a value, or a copy that is not pinned."""
    if not scale.on_gpu:
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def check_tiny_towers(lines: Lines, scale: Scale, folder: Path) -> None:
    """Compare towers of every library, in both precisions, with the CPU."""
    folder.mkdir()
    tiny_clip.register(folder)
    towers: dict[str, tuple[EncoderConfig, dict[str, Any]]] = {
        "open_clip": (tiny_clip.entry(), {"random_weights": True}),
        "open_clip, GELU": (
            tiny_clip.entry(model="tiny", activation="gelu"),
            {"random_weights": True},
        ),
        "timm": (tiny_clip.entry(model="tiny-siglip", activation="gelu"), {"random_weights": True}),
        "demo": (dataclasses.replace(encoder_config("demo"), compute_dtype="float32"), {}),
    }
    for kind in ("clip", "dinov2", "dinov3"):
        place = tiny_clip.save_tower(folder / kind, tiny_clip.transformers_tower(kind))
        entry = encoder_config(f"hf:{place}", compute_dtype="float32", batch_size=3)
        towers[f"transformers {kind}"] = (entry, {})
    for precision in ("float32", "float16"):
        if precision == "float16" and not scale.on_gpu:
            continue  # no CPU computes in it
        errors = {}
        for name, (entry, options) in towers.items():
            reference = load_encoder(entry, device="cpu", **options)
            chosen = dataclasses.replace(entry, compute_dtype=precision)
            ours = load_encoder(chosen, device=str(scale.device), **options)
            pixels = tiny_clip.noise(5, ours.tower.image_size)
            errors[name] = difference(ours.encode(pixels), reference.encode(pixels))
        worst = max(errors, key=lambda name: errors[name])
        lines.at_most(
            f"encode: tiny towers, {precision}, worst: {worst}",
            errors[worst],
            LIMITS[DTYPES[precision]],
        )


def check_job(lines: Lines, scale: Scale, folder: Path) -> None:
    """Encode a folder of images by the command; compare what is stored with float32 on the CPU."""
    images, root = folder / "images", CacheRoot(folder / "cache")
    images.mkdir(parents=True)
    for i, pixels in enumerate(tiny_clip.noise(12, 128, seed=1)):
        Image.fromarray(pixels).save(images / f"{i}.png")
    words = [
        "--dataset",
        f"folder:{images}",
        "--encoder",
        "demo",
        "--workers",
        "0",
        "--codec",
        "fp16",
    ]
    for _ in range(2):  # the second job finds nothing to do
        assert encode([*words, "--features", str(root.path), "--device", str(scale.device)]) == 0
    with mock.patch.object(sys, "argv", ["verify", "--features", str(root.path), "--deep"]):
        lines.equal("encode.run, then cache.verify --deep: exit code", verify(), 0)
    cache = nm.open(root.path)
    exact = load_encoder(encoder_config("demo", compute_dtype="float32"), device="cpu")
    errors = []
    for path in images.iterdir():
        expected = exact.encode(exact.prepare(decode_image(path.read_bytes()))[None])[0]
        errors.append(difference(torch.from_numpy(np.asarray(cache[path])), expected))
    # Rows are float16, with 11 bits.
    limit = max(LIMITS[native_dtype(scale.device)], 2**-11)
    lines.at_most("encode.run: stored rows, off float32 on the CPU", max(errors), limit)
    lines.equal("encode.run: rows", len(errors), len(cache))


def check_codecs(lines: Lines, scale: Scale) -> None:
    """Pack and unpack on the device, also under autocast and with TF32 allowed; compare every bit."""
    generator = np.random.default_rng(3)
    x = generator.standard_normal((24, 37, 1024)).astype(np.float32)
    x[..., ::146] *= 50
    x *= np.float32(10.0) ** generator.integers(-9, 5, (24, 1, 1)).astype(np.float32)
    x[0] = 0
    x[1] = 65520  # float16 would round it to infinity
    on_device = torch.from_numpy(x).to(scale.device)
    allowed = torch.backends.cuda.matmul.allow_tf32
    for name in codec.CODECS:
        rows = codec.pack(x, name)
        values = torch.from_numpy(codec.unpack(rows, name, 37, 1024))
        packed = quantize.pack(on_device, name)
        wrong = unequal_rows(packed.rows, torch.from_numpy(rows))
        try:
            for tf32 in (False, True):
                torch.backends.cuda.matmul.allow_tf32 = tf32
                with torch.autocast(scale.device.type, torch.bfloat16):
                    ours = unpack(torch.from_numpy(rows).to(scale.device), name, 37, 1024)
                wrong += unequal_rows(ours, values)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = allowed
        lines.at_most(f"codecs: {name}: rows that differ", wrong, 0)


def check_batches(lines: Lines, scale: Scale, folder: Path) -> None:
    """Unpack batches of a DataLoader with pinned memory on the device; compare every bit."""
    world = new_world(folder)
    films = [
        ask("film", ["video v"]),
        ask("both", ["p1", "video x", "p1"], "<image><video><image>?"),
    ]
    world.write(d=[*mixed_samples(40, 0), *films])
    world.encode(IMAGES)
    world.encode_videos({"video v": 2.2, "video x": 9.0})
    data = nm.open(world.root.path).dataset("d", held_out=0.0)
    wrong = seen = 0
    loader = DataLoader(
        data, 7, shuffle=True, collate_fn=data.collate, pin_memory=scale.on_gpu, num_workers=0
    )
    for batch in loader:
        ours, reference = batch.features(scale.device).flat, batch.features().flat
        if scale.on_gpu:
            assert all(rows.is_pinned() for rows in batch.codes.values() if len(rows))
        wrong += unequal_rows(ours, reference)
        seen += len(reference)
    assert seen > 0
    lines.at_most("nanomolmo2: features on the device that differ", wrong, 0)


@functools.cache
def encoder_of(scale: Scale) -> VisionEncoder:
    """Return the encoder of the speed lines, with random weights."""
    return load_encoder(
        encoder_config(scale.encoder), device=str(scale.device), random_weights=True
    )
