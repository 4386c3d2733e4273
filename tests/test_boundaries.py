"""Who may import whom: the contracts hold, and a planted import turns them red."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cache.errors import DATA_FOLDERS
from cache.store.paths import LISTING, CacheRoot
from tests.support import ROOT

PACKAGES = ("cache", "configs", "encode", "model", "nanomolmo2", "train")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The code alone, to plant imports in."""
    for package in PACKAGES:
        data = DATA_FOLDERS if package == "cache" else ()
        ignored = shutil.ignore_patterns("__pycache__", *data)
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    return tmp_path


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_the_contracts_list_no_packages_modules() -> None:
    """A new file needs no change here: contracts name layers and rooms, about 45 names in all."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    lists = [v for c in contracts["contracts"] for v in c.values() if isinstance(v, list)]
    names = [name for each in lists for line in each for name in line.split(" | ")]
    assert len(names) <= 47, names


def test_the_contracts_hold(copy: Path) -> None:
    done = lint(copy)
    assert done.returncode == 0, done.stdout


PLANTED = [
    ("train/data/loader.py", "import model.vision.encoder", "The trainer cannot load"),
    ("model/vlm.py", "import model.vision.encoder", "The trainer cannot load"),
    ("train/training.py", "import encode.plan", "Siblings encode and train"),
    ("cache/store/reader.py", "import torch", "The cache is arrays, bytes and tables"),
    ("cache/format/codec.py", "import cache.store.reader", "Inside the cache"),
    ("cache/maintenance/checks.py", "import cache.verify", "Inside the cache"),
    ("cache/store/files.py", "import configs", "The cache below its commands"),
    ("nanomolmo2/unpack.py", "import configs", "The cache below its commands"),
    ("nanomolmo2/unpack.py", "import model.vlm", "Siblings encode and train"),
    ("cache/errors.py", "from configs import UserError", "The cache below its commands"),
    ("model/vlm.py", "import cache.store.reader", "model uses only the format"),
    ("encode/worker/worker.py", "import ray", "One file imports Ray"),
    ("cache/store/commits.py", "import cache.store.row_index", "No circles"),
    ("model/connector.py", "import model.vlm", "No circles"),
]
"""File, an import planted in it, and the beginning of the contract that it breaks."""


@pytest.mark.slow
@pytest.mark.parametrize(("file", "planted", "contract"), PLANTED)
def test_a_planted_import_turns_them_red(
    copy: Path, file: str, planted: str, contract: str
) -> None:
    path = copy / file
    path.write_text(path.read_text() + f"\n{planted}\n")
    done = lint(copy)
    assert done.returncode != 0
    broken = [line for line in done.stdout.splitlines() if " BROKEN" in line]
    assert any(line.startswith(contract) for line in broken), done.stdout


def test_every_contract_has_a_planted_violation() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    for contract in contracts["contracts"]:
        assert any(contract["name"].startswith(name) for _, _, name in PLANTED), contract["name"]


def test_no_folder_has_more_than_thirteen_rooms() -> None:
    """A room is a .py file or a folder of code; more than thirteen nobody keeps in mind.

    `__init__.py` and `__main__.py` say what the others are, so they are none; `conftest.py` is pytest's.
    """
    rooms: dict[Path, set[str]] = {}
    for package in (*PACKAGES, "tests"):
        for path in (ROOT / package).rglob("*.py"):
            inside = path.relative_to(ROOT).parts
            for depth in range(1, len(inside)):
                if inside[depth] not in ("__init__.py", "__main__.py", "conftest.py"):
                    rooms.setdefault(Path(*inside[:depth]), set()).add(inside[depth])
    assert {folder: found for folder, found in rooms.items() if len(found) > 13} == {}
    assert max(len(folder.parts) for folder in rooms) <= 3  # tests/ mirrors folders of two levels


def test_data_and_code_in_cache_have_different_names() -> None:
    ignored = (ROOT / ".gitignore").read_text().split()
    named = {line for line in ignored if line.startswith("/cache/")}
    assert named == {f"/cache/{name}/" for name in DATA_FOLDERS} | {f"/cache/{LISTING}"}
    code = {path.stem for path in (ROOT / "cache").glob("*.py")}
    code |= {path.parent.name for path in (ROOT / "cache").glob("*/__init__.py")}
    assert not code & set(DATA_FOLDERS)
    root = CacheRoot(Path("root"))
    folders = [value for value in vars(CacheRoot).values() if isinstance(value, property)]
    assert {folder.fget(root).parts[1] for folder in folders if folder.fget} <= set(DATA_FOLDERS)
    assert root.space("s").locks_dir.parts[1] in DATA_FOLDERS


def test_no_test_imports_a_test() -> None:
    """What two tests need is in tests/support. Scripts that tests start are searched as well."""
    pattern = re.compile(r"(?:from|import)\s+tests\.(?:\w+\.)*test_\w+|from \.+\w* import test_")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for match in pattern.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found


def test_a_new_folder_in_the_cache_needs_a_layer(copy: Path) -> None:
    (copy / "cache" / "extra").mkdir()
    (copy / "cache" / "extra" / "__init__.py").write_text('"""Extra."""\n')
    done = lint(copy)
    assert done.returncode != 0
    assert "cache.extra" in done.stdout


@pytest.mark.parametrize(
    ("imports", "never"),
    [
        (
            "cache.store.reader, cache.store.writer, cache.store.samples",
            "configs encode model train torch ray transformers tyro",
        ),
        ("configs; configs.load('train')", "cache encode model train torch ray transformers tyro"),
        (
            "train.run, train.compare.__main__, train.report.__main__, train.evaluate.result",
            "encode torch transformers ray",
        ),
        pytest.param(
            "train.training, train.evaluate.evaluation, train.demo",
            "encode open_clip ray model.vision.encoder.encoder",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["cache", "configs", "no torch", "train"],
)
def test_an_import_never_loads(imports: str, never: str, tmp_path: Path) -> None:
    """A cache reader's own `model.py` or `configs.py`, first on the path, is never imported."""
    if imports.startswith("cache"):
        for name in ("configs", "encode", "model", "train"):
            (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is imported')\n")
    code = (
        f"import sys; sys.path.insert(0, '.'); import {imports}\n"
        f"print(sorted(set({never.split()}) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
