"""The console script runs every command, and never a user's own module of that name.

nanomolmo2 ls --features cache
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.commands import find_commands
from nanomolmo2.__main__ import COMMANDS, help_text, main
from tests.support import ROOT
from tests.support.spaces import fill, make_space


def test_every_command_has_a_name_and_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    commands: dict[str, str] = {}
    for package in ("cache", "encode", "model", "train"):
        commands |= find_commands(ROOT / package)
    assert set(COMMANDS.values()) == set(commands)
    assert main(["--help"]) == main([]) == 0
    lines = capsys.readouterr().out
    assert lines == f"{help_text()}\n" * 2
    for name, module in COMMANDS.items():
        assert f"  {name} " in lines and commands[module] in lines


ASK = """
import contextlib, io, runpy, sys
wrong = {
    "train.compare": ["none", "nothing"],
    "train.run": ["--features", "nowhere", "--run", "nothing"],
    "model.generate": ["--prompt", "What?", "--run", "nothing"],
    **dict.fromkeys(
        ["train.evaluate", "train.report", "model.export", "encode.check.loss"], ["--run", "nothing"]
    ),
}
modules = sys.argv[1:]
assert set(wrong) < set(modules)
for module in modules:
    for words in ["--help"], ["--no-such-option", "1"], wrong.get(module, ["--help"]):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                sys.argv[:] = [module, *words]
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            except SystemExit as end:
                code = end.code
        loaded = {"torch", "transformers", "open_clip", "ray"} & set(sys.modules)
        assert not loaded, f"{module} {words[0]} loads {loaded}"
        assert code == (2 if words[1:] else 0), f"{module} {words[0]}: {code}, {said.getvalue()}"
        error = "error: no feature space under nowhere/" if module == "train.run" else "error: no run no"
        assert words is not wrong.get(module) or error in said.getvalue(), said.getvalue()
"""


def test_help_and_a_mistyped_option_run_or_cache_take_no_seconds() -> None:
    """Torch and transformers take 5 to 9 of them to load."""
    words = [sys.executable, "-c", ASK, *COMMANDS.values()]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian", "--stage", "1"]) == 2
    found = capsys.readouterr()
    assert (
        found.err
        == "error: nanomolmo2: no command 'trian'; nearest: train; see nanomolmo2 --help\n"
    )
    assert found.out == ""


def test_the_script_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"nanomolmo2": "nanomolmo2.__main__:main"}


def test_an_installed_package_has_every_file() -> None:
    """Files that are not Python are package data, or `pip install .` leaves them out."""
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    data = {
        path
        for package, patterns in setup["package-data"].items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    tracked = subprocess.run(
        ["git", "ls-files", "cache", "configs", "encode", "model", "nanomolmo2", "train"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert {ROOT / name for name in tracked if not name.endswith(".py")} == data


@pytest.mark.slow
def test_a_command_runs_beside_modules_of_the_same_names(
    tmp_path: Path, in_process: Callable[..., tuple[int, str, str]]
) -> None:
    space = make_space(tmp_path / "features")
    fill(space, [0, 1])
    own = tmp_path / "own"
    own.mkdir()
    for name in ("cache", "configs", "encode", "model", "train"):
        (own / f"{name}.py").write_text(f"raise ImportError('own {name}')\n")
    for words, code, text in (
        (["ls", "--features", "../features"], 0, "toy"),
        (["train", "--stage", "1", "--features", "nowhere"], 2, "error: "),
        (["ls", "--help"], 0, "--features"),
        (["ls", "--feature", "x"], 2, "--features"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "nanomolmo2", *words],
            cwd=own,
            env={"PYTHONPATH": str(ROOT), "COLUMNS": "100"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr
        assert text in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert code == 0 or len(done.stderr.splitlines()) == 1
