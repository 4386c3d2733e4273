"""Compare runs: settings that differ, loss curves, scores with intervals, and cost; tables, and an HTML page.

python -m train.compare first again               # runs/first and runs/again: the newest stage of both
python -m train.compare first again --stage 1 --split test
python -m train.compare first runs/first/stage2 /mnt/theirs/run/stage1 --out page.html

Runs need not be finished, and nothing is trained or evaluated: scores are those that `train.evaluate` saved.
Two runs are compared on the questions that both answered. A difference is `beyond` if its 95 % interval, a
paired bootstrap over images and videos, leaves out 0. Losses of other data sets, held-out shares, stages or
tokenizers are drawn apart, and a line says so.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import configs
from cache.errors import CacheError
from cache.store.files import write_atomic
from configs.console import bytes_text, table_text
from configs.text import say, visible
from train.compare import page
from train.compare.options import PROG, Options
from train.compare.tables import compare, read_runs


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    options = configs.parse(Options, argv, prog=PROG, description=__doc__)
    runs, split = read_runs(options)
    tables, notes = compare(runs, split)
    labels = [run.label for run in runs]
    for table in tables:
        if table.rows:
            cells = [(name, *row) for name, row in table.rows]
            print(f"{visible(table.title)}\n{table_text(('', *labels), cells)}\n")
    if notes:
        say(*notes)
    # Text from JSON may hold half a surrogate pair.
    data = page.render(runs, tables, notes).encode(errors="replace")
    write_atomic(options.out, data)
    say(f"{options.out}: {bytes_text(len(data))}")
    return 0


if __name__ == "__main__":
    configs.command(main, errors=(CacheError,))
