"""The folder of one stage of a run: create it, lock it, and check that a resumed run may use it.

runs/<name>/stage<k>/
    config.yaml             the resolved options
    run.json                id, space and its fingerprint, samples of each data set when the run began, the
                            command that began it, where the model that it started from is, and to which
                            model its adapters belong
    samples.safetensors     which samples exactly
    metrics.jsonl           one line for each step
    tb/                     curves, with --log tensorboard
    start/                  with --from CHECKPOINT: that model, because another run may remove its checkpoint
    checkpoints/step-<n>/   see checkpoint.py
    card.json               what the model was trained on, see card.py
    final/                  the finished model; it exists once the stage is finished

A stage has begun once it has a checkpoint. Until then nothing can be continued, so a folder that a failed or
killed start left behind is used again as if it were new.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import configs
from cache.store.files import write_atomic
from cache.store.paths import is_url
from cache.store.reader import FeatureReader
from configs import UserError
from configs.command_line import CommandLine
from model.io.run_files import META, read_json, refuse_links
from train.config import (
    MACHINE_KEYS,
    Options,
    format_mix,
    free_name,
    parse_mix,
    read_saved,
    stage_folder,
)
from train.data.sample_list import SampleList
from train.metrics import METRICS, read_metrics
from train.stage import checkpoint
from train.stage.files import CHECKPOINTS, CONFIG, FINAL, RUN, SAMPLES, START, Facts

log = logging.getLogger(__name__)

LOCK = "lock"
OWN = (CONFIG, RUN, SAMPLES, METRICS, "tb", START, CHECKPOINTS, f"{FINAL}.partial", LOCK)
"""What a start that failed may leave in the folder."""
MODEL_KEYS = ("space", "llm", "connector")
"""Options with which the weights of a run cannot be used any more, when they change."""


def is_finished(folder: Path) -> bool:
    """Whether a stage is finished: its final model is complete."""
    return (folder / FINAL / META).is_file()


def has_begun(folder: Path) -> bool:
    """Whether a stage has something to continue from: a checkpoint, or its final model."""
    return is_finished(folder) or checkpoint.newest(folder / CHECKPOINTS) is not None


def check_folder(options: Options, command: CommandLine) -> tuple[Path, Options]:
    """Return the stage's folder, new or to resume, and the options to train with.

    Args:
        options: as the command line says.
        command: the command line, for messages.

    Raises:
        UserError: the stage has begun and `--resume` was not given, or an option that decides what is
            learned differs from the run's.
    """
    folder = stage_folder(options.run, options.stage)
    refuse_links(folder)
    if options.inspect:
        return folder, options
    if not has_begun(folder):
        if done := steps_recorded(folder):
            log.warning(
                "%s: ended after step %d without a checkpoint; starting again", folder, done
            )
        return folder, options
    another = command.text(run=free_name(options.run), resume=None)
    where = f"{folder}: stage {options.stage} of this run exists"
    if is_finished(folder) and not options.resume:
        raise UserError(f"{where} and is finished; choose another name: {another}")
    if not options.resume:
        raise UserError(
            f"{where} ({steps_recorded(folder)} steps); choose another name (--run NAME), or continue with "
            f"--resume: {command.text(resume=True)}"
        )
    if not (folder / CONFIG).exists():
        raise UserError(
            f"{folder / CONFIG} is missing, so the run cannot be resumed; what it learned starts another "
            f"one: {_from_here(folder, options, command)}"
        )
    before = configs.build(Options, read_saved(folder / CONFIG), str(folder / CONFIG))
    options = with_saved_spelling(before, options)
    if changed := changed_options(before, options):
        shown = ", ".join(f"{k} {getattr(before, k)!r} -> {getattr(options, k)!r}" for k in changed)
        way_out = (
            f"start another run: {another}"
            if set(changed) & set(MODEL_KEYS)
            else f"start another run with what it learned: {_from_here(folder, options, command)}"
        )
        raise UserError(
            f"{folder}: a resumed run keeps its options, but {shown}; leave them out, or {way_out}"
        )
    return folder, options


def _from_here(folder: Path, options: Options, command: CommandLine) -> str:
    """Return the command that starts another run from the newest model of a stage."""
    newest = folder / FINAL if is_finished(folder) else checkpoint.newest(folder / CHECKPOINTS)
    return command.text(run=free_name(options.run), from_=newest, resume=None)


def steps_recorded(folder: Path) -> int:
    """Return the number of steps in the metrics of a stage."""
    return max((line["step"] for line in read_metrics(folder)), default=0)


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


def changed_options(before: Options, now: Options) -> list[str]:
    """Return the names of the options that decide what is learned and have changed."""
    return [
        f.name
        for f in dataclasses.fields(Options)
        if f.name not in MACHINE_KEYS and getattr(before, f.name) != getattr(now, f.name)
    ]


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the stage's lock, so that two trainers never share a stage.

    The kernel releases the lock when the process ends, even if it is killed.

    Raises:
        UserError: another trainer holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another trainer is at work on this stage; wait for it, or --run NAME"
            ) from None
        with _removed_if_it_fails(folder):
            yield


@contextlib.contextmanager
def _removed_if_it_fails(folder: Path) -> Iterator[None]:
    """Remove the folder of a stage that ends with an error before its first step."""
    try:
        yield
    except BaseException:
        if not has_begun(folder) and not steps_recorded(folder):
            _clear(folder)
            for empty in (folder, folder.parent):
                with contextlib.suppress(OSError):  # somebody else's files are in it
                    empty.rmdir()
        raise


def _clear(folder: Path, but: str = "") -> None:
    """Remove the files of a stage that has not begun."""
    for path in (folder / name for name in OWN if name != but):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def open_folder(
    folder: Path,
    options: Options,
    reader: FeatureReader,
    train: SampleList,
    command: CommandLine,
    counts: Mapping[str, tuple[int, int]],
) -> dict[str, Any]:
    """Write the files of a new stage; return run.json.

    Args:
        folder: of the stage.
        options: the resolved options.
        reader: a reader of the space.
        train: the training split.
        command: the command line.
        counts: part of the model -> its parameters that are trained, and all of them.
    """
    # The place of the cache is saved for train.evaluate and train.report, wherever they run.
    features = is_url(options.features) or str(Path(options.features).absolute())
    if facts := read_facts(folder):
        saved = read_saved(folder / CONFIG)
        if saved.get("features") != features:  # the cache has been moved
            moved = configs.build(Options, saved | {"features": features}, str(folder / CONFIG))
            write_atomic(folder / CONFIG, configs.dump(moved).encode())
        return facts
    _clear(folder, but=LOCK)
    facts = {
        "id": uuid.uuid4().hex[:12],
        "space": reader.path.name,
        "fingerprint": reader.spec.fingerprint,
        "samples": present_samples(train),
        "samples_digest": train.digest,
        "command": list(command.words),
        "origin": None,
        "parameters": [sum(column) for column in zip(*counts.values(), strict=True)],
    }
    # Saved by name, because data sets and spaces may be added to the cache later.
    shares = parse_mix(options.datasets)
    mix = format_mix({name: shares.get(name) for name in train.names})
    begun = dataclasses.replace(
        options, datasets=mix, space=reader.path.name, features=features, resume=False
    )
    train.freeze(folder / SAMPLES)
    write_atomic(folder / CONFIG, configs.dump(begun).encode())
    write_facts(folder, facts)
    return facts


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write run.json."""
    write_atomic(folder / RUN, (json.dumps(facts, indent=1) + "\n").encode())


def began_with(folder: Path) -> list[str]:
    """Return the words of the command that began a stage, even without a checkpoint; [] if not known."""
    try:
        facts = read_json(folder / RUN, Facts, "")
    except (FileNotFoundError, UserError):
        return []
    return [str(word) for word in facts["command"]]


def read_facts(folder: Path) -> dict[str, Any]:
    """Return run.json; an empty dict if the stage has not begun.

    Raises:
        UserError: the file is missing or damaged.
    """
    if not has_begun(folder):
        return {}
    way_out = f"what the run learned starts another one: --run NEW --from {folder}"
    try:
        facts: dict[str, Any] = read_json(folder / RUN, Facts, way_out)
    except FileNotFoundError:
        raise UserError(f"{folder / RUN}: no such file; {way_out}") from None
    return facts


def present_samples(samples: SampleList) -> dict[str, int]:
    """Return how many samples of each data set have all their features, all splits together."""
    return {c.dataset: c.present for c in samples.counts}
