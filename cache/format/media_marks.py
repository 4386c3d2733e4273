"""The marks in the text of a sample that stand for its images and videos.

    split_at_marks([("user", "<image> or <video>?"), ("assistant", "<image>")], 2)
    # [["", " or ", "?"], ["<image>"]]

`<image>` and `<video>` mean the same: either stands for the sample's next media item, whatever its kind.

- Without media, every mark is plain text.
- Only marks in user turns stand for media. Of more marks than media, the first ones do and the rest is text.
- Without a mark in the user turns, the media are at the start of the first user turn.
- Fewer marks than media, but at least one, is an error.

Training, `model.generate` and `cache.view` follow these rules; they hold for exported samples too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

MARK = re.compile("<image>|<video>")


def split_at_marks(turns: Sequence[tuple[str, str]], media: int) -> list[list[str]]:
    """Split the text of each turn at the places of its media: k + 1 texts for k media in it.

    Args:
        turns: (role, text) of each turn.
        media: number of the sample's media.

    Raises:
        ValueError: there are media but no user turn, or fewer marks than media.
    """
    users = [i for i, (role, _) in enumerate(turns) if role == "user"]
    marks = sum(len(MARK.findall(turns[i][1])) for i in users)
    texts = [[text] for _, text in turns]
    if media and not marks:
        if not users:
            raise ValueError(f"{media} media but no user turn to hold them")
        # Media directly precede the text, without a newline.
        texts[users[0]] = [""] * media + texts[users[0]]
        return texts
    if marks < media:
        raise ValueError(
            f"{media} media but {marks} {'mark' if marks == 1 else 'marks'} (<image> or <video>) in the "
            "user turns; give one for each, or none"
        )
    left = media
    for i in users:
        texts[i] = MARK.split(texts[i][0], left) if left else texts[i]
        left -= len(texts[i]) - 1
    return texts
