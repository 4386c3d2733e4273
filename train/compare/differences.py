"""Where runs differ: settings, what their losses are of, and answers to the same questions.

learned, machine = settings(runs)      # [("connector", ["linear", "mlp"])], [("max_tokens", [...])]
groups(runs)                           # [[run, run]]: their losses can be compared
between(first, second)                 # Paired(tasks=..., mean=..., questions=1346)
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from configs import UserError
from configs.text import visible
from train.compare.runs import StageRun
from train.config import MACHINE_KEYS, Options
from train.evaluate.result import Evaluation
from train.evaluate.scoring import Answer, Score, Task, summarize

HIDDEN = ("run", "resume", "inspect", "config")
"""Options that say what a run is called, or which file has its options."""
LONGEST = 60
"""Characters of a value, at most."""
MOST_CELLS = 10_000_000
"""Questions times question types, at most: memory of the intervals."""

Row = tuple[str, list[str]]
"""A name, and a cell for each run."""


# ---- settings


def settings(runs: Sequence[StageRun]) -> tuple[list[Row], list[Row]]:
    """Return what differs of settings that decide what is learned, and of those for where and how fast.

    A cell is empty if the run does not say the value, and `-` if it has none.
    """
    options = [vars(run.options) if run.options else {} for run in runs]
    names = [f.name for f in fields(Options) if f.name not in HIDDEN]
    rows = _differing(names, options)
    machine = [row for row in rows if row[0] in MACHINE_KEYS]
    learned = [row for row in rows if row not in machine]
    data = [
        {f"samples of {name}": count for name, count in run.data_sets.items()} or None
        for run in runs
    ]
    # A card without an earlier stage says that there was none; a run without a card says nothing.
    for said in (data, [run.earlier for run in runs]):
        names = sorted({name for one in said if one for name in one})
        values = [{} if one is None else {n: one.get(n) for n in names} for one in said]
        learned += _differing(names, values)
    return learned, machine


def _differing(names: Iterable[str], values: Sequence[dict[str, Any]]) -> list[Row]:
    """Return the rows of names of which two known values differ."""
    rows = []
    for name in names:
        known = [one[name] for one in values if name in one]
        if any(value != known[0] for value in known):
            cells = [_text(one[name]) if name in one else "" for one in values]
            rows.append((visible(name.rstrip("_"), LONGEST), cells))
    return rows


def _text(value: Any) -> str:
    """Return a value as an option has it."""
    if value is None or value in ((), ""):
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    return visible(" ".join(map(str, value)) if isinstance(value, tuple) else value, LONGEST)


# ---- losses


def groups(runs: Sequence[StageRun]) -> list[list[StageRun]]:
    """Return the runs in groups, each of runs whose losses are of equal samples and equal tokens."""
    found: dict[Hashable, list[StageRun]] = {}
    for run in runs:
        key = tuple(_losses_of(run, runs).values()) or run.folder
        found.setdefault(key, []).append(run)
    return list(found.values())


def apart(runs: Sequence[StageRun]) -> list[str]:
    """Return why losses cannot be compared with those of the first run, a line for each other run."""
    lines = []
    first = _losses_of(runs[0], runs)
    for run in runs:
        of = _losses_of(run, runs)
        if not of:
            lines.append(f"losses of {run.label} cannot be compared: its samples are not known")
        elif other := [what for what in of if first and of[what] != first[what]]:
            cost = " and cost" if "stage" in other else ""
            lines.append(
                f"losses{cost} of {run.label} cannot be compared with those of {runs[0].label}: "
                f"other {', '.join(other)}"
            )
    return lines


def _losses_of(run: StageRun, runs: Sequence[StageRun]) -> dict[str, Hashable]:
    """Return what the losses of a run are of, in words -> value; empty if that is not known."""
    options = run.options
    if options is None or not run.samples_digest:
        return {}
    long: Hashable = options.over_long
    if options.over_long != "refuse":  # then longer samples are left out, or cut
        long = (options.over_long, options.max_sequence_length)
    # Language models of one family have equal tokenizers.
    finished = {one.llm: one.tokenizer for one in runs if one.tokenizer}
    return {
        "stage": run.stage,
        "data sets or shares": options.datasets,
        "training samples": run.samples_digest,
        "held-out samples": (options.held_out, options.eval_samples, options.max_frames),
        "long samples": long,
        "tokenizer": finished.get(run.llm, run.llm),
    }


# ---- scores


@dataclass(frozen=True, kw_only=True)
class Paired:
    """The difference of two runs on the questions that both answered: `gain` of the scores."""

    tasks: tuple[Task, ...]
    """Each question type."""
    mean: Score | None
    """The mean over question types except captions."""
    questions: int
    """Questions in both."""


def between(first: Evaluation, other: Evaluation) -> Paired:
    """Return how much better `other` answers than `first`, with intervals of the paired differences.

    Raises:
        UserError: there are too many question types for the memory of the intervals.
    """
    answered = {_question(one): one for one in first.answers}
    # The intervals of blind scores are paired ones, so the first run takes the place of the blind model.
    both = [
        replace(one, blind=base.given, blind_scores=base.scores, blind_correct=base.correct)
        for one in other.answers
        if (base := answered.get(_question(one))) is not None
    ]
    types = len({(one.task, one.metric) for one in both})
    if len(both) * types > MOST_CELLS:
        raise UserError(
            f"{other.run}: {len(both):,} questions of {types:,} types are more than are compared; "
            "evaluate it again with --limit"
        )
    tasks, mean = summarize(both)
    return Paired(tasks=tasks, mean=mean, questions=len(both))


def _question(one: Answer) -> Hashable:
    return one.sample, one.task, one.metric, one.question, one.expected, one.others


def verdict(score: Score) -> str:
    """Return a difference as `+0.03 ± 0.02 beyond`: its interval leaves out 0; else it is `within`."""
    if score.gain is None:
        return ""
    if score.gain_interval is None:
        return f"{score.gain:+.2f}"
    low, high = score.gain_interval
    where = "beyond" if low > 0 or high < 0 else "within"
    return f"{score.gain:+.2f} ± {(high - low) / 2:.2f} {where}"
