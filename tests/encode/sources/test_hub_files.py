"""Files of a data set: of the right config and split, here or on the hub; a failure gives one line.

open_hub("pixmo-count", "allenai/pixmo-count", "", None).files      # downloaded once
open_local(Path("copies/the_cauldron"), "ai2d").files
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
from encode.sources import hub_files
from encode.sources.catalogue import choose, open_datasets
from encode.sources.hub_files import missing_from, open_hub, open_local
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
        monkeypatch.setattr(hub_files, "unreachable", lambda: "huggingface.co does not answer")
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

    monkeypatch.setattr(hub_files, "unreachable", lambda: "")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    message = refusal(tmp_path, seconds=2)
    assert " ".join(str(error).split()) in message


def test_a_repository_without_parquet_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_files, "unreachable", lambda: "")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: ["a.jsonl"])
    with pytest.raises(UserError, match=r"allenai/pixmo-count on the hub has no Parquet files"):
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


# ---- configs and splits

CARD = """---
license: odc-by
configs:
- config_name: one
  data_files:
  - split: train
    path: one/a-*
  - split: test
    path: one/b-*
- config_name: two
  data_files: "two/*.parquet"
- config_name: three
  data_files: {train: ["three/x.parquet", "three/y.parquet"], validation: three/z.parquet}
- config_name: four
  data_dir: four
- config_name: evil
  data_files: ["../../secret/*", "/etc/*", "one/a-0.parquet"]
- not a config
---
# A card
configs: none of these
"""


def make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def names_of(folder: Path, config: str = "") -> list[str]:
    return [path.relative_to(folder).as_posix() for path in open_local(folder, config).files]


def test_the_card_says_which_files_a_config_has(tmp_path: Path) -> None:
    make(tmp_path / "secret", "x.parquet")
    folder = make(
        tmp_path / "sets" / "copy",
        *("one/a-0.parquet", "one/a-1.parquet", "one/b-0.parquet", "one/c-0.parquet"),
        *("two/train-0.parquet", "two/test-0.parquet", "two/notes.txt"),
        *("three/x.parquet", "three/y.parquet", "three/z.parquet"),
        *("four/deep/0.parquet", "four/0.json"),
    )
    (folder / "README.md").write_text(CARD)
    assert names_of(folder, "one") == ["one/a-0.parquet", "one/a-1.parquet"]
    assert open_local(folder, "one").left_out == {"file of split test": 1}
    assert names_of(folder, "two") == ["two/train-0.parquet"]
    assert names_of(folder, "three") == ["three/x.parquet", "three/y.parquet"]
    assert names_of(folder, "four") == ["four/deep/0.parquet"]
    assert open_local(folder, "four").left_out == {".json file": 1}
    assert names_of(folder, "evil") == ["one/a-0.parquet"]
    with pytest.raises(
        UserError, match=r"has 5 data sets: one, two, three, four, evil; name one: --dataset"
    ):
        open_local(folder)
    with pytest.raises(UserError, match=r"has no 'tow'; there are one, .*; nearest: two"):
        open_local(folder, "tow")


@pytest.mark.parametrize(
    "card",
    ["", "---\n- [\n---\n", "---\nconfigs: 3\n---\n", "---\n" + "[" * 5000 + "\n---\n", "\0"],
)
def test_without_a_card_each_folder_is_a_config(tmp_path: Path, card: str) -> None:
    make(
        tmp_path,
        *("charts/train-00000-of-00002.parquet", "charts/train-00001-of-00002.parquet"),
        *("charts/validation-00000-of-00001.parquet", "charts/test-00000-of-00001.parquet"),
        *("tables/partial-train/0000.parquet", "tables/test/0000.parquet"),
        *(".cache/x.parquet", "LICENSE"),
    )
    (tmp_path / "README.md").write_text(card)
    assert names_of(tmp_path, "charts") == [
        f"charts/train-0000{n}-of-00002.parquet" for n in range(2)
    ]
    assert names_of(tmp_path, "tables") == ["tables/partial-train/0000.parquet"]
    with pytest.raises(UserError, match="has 2 data sets: charts, tables"):
        open_local(tmp_path)


def test_one_config_needs_no_name(tmp_path: Path) -> None:
    make(tmp_path / "a", "data/train-0.parquet", "data/dev-0.parquet", "data/more.jsonl")
    assert names_of(tmp_path / "a") == ["data/train-0.parquet"]
    assert open_local(tmp_path / "a").left_out == {".jsonl file": 1, "file of split dev": 1}
    make(tmp_path / "b", "latest.parquet", "contest-1.parquet")  # no split is named here
    assert names_of(tmp_path / "b") == ["contest-1.parquet", "latest.parquet"]
    assert names_of(make(tmp_path / "c", "mine/0.parquet")) == ["mine/0.parquet"]
    (found,) = open_local(tmp_path / "a" / "data" / "dev-0.parquet").files
    assert found.name == "dev-0.parquet"  # a file that is named is used


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    make(
        tmp_path / "a",
        "state.json",
        "dataset_info.json",
        "data-00000-of-00001.arrow",
        "cache-1.arrow",
    )
    assert names_of(tmp_path / "a") == ["data-00000-of-00001.arrow"]
    make(tmp_path / "b", "dataset_dict.json")
    for split in ("train", "test"):
        make(tmp_path / "b" / split, "state.json", "data-00000-of-00001.arrow")
    assert names_of(tmp_path / "b") == ["train/data-00000-of-00001.arrow"]
    assert open_local(tmp_path / "b").left_out == {"file of split test": 1}


def test_a_folder_without_tables_says_what_it_has(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl", "b.jsonl", "c.txt")
    with pytest.raises(
        UserError, match=r"\(there are 2 \.jsonl, 1 \.txt\); for a\.jsonl: --dataset json:"
    ):
        open_local(tmp_path)
    with pytest.raises(UserError, match=r"no Parquet or Arrow file; for b\.jsonl: --dataset json:"):
        open_local(tmp_path / "b.jsonl")
    with pytest.raises(UserError, match="no such folder or file"):
        open_local(tmp_path / "none")
    make(tmp_path / "d", "test-0.parquet")
    with pytest.raises(
        UserError, match=r"no training files, only test; to use one: --dataset hf:/"
    ):
        open_local(tmp_path / "d")


@pytest.mark.parametrize("place", ["x", "org/x", "org__x", "datasets--org--x/snapshots/c0ffee"])
def test_a_local_copy_is_found_below_the_source(tmp_path: Path, place: str) -> None:
    folder = make(tmp_path / place, "data/train-0.parquet")
    found = open_hub("set", "org/x", "", tmp_path)
    assert found is not None and found.files == (folder / "data" / "train-0.parquet",)
    assert open_hub("set", "org/y", "", tmp_path) is None
    for itself in {
        "x": [folder],
        "datasets--org--x/snapshots/c0ffee": [folder, folder.parents[1]],
    }.get(place, []):
        assert open_hub("set", "org/x", "", itself) == found


@pytest.mark.parametrize(
    ("word", "path", "config"),
    [
        ("hf:org/x", "", ""),
        ("hf:org/x:part", "", "part"),
        ("hf:{here}/copy", "copy", ""),
        ("hf:{here}/copy:part", "copy", "part"),
        ("mine=hf:{here}/copy:part", "copy", "part"),
    ],
)
def test_a_data_set_is_named_by_repository_or_folder_and_config(
    tmp_path: Path, word: str, path: str, config: str
) -> None:
    make(tmp_path / "copy", "part/train-0.parquet")
    (choice,) = choose([word.format(here=tmp_path)])
    assert choice.entry.source == "hf" and choice.entry.config == config
    assert choice.entry.path == (str(tmp_path / path) if path else "")
    assert choose([choice.word]) == [choice]


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
                for f in sorted(self.folder.rglob("*"))
                if f.is_file()
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
    for name in ("two/train-0", "two/test-00000-of-00001", "three/train-0"):
        make(folder, f"{name}.parquet")
        (folder / f"{name}.parquet").write_bytes(name.encode())
    card = "---\nconfigs:\n- config_name: default\n  data_files: data/*\n"
    (folder / "README.md").write_text(f"{card}- config_name: two\n  data_files: two/*\n---\n")
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
from encode.sources import hub_files
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


def test_only_the_files_of_one_config_are_downloaded(
    served: tuple[str, list[str]], tmp_path: Path
) -> None:
    endpoint, asked = served
    program = f"""
from encode.sources.hub_files import open_hub
print(*[path.read_bytes().decode() for path in open_hub("set", {REPOSITORY!r}, "two", None).files])
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment_for(endpoint, tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["two/train-0"], done.stderr
    assert [path.partition(COMMIT)[2] for path in asked if path.startswith("GET /datasets/")] == [
        "/README.md",
        "/two/train-0.parquet",
    ]


def environment_for(endpoint: str, tmp_path: Path) -> dict[str, str]:
    """Return the environment of a process that uses this hub, with nothing downloaded before."""
    proxies = {"http_proxy", "https_proxy", "all_proxy", "hf_hub_offline", "hf_token"}
    environment = {k: v for k, v in os.environ.items() if k.lower() not in proxies}
    return environment | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
    }


def test_training_files_are_downloaded_once(served: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, asked = served
    # pixmo-cap is not on this hub.
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, NAME, NAME, "pixmo-cap"],
        env=environment_for(endpoint, tmp_path),
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
    resolve = f"GET /datasets/{REPOSITORY}/resolve/{COMMIT}"
    assert gets == [f"{resolve}/README.md", f"{resolve}/data/train-00000-of-00001.parquet"]
    assert not any("validation" in path or "test" in path for path in asked), "never asked for"
    assert not list((tmp_path / "home").rglob("*test-*")) and HELD_OUT not in done.stdout
    assert refused.startswith("refused: data set pixmo-cap (allenai/pixmo-cap on the hub): ")
    assert "404" in refused and refused.endswith("and give --source DIR")


def test_a_copy_of_another_name_as_source_is_answered_with_its_own_word(tmp_path: Path) -> None:
    copy = make(tmp_path / "my copy", "part/train-0.parquet")
    assert open_hub("set", "org/x", "part", copy) is None
    error = str(missing_from(copy, {"set": "org/x"}))
    assert f"--dataset 'hf:{copy}' (:CONFIG) without --source. Get one: hf download org/x" in error
    assert "copy itself" not in str(missing_from(tmp_path, {"set": "org/x"}))
