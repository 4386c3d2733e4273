"""Where a stage starts: its folder, its model, its data. Every refusal before the first step is here.

runs/<name>/stage<k>/
    config.yaml        the resolved options
    run.json           id, space and its fingerprint, samples of each data set when it began
    samples.safetensors    which samples exactly
    metrics.jsonl  tb/  checkpoints/step-<n>/
    final/             the finished model; there only when the stage is
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import configs
from cache.layout import CacheRoot, read_sealed_json, write_atomic
from cache.reader import FeatureReader, find_space
from cache.spec import FeatureSpec
from cache.tables import dataset_names
from configs import UserError
from model.load import META, find_run, load_final, read_meta
from model.vlm import VLM, build_vlm
from train.config import Options, check_same, read_saved, stage_folder
from train.data import Join, OnePass, StepPlan, TokenStore, grow_trees, join
from train.join import KIND
from train.metrics import read_metrics

log = logging.getLogger(__name__)

CONFIG, RUN, SAMPLES, FINAL, CHECKPOINTS = (
    *("config.yaml", "run.json", "samples.safetensors"),
    *("final", "checkpoints"),
)
MAX_BRANCHES = 64
"""Annotations of one picture that share a sequence; more are split."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a stage learns from, and what is held out."""

    train: Join
    plan: StepPlan
    tokens: TokenStore
    val: OnePass | None
    """None when nothing is held out or `eval_every` is 0."""
    val_tokens: TokenStore | None


# ---- folder


def is_finished(folder: Path) -> bool:
    """Whether a stage's model is there, whole."""
    return (folder / FINAL / META).is_file()


def refuse_processes() -> None:
    """Several processes would write into one run."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "started as several processes (torchrun): the trainer is one process on one GPU so far; "
            "start it with python -m train.run, and raise --gradient-accumulation-steps to keep the batch"
        )


def check_folder(options: Options) -> Path:
    """The stage's folder: new, or an existing one that `--resume` may go on with.

    Raises:
        UserError: it exists and `--resume` was not given, or its options differ.
    """
    folder = stage_folder(options.run, options.stage)
    saved = folder / CONFIG
    if not saved.exists() or options.inspect:
        return folder
    where = f"{folder}: stage {options.stage} of this run exists"
    if is_finished(folder) and not options.resume:
        raise UserError(f"{where} and is finished; choose another name: --run NAME")
    if not options.resume:
        done = max((line["step"] for line in read_metrics(folder)), default=0)
        raise UserError(
            f"{where} ({done} steps); go on with --resume, or choose another: --run NAME"
        )
    check_same(configs.build(Options, read_saved(saved), str(saved)), options, saved)
    return folder


def open_folder(
    folder: Path, options: Options, reader: FeatureReader, data: Data
) -> dict[str, Any]:
    """Make the stage's files when it is new; returns run.json."""
    path = folder / RUN
    if path.exists():
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return facts
    facts = {
        "id": uuid.uuid4().hex[:12],
        "space": reader.path.name,
        "fingerprint": reader.spec.fingerprint,
        "samples": present(data.train),
        "samples_digest": data.train.digest,
    }
    data.train.freeze(folder / SAMPLES)
    write_atomic(folder / CONFIG, configs.dump(options).encode())
    write_atomic(path, (json.dumps(facts, indent=1) + "\n").encode())  # last: the folder is whole
    return facts


# ---- space and model


def open_space(options: Options) -> FeatureReader:
    """The space to read features from.

    Raises:
        UserError: there is none, or several and no `--space`.
    """
    return FeatureReader(find_space(CacheRoot(options.features), options.space))


def starting_point(options: Options) -> Path | None:
    """The `final` folder the weights come from; None for a stage 1 that starts afresh.

    Raises:
        UserError: the stage before is not finished, or `--from` names nothing.
    """
    if options.from_ is not None:
        return find_run(options.from_)
    if options.stage == 1:
        return None
    before = stage_folder(options.run, options.stage - 1)
    if not is_finished(before):
        begun = (before / CONFIG).exists()
        raise UserError(
            f"stage {options.stage} starts from stage {options.stage - 1} of the same run, and {before} "
            f"{'is not finished' if begun else 'does not exist'}: python -m train.run --run {options.run} "
            f"--stage {options.stage - 1}{' --resume' if begun else ''}, or start from another model: "
            "--from RUN"
        )
    return before / FINAL


def resolve(options: Options, origin: Path | None, spec: FeatureSpec) -> Options:
    """The options with language model and connector named: the checkpoint's, or configs/model.yaml's.

    Raises:
        UserError: the checkpoint was trained on another space, or is another model than asked for.
    """
    if origin is None:
        fresh = configs.load("model")
        llm, connector = options.llm or fresh["llm"], options.connector or fresh["connector"]
        return dataclasses.replace(options, llm=llm, connector=connector)
    meta = read_meta(origin)
    check_space(meta, spec, origin)
    for name in ("llm", "connector"):
        wanted = getattr(options, name)
        if wanted not in (None, meta[name]):
            raise UserError(
                f"{origin}: its {name} is {meta[name]}, not {wanted}; leave --{name} out, "
                "or start afresh: --stage 1 --run NEW"
            )
    log.info("starting from %s (stage %s, step %s)", origin, meta["stage"], meta["step"])
    return dataclasses.replace(options, llm=meta["llm"], connector=meta["connector"])


def build_model(
    options: Options, origin: Path | None, spec: FeatureSpec, device: torch.device
) -> VLM:
    """The model with its first weights, on the device, frozen as the options say."""
    if origin is None:
        assert options.llm is not None and options.connector is not None, "not resolved"
        vlm, _ = build_vlm(spec.width, options.llm, options.connector, options.seed)
    else:
        vlm, _, _ = load_final(origin)
    vlm.to(device)
    vlm.flash = options.use_flash_attention
    if options.use_gradient_checkpointing:
        vlm.gradient_checkpointing(True)
    vlm.freeze(options.train_connector, options.train_llm)
    return vlm


def check_space(meta: Mapping[str, Any], spec: FeatureSpec, origin: Path) -> None:
    """A model only understands features made as those it learned from.

    Raises:
        UserError: these were made differently; it names what differs.
    """
    trained_on = FeatureSpec.from_json(meta["space"]["spec"])
    if trained_on.fingerprint == spec.fingerprint:
        return
    before, now = trained_on.to_json(), spec.to_json()
    differ = [
        f"{key} {_short(before[key])} there, {_short(now[key])} here"
        for key in before
        if before[key] != now[key] and key != "encoder"
    ]
    raise UserError(
        f"{origin}: was trained on the space {trained_on.name}, not on {spec.name} ({'; '.join(differ)}); "
        f"choose that one: --space {trained_on.name}, or encode with the same settings: python -m encode.run"
    )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:8]}…"


def final_meta(options: Options, reader: FeatureReader, step: int) -> dict[str, Any]:
    """What is saved beside a finished model: enough to use it without this run."""
    return {
        "llm": options.llm,
        "connector": options.connector,
        "space": read_sealed_json(reader.paths.space_json),
        "stage": options.stage,
        "step": step,
    }


# ---- data


def parse_mix(text: str, root: CacheRoot) -> dict[str, float | None]:
    """`a=0.6,b=0.4` or `a,b`; every data set under the cache when empty.

    Raises:
        UserError: a share is no number, or there is no data set at all.
    """
    mix: dict[str, float | None] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, share = part.partition("=")
        try:
            mix[name.strip()] = float(share) if equals else None
        except ValueError:
            raise UserError(
                f"--datasets {part}: {share!r} is no number; write NAME=SHARE"
            ) from None
    if not mix:
        mix = dict.fromkeys(dataset_names(root))
    if not mix:
        raise UserError(
            f"no data set under {root.path}/samples; make one: "
            f"python -m encode.run --dataset demo --encoder demo --features {root.path}"
        )
    return mix


def load_data(options: Options, reader: FeatureReader, tokenizer: Any, folder: Path) -> Data:
    """Samples, their tokens, and the plan of steps; on resume exactly those the run began with.

    Raises:
        UserError: too few features, no such data set, a sample longer than the window, ...
    """
    root = CacheRoot(options.features)
    mix = parse_mix(options.datasets, root)
    saved = folder / SAMPLES
    train = join(
        root,
        reader,
        mix,
        split="train",
        held_out=options.held_out,
        min_coverage=options.min_coverage,
        frozen=saved if saved.exists() else None,
    )
    if (folder / RUN).exists():
        _notice_growth(json.loads((folder / RUN).read_text(encoding="utf-8"))["samples"], train)
    store = folder.parent.parent / ".tokens"
    tokens = TokenStore.open(root, train.names, tokenizer, folder=store)
    window = {
        "max_tokens": options.max_sequence_length,
        "max_branches": min(MAX_BRANCHES, options.samples_per_step),
        "picture_tokens": reader.spec.tokens(KIND),
    }
    plan = StepPlan(
        grow_trees(train, tokens, **window),
        options.samples_per_step,
        seed=options.seed,
        order=options.order,
    )
    val = val_tokens = None
    some = (
        sum(c.present for c in train.counts) > train.size
    )  # a few pictures may have none held out
    if options.eval_every and options.eval_samples and some:
        held = join(
            root,
            reader,
            dict.fromkeys(train.names),
            split="val",
            held_out=options.held_out,
            min_coverage=0.0,
            limit=-(-options.eval_samples // len(train.names)),
        )
        val_tokens = TokenStore.open(root, held.names, tokenizer, folder=store)
        val = OnePass(grow_trees(held, val_tokens, **window), options.samples_per_step)
    return Data(train=train, plan=plan, tokens=tokens, val=val, val_tokens=val_tokens)


def present(joined: Join) -> dict[str, int]:
    """Samples of each data set that have all their features, both splits together."""
    return {c.dataset: c.present for c in joined.counts}


def _notice_growth(before: Mapping[str, int], now: Join) -> None:
    grown = {name: n - before.get(name, 0) for name, n in present(now).items()}
    for name, more in grown.items():
        if more > 0:
            log.warning(
                "the cache has grown by %s samples of %s since this run began; it keeps its list",
                f"{more:,}",
                name,
            )
