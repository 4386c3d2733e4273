"""Draw the report of a run: figures, scores, curves, and media with the answers about them: `report`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cache.maintenance.local_media import LocalMedia
from cache.remote.open import local_root
from cache.store.files import write_atomic
from cache.store.paths import CacheRoot
from cache.view import page
from cache.view.charts import Line, bar, finite, line_chart, smoothed
from configs import MOST_YAML
from configs.console import bytes_text, duration_text
from configs.signals import importing
from configs.text import say
from model.io.run_files import read_bytes
from model.io.runs import find_run, read_meta
from train.evaluate.metrics import CAPTIONS, MEAN_ERROR
from train.evaluate.options import Options as EvaluateOptions
from train.evaluate.pointing import POINTS, points_in
from train.evaluate.result import Evaluation, cells, figure, read
from train.evaluate.run_options import with_features
from train.evaluate.scoring import Answer
from train.metrics import read_metrics
from train.report.media import Picture, find_media, picture
from train.report.options import Options
from train.stage.files import CONFIG


def report(options: Options) -> None:
    """Write the page. What is not evaluated yet is evaluated now."""
    final = find_run(options.run, options.stage)
    folder = final.parent
    options = with_features(options, final)
    assert options.features is not None
    root = local_root(options.features, options)
    local = LocalMedia(root, media=options.media)
    result = evaluated(final, options)
    html = render(
        result,
        read_metrics(folder),
        pick_media(result.answers, options.images, root, local),
        config=_config(folder / CONFIG),
        meta=read_meta(final),
    )
    output = options.output or folder / "report.html"
    data = html.encode(errors="replace")  # text from JSON may hold half a surrogate pair
    write_atomic(output, data)
    if local.note():
        say(local.note())
    say(f"{output}: {bytes_text(len(data))}")


def _config(path: Path) -> str:
    """Return the options of a run as its file says them; empty without the file."""
    try:
        return read_bytes(path, "remove it", most=MOST_YAML).decode(errors="replace")
    except FileNotFoundError:
        return ""


def evaluated(final: Path, options: Options) -> Evaluation:
    """Return the saved evaluation if it is of this model; otherwise evaluate it now."""
    saved = final.parent / f"evaluation-{options.split}.json"
    if saved.exists():
        result = read(saved)
        if result.step == read_meta(final)["step"]:
            return result
    shared = ("features", "split", "device", "mirror", "mirror_gb", "allow_private")
    values: dict[str, Any] = {name: getattr(options, name) for name in shared}
    with importing():
        from train.evaluate.evaluation import evaluate

    return evaluate(EvaluateOptions(run=str(final), **values))


# ---- images and videos


Shown = tuple[list[Picture], list[Answer]]
"""The images and videos of one or more samples, and every question about them."""


def pick_media(
    answers: Sequence[Answer], most: int, root: CacheRoot, local: LocalMedia
) -> list[Shown]:
    """Return up to `most` images or videos (or groups of them) with all questions about each.

    Data sets take turns; within one, the order is that of the answers.
    """
    groups: dict[tuple[str, ...], list[Answer]] = {}
    for one in answers:
        if one.media:
            groups.setdefault(one.media, []).append(one)
    queues: dict[str, list[tuple[str, ...]]] = {}
    for media, about in groups.items():
        queues.setdefault(about[0].sample.split("/")[0], []).append(media)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*queues.values()))
    chosen = [media for media in turns if media is not None][:most]
    found = find_media({source for media in chosen for source in media}, root)
    return [
        ([picture(source, found.get(source), local) for source in media], groups[media])
        for media in chosen
    ]


def marks(answers: Sequence[Answer], number: int) -> list[tuple[str, float, float]]:
    """Return (CSS class, left, top) of each point in image `number`, from 1; left and top in percent.

    A `ring` is where an answer should point; a `right` or `wrong` dot is where it points.
    """
    return [
        (style, min(x, 1000) / 10, min(y, 1000) / 10)
        for one in answers
        for style, text in (
            ("ring", one.expected),
            ("right" if one.correct else "wrong", one.given),
        )
        for image, x, y in points_in(text)
        if image == number
    ]


# ---- the page


def render(
    result: Evaluation,
    lines: Sequence[Mapping[str, Any]],
    shown: Sequence[Shown],
    *,
    config: str,
    meta: Mapping[str, Any],
) -> str:
    """Return the HTML of the page.

    Args:
        result: scores and answers.
        lines: the lines of metrics.jsonl.
        shown: images and videos with their questions.
        config: the options of the run, YAML.
        meta: content of the saved model's nanomolmo2.json.
    """
    steps = [line for line in lines if "loss" in line]  # the others report evaluations
    spent = f" in {duration_text(sum(line.get('step_s', 0) for line in steps))}" if steps else ""
    return page.render(
        Path(__file__).with_name("report.html"),
        title=f"{Path(result.run).name}, stage {result.stage}",
        summary=f"{meta['llm']} with a {meta['connector']} connector on {result.space} · "
        f"{result.step:,} steps{spent} · {result.samples:,} samples of the {result.split} split",
        result=result,
        figures=figures(result),
        scores=[
            (
                name,
                f"{questions:,}" if name else "",
                score.name,
                "" if score.name == MEAN_ERROR else bar(score.value, score.blind),
                *cells(score),
            )
            for name, questions, score in result.rows
        ],
        charts=curves(lines),
        shown=shown,
        points=any(points_in(one.expected) for one in result.answers),
        config=config,
        marks=marks,
        readable=readable,
        CAPTIONS=CAPTIONS,
    )


def figures(result: Evaluation) -> list[tuple[str, str, str]]:
    """Return the most important figures: (value, label, explanation)."""
    found = []
    if (mean := result.mean) is not None:
        found.append((figure(mean.value, mean.interval), "score", "mean over question types"))
        if mean.blind is not None:
            note = "the same model with images and videos exchanged"
            found.append((figure(mean.blind, mean.blind_interval), "blind", note))
    beside = "" if result.blind_loss is None else f"{result.blind_loss:.4g} blind"
    return [*found, (f"{result.loss:.4g}", "loss", beside)]


def curves(lines: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """Return charts of the loss, the learning rates and the gradient norm over steps."""
    steps = [line for line in lines if "loss" in line]

    def line(name: str, label: str, style: str) -> Line:
        points = finite([(one["step"], one[name]) for one in steps if name in one])
        return Line(label=label, points=points, style=style)

    def smooth(name: str, label: str) -> list[Line]:
        raw = line(name, "", "a thin faint")
        return [raw, Line(label=label, points=smoothed(raw.points), style="a")]

    held = [(one["step"], one["held_out_loss"]) for one in lines if "held_out_loss" in one]
    loss = [
        *smooth("loss", "training, smoothed"),
        Line(label="held out", points=held, style="b", dots=True),
    ]
    rates = [line("lr", "language model", "a"), line("connector_lr", "connector", "b dash")]
    rates.append(line("vision_lr", "vision encoder", "a dash"))
    return [
        line_chart(loss, title="Loss", wide=True, log_y=True),
        # A frozen part has the rate 0 throughout.
        line_chart([one for one in rates if any(y for _, y in one.points)], title="Learning rate"),
        line_chart(smooth("grad_norm", "smoothed"), title="Gradient norm"),
    ]


def readable(answer: str) -> str:
    """Return an answer as text; points as coordinates and label instead of their markup."""
    label = POINTS.fullmatch(answer.strip())
    if label is None:
        return answer
    return " ".join([*(f"({x}, {y})" for _, x, y in points_in(answer)), label[2]])
