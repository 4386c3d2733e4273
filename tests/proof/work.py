"""The folder of a proof: what each step has found, and the commands that it runs.

Every step leaves `<step>.json` when it is done, so a second call goes on after the last one. Commands are the
product's own, in processes of their own, and are printed before they run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.store.files import write_atomic
from configs import UserError

HERE = Path(__file__).parent
Flags = Mapping[str, Any]
"""Options of a command, by field name."""


@dataclass(frozen=True)
class Line:
    """One line of the result."""

    name: str
    measured: str
    required: str
    """Empty: shown for comparison, nothing is required."""
    ok: bool = True

    @property
    def verdict(self) -> str:
        """`ok`, `short`, or nothing where nothing is required."""
        return ("ok" if self.ok else "short") if self.required else ""


@dataclass(frozen=True)
class Done:
    """A command that has run."""

    lines: list[str]
    seconds: float
    code: int

    def found(self, pattern: str) -> str:
        """Return group 1 of the first line in which the pattern is found."""
        for line in self.lines:
            if match := re.search(pattern, line):
                return match[1]
        raise AssertionError(f"no line of the command matches {pattern}")


class Work:
    """A folder of results."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        """Take up the folder.

        Raises:
            UserError: its results are of another recipe.
        """
        self.folder = folder
        self.recipe = recipe
        folder.mkdir(parents=True, exist_ok=True)
        saved = folder / "recipe.json"
        text = json.dumps(recipe, indent=1, sort_keys=True) + "\n"
        if saved.exists() and saved.read_text(encoding="utf-8") != text:
            raise UserError(
                f"{folder}: has results of another recipe; remove them (mv {folder} {folder}-old), and run "
                "the command again"
            )
        write_atomic(saved, text.encode())

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder's lock.

        Raises:
            UserError: another call is at work there.
        """
        with (self.folder / "lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{self.folder}: another call is at work here; wait for it, or --folder DIR"
                ) from None
            yield

    def step(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what a step has found; compute it unless an earlier call did."""
        saved = self.folder / f"{name}.json"
        if not saved.exists():
            print(f"\n== {name}", flush=True)
            begun = time.monotonic()
            found = compute() | {"seconds_of_step": time.monotonic() - begun}
            write_atomic(saved, (json.dumps(found, indent=1) + "\n").encode())
        loaded: dict[str, Any] = json.loads(saved.read_text(encoding="utf-8"))
        return loaded

    def run(self, module: str, flags: Flags, *, codes: Sequence[int] = (0,)) -> Done:
        """Run one of our commands to its end and return its output.

        Raises:
            UserError: its exit code is none of `codes`.
        """
        words = command_words(module, flags)
        print(f"\n$ {shlex.join(['python', *words])}", flush=True)
        begun = time.monotonic()
        lines: list[str] = []
        with start(words) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print("  " + line, end="", flush=True)
                lines.append(line.rstrip("\n"))
        done = Done(lines, time.monotonic() - begun, process.returncode)
        if done.code not in codes:
            raise UserError(
                f"the command above ended with exit code {done.code}: python {shlex.join(words[1:])}; once "
                "its cause is removed, run the proof again: it goes on here"
            )
        return done

    def kill(
        self, module: str, flags: Flags, when: Callable[[], bool], limit_s: float = 900
    ) -> bool:
        """Start one of our commands and kill it and its processes once `when()` is true.

        Returns:
            whether it was still running.
        """
        words = command_words(module, flags)
        print(f"\n$ {shlex.join(['python', *words])}    # to be killed", flush=True)
        with (self.folder / "killed.log").open("ab") as log:
            process = start(words, stdout=log, start_new_session=True)
            end = time.monotonic() + limit_s
            while process.poll() is None and not when() and time.monotonic() < end:
                time.sleep(0.02)
            running = process.poll() is None
            if running:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        print(f"  {'killed' if running else 'ended by itself'}", flush=True)
        return running


def command_words(module: str, flags: Flags) -> list[str]:
    """Return the words after `python`: {"max_steps": 5} -> --max-steps 5, {"blind": False} -> --no-blind."""
    words = ["-u", "-m", module]
    for name, value in flags.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, tuple | list):
            words += [f"--{option}", *map(str, value)]
        elif value is not None:
            words += [f"--{option}", str(value)]
    return words


def start(words: Sequence[str], **more: Any) -> subprocess.Popen[str]:
    """Start Python with these words."""
    return subprocess.Popen(
        [sys.executable, *words],
        **{
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
            "errors": "replace",
        }
        | more,
    )


def metrics(stage: Path) -> list[dict[str, Any]]:
    """Return the steps that a stage of training has logged so far; a last line without an end is left out."""
    path = stage / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    records = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    return [record for record in records if "loss" in record]


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def as_json(line: Line) -> dict[str, Any]:
    """Return a line as JSON values."""
    return dataclasses.asdict(line)
