"""Stored against live: are the rows of a space what encoding makes of the same media today?

python -m encode.run --check 50                                  # of files, and of what --keep-media kept
python -m encode.run --check 50 --dataset pixmo-cap --check-urls # downloads them again

Media are drawn at random, every one as likely, by a fixed seed. On the machine that encoded them rows are
equal to the bit; elsewhere they differ by what another device or library rounds differently. The same
features are then put through every codec: what a smaller one would lose on this encoder and these images.

R rows, M tokens, V values a token, S side of the encoder's input in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cache.format.spec import ARRAY_OF, CODECS, FeatureSpec
from cache.store.ledger import MediaRecord
from cache.store.paths import CacheRoot, SpacePaths
from cache.store.reader import FeatureReader
from cache.store.space import read_info
from configs import UserError
from encode.check.loss import StoredMedia, inputs_of, stored_media
from encode.check.media import Bytes, Checked, drawn
from encode.check.report import CheckReport, Loss
from model.media.images import BadMediaError
from model.quantize import pack, unpack
from model.vision.encoder import VisionEncoder, rebuild_encoder

TOLERANCE = {"fp16": 0.001, "int8": 0.01, "int4": 0.12}
"""Relative error of a stored row against live features, at most: what the codec may lose."""

SLACK = {"float32": 0.0, "float16": 0.003, "bfloat16": 0.02}
"""On top of it: what devices and libraries round differently in this precision (bf16: 0.7 to 1.2 %)."""


GROUP = 16
"""Media got at a time, downloads side by side."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Again:
    """One media, ready to be encoded again."""

    record: MediaRecord
    """What the ledger says of it."""
    stored: StoredMedia
    """What the space has of it."""
    pixels: npt.NDArray[np.uint8]
    """(R, S, S, 3) of the same views."""


def choose_space(root: CacheRoot, wanted: Mapping[str, Sequence[Any]]) -> SpacePaths:
    """The only space here, or the one that the command line describes.

    Args:
        root: the cache.
        wanted: field of the spec -> values it may have.

    Raises:
        UserError: no space is like that, or several are.
    """
    specs = {name: read_info(root.space(name)).spec for name in root.space_names()}
    if not specs:
        raise UserError(f"no feature space under {root.path}/; say where: --features DIR")
    fits = [n for n, s in specs.items() if all(getattr(s, k) in v for k, v in wanted.items())]
    if len(specs) > 1 and len(fits) != 1:
        there = "; ".join(f"{name}: {_options(spec)}" for name, spec in specs.items())
        raise UserError(
            f"{len(fits) or 'none'} of {len(specs)} spaces under {root.path}/ "
            f"{'are' if fits else 'is'} like that; there: {there}"
        )
    return root.space(fits[0] if fits else next(iter(specs)))


def _options(spec: FeatureSpec) -> str:
    """The command line that means a space."""
    encoder = spec.encoder.removeprefix("random-")
    pools = f"--pool {spec.pool_image} --frame-pool {spec.pool_frame}"
    return f"--encoder {encoder} --codec {spec.codec} --format {spec.container} {pools}"


def check_space(root: CacheRoot, paths: SpacePaths, what: Checked) -> CheckReport:
    """Encode media again, and compare.

    Raises:
        UserError: the encoder cannot be had or is another one; there is nothing to encode again; a stored
            row is damaged.
    """
    reader = FeatureReader(paths)
    spec = reader.spec
    encoder = rebuild_encoder(reader.load, spec, device=what.device, weights=what.weights)
    precision = str(encoder.dtype).removeprefix("torch.")
    report = CheckReport(
        spec=spec,
        trained=not reader.load.get("random_weights") and not spec.encoder.startswith("random-"),
        precision=precision,
        tolerance=TOLERANCE[spec.codec] + max(SLACK[precision], SLACK[spec.compute_dtype]),
        variants={variant: Loss() for variant in _variants(spec)},
    )
    waiting: dict[str, list[_Again]] = {array: [] for array in ARRAY_OF.values()}
    with Bytes(what, report.skipped) as source:
        records = drawn(root, reader, what, source)
        for one in islice(_ready(encoder, reader, records, source, what, report), what.media):
            report.media[one.record.kind] += 1
            batch = waiting[one.stored.array]
            batch.append(one)
            if sum(len(other.pixels) for other in batch) >= 4 * spec.batch_size:
                _compare(encoder, batch, report)
                batch.clear()
    for batch in waiting.values():
        _compare(encoder, batch, report)
    if not report.rows and not report.differing:
        why = "; ".join(f"{n:,} {text}" for text, n in report.skipped.items())
        raise UserError(
            f"{paths.root}: no media with all its rows can be had again ({why or 'none known'}); give "
            "the folder of kept downloads, --keep-media DIR, or download them: --check-urls"
        )
    return report


def _variants(spec: FeatureSpec) -> Iterator[FeatureSpec]:
    """The same features under every codec that takes their width, as encoding would store them now."""
    for codec in CODECS:
        variant = replace(spec, codec=codec, packed_from="float16")
        try:
            variant.row_bytes("image")
        except ValueError:
            continue
        yield variant


def _compare(encoder: VisionEncoder, batch: Sequence[_Again], report: CheckReport) -> None:
    """Encode these media, all of one array, and enter what is seen."""
    if not batch:
        return
    spec, array = report.spec, batch[0].stored.array
    tokens = spec.tokens(array)
    features = encoder.encode(np.concatenate([one.pixels for one in batch]), array)
    stored = torch.cat([one.stored.rows for one in batch])
    same = (pack(features, spec.layout).rows.cpu() == stored).all(1)
    report.rows += len(stored)
    report.equal += int(same.sum())
    for variant, loss in report.variants.items():
        rows = pack(features, variant.layout).rows
        values = unpack(rows, variant.layout, tokens, spec.width, torch.float32)
        loss.add(features.cpu(), values.cpu())
    before = len(report.stored.errors)
    values = unpack(stored, spec.layout, tokens, spec.width, torch.float32)
    report.stored.add(features.cpu(), values)
    names = [
        f"{one.record.key} {view} ({one.record.source})"
        for one in batch
        for view in one.stored.views
    ]
    for error, name in zip(report.stored.errors[before:], names, strict=True):
        if not error <= report.tolerance:  # NaN, too
            report.differing.append((error, name))


def _ready(
    encoder: VisionEncoder,
    reader: FeatureReader,
    records: Iterator[MediaRecord],
    source: Bytes,
    what: Checked,
    report: CheckReport,
) -> Iterator[_Again]:
    """Those of the media that can be had, decoded; one that has several sources once."""
    seen: set[str | None] = set()
    while group := list(islice(records, GROUP)):
        for record, data in source.get(group):
            if record.key in seen:
                continue
            seen.add(record.key)
            stored = stored_media(reader, record.kind, record, what.max_frames)
            try:
                pixels = inputs_of(encoder, data, stored)
            except (BadMediaError, OSError) as error:  # the very bytes that were decoded once
                what_now = f"{record.key} ({record.source}): cannot be decoded any more: {error}"
                report.differing.append((float("inf"), what_now))
                continue
            yield _Again(record=record, stored=stored, pixels=pixels)
