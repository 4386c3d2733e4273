"""How well a trained model answers what it has not seen, beside the same model looking at other images.

python -m train.evaluate --run default                       # newest finished stage, held-out samples
python -m train.evaluate --run default --datasets demo --json
python -m train.evaluate --run default --split train         # what it has seen

Answers come from cached features, through the code that `model.generate` uses. *Blind* is the same model
with every image exchanged for another of the split, and every video for another video: what can be known
without looking. The headline is the mean over question types of exact match; captions are reported apart,
since no caption is the only right one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import configs
from cache.errors import CacheError
from cache.remote.open import Elsewhere, open_reader, root_of
from cache.store.files import write_atomic
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from configs import UserError
from model.inference import answer
from model.io.device import pick_device
from model.io.saved_model import find_run, load_final
from train.config import Options as TrainOptions
from train.config import parse_mix, read_saved
from train.data.features import feature_bytes, read_features
from train.data.join import join
from train.data.loader import FeatureLoader
from train.data.message_trees import build_message_trees
from train.data.placeholders import Placeholders
from train.data.sample_list import SampleList
from train.data.schedule import SinglePass
from train.data.tokens import TokenStore
from train.evaluate.questions import EvaluationSample, evaluation_samples
from train.evaluate.scoring import Answer, Task, by_task, headline, is_right
from train.run_folder import CONFIG
from train.setup import check_space, mix_of
from train.step import Forward, choose_precision

log = logging.getLogger(__name__)

PROG = "python -m train.evaluate"
LOSS_STEP = 64
"""Samples at a time when measuring the loss; decides nothing but memory."""
ANSWERS_AT_ONCE = 256
"""Questions whose features are in memory together, at most."""
ANSWER_BYTES = 512 << 20
"""And their features, unpacked, unless one sample alone has more."""


@dataclass(frozen=True, kw_only=True)
class Options(Elsewhere):
    """Answer held-out questions with a trained model."""

    run: str = "default"
    """Name of the run, below runs/, or a path."""
    stage: int | None = None
    """Which stage; the newest finished one when not given."""
    features: str = "cache"
    """The feature cache: a folder, or a URL as train.run takes it."""
    datasets: str = ""
    """Data sets, with commas; those the run was trained on when empty."""
    split: Literal["val", "train"] = "val"
    """`val`: held out, never trained on. `train`: what it has seen."""
    limit: int = 2000
    """Samples of each data set, at most."""
    max_new_tokens: int = 64
    """Longest answer, tokens."""
    blind: bool = True
    """Also answer with images and videos exchanged within the split."""
    point_grid: int = 3
    """Points are right in the right cell of a grid of this many cells a side; 0: exact text."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit < 1 or self.max_new_tokens < 1:
            raise ValueError("limit and max_new_tokens must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything measured."""

    run: str
    stage: int
    step: int
    split: str
    space: str
    samples: int
    loss: float
    """Cross-entropy a supervised token, nats."""
    blind_loss: float | None
    mean: float | None
    """Headline: mean over question types without captions, of exact match; None without such types."""
    blind_mean: float | None
    tasks: tuple[Task, ...]
    answers: tuple[Answer, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    options = configs.parse(Options, argv, prog=PROG, description=__doc__)
    result = evaluate(options)
    print(json.dumps(summary(result)) if options.json else table(result))
    return 0


def evaluate(options: Options) -> Evaluation:
    """Measure loss and answers; everything is also written beside the model, as evaluation-<split>.json."""
    final = find_run(options.run, options.stage)
    device = pick_device(options.device)
    vlm, tokenizer, meta = load_final(final, device)
    trained = trained_with(final)
    chosen = parse_mix(options.datasets or trained.datasets)
    reader = open_reader(options.features, meta["space"]["name"], options, datasets=chosen)
    check_space(meta, reader.spec, final)
    root = root_of(reader)
    asked_for = replace(trained, datasets=options.datasets or trained.datasets)
    mix = dict.fromkeys(mix_of(asked_for, root))
    seen = join(
        root,
        reader,
        mix,
        split=options.split,
        held_out=trained.held_out,
        min_coverage=0.0,
        max_frames=trained.max_frames,
        limit=options.limit,
    )
    tokens = TokenStore.open(
        root, seen.names, tokenizer, folder=final.parent.parent.parent / ".tokens"
    )
    forward = Forward(
        vlm=vlm,
        spec=reader.spec,
        device=device,
        autocast=choose_precision(trained.precision, device, vlm),
    )
    joins = [seen, seen.blind(trained.seed)] if options.blind else [seen]
    places = Placeholders.of(reader.spec, tokenizer)
    losses = [held_out_loss(j, tokens, reader, forward, trained, places) for j in joins]
    given = [answers_of(j, root, reader, forward, tokenizer, options) for j in joins]
    answers = scored(seen, root, given, options.point_grid)
    tasks = by_task(answers)
    mean, blind_mean = headline(tasks)
    result = Evaluation(
        run=str(final.parent.parent),
        stage=meta["stage"],
        step=meta["step"],
        split=options.split,
        space=reader.path.name,
        samples=seen.size,
        loss=losses[0],
        blind_loss=losses[1] if options.blind else None,
        mean=mean,
        blind_mean=blind_mean,
        tasks=tasks,
        answers=answers,
    )
    save(final.parent / f"evaluation-{options.split}.json", result)
    return result


def trained_with(final: Path) -> TrainOptions:
    """The options of the stage a model came from; defaults for a model that was moved elsewhere."""
    path = final.parent / CONFIG
    if not path.exists():
        log.warning("%s: not there, so the split is taken with default options", path)
        return TrainOptions()
    return configs.build(TrainOptions, read_saved(path), str(path))


# ---- loss and answers


def held_out_loss(
    joined: SampleList,
    tokens: TokenStore,
    reader: FeatureReader,
    forward: Forward,
    trained: TrainOptions,
    places: Placeholders,
) -> float:
    """Loss a supervised token over all samples of the join."""
    trees = build_message_trees(
        joined,
        tokens,
        max_tokens=trained.max_sequence_length,
        max_branches=LOSS_STEP,
        placeholders=places,
    )
    plan = SinglePass(trees, LOSS_STEP)
    with FeatureLoader(
        plan, tokens, reader, max_tokens=trained.max_tokens, stop=len(plan)
    ) as loader:
        total, weight, _ = forward.loss_sums(loader)
    return total / weight


def answers_of(
    joined: SampleList,
    root: CacheRoot,
    reader: FeatureReader,
    forward: Forward,
    tokenizer: Any,
    options: Options,
) -> list[str]:
    """The model's answer to the last turn of every sample of the join, in its order."""
    result: list[str] = []
    waiting: list[EvaluationSample] = []
    size = 0

    def flush() -> None:
        prompts = [
            (asked(one.messages), read_features(joined, one.media, reader)) for one in waiting
        ]
        with forward.precision():
            result.extend(
                answer(forward.vlm, tokenizer, prompts, max_new_tokens=options.max_new_tokens)
            )
        waiting.clear()

    for one in questions(root, joined):
        more = feature_bytes(joined, one.media, reader.spec)
        if waiting and (len(waiting) == ANSWERS_AT_ONCE or size + more > ANSWER_BYTES):
            flush()
            size = 0
        waiting.append(one)
        size += more
    if waiting:
        flush()
    return result


def questions(root: CacheRoot, joined: SampleList) -> Iterator[EvaluationSample]:
    """The samples that have an answer to compare with."""
    for one in evaluation_samples(root, joined):
        if any(role == "assistant" for role, _, _ in one.messages):
            yield one


def asked(messages: Sequence[tuple[str, str, float]]) -> list[tuple[str, str, float]]:
    """A conversation up to its last answer, which the model is to give."""
    last = max(i for i, (role, _, _) in enumerate(messages) if role == "assistant")
    return list(messages[:last])


# ---- scores


def scored(
    joined: SampleList, root: CacheRoot, given: Sequence[Sequence[str]], grid: int
) -> tuple[Answer, ...]:
    """Answers beside what was expected; `given` holds one list, or two when the second is blind."""
    result = []
    for i, one in enumerate(questions(root, joined)):
        sample = one.sample
        task = sample.task or sample.dataset
        expected = next(m.content for m in reversed(sample.messages) if m.role == "assistant")
        said = [answers[i] for answers in given]
        right = [is_right(task, expected, text, grid) for text in said]
        result.append(
            Answer(
                sample=f"{sample.dataset}/{sample.id}",
                task=task,
                media=tuple(ref.source for ref in sample.media),
                question=asked(one.messages)[-1][1] if asked(one.messages) else "",
                expected=expected,
                given=said[0],
                correct=right[0],
                blind=said[1] if len(said) > 1 else None,
                blind_correct=right[1] if len(said) > 1 else None,
            )
        )
    return tuple(result)


# ---- output


def summary(result: Evaluation) -> dict[str, Any]:
    """The result without the single answers."""
    return {k: v for k, v in asdict(result).items() if k != "answers"}


def table(result: Evaluation) -> str:
    """The result for people."""
    rows = [("", "questions", "exact match", "blind")]
    rows += [(t.name, f"{t.questions:,}", _share(t.exact), _share(t.blind)) for t in result.tasks]
    rows.append(("mean without captions", "", _share(result.mean), _share(result.blind_mean)))
    rows.append(("loss", f"{result.samples:,}", _nats(result.loss), _nats(result.blind_loss)))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        f"{row[0]:<{widths[0]}}  "
        + "  ".join(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    head = f"{result.run} stage {result.stage} step {result.step}, {result.split} split, space {result.space}"
    return "\n".join([head, *lines])


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _nats(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def save(path: Path, result: Evaluation) -> None:
    """Everything, single answers included, as JSON."""
    write_atomic(path, (json.dumps(asdict(result), indent=1) + "\n").encode())


def read(path: Path) -> Evaluation:
    """The inverse of `save`.

    Raises:
        UserError: it is not there, or of another version.
    """
    try:
        return configs.build(Evaluation, json.loads(path.read_text(encoding="utf-8")), str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: not there; make it: {PROG} --run {path.parent.parent}") from None


if __name__ == "__main__":
    configs.command(main, errors=(CacheError,))
