"""Values live in the YAML files beside this one; this module is the one parser every command uses.

A concern is a frozen dataclass beside the code that uses it. Its values come, later ones winning, from
its defaults, from a preset in `configs/*.yaml`, from the command line. Unknown keys and nonsense are
refused in one line that names the nearest valid key. `import configs` costs nothing: no torch, no tyro.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import errno
import io
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import yaml

__all__ = ["UserError", "build", "command", "dump", "load", "nearest", "parse"]

T = TypeVar("T")
FOLDER = Path(__file__).parent
USER_ERROR_EXIT = 2  # what argparse, and so every Unix user, expects of a wrong command line


class UserError(Exception):
    """Something the user can mend: what, where, and the way out, in one line. Commands exit with 2."""


def one_line(error: object, longest: int = 160) -> str:
    """Return an error's message, or else its type, in one line of at most `longest` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= longest else text[: longest - 3] + "..."


def nearest(name: str, choices: Iterable[str]) -> str:
    """The suffix `; nearest: x` for an error about `name`, or '' when nothing comes near."""
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"; nearest: {found[0]}" if found else ""


def load(name: str) -> dict[str, Any]:
    """The contents of `configs/<name>.yaml`.

    Raises:
        UserError: no such file, or it is not YAML with a mapping at the top.
    """
    path = FOLDER / f"{name}.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = sorted(p.stem for p in FOLDER.glob("*.yaml"))
        raise UserError(f"{path}: no such file; there are: {', '.join(known)}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected keys and values, found {type(values).__name__}")
    return values


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Make the dataclass `cls` from a mapping, nested ones too; `where` names the mapping in errors.

    Raises:
        UserError: unknown or missing key, a value of the wrong type, or one `__post_init__` refuses.
    """
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls)) if f.init}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise UserError(f"{where}: unknown key {key!r}{nearest(str(key), fields)}")
    missing = [
        name
        for name, f in fields.items()
        if name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{where}: missing key {', '.join(map(repr, missing))}")
    converted = {k: _convert(v, hints[k], f"{where}: {k}") for k, v in values.items()}
    try:
        return cls(**converted)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _convert(value: Any, kind: Any, where: str) -> Any:
    """`value` as the type `kind`: YAML's lists become tuples, its integers floats; nothing is guessed."""
    if kind is Any:
        return value
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _convert_union(value, args, where)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{where}: {value!r} is none of {', '.join(map(str, args))}")
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(v, args[0], where) for v in value)
        if len(args) != len(value):
            raise UserError(f"{where}: expected {len(args)} values, found {len(value)}")
        return tuple(_convert(v, a, where) for v, a in zip(value, args, strict=True))
    if origin in (dict, Mapping) or getattr(origin, "__name__", "") == "Mapping":
        if isinstance(value, Mapping):
            return {
                _convert(k, args[0], where): _convert(v, args[1], where) for k, v in value.items()
            }
    elif dataclasses.is_dataclass(kind):
        if isinstance(value, Mapping):
            return build(typing.cast(type, kind), value, where)
        if isinstance(value, typing.cast(type, kind)):
            return value
    elif kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):  # YAML 1.1 reads 1e-4 as text
            return float(value)
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif (
        isinstance(kind, type)
        and isinstance(value, kind)
        and (kind is bool or not isinstance(value, bool))  # `true` is no integer
    ):
        return value
    raise UserError(f"{where}: expected {_name(kind)}, found {value!r}")


def _convert_union(value: Any, kinds: Sequence[Any], where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    error = UserError(f"{where}: {value!r} is not possible here")
    for kind in kinds:
        if kind is not type(None):
            try:
                return _convert(value, kind, where)
            except UserError as refused:
                error = refused
    raise error


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)


def parse(
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str | None = None,
    preset: Callable[[dict[str, str]], Mapping[str, Any]] | None = None,
    selectors: Sequence[str] = (),
) -> T:
    """The command line as an instance of the dataclass `cls`; every field is an option.

    Args:
        cls: frozen dataclass; field docstrings are the help texts, tuples take one or more values.
        argv: arguments after the program's name; `sys.argv[1:]` when None.
        prog: how the command is called, for messages (`python -m train.run`).
        description: text above the options in `--help`; the docstring of `cls` when None.
        preset: given the selectors found on the command line, the values of other fields there.
        selectors: options that choose presets, read before the others (`stage`, `hardware`).

    Raises:
        UserError: an option that does not exist, or a value that cannot be.
    """
    import tyro  # 0.1 s: only commands pay for it

    argv = _join_repeated(cls, list(sys.argv[1:] if argv is None else argv))
    default: dict[str, Any] = {}
    if preset is not None:
        default["default"] = build(cls, preset(_read_selectors(selectors, argv)), prog)
    output = io.StringIO()
    helping = bool({"-h", "--help"} & set(argv))
    try:
        # A wide page keeps the message on one line; the terminal's own width serves --help. And tyro draws
        # the box that `_first_message` reads only where standard output is UTF-8.
        with (
            contextlib.redirect_stderr(output),
            contextlib.nullcontext() if helping else contextlib.redirect_stdout(_utf8()),
            _columns(None if helping else 4000),
        ):
            parsed: T = tyro.cli(
                cls, prog=prog, description=_keep_lines(description), args=argv, **default
            )
            return parsed
    except SystemExit as stop:
        if not stop.code:
            raise
    except ValueError as error:  # from __post_init__
        raise UserError(f"{prog}: {error}") from None
    raise UserError(f"{prog}: {_first_message(cls, output.getvalue())}; see {prog} --help")


def _utf8() -> io.TextIOWrapper:
    """A page that nobody reads."""
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8")


def _keep_lines(description: str | None) -> str | None:
    """tyro joins lines that begin with a letter; those that show a command must stay apart."""
    return description and re.sub(
        r"^(?=python -m |torchrun )", "$ ", description, flags=re.MULTILINE
    )


def _join_repeated(cls: type, argv: list[str]) -> list[str]:
    """`--image a --image b` means what `--image a b` means, for fields that take several values."""
    several = {
        "--" + name.replace("_", "-")
        for name, kind in typing.get_type_hints(cls).items()
        if get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis
    }
    gathered: dict[str, list[str]] = {}
    rest: list[str] = []
    current: str | None = None
    for word in argv:
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-") if word.startswith("--") else flag
        if flag in several:
            current = flag
            gathered.setdefault(flag, [])
            if equals:
                gathered[flag].append(value)
        elif word.startswith("--") or current is None:
            current = None
            rest.append(word)
        else:
            gathered[current].append(word)
    return rest + [word for flag, words in gathered.items() for word in (flag, *words)]


def _read_selectors(selectors: Sequence[str], argv: Sequence[str]) -> dict[str, str]:
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in selectors:
        reader.add_argument("--" + name.replace("_", "-"), dest=name)
    try:
        found, _ = reader.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    return {k: v for k, v in vars(found).items() if v is not None}


@contextlib.contextmanager
def _columns(width: int | None) -> typing.Iterator[None]:
    before = os.environ.get("COLUMNS")
    if width is not None:
        os.environ["COLUMNS"] = str(width)
    try:
        yield
    finally:
        if before is not None:
            os.environ["COLUMNS"] = before
        else:
            os.environ.pop("COLUMNS", None)


def _first_message(cls: type, box: str) -> str:
    """The parser draws a box of several lines; the first line inside it is the message."""
    lines = [line.strip("│ \n") for line in box.splitlines() if line.startswith("│")]
    message = lines[0] if lines else "the command line could not be read"
    options = ["--" + f.name.replace("_", "-") for f in dataclasses.fields(cls)]
    if message.startswith("Missing from"):
        needed = [option for option in options if any(line.startswith(option) for line in lines)]
        return f"{', '.join(needed)} must be given"
    if message.startswith("Unrecognized options:"):
        unknown = [w.strip() for w in message.removeprefix("Unrecognized options:").split(",")]
        word = next((w for w in unknown if w.startswith("--")), unknown[0])
        return f"no option {word}{nearest(word, options)}"
    return message.removeprefix(f"Error parsing {cls.__name__}: ").rstrip(".")


def dump(config: object) -> str:
    """A dataclass (or mapping) as YAML text, as saved with every run and space."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)


def command(main: Callable[[], int | None], errors: tuple[type[Exception], ...] = ()) -> NoReturn:
    """Run `main` and exit with what it returns.

    A UserError, or one of `errors`, is printed in one line without a traceback; the exit code is 2.

    Args:
        main: the command; it returns its exit code, or None for 0.
        errors: classes beside UserError that say what the user can do, such as `cache.errors.CacheError`.
    """
    user_errors: tuple[type[Exception], ...] = (UserError, *errors)
    try:
        code = main() or 0
        sys.stdout.flush()
    except user_errors as error:
        print(f"error: {error}", file=sys.stderr)
        code = USER_ERROR_EXIT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # `... | head` is no mistake
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        if (mistake := wrong_place(error)) is None:
            raise
        print(f"error: {mistake}", file=sys.stderr)
        code = USER_ERROR_EXIT
    sys.exit(code)


WRONG_PLACE = {
    errno.EEXIST: "a file stands where a folder is needed",
    errno.ENOTDIR: "a file stands where a folder is needed",
    errno.EISDIR: "a folder stands where a file is needed",
    errno.EACCES: "not allowed; choose another place, or mend its permissions",
    errno.EPERM: "not allowed; choose another place, or mend its permissions",
    errno.EROFS: "on a read-only file system; choose another place",
    errno.ENOSPC: "the disk is full; make room and run the same command again",
    errno.EDQUOT: "the disk quota is used up; make room and run the same command again",
}


def wrong_place(error: OSError) -> str | None:
    """What a user can mend about the place a file was to be read or written; None: it is our error."""
    what = WRONG_PLACE.get(error.errno or 0)
    return f"{error.filename}: {what}" if what and error.filename else None
