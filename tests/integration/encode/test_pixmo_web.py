"""PixMo from the web, end to end: a server with every kind of failure, a second job, a healed server.

python -m encode.run --dataset pixmo --source lists
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cache.store.ledger import MediaRecord, read_media
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.samples import read_samples
from cache.store.space import find_space
from encode.run import main
from tests.support.pixmo_lists import write_pixmo
from tests.support.web_server import Handler, TroubleServer, instead, status
from train.data.join import join

CLOSING = re.compile(r"encoded=(\d+) reused=(\d+) failed=(\d+) ")


@dataclass(frozen=True, kw_only=True)
class World:
    """A server, lists of its URLs, and a cache."""

    server: TroubleServer
    lists: Path
    features: Path

    def words(self, *more: str) -> list[str]:
        words = ["--dataset", "pixmo", "--source", str(self.lists), "--encoder", "demo"]
        words += ["--features", str(self.features), "--device", "cpu", "--workers", "0"]
        words += ["--allow-private", "--fetch-timeout-s", "0.7", "--fetch-tries", "3"]
        return [*words, *more]

    def encode(self, *more: str) -> int:
        return main(self.words(*more))

    def ledger(self) -> dict[str, MediaRecord]:
        """Return the ledger by kind of URL."""
        records = read_media(CacheRoot(self.features))
        return {source.removeprefix(self.server.base + "/"): r for source, r in records.items()}

    def reader(self) -> FeatureReader:
        return FeatureReader(find_space(CacheRoot(self.features), None))

    def key(self, kind: str) -> str:
        return hashlib.sha256(self.server.image(kind)).hexdigest()

    def counts(self) -> dict[str, int]:
        return dict(self.server.counts)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("web")
    with TroubleServer() as server:
        urls = [(server.base + entry.path, entry.sha256) for entry in server.entries()]
        write_pixmo(folder / "lists", urls)
        yield World(server=server, lists=folder / "lists", features=folder / "cache")


@pytest.fixture(scope="module", autouse=True)
def first_job(world: World) -> str:
    """Run the first job; return its output."""
    command = [sys.executable, "-c", "import sys; from encode.run import main; sys.exit(main())"]
    done = subprocess.run([*command, *world.words()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_url_is_in_the_space_or_in_the_ledger(world: World, first_job: str) -> None:
    entries = world.server.entries()
    failing = {entry.kind for entry in entries if entry.expected != "ok"}
    assert len(failing) >= 30
    ledger = world.ledger()
    assert set(ledger) == {entry.kind for entry in entries}
    reader = world.reader()
    for entry in entries:
        record = ledger[entry.kind]
        if entry.expected == "ok":
            assert (record.status, record.error) == ("ok", None), (entry.kind, record.error)
            assert record.key == world.key(entry.kind), entry.kind
            assert reader.contains("image", record.key)
            assert record.width * record.height > 0
        else:
            assert (record.status, record.stage) == ("failed", entry.expected), entry.kind
            assert record.error
            assert "\n" not in record.error
    distinct = {world.key(entry.kind) for entry in entries if entry.expected == "ok"}
    assert reader.rows("image") == len(distinct)
    found = CLOSING.match(first_job.splitlines()[-1])
    assert found is not None
    good = len(entries) - len(failing)
    assert [int(n) for n in found.groups()] == [
        len(distinct),
        good - len(distinct),
        len(failing),
    ]


def test_points_in_pixels_are_used_once_sizes_are_known(world: World) -> None:
    # Three quarters of the images have points. Failed images have no size.
    ledger = read_media(CacheRoot(world.features))
    pointed = {
        ledger[sample.media[0].source].status
        for sample in read_samples(CacheRoot(world.features), "pixmo-count")
        if "<points coords=" in sample.messages[-1].content
    }
    assert pointed == {"ok"}


def test_failures_are_listed_with_reason_host_and_data_set(world: World) -> None:
    command = [sys.executable, "-m", "cache.ls", "--failures", "--features", str(world.features)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "in pixmo-cap (127.0.0.1): fetch: HTTP 404" in text
    listed = json.loads(
        subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout
    )
    sources = {source for group in listed["failures"] for source in group["sources"]}
    expected = {e.kind for e in world.server.entries() if e.expected != "ok"}
    assert {source.removeprefix(world.server.base + "/") for source in sources} == expected


def test_a_second_job_sends_no_request(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    before = world.counts()
    assert world.encode() == 0
    assert world.counts() == before
    last = capsys.readouterr().out.splitlines()[-1]
    failing = sum(entry.expected != "ok" for entry in world.server.entries())
    good = len(world.server.entries()) - failing
    assert last.startswith(f"encoded=0 reused={good} failed={failing} ")


def test_a_stage_trains_on_the_encoded_images(world: World, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "train.run", "--stage", "1", "--llm", "random:qwen3-tiny"]
    command += ["--features", str(world.features), "--run", str(tmp_path / "run")]
    command += ["--hardware", "cpu", "--max-steps", "3", "--batch-size", "8", "--eval-every", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "stage 1 is finished" in done.stdout
    assert re.search(r"pixmo-points: \d+ train samples", done.stdout)


def test_another_space_downloads_again_unless_the_bytes_were_kept(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--fetch-only keeps bytes; encoding them later sends no request."""
    keep = tmp_path / "media"
    features = tmp_path / "cache"
    there = World(server=world.server, lists=world.lists, features=features)
    quick = ["--limit", "12", "--keep-media", str(keep)]  # good images come first
    assert there.encode("--fetch-only", *quick) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("fetched=12 reused=0 failed=0 ")
    assert not (features / "spaces").exists()
    before = world.counts()
    assert there.encode("--fetch-only", *quick) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("fetched=0 reused=12 failed=0 ")
    assert there.encode(*quick) == 0
    assert world.counts() == before
    assert capsys.readouterr().out.splitlines()[-1].startswith("encoded=12 ")


def test_private_addresses_are_refused_by_default(world: World, tmp_path: Path) -> None:
    before = world.counts()
    words = ["--dataset", "pixmo-cap", "--source", str(world.lists), "--encoder", "demo"]
    words += ["--features", str(tmp_path / "c"), "--workers", "0", "--limit", "3"]
    assert main(words) == 0
    assert world.counts() == before
    records = read_media(CacheRoot(tmp_path / "c")).values()
    assert all(r.status == "failed" and "127.0.0.1" in (r.error or "") for r in records)


def test_retrying_downloads_only_what_failed(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """This test heals the server, so it runs after the tests that need its failures."""
    failed = {entry.kind for entry in world.server.entries() if entry.expected != "ok"}
    good = {entry.kind: world.key(entry.kind) for entry in world.server.entries()}
    world.server.heal()
    before = world.counts()
    assert world.encode("--retry-failed") == 0
    after = world.counts()
    asked = {path[1:] for path, count in after.items() if count > before.get(path, 0)}
    assert asked == failed
    assert all(after[f"/{kind}"] == before.get(f"/{kind}", 0) + 1 for kind in failed)
    ledger = world.ledger()
    assert {record.status for record in ledger.values()} == {"ok"}
    reader = world.reader()
    for kind in failed:
        assert ledger[kind].key == hashlib.sha256(world.server.image(kind)).hexdigest()
        assert reader.contains("image", ledger[kind].key or "")
    assert all(ledger[kind].key == key for kind, key in good.items() if kind not in failed)
    assert " failed=0 " in capsys.readouterr().out.splitlines()[-1]


def test_a_link_that_fails_later_keeps_its_features(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A URL is encoded and then fails for a second space: the first space still trains on it."""

    def once(handler: Handler, image: bytes, count: int) -> None:
        (instead(image) if count == 1 else status(404))(handler, image, count)

    with TroubleServer(photos=3, extra={"dies": once}) as server:
        kinds = ["photo-0", "photo-1", "dies"]
        lists = write_pixmo(tmp_path / "lists", [(server.url(kind), None) for kind in kinds])
        there = World(server=server, lists=lists, features=tmp_path / "cache")
        assert there.encode() == 0
        first = there.reader()
        before = there.ledger()
        assert there.encode("--pool", "1") == 0  # another space: everything is downloaded again
        assert " failed=1 " in capsys.readouterr().out.splitlines()[-1]
        after = there.ledger()["dies"]
        assert (after.status, after.error, after.key) == ("failed", "HTTP 404", before["dies"].key)
        assert (after.width, after.height) == (before["dies"].width, before["dies"].height)
        reader = FeatureReader(first.paths)
        chosen = join(
            CacheRoot(there.features),
            reader,
            {"pixmo-cap": None},
            split="train",
            held_out=0.0,
            min_coverage=1.0,
        )
        assert (chosen.missing, chosen.failed) == (0, 0)
        # Downloading with --fetch-only keeps what decoding added to the ledger.
        assert there.encode("--fetch-only", "--keep-media", str(tmp_path / "media")) == 0
        assert there.ledger()["photo-0"] == before["photo-0"]
