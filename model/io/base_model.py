"""The model that saved adapters belong to: what is recorded of it, and where it is now.

    base = language_base("Qwen/Qwen3-0.6B", seed=0, checksum=weights_checksum(language))
    base = final_base(Path("runs/first/stage1/final"), folder, seal)
    place = find_base(folder, base, seal_of)      # a folder `final`, or a source of `load_language`

The base of a stage with adapters is the finished model that it started from, or a language model. Adapters
on another model give nonsense without an error, so the base is compared: a finished model by its seal, before
it is loaded, a language model by the checksum of its weights, afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypedDict

import msgspec

from configs import UserError
from model.io.run_files import META, read_bytes
from model.language.records import RANDOM

POINTER = "base.txt"
"""A file that a user may add to a saved model: the place of its base, if that has moved."""
LONGEST = 4096
"""Bytes of that file, at most."""


_Source = Annotated[str, msgspec.Meta(pattern=r"^[^~\x00][^\x00]*$", max_length=LONGEST)]
_Absolute = Annotated[str, msgspec.Meta(pattern=r"^/[^\x00]*$", max_length=LONGEST)]
_Relative = Annotated[str, msgspec.Meta(pattern=r"^[^\x00]+$", max_length=LONGEST)]


class Base(TypedDict, total=False):
    """A language model (`llm`, `seed`, `crc32c`), or a finished model (`final`, `relative`, `seal`)."""

    llm: _Source
    seed: int
    crc32c: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
    final: _Absolute
    relative: _Relative
    seal: Annotated[str, msgspec.Meta(pattern=r"^sha256:[0-9a-f]{64}$")]


LANGUAGE, FINISHED = {"llm", "seed", "crc32c"}, {"final", "relative", "seal"}
"""The keys of either kind."""


def language_base(source: str, *, seed: int, checksum: int) -> Base:
    """Return the record of a language model that was loaded by `load_language(source, seed=seed)`.

    A folder is recorded by its absolute path.
    """
    folder = Path(source).expanduser()
    llm = str(folder.absolute()) if folder.is_dir() else source
    return {"llm": llm, "seed": seed, "crc32c": checksum}


def final_base(path: Path, folder: Path, seal: str) -> Base:
    """Return the record of the finished model in `path`, for the files of the model in `folder`."""
    relative = os.path.relpath(path, folder)
    return {"final": str(path.absolute()), "relative": relative, "seal": seal}


def base_name(base: Base) -> str:
    """Return the id or folder of a base, for messages and for other programs."""
    return base["llm"] if "llm" in base else base["final"]


def check_base(base: Base) -> None:
    """Raise ValueError unless a record is of one of the two kinds."""
    if base.keys() not in (LANGUAGE, FINISHED):
        raise ValueError(f"base has {', '.join(sorted(base)) or 'nothing'}")


def find_base(folder: Path, base: Base, seal_of: Callable[[Path], str]) -> Path | str:
    """Return where the base of saved adapters is: a finished model's folder, or a language model's source.

    Args:
        folder: of the saved model.
        base: what it records.
        seal_of: returns the seal of the model in a folder; it raises UserError if that is damaged.

    Raises:
        UserError: it is not on this machine, or a finished model has been trained again since. The message
            says where it was, and how to name another place.
    """
    pointer = folder / POINTER
    given = os.path.expanduser(_given(pointer))  # noqa: PTH111  Path raises for a user without a home
    name = given or base_name(base)
    way_out = f"write where it is into {pointer}"
    what = f"{folder}: its adapters belong to the model {name}"
    gone = f"{what}, which is not there any more; put it back, or {way_out}"
    if "llm" in base:
        if name.startswith(("/", ".")) and not Path(name).is_dir():
            raise UserError(gone)
        if not name.startswith(RANDOM):
            from model.language.sources import local_folder  # here: it imports transformers

            local_folder(
                name, weights=True, way_out=f"{folder} has adapters of that model alone; {way_out}"
            )
        return name
    beside = Path(os.path.normpath(folder / base["relative"]))
    places = [Path(given)] if given else [Path(name), beside]
    there = [place for place in places if (place / META).is_file()]
    for place in there:
        if seal_of(place) == base["seal"]:
            return place
    if there:
        raise UserError(
            f"{what}, and {there[0]} is another one now (trained again, or replaced); put the former back, "
            f"or {way_out}"
        )
    raise UserError(gone)


def _given(pointer: Path) -> str:
    """Return what the user's file says; '' if there is none."""
    try:
        data = read_bytes(pointer, "it has the place of a model", most=LONGEST)
    except FileNotFoundError:
        return ""
    text = data.decode(errors="replace").strip()
    if len(text.splitlines()) != 1:
        raise UserError(f"{pointer}: not one line with the place of a model")
    return text


def other_weights(folder: Path, base: Base, source: str) -> UserError:
    """Return the error about a language model whose weights are not those that adapters were trained on."""
    return UserError(
        f"{folder}: its adapters were trained on other weights than {source} has now (its checksum is not "
        f"{base['crc32c']:08x}); put the former ones back, or write where they are into {folder / POINTER}"
    )
