"""A hub id becomes a folder: from this machine if it is here, else from the hub, else one line in seconds.

folder = local_folder("Qwen/Qwen3-0.6B", weights=True)
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from configs import UserError
from model.language.model import load_language, load_tokenizer
from model.language.sources import local_folder

NAME = "org/tiny"


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set an empty hub cache, and a hub that refuses connections."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hub"


@pytest.fixture
def snapshot(hub_cache: Path, published: dict[str, Path]) -> Path:
    """Put the sharded model into the hub's cache, as if it had been downloaded."""
    commit = "a" * 40
    repo = hub_cache / "models--org--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    return Path(shutil.copytree(published["sharded"], repo / "snapshots" / commit))


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[Any]]]:
    """Return a function that starts a hub with one status code, and returns the headers it was sent."""
    servers = []

    def start(status: int) -> list[Any]:
        asked: list[Any] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append((self.path, self.headers.get("Authorization")))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        return asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("offline", "message"),
    [(True, "HF_HUB_OFFLINE is set"), (False, "cannot be reached: .*refused")],
)
def test_a_hub_id_is_refused_without_the_hub(
    offline: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(UserError, match=f"nobody/nothing.*{message}; give a local folder"):
        load_language("nobody/nothing")


@pytest.mark.parametrize(
    ("status", "message"),
    [(404, "returns 404"), (401, "returns 401 .*hf auth login"), (500, "500")],
)
def test_what_the_hub_answers_is_said(
    status: int, message: str, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    asked = answer(status)
    with pytest.raises(UserError, match=f"{message}.*give a local folder"):
        load_language(NAME)
    assert asked == [("/api/models/org/tiny", "Bearer hf_x")]


@pytest.mark.parametrize("source", ["Qwen 3", "é/b", "a/b..c", "", "org/name.git"])
def test_a_name_that_is_no_id_is_refused(source: str) -> None:
    with pytest.raises(UserError, match=r"no such folder.*give a local folder"):
        load_language(source)


def test_a_model_on_this_machine_needs_no_hub(snapshot: Path) -> None:
    assert local_folder(NAME, weights=True) == snapshot
    assert load_language(NAME)[0].config.num_hidden_layers == 2
    shutil.rmtree(snapshot / "nothing", ignore_errors=True)
    for shard in snapshot.glob("model-*.safetensors"):
        shard.unlink()
    load_tokenizer(NAME)  # needs no weights


def test_a_half_downloaded_model_names_the_command(snapshot: Path) -> None:
    shard = sorted(snapshot.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.unlink()
    with pytest.raises(UserError, match=r"missing: model-0.*hf download org/tiny --force-download"):
        load_language(NAME)
    shard.write_bytes(whole[:-5])
    with pytest.raises(UserError, match=r"truncated.*hf download org/tiny --force-download"):
        load_language(NAME)


def test_what_is_missing_is_downloaded(
    snapshot: Path, answer: Any, monkeypatch: pytest.MonkeyPatch, published: dict[str, Path]
) -> None:
    for shard in snapshot.glob("model-*.safetensors"):
        shard.unlink()
    answer(200)
    asked: list[Any] = []

    def download(source: str, **patterns: Any) -> str:
        asked.append((source, patterns))
        return str(published["sharded"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert local_folder(NAME, weights=True) == published["sharded"]
    assert "model*.safetensors" in asked[0][1]["allow_patterns"]
    assert not any("bin" in pattern for pattern in asked[0][1]["allow_patterns"])


def test_a_failed_download_is_one_line(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(source: str, **patterns: Any) -> str:
        raise OSError("Access to model org/tiny is restricted\nand you are not in the list")

    answer(200)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match=r"restricted and you .*give a local folder") as caught:
        local_folder(NAME, weights=True)
    assert "\n" not in str(caught.value)
