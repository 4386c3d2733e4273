"""Ask a trained model held-out questions, and ask again with the images exchanged for others.

python -m train.evaluate --run default                       # newest finished stage, held-out samples
python -m train.evaluate --run default --datasets demo --json
python -m train.evaluate --run default --split test          # to report: samples nothing was chosen on
python -m train.evaluate --run default --split train         # samples it was trained on

Answers are computed from cached features, by the code that `model.generate` uses. The *blind* figures are
those of the same model with every image exchanged for another image of the split, and every video for another
video: they show what can be answered without looking. Each question type has its metric (metrics.py); the
headline is their mean without captions, which have no single right answer. A question with several answers is
asked once. After each figure is half the width of its 95 % interval over images and videos. The scores are
also added to the run's card.json, which `model.export` prints.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict

import configs
from cache.errors import CacheError
from configs.signals import importing
from configs.text import json_text
from model.io.runs import find_run
from train.evaluate.options import Options
from train.evaluate.result import table

PROG = "python -m train.evaluate"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    options = configs.parse(Options, argv, prog=PROG, description=__doc__)
    find_run(options.run, options.stage)
    with importing():
        from train.evaluate.evaluation import evaluate

    result = evaluate(options)
    summary = {k: v for k, v in asdict(result).items() if k != "answers"}
    print(json_text(summary) if options.json else table(result))
    return 0


if __name__ == "__main__":
    configs.command(main, errors=(CacheError,))
