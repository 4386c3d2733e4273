"""What documents and messages promise exists: commands parse, files and messages are there, examples run."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import configs
from cache.store.paths import CacheRoot
from cache.store.samples import MediaRef, Message, Sample
from configs import UserError, build, parse
from encode.sources.catalogue import Entry, read_catalogue
from model.vision.config import EncoderConfig, encoder_config
from tests.support import ROOT
from tests.support.spaces import make_space
from train import config as train_config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "docs" / "CONTRIBUTING.md").read_text()


def command_lines() -> list[tuple[str, str]]:
    """Every `python -m module ...` in a fenced block: (page, command without its comment)."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.strip().removeprefix("$ ")
                if line.startswith("ray job submit "):
                    line = line.partition(" -- ")[2]
                if line.startswith("python -m "):
                    found.append((page.name, shlex.join(shlex.split(line, comments=True))))
    return found


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_every_command_in_the_documents_parses(page: str, line: str) -> None:
    _, _, module, *argv = shlex.split(line)
    command = importlib.import_module(module)
    if hasattr(command, "__path__"):
        command = importlib.import_module(f"{module}.__main__")
    if not module.startswith("tests."):
        parse(command.Options, argv, prog=f"python -m {module}")


def test_there_are_commands_to_check() -> None:
    pages = {page for page, _ in command_lines()}
    assert {
        "README.md",
        "QUICKSTART.md",
        "TRAINING_PIPELINE.md",
        "FEATURE_CACHE.md",
        "CLUSTER.md",
    } <= pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    if page.name != "SETUP_DOCUMENT.md":  # that one also names another project's files
        for name in re.findall(
            r"`((?:cache|configs|encode|model|nanomolmo2|tests|train)/[\w/.-]+)`", text
        ):
            exists = (ROOT / name).exists() or name.startswith(("cache/spaces/", "cache/samples/"))
            assert exists, f"{page.name} names {name}"


def test_the_tree_in_the_readme_has_every_code_folder_and_no_other() -> None:
    tree = README.split("## Where things are")[1].split("```")[1]
    named: set[str] = set()
    package = ""
    for line in tree.strip().splitlines():
        folders = re.findall(r"(\w+)/(?=\s)", line.split("  #")[0])
        if not line.startswith(" "):
            package = folders[0]
            named.add(package)
        else:
            named |= {f"{package}/{folder}" for folder in folders}
    packages = {"configs", "cache", "encode", "model", "nanomolmo2", "train"}
    rooms = {
        str(path.parent.relative_to(ROOT))
        for package in packages
        for path in (ROOT / package).glob("*/__init__.py")
    }
    assert named - {"tests"} == packages | rooms


def test_make_targets_named_in_the_documents_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        text = page.read_text()
        for target in set(re.findall(r"(?:`|^)make (\w+)", text, re.MULTILINE)):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {target}"


def quoted_messages() -> list[tuple[str, str]]:
    """First cells of the tables of messages, cut at `…`: (page, piece)."""
    found = []
    for page, heading in (
        ("QUICKSTART.md", "## Troubleshooting"),
        ("TRAINING_PIPELINE.md", "## When something is off"),
        ("CLUSTER.md", "## When something is off"),
    ):
        table = (ROOT / "docs" / page).read_text().split(heading)[1]
        for cell in re.findall(r"^\| (.*?) \|", table, re.MULTILINE)[1:]:
            quoted = re.findall(r"`([^`]+)`", cell) or [cell]
            pieces = re.split(r"…|\d+|\bnan\b", quoted[0])
            found += [(page, piece.strip()) for piece in pieces if len(piece.strip()) > 7]
    return found


@pytest.mark.parametrize(("page", "piece"), quoted_messages())
def test_messages_quoted_in_the_documents_are_in_the_code(page: str, piece: str) -> None:
    if piece in (
        "images missing after encoding",
        "a GPU is not used",
        "out of disk",
        "CUDA out of memory",
    ):
        return  # what a user sees, not what we print
    code = " ".join(
        re.sub(r'"\s*f?"', "", path.read_text())  # adjacent literals are one text
        for package in ("cache", "configs", "encode", "model", "nanomolmo2", "train")
        for path in (ROOT / package).rglob("*.py")
    )
    code = code.replace("{LISTING}", "listing.json")
    assert piece in code, f"{page} quotes {piece!r}"


def test_the_users_file_of_the_guide_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = (ROOT / "docs" / "FEATURE_CACHE.md").read_text()
    found = re.search(r"```yaml\n(datasets:.*?)```", guide, re.DOTALL)
    assert found is not None
    (tmp_path / "mine.yaml").write_text(found[1])
    monkeypatch.setattr(configs, "_user", None)
    configs.use_file(tmp_path / "mine.yaml")
    entries, groups = read_catalogue()
    assert {entries[name].source for name in groups["mine"]} == {
        "folder",
        "hf",
        "json",
        "webdataset",
    }
    assert entries["web"].media == str(tmp_path / "pictures")
    assert encoder_config("clip-b16").blocks == (10,)
    assert train_config.preset({"stage": "2", "hardware": "cpu"})["max_steps"] == 4000


# ---- messages: the commands that they suggest

BUILDERS = ("command_line", "command_text")
"""Functions that make a command line of words."""

UNKNOWN = {"DIR", "NAME", "PATH", "RUN", "N", "FILE"}
"""What stands in a message for a value that cannot be known there."""

NO_FEATURES = {
    "model/io/runs.py": "a model's folder does not know the cache",
    "train/stage/setup.py": "the user gave --features in the command that failed",
    "train/distributed/group.py": "only the start of the command",
}
"""Files whose suggestions may lack --features, and why."""


@dataclass(frozen=True)
class Suggestion:
    """A command in the source, with `?` for each value that is filled in when it is printed."""

    file: str
    line: int
    module: str
    words: tuple[str, ...]


def strings_of(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the string literals that are not docstrings; values in braces become `?`."""
    inside: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            inside.add(node.value)  # docstrings, of fields too
        if isinstance(node, ast.JoinedStr):
            inside.update(ast.walk(node))
            yield node.lineno, "".join(_text(part) for part in node.values)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
            yield node.lineno, node.value


def _text(part: ast.expr) -> str:
    if isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.IfExp):
        part = part.value.body  # {' --resume' if begun else ''}
    return str(part.value) if isinstance(part, ast.Constant) else "?"


def built_of(tree: ast.Module) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """Yield module and words of each call of a builder; words that are computed become `?`.

    A call with a list that is computed elsewhere is left out: the tests of that module have it.
    """
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or getattr(node.func, "id", "") not in BUILDERS:
            continue
        program, *rest = node.args
        if len(rest) == 1 and isinstance(rest[0], ast.List):
            rest = rest[0].elts
        elif len(rest) == 1 and isinstance(rest[0], ast.Name):
            continue
        if not isinstance(program, ast.Constant):
            continue
        words: list[str] = []
        for word in rest:
            if isinstance(word, ast.Starred):  # options of its own
                is_encode = str(program.value).endswith("encode.run")
                name = "dataset" if is_encode and "--dataset" not in words else "features"
                words += [f"--{name}", "?"]
            elif not isinstance(word, ast.Name) or (words[-1:] and words[-1].startswith("--")):
                words.append(_text(word))
        yield node.lineno, str(program.value).removeprefix("python -m "), tuple(words)


def suggestions() -> list[Suggestion]:
    """Every command of ours in the source of a message."""
    found = []
    for package in ("cache", "configs", "encode", "model", "nanomolmo2", "train"):
        for path in sorted((ROOT / package).rglob("*.py")):
            file, tree = str(path.relative_to(ROOT)), ast.parse(path.read_text())
            for line, text in strings_of(tree):
                for module, words in commands_in(text):
                    found.append(Suggestion(file, line, module, words))
            found += [Suggestion(file, *each) for each in built_of(tree)]
    return found


def commands_in(text: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield module and words of each command in a message, which ends at a sign or at a word of prose."""
    for module, rest in re.findall(r"python -m ([\w.]+\w)([^;,()\n]*)", text):
        words: list[str] = []
        for word in rest.replace(". ", " . ").split():
            is_value = bool(words) and words[-1].startswith("--")
            if not (word.startswith("--") or word == "?" or is_value):
                break
            words.append(word)
        is_name = text == f"python -m {module}"  # of a program, or in a file of ours
        if not is_name and not text.startswith("{"):
            yield module, tuple(words)


def parsed(module: str, words: list[str]) -> Any:
    command = importlib.import_module(module)
    if hasattr(command, "__path__"):
        command = importlib.import_module(f"{module}.__main__")
    return parse(command.Options, words, prog=f"python -m {module}")


@pytest.mark.parametrize("one", suggestions(), ids=lambda s: f"{s.file}:{s.line}:{s.module}")
def test_every_suggested_command_parses(one: Suggestion) -> None:
    errors = []
    for value in ("x", "1"):  # some options take numbers
        words = [word.replace("?", value) for word in one.words]
        words = ["1" if word == "N" else word for word in words]
        try:
            options = parsed(one.module, words)
            break
        except UserError as error:
            errors.append(str(error))
    else:
        pytest.fail(errors[0])
    if hasattr(options, "features") and one.file not in NO_FEATURES:
        assert "--features" in one.words, "the user's own cache may be elsewhere"
    assert all(
        not word.isupper() or word in UNKNOWN for word in one.words if not word.startswith("-")
    )


def test_there_are_suggestions_of_every_kind() -> None:
    found = suggestions()
    assert {"cache.verify", "cache.gc", "cache.ls", "cache.share"} <= {one.module for one in found}
    assert len(found) > 15


# ---- CONTRIBUTING: the examples work as they are printed


def block(heading: str, language: str) -> str:
    """The first block of a language below a heading of CONTRIBUTING.md."""
    found = re.search(
        rf"```{language}\n(.*?)```", CONTRIBUTING.split(f"## {heading}")[1], re.DOTALL
    )
    assert found is not None
    return found[1]


def test_the_data_set_of_the_guide_is_one() -> None:
    (entry,) = yaml.safe_load(block("Add a data set", "yaml")).values()
    assert build(Entry, entry, "guide").path == "/data/holidays"
    names = {
        "__name__": __name__,
        "dataclass": dataclass,
        "Iterator": Iterator,
        "Mapping": Mapping,
        "MediaRef": MediaRef,
        "Message": Message,
        "Sample": Sample,
    }
    exec(block("Add a data set", "python"), names)
    (sample,) = names["Dogs"]().samples()  # type: ignore[operator]
    assert [m.content for m in sample.messages] == ["Breed?", "Pug."]


def test_the_encoder_of_the_guide_is_one() -> None:
    ((name, entry),) = yaml.safe_load(block("Add an encoder", "yaml")).items()
    assert build(EncoderConfig, {"name": name, **entry}, "guide").blocks == (10,)


def test_the_command_of_the_guide_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {
        "__name__": __name__,
        "dataclass": dataclass,
        "Path": Path,
        "Sequence": Sequence,
        "parse": parse,
        "CacheRoot": CacheRoot,
    }
    exec(block("Add a command", "python"), names)
    make_space(tmp_path)
    names["main"](["--features", str(tmp_path)])  # type: ignore[operator]
    assert capsys.readouterr().out == "1 spaces\n"


@pytest.mark.parametrize("heading", re.findall(r"^## (Add .*)$", CONTRIBUTING, re.MULTILINE))
def test_each_addition_takes_under_ten_lines(heading: str) -> None:
    text = CONTRIBUTING.split(f"## {heading}")[1].split("\n## ")[0]
    for lines in re.findall(r"```\w+\n(.*?)```", text, re.DOTALL):
        assert len([line for line in lines.splitlines() if line.strip()]) < 10
