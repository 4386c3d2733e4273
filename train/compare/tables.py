"""Find the runs to compare, and tabulate what differs: `read_runs` and `compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cache.errors import command_line
from cache.store.samples import Split
from configs import UserError
from configs.console import bytes_text, duration_text
from configs.text import visible
from train.compare.differences import Paired, Row, apart, between, groups, settings, verdict
from train.compare.options import Options
from train.compare.page import Table
from train.compare.runs import Point, StageRun, find_stages, read_run
from train.evaluate.result import Evaluation, figure

LABEL = 40
"""Characters of a run's name, at most."""
LAST = 20
"""Steps whose mean is the training loss."""
MOST_SCORES = 200
"""Scores that are shown."""
SPLITS: tuple[Split, ...] = ("val", "test", "train")
STAGE_NAMES = {f"stage{number}" for number in range(10)}


# ---- which runs


def read_runs(options: Options) -> tuple[list[StageRun], Split]:
    """Return the stages to compare, and the split whose scores they have.

    Raises:
        UserError: there is no such run or stage, one is given twice, or a file of one is damaged.
    """
    stages = [find_stages(run) for run in options.runs]
    common = set.intersection(*(set(one.folders) for one in stages))
    folders = []
    for run, (found, fixed) in zip(options.runs, stages, strict=True):
        wanted = options.stage
        if fixed or wanted is None:
            wanted = max(common or found)
        if wanted not in found:
            raise UserError(
                f"run {run}: no stage {wanted}, only {', '.join(map(str, sorted(found)))}; choose another "
                f"--stage, or give the path of a stage: {found[max(found)]}"
            )
        folders.append(found[wanted])
    places = [folder.resolve() for folder in folders]
    for at, place in enumerate(places):
        if place in places[:at]:
            raise UserError(f"{folders[at]} is given twice; leave one out")
    split: Split = next((one for one in SPLITS if _has_scores(folders, one)), "val")
    split = options.split or split
    return [
        read_run(folder, label, split)
        for folder, label in zip(folders, _labels(folders), strict=True)
    ], split


def _has_scores(folders: Sequence[Path], split: Split) -> bool:
    return any((folder / f"evaluation-{split}.json").is_file() for folder in folders)


def _labels(folders: Sequence[Path]) -> list[str]:
    """Return a short name for each folder of a stage: as much of its path as makes the names differ."""
    parts = [folder.absolute().parts for folder in folders]
    if {one[-1] for one in parts} <= {parts[0][-1]} & STAGE_NAMES:  # the same stage of each
        parts = [one[:-1] for one in parts]
    least = 2 if any(one[-1] in STAGE_NAMES for one in parts) else 1
    ends = range(least, max(map(len, parts)) + 1)
    count = next(n for n in ends if len({one[-n:] for one in parts}) == len(parts))
    return [visible("/".join(one[-count:]), LABEL) for one in parts]


# ---- what is compared


def compare(runs: Sequence[StageRun], split: Split) -> tuple[list[Table], list[str]]:
    """Return the tables, and lines about what cannot be compared or is not known."""
    learned, machine = settings(runs)
    scored, differences, missing = scores(runs, split)
    first = runs[0].label
    tables = [
        Table(title="settings that differ", note="They decide what is learned.", rows=learned),
        Table(title="where and how fast", note="These settings change no result.", rows=machine),
        Table(title="losses", note="Nats per supervised token.", rows=losses(runs)),
        Table(
            title=f"scores of the split {split}",
            note="± half of the 95 % interval over images and videos.",
            rows=scored,
        ),
        Table(
            title=f"difference from {first}, same questions",
            note="Beyond: the 95 % interval of the paired difference leaves out 0.",
            rows=differences,
        ),
        Table(
            title="cost",
            note="Of the steps that metrics.jsonl has, without evaluations and checkpoints.",
            rows=cost(runs),
        ),
    ]
    return tables, [*_unfinished(runs), *apart(runs), *missing]


def _unfinished(runs: Sequence[StageRun]) -> list[str]:
    lines = []
    for run in runs:
        if not run.finished:
            lines.append(f"{run.label} is not finished: {_steps(run)} steps")
        if run.options is None:
            lines.append(f"{run.label} has no config.yaml: its settings are not known")
        if not run.course.losses:
            lines.append(f"{run.label} has no metrics.jsonl with a step: its curves are not known")
    return lines


def _steps(run: StageRun) -> str:
    planned = f" of {run.options.max_steps:,}" if run.options else ""
    return f"{run.course.steps:,}{planned}"


def losses(runs: Sequence[StageRun]) -> list[Row]:
    """Return the losses of the runs; those that cannot be compared are in different rows."""
    rows: list[Row] = [("steps", [_steps(run) for run in runs])]
    rows.append(("samples", [f"{run.course.samples:,}" for run in runs]))
    for group in groups(runs):

        def row(name: str, cells: Sequence[str], group: Sequence[StageRun] = group) -> Row:
            found = {run.folder: cell for run, cell in zip(group, cells, strict=True)}
            return name, [found.get(run.folder, "") for run in runs]

        trained = [run.course.losses for run in group]
        rows.append(row(f"training loss, last {LAST} steps", [_mean(one) for one in trained]))
        least = min(run.course.samples for run in group)
        if least and any(run.course.samples > least for run in group):
            upto = [[point for point in one if point.samples <= least] for one in trained]
            rows.append(row(f"training loss after {least:,} samples", [_mean(one) for one in upto]))
        held_out = [run.course.held_out for run in group]
        rows.append(row("held-out loss, last", [_at(one[-1:]) for one in held_out]))
        rows.append(row("held-out loss, lowest", [_at(_lowest(one)) for one in held_out]))
    return rows


def _mean(points: Sequence[Point]) -> str:
    """Return the mean loss of the last steps."""
    last = points[-LAST:]
    return f"{sum(point.loss for point in last) / len(last):.4f}" if last else ""


def _lowest(points: Sequence[Point]) -> list[Point]:
    known = [point for point in points if point.loss == point.loss]  # not NaN
    return [min(known, key=lambda point: point.loss)] if known else []


def _at(points: Sequence[Point]) -> str:
    return "".join(f"{point.loss:.4f} (step {point.step:,})" for point in points)


def cost(runs: Sequence[StageRun]) -> list[Row]:
    """Return what the runs took."""

    def of(run: StageRun) -> list[tuple[str, str]]:
        course, parameters = run.course, run.parameters
        known = bool(course.seconds)
        return [
            ("time of the steps", duration_text(course.seconds) if known else ""),
            ("waiting for data", f"{course.wait_s / course.seconds:.1%}" if known else ""),
            ("tokens", f"{course.tokens:,}" if known else ""),
            ("tokens/s", f"{course.tokens / course.seconds:,.0f}" if known else ""),
            ("peak memory", f"{course.memory_gib:.2f} GiB" if known else ""),
            ("parameters trained", f"{parameters[0]:,}" if parameters else ""),
            ("parameters", f"{parameters[1]:,}" if parameters else ""),
            ("disk", bytes_text(run.disk_bytes)),
        ]

    columns = [of(run) for run in runs]
    names = [name for name, _ in columns[0]]
    cells = [[column[at][1] for column in columns] for at in range(len(names))]
    return [(name, row) for name, row in zip(names, cells, strict=True) if any(row)]


# ---- scores


def scores(runs: Sequence[StageRun], split: Split) -> tuple[list[Row], list[Row], list[str]]:
    """Return scores, differences from the first run, and lines about what is missing."""
    lines = [line for run in runs for line in _missing(run, split)]
    results = [run.evaluation for run in runs]
    if not any(results):
        return [], [], lines
    scored: dict[str, list[str]] = {}
    for at, result in enumerate(results):
        for name, text in _scores(result) if result else ():
            scored.setdefault(name, [""] * len(runs))[at] = text
    first, differences = results[0], dict[str, list[str]]()
    for at, result in enumerate(results):
        if first is None or result is None or not at:
            continue
        paired = between(first, result)
        lines += _unpaired(runs[at], runs[0], paired)
        for name, text in _differences(paired):
            differences.setdefault(name, [""] * len(runs))[at] = text
    if len(scored) > MOST_SCORES:
        lines.append(f"{len(scored) - MOST_SCORES:,} more scores are not shown")
    return list(scored.items())[:MOST_SCORES], list(differences.items())[:MOST_SCORES], lines


def _missing(run: StageRun, split: Split) -> list[str]:
    result = run.evaluation
    if result is None:
        if not run.finished:
            return [f"{run.label} has no scores: only a finished stage is evaluated"]
        where = ("--features", run.options.features) if run.options else ()
        words = ("--run", run.folder, "--split", split, *where)
        return [
            f"{run.label} has no scores of {split}; make them: {command_line('train.evaluate', *words)}"
        ]
    if result.step != run.course.steps and run.course.steps:
        return [f"the scores of {run.label} are those of step {result.step:,}, not of its last one"]
    return []


def _unpaired(run: StageRun, first: StageRun, paired: Paired) -> list[str]:
    assert run.evaluation and first.evaluation
    if not paired.questions:
        return [
            f"scores of {run.label} and {first.label} cannot be compared: no question is in both"
        ]
    most = max(len(run.evaluation.answers), len(first.evaluation.answers))
    if paired.questions < most:
        left = f"{most - paired.questions:,} others are not in both"
        return [
            f"{run.label} and {first.label} are compared on {paired.questions:,} questions; {left}"
        ]
    return []


def _scores(result: Evaluation) -> list[tuple[str, str]]:
    found, of = [], ""
    for name, _, score in result.rows:
        of = name or of
        label = score.name if score is result.mean else f"{of}: {score.name}"
        found.append((label, figure(score.value, score.interval)))
    return found


def _differences(paired: Paired) -> list[tuple[str, str]]:
    found = [
        (f"{task.name}: {score.name} ({task.questions:,} questions)", verdict(score))
        for task in paired.tasks
        for score in task.scores
    ]
    return found + ([(paired.mean.name, verdict(paired.mean))] if paired.mean else [])
