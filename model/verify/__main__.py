"""Load every part once and report parameters, memory, days and disk space.

python -m model.verify                                           # CLIP ViT-L/14@336, Qwen3-0.6B
python -m model.verify --random-weights                          # these sizes, nothing downloaded
python -m model.verify --random-weights --train-vision-blocks 3  # with the encoder's last blocks (--tail)
python -m model.verify --encoder demo --llm random:qwen3-demo    # seconds, on any machine

Parameters are counted, and one image passes through encoder, connector and language model. Memory, days
and disk space are estimates (model/verify/memory.py), not measurements. The last lines are verdicts: whether
training fits the GPU, or each usual size of GPU where there is none, and whether features fit the disk.
The exit code is 1 when the machine has a GPU that torch cannot use, or when the parts do not work together.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import configs
from configs.signals import importing
from model.verify.options import Options

PROG = "python -m model.verify"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; return the exit code."""
    options = configs.parse(Options, argv, prog=PROG)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    with importing():
        from model.verify.report import report

    return report(options)


if __name__ == "__main__":
    configs.command(main)
