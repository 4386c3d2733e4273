"""Where a cache is: a folder that has none is refused by every command that needs one.

CacheRoot.existing(Path("photos"))      # NotFoundError: no cache in photos/: ...
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

from cache.errors import CacheError, NotFoundError
from cache.store.ledger import MediaRecord, append_media
from cache.store.paths import CacheRoot
from cache.store.samples import write_samples
from configs import command
from tests.support import ROOT
from tests.support.spaces import make_space


def test_a_folder_with_any_part_of_a_cache_has_one(tmp_path: Path) -> None:
    make_space(tmp_path / "space")
    write_samples(CacheRoot(tmp_path / "samples"), "none", [])
    append_media(CacheRoot(tmp_path / "media"), [MediaRecord(source="a")], "job")
    for name in ("space", "samples", "media"):
        assert CacheRoot.existing(tmp_path / name).path == tmp_path / name


@pytest.mark.parametrize("kind", ["nowhere", "file", "empty", "photos", "code"])
@pytest.mark.parametrize(
    "words",
    [
        ["cache.verify"],
        ["cache.verify", "--deep", "--repair"],
        ["cache.gc"],
        ["cache.gc", "--delete", "--damaged"],
        ["cache.convert", "--codec", "int4"],
        ["cache.export", "--to", "safetensors", "--out", "OUT"],
        ["cache.share"],
        ["cache.view", "--out", "OUT"],
        ["cache.merge", "--source", "HERE", "--features", "OUT"],
    ],
    ids=" ".join,
)
def test_a_folder_without_a_cache_is_refused_in_one_line_with_exit_code_2(
    tmp_path: Path,
    words: list[str],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = tmp_path / kind
    if kind == "file":
        here.touch()
    elif kind == "photos":  # with names that a cache has too
        for folder in ("media", "samples/cats", "spaces"):
            (here / folder).mkdir(parents=True)
        (here / "media" / "a.jpg").touch()
        (here / "samples" / "cats" / "b.jpg").touch()
    elif kind == "code":
        here.symlink_to(ROOT / "cache" / "store")
    elif kind == "empty":
        here.mkdir()
    before = sorted(tmp_path.rglob("*"))
    words = [{"OUT": str(tmp_path / "out"), "HERE": str(here)}.get(word, word) for word in words]
    if "--features" not in words:
        words += ["--features", str(here)]
    monkeypatch.setattr(sys, "argv", words)
    name = words[0] if words[0] not in ("cache.export", "cache.view") else f"{words[0]}.__main__"
    with pytest.raises(SystemExit) as ended:
        command(import_module(name).main, errors=(CacheError,))
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert str(here) in err
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


def test_urls_are_refused_where_a_folder_is_needed() -> None:
    with pytest.raises(CacheError, match="this command needs a cache in a local folder"):
        CacheRoot.existing(Path("https://a.example/cache"))
    with pytest.raises(NotFoundError, match="no cache at"):
        CacheRoot.existing(Path("nowhere"))
