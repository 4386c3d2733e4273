"""Show a run on one HTML page: scores beside blind ones, loss curves, images with questions and answers.

python -m train.report --run default                      # runs/default/stage<k>/report.html
python -m train.report --run default --output report.html --images 60
python -m train.report --run default --media photos       # also with images below this folder

The page is one file that loads nothing. Images and videos are read from where the samples name them, below
the folders that this machine encoded and below --media DIR (media.py). Answers are those of `train.evaluate`,
which runs first if it has not run for this model.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import configs
from cache.errors import CacheError
from train.report.options import Options
from train.report.page import report

PROG = "python -m train.report"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    options = configs.parse(Options, argv, prog=PROG, description=__doc__)
    report(options)
    return 0


if __name__ == "__main__":
    configs.command(main, errors=(CacheError,))
