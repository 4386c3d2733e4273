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
    NAME_ENDS,
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
    named = take_named(fields)
    images, videos = named.images, named.videos
    of_files = [key for key in fields.left() if key.endswith(NAME_ENDS) and key not in NAME_KEYS]
    for key in (*fields.among(FILE_KEYS), *of_files):
        files = media_names(fields.peek(key), "", key, fields)
        if not (images or videos):
            fields.take(key)
            images = files
        elif _texts(files) == _texts(images + videos):
            fields.ignore(key)
        else:
            raise _two_keys(key, images + videos)
    for key in fields.among(NAME_KEYS + URL_KEYS):
        if not (images or videos):
            kind: Kind = "image" if "image" in key else "video" if "video" in key else ""
            found = media_names(fields.take(key), kind, key, fields)
            images, videos = ((), found) if kind == "video" else (found, ())
        elif key in URL_KEYS or _names_the_same(fields.peek(key), images + videos):
            fields.ignore(key)
        else:
            raise _two_keys(key, images + videos)
    if images or videos:  # other addresses say where they came from
        for key in fields.left():
            if key.endswith(("_url", "_urls")) and isinstance(fields.peek(key), str):
                fields.ignore(key)
    return Named(_with_sha256(fields, images), videos)


def take_named(fields: Fields) -> Named:
    """Take the keys that say that they name images or videos."""
    return Named(_first(fields, IMAGE_KEYS, "image"), _first(fields, VIDEO_KEYS, "video"))


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
    """Take the media of the keys that are given; all must name equal media."""
    found: tuple[MediaName, ...] = ()
    for key in fields.among(keys):
        names = media_names(fields.peek(key), kind, key, fields)
        if not names or not found:
            fields.take(key)
            found = found or names
        elif names == found:
            fields.ignore(key)
        else:
            raise _two_keys(key, found)
    return found


def _two_keys(key: str, named: tuple[MediaName, ...]) -> FaultError:
    names = ", ".join(show(name.text) for name in named[:3])
    return FaultError(
        "two keys of media",
        f"{key} names other media than {names}; use one key, with a list",
        key=key,
    )


def _texts(names: tuple[MediaName, ...]) -> list[str]:
    return [name.text for name in names]


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
