"""The folder of one stage of a run: whether it may be used, and what it is begun with.

runs/<name>/stage<k>/
    config.yaml             the resolved options
    run.json                id, space and its fingerprint, samples of each data set when it began
    samples.safetensors     which samples exactly
    metrics.jsonl           every step
    tb/                     curves, with --log tensorboard
    checkpoints/step-<n>/   see train/checkpoint.py
    final/                  the finished model; there only when the stage is
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import configs
from cache.store.files import write_atomic
from cache.store.reader import FeatureReader
from configs import UserError
from model.io.saved_model import META
from train.config import MACHINE_KEYS, Options, format_mix, parse_mix, read_saved, stage_folder
from train.data.sample_list import SampleList
from train.metrics import read_metrics

CONFIG, RUN, SAMPLES = "config.yaml", "run.json", "samples.safetensors"
FINAL, CHECKPOINTS = "final", "checkpoints"


def is_finished(folder: Path) -> bool:
    """Whether a stage's model is there, whole."""
    return (folder / FINAL / META).is_file()


def check_folder(options: Options) -> tuple[Path, Options]:
    """The stage's folder, new or one that `--resume` may go on with, and the options to go on with.

    Raises:
        UserError: it exists and `--resume` was not given, or options that decide what is learned differ.
    """
    folder = stage_folder(options.run, options.stage)
    saved = folder / CONFIG
    if not saved.exists() or options.inspect:
        return folder, options
    where = f"{folder}: stage {options.stage} of this run exists"
    if is_finished(folder) and not options.resume:
        raise UserError(f"{where} and is finished; choose another name: --run NAME")
    if not options.resume:
        done = max((line["step"] for line in read_metrics(folder)), default=0)
        raise UserError(
            f"{where} ({done} steps); go on with --resume, or choose another: --run NAME"
        )
    before = configs.build(Options, read_saved(saved), str(saved))
    options = same_words(before, options)
    check_same(before, options, folder)
    return folder, options


def same_words(before: Options, now: Options) -> Options:
    """`now`, with what only looks different said as `before` said it.

    The command that began a run must also resume it, and what is saved is more exact than what was typed:
    the whole name of the space, the data sets that were there.
    """
    given, used = parse_mix(now.datasets), parse_mix(before.datasets)
    if not given or {name: given.get(name, -1.0) for name in used} == used:
        now = dataclasses.replace(now, datasets=before.datasets)
    if before.space is not None and before.space.startswith(now.space or ""):
        now = dataclasses.replace(now, space=before.space)
    return now


def check_same(before: Options, now: Options, folder: Path) -> None:
    """A resumed run learns the same thing in the same way.

    Raises:
        UserError: an option that decides what is learned has changed.
    """
    changed = [
        f"{f.name} {getattr(before, f.name)!r} -> {getattr(now, f.name)!r}"
        for f in dataclasses.fields(Options)
        if f.name not in MACHINE_KEYS and getattr(before, f.name) != getattr(now, f.name)
    ]
    if changed:
        raise UserError(
            f"{folder}: a resumed run keeps its options, but {', '.join(changed)}; "
            "leave them out, or start another run: --run NEW --from THIS"
        )


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """No two trainers in one stage; the lock goes with the process, however that ends.

    Raises:
        UserError: another trainer is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another trainer is at work on this stage; wait for it, or --run NAME"
            ) from None
        yield


def open_folder(
    folder: Path, options: Options, reader: FeatureReader, train: SampleList
) -> dict[str, Any]:
    """Make the stage's files when it is new; returns its facts, run.json."""
    if facts := read_facts(folder):
        return facts
    facts = {
        "id": uuid.uuid4().hex[:12],
        "space": reader.path.name,
        "fingerprint": reader.spec.fingerprint,
        "samples": present(train),
        "samples_digest": train.digest,
    }
    # Other data sets and spaces may join the cache later; this run has its own.
    shares = parse_mix(options.datasets)
    mix = format_mix({name: shares.get(name) for name in train.names})
    saved = dataclasses.replace(options, datasets=mix, space=reader.path.name)
    train.freeze(folder / SAMPLES)
    write_atomic(folder / CONFIG, configs.dump(saved).encode())
    write_atomic(folder / RUN, (json.dumps(facts, indent=1) + "\n").encode())  # last: it is whole
    return facts


def read_facts(folder: Path) -> dict[str, Any]:
    """run.json; empty when the stage has not begun."""
    path = folder / RUN
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return facts


def present(joined: SampleList) -> dict[str, int]:
    """Samples of each data set that have all their features, both splits together."""
    return {c.dataset: c.present for c in joined.counts}
