"""VQA accuracy: an answer is as right as three of ten people agree with it.

    vqa_accuracy("2", ["2"] * 3 + ["3"] * 7)      # 0.9
    simplified("The dog's 2 cats.")               # "dog's 2 cats"

Antol et al., "VQA: Visual Question Answering", ICCV 2015, section 5, and the rules on
https://visualqa.org/evaluation.html. The accuracy of one answer against the answers of some people is
min(number of them who gave it / 3, 1). Of ten people, each is left out once, and the ten accuracies are
averaged. VQAv2, OK-VQA, TextVQA and VizWiz use it.

Texts are compared after the published simplification, which this file follows to its quirks. The published
script leaves the people's answers as they are where all ten are equal. Here they are always simplified, as
the rules say and as lmms-eval does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

AGREEING = 3
"""People who make an answer wholly right."""
LEAST_ANSWERS = AGREEING + 1
"""With fewer answers to a question, no answer could be wholly right: one person is always left out."""

ARTICLES = {"a", "an", "the"}
_UP_TO_TEN = "zero one two three four five six seven eight nine ten"
DIGITS = {word: str(number) for number, word in enumerate(_UP_TO_TEN.split())} | {"none": "0"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""Characters that are removed or become spaces. Apostrophes and colons are parts of words and times."""
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
"""A period that is not a decimal point."""

_WORDS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll let's ma'am might've mightn't mightn't've must've
    mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
    they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
    y'all'd've y'all'll you'd you'd've you'll you're you've
"""


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:at] + word[at + 1 :] for at, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {
    short: word
    for word in _WORDS.split()
    if word != "let's"  # "lets" is a word
    for short in _without_one_apostrophe(word)
} | {"somebody'd": "somebodyd"}
"""A word that lacks one apostrophe -> the word."""


def vqa_accuracy(given: str, answers: Sequence[str]) -> float:
    """Return the accuracy of an answer against those of some people, from 0 to 1.

    Args:
        given: the answer.
        answers: of at least two people; usually ten.
    """
    said = simplified(given)
    votes = Counter(simplified(one) for one in answers)[said]
    others = len(answers) - votes
    # Each person is left out once: `votes` times one who agrees, `others` times one who does not.
    total = votes * min((votes - 1) / AGREEING, 1.0) + others * min(votes / AGREEING, 1.0)
    return total / len(answers)


def simplified(text: str) -> str:
    """Return a text without articles and punctuation, in lower case, with digits and whole contractions."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    joined = COMMA_IN_NUMBER.search(text) is not None
    simple = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        simple = simple.replace(mark, "" if joined or beside_space else " ")
    words = [DIGITS.get(word, word) for word in PERIOD.sub("", simple).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
