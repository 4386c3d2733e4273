"""Measure the loss of a trained model on held-out samples, and score its answers: `evaluate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cache.format.spec import FeatureSpec
from cache.remote.open import cache_root, open_reader
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from configs.progress import Meter, number_text
from model.inference import answer
from model.io.device import pick_device
from model.io.runs import find_run
from model.io.saved_model import load_final
from train.config import Options as TrainOptions
from train.config import parse_mix
from train.data.features import feature_bytes, read_features
from train.data.join import join
from train.data.loader import FeatureLoader
from train.data.message_trees import build_message_trees
from train.data.placeholders import Placeholders
from train.data.sample_list import SampleList
from train.data.schedule import SinglePass
from train.data.tokens import TokenStore
from train.data.usable import learnable
from train.evaluate.metrics import choose_metrics, parse_metrics, score_answer
from train.evaluate.options import Options
from train.evaluate.questions import Question, questions
from train.evaluate.result import Evaluation, card_rows, save
from train.evaluate.run_options import trained_with, with_features
from train.evaluate.scoring import Answer, summarize
from train.stage.card import add_scores
from train.stage.setup import check_space, mix_of
from train.step import Forward, choose_precision

LOSS_STEP = 64
"""Samples a step when measuring the loss; changes memory, not the result."""
ANSWERS_AT_ONCE = 256
"""Most questions whose features are in memory together."""
ANSWER_BYTES = 512 << 20
"""Most bytes of their features, unpacked, unless one question alone has more."""


def evaluate(options: Options) -> Evaluation:
    """Measure loss and answers; save them beside the model, as evaluation-<split>.json, and return them.

    Raises:
        UserError, CacheError: there is no such run, space or data set, or the run used another space.
    """
    final = find_run(options.run, options.stage)
    device = pick_device(options.device)
    options = with_features(options, final)
    assert options.features is not None
    vlm, tokenizer, meta = load_final(final, device)
    trained = trained_with(final)
    chosen = parse_mix(options.datasets or trained.datasets)
    reader = open_reader(options.features, meta["space"]["name"], options, datasets=chosen)
    check_space(meta, reader, final)
    root = cache_root(reader)
    asked_for = replace(trained, datasets=options.datasets or trained.datasets)
    mix = dict.fromkeys(mix_of(asked_for, root))
    samples = join(
        root,
        reader,
        mix,
        split=options.split,
        held_out=trained.held_out,
        min_coverage=0.0,
        max_frames=trained.max_frames,
    )
    tokens = TokenStore.open(
        root, samples.names, tokenizer, folder=final.parent.parent.parent / ".tokens"
    )
    forward = Forward(
        vlm=vlm,
        spec=reader.spec,
        device=device,
        autocast=choose_precision(trained.precision, device, vlm),
    )
    samples = learnable(samples, tokens).head(options.limit)
    lists = [samples, samples.blind(trained.seed)] if options.blind else [samples]
    placeholders = Placeholders.of(reader.spec, tokenizer)
    losses = [mean_loss(s, tokens, reader, forward, trained, placeholders) for s in lists]
    asked = list(questions(root, samples))
    metrics = choose_metrics(asked, parse_metrics(options.metric))
    with Meter("answer", len(asked) * len(lists), text=number_text) as meter:
        given = [answers_of(s, root, reader, forward, tokenizer, options, meter) for s in lists]
    answers = scored(samples, asked, metrics, given, options.point_distance)
    tasks, mean = summarize(answers)
    result = Evaluation(
        run=str(final.parent.parent),
        stage=meta["stage"],
        step=meta["step"],
        split=options.split,
        space=reader.path.name,
        samples=samples.size,
        loss=losses[0],
        blind_loss=losses[1] if options.blind else None,
        mean=mean,
        tasks=tasks,
        answers=answers,
    )
    save(result, final.parent)
    add_scores(final.parent, meta, card_rows(result))
    return result


# ---- loss and answers


def mean_loss(
    samples: SampleList,
    tokens: TokenStore,
    reader: FeatureReader,
    forward: Forward,
    trained: TrainOptions,
    placeholders: Placeholders,
) -> float:
    """Return the loss per supervised token over all samples of a list."""
    trees = build_message_trees(
        samples,
        tokens,
        max_tokens=trained.max_sequence_length,
        max_branches=LOSS_STEP,
        placeholders=placeholders,
        # An evaluation has no such option: what cannot be split is left out and counted.
        over_long="split" if trained.over_long == "split" else "leave-out",
    )
    schedule = SinglePass(trees, LOSS_STEP)
    with FeatureLoader(schedule, reader, max_tokens=trained.max_tokens) as loader:
        total, weight, _ = forward.loss_sums(loader)
    return total / weight


def answers_of(
    samples: SampleList,
    root: CacheRoot,
    reader: FeatureReader,
    forward: Forward,
    tokenizer: Any,
    options: Options,
    meter: Meter,
) -> list[str]:
    """Return the model's answer to every question of a list, in order."""
    result: list[str] = []
    for some in batches(samples, root, reader.spec):
        prompts = [(q.prompt, read_features(samples, q.media, reader)) for q in some]
        with forward.precision():
            result += answer(forward.vlm, tokenizer, prompts, max_new_tokens=options.max_new_tokens)
        meter.add(len(some))
    return result


def batches(samples: SampleList, root: CacheRoot, spec: FeatureSpec) -> Iterator[list[Question]]:
    """Yield the questions of a list in batches of at most ANSWERS_AT_ONCE and ANSWER_BYTES."""
    batch: list[Question] = []
    size = 0
    for question in questions(root, samples):
        more = feature_bytes(samples, question.media, spec)
        if batch and (len(batch) == ANSWERS_AT_ONCE or size + more > ANSWER_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(question)
        size += more
    if batch:
        yield batch


# ---- scores


def scored(
    samples: SampleList,
    asked: Sequence[Question],
    metrics: Mapping[tuple[str, str], str],
    given: Sequence[Sequence[str]],
    distance: float,
) -> tuple[Answer, ...]:
    """Return every question with its answers and their scores.

    Args:
        samples: the list that the questions are of.
        asked: the questions.
        metrics: data set and question type -> metric.
        given: the answers with the question's own media and, for blind figures, with exchanged media.
        distance: largest distance of a right point, as a share of the image.
    """
    result = []
    for question, *answers in zip(asked, *given, strict=True):
        sample, prompt, metric = question.sample, question.prompt, metrics[question.type]
        scores = [score_answer(metric, one, question.answers, distance=distance) for one in answers]
        right = [bool(one) and one[0] >= 0.5 for one in scores]
        name = f"{sample.dataset}/{sample.id}"
        blind = len(answers) > 1
        result.append(
            Answer(
                sample=name,
                task=question.type[1],
                media=tuple(ref.source for ref in sample.media),
                item=samples.key(question.media[0]) if question.media else name,
                question=prompt[-1][1] if prompt else "",
                expected=question.expected,
                others=question.others,
                given=answers[0],
                metric=metric,
                scores=scores[0],
                correct=right[0],
                blind=answers[1] if blind else None,
                blind_scores=scores[1] if blind else None,
                blind_correct=right[1] if blind else None,
            )
        )
    return tuple(result)
