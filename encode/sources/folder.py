"""A folder of images and videos as a data set, with captions, questions or whole conversations.

python -m encode.run --dataset folder:photos

With `metadata.jsonl` at its top, each line is one sample (paths are relative to the folder):

    {"file": "a.jpg", "caption": "A cat asleep."}                  user: <image>CAPTION_PROMPT
    {"file": "a.jpg", "question": "Which animal?", "answer": "A cat."}
    {"files": ["a.jpg", "b.jpg"], "messages": [{"role": "user", "content": "Compare."}, ...]}
    {"file": "a.mp4", "caption": "A cat wakes up."}                a video, by the end of its name
    {"file": "a.jpg"}                                              the image alone

Without it every image and video below the folder is a sample of its own without text: it is encoded, and
there is nothing in it to train on. Hidden files, and folders reached through links, are left out. A file
that a line names but that is not there stays in its sample; the encode job puts it into the ledger.
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
from model.media.video import VIDEO_SUFFIXES

METADATA = "metadata.jsonl"
IMAGE_TOKEN = "<image>"
CAPTION_PROMPT = "Describe this image."
"""What the user asks when a line has a caption; always the same words, so that runs can be compared."""
VIDEO_PROMPT = "Describe this video."
"""The same for a video."""

SUFFIXES = frozenset(
    {".apng", ".avif", ".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo"}
    | {".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
"""What counts as an image by its name; what it really is shows when it is decoded. VIDEO_SUFFIXES are
videos; anything else that a line names is taken for an image."""

_KEYS = ("file", "files", "caption", "question", "answer", "messages", "weight")
_TEXTS = ("caption", "question", "messages")


class _BadLineError(Exception):
    """What is wrong with one line; the caller knows which line it is."""


@dataclass(frozen=True, kw_only=True)
class FolderDataset:
    """One folder. `samples()` reads it anew each time."""

    name: str
    """Of the data set in the cache: by default the folder's own."""
    folder: Path
    """Absolute, links resolved."""
    leave_out: Path
    """Not searched for images: the feature cache, should it lie within."""

    needs_sizes: ClassVar[bool] = False
    """Nothing here depends on them."""

    @staticmethod
    def open(path: str, *, name: str | None, leave_out: Path) -> FolderDataset:
        """The folder at `path`.

        Raises:
            UserError: there is no such folder.
        """
        folder = Path(path).expanduser()
        if not path or not folder.is_dir():
            raise UserError(f"folder:{path}: no such folder; --dataset folder:PATH takes one")
        folder = folder.resolve()
        name = name or re.sub(r"[^A-Za-z0-9._-]+", "-", folder.name).strip("-._") or "folder"
        return FolderDataset(name=name, folder=folder, leave_out=leave_out.resolve())

    def samples(
        self,
        sizes: Mapping[str, tuple[int, int]] = {},  # noqa: ARG002 - what other data sets need
    ) -> Iterator[Sample]:
        """One sample a line of metadata.jsonl, or one an image or video, sorted by path.

        Raises:
            UserError: a line that cannot be used (file:line), a path that leaves the folder, no media.
        """
        metadata = self.folder / METADATA
        found = False
        for sample in self._listed(metadata) if metadata.exists() else self._images():
            found = True
            yield sample
        if not found:
            what = f"{metadata}: no lines" if metadata.exists() else f"{self.folder}: no media"
            known = ", ".join(sorted(SUFFIXES | VIDEO_SUFFIXES))
            raise UserError(f"{what} (known by name: {known})")

    def _images(self) -> Iterator[Sample]:
        for path in _walk(self.folder, self.leave_out):
            relative = path.relative_to(self.folder).as_posix()
            if not _is_text(relative):
                raise UserError(f"{str(path)!r}: the name is not UTF-8; rename the file")
            if path.is_symlink():
                try:
                    _inside(self.folder, relative)
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
                    sources = [_inside(self.folder, file) for file in files]
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
    """A file as a sample mentions it: image or video by its name."""
    video = Path(source).suffix.lower() in VIDEO_SUFFIXES
    return MediaRef(source=source, kind="video" if video else "image")


def _walk(folder: Path, leave_out: Path) -> Iterator[Path]:
    """Images and videos below `folder`, sorted, folder by folder."""

    known = SUFFIXES | VIDEO_SUFFIXES

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    for here, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(f for f in folders if f[0] != "." and Path(here, f) != leave_out)
        for file in sorted(files):
            if file[0] != "." and Path(file).suffix.lower() in known:
                yield Path(here, file)


def _inside(folder: Path, file: str) -> str:
    """The absolute path of `file`, relative to `folder` and truly inside it, links followed."""
    path = os.path.normpath(folder / file)
    real = os.path.realpath(path)
    if Path(file).is_absolute() or not all(
        Path(p).is_relative_to(folder) and Path(p) != folder for p in (path, real)
    ):
        raise _BadLineError(f"{file!r} leads out of {folder}; copy the image into the folder")
    return path


# ---- one line


def _read_line(line: bytes) -> tuple[list[str], tuple[Message, ...], float, str]:
    """(files, messages, weight, task) of one line."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise _BadLineError("not UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise _BadLineError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise _BadLineError(f"expected an object in braces, found {type(value).__name__}")
    files = _files(value)
    first = files[0] if files else ""
    texts = [key for key in _TEXTS if key in value]
    if len(texts) > 1:
        raise _BadLineError(f"has {' and '.join(texts)}; one of them a line")
    if ("question" in value) != ("answer" in value):
        raise _BadLineError("question and answer go together")
    if not texts:
        _check_no_text_lost(value)
    task = (
        {"caption": "caption", "question": "question", "messages": "chat"}[texts[0]]
        if texts
        else ""
    )
    if task == "chat":
        messages = _chat(value["messages"], len(files))
    elif task:
        described = CAPTION_PROMPT if media_ref(first).kind == "image" else VIDEO_PROMPT
        asked = described if task == "caption" else _plain(value, "question")
        told = _plain(value, "caption" if task == "caption" else "answer")
        messages = (
            Message(role="user", content=_placeholders(len(files)) + asked),
            Message(role="assistant", content=told),
        )
    else:
        messages = ()
    if not files and not messages:
        raise _BadLineError("neither a file nor messages")
    return files, messages, _weight(value, "weight"), task


def _files(value: Mapping[str, Any]) -> list[str]:
    if "file" in value and "files" in value:
        raise _BadLineError("has file and files; one of them a line")
    if "file" not in value and "files" not in value and "messages" not in value:
        hint = "; file_name is called file here" if "file_name" in value else ""
        raise _BadLineError(f'no "file"{hint}')
    files = value.get("files", [value["file"]] if "file" in value else [])
    if not isinstance(files, list):
        raise _BadLineError(f"files: expected a list, found {files!r}")
    for file in files:
        if not isinstance(file, str) or not file or "\0" in file or not _is_text(file):
            raise _BadLineError(f"{file!r} is no file name")
    return files


def _check_no_text_lost(value: Mapping[str, Any]) -> None:
    """Other people's columns are welcome, but not a text under a name that is nearly ours."""
    for key in value:
        likely = difflib.get_close_matches(key, (*_TEXTS, "answer", "text"), n=1, cutoff=0.75)
        if key not in _KEYS and likely:
            raise _BadLineError(f"unknown key {key!r}; text goes by {', '.join(_TEXTS)}")


def _plain(value: Mapping[str, Any], key: str) -> str:
    """Text in which a placeholder has no meaning."""
    text = _text(value[key], key)
    if IMAGE_TOKEN in text:
        raise _BadLineError(
            f"{key} contains {IMAGE_TOKEN}, which stands for an image; to place images use messages"
        )
    return text


def _text(text: Any, key: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise _BadLineError(f"{key}: expected text, found {text!r}")
    if not _is_text(text):
        raise _BadLineError(f"{key}: half a surrogate pair is no text")
    return text


def _chat(turns: Any, images: int) -> tuple[Message, ...]:
    """Messages as they stand, with one placeholder an image: theirs, or ours before the first turn."""
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
        content = _placeholders(images) + messages[at].content
        messages[at] = Message(role="user", content=content, weight=messages[at].weight)
    elif placed != images:
        raise _BadLineError(
            f"messages: {placed} {IMAGE_TOKEN} for {images} files; one each, or none at all"
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
            f"{where}: {IMAGE_TOKEN} in words of the {role}; images come from the user"
        )
    return Message(role=role, content=content, weight=_weight(turn, f"{where}: weight"))


def _weight(value: Mapping[str, Any], where: str) -> float:
    weight = value.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < 1e6:
        raise _BadLineError(f"{where}: {weight!r} is no factor of a loss")
    return float(weight)


def _placeholders(images: int) -> str:
    """Before the words, as `model.language.chat_template` puts images that have no place of their own."""
    return IMAGE_TOKEN * images


def _is_text(text: str) -> bool:
    """False for lone surrogates: file names that are not UTF-8, and JSON escapes that are no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
