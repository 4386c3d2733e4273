"""Training on a remote cache gives the losses of a local one, and fetches little more than the rows it uses.

python -m train.run --features https://host/features
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

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
    """Return a cache of images and videos with its listing.json."""
    folder = tmp_path_factory.mktemp("shared")
    trained_runs.make(folder)
    root = trained_runs.film(folder)
    share(root)
    return root


class Used:
    """The distinct rows that all readers were asked for, and their bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows: dict[str, set[int]] = defaultdict(set)
        self.rows = rows
        self.row_bytes = {k: trained_runs.spec().row_bytes(k) for k in ("image", "frame")}
        for cls in (FeatureReader, RemoteReader):
            original = cls.read_into

            def read_into(
                reader: Any, array: str, numbers: Any, out: Any, original: Any = original
            ) -> None:
                rows[array].update(np.asarray(numbers).tolist())
                original(reader, array, numbers, out)

            monkeypatch.setattr(cls, "read_into", read_into)

    @property
    def nbytes(self) -> int:
        return sum(len(rows) * self.row_bytes[array] for array, rows in self.rows.items())


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[float]]]:
    """`train(name, features, ...)` runs a stage and returns the loss of every step."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, features: str, *more: str) -> list[float]:
        where = ("--features", features, "--mirror", str(tmp_path / "mirror"), "--run", name)
        assert main([*BASE, *STEPS, *where, *more]) == 0
        return losses(tmp_path / "runs" / name / "stage1")

    yield run


def test_losses_over_a_faulty_web_server_are_the_local_ones(
    cache: CacheRoot, train: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = Used(monkeypatch)
    local = train("local", str(cache.path))
    expected = used.nbytes
    with remote_servers.WebServer(cache.path) as server:
        server.failure_rate = 0.1
        assert train("remote", server.url) == local
        assert len(server.shard_requests()) > 20
        assert set(server.failures) == set(remote_servers.FAILURES)
        assert expected <= server.row_bytes <= 1.05 * expected
        # A second run on the same rows fetches none of them.
        before = server.row_bytes
        assert train("again", server.url) == local
        assert server.row_bytes == before
        # A run that keeps no rows fetches them again.
        assert train("no-rows-kept", server.url, "--mirror-gb", "0") == local
        assert server.row_bytes > before + expected


def test_losses_over_s3_are_the_local_ones(
    cache: CacheRoot, train: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = Used(monkeypatch)
    local = train("local", str(cache.path))
    expected = used.nbytes
    with (
        remote_servers.FaultyS3() as server,
        mock.patch.dict(os.environ, remote_servers.environment(server.url)),
    ):
        remote_servers.upload(cache.path, "s3://features/video")
        server.failure_rate = 0.1
        assert train("remote", "s3://features/video") == local
        assert set(server.failures) == set(remote_servers.FAILURES)
        assert expected <= server.row_bytes <= 1.05 * expected


def test_losses_over_the_hub_are_the_local_ones(
    cache: CacheRoot, train: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    local = train("local", str(cache.path))
    with remote_servers.WebServer(cache.path) as server:
        remote_servers.as_hub(server, "us/features")
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        server.failure_rate = 0.1
        assert train("remote", "hf://datasets/us/features") == local
