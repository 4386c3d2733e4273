"""`--push`: the exported folder on a hub, here one on the loopback address.

python -m model.export --run default --out exported --push org/name
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from configs import UserError
from model.export import exporter
from model.export.__main__ import main
from model.export.compare import MismatchError
from model.export.push import check_push, push
from model.vision.encoder import load_encoder
from tests.support import tiny_clip

# Of httpx, about how the hub's client gives it the bytes of a file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TOKEN = "hf_of_the_stand_in"


class Hub:
    """Repositories, files and requests of the stand-in."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.refuse: dict[str, tuple[int, str]] = {}
        """Part of a path -> status and message of the answer."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Be quiet."""

    def _answer(self, status: int, body: Any = None) -> None:
        data = json.dumps(body if body is not None else {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _handle(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub, path = self.hub, self.path.partition("?")[0]
        hub.requests.append(f"{self.command} {path}")
        for part, (status, message) in hub.refuse.items():
            if part in path:
                return self._answer(status, {"error": message})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/put/"):
            return self._answer(401, {"error": "Invalid username or password."})
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        host = f"http://{self.headers['Host']}"
        if path == "/api/repos/create":
            given = json.loads(data)
            name = f"{given['organization']}/{given['name']}"
            if name in hub.private:
                return self._answer(409, {"error": "exists", "url": f"{host}/{name}"})
            hub.private[name] = given["visibility"] == "private"
            hub.files[name] = {}
            return self._answer(200, {"url": f"{host}/{name}", "id": name, "name": name})
        if path.endswith("/preupload/main"):
            files = json.loads(data)["files"]
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs"
                    if one["path"].endswith((".safetensors", ".gguf"))
                    else "regular",
                    "shouldIgnore": False,
                }
                for one in files
            ]
            return self._answer(200, {"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{host}/put/{one['oid']}"}}}
                for one in json.loads(data)["objects"]
            ]
            return self._answer(200, {"transfer": "basic", "objects": objects})
        if self.command == "PUT":
            hub.objects[path.removeprefix("/put/")] = data
            return self._answer(200)
        if path.endswith("/commit/main"):
            name = path.removeprefix("/api/models/").removesuffix("/commit/main")
            for line in data.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    hub.files[name][value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    hub.files[name][value["path"]] = hub.objects[value["oid"]]
            url = f"{host}/{name}/commit/1"
            return self._answer(200, {"commitUrl": url, "commitOid": "1", "hookOutput": ""})
        if path.startswith("/api/models/"):
            name = path.removeprefix("/api/models/")
            if name in hub.private:
                return self._answer(200, {"id": name, "private": hub.private[name], "siblings": []})
        return self._answer(404, {"error": "not found"})

    do_GET = do_POST = do_PUT = _handle


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on the loopback address, and a token for it."""
    stand_in = Hub()
    handler = type("Handler", (_Handler,), {"hub": stand_in})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield stand_in
        server.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as an export leaves it."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "README.md").write_text("# mine\n")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 5)
    (folder / "mine-F32.gguf").write_bytes(b"GGUF" * 99)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("public", [False, True])
def test_every_file_is_uploaded(public: bool, hub: Hub, folder: Path) -> None:
    url = push(folder, "org/mine", public=public)
    assert url.endswith("/org/mine")
    assert hub.private == {"org/mine": not public}
    assert hub.files["org/mine"] == content(folder)
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert weights in hub.objects, "large files go through LFS"


def test_a_private_repository_is_updated(hub: Hub, folder: Path) -> None:
    push(folder, "org/mine", public=False)
    (folder / "config.json").write_text('{"a": 1}')
    push(folder, "org/mine", public=False)
    assert hub.files["org/mine"] == content(folder)


def test_a_public_repository_needs_a_word(hub: Hub, folder: Path) -> None:
    push(folder, "org/mine", public=True)
    before = dict(hub.files["org/mine"])
    (folder / "config.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match=r"org/mine exists and is public.*: hf upload org/mine"):
        push(folder, "org/mine", public=False)
    assert hub.files["org/mine"] == before
    push(folder, "org/mine", public=True)
    assert hub.files["org/mine"] == content(folder)


@pytest.mark.parametrize(
    ("part", "status", "message"),
    [
        (
            "create",
            401,
            r"log in with a token that may write: hf auth login, then: hf upload org/mine",
        ),
        ("create", 403, r"hf auth login, then: hf upload org/mine \S+ \. --private$"),
        ("preupload", 403, "hf auth login"),
        ("create", 400, r"not pushed to org/mine: .*quota.*try again: hf upload org/mine"),
        ("batch", 400, r"quota.*try again"),
        ("commit", 413, r"quota.*try again"),
    ],
)
def test_a_refusal_is_one_line(
    part: str, status: int, message: str, hub: Hub, folder: Path
) -> None:
    hub.refuse[part] = (status, "quota of the organisation")
    with pytest.raises(UserError, match=message) as caught:
        push(folder, "org/mine", public=False)
    text = str(caught.value)
    assert text.startswith(f"exported to {folder}, but not pushed to org/mine: ")
    assert "\n" not in text and TOKEN not in text
    assert not hub.files.get("org/mine")


def test_a_hub_that_is_not_there(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"not pushed to org/mine: .*try again: hf upload org/mine"):
        push(folder, "org/mine", public=False)


def test_no_token_is_said_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    words = ["--run", str(tmp_path / "missing"), "--out", str(tmp_path / "out"), "--push", "a/b"]
    with pytest.raises(UserError, match=r"--push a/b: no token for the hub; .*: hf auth login"):
        main(words)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine", r"is not ORG/NAME; give both: --push your-name/mine"),
        ("a/b/c", r"--push a/b/c: "),
        ("org/my model", r"--push 'org/my model': "),
        ("org/../x", r"--push org/\.\./x: "),
        ("", r"--push '': "),
        ("org/", r"--push org/: "),
        ("https://huggingface.co/org/mine", r"--push https://huggingface.co/org/mine: "),
    ],
)
def test_names_are_checked(name: str, message: str, hub: Hub) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_push(name)
    assert "\n" not in str(caught.value) and not hub.requests


def test_public_without_a_repository(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--public needs the name of a repository: --push ORG/NAME"):
        main(["--run", str(tmp_path), "--out", str(tmp_path / "out"), "--public"])


@pytest.mark.slow
def test_the_command(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    eyes = load_encoder(tiny_clip.entry(), device="cpu", random_weights=True)
    tiny_clip.save_trained(tmp_path / "run", eyes)
    words = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "mine"), "--push", "org/mine"]
    assert main(words) == 0
    assert hub.files["org/mine"] == content(tmp_path / "mine")
    assert "README.md" in hub.files["org/mine"] and hub.private["org/mine"]
    assert "/org/mine (private)" in capsys.readouterr().out


def test_nothing_is_pushed_unless_the_comparison_holds(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differs(*_: Any, **__: Any) -> None:
        raise MismatchError("prompt 1: a logit differs by 1 (limit 0.0001)")

    monkeypatch.setattr(exporter, "compare", differs)
    eyes = load_encoder(tiny_clip.entry(), device="cpu", random_weights=True)
    tiny_clip.save_trained(tmp_path / "run", eyes)
    words = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "mine"), "--push", "org/mine"]
    assert main(words) == 1
    assert not hub.requests and not (tmp_path / "mine").exists()
