"""No name, caption or error of a cache or a folder acts on the terminal of a command, or begins a line of it.

python -m cache.ls --failures           # photo\\x1b]0;x\\x07.jpg, with backslashes
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from cache import gc, ls, merge, share, verify
from cache.errors import CacheError
from cache.store.ledger import MediaRecord, append_media
from cache.store.paths import CacheRoot
from cache.store.samples import MediaRef, Message, Origin, Sample, write_samples
from cache.view import __main__ as view
from configs import command
from configs.text import KEPT, visible
from encode import run
from tests.support.spaces import fill, key, make_space

HOSTILE = "x\x1b]0;pwned\x07\x9b2J\x7f\r\nFORGED\u202e\u2028\x85\u200b\u00ad.jpg"
SHOWN = visible(HOSTILE)


@pytest.fixture
def root(tmp_path: Path) -> CacheRoot:
    """Return a cache whose ledger, samples and accounts have text that acts on a terminal."""
    root = CacheRoot(tmp_path / "cache")
    fill(make_space(root.path, "fp16"), [0, 1])
    records = [
        MediaRecord(source=f"ok{HOSTILE}", key=key(0), note=f"ends early{HOSTILE}"),
        MediaRecord(source=f"/{HOSTILE}", status="failed", stage="decode", error=HOSTILE),
        MediaRecord(source="https://a.test/b", status="failed", stage="fetch", error=HOSTILE),
    ]
    append_media(root, records, "job")
    samples = [
        Sample(
            id=f"{number}{HOSTILE}",
            dataset="d",
            messages=(
                Message(role="user", content=HOSTILE),
                Message(role="assistant", content=HOSTILE),
            ),
            media=(MediaRef(source=record.source),),
        )
        for number, record in enumerate(records)
    ]
    origin = Origin(words=("--dataset", f"folder:/{HOSTILE}"), account={}, said=f"d: {HOSTILE}")
    write_samples(root, "d", samples, lambda: origin)
    return root


def check(text: str) -> None:
    assert visible(text, keep=KEPT) == text
    assert not any(line.lstrip().startswith("FORGED") for line in text.splitlines()), text


COMMANDS: dict[str, tuple[ModuleType, tuple[str, ...]]] = {
    "ls": (ls, ()),
    "ls --json": (ls, ("--json",)),
    "ls --failures": (ls, ("--failures",)),
    "ls --failures --json": (ls, ("--failures", "--json")),
    "ls --notes": (ls, ("--notes",)),
    "gc": (gc, ("--unreferenced",)),
    "verify": (verify, ("--deep",)),
    "verify --json": (verify, ("--json",)),
    "share": (share, ()),
    "view": (view, ("--out", "view.html")),
    "merge": (merge, ("--source", "cache")),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("guarded", [True, False], ids=["command", "main"])
def test_commands_print_text_from_outside_as_escapes(
    name: str,
    guarded: bool,
    root: CacheRoot,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As commands, and also without the guard of standard output, which lets line breaks pass."""
    module, words = COMMANDS[name]
    monkeypatch.chdir(root.path.parent)
    monkeypatch.setattr(
        sys, "argv", ["x", "--features", "new" if module is merge else "cache", *words]
    )
    if guarded:
        with pytest.raises(SystemExit) as leaving:
            command(module.main, errors=(CacheError,))
        assert leaving.value.code in (0, 1)
    else:
        module.main()
    out, err = capsys.readouterr()
    check(out)
    check(err)
    if name in ("ls", "ls --failures", "ls --notes"):
        assert SHOWN in out
    if "--json" in words and module is ls:
        assert any(HOSTILE in text for text in _strings(json.loads(out)))


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.items() for one in item for text in _strings(one)]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []


def test_names_of_files_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of files that are used, damaged, special, or whose name is no UTF-8."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in (HOSTILE, "\u202egpj.png", "\u200b.png"):
        Image.new("RGB", (8, 8)).save(photos / name, "PNG")
    (photos / f"bad{HOSTILE}").write_bytes(b"no image")
    os.mkfifo(photos / f"pipe{HOSTILE}")
    (photos / os.fsdecode(b"caf\xe9.png")).write_bytes(b"x")
    words = [
        "--dataset",
        f"folder:{photos}",
        "--encoder",
        "demo",
        "--features",
        str(tmp_path / "c"),
    ]
    for more in ([], ["--bad-lines", "leave-out"]):
        monkeypatch.setattr(sys, "argv", ["x", *words, *more, "--plan"])
        with pytest.raises(SystemExit) as leaving:
            command(run.main, errors=(CacheError,))
        out, err = capsys.readouterr()
        assert leaving.value.code == (0 if more else 2), err
        check(out)
        check(err)
        assert more or r"caf\udce9.png" in err
