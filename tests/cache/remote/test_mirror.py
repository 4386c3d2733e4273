"""`cache.share` writes listing.json; a reader validates it and copies the tables; commands take URLs or not.

root = RemoteCache("https://host/features", RemoteOptions(mirror=folder)).copy_tables()
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cache import ls
from cache.errors import CacheError, CorruptError, NotFoundError, UnreachableError
from cache.format.checksums import sealed_json
from cache.maintenance.encode_command import encode_command
from cache.remote.listing import is_table, local_tables
from cache.remote.open import RemoteCache, RemoteOptions
from cache.remote.retry import RetryPolicy
from cache.share import share
from cache.store.paths import LISTING, CacheRoot, is_url
from cache.store.samples import read_samples, samples_table
from configs import UserError
from tests.support import trained_runs
from tests.support.remote_servers import WebServer

POLICY = RetryPolicy(backoff_s=0.01, max_backoff_s=0.02, give_up_after_s=0.3)
DIGEST = "0" * 64


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> CacheRoot:
    folder = tmp_path_factory.mktemp("there")
    trained_runs.make(folder, images=8)
    return trained_runs.make(folder, images=8, first=4, dataset="again")


@pytest.fixture
def server(cache: CacheRoot) -> Iterator[WebServer]:
    share(cache)
    with WebServer(cache.path) as running:
        yield running


def here(server: WebServer, tmp_path: Path) -> RemoteCache:
    return RemoteCache(server.url, RemoteOptions(mirror=tmp_path / "mirror"), POLICY)


def refusal_of_listing(tmp_path: Path, files: dict[str, Any]) -> str:
    """Return the error about a cache with this listing, of which nothing is copied."""
    listing = tmp_path / "there" / LISTING
    listing.parent.mkdir()
    listing.write_bytes(sealed_json({"format": 1, "files": files}))
    with WebServer(listing.parent) as server, pytest.raises(CacheError) as error:
        here(server, tmp_path).copy_tables()
    assert {p.name for p in (tmp_path / "mirror").rglob("*") if p.is_file()} <= {"lock", LISTING}
    return str(error.value)


# ---- listing.json


def test_the_listing_names_every_table_and_no_shard(cache: CacheRoot, tmp_path: Path) -> None:
    (cache.samples_dir / "colors" / "part-00000.parquet.ab.partial").write_bytes(b"half")
    said = share(cache)
    files = json.loads((cache.path / LISTING).read_bytes())["files"]
    on_disk = {p.relative_to(cache.path).as_posix() for p in cache.path.rglob("*") if p.is_file()}
    left_out = on_disk - files.keys()
    assert files.keys() <= on_disk
    others = ("/c/", LISTING, ".partial", "locks/")
    assert all(any(other in n for other in others) for n in left_out), left_out
    assert f"{len(files)} tables" in said and "2 shards" in said


def test_a_damaged_cache_is_not_shared(tmp_path: Path) -> None:
    root = trained_runs.make(tmp_path, images=4)
    (paths,) = map(root.space, root.space_names())
    shard = paths.shard("image", 0)
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(CorruptError, match="bytes, not"):
        share(root)
    shard.write_bytes(data)
    table = root.samples("colors")
    table.write_bytes(table.read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptError):
        share(root)
    with pytest.raises(UserError, match="no feature space under"):
        share(CacheRoot(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "name",
    [
        "../samples/a/part-00000.parquet",
        "/etc/passwd",
        "samples/../../x/part-00000.parquet",
        "samples/./part-00000.parquet",
        "samples/a\\b/part-00000.parquet",
        "samples/a/part-00000.parquet\n",
        "samples/.ssh/part-00000.parquet",
        "spaces/x/features/image/c/0/0/0",
        "spaces/x/commits/image-00000001.parquet.0a.partial",
        "spaces/x/index/../../../y",
        "locks/x/driver.lock",
        "runs/x.py",
        "",
    ],
)
def test_a_listing_with_other_names_is_refused(name: str, tmp_path: Path) -> None:
    assert not is_table(name)
    files = {name: [4, DIGEST]}
    assert "which is no table of a cache; refused" in refusal_of_listing(tmp_path, files)


@pytest.mark.parametrize("value", [[0, DIGEST], [4, "x"], [4], "4", [4, DIGEST, 1], [-1, DIGEST]])
def test_a_listing_with_invalid_values_is_refused(value: Any, tmp_path: Path) -> None:
    files = {"spaces/x/space.json": value}
    assert "no valid size and sha256 of spaces/x" in refusal_of_listing(tmp_path, files)


def test_a_missing_damaged_or_outdated_listing_is_an_error_with_a_remedy(
    server: WebServer, cache: CacheRoot, tmp_path: Path
) -> None:
    listing = cache.path / LISTING
    data = listing.read_bytes()
    listing.write_bytes(data.replace(b"samples/colors", b"samples/colour"))
    with pytest.raises(CacheError, match=r"do not match its seal; .*python -m cache\.share"):
        here(server, tmp_path).copy_tables()
    listing.unlink()
    with pytest.raises(NotFoundError, match=r"no listing\.json, .*-m cache\.share --feat"):
        here(server, tmp_path).copy_tables()
    values = json.loads(data)
    name = "samples/colors/part-00000.parquet"
    values["files"][name] = [values["files"][name][0], DIGEST]  # the table has changed since
    listing.write_bytes(sealed_json({k: v for k, v in values.items() if k != "seal"}))
    with pytest.raises(UnreachableError, match=rf"{name}: its sha256 differs .*cache\.share"):
        here(server, tmp_path).copy_tables()
    assert not (here(server, tmp_path)._mirror.root.path / name).exists()


def test_only_the_wanted_tables_are_copied(
    server: WebServer, cache: CacheRoot, tmp_path: Path
) -> None:
    server.failure_rate = 0.5
    remote = here(server, tmp_path)
    root = remote.copy_tables(datasets=["again"])
    assert "samples/colors/part-00000.parquet" not in local_tables(root)
    root = remote.copy_tables()
    assert local_tables(root) == local_tables(cache)
    for name in local_tables(cache):
        assert (root.path / name).read_bytes() == (cache.path / name).read_bytes()
    assert samples_table(root, "colors") == samples_table(cache, "colors")
    assert next(read_samples(root, "again")).dataset == "again"
    assert encode_command(root, "again").endswith(" --features DIR"), "nothing writes into copies"
    assert encode_command(cache, "again").endswith(f" --features {cache.path}")


def test_a_data_set_of_any_script_is_copied(tmp_path: Path) -> None:
    cache = trained_runs.make(tmp_path / "there", images=4, dataset="写真-é")
    share(cache)
    with WebServer(cache.path) as server:
        root = here(server, tmp_path).copy_tables(datasets=["写真-é"])
    assert local_tables(root) == local_tables(cache)
    assert samples_table(root, "写真-é") == samples_table(cache, "写真-é")


def test_a_table_that_cannot_be_fetched_is_named(server: WebServer, tmp_path: Path) -> None:
    server.acts["/media"] = lambda handler, _: handler.answer(404, b"")
    with pytest.raises(UnreachableError, match=r"/media/part-.*: 404 Not Found"):
        here(server, tmp_path).copy_tables()
    del server.acts["/media"]
    assert here(server, tmp_path).copy_tables().media_dir.is_dir()


# ---- commands and URLs


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("https://h/p", "https://h/p"),
        (Path("https://h/p"), "https://h/p"),
        ("S3://b/p", "s3://b/p"),
        ("hf://datasets/o/n@v1/sub", "hf://datasets/o/n@v1/sub"),
        ("cache", None),
        ("/data/s3/cache", None),
        ("./https/x", None),
    ],
)
def test_urls_and_folders_are_distinguished(text: str | Path, url: str | None) -> None:
    assert is_url(text) == url


@pytest.mark.parametrize(
    "text",
    [
        *(
            "s3:/x",
            "http:/x",
            "https//h",
            "hf:x",
            "http://",
            "http:///x",
            "s3://",
            "hf://",
            "hf://x",
        ),
        *(
            "htps://h/x",
            "https://a b/c",
            "http://..a/",
            "http://.a",
            "s3:",
            "hf://datasets",
            "https:",
        ),
        *("S3:/b", "https:\\\\h\\x", "http://:80/x", "s3:b", "Hf:o/n"),
    ],
)
def test_a_url_that_is_none_is_refused_at_once(
    text: str, tmp_path: Path, run_command: Callable[..., Any]
) -> None:
    with pytest.raises(
        CacheError, match=r": no valid URL, and no folder of that name; .*s3://BUCKET"
    ):
        is_url(text)
    with pytest.raises(CacheError):
        run_command(importlib.import_module("cache.ls"), "--features", text, "--mirror", tmp_path)


def test_a_folder_may_be_named_like_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hf:x").mkdir()
    assert is_url("hf:x") is None
    assert is_url("C:/x") is None and is_url("a:b/c") is None


@pytest.mark.parametrize("module", ["encode.run", "cache.gc", "cache.verify", "cache.share"])
def test_commands_that_write_need_a_local_folder(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_command: Callable[..., Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    url = "https://h.example/features"
    words = ["--dataset", "demo"] if module == "encode.run" else []
    with pytest.raises(CacheError, match=f"^{url}: this command needs a cache in a local folder"):
        run_command(importlib.import_module(module), *words, "--features", url)
    assert not list(tmp_path.iterdir())


def test_ls_lists_a_remote_cache_like_a_local_one(
    server: WebServer, cache: CacheRoot, tmp_path: Path, run_command: Callable[..., tuple[Any, str]]
) -> None:
    words = ("--mirror", tmp_path, "--json", "--features")
    local, remote = (run_command(ls, *words, place)[1] for place in (cache.path, server.url))
    assert json.loads(remote) == json.loads(local)
