"""Prepare a stage: open its space, build its model, load its data. Whatever cannot work is refused here.

reader = open_space(options)
origin = starting_point(options, folder, command)      # None for a stage 1 that starts afresh
options = resolve(options, origin, reader)
data = load_data(options, reader, tokenizer, folder)
vlm = build_model(options, origin, reader.spec, device)
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

import configs
from cache.errors import NotFoundError
from cache.format.spec import FeatureSpec
from cache.maintenance.encode_command import WantedSpace, encode_command
from cache.remote.open import cache_root, open_reader
from cache.store.paths import CacheRoot, is_url
from cache.store.reader import FeatureReader
from cache.store.samples import dataset_names
from configs import UserError
from configs.command_line import CommandLine
from model.connector import connector_kind
from model.io.llava_folder import is_llava
from model.io.run_files import refuse_links
from model.io.saved_model import check_files
from model.language.chat_template import template_version
from model.language.lora import check_packages
from model.language.model import max_positions
from model.language.records import FOLDER_TEMPLATE
from model.tail import VisionTail
from model.vlm import VLM, build_vlm
from train.config import Options, parse_mix, stage_folder
from train.data.join import EmptySplitError, join
from train.data.message_trees import build_message_trees
from train.data.placeholders import Placeholders
from train.data.sample_list import SampleList
from train.data.schedule import SinglePass, TrainingSchedule
from train.data.tokens import TokenStore
from train.data.usable import NothingToLearnError, learnable
from train.stage import files, llava, run_folder, vision_tail
from train.stage.origin import Origin, find_origin, recorded

log = logging.getLogger(__name__)

MAX_BRANCHES = 64
"""Most annotations of one image that share a sequence; the rest are in other sequences, with the image."""
FIRST_STAGE_WORDS = (
    "run",
    "features",
    "space",
    "llm",
    "hardware",
    "device",
    "mirror",
    "allow_private",
)
"""Options that the command for an earlier stage takes over from that for a later one."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """The samples of a stage: those it trains on, and those held out."""

    train: SampleList
    """The training split, as it is frozen in the run. `schedule.trees.samples` are those it trains on."""
    schedule: TrainingSchedule
    """Which of `train` each step takes."""
    val_schedule: SinglePass | None
    """Held-out samples; None if no sample is held out or `eval_every` or `eval_samples` is 0."""


# ---- space and model


def open_space(options: Options) -> FeatureReader:
    """Return a reader of the space to train on.

    Raises:
        CacheError: there is no space, there are several and no `--space`, or it cannot be reached.
    """
    datasets = parse_mix(options.datasets)
    try:
        return open_reader(options.features, options.space, options, datasets=datasets)
    except NotFoundError as error:
        root, folder = CacheRoot(Path(options.features)), Path(options.from_ or "")
        if is_url(options.features) or root.space_names() or not is_llava(folder):
            raise
        what = str(error).partition(". Make one: ")[0]
        raise UserError(f"{what}. Make one: {llava.own_command(folder, root)}") from None


def starting_point(options: Options, folder: Path, command: CommandLine) -> Origin | None:
    """Return the model whose weights the stage starts from; None for a stage 1 that starts afresh.

    Args:
        options: the options.
        folder: the folder of the stage. A stage that has begun keeps its starting point.
        command: the command line, for messages.

    Raises:
        UserError: the previous stage is not finished, or `--from` names no model.
    """
    if facts := run_folder.read_facts(folder):
        return recorded(facts["origin"], folder)
    if options.from_ is not None:
        return find_origin(options.from_)
    if options.stage == 1:
        return None
    before = stage_folder(options.run, options.stage - 1)
    if not run_folder.is_finished(before):
        begun = run_folder.has_begun(before)
        first = command.only(*FIRST_STAGE_WORDS, stage=options.stage - 1, resume=begun)
        raise UserError(
            f"stage {options.stage} starts from stage {options.stage - 1} of the same run, and {before} "
            f"{'is not finished' if begun else 'does not exist'}; start from another model (--from RUN), "
            f"or train that stage: {first}"
        )
    refuse_links(before)
    return find_origin(str(before / files.FINAL))


def resolve(options: Options, origin: Origin | None, reader: FeatureReader) -> Options:
    """Return the options with `llm` and `connector` filled in, from `origin` or from configs/model.yaml.

    Raises:
        UserError: `origin` was trained on another space or has another model than the options name, or the
            window is longer than the language model allows.
    """
    vision_tail.check_blocks(options, reader)
    if origin is None:
        fresh = configs.load("model")
        llm, connector = options.llm or fresh["llm"], options.connector or fresh["connector"]
        connector_kind(connector)
        check_window(options, llm, max_positions(llm))
        return dataclasses.replace(options, llm=llm, connector=connector)
    meta = origin.meta
    if origin.kind == "final":
        check_files(origin.path, meta, contents=False)
    if origin.kind == "llava":
        llava.check_tower(origin.path, reader)
    else:
        check_space(meta, reader, origin.path)
    for name in ("llm", "connector"):
        wanted = getattr(options, name)
        if wanted not in (None, meta[name]):
            raise UserError(
                f"{origin}: its {name} is {meta[name]}, not {wanted}; leave --{name} out, "
                "or start afresh: --stage 1 --run NEW"
            )
    check_window(options, str(origin), origin.max_positions())
    where = f"stage {meta['stage']}, step {meta['step']}" if meta["stage"] else "a LLaVA"
    log.info("starting from %s (%s)", origin, where)
    return dataclasses.replace(options, llm=meta["llm"], connector=meta["connector"])


def check_window(options: Options, llm: str, most: int | None) -> None:
    """Raise UserError if `max_sequence_length` is more than the language model declares, if it does.

    A model computes nonsense for positions it was not made for, without an error.
    """
    if most is not None and options.max_sequence_length > most:
        raise UserError(
            f"max_sequence_length {options.max_sequence_length:,} is more than the {most:,} positions of "
            f"{llm}; give --max-sequence-length {most} (fewer frames: --max-frames), or another --llm"
        )


def build_model(
    options: Options,
    origin: Origin | None,
    spec: FeatureSpec,
    device: torch.device,
    tail: VisionTail | None = None,
) -> VLM:
    """Return the model with its initial weights, on the device, frozen as the options say.

    Args:
        options: the resolved options.
        origin: what it starts from; None: a language model and a new connector.
        spec: of the space.
        device: where it is put.
        tail: the encoder's last blocks as encoded, which a model from another stage has of its own.
    """
    if origin is None:
        assert options.llm is not None and options.connector is not None, "not resolved"
        vlm, _ = build_vlm(spec.seen.width, options.llm, options.connector, options.seed)
        vlm.tail = tail
    else:
        vlm = origin.load(tail)
    if options.lora:
        vlm.add_adapters(options.lora, options.seed, load_in_4bit=options.load_in_4bit)
    vlm.to(device)
    vlm.flash = options.use_flash_attention
    if options.use_gradient_checkpointing:
        vlm.gradient_checkpointing(True)
    vlm.freeze(options.train_connector, options.train_llm, options.train_vision_blocks)
    return vlm


def check_adapters(options: Options, device: torch.device) -> None:
    """Raise UserError if adapters are to be trained and a package or the GPU that they need is missing."""
    if options.inspect:
        return
    if options.load_in_4bit and device.type != "cuda":
        raise UserError(
            f"--load-in-4bit: weights of 4 bits need an NVIDIA GPU, not {device}; leave it out: "
            "--no-load-in-4bit"
        )
    if options.lora:
        check_packages(options.load_in_4bit)


def check_template(options: Options, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise UserError if samples are to be cut between turns and the template is that of an imported folder.

    Such a template may write a part of a conversation in another way than the whole.
    """
    if options.over_long == "split" and template_version(tokenizer) == FOLDER_TEMPLATE:
        raise UserError(
            "--over-long split: a conversation that a folder's own chat template writes cannot be cut; leave "
            "too long samples out: --over-long leave-out"
        )


def check_space(meta: Mapping[str, Any], reader: FeatureReader, origin: Path) -> None:
    """Raise UserError, naming the differences, if a model was trained on features encoded differently."""
    spec, root = reader.spec, cache_root(reader)
    trained_on = FeatureSpec.from_json(meta["space"]["spec"])
    # The container is only the on-disk format: it does not change the features.
    trained_on = dataclasses.replace(trained_on, container=spec.container)
    if (trained_on.fingerprint, trained_on.tail) == (spec.fingerprint, spec.tail):
        return
    before, now = _flat(trained_on), _flat(spec)
    differ = [
        f"{key} {_short(before.get(key))} there, {_short(now.get(key))} here"
        for key in before | now
        if before.get(key) != now.get(key) and key != "encoder"
    ]
    if trained_on.name in root.space_names():
        way_out = f"choose that one: --space {trained_on.name}"
    else:
        load = meta["space"].get("load") or {}
        command = encode_command(
            root, None, WantedSpace(trained_on, load), configs.load("encoders")
        )
        way_out = f"encode with the same settings: {command}"
    raise UserError(
        f"{origin}: was trained on the space {trained_on.name}, not on {spec.name} ({'; '.join(differ)}); "
        f"{way_out}"
    )


def _flat(spec: FeatureSpec) -> dict[str, Any]:
    """Return the fields of a spec by name, those of its tail as `tail.first`."""
    values = spec.to_json()
    return values | {f"tail.{key}": value for key, value in values.pop("tail", {}).items()}


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:8]}…"


# ---- data


def mix_of(options: Options, root: CacheRoot) -> dict[str, float | None]:
    """Return the data sets to train on and their shares: those of `--datasets`, or all in the cache.

    Raises:
        UserError: the cache has no data set.
    """
    mix = parse_mix(options.datasets) or dict.fromkeys(dataset_names(root))
    if not mix:
        raise UserError(f"no data set under {root.path}/samples; make one: {encode_command(root)}")
    return mix


def load_data(
    options: Options,
    reader: FeatureReader,
    tokenizer: Any,
    folder: Path,
    one_at_a_time: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> Data:
    """Return the samples, their tokens and the schedule of steps; on resume, those the run began with.

    Args:
        options: the resolved options.
        reader: a reader of the space.
        tokenizer: the language model's tokenizer.
        folder: the folder of the stage.
        one_at_a_time: entered while text is tokenised, so that one of several processes does it and the
            others find it done.

    Raises:
        UserError: features are missing, no data set is in the cache, no sample has text to learn, or a sample
            is longer than the window and `over_long` is `refuse`.
    """
    root = cache_root(reader)
    facts = run_folder.read_facts(folder)
    train = join(
        root,
        reader,
        mix_of(options, root),
        split="train",
        held_out=options.held_out,
        min_coverage=options.min_coverage,
        max_frames=options.max_frames,
        frozen=folder / files.SAMPLES if facts else None,
    )
    if facts:
        _log_growth(facts["samples"], train)
    token_folder = folder.parent.parent / ".tokens"
    with one_at_a_time():
        tokens = TokenStore.open(root, train.names, tokenizer, folder=token_folder)
    limits: dict[str, Any] = {
        "max_tokens": options.max_sequence_length,
        "max_branches": min(MAX_BRANCHES, options.samples_per_step),
        "placeholders": Placeholders.of(reader.spec, tokenizer),
        "over_long": options.over_long,
    }
    schedule = TrainingSchedule(
        build_message_trees(train, tokens, **limits),
        options.samples_per_step,
        seed=options.seed,
        order=options.order,
    )
    val_schedule = None
    if (val := _held_out(options, reader, train)) is not None:
        val_tokens = TokenStore.open(root, val.names, tokenizer, folder=token_folder)
        try:
            val = learnable(val, val_tokens).head(-(-options.eval_samples // len(train.names)))
            trees = build_message_trees(val, val_tokens, **limits)
            val_schedule = SinglePass(trees, options.samples_per_step)
        except NothingToLearnError:  # a warning has counted the samples
            log.warning("no held-out sample can be used, so no held-out loss is measured")
    return Data(train=train, schedule=schedule, val_schedule=val_schedule)


def _held_out(options: Options, reader: FeatureReader, train: SampleList) -> SampleList | None:
    """Return the held-out samples; None if there are none, or if no held-out loss is to be measured."""
    if not (options.eval_every and options.eval_samples):
        return None
    try:
        return join(
            train.root,
            reader,
            dict.fromkeys(train.names),
            split="val",
            held_out=options.held_out,
            min_coverage=0.0,
            max_frames=options.max_frames,
        )
    except EmptySplitError:
        log.warning("nothing is held out (--held-out %s of a few images)", options.held_out)
        return None


def _log_growth(before: Mapping[str, int], now: SampleList) -> None:
    """Warn if the cache has more samples than when the run began; the run keeps its list."""
    for name, count in run_folder.present_samples(now).items():
        if (more := count - before.get(name, 0)) > 0:
            log.warning(
                "the cache has grown by %s samples of %s since this run began; it keeps its list",
                f"{more:,}",
                name,
            )
