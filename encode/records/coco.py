"""COCO captions: one object with a list of images and a list of annotations.

    {"info": {...},
     "images": [{"id": 1, "file_name": "1.jpg", "width": 640, ...}, ...],
     "annotations": [{"id": 7, "image_id": 1, "caption": "A cat asleep."}, ...]}

Each image becomes one line with its `captions`: several answers to one question. The file is read twice:
memory holds the captions, not the images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from encode.records.account import Account, FaultError
from encode.records.json_window import Piece, Window, elements
from encode.records.keys import Fields
from encode.records.record import Line
from encode.records.strict_json import parse

_SECTIONS = ("info", "licenses", "categories", "type", "images", "annotations")
MAX_CAPTIONS = 4 << 30
"""Characters of all captions, at most. COCO's training captions have 31 million."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a list of the file starts, behind its bracket."""

    offset: int
    line: int


@dataclass(slots=True)
class _Captions:
    """The captions of one image."""

    line: int
    texts: list[str] = field(default_factory=list)


def find_sections(file: BinaryIO) -> dict[str, Place] | None:
    """Return where the lists of a COCO file start; None if the file is not one COCO object."""
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
            key = parse(window.piece().data)
            if key not in _SECTIONS or window.skip_space() != b":":
                return None
            window.at += 1
            opens = window.skip_space()
            places[key] = Place(window.offset + 1, window.line)
            if opens == b"[":
                window.at += 1
                for _ in elements(window):
                    pass
            elif key in ("images", "annotations"):
                return None
            else:
                window.piece()
    except FaultError:
        return None
    window.at += 1
    is_coco = {"images", "annotations"} <= places.keys() and not window.skip_space()
    return places if is_coco else None


def read_coco(
    file: BinaryIO, name: str, sections: Mapping[str, Place], account: Account
) -> Iterator[Line]:
    """Yield one line for each image. Captions without their image are faults."""
    for section in sorted(sections.keys() - {"images", "annotations"}):
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
        raise FaultError(
            "not an object", f"expected an object in braces, found {type(value).__name__}"
        )
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
