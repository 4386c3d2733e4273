"""Read files that others made: JSON objects, and the headers of safetensors files.

    values = read_object(folder / "config.json")
    tensors = read_header(folder / "model.safetensors")     # name -> StoredTensor, without reading values

Every fault is a `UserError` of one line that starts with the file's path. Sizes are checked before memory is
allocated, and nothing is unpickled. `hub_error` says why the hub did not give a file.
"""

from __future__ import annotations

import itertools
import math
import os
import shlex
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from cache.format.gate import open_regular, parse_json, read_regular, what_is
from configs import UserError, one_line

NEEDS_LOGIN = "no such repository, or it needs a login: hf auth login"
"""What the answers 401 and 403 of the hub mean."""
AGAIN = "download it again"
"""End of an error about a file that was not copied whole."""
LONGEST_JSON = 256 << 20
"""Bytes of the longest JSON file that is read. Gemma 3's tokenizer.json, the largest seen, has 33 MB."""
LONGEST_TEXT = 4 << 20
"""Bytes of the longest chat template that is read."""
TEXTS = (".json", ".txt", ".jinja", ".model", ".tiktoken", ".py", ".yaml", ".md")
"""Suffixes of files that are read whole."""
LONGEST_HEADER = 100_000_000
"""Bytes of the longest header that safetensors accepts."""
LFS = b"version https://git-lfs.github.com/spec"
"""Start of a Git LFS pointer: what a clone without git-lfs has in the place of a large file."""
OTHER_FORMATS = {
    b"<": "a web page: was the download refused?",
    b"GGUF": "a GGUF file (of llama.cpp)",
    b"PK\x03\x04": "a file of torch.save, under another name",
    b"\x80": "a pickle, under another name",
    b"\x89HDF": "an HDF5 file (of Keras), under another name",
    b"\x1f\x8b": "a gzip file: unpack it",
}
"""First bytes of a file -> what it is."""
BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "C64": 64,
    "BOOL": 8,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "U8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
"""safetensors' name of a dtype -> bits of a value."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes of weights that are not quantised."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file, without its values."""

    path: Path
    """The file."""
    dtype: str
    """One of `BITS`."""
    shape: tuple[int, ...]
    """Its dimensions."""


def check_file(path: Path) -> int:
    """Return the size in bytes of a file that can be read and is not the stand-in for another.

    Raises:
        UserError: the file is missing, empty, a Git LFS pointer or a link to nothing, or cannot be read.
    """
    if path.is_symlink() and not path.exists():
        raise UserError(
            f"{path}: a link to a file that does not exist ({path.readlink()}); {AGAIN}"
        )
    try:
        with open_regular(path) as file:
            start = file.read(len(LFS))
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {AGAIN}") from None
    except OSError as error:
        if what := _no_file(path):
            raise UserError(f"{path}: {what}; {AGAIN}") from None
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not start:
        raise UserError(f"{path}: is empty (0 bytes); {AGAIN}")
    if start == LFS:
        raise UserError(
            f"{path}: a Git LFS pointer, not the file itself; not downloaded? git lfs pull there: "
            f"cd {shlex.quote(str(path.parent))} && git lfs pull"
        )
    return size


def _no_file(path: Path) -> str:
    """Say what is in the place of a file, `` if it is one."""
    try:
        return what_is(path.stat().st_mode)
    except OSError:
        return ""


def check_folder(folder: Path) -> None:
    """Check that what is in a model's folder can be read: transformers opens files by their names alone.

    Links are followed, because the hub's cache has links.

    Raises:
        UserError: a FIFO, a socket or a device is in it, or a text too long to be read.
    """
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError:
        return  # said where the first file is read
    for entry in entries:
        try:
            status = entry.stat()
        except OSError:
            continue  # a link to nothing
        what = what_is(status.st_mode)
        if what and not stat.S_ISDIR(status.st_mode):
            raise UserError(f"{entry.path}: {what}; remove it, or {AGAIN}")
        if entry.name.lower().endswith(TEXTS) and status.st_size > LONGEST_JSON:
            raise UserError(
                f"{entry.path}: {status.st_size:,} bytes, too long for a text (at most "
                f"{LONGEST_JSON:,}); {AGAIN}"
            )


def read_text(path: Path) -> str:
    """Return a text in UTF-8, such as a chat template.

    Raises:
        UserError: it is no file, too long or no text.
    """
    try:
        return read_regular(path, most=LONGEST_TEXT).decode()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {AGAIN}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); {AGAIN}") from None


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. JSON is strict: no key twice, no NaN.

    Raises:
        UserError: see `check_file`; or the file is not one JSON object in UTF-8.
    """
    size = check_file(path)
    if size > LONGEST_JSON:
        raise UserError(f"{path}: {size:,} bytes, too long for JSON (at most {LONGEST_JSON:,})")
    data = read_regular(path, most=LONGEST_JSON)
    try:
        values = parse_json(data)
    except ValueError as error:
        what = _other_format(data) or f"not valid JSON ({one_line(error)})"
        raise UserError(f"{path}: {what}; {AGAIN}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a JSON {type(values).__name__}, not an object; {AGAIN}")
    return values


def _other_format(data: bytes) -> str:
    return next((what for magic, what in OTHER_FORMATS.items() if data.startswith(magic)), "")


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors that a safetensors file describes, name -> dtype and shape.

    Raises:
        UserError: see `check_file`; or the file is truncated, longer than its header says, or no safetensors
            file.
    """
    size = check_file(path)
    with open_regular(path) as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if size < 8:
            raise UserError(f"{path}: is truncated: {size} bytes; {AGAIN}")
        if not 2 <= length <= LONGEST_HEADER:
            what = _other_format(start) or f"its header would have {length:,} bytes"
            raise UserError(f"{path}: not a safetensors file ({what}); {AGAIN}")
        if 8 + length > size:
            raise UserError(
                f"{path}: is truncated: {size:,} bytes, its header alone has {length:,}; {AGAIN}"
            )
        header = file.read(length)
    try:
        values = parse_json(header)
        if not isinstance(values, dict):
            raise ValueError("no JSON object")  # noqa: TRY004 - the file is wrong, not a caller
        values.pop("__metadata__", None)
        spans = {name: _span(name, entry) for name, entry in values.items()}
    except ValueError as error:
        raise UserError(f"{path}: its header is damaged: {one_line(error)}; {AGAIN}") from None
    ordered = sorted(spans.values())
    if any(before[1] != after[0] for before, after in itertools.pairwise([(0, 0), *ordered])):
        raise UserError(f"{path}: its header is damaged: tensors overlap or leave a gap; {AGAIN}")
    whole = 8 + length + max((end for _, end in ordered), default=0)
    if size < whole:
        raise UserError(f"{path}: is truncated: {size:,} of {whole:,} bytes; {AGAIN}")
    if size > whole:
        raise UserError(f"{path}: {size:,} bytes, but its header describes {whole:,}; {AGAIN}")
    return {
        name: StoredTensor(path, entry["dtype"], tuple(entry["shape"]))
        for name, entry in values.items()
    }


def _span(name: str, entry: Any) -> tuple[int, int]:
    """Return where the bytes of a tensor start and end; raise ValueError if its entry is not consistent."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"tensor {one_line(name)}: no dtype, shape and data_offsets")
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"tensor {one_line(name)}: dtype {one_line(dtype, 20)}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"tensor {one_line(name)}: {one_line(numbers, 40)}")
    if len(offsets) != 2 or (offsets[1] - offsets[0]) * 8 != math.prod(shape) * BITS[dtype]:
        raise ValueError(
            f"tensor {one_line(name)}: shape {shape} in {dtype} does not fill bytes {offsets}"
        )
    return offsets[0], offsets[1]


def hub_error(error: Exception) -> str:
    """Return an error of the hub's client in one line. Its own text is long, and names the login last."""
    if isinstance(error, GatedRepoError):
        return "it is gated: accept its terms on its page of the hub, then log in: hf auth login"
    return NEEDS_LOGIN if isinstance(error, RepositoryNotFoundError) else one_line(error)
