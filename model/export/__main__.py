"""Export a trained model as a Hugging Face folder, which transformers loads without this package.

python -m model.export --run default --out exported
python -m model.export --run runs/mine/stage2/final --out exported --weights clip.safetensors
python -m model.export --run default --out exported --gguf               # for llama.cpp too
python -m model.export --run default --out exported --push org/name      # to the hub, private

The folder has weights, config, processor, chat template and model card of a LlavaForConditionalGeneration:
AutoModelForImageTextToText and AutoProcessor load it. The run and the encoder's weights are read, no feature
cache. Features pass through no codec in it.

Before anything is at `--out`, the folder is loaded by transformers and compared with our own model on
photographs: tokens and greedy answers must be equal, and logits within 1e-4. If they are not, nothing is left
and the exit code is 1. docs/EXPORT.md says what can be exported and what vLLM and llama.cpp need.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import configs
from configs import UserError
from configs.signals import importing
from configs.text import say
from model.export.options import Options
from model.export.push import check_push
from model.io.runs import find_run

PROG = "python -m model.export"
FAILED = 1
"""Exit code if the exported model is not the trained one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Export a model; return the exit code."""
    options = configs.parse(Options, argv, prog=PROG, description=__doc__)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    source = check(options)
    with importing():
        from model.export.compare import MismatchError
        from model.export.exporter import export

    try:
        export(source, options)
    except MismatchError as error:
        say(
            f"error: not exported, because the folder is not the trained model: {error}",
            file=sys.stderr,
        )
        return FAILED
    return 0


def check(options: Options) -> Path:
    """Return the folder of the run.

    Raises:
        UserError: there is no such run, the place has something, or nothing could be pushed.
    """
    out = options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"--out {out}: exists and is not an empty folder; choose another: --out DIR"
        )
    if options.push is not None:
        check_push(options.push)
    elif options.public:
        raise UserError("--public needs the name of a repository: --push ORG/NAME --public")
    return find_run(options.run, options.stage)


if __name__ == "__main__":
    configs.command(main)
