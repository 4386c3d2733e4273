"""PixMo's text from the hub: training files are downloaded once, and a failure gives one line.

hub_files("pixmo-count", "allenai/pixmo-count")     # paths of its Parquet files
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from configs import UserError
from encode.sources import pixmo_files
from encode.sources.catalogue import open_datasets
from tests.support import ROOT
from tests.support.pixmo_lists import HELD_OUT, write_pixmo

NAME = "pixmo-count"
REPOSITORY = f"allenai/{NAME}"
COMMIT = "c" * 40
URLS = [(f"https://x.org/{n}.jpg", None) for n in range(3)]


def refusal(tmp_path: Path, seconds: float) -> str:
    start = time.perf_counter()
    with pytest.raises(UserError) as caught:
        open_datasets([NAME], tmp_path)
    assert time.perf_counter() - start < seconds
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"data set {NAME} ({REPOSITORY} on the hub): ")
    assert message.endswith(
        f"(hf download {REPOSITORY} --repo-type dataset --local-dir DIR/{NAME}) and give --source DIR"
    )
    return message


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache of the hub client."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("offline", [True, False])
def test_an_unreachable_hub_is_an_error_within_seconds(
    offline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    if not offline:
        monkeypatch.setattr(pixmo_files, "unreachable", lambda: "huggingface.co does not answer")
    message = refusal(tmp_path, seconds=2)
    why = "HF_HUB_OFFLINE is set" if offline else "huggingface.co does not answer"
    assert f"it is not on this machine, and {why}; " in message


@pytest.mark.parametrize(
    "error",
    [
        OSError("disk full\nor so"),
        ValueError("bad\nrepository"),
        RuntimeError("Data processing error: CAS service error"),
        LocalEntryNotFoundError("gone"),
        KeyError("sha"),
    ],
)
def test_any_error_of_the_client_gives_one_line(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(pixmo_files, "unreachable", lambda: "")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    message = refusal(tmp_path, seconds=2)
    assert " ".join(str(error).split()) in message


def test_a_repository_without_parquet_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixmo_files, "unreachable", lambda: "")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(UserError, match=r"allenai/pixmo-count on the hub has no data/\*.parquet"):
        open_datasets([NAME], tmp_path)


def test_downloaded_files_need_no_hub(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = cache / f"datasets--allenai--{NAME}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    made = write_pixmo(tmp_path / "made", URLS)
    (folder / "snapshots").mkdir()
    (made / NAME).rename(folder / "snapshots" / COMMIT)
    (dataset,) = open_datasets([NAME], tmp_path)
    assert len(list(dataset.samples())) == len(URLS)


# ---- a hub that answers


class FakeHub(BaseHTTPRequestHandler):
    """The part of the hub's interface that the client uses to download a data set."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(f"{self.command} {path}")
        resolve = f"/datasets/{REPOSITORY}/resolve/{COMMIT}/"
        if path.startswith(f"/api/datasets/{REPOSITORY}/tree/"):
            listed = [
                {
                    "type": "file",
                    "path": self.name(f),
                    "size": f.stat().st_size,
                    "oid": self.etag(f),
                }
                for f in sorted(self.folder.rglob("*.parquet"))
            ]
            self.reply(json.dumps(listed).encode(), "application/json")
        elif path.startswith(f"/api/datasets/{REPOSITORY}"):
            info = {"id": REPOSITORY, "sha": COMMIT, "siblings": [], "private": False}
            self.reply(json.dumps(info).encode(), "application/json")
        elif path.startswith(resolve) and (self.folder / path.removeprefix(resolve)).is_file():
            file = self.folder / path.removeprefix(resolve)
            self.reply(file.read_bytes(), "application/octet-stream", etag=self.etag(file))
        else:
            self.send_error(404)

    def name(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()

    def etag(self, file: Path) -> str:
        return f"{hash(file.name) & (2**160 - 1):040x}"

    def reply(self, body: bytes, kind: str, etag: str | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if etag:
            self.send_header("ETag", f'"{etag}"')
            self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """Return the address of a hub that has pixmo-count, and a list of its requests."""
    folder = write_pixmo(tmp_path / "made", URLS) / NAME
    asked: list[str] = []
    handler = type("Handler", (FakeHub,), {"folder": folder, "asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


PROGRAM = """
import sys
from pathlib import Path
from configs import UserError
from encode.sources import pixmo_files
from encode.sources.catalogue import open_datasets
for name in sys.argv[1:]:
    try:
        for dataset in open_datasets([name], Path("nowhere")):
            for sample in dataset.samples():
                print(sample.id, sample.messages[1].content)
    except UserError as error:
        print("refused:", error)
print("torch" in sys.modules)
"""


def test_training_files_are_downloaded_once(served: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, asked = served
    proxies = {"http_proxy", "https_proxy", "all_proxy", "hf_hub_offline", "hf_token"}
    environment = {k: v for k, v in os.environ.items() if k.lower() not in proxies}
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
    }
    # pixmo-cap is not on this hub.
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, NAME, NAME, "pixmo-cap"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    *found, refused, torch = done.stdout.splitlines()
    assert torch == "False", "opening a data set does not import it"
    once = [f"train-00000-of-00001#{n} {n}" for n in range(3)]
    assert found == once + once
    gets = [path for path in asked if path.startswith("GET") and "/resolve/" in path]
    assert gets == [
        f"GET /datasets/{REPOSITORY}/resolve/{COMMIT}/data/train-00000-of-00001.parquet"
    ]
    assert not any("validation" in path or "test" in path for path in asked), "never asked for"
    assert not list((tmp_path / "home").rglob("*test-*")) and HELD_OUT not in done.stdout
    assert refused.startswith("refused: data set pixmo-cap (allenai/pixmo-cap on the hub): ")
    assert "404" in refused and refused.endswith("and give --source DIR")
