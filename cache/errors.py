"""cache.errors."""

from __future__ import annotations

from pathlib import Path

from configs import UserError

MAKE_ANEW = "python -m cache.verify --deep --repair drops it, then encode.run makes it anew"
"""The way out for any file that is damaged: what it held can be had again from the sources."""


class CorruptError(UserError):
    """A file is not what was written: where, what is wrong, and the way out."""

    def __init__(self, path: Path, what: str, way_out: str = MAKE_ANEW):
        super().__init__(f"{path}: {what}; {way_out}")
        self.path, self.what, self.way_out = path, what, way_out

    def __reduce__(self) -> tuple[type[CorruptError], tuple[Path, str, str]]:
        return CorruptError, (self.path, self.what, self.way_out)
