"""Look at a space: its features as images, their distributions, what it covers. One HTML page.

python -m cache.view                                      # cache -> view.html
python -m cache.view --space clip --images 48 --seed 1  # another draw, and more of it
python -m cache.view --keep-media downloads               # with images that --keep-media of encode.run kept

The page stands alone: it opens from a file, asks no network and needs no script. Of a large space only some
rows are read, every one of them checked; thumbnails are there for images whose files still are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cache.errors import CacheError
from cache.store.files import write_atomic
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.space import find_space
from cache.view.collect import gather
from cache.view.sections import render
from configs import UserError, command, parse
from configs.console import bytes_text

PROG = "python -m cache.view"

MOST = 500
"""Images of one page: 2.4 GB of memory for features of 576 x 1024, 20 MB of page."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a page about a space."""

    features: Path = Path("cache")
    """Folder of the cache."""
    space: str | None = None
    """Which space: its name, or how it begins. Needed where there are several."""
    out: Path = Path("view.html")
    """Where to write."""
    images: int = 24
    """Images and videos to show, at most."""
    seed: int = 0
    """Which: another seed, another draw."""
    keep_media: Path | None = None
    """Folder of kept downloads (as encode.run --keep-media): thumbnails of what came from the web."""

    def __post_init__(self) -> None:
        if not 1 <= self.images <= MOST:
            raise ValueError(f"--images {self.images}: must be 1 to {MOST}")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: must be 0 or more")


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    options = parse(Options, argv, prog=PROG, description=__doc__)
    root = CacheRoot.existing(options.features)
    if options.out.is_dir():
        raise UserError(f"{options.out}: a folder; name a file: --out {options.out / 'view.html'}")
    reader = FeatureReader(find_space(root, options.space))
    found = gather(root, reader, images=options.images, seed=options.seed, keep=options.keep_media)
    page = render(found).encode(errors="replace")
    write_atomic(options.out, page)
    print(f"{options.out}: {len(found.shown)} images and videos, {bytes_text(len(page))}")
    return 0


if __name__ == "__main__":
    command(main, errors=(CacheError,))
