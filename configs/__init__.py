"""The parser of every command, and the YAML files with the presets.

    @dataclass(frozen=True, kw_only=True)
    class Options:
        features: Path = Path("cache")

    options = parse(Options, prog="python -m cache.ls")

The default of an option comes from the dataclass, or from a preset in `configs/*.yaml`. The user's own file,
`--config FILE` or `./nanomolmo2.yaml`, adds entries to these and replaces theirs. `parse` finds it.
Each unknown key, unknown option or invalid value is reported in one line, with the nearest valid name.
Importing this module imports neither torch nor tyro. `configs.console` has the text for people: sizes,
durations, tables; `configs.progress` shows the progress of a command; `configs.text` prints text from
outside.
"""

from __future__ import annotations

# First: from here on, Ctrl-C during the imports of a command ends it without a traceback.
from configs import signals, yaml_text

# isort: split
import argparse
import contextlib
import dataclasses
import difflib
import errno
import json
import os
import re
import stat
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import yaml

from configs.text import guard_streams, visible, without_guard

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from tyro import _errors

T = TypeVar("T")
FOLDER = Path(__file__).parent
LONGEST_VALUE = 120
"""Characters of a wrong value that an error shows, at most."""
USER_ERROR_EXIT = 2
# The exit code of argparse, and of most Unix commands, for a wrong command line.


class UserError(Exception):
    """What the user has to change, where and how, in one line. Commands print it and exit with 2.

    More arguments are further lines: a table of what is wrong. A line break in an argument makes no line.
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


def one_line(error: object, longest: int = 160) -> str:
    """Return an error's message, or else its type, in one line of at most `longest` characters.

    White space becomes a space, and what acts on a terminal an escape: see `configs.text.visible`.
    """
    text = re.sub(r"[ \t\r\n\f\v]+", " ", str(error)).strip(" ") or type(error).__name__
    return visible(text, longest)


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return `; nearest: x`, the end of an error about `name`, or '' when no choice is similar."""
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"; nearest: {found[0]}" if found else ""


def load(name: str) -> dict[str, Any]:
    """Return the contents of `configs/<name>.yaml`, with what the user's file says over ours.

    Raises:
        UserError: there is no such file, or it is invalid.
    """
    path = FOLDER / f"{name}.yaml"
    if not path.exists():
        known = sorted(p.stem for p in FOLDER.glob("*.yaml"))
        raise UserError(f"{path}: no such file; there are: {', '.join(known)}")
    values = read_yaml(path)
    for section, (of, path_there) in USER_SECTIONS.items():
        if of == name:
            ours = values.setdefault(path_there, {}) if path_there else values
            for key, value in user_section(section).items():
                changes = section == "stages" and isinstance(value, dict) and key in ours
                ours[key] = ours[key] | value if changes else value
    return values


MOST_YAML = 1 << 20
"""Bytes of a YAML file, at most."""
USER_FILE = "nanomolmo2.yaml"
"""The user's own entries, in the folder where a command is started, unless `--config` names another file."""

USER_SECTIONS = {
    "datasets": ("datasets", "datasets"),
    "groups": ("datasets", "groups"),
    "encoders": ("encoders", ""),
    "stages": ("train", "stages"),
}
"""Section of the user's file -> our file, and the key there (none: its top level). An entry replaces ours of
that name; in `stages`, each key of an entry replaces ours."""

_user: tuple[Path, dict[str, Any]] | None = None
"""The user's file and its contents."""


def use_file(path: str | Path | None) -> None:
    """Read this file, to use it over ours; None: USER_FILE if the current folder has it.

    Raises:
        UserError: there is no such file, it is invalid, or it has an unknown section.
    """
    global _user
    _user = None
    found = Path(path or USER_FILE).expanduser().absolute()
    if not path and not os.path.lexists(found):
        return
    values = read_yaml(found)
    for section, entries in values.items():
        if section not in USER_SECTIONS:
            raise UserError(
                f"{found}: unknown section {section!r}; there are {', '.join(USER_SECTIONS)}"
                f"{nearest(str(section), USER_SECTIONS)}"
            )
        if not isinstance(entries, dict | None):
            raise UserError(f"{found}: {section}: expected names and their values")
    _user = found, values


def user_file() -> Path | None:
    """Return the absolute path of the user's file; None if none is used."""
    return _user[0] if _user else None


def user_section(section: str) -> dict[Any, Any]:
    """Return what the user's file says in one of USER_SECTIONS."""
    return (_user[1].get(section) or {}) if _user else {}


def where_is(section: str, name: object) -> str:
    """Return the file that has an entry of one of USER_SECTIONS, for error messages."""
    if _user and name in user_section(section):
        return f"{_user[0]}: {section}"
    return f"configs/{USER_SECTIONS[section][0]}.yaml"


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the keys and values of a YAML file.

    Raises:
        UserError: it is no file, cannot be read, is not YAML, gives a key twice, or is not a mapping.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a FIFO would be waited for
            raise UserError(f"{path}: not a file")
        if found.st_size > MOST_YAML:
            raise UserError(f"{path}: {found.st_size:,} bytes, at most {MOST_YAML:,} are read")
        values = yaml_text.parse(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected keys and values, found {type(values).__name__}")
    return values


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Make the dataclass `cls`, and the dataclasses in its fields, from a mapping.

    Args:
        cls: the dataclass.
        values: field -> value.
        where: the name of the mapping in errors.

    Raises:
        UserError: a key is unknown or missing, a value has the wrong type, or `__post_init__` rejects it.
    """
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls)) if f.init}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise UserError(f"{where}: unknown key {key!r}{nearest(str(key), fields)}")
    missing = [
        name
        for name, f in fields.items()
        if name not in values and f.default is f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{where}: missing key {', '.join(map(repr, missing))}")
    converted = {k: _convert(v, hints[k], f"{where}: {k}") for k, v in values.items()}
    try:
        return cls(**converted)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _convert(value: Any, kind: Any, where: str) -> Any:
    """Convert a value of a YAML file to `kind`: lists to tuples, integers to floats, text to paths."""
    if kind is Any:
        return value
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        # None first, so that an error is about one of the other types.
        *others, last = sorted(args, key=lambda each: each is not types.NoneType)
        for each in others:
            with contextlib.suppress(UserError):
                return _convert(value, each, where)
        return _convert(value, last, where)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{where}: {value!r} is none of {', '.join(map(str, args))}")
        return value
    if args == (str, Ellipsis) and isinstance(value, str):
        raise UserError(f"{where}: expected a list: [{json.dumps(value)}]")
    if origin is tuple and isinstance(value, (list, tuple)):
        if args[-1] is Ellipsis:
            args = args[:1] * len(value)
        if len(args) != len(value):
            raise UserError(f"{where}: expected {len(args)} values, found {len(value)}")
        return tuple(_convert(v, a, where) for v, a in zip(value, args, strict=True))
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {_convert(k, args[0], where): _convert(v, args[1], where) for k, v in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return build(typing.cast(type, kind), value, where)
    if isinstance(value, bool):  # which Python also takes for an integer
        if kind is bool:
            return value
    elif kind is float and isinstance(value, (int, str)):
        # PyYAML (YAML 1.1) reads 1e-4 as text. An integer of 400 digits is no float.
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif not args and isinstance(value, kind):
        return value
    found = visible(repr(value), LONGEST_VALUE)
    raise UserError(f"{where}: expected {kind if args else kind.__name__}, found {found}")


def parse(
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str | None = None,
    preset: Callable[[dict[str, str]], Mapping[str, Any]] | None = None,
    selectors: Sequence[str] = (),
) -> T:
    """Parse the command line into the dataclass `cls`, each field of which is an option.

    Args:
        cls: frozen dataclass. Field docstrings are the help texts; tuples take one or more values.
        argv: the arguments after the program's name; `sys.argv[1:]` when None.
        prog: the command as users type it, for messages: `python -m train.run`.
        description: text above the options in `--help`; the docstring of `cls` when None.
        preset: returns default values for fields, given the selectors on the command line.
        selectors: options that choose the preset and are read before the others (`stage`, `hardware`).

    Raises:
        UserError: an option does not exist or is missing, or a value is invalid.
    """
    import tyro  # takes 0.1 s to import, which only commands pay
    from tyro import _errors

    def refuse(event: _errors.ParseErrorEvent) -> None:
        if message := _message(cls, event):
            raise UserError(f"{prog}: {message}; see {prog} --help")

    argv = _join_repeated(cls, list(sys.argv[1:] if argv is None else argv))
    if any(f.name == "config" for f in dataclasses.fields(typing.cast(Any, cls))):
        use_file(_read_selectors(cls, ["config"], argv).get("config"))
    else:
        use_file(None)
    default: dict[str, Any] = {}
    if preset is not None:
        default["default"] = build(cls, preset(_read_selectors(cls, selectors, argv)), prog)
    # tyro joins lines that begin with a letter. With `$ ` before it, a command keeps its line.
    described = re.sub(r"^(?=python -m |torchrun )", "$ ", description or "", flags=re.MULTILINE)
    # tyro draws its errors as boxes of many lines. Its hook gives the cause before anything is drawn.
    with _errors.on_parse_error(refuse), without_guard():  # its --help has colours
        parsed: T = tyro.cli(cls, prog=prog, description=described or None, args=argv, **default)
    return parsed


def _message(cls: type, event: _errors.ParseErrorEvent) -> str | None:
    """Return a line about a wrong command line; None for an error that tyro prints itself."""
    from tyro import _errors

    argument = getattr(event, "argument", None)
    where = f"{argument.display_name()}: " if argument is not None else ""
    match event:
        case _errors.UnrecognizedArgs(tokens=tokens):
            word = next((token for token in tokens if token.startswith("--")), tokens[0])
            options = ["--" + f.name.replace("_", "-") for f in dataclasses.fields(cls)]
            return f"no option {word}{nearest(word, options)}"
        case _errors.MissingArgs(missing_arguments=missing):
            return f"{', '.join(one.arg.display_name() for one in missing)} must be given"
        case _errors.InvalidChoice(value=value, choices=choices):
            return f"{where}{value!r} is none of {', '.join(choices)}{nearest(value, choices)}"
        case _errors.BadValue():
            return f"{where}too few values"
        case _errors.InstantiationFailure(message=message):
            return where + message.partition("\n")[0]
    return None


def _join_repeated(cls: type, argv: list[str]) -> list[str]:
    """Replace `--image a --image b` by `--image a b`, for fields that take several values."""
    several = {
        "--" + name.replace("_", "-")
        for name, kind in typing.get_type_hints(cls).items()
        if get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis
    }
    gathered: dict[str, list[str]] = {}
    current = rest = list[str]()
    for word in argv:
        flag, equals, value = word.partition("=")
        if not word.startswith("--"):
            current.append(word)
        elif (flag := flag.replace("_", "-")) in several:
            current = gathered.setdefault(flag, [])
            current += [value] if equals else []
        else:
            current = rest
            current.append(word)
    return rest + [word for flag, words in gathered.items() for word in (flag, *words)]


def _read_selectors(cls: type, selectors: Sequence[str], argv: Sequence[str]) -> dict[str, str]:
    """Return the values of the selectors on a command line; a flag that is given is `true`."""
    kinds = typing.get_type_hints(cls)
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in selectors:
        flag: dict[str, Any] = {}
        if kinds[name] is bool:
            flag = {"action": "store_const", "const": "true"}
        reader.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, **flag)
    try:
        found, _ = reader.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    return vars(found)


def dump(config: DataclassInstance) -> str:
    """Return a dataclass as YAML text."""
    plain = json.loads(json.dumps(dataclasses.asdict(config), default=os.fspath))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def command(main: Callable[[], int | None], errors: tuple[type[Exception], ...] = ()) -> NoReturn:
    """Run `main` and exit with what it returns.

    A UserError, or one of `errors`, is printed in one line without a traceback, and the exit code is 2. So is
    an OSError about a file or folder that the user can correct: see `wrong_place`.

    Args:
        main: the command. It returns its exit code, or None for 0.
        errors: other classes whose message tells the user what to do, such as `cache.errors.CacheError`.
    """
    reported: tuple[type[Exception], ...] = (UserError, OSError, *errors)
    as_command = False
    guard_streams()
    try:
        as_command = signals.restore()
        code = main() or 0
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        print("; ".join(["interrupted", *map(str, stop.args)]), file=sys.stderr)
        code = 130
    except BrokenPipeError:  # as of `... | head`, which is not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except reported as error:
        message = wrong_place(error) if isinstance(error, OSError) else error
        if message is None:
            raise
        lines = error.args if isinstance(error, UserError) else (message,)
        print(
            "\n".join(map(visible, (f"error: {lines[0]}" if lines else "error", *lines[1:]))),
            file=sys.stderr,
        )
        code = USER_ERROR_EXIT
    if as_command:
        signals.end_quietly()
    sys.exit(code)


WRONG_PLACE = {
    errno.EEXIST: "there is a file where a folder is needed",
    errno.ENOTDIR: "there is a file where a folder is needed",
    errno.EISDIR: "there is a folder where a file is needed",
    errno.EACCES: "permission denied; choose another place, or change its permissions",
    errno.EPERM: "permission denied; choose another place, or change its permissions",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EROFS: "on a read-only file system; choose another place",
    errno.ENOSPC: "the disk is full; free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
}


def wrong_place(error: OSError) -> str | None:
    """Return what the user can do about an error at a path, in one line; None if it is not such an error."""
    what = WRONG_PLACE.get(error.errno or 0)
    return f"{error.filename}: {what}" if what and error.filename else None
