"""What the documents promise exists: commands parse, files and messages are there, examples run."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from cache.store.paths import CacheRoot
from cache.store.samples import MediaRef, Message, Sample
from configs import build, parse
from encode.sources.catalogue import Entry
from model.vision.config import EncoderConfig
from tests.support import ROOT
from tests.support.spaces import make_space

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
    assert {"README.md", "QUICKSTART.md", "TRAINING_PIPELINE.md", "FEATURE_CACHE.md"} <= pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    if page.name != "SETUP_DOCUMENT.md":  # that one also names another project's files
        for name in re.findall(r"`((?:cache|configs|encode|model|tests|train)/[\w/.-]+)`", text):
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
    packages = {"configs", "cache", "encode", "model", "train"}
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
        for package in ("cache", "configs", "encode", "model", "train")
        for path in (ROOT / package).rglob("*.py")
    )
    code = code.replace("{LISTING}", "listing.json")
    assert piece in code, f"{page} quotes {piece!r}"


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
