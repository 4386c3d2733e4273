"""What the documents promise exists: commands parse, files are there, the folder map is complete."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from configs import parse
from tests.support import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


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
def test_every_command_in_the_documents_is_understood(page: str, line: str) -> None:
    _, _, module, *argv = shlex.split(line)
    if module.startswith("tests."):
        importlib.import_module(module)
        return
    options = importlib.import_module(module).Options
    parse(options, argv, prog=f"python -m {module}")


def test_there_are_commands_to_check() -> None:
    pages = {page for page, _ in command_lines()}
    assert {"README.md", "QUICKSTART.md", "TRAINING_PIPELINE.md", "FEATURE_CACHE.md"} <= pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_file_named_in_the_folder_map_exists_and_none_is_left_out() -> None:
    readme = (ROOT / "README.md").read_text()
    for package in ("cache", "encode", "model", "train"):
        for path in (ROOT / package).glob("*.py"):
            if path.name != "__init__.py":
                assert re.search(rf"\b{path.stem}\b", readme), (
                    f"README's map lacks {package}/{path.name}"
                )


def test_make_targets_named_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make (\w+)", (ROOT / "README.md").read_text())):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
