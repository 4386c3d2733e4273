"""Show a feature space on one HTML page: features as images, their distributions, coverage, failures.

python -m cache.view                                      # cache -> view.html
python -m cache.view --space clip --images 48 --seed 1    # another draw of more images
python -m cache.view --keep-media downloads               # with images that encode.run --keep-media kept

The page is one file that loads nothing. A sample of the rows is read, each under its checksum. Images have
thumbnails if their files are still on this machine.
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
from configs.text import say

PROG = "python -m cache.view"

MAX_IMAGES = 500
"""Images of one page, at most: 2.4 GB of memory for features of 576 x 1024, and a page of 20 MB."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a page about a space."""

    features: Path = Path("cache")
    """Folder of the cache."""
    space: str | None = None
    """Name of the space, or its beginning. Needed if the cache has several."""
    out: Path = Path("view.html")
    """File to write."""
    images: int = 24
    """Images and videos to show, at most."""
    seed: int = 0
    """Seed of the draw: another seed shows other images."""
    keep_media: Path | None = None
    """Folder of kept downloads (encode.run --keep-media): thumbnails of images from the web."""
    media: Path | None = None
    """Folder of media that were not encoded on this machine, or have moved: they are opened, too."""

    def __post_init__(self) -> None:
        if not 1 <= self.images <= MAX_IMAGES:
            raise ValueError(f"--images {self.images}: must be 1 to {MAX_IMAGES}")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: must be 0 or more")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = parse(Options, argv, prog=PROG, description=__doc__)
    root = CacheRoot.existing(options.features)
    if options.out.is_dir():
        raise UserError(f"{options.out}: a folder; name a file: --out {options.out / 'view.html'}")
    reader = FeatureReader(find_space(root, options.space))
    found = gather(
        root,
        reader,
        images=options.images,
        seed=options.seed,
        keep=options.keep_media,
        media=options.media,
    )
    page = render(found).encode(errors="replace")  # text from JSON may hold half a surrogate pair
    write_atomic(options.out, page)
    if found.not_opened:
        say(found.not_opened)
    say(f"{options.out}: {len(found.shown)} images and videos, {bytes_text(len(page))}")
    return 0


if __name__ == "__main__":
    command(main, errors=(CacheError,))
