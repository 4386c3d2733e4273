"""List the commands of this package.

python -m model
"""

from __future__ import annotations

from pathlib import Path

from configs import command
from configs.commands import list_commands

if __name__ == "__main__":
    command(lambda: list_commands(Path(__file__).parent))
