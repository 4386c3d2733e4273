"""Training on a remote cache: the losses of a local one, and hardly a byte more than its rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.remote.reader import RemoteReader
from cache.share import share
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from tests.support import remote_servers, trained_runs
from tests.support.trained_runs import BASE, losses
from train.run import main

STEPS = ("--max-steps", "6", "--eval-every", "6", "--batch-size", "16", "--order", "blocks")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> CacheRoot:
    """A cache of images and videos, ready to be shared."""
    folder = tmp_path_factory.mktemp("shared")
    trained_runs.make(folder)
    root = trained_runs.film(folder)
    share(root)
    return root


class Used:
    """The distinct rows that reader after reader was asked for, and their bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows: dict[str, set[int]] = defaultdict(set)
        self.rows = rows
        self.row_bytes = {k: trained_runs.spec().row_bytes(k) for k in ("image", "frame")}
        for cls in (FeatureReader, RemoteReader):
            original = cls.read_into

            def read_into(
                reader: Any, kind: str, numbers: Any, out: Any, original: Any = original
            ) -> None:
                rows[kind].update(np.asarray(numbers).tolist())
                original(reader, kind, numbers, out)

            monkeypatch.setattr(cls, "read_into", read_into)

    @property
    def nbytes(self) -> int:
        return sum(len(rows) * self.row_bytes[kind] for kind, rows in self.rows.items())


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[float]]]:
    """`train(name, features, ...)` runs a stage and returns the loss of every step."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, features: str, *more: str) -> list[float]:
        where = ("--features", features, "--mirror", str(tmp_path / "mirror"), "--run", name)
        assert main([*BASE, *STEPS, *where, *more]) == 0
        return losses(tmp_path / "runs" / name / "stage1")

    yield run


def test_over_a_bad_network_the_losses_are_the_local_ones(
    cache: CacheRoot, train: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = Used(monkeypatch)
    local = train("local", str(cache.path))
    expected = used.nbytes
    with remote_servers.WebServer(cache.path) as server:
        server.bad = 0.1
        assert train("remote", server.url) == local
        assert len(server.shard_requests()) > 20
        assert set(server.troubles) == set(remote_servers.TROUBLES)
        assert expected <= server.row_bytes <= 1.05 * expected
        # A second experiment on the same rows asks for none of them.
        before = server.row_bytes
        assert train("again", server.url) == local
        assert server.row_bytes == before
        # And one that keeps nothing fetches what it uses, each time anew.
        assert train("keeping-nothing", server.url, "--mirror-gb", "0") == local
        assert server.row_bytes > before + expected


def test_over_s3_the_losses_are_the_local_ones(
    cache: CacheRoot, train: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = Used(monkeypatch)
    local = train("local", str(cache.path))
    expected = used.nbytes
    with (
        remote_servers.BadS3() as server,
        remote_servers.patched(remote_servers.environment(server.endpoint)),
    ):
        remote_servers.upload(cache.path, "s3://features/video")
        server.bad = 0.1
        assert train("remote", "s3://features/video") == local
        assert set(server.troubles) == set(remote_servers.TROUBLES)
        assert expected <= server.row_bytes <= 1.05 * expected


def test_over_the_hub_the_losses_are_the_local_ones(
    cache: CacheRoot, train: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    local = train("local", str(cache.path))
    with remote_servers.WebServer(cache.path) as server:
        remote_servers.as_hub(server, "us/features")
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        server.bad = 0.1
        assert train("remote", "hf://datasets/us/features") == local
