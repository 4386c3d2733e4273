"""A folder of images and videos as a data set, with captions, questions or conversations.

python -m encode.run --dataset folder:photos

Each line of a `metadata.jsonl` at the top of the folder is one sample. Paths are relative to the folder:

    {"file": "a.jpg", "caption": "A cat asleep."}                  user: <image>CAPTION_PROMPT
    {"file": "a.jpg", "question": "Which animal?", "answer": "A cat."}
    {"files": ["a.jpg", "b.jpg"], "messages": [{"role": "user", "content": "Compare."}, ...]}
    {"file": "a.mp4", "caption": "A cat wakes up."}                a video, by its suffix
    {"file": "a.jpg"}                                              only the image

Without `metadata.jsonl`, every image and video below the folder is a sample without text: it is encoded, and
there is nothing in it to train on. Hidden files and linked folders are ignored. A sample keeps a file that is
missing; the encode job records it in the ledger.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from cache.store.samples import ROLES, MediaRef, Message, Sample
from configs import UserError, nearest
from encode.records.account import Account
from encode.records.record import CAPTION_PROMPT, IMAGE_TOKEN, VIDEO_PROMPT
from model.media.video import VIDEO_SUFFIXES

METADATA = "metadata.jsonl"

SUFFIXES = frozenset(
    {".apng", ".avif", ".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo"}
    | {".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
"""Suffixes of images in a folder without metadata. A file that a line names is a video if it has one of
VIDEO_SUFFIXES, and otherwise an image. Its real format is detected when it is decoded."""

_TEXTS = ("caption", "question", "messages")
"""Keys of texts."""
_KEYS = ("file", "files", *_TEXTS, "answer", "weight")


class _BadLineError(Exception):
    """What is wrong with one line. The caller adds the file and the line number."""


@dataclass(frozen=True, kw_only=True)
class FolderDataset:
    """One folder. Each call of `samples` reads it again."""

    name: str
    """Name of the data set in the cache; the name of the folder by default."""
    folder: Path
    """Absolute path without links."""
    leave_out: Path
    """Folder that is not searched: the feature cache, which may be inside."""

    needs_sizes: ClassVar[bool] = False
    """No text here depends on the size of an image."""

    @staticmethod
    def open(path: str, *, name: str | None, leave_out: Path) -> FolderDataset:
        """Return the data set of the folder at `path`.

        Raises:
            UserError: no such folder.
        """
        folder = Path(path).expanduser()
        if not path or not folder.is_dir():
            raise UserError(f"folder:{path}: no such folder; --dataset folder:PATH takes one")
        folder = folder.resolve()
        name = name or re.sub(r"[^A-Za-z0-9._-]+", "-", folder.name).strip("-._") or "folder"
        return FolderDataset(name=name, folder=folder, leave_out=leave_out.resolve())

    def samples(
        self,
        sizes: Mapping[str, tuple[int, int]] = {},  # noqa: ARG002 - part of the protocol
        account: Account | None = None,  # noqa: ARG002 - nothing is left out here
    ) -> Iterator[Sample]:
        """Yield one sample per line of metadata.jsonl, or one per image or video, sorted by path.

        Raises:
            UserError: a line is invalid (named as file:line), a path is outside the folder, or there is
                nothing to encode.
        """
        metadata = self.folder / METADATA
        found = False
        for sample in self._listed(metadata) if metadata.exists() else self._unlisted():
            found = True
            yield sample
        if not found:
            what = f"{metadata}: no lines" if metadata.exists() else f"{self.folder}: no media"
            known = ", ".join(sorted(SUFFIXES | VIDEO_SUFFIXES))
            raise UserError(f"{what} (known by name: {known})")

    def _unlisted(self) -> Iterator[Sample]:
        for path in _walk(self.folder, self.leave_out):
            relative = path.relative_to(self.folder).as_posix()
            if not _is_unicode(relative):
                raise UserError(f"{str(path)!r}: the name is not UTF-8; rename the file")
            if path.is_symlink():
                try:
                    _absolute(self.folder, relative)
                except _BadLineError as error:
                    raise UserError(f"{path}: {error}") from None
            media = (media_ref(str(path)),)
            yield Sample(id=relative, dataset=self.name, messages=(), media=media)

    def _listed(self, metadata: Path) -> Iterator[Sample]:
        times_named: Counter[str] = Counter()
        with metadata.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    files, messages, weight, task = _read_line(line)
                    sources = [_absolute(self.folder, file) for file in files]
                except _BadLineError as error:
                    raise UserError(f"{metadata}:{number}: {error}") from None
                first = files[0] if files else ""
                yield Sample(
                    id=f"{first}#{times_named[first]}",
                    dataset=self.name,
                    messages=messages,
                    media=tuple(map(media_ref, sources)),
                    weight=weight,
                    task=task,
                )
                times_named[first] += 1


def media_ref(source: str) -> MediaRef:
    """Return the reference to a file: a video or an image, by its suffix."""
    video = Path(source).suffix.lower() in VIDEO_SUFFIXES
    return MediaRef(source=source, kind="video" if video else "image")


def _walk(folder: Path, leave_out: Path) -> Iterator[Path]:
    """Yield the images and videos below `folder`, folder by folder, sorted."""
    known = SUFFIXES | VIDEO_SUFFIXES

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    for here, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(f for f in folders if f[0] != "." and Path(here, f) != leave_out)
        for file in sorted(files):
            if file[0] != "." and Path(file).suffix.lower() in known:
                yield Path(here, file)


def _absolute(folder: Path, file: str) -> str:
    """Return the absolute path of `file` in `folder`.

    Raises:
        _BadLineError: the path, or the target of a link, is outside the folder.
    """
    path = os.path.normpath(folder / file)
    real = os.path.realpath(path)
    if Path(file).is_absolute() or not all(
        Path(p).is_relative_to(folder) and Path(p) != folder for p in (path, real)
    ):
        raise _BadLineError(f"{file!r} is outside {folder}; copy the image into the folder")
    return path


# ---- one line


def _read_line(line: bytes) -> tuple[list[str], tuple[Message, ...], float, str]:
    """Return files, messages, weight and task of one line."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise _BadLineError("not UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise _BadLineError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise _BadLineError(f"expected an object in braces, found {type(value).__name__}")
    files = _files(value)
    weight = _weight(value, "weight")
    texts = [key for key in _TEXTS if key in value]
    if len(texts) > 1:
        raise _BadLineError(f"has {' and '.join(texts)}; use one of them per line")
    if ("question" in value) != ("answer" in value):
        raise _BadLineError("question and answer go together")
    if not texts:
        _refuse_misspelt_text(value)
        if not files:
            raise _BadLineError("neither a file nor messages")
        return files, (), weight, ""
    if "messages" in value:
        return files, _conversation(value["messages"], len(files)), weight, "chat"
    if "question" in value:
        asked, answer = _plain(value, "question"), _plain(value, "answer")
    else:
        is_image = media_ref(files[0] if files else "").kind == "image"
        asked = CAPTION_PROMPT if is_image else VIDEO_PROMPT
        answer = _plain(value, "caption")
    user = Message(role="user", content=IMAGE_TOKEN * len(files) + asked)
    return files, (user, Message(role="assistant", content=answer)), weight, texts[0]


def _files(value: Mapping[str, Any]) -> list[str]:
    if "file" in value and "files" in value:
        raise _BadLineError("has file and files; use one of them per line")
    if "file" not in value and "files" not in value and "messages" not in value:
        hint = "; file_name is called file here" if "file_name" in value else ""
        raise _BadLineError(f'no "file"{hint}')
    files = value.get("files", [value["file"]] if "file" in value else [])
    if not isinstance(files, list):
        raise _BadLineError(f"files: expected a list, found {files!r}")
    for file in files:
        if not isinstance(file, str) or not file or "\0" in file or not _is_unicode(file):
            raise _BadLineError(f"{file!r} is not a file name")
    return files


def _refuse_misspelt_text(value: Mapping[str, Any]) -> None:
    """Refuse a key that is nearly one of ours: its text would be lost. Other keys are ignored."""
    for key in value:
        likely = difflib.get_close_matches(key, (*_TEXTS, "answer", "text"), n=1, cutoff=0.75)
        if key not in _KEYS and likely:
            raise _BadLineError(f"unknown key {key!r}; keys of texts are {', '.join(_TEXTS)}")


def _plain(value: Mapping[str, Any], key: str) -> str:
    """Return a text that must not contain a placeholder."""
    text = _text(value[key], key)
    if IMAGE_TOKEN in text:
        raise _BadLineError(
            f"{key} contains {IMAGE_TOKEN}, which stands for an image; to place images use messages"
        )
    return text


def _text(text: Any, key: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise _BadLineError(f"{key}: expected text, found {text!r}")
    if not _is_unicode(text):
        raise _BadLineError(f"{key}: half a surrogate pair is not text")
    return text


def _conversation(turns: Any, images: int) -> tuple[Message, ...]:
    """Return the messages of a list of turns.

    They keep their placeholders, or get one per image before the first turn of the user.
    """
    if not isinstance(turns, list) or not turns:
        raise _BadLineError("messages: expected a list of turns")
    messages = [_turn(turn, number) for number, turn in enumerate(turns, 1)]
    roles = [m.role for m in messages]
    if "assistant" not in roles:
        raise _BadLineError("messages: no turn of the assistant, so nothing to learn")
    placed = sum(m.content.count(IMAGE_TOKEN) for m in messages)
    if placed == 0 and images:
        if "user" not in roles:
            raise _BadLineError("messages: no turn of the user to put the image into")
        at = roles.index("user")
        content = IMAGE_TOKEN * images + messages[at].content
        messages[at] = Message(role="user", content=content, weight=messages[at].weight)
    elif placed != images:
        raise _BadLineError(
            f"messages: {placed} {IMAGE_TOKEN} for {images} files; use one per file, or none"
        )
    return tuple(messages)


def _turn(turn: Any, number: int) -> Message:
    where = f"messages: turn {number}"
    if not isinstance(turn, dict):
        raise _BadLineError(f"{where}: expected role and content, found {turn!r}")
    role = turn.get("role")
    if role not in ROLES:
        hint = nearest(role, ROLES) if isinstance(role, str) else ""
        raise _BadLineError(f"{where}: role {role!r} is none of {', '.join(ROLES)}{hint}")
    content = _text(turn.get("content"), f"{where}: content")
    if role != "user" and IMAGE_TOKEN in content:
        raise _BadLineError(
            f"{where}: {IMAGE_TOKEN} in a message of the {role}; images belong to the user"
        )
    return Message(role=role, content=content, weight=_weight(turn, f"{where}: weight"))


def _weight(value: Mapping[str, Any], where: str) -> float:
    weight = value.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < 1e6:
        raise _BadLineError(f"{where}: {weight!r} is not a factor of the loss (0 to 1e6)")
    return float(weight)


def _is_unicode(text: str) -> bool:
    """Return False for lone surrogates: file names that are not UTF-8, and broken JSON escapes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
