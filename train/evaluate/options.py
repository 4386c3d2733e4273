"""The options of `python -m train.evaluate`."""

from __future__ import annotations

from dataclasses import dataclass

from cache.remote.open import RemoteOptions
from cache.store.samples import Split
from train.evaluate.metrics import parse_metrics


@dataclass(frozen=True, kw_only=True)
class Options(RemoteOptions):
    """Answer held-out questions with a trained model."""

    run: str = "default"
    """Name of the run, below runs/, or a path."""
    stage: int | None = None
    """The stage to evaluate. Default: the newest finished one."""
    features: str | None = None
    """The feature cache: a folder, or a URL as for train.run. Default: that of the run."""
    datasets: str = ""
    """Data sets, separated by commas. Empty: those the run was trained on."""
    split: Split = "val"
    """`val`: held-out samples, to choose by. `test`: others, to report. `train`: those it was trained on."""
    limit: int = 2000
    """Most questions of each data set."""
    max_new_tokens: int = 256
    """Longest answer, in tokens. A point takes about twelve."""
    blind: bool = True
    """Also answer with images and videos exchanged within the split."""
    metric: str = ""
    """Metrics by question type or data set, instead of the default: `question=anls,charts=relaxed`, or one
    for all: exact, vqa, anls, relaxed, count, points, none."""
    point_distance: float = 0.05
    """A point is right within this distance of a right point, as a share of the image's width and height."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit < 1 or self.max_new_tokens < 1:
            raise ValueError("limit and max_new_tokens must be at least 1")
        if not 0.0 < self.point_distance <= 1.0:
            raise ValueError(f"point_distance {self.point_distance} is not above 0 and at most 1")
        parse_metrics(self.metric)
