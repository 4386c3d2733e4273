"""The hub: weights that cannot be downloaded give one line within seconds.

with pytest.raises(UserError, match="--weights PATH"):
    hub.fetch("org/model/", encoder="clip")
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import open_clip
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors.torch import save_file

from configs import UserError
from model.io import hub
from model.language import sources
from model.vision.config import encoder_config
from model.vision.encoder import load_encoder
from tests.support import tiny_clip

PLACE = "org/tiny-clip/"
GONE = SimpleNamespace(status_code=404, headers={}, request=None)
NOT_FOUND = RemoteEntryNotFoundError("404", response=GONE)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set an empty hub cache, no proxy, and a hub that refuses connections."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Listen on a port and yield its number."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def refusal(seconds: float) -> str:
    start = time.perf_counter()
    with pytest.raises(UserError) as caught:
        hub.fetch(PLACE, encoder="tiny")
    assert time.perf_counter() - start < seconds
    message = str(caught.value)
    assert "\n" not in message and "--weights PATH" in message and "org/tiny-clip" in message
    return message


def test_a_refused_connection_fails_fast() -> None:
    assert "127.0.0.1 cannot be reached" in refusal(2)


def test_a_name_lookup_that_hangs_fails_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(hub, "PROBE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(5) or [])
    assert "no answer from hub.invalid" in refusal(2)


def test_offline_mode_fails_without_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(0.5)


def test_a_proxy_is_tried_instead_of_the_hub(
    listener: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hub.unreachable()
    for value in (f"http://127.0.0.1:{listener}", f"127.0.0.1:{listener}"):
        monkeypatch.setenv("http_proxy", value)
        assert hub.unreachable() == ""


def test_safetensors_are_downloaded_first(
    listener: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def download(repo: str, name: str) -> str:
        asked.append(f"{repo}/{name}")
        if name.endswith(".safetensors"):
            raise NOT_FOUND
        return str(tmp_path / name)

    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listener}")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert hub.fetch(PLACE, encoder="tiny") == tmp_path / "open_clip_pytorch_model.bin"
    assert asked == [
        "org/tiny-clip/open_clip_model.safetensors",
        "org/tiny-clip/open_clip_pytorch_model.bin",
    ]


@pytest.mark.parametrize(
    "error",
    [OSError("disk full\nor so"), LocalEntryNotFoundError("gone"), NOT_FOUND],
)
def test_a_failed_download_gives_one_line(
    error: Exception, listener: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(repo: str, name: str) -> str:
        raise error

    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listener}")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    refusal(2)


@pytest.mark.parametrize(
    ("error", "way_out"),
    [
        (GatedRepoError, "it is gated: accept its terms .* then log in: hf auth login"),
        (RepositoryNotFoundError, "it needs a login: hf auth login"),
    ],
)
def test_a_model_that_needs_a_login_names_the_command(
    error: Any, way_out: str, listener: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(repo: str, *_: object, **__: object) -> str:
        text = (
            f"401 Client Error. (Request ID: {'x' * 200})\nAccess to {repo} is restricted. Log in."
        )
        raise error(text, response=NOT_FOUND.response)

    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listener}")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for fetch in (hub.fetch, hub.fetch_folder):
        with pytest.raises(
            UserError, match=rf"{way_out}; give org/tiny-clip as a local"
        ) as refused:
            fetch(PLACE.rstrip("/") if fetch is hub.fetch_folder else PLACE, encoder="tiny")
        assert "\n" not in str(refused.value)
    monkeypatch.setattr(sources, "_hub_problem", lambda source: "")  # as of a gated model
    with pytest.raises(
        UserError, match=rf"org/tiny: cannot be downloaded: .*{way_out}; give a local"
    ):
        sources.local_folder("org/tiny", weights=True)


def test_weights_in_the_hub_cache_need_no_network(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_clip.register(cache)
    record = {"hf_hub": PLACE, "mean": (0.5,) * 3, "std": (0.5,) * 3, "quick_gelu": True}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-quickgelu", {"mine": record})
    commit = "a" * 40
    repo = cache / "models--org--tiny-clip"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    file = repo / "snapshots" / commit / "open_clip_model.safetensors"
    save_file(tiny_clip.open_clip_checkpoint(), file)
    config = tiny_clip.entry(pretrained="mine", mean=None, std=None)
    encoder = load_encoder(config, device="cpu")
    assert encoder.load_info()["weights"] == str(file)
    assert encoder.spec("fp16").mean == (0.5, 0.5, 0.5)


def snapshot(cache: Path) -> Path:
    """Return the folder that the hub's client uses for facebook/dinov2-tiny."""
    commit = "b" * 40
    repo = cache / "models--facebook--dinov2-tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    return repo / "snapshots" / commit


def test_a_tower_in_the_hub_cache_needs_no_network(cache: Path) -> None:
    folder = snapshot(cache)
    with pytest.raises(
        UserError, match=r"facebook/dinov2-tiny is not on this machine, and .* cannot"
    ):
        encoder_config("hf:facebook/dinov2-tiny")
    tiny_clip.save_tower(folder, tiny_clip.transformers_tower("dinov2"))
    config = encoder_config("hf:facebook/dinov2-tiny")
    assert config.model == "facebook/dinov2-tiny" and config.blocks == (2,)
    encoder = load_encoder(config, device="cpu")
    assert encoder.spec("fp16").encoder == "hf-dinov2-tiny"
    assert encoder.load_info()["weights"] == str(folder)


def test_a_tower_is_downloaded_without_code_or_pickles(
    cache: Path, listener: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = snapshot(cache)
    offered = ["config.json", "preprocessor_config.json", "model.safetensors", "evil.py"]
    offered += ["pytorch_model.bin", "tokenizer.json", "onnx/model.onnx"]

    def download(repo: str, *, allow_patterns: list[str]) -> str:
        taken = [n for n in offered if any(fnmatch(n, pattern) for pattern in allow_patterns)]
        assert taken == offered[:3]
        return str(tiny_clip.save_tower(folder, tiny_clip.transformers_tower("dinov2")))

    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listener}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert encoder_config("hf:facebook/dinov2-tiny").blocks == (2,)


def test_the_default_encoder_without_weights_names_a_way_out() -> None:
    with pytest.raises(
        UserError, match=r"clip-vit-l14-336: .*vit_large_patch14_clip_336\.openai.*--weights PATH"
    ):
        load_encoder(encoder_config("clip-vit-l14-336"), device="cpu")
    with pytest.raises(UserError, match=r"names no weights on the hub.*--weights PATH"):
        load_encoder(
            encoder_config("clip-vit-l14-336", pretrained="", mean=(0.5,) * 3, std=(0.5,) * 3)
        )
