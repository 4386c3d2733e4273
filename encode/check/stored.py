"""Check whether the stored rows of a space are what encoding the same media gives today.

python -m encode.run --check 50                                  # files, and downloads of --keep-media
python -m encode.run --check 50 --dataset pixmo-cap --check-urls # download again what is not on this disk

Media are drawn at random with a fixed seed. On the machine that encoded them, rows are equal bit for bit.
Elsewhere they differ by the rounding of another device or library. The report also puts the new features
through every codec, which shows what a smaller codec loses on this encoder and these images.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from cache.errors import command_line
from cache.format.codec import CODECS
from cache.format.space_info import SpaceInfo
from cache.format.spec import ARRAY_OF, FeatureSpec
from cache.store.ledger import MediaRecord, media_table
from cache.store.paths import CacheRoot, SpacePaths
from cache.store.references import read_references
from cache.store.space import read_info
from configs import UserError
from configs.progress import Meter, number_text
from encode.check.media import NOT_ON_DISK, CheckConfig, LoadedMedia, MediaLoader
from encode.check.report import CheckReport, CodecLoss
from model.quantize import pack
from model.vision.encoder import VisionEncoder
from nanomolmo2.unpack import unpack

SEED = 0
"""Seed of the random draw: an unchanged cache gives the same media each time."""

TOLERANCE = {"fp16": 0.001, "int8": 0.01, "int4": 0.12}
"""Largest relative error of a stored row: what the codec may lose."""

ROUNDING = {"float32": 0.0, "float16": 0.003, "bfloat16": 0.02}
"""Added to TOLERANCE: how far devices and libraries differ in each precision."""
# Measured: 0.7 to 1.2 % in bfloat16.


def choose_space(root: CacheRoot, wanted: Mapping[str, Sequence[Any]]) -> SpacePaths:
    """Return the only space of a cache, or the one that the command line describes.

    Args:
        root: the cache.
        wanted: field of the spec -> accepted values.

    Raises:
        UserError: no space or several spaces match.
    """
    infos = {name: read_info(root.space(name)) for name in root.space_names()}
    specs = {name: info.spec for name, info in infos.items()}
    if not specs:
        raise UserError(f"no feature space under {root.path}/; say where: --features DIR")
    fits = [n for n, s in specs.items() if all(getattr(s, k) in v for k, v in wanted.items())]
    if len(specs) > 1 and len(fits) != 1:
        there = "; ".join(f"{name}: {_options(info)}" for name, info in infos.items())
        raise UserError(
            f"{len(fits) or 'none'} of {len(specs)} spaces under {root.path}/ "
            f"{'match' if fits else 'matches'} these options; the spaces are: {there}"
        )
    return root.space(fits[0] if fits else next(iter(specs)))


def _options(info: SpaceInfo) -> str:
    """Return the command-line options that select a space."""
    spec, entry = info.spec, info.load.get("encoder")
    name = entry.get("name") if isinstance(entry, Mapping) else None
    encoder = shlex.quote(str(name or spec.encoder.removeprefix("random-")))
    pools = f"--pool {spec.seen.pool_image} --frame-pool {spec.seen.pool_frame}"
    tail = "" if spec.tail is None else f" --block {spec.tail.first - 1} --tail"
    decode = "" if spec.decode == "whole" else f" --decode {spec.decode}"
    return (
        f"--encoder {encoder} --codec {spec.codec} --format {spec.container} {pools}{decode}{tail}"
    )


def check_space(
    root: CacheRoot,
    paths: SpacePaths,
    config: CheckConfig,
    *,
    media: int,
    datasets: Sequence[str] = (),
) -> CheckReport:
    """Encode media of a space again and compare the new rows with the stored ones.

    Args:
        root: the cache.
        paths: the space.
        config: where media and the encoder are loaded from.
        media: how many media to encode.
        datasets: draw from these data sets only; empty: from all.

    Raises:
        UserError: the encoder is not available or has changed, no media can be loaded, or a stored row is
            damaged.
    """
    with MediaLoader(paths, config) as loader:
        spec, encoder = loader.reader.spec, loader.encoder
        load = loader.reader.load
        precision = str(encoder.dtype).removeprefix("torch.")
        report = CheckReport(
            spec=spec,
            verify=command_line(
                "cache.verify", "--deep", "--space", spec.name, "--features", root.path
            ),
            trained=not load.get("random_weights") and not spec.encoder.startswith("random-"),
            precision=precision,
            tolerance=TOLERANCE[spec.codec]
            + max(ROUNDING[precision], ROUNDING[spec.compute_dtype]),
            skipped=loader.skipped,
            variants={variant: CodecLoss() for variant in _variants(spec)},
        )
        waiting: dict[str, list[LoadedMedia]] = {array: [] for array in ARRAY_OF.values()}
        seen: set[str | None] = set()
        with Meter("check", media, text=number_text) as meter:
            for one in loader.load(_draw(root, loader, datasets)):
                if one.record.key in seen:  # another source with the same bytes
                    continue
                seen.add(one.record.key)
                report.media[one.record.kind] += 1
                batch = waiting[one.array]
                batch.append(one)
                # Several batches of the encoder, so that its last, partly filled one costs little.
                if sum(len(other.pixels) for other in batch) >= 4 * spec.batch_size:
                    _compare(encoder, batch, report)
                    meter.add(len(batch))
                    batch.clear()
                if len(seen) == media:
                    break
            for batch in waiting.values():
                _compare(encoder, batch, report)
        report.differing += [(float("inf"), text) for text in loader.undecodable]
    if not report.rows and not report.differing:
        why = "; ".join(f"{n:,} {text}" for text, n in report.skipped.items())
        ways = []
        if not report.skipped or NOT_ON_DISK in report.skipped:
            ways.append(
                "give the folder of kept downloads, --keep-media DIR, or download them: --check-urls"
            )
        if report.skipped.keys() - {NOT_ON_DISK, config.local.note()}:
            ways.append("encode the data set again: that takes its files as they are now")
        why = f"{paths.root}: no media with stored rows can be loaded ({why or 'none known'})"
        raise UserError("; ".join([why, *ways]))
    return report


def _draw(root: CacheRoot, loader: MediaLoader, datasets: Sequence[str]) -> Iterator[MediaRecord]:
    """Yield the media of the ledger that have a key, in random order."""
    table = media_table(root)
    wanted = np.asarray(pc.is_valid(table["key"]), bool)
    if datasets:
        mentioned = np.zeros(len(table) + 1, bool)
        for name in datasets:
            references = read_references(root, name, table)
            mentioned[np.minimum(references.source[~references.mismatch], len(table))] = True
        wanted &= mentioned[:-1]
    table = loader.available(table.filter(pa.array(wanted)))
    for at in np.random.default_rng(SEED).permutation(len(table)).tolist():
        yield MediaRecord(**table.slice(at, 1).to_pylist()[0])


def _variants(spec: FeatureSpec) -> Iterator[FeatureSpec]:
    """Yield the spec of a space under every codec that can store its width."""
    for codec in CODECS:
        variant = replace(spec, codec=codec)
        try:
            variant.row_bytes("image")
        except ValueError:
            continue
        yield variant


def _compare(encoder: VisionEncoder, batch: Sequence[LoadedMedia], report: CheckReport) -> None:
    """Encode media of one array and add their differences to `report`."""
    if not batch:
        return
    spec, array = report.spec, batch[0].array
    tokens = spec.tokens(array)
    features = encoder.encode(np.concatenate([one.pixels for one in batch]), array)
    stored = torch.cat([one.rows for one in batch])
    same = (pack(features, spec.codec).rows.cpu() == stored).all(1)
    report.rows += len(stored)
    report.equal += int(same.sum())
    for variant, loss in report.variants.items():
        rows = pack(features, variant.codec).rows
        values = unpack(rows, variant.codec, tokens, spec.width, torch.float32)
        loss.add(features.cpu(), values.cpu())
    values = unpack(stored, spec.codec, tokens, spec.width, torch.float32)
    errors = report.stored.add(features.cpu(), values)
    names = [
        f"{one.record.key} {view} ({one.record.source})" for one in batch for view in one.views
    ]
    for error, name in zip(errors, names, strict=True):
        if not error <= report.tolerance:  # also true for NaN
            report.differing.append((error, name))
