"""The options of `python -m train.report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cache.remote.open import RemoteOptions
from cache.store.samples import Split


@dataclass(frozen=True, kw_only=True)
class Options(RemoteOptions):
    """Write the report of a run."""

    run: str = "default"
    """Name of the run in runs/, or a path."""
    stage: int | None = None
    """Stage of the run; by default the newest finished one."""
    features: str | None = None
    """The feature cache: a folder, or a URL as train.run takes it. Default: that of the run."""
    split: Split = "val"
    """The samples to show: held-out ones (`val` to choose by, `test` to report), or those of training."""
    images: int = 36
    """Images and videos to show, at most."""
    media: Path | None = None
    """Folder of media that were not encoded on this machine, or have moved: they are opened, too."""
    output: Path | None = None
    """File to write; by default `report.html` beside the model."""
    device: str = "auto"
    """Device that computes answers that are not saved yet."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images < 0:
            raise ValueError(f"images {self.images} is negative")
