"""Files that are one object: COCO captions, or a list of records under a key.

    {"info": {...},
     "images": [{"id": 1, "file_name": "1.jpg", "width": 640, ...}, ...],
     "annotations": [{"id": 7, "image_id": 1, "caption": "A cat asleep."}, ...]}

    {"version": "1.0", "data": [{"image": "1.jpg", "caption": "A cat asleep."}, ...]}

Each image of COCO becomes one line with its `captions`: several answers to one question. The file is read
twice: memory holds the captions, not the images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal

from encode.records.account import Account, FaultError
from encode.records.json_window import Piece, Window, elements
from encode.records.keys import CARRIES, CHANGES, KNOWN_KEYS, Fields, show
from encode.records.record import Line
from encode.records.strict_json import parse

_COCO = ("images", "annotations")
_OF_FILES = frozenset({"description", "url", "text", "path", "file_name", "filename"})
"""Keys that say something about a whole file beside its list of records."""
_NO_LISTS = (CHANGES | CARRIES) - {"train"}
"""Keys of lists that are a part of one record."""
MOST_SECTIONS = 1000
"""Keys after which it is clear that an object contains objects, or is one record."""
MAX_CAPTIONS = 4 << 30
"""Characters of all captions, at most. COCO's training captions have 31 million."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the value of a key starts, behind its first byte."""

    offset: int
    line: int
    kind: Literal["records", "list", "object", "other"]
    """records: a list of objects."""


@dataclass(slots=True)
class _Captions:
    """The captions of one image."""

    line: int
    texts: list[str] = field(default_factory=list)


def find_sections(file: BinaryIO) -> dict[str, Place] | None:
    """Return where the values of a file's only object start, unless the object is one record.

    Returns:
        None if the file is something else than one object, or if a key of the object is one of a record.
    """
    window = Window(file)
    if window.skip_space() != b"{":
        return None
    window.at += 1
    places: dict[str, Place] = {}
    try:
        while (byte := window.skip_space()) != b"}":
            if byte == b"," and places:
                window.at += 1
                window.skip_space()
            if window.peek() != b'"':
                return None
            key = parse(window.piece().data)
            is_known = key in KNOWN_KEYS and key not in _OF_FILES and key != "images"
            if is_known or key in places:
                return None
            if len(places) == MOST_SECTIONS:
                return places if {place.kind for place in places.values()} == {"object"} else None
            if window.skip_space() != b":":
                return None
            window.at += 1
            opens = window.skip_space()
            start, line = window.offset + 1, window.line
            kind: Literal["records", "list", "object", "other"] = "other"
            if opens == b"[":
                window.at += 1
                kind = "records" if window.skip_space() == b"{" else "list"
                for _ in elements(window):
                    pass
            else:
                kind = "object" if opens == b"{" else kind
                window.piece()
            places[key] = Place(start, line, kind)
    except FaultError:
        return None
    window.at += 1
    is_record = "images" in places and "annotations" not in places
    return None if is_record or window.skip_space() else places


def read_sections(
    file: BinaryIO, name: str, sections: Mapping[str, Place], account: Account
) -> Iterator[Line] | None:
    """Return the lines of COCO captions, or of the only list of records; None if there is no such list."""
    lists = ("records", "list")
    if all(key in sections and sections[key].kind in lists for key in _COCO):
        return read_coco(file, name, sections, account)
    found = [key for key, place in sections.items() if place.kind == "records"]
    objects = [key for key, place in sections.items() if place.kind == "object"]
    if len(found) == 1 and found[0] not in _NO_LISTS:
        return _read_list(file, name, found[0], sections, account)
    if len(found) > 1 or (not found and len(objects) == len(sections) > 0):
        several = found or objects
        keys = ", ".join(key[:40] for key in several[:5]) + ", ..." * (len(several) > 5)
        number = f"{len(several):,}" + " or more" * (len(several) == MOST_SECTIONS)
        what = (
            f"{number} lists of records ({keys}): write each into a file of its own"
            if found
            else f"{number} objects ({keys}): write them as one list"
        )
        fault = FaultError(
            "one object instead of a list", f"the file is one object that contains {what}"
        )
        account.fault(f"{name}:1", fault)
        return iter(())
    return None


def _read_list(
    file: BinaryIO, name: str, key: str, sections: Mapping[str, Place], account: Account
) -> Iterator[Line]:
    """Yield the records of the list at `key`; the other keys say something about all of them."""
    account.ignore(dict.fromkeys((other for other in sections if other != key), 1))
    for piece, value in _values(file, name, sections[key], account):
        where = f"{name}:{piece.line}"
        yield Line(where=where, value=value, offset=piece.offset, length=len(piece.data))


def read_coco(
    file: BinaryIO, name: str, sections: Mapping[str, Place], account: Account
) -> Iterator[Line]:
    """Yield one line for each image. Captions without their image are faults."""
    for section in sorted(sections.keys() - set(_COCO)):
        account.ignored[section] += 1
    captions: dict[Any, _Captions] = {}
    size = 0
    for piece, value in _values(file, name, sections["annotations"], account):
        try:
            image, text = _annotation(value, account)
        except FaultError as fault:
            account.fault(f"{name}:{piece.line}", fault)
            continue
        size += len(text)
        if size > MAX_CAPTIONS:
            account.fault(f"{name}:{piece.line}", FaultError("too large", "too many captions"))
            return
        captions.setdefault(image, _Captions(piece.line)).texts.append(text)
    seen: set[Any] = set()
    for piece, value in _values(file, name, sections["images"], account):
        where = f"{name}:{piece.line}"
        try:
            image = _image_id(value.get("id"), "id")
            if image in seen:
                raise FaultError("image id twice", f"two images with the id {image!r}")
            if clash := {"caption", "captions"} & value.keys():
                raise FaultError("unknown key", f"unknown key {min(clash)!r} of an image")
        except FaultError as fault:
            account.fault(where, fault)
            continue
        seen.add(image)
        texts = captions.pop(image).texts if image in captions else None
        yield Line(
            where=where,
            value={**value, "captions": texts},
            offset=piece.offset,
            length=len(piece.data),
        )
    for image, rest in captions.items():
        for text in rest.texts:
            message = f"no image with the id {image!r} for the caption {text[:60]!r}"
            account.fault(f"{name}:{rest.line}", FaultError("caption without an image", message))


def _values(
    file: BinaryIO, name: str, place: Place, account: Account
) -> Iterator[tuple[Piece, dict[str, Any]]]:
    """Yield the objects of one list; what is not an object is a fault."""
    for piece in elements(Window(file, offset=place.offset, line=place.line)):
        try:
            yield piece, as_object(piece)
        except FaultError as fault:
            account.fault(f"{name}:{piece.line}", fault)


def as_object(piece: Piece) -> dict[str, Any]:
    """Return the keys and values of a piece, or raise FaultError."""
    if piece.fault is not None:
        raise piece.fault
    value = parse(piece.data, piece.line)
    if not isinstance(value, dict):
        raise FaultError("not an object", f"expected an object in braces, found {show(value)}")
    return value


def _annotation(value: dict[str, Any], account: Account) -> tuple[Any, str]:
    ignored: Counter[str] = Counter()
    fields = Fields(value, "annotations", ignored, account.ignore_keys)
    image = _image_id(fields.take("image_id"), "image_id")
    text = fields.take("caption")
    if not isinstance(text, str) or not text.strip():
        raise FaultError("no caption", "an annotation without a caption: only captions are read")
    fields.close()
    account.ignore(ignored)
    return image, text


def _image_id(value: Any, key: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise FaultError("no image id", f"{key}: expected the id of an image, found {value!r:.80}")
    return value
