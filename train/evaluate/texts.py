"""Compare the text of an answer with the right answers: exact match, ANLS, relaxed accuracy, counting.

    exact("Red.", ["red", "crimson"])       # 1.0
    anls("CocaCola", ["Coca Cola"])         # 0.89
    relaxed("10.4", ["10"])                 # 1.0
    counted("There are two.", "3")          # (0.0, 1.0, 1.0)

Of several right answers the best match counts. VQA accuracy is in vqa.py.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

ANLS_THRESHOLD = 0.5
"""An answer at this normalised distance or farther is wrong, not misspelt."""
TOLERANCE = 0.05
"""Relative error of a number that relaxed accuracy accepts."""
_UP_TO_TWENTY = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty
"""
NUMBER_WORDS = {word: number for number, word in enumerate(_UP_TO_TWENTY.split())}
NUMBER_WORDS |= {"no": 0, "none": 0, "nothing": 0}
MOST_DIGITS = 15
"""Digits of a number; a longer one counts nothing."""

_DIGITS = r"(?<![\w.])\d+(?:,\d{3})*(?!\d|\.\d)"
_NUMBER = re.compile(rf"{_DIGITS}|(?<![\w-])(?:{'|'.join(NUMBER_WORDS)})(?![\w-])")


def normalized(text: str) -> str:
    """Return text without differences of case, outer white space and a final period."""
    return unicodedata.normalize("NFC", text).strip().removesuffix(".").strip().casefold()


def exact(given: str, answers: Sequence[str]) -> float:
    """Return 1 if the normalised answer equals one of the right answers, else 0."""
    said = normalized(given)
    return float(any(normalized(one) == said for one in answers))


# ---- ANLS


def anls(given: str, answers: Sequence[str]) -> float:
    """Return the normalised Levenshtein similarity to the nearest right answer, 0 if that is not near.

    Biten et al., "Scene Text Visual Question Answering", ICCV 2019, equation 1: with NL the edit distance
    over the length of the longer text, s = 1 - NL if NL < 0.5, else 0, and the maximum of s over the answers
    counts. Case does not matter, spaces do (but not how many), as in the evaluation of ST-VQA and DocVQA.
    """
    return max((_similarity(_spaced(given), _spaced(one)) for one in answers), default=0.0)


def _spaced(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(one: str, other: str) -> float:
    longest = max(len(one), len(other))
    if not longest:
        return 1.0
    if abs(len(one) - len(other)) >= ANLS_THRESHOLD * longest:  # of insertions alone
        return 0.0
    distance = edit_distance(one, other) / longest
    return 1.0 - distance if distance < ANLS_THRESHOLD else 0.0


def edit_distance(one: str, other: str) -> int:
    """Return the Levenshtein distance: fewest insertions, deletions and replacements of a character."""
    before = list(range(len(other) + 1))
    for row, letter in enumerate(one, 1):
        line = [row]
        for column, second in enumerate(other, 1):
            replaced = before[column - 1] + (letter != second)
            line.append(min(before[column] + 1, line[-1] + 1, replaced))
        before = line
    return before[-1]


# ---- relaxed accuracy


def relaxed(given: str, answers: Sequence[str]) -> float:
    """Return 1 if a number is within 5 % of a right one, or a text equals a right one; else 0.

    Masry et al., "ChartQA", ACL 2022, section 5.1, as computed by Pix2Struct, which the field compares with:
    a number is what Python's `float` reads, `14%` is 0.14, and against 0 the texts must be equal. Outer white
    space and case do not matter.
    """
    return float(any(_relaxed(given.strip(), one.strip()) for one in answers))


def _relaxed(given: str, answer: str) -> bool:
    said, right = _float(given), _float(answer)
    if said is not None and right:
        return abs(said - right) / abs(right) <= TOLERANCE
    return given.lower() == answer.lower()


def _float(text: str) -> float | None:
    """Return the number that a text is; None if it is none, or not finite."""
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


# ---- counting


def counted(given: int | None, right: int) -> tuple[float, float, float]:
    """Return whether a count is right, whether it is right within one, and by how much it is wrong.

    Exact, within one and the mean absolute error are those of TallyQA and CountBench (Acharya et al., AAAI
    2019; Paiss et al., ICCV 2023). An answer without a number (None) is not right, and is wrong by as much as
    0.
    """
    error = abs((given or 0) - right)
    return (
        float(given is not None and not error),
        float(given is not None and error <= 1),
        float(error),
    )


def number_in(text: str) -> int | None:
    """Return the last whole number of a text, as digits or an English word up to twenty; None without one."""
    found = _NUMBER.findall(text.lower())
    if not found:
        return None
    last = found[-1].replace(",", "")
    if last in NUMBER_WORDS:
        return NUMBER_WORDS[last]
    return int(last) if len(last) <= MOST_DIGITS else None
