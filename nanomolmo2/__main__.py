"""Every command under one name: `nanomolmo2 encode ...` is `python -m encode.run ...`.

    nanomolmo2 --help                     # the commands, with a line each
    nanomolmo2 train --stage 1 --help     # options are those of the command

A user's own `train.py` or `model.py` in the working directory is never imported instead of ours.
"""

from __future__ import annotations

import ast
import os
import runpy
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The folder that has our packages side by side."""

COMMANDS = {
    "encode": "encode.run",
    "train": "train.run",
    "evaluate": "train.evaluate",
    "generate": "model.generate",
    "export": "model.export",
    "report": "train.report",
    "compare": "train.compare",
    "demo": "train.demo",
    "ls": "cache.ls",
    "view": "cache.view",
    "verify": "cache.verify",
    "convert": "cache.convert",
    "merge": "cache.merge",
    "gc": "cache.gc",
    "share": "cache.share",
    "export-features": "cache.export",
    "check-loss": "encode.check.loss",
    "verify-model": "model.verify",
}
"""Name -> the module that runs with `python -m`."""


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; return or exit with its exit code.

    Args:
        words: the command line after the program's name; None: that of this process.
    """
    words = sys.argv[1:] if words is None else list(words)
    if not words or words[0] in ("-h", "--help"):
        try:
            print(help_text(), flush=True)
        except BrokenPipeError:  # as of `... | head`, which is not an error
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    name, *rest = words
    _forget_working_directory()
    if name not in COMMANDS:
        from cache.errors import nearest

        print(
            f"error: nanomolmo2: no command {name!r}{nearest(name, COMMANDS)}; see nanomolmo2 --help",
            file=sys.stderr,
        )
        return 2
    # Ctrl-C while the command imports ends it without a traceback.
    import_module("configs.signals").end_quietly(always=True)
    sys.argv = [f"nanomolmo2 {name}", *rest]
    # With alter_sys, processes that are spawned know the module as their main one.
    runpy.run_module(COMMANDS[name], run_name="__main__", alter_sys=True)
    return 0


def help_text() -> str:
    """Return the commands with a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}   {summary(module)}" for name, module in COMMANDS.items()]
    return "\n".join(
        [
            "usage: nanomolmo2 COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "Options of a command: nanomolmo2 encode --help",
        ]
    )


def summary(module: str) -> str:
    """Return the first line of a command's docstring, without importing it."""
    path = ROOT.joinpath(*module.split("."))
    file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def _forget_working_directory() -> None:
    """Remove the working directory, which `python -m` puts first, unless our packages are there."""
    first = Path(sys.path[0] or ".").resolve() if sys.path else ROOT
    if first == Path.cwd() and first != ROOT:
        del sys.path[0]


if __name__ == "__main__":
    sys.exit(main())
