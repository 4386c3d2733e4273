"""A run as one HTML page: held-out media with questions and answers, scores beside blind, loss curves.

python -m train.report --run default                      # runs/default/stage<k>/report.html
python -m train.report --run default --output report.html --images 60

The page stands alone: images are inside it, videos as strips of frames, curves are SVG, nothing is fetched.
Media are read from where the samples found them (train/report_media.py). Answers come from
`train.evaluate`, which is run first when it has not been.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

import configs
from cache.remote.open import Elsewhere, local_root
from cache.store.files import write_atomic
from cache.store.paths import CacheRoot
from model.io.saved_model import find_run, read_meta
from train.evaluate import __main__ as evaluation
from train.evaluate.__main__ import Evaluation
from train.evaluate.scoring import CAPTION, POINTS, Answer, points_in
from train.metrics import duration, read_metrics
from train.report.charts import Line, chart, finite, smoothed
from train.report.media import find_media, medium
from train.report.style import STYLE
from train.run_folder import CONFIG

log = logging.getLogger(__name__)

PROG = "python -m train.report"


@dataclass(frozen=True, kw_only=True)
class Options(Elsewhere):
    """Write the report of a run."""

    run: str = "default"
    """Name of the run, below runs/, or a path."""
    stage: int | None = None
    """Which stage; the newest finished one when not given."""
    features: str = "cache"
    """The feature cache: a folder, or a URL as train.run takes it."""
    split: Literal["val", "train"] = "val"
    """Which images and videos to show."""
    images: int = 36
    """How many."""
    output: Path | None = None
    """Where to write; `report.html` beside the model when not given."""
    device: str = "auto"
    """Where to compute the answers, when that has not been done."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images < 0:
            raise ValueError(f"images {self.images} is negative")


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    options = configs.parse(Options, argv, prog=PROG, description=__doc__)
    final = find_run(options.run, options.stage)
    folder = final.parent
    result = evaluated(final, options)
    page = render(
        result,
        read_metrics(folder),
        images_of(result.answers, options.images, local_root(options.features, options)),
        config=(folder / CONFIG).read_text(encoding="utf-8") if (folder / CONFIG).exists() else "",
        meta=read_meta(final),
    )
    output = options.output or folder / "report.html"
    write_atomic(output, page.encode())
    print(f"{output}: {len(page.encode()) / 1e6:.1f} MB")
    return 0


def evaluated(final: Path, options: Options) -> Evaluation:
    """The answers saved for this very model, or made now."""
    saved = final.parent / f"evaluation-{options.split}.json"
    if saved.exists():
        result = evaluation.read(saved)
        if result.step == read_meta(final)["step"]:
            return result
    return evaluation.evaluate(
        evaluation.Options(
            run=str(final),
            features=options.features,
            split=options.split,
            device=options.device,
            mirror=options.mirror,
            mirror_gb=options.mirror_gb,
            allow_private=options.allow_private,
        )
    )


# ---- images


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One sample's images and videos, and everything asked about them."""

    images: tuple[str, ...]
    """HTML of each, with what is pointed at."""
    answers: tuple[Answer, ...]


def images_of(answers: Sequence[Answer], most: int, root: CacheRoot) -> list[Shown]:
    """The first `most` images or videos (or groups) with all their questions, evenly over the data sets."""
    groups: dict[tuple[str, ...], list[Answer]] = {}
    for one in answers:
        if one.media:
            groups.setdefault(one.media, []).append(one)
    queues: dict[str, list[tuple[str, ...]]] = {}
    for media, about in groups.items():
        queues.setdefault(about[0].sample.split("/")[0], []).append(media)
    chosen: list[tuple[str, ...]] = []
    for rank in range(max(map(len, queues.values()), default=0)):
        chosen += [queue[rank] for queue in queues.values() if rank < len(queue)]
    chosen = chosen[:most]
    found = find_media({source for media in chosen for source in media}, root)
    return [
        Shown(
            images=tuple(
                medium(source, found.get(source)) + marks(groups[media], number)
                for number, source in enumerate(media, 1)
            ),
            answers=tuple(groups[media]),
        )
        for media in chosen
    ]


def marks(answers: Sequence[Answer], number: int) -> str:
    """Where the answers point in image `number`: rings where they should, dots where they do."""
    found = []
    for one in answers:
        verdict = "right" if one.correct else "wrong"
        found += [("ring", x, y) for image, x, y in points_in(one.expected) if image == number]
        found += [(verdict, x, y) for image, x, y in points_in(one.given) if image == number]
    return "".join(
        f'<i class="{kind}" style="left:{min(x, 1000) / 10:.1f}%;top:{min(y, 1000) / 10:.1f}%"></i>'
        for kind, x, y in found
    )


# ---- page


def render(
    result: Evaluation,
    lines: Sequence[Mapping[str, Any]],
    shown: Sequence[Shown],
    *,
    config: str,
    meta: Mapping[str, Any],
) -> str:
    """The whole page."""
    name = f"{Path(result.run).name}, stage {result.stage}"
    steps = [line for line in lines if "loss" in line]
    seconds = sum(line["step_s"] for line in steps)
    spent = f" in {duration(seconds)}" if steps else ""
    facts = (
        f"{meta['llm']} with a {meta['connector']} connector on {result.space} · "
        f"{result.step:,} steps{spent} · {result.samples:,} samples of the {result.split} split"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><header><h1>{escape(name)}</h1><p>{escape(facts)}</p></header><main>"
        f"{headline(result)}<section><h2>Scores</h2>{scores(result)}</section>"
        f"<section><h2>Training</h2>{curves(lines)}</section>"
        f"<section><h2>What it has {'' if result.split == 'train' else 'not '}seen in training</h2>"
        f'{hint(result)}<div class="cards">{"".join(map(card, shown))}</div></section>'
        f"<section><details><summary>Options</summary><pre>{escape(config)}</pre></details></section>"
        "</main></body></html>\n"
    )


def headline(result: Evaluation) -> str:
    """The figures that matter, large."""
    boxes = []
    if result.mean is not None:
        boxes.append(("exact match", f"{result.mean:.1%}", "mean over question types"))
    if result.blind_mean is not None:
        boxes.append(
            ("blind", f"{result.blind_mean:.1%}", "the same model, images and videos exchanged")
        )
    beside = "" if result.blind_loss is None else f"{result.blind_loss:.4g} blind"
    boxes.append(("loss", f"{result.loss:.4g}", beside))
    return '<div class="boxes">' + "".join(map(_box, boxes)) + "</div>"


def _box(box: tuple[str, str, str]) -> str:
    label, value, note = map(escape, box)
    return f"<div><small>{label}</small><strong>{value}</strong><small>{note}</small></div>"


def scores(result: Evaluation) -> str:
    """A bar for each question type, blind's mark on it."""
    rows = []
    for task in result.tasks:
        apart = " (apart)" if task.name == CAPTION else ""
        mark = "" if task.blind is None else f'<i style="left:{task.blind:.2%}"></i>'
        blind = "" if task.blind is None else f"{task.blind:.1%}"
        rows.append(
            f"<tr><th>{escape(task.name)}{apart}</th><td>{task.questions:,}</td>"
            f'<td class="bar"><div><b style="width:{task.exact:.2%}"></b>{mark}</div></td>'
            f"<td>{task.exact:.1%}</td><td>{blind}</td></tr>"
        )
    return (
        "<table><thead><tr><th>question</th><td>asked</td><td></td>"
        '<td><span class="key a">exact match</span></td><td><span class="key b">blind</span></td></tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table>"
    )


def curves(lines: Sequence[Mapping[str, Any]]) -> str:
    """Loss, learning rates, gradient norm over steps."""
    steps = [line for line in lines if "loss" in line]

    def column(name: str) -> list[tuple[float, float]]:
        return finite([(line["step"], line[name]) for line in steps])

    held = [(line["step"], line["held_out_loss"]) for line in lines if "held_out_loss" in line]
    half_life = max(2.0, len(steps) / 150)
    loss = [
        Line(label="", points=column("loss"), style="faint"),
        Line(label="training, smoothed", points=smoothed(column("loss"), half_life), style="a"),
        Line(label="held out", points=held, style="b", dots=True),
    ]
    rates = [
        Line(label="language model", points=column("lr"), style="a"),
        Line(label="connector", points=column("connector_lr"), style="b dash"),
    ]
    norm = [
        Line(label="", points=column("grad_norm"), style="faint"),
        Line(label="smoothed", points=smoothed(column("grad_norm"), half_life), style="a"),
    ]
    return (
        '<div class="charts">'
        + chart([line for line in loss if line.points], title="Loss", width=1120, log=True)
        + chart(
            [line for line in rates if any(y for _, y in line.points)],
            title="Learning rate",
            width=540,
        )
        + chart(norm, title="Gradient norm", width=540)
        + "</div>"
    )


def hint(result: Evaluation) -> str:
    """What the marks on images mean, where there are any."""
    if not any(points_in(one.expected) for one in result.answers):
        return ""
    return '<p class="hint">Rings: where it should point. Dots: where it does.</p>'


def card(shown: Shown) -> str:
    """An image with its questions."""
    images = "".join(f'<div class="image">{image}</div>' for image in shown.images)
    return (
        f'<article><div class="images">{images}</div>'
        f"<dl>{''.join(map(question, shown.answers))}</dl></article>"
    )


def question(one: Answer) -> str:
    """What was asked, said, expected, and said blindly."""
    verdict = "plain" if one.task == CAPTION else "right" if one.correct else "wrong"
    said = f'<span class="said">{readable(one.given) or "<i>nothing</i>"}</span>'
    expected = "" if one.correct else f'<span class="note">expected {readable(one.expected)}</span>'
    blind = "" if one.blind is None else f'<span class="note">blind {readable(one.blind)}</span>'
    asked = escape(one.question.replace("<image>", "").strip()) or escape(one.task)
    return f'<dt>{asked}</dt><dd class="{verdict}">{said}{expected}{blind}</dd>'


def readable(answer: str) -> str:
    """HTML of an answer; points as coordinates and label instead of their markup."""
    label = POINTS.fullmatch(answer.strip())
    if label is None:
        return escape(answer)
    places = " ".join(f"({x}, {y})" for _, x, y in points_in(answer))
    return escape(f"{places} {label[2]}")


if __name__ == "__main__":
    configs.command(main)
