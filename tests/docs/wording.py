"""List sentences that readers stumble over: a help for writers, not a check.

python -m tests.docs.wording            # file:line, the words, the line
python -m tests.docs.wording cache      # one folder

The patterns are habits that were removed once: metaphors, people's verbs for programs, docstrings that need
the one above them. Not every hit is wrong.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.support import ROOT

PATTERNS = {
    "clause as subject": r"\b(?:[Ww]ho|[Ww]hoever|[Ww]hat) (?:is|was|are|comes?|goes|stands?|lies)"
    r" \w+ (?:\w+ )?(?:is|are|was|drops|keeps|stays|goes|comes)\b",
    "so many": r"\bso (?:many|long|much|few)\b(?! (?:as|that))",
    "people's verbs": r"\b(?:believed?|guilty|innocent|patience|suspects?|is told|are told|hears?|knows)\b",
    "stands, lies": r"\b(?:stands?|lies|lie) (?:in|on|at|for|beside|behind|before|below|where|here|there)\b",
    "old words": r"\b(?:mend(?:s|ed)?|whence|anew|makes? good|lay out|lays out|shall|nought|likewise)\b",
    "leaning docstring": r'"""(?:The same|See above|Likewise|Of the|As above|Those of|And )',
    "a media": r"\ba media\b(?! (?:item|kind|type|table|part|file))",
}


def main(folders: list[str]) -> None:
    """Print every hit below the folders: sources, tests and docs when none is given."""
    chosen = folders or [
        "configs",
        "cache",
        "encode",
        "model",
        "train",
        "tests",
        "docs",
        "README.md",
    ]
    total = 0
    for folder in chosen:
        place = ROOT / folder
        files = [place] if place.is_file() else sorted([*place.rglob("*.py"), *place.rglob("*.md")])
        for path in files:
            total += report(path)
    print(f"{total} places")


def report(path: Path) -> int:
    """Print the hits of one file, and return how many."""
    count = 0
    for number, line in enumerate(path.read_text().splitlines(), 1):
        for what, pattern in PATTERNS.items():
            if path != Path(__file__) and (found := re.search(pattern, line)):
                print(
                    f"{path.relative_to(ROOT)}:{number}: {what}: {found[0]!r}: {line.strip()[:90]}"
                )
                count += 1
    return count


if __name__ == "__main__":
    main(sys.argv[1:])
