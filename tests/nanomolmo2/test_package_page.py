"""The code of docs/PACKAGE.md runs as it stands: beside a user's own modules, with any kind of workers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cache.share import share
from cache.store.ledger import MediaRecord, append_media
from cache.store.samples import MediaRef, write_samples
from tests.support import ROOT
from tests.support.feature_caches import ask, key_of, new_world
from tests.support.remote_servers import WebServer

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "PACKAGE.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
OPEN = 'nm.open("cache")'
WORKERS = "num_workers=4"
MARK = "-- the next block"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as the page assumes it: cache/, photos/ and videos/, and modules of the user's own."""
    world = new_world(tmp_path)
    world.encode([f"p{i}" for i in range(80)])
    world.encode_videos({"video v": 2.2})
    cat, film = str(tmp_path / "photos" / "cat.jpg"), str(tmp_path / "videos" / "cat.mp4")
    append_media(world.root, [MediaRecord(source=cat, key=key_of("p0"))], "test")
    video = MediaRecord(source=film, kind="video", key=key_of("video v"), duration_s=2.2)
    append_media(world.root, [video], "test")
    samples = [ask(f"{i}", [f"p{i}"], "<image>What is this?") for i in range(80)]
    films = (MediaRef(source=film, kind="video"), MediaRef(source=cat))
    samples += [replace(ask("film"), media=films), ask("talk")]
    write_samples(world.root, "pixmo-cap", [replace(s, dataset="pixmo-cap") for s in samples])
    share(world.root)
    for name in ("configs", "encode", "model", "train"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is imported')\n")
    return tmp_path


def test_the_page_has_the_code_that_is_run() -> None:
    assert len(BLOCKS) == 3
    assert all(OPEN in block for block in BLOCKS)
    assert [block.count(WORKERS) for block in BLOCKS] == [0, 1, 0]


def code_of(number: int, where: str, workers: int, method: str | None = None) -> str:
    """Return a block of the page that opens another cache, with workers of a kind."""
    head = "import nanomolmo2 as nm\n\n" if "import nanomolmo2" not in BLOCKS[number] else ""
    wanted = f"num_workers={workers}, multiprocessing_context={method!r}"
    return head + BLOCKS[number].replace(OPEN, where).replace(WORKERS, wanted)


def check(number: int, out: str) -> None:
    """Check what a block has printed."""
    if number == 0:
        assert "(4, 64) (6, 1, 64) [0." in out
    if number == 1:
        lines = out.splitlines()
        assert lines[0].startswith("<FeatureDataset pixmo-cap: ")
        assert len(lines) - 1 == int(lines[0].split(": ")[1].split()[0]) > 60
        assert "<image>What is this? [(4, 64)]" in lines


def test_its_code_runs(folder: Path, in_process: Callable[..., tuple[int, str, str]]) -> None:
    """From a folder and from a server, with forked workers and without, one after the other."""
    with WebServer(folder / "cache") as server:
        remote = f'nm.open("{server.url}", mirror="mirror")'
        cases = [
            (number, where, workers)
            for workers in (2, 0)
            for where in (OPEN, remote)
            for number, block in enumerate(BLOCKS)
            if WORKERS in block or not workers  # else nothing differs
        ]
        codes = [code_of(*case, "fork" if case[2] else None) for case in cases]
        code, out, error = in_process(
            folder,
            f"for code in {codes!r}:\n"
            f"    print({MARK!r})\n"
            "    exec(compile(code, 'page', 'exec'), {'__name__': '__main__'})\n",
        )
    assert code == 0, error
    before, *printed = out.split(f"{MARK}\n")
    assert before == ""
    assert len(cases) == 2 + 2 * len(BLOCKS)
    for (number, _, _), text in zip(cases, printed, strict=True):
        check(number, text)


def test_its_loop_runs_with_spawned_workers(
    folder: Path, in_process: Callable[..., tuple[int, str, str]]
) -> None:
    """They import the script again, so it must be a file that does nothing when it is imported."""
    code, out, error = in_process(folder, code_of(1, OPEN, 1, "spawn"))
    assert code == 0, error
    check(1, out)
