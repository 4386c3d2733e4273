"""Which media a record names: by path, URL, `data:` URI, or as bytes in a container."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, Literal

from encode.records.account import FaultError
from encode.records.keys import (
    FILE_KEYS,
    IMAGE_KEYS,
    NAME_KEYS,
    URL_KEYS,
    VIDEO_KEYS,
    Fields,
    is_empty,
    show,
)
from encode.records.record import MediaName

Kind = Literal["image", "video", ""]

MAX_NAME = 4096
"""Characters of a path or URL, at most. A `data:` URI may be longer."""
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True)
class Named:
    """The media that the keys of a record name."""

    images: tuple[MediaName, ...] = ()
    """Named by keys of images, or by keys that do not say what they name."""
    videos: tuple[MediaName, ...] = ()
    """Named by keys of videos."""

    @property
    def all(self) -> tuple[MediaName, ...]:
        """Return images, then videos."""
        return self.images + self.videos


def take_media(fields: Fields) -> Named:
    """Take the keys of a record that name media.

    Raises:
        FaultError: a name is not usable, or two keys name different media.
    """
    of_files = [key for key in fields.left() if key.endswith(("_file_name", "_file_names"))]
    images = _first(fields, IMAGE_KEYS, "image")
    videos = _first(fields, VIDEO_KEYS, "video")
    files = _first(fields, (*FILE_KEYS, *of_files), "")
    if files and (images or videos):
        _refuse_others(files, images + videos)
    if not (images or videos):
        images = files
    for keys, weak in ((NAME_KEYS, "name"), (URL_KEYS, "url")):
        for key in keys:
            if key not in fields:
                continue
            if not (images or videos):
                kind: Kind = "image" if "image" in key else "video" if "video" in key else ""
                named = _first(fields, keys, kind)
                images, videos = ((), named) if kind == "video" else (named, ())
            elif weak == "url" or _names_the_same(fields.peek(key), images + videos):
                fields.ignore(key)
            else:
                raise FaultError(
                    "two keys of media", f"{key} names other media than {_of(images + videos)}"
                )
    return Named(_with_sha256(fields, images), videos)


def media_names(value: Any, kind: Kind, path: str, fields: Fields) -> tuple[MediaName, ...]:
    """Return the media that a value names: a name, an object with a path or URL, or a list of these.

    Args:
        value: the value.
        kind: what its key says.
        path: of its key, for messages.
        fields: the object that it is in.
    """
    if isinstance(value, MediaName):
        return (replace(value, kind=value.kind or kind),)
    if isinstance(value, str):
        return (MediaName(text=_checked(value, path), kind=kind),)
    if isinstance(value, list | tuple):
        names: list[MediaName] = []
        for item in value:
            if isinstance(item, list | tuple):
                raise FaultError(
                    "wrong type",
                    f"{path}: a list in a list; a video as a list of frames is not read",
                )
            names.extend(media_names(item, kind, path, fields))
        return tuple(names)
    if isinstance(value, Mapping):
        inner = Fields(value, path, fields.ignored, fields.ignore_keys)
        given = [key for key in ("path", "url", "image_url", "image", "video") if key in inner]
        if not is_empty(value.get("bytes")):
            raise FaultError("wrong type", f"{path}: bytes in a record; name a file")
        if len(given) != 1:
            raise FaultError("wrong type", f"{path}: expected one path or url, found {len(given)}")
        names_of = media_names(inner.take(given[0]), kind, inner.path(given[0]), inner)
        inner.take("bytes")
        inner.close()
        return names_of
    raise FaultError("wrong type", f"{path}: expected the name of a file, found {show(value)}")


def _first(fields: Fields, keys: tuple[str, ...], kind: Kind) -> tuple[MediaName, ...]:
    """Return the media of the keys that are given; they must name equal media."""
    found: tuple[MediaName, ...] = ()
    by = ""
    for key in keys:
        if key not in fields:
            continue
        names = media_names(fields.peek(key), kind, key, fields)
        if not names or not found:
            fields.take(key)
            found, by = (names, key) if names else (found, by)
        elif names == found:
            fields.ignore(key)
        else:
            raise FaultError(
                "two keys of media", f"{by} and {key} name different media; use one of them"
            )
    return found


def _refuse_others(files: tuple[MediaName, ...], named: tuple[MediaName, ...]) -> None:
    if [name.text for name in files] != [name.text for name in named]:
        raise FaultError(
            "two keys of media",
            f"{_of(files)} and {_of(named)} are named by two keys; use one of them",
        )


def _names_the_same(value: Any, named: tuple[MediaName, ...]) -> bool:
    """Return whether a name beside media is theirs: an equal end of the path, or media without a name."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or len(texts) != len(named):
        return False
    for text, name in zip(texts, named, strict=True):
        if not isinstance(text, str):
            return False
        embedded = name.text.startswith(("parquet:", "arrow:", "tar:", "json:", "data:"))
        if not embedded and PurePosixPath(text).name != PurePosixPath(name.text).name:
            return False
    return True


def _with_sha256(fields: Fields, images: tuple[MediaName, ...]) -> tuple[MediaName, ...]:
    """Give a single URL the sha256 that the record states of its image."""
    value = fields.peek("image_sha256")
    if value is None:
        return images
    if len(images) != 1 or not images[0].text.startswith(("http://", "https://")):
        fields.ignore("image_sha256")
        return images
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise FaultError("wrong type", f"image_sha256: expected 64 hex digits, found {show(value)}")
    fields.take("image_sha256")
    return (replace(images[0], sha256=value.lower()),)


def _checked(name: str, path: str) -> str:
    if not name.strip() or "\0" in name:
        raise FaultError("not a file name", f"{path}: {name[:60]!r} is not a file name")
    if len(name) > MAX_NAME and not name.startswith("data:"):
        raise FaultError("not a file name", f"{path}: a name of {len(name):,} characters")
    return name


def _of(names: tuple[MediaName, ...]) -> str:
    return ", ".join(name.text[:60] for name in names[:3])
