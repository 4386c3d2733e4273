"""The folder of one stage of a run: create it, lock it, and check that a resumed run may use it.

runs/<name>/stage<k>/
    config.yaml             the resolved options
    run.json                id, space and its fingerprint, samples of each data set when the run began
    samples.safetensors     which samples exactly
    metrics.jsonl           one line for each step
    tb/                     curves, with --log tensorboard
    checkpoints/step-<n>/   see train/stage/checkpoint.py
    final/                  the finished model; it exists once the stage is finished
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
    """Whether a stage is finished: its final model is complete."""
    return (folder / FINAL / META).is_file()


def check_folder(options: Options) -> tuple[Path, Options]:
    """Return the stage's folder, new or to resume, and the options to train with.

    Raises:
        UserError: the stage exists and `--resume` was not given, or an option that decides what is learned
            differs from the run's.
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
            f"{where} ({done} steps); continue with --resume, or choose another name: --run NAME"
        )
    before = configs.build(Options, read_saved(saved), str(saved))
    options = with_saved_spelling(before, options)
    check_unchanged(before, options, folder)
    return folder, options


def with_saved_spelling(before: Options, now: Options) -> Options:
    """Return `now` with the saved spelling of options that mean the same as before.

    The command that began a run must also resume it, and the saved options are more exact than the typed
    ones: they have the full name of the space, and the data sets that were in the cache.
    """
    given, used = parse_mix(now.datasets), parse_mix(before.datasets)
    if not given or {name: given.get(name, -1.0) for name in used} == used:
        now = dataclasses.replace(now, datasets=before.datasets)
    if before.space is not None and before.space.startswith(now.space or ""):
        now = dataclasses.replace(now, space=before.space)
    return now


def check_unchanged(before: Options, now: Options, folder: Path) -> None:
    """Raise UserError if an option that decides what is learned has changed."""
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
def lock(folder: Path) -> Iterator[None]:
    """Hold the stage's lock, so that two trainers never share a stage.

    The kernel releases the lock when the process ends, even if it is killed.

    Raises:
        UserError: another trainer holds the lock.
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
    """Write the files of a new stage; return run.json."""
    if facts := read_facts(folder):
        return facts
    facts = {
        "id": uuid.uuid4().hex[:12],
        "space": reader.path.name,
        "fingerprint": reader.spec.fingerprint,
        "samples": present_samples(train),
        "samples_digest": train.digest,
    }
    # Saved by name, because data sets and spaces may be added to the cache later.
    shares = parse_mix(options.datasets)
    mix = format_mix({name: shares.get(name) for name in train.names})
    saved = dataclasses.replace(options, datasets=mix, space=reader.path.name)
    train.freeze(folder / SAMPLES)
    write_atomic(folder / CONFIG, configs.dump(saved).encode())
    # Written last: its existence says that the other files are complete.
    write_atomic(folder / RUN, (json.dumps(facts, indent=1) + "\n").encode())
    return facts


def read_facts(folder: Path) -> dict[str, Any]:
    """Return run.json; an empty dict if the stage has not begun."""
    path = folder / RUN
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return facts


def present_samples(samples: SampleList) -> dict[str, int]:
    """Return how many samples of each data set have all their features, both splits together."""
    return {c.dataset: c.present for c in samples.counts}
