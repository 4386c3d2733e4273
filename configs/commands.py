"""List the commands of a package: `python -m cache`, and so for encode, model and train.

A command is a module that runs with `python -m`. Its line is the first one of its docstring, read from the
source: importing the modules would take seconds.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from pathlib import Path

from configs import UserError, nearest

GUARD = 'if __name__ == "__main__":'
"""The line by which a module is a command."""


def find_commands(folder: Path) -> dict[str, str]:
    """Return command -> the first line of its docstring, for the package in `folder`, by name.

    Commands are modules with the line `GUARD`; `__main__.py` is that of its package.
    """
    found = {}
    # Not every folder: data may be there too, and be large.
    rooms = [folder, *(path.parent for path in folder.glob("*/__init__.py"))]
    for path in sorted(path for room in rooms for path in room.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if f"\n{GUARD}\n" in source and path != folder / "__main__.py":
            name = ".".join(path.relative_to(folder.parent).with_suffix("").parts)
            docstring = ast.get_docstring(ast.parse(source)) or ""
            found[name.removesuffix(".__main__")] = docstring.partition("\n")[0]
    return dict(sorted(found.items()))


def list_commands(folder: Path, words: Sequence[str] | None = None) -> int:
    """Print the commands of a package, one a line. Return the exit code, 0.

    Args:
        folder: of the package.
        words: of the command line; None: those of this process.

    Raises:
        UserError: there are words other than --help. A command is `python -m cache.ls`, not `cache ls`.
    """
    commands = find_commands(folder)
    words = sys.argv[1:] if words is None else words
    if words and words[0] not in ("-h", "--help"):
        wanted = f"{folder.name}.{words[0]}"
        likely = wanted if wanted in commands else ""
        hint = f"; write python -m {likely}" if likely else nearest(wanted, commands)
        raise UserError(
            f"python -m {folder.name} lists the commands and takes no {words[0]!r}{hint}"
        )
    width = max(map(len, commands))
    for name, line in commands.items():
        print(f"python -m {name:<{width}}   {line}")
    print(f"\nOptions of a command: python -m {next(iter(commands))} --help")
    return 0
