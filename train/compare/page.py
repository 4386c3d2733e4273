"""The page of a comparison: charts of the losses, and tables; skeleton and charts are those of cache.view."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from cache.view import page
from cache.view.charts import Line, finite, line_chart, smoothed
from train.compare.differences import Row, groups
from train.compare.runs import Point, StageRun

STYLES = "abcdefgh"
"""A colour of style.css for each run."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Facts of the runs, a column for each run."""

    title: str
    """Text above it."""
    note: str
    """What its figures are."""
    rows: Sequence[Row]
    """A name, and a cell for each run."""


def render(runs: Sequence[StageRun], tables: Sequence[Table], notes: Sequence[str]) -> Markup:
    """Return the HTML of the page.

    Args:
        runs: in the order of the columns.
        tables: those without rows are left out.
        notes: lines about what cannot be compared.
    """
    stages = sorted({run.stage for run in runs})
    return page.render(
        Path(__file__).with_name("compare.html"),
        title=", ".join(run.label for run in runs),
        summary=f"{len(runs)} runs, stage {', '.join(map(str, stages))}",
        labels=[run.label for run in runs],
        charts=charts(runs),
        tables=[
            (table.title, table.note, [(name, *cells) for name, cells in table.rows])
            for table in tables
            if table.rows
        ],
        notes=notes,
    )


def charts(runs: Sequence[StageRun]) -> list[Markup]:
    """Return charts of the losses by step and by samples; of runs that cannot be compared in other charts."""
    styles = {run.folder: style for run, style in zip(runs, STYLES, strict=False)}
    found = []
    several = len(groups(runs)) > 1
    for group in groups(runs):
        of = f" of {', '.join(run.label for run in group)}" if several else ""
        for axis, where in (("step", _step), ("samples seen", _samples)):
            lines = [line for run in group for line in _lines(run, styles[run.folder], where)]
            chart = line_chart(
                lines,
                title=f"Loss by {axis}{of}",
                axis=axis,
                log_y=True,
                note="Lines: training, smoothed. Dashes with dots: held out.",
            )
            found.append(chart)
    return found


def _step(point: Point) -> float:
    return float(point.step)


def _samples(point: Point) -> float:
    return float(point.samples)


def _lines(run: StageRun, style: str, where: Callable[[Point], float]) -> list[Line]:
    """Return the lines of a run: training, and held out."""
    trained = finite([(where(point), point.loss) for point in run.course.losses])
    held_out = [(where(point), point.loss) for point in run.course.held_out]
    return [
        Line(label=run.label, points=smoothed(trained), style=style),
        Line(points=held_out, style=f"{style} dash", dots=True),
    ]
