"""Starts of Ray that fail. Those that succeed are in tests/integration/encode/test_ray_pool.py.

with ray_pool.session(cpus=3, gpus=0):
    ...
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from configs import UserError
from encode.driver import ray_pool


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (ray._private.services, "resolve_ip_for_localhost"),
        (ray._raylet, "Config"),
        (ray._raylet, "AuthenticationTokenLoader"),
    ],
)
def test_a_ray_that_cannot_be_kept_private_is_not_started(
    monkeypatch: pytest.MonkeyPatch, module: object, name: str
) -> None:
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("it was started"))
    monkeypatch.delattr(module, name)
    with pytest.raises(UserError, match=r"pip install 'ray==2\.60\.0', or .*: --workers 0$"):
        ray_pool.session(cpus=1, gpus=0).__enter__()


def test_a_ray_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []

    def fail(*_: object, _temp_dir: str, **__: object) -> None:
        folders.append(Path(_temp_dir).parent)
        assert folders[0].exists()
        raise RuntimeError("Failed to start\nGCS")

    monkeypatch.setattr(ray, "init", fail)
    before = dict(os.environ), ray._private.services.resolve_ip_for_localhost
    with pytest.raises(UserError, match=r"^Ray .* \(Failed to start GCS\); .*: --workers 0$"):
        ray_pool.session(cpus=1, gpus=0).__enter__()
    assert not folders[0].exists()
    assert (dict(os.environ), ray._private.services.resolve_ip_for_localhost) == before


def test_a_cluster_that_cannot_be_joined_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: str, **_: object) -> None:
        assert (address, os.environ.get("RAY_ADDRESS")) == ("auto", None)
        raise ConnectionError("Could not find any running Ray instance. Please\nspecify the one")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(
        UserError, match=r"^this machine is no node of the cluster at auto: first run"
    ):
        ray_pool.cluster_session("auto").__enter__()


def test_another_address_than_loopback_ends_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = SimpleNamespace(address_info={"node_ip_address": "192.0.2.1"})
    over = []
    monkeypatch.setattr(ray, "init", lambda *_, **__: elsewhere)
    monkeypatch.setattr(ray, "shutdown", lambda **_: over.append(True))
    with pytest.raises(UserError, match="cannot be kept to this machine's loopback address"):
        ray_pool.session(cpus=1, gpus=0).__enter__()
    assert over
