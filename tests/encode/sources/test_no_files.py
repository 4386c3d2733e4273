"""A FIFO, a device or a file without end in a data set: named at once, never waited for or read whole.

put_in_place(photos / "metadata.jsonl", "a FIFO")
python -m encode.run --dataset folder:photos        # error: photos/metadata.jsonl: a FIFO, not a file; ...
"""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import UserError
from encode.records import json_window, stream
from encode.records.account import Account
from encode.sources.catalogue import open_datasets
from tests.support.faults import NO_FILES, in_time, put_in_place
from tests.support.photos import make_folder
from tests.support.pixmo_lists import write_pixmo

LINES = [{"image": f"{n}.jpg", "caption": f"Caption {n}."} for n in range(3)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one small data set of each kind."""
    folder = tmp_path_factory.mktemp("data")
    photo = make_folder(folder / "all")
    first = next(path for path in sorted(photo.rglob("*.jpg")))
    for name in ("beside", "listed", "records"):
        (folder / name).mkdir()
        for n in range(3):
            shutil.copy(first, folder / name / f"{n}.jpg")
    (folder / "beside" / "0.txt").write_text("A caption.")
    (folder / "beside" / "1.json").write_text('{"caption": "Another one."}')
    text = "".join(json.dumps(line) + "\n" for line in LINES)
    (folder / "listed" / "metadata.jsonl").write_text(text)
    (folder / "records" / "lines.jsonl").write_text(text)
    (folder / "records" / "list.json").write_text(json.dumps(LINES))
    (folder / "records" / "table.csv").write_text("image,caption\n0.jpg,One\n1.jpg,Two\n")
    plain = {"image": ["0.jpg", "1.jpg"], "caption": ["One.", "Two."]}
    pq.write_table(pa.table(plain), folder / "records" / "table.parquet")
    cells = [{"bytes": first.read_bytes(), "path": None}] * 2
    inside = pa.table({"image": cells, "caption": ["One.", "Two."]})
    for name in ("hub", "card", "saved"):
        (folder / name / "data").mkdir(parents=True)
    for n in range(2):
        pq.write_table(inside, folder / "hub" / "data" / f"train-0000{n}-of-00002.parquet")
        pq.write_table(inside, folder / "card" / "data" / f"train-0000{n}-of-00002.parquet")
        with pa.ipc.new_stream(
            folder / "saved" / f"data-0000{n}-of-00002.arrow", inside.schema
        ) as f:
            f.write_table(inside)
    (folder / "saved" / "state.json").write_text("{}")
    (folder / "card" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: data/*.parquet\n---\n"
    )
    for n in range(2):
        with tarfile.open(folder / f"{n}.tar", "w") as tar:
            for path in (folder / "beside" / "0.jpg", folder / "beside" / "0.txt"):
                tar.add(path, path.name)
    write_pixmo(folder / "copies", [(f"https://x.org/{n}.jpg", None) for n in range(3)])
    return folder


FILES = {
    "beside/0.jpg": ("folder:beside", ""),
    "beside/0.txt": ("folder:beside", ""),
    "beside/1.json": ("folder:beside", ""),
    "listed/metadata.jsonl": ("folder:listed", ""),
    "listed/1.jpg": ("folder:listed", ""),
    "records/lines.jsonl": ("json:records/lines.jsonl", ""),
    "records/list.json": ("json:records/list.json", ""),
    "records/table.csv": ("json:records/table.csv", ""),
    "records/table.parquet": ("json:records/table.parquet", ""),
    "records/1.jpg": ("json:records/lines.jsonl", ""),
    "hub/data/train-00001-of-00002.parquet": ("hf:hub", ""),
    "card/data/train-00001-of-00002.parquet": ("hf:card", ""),
    "card/README.md": ("hf:card", ""),
    "saved/data-00001-of-00002.arrow": ("hf:saved", ""),
    "saved/state.json": ("hf:saved", ""),
    "1.tar": ("webdataset:*.tar", ""),
    "copies/pixmo-cap/data/train-00000-of-00001.parquet": ("pixmo-cap", "copies"),
}
"""File -> `--dataset` and `--source` that read it."""
NO_MATTER = {"saved/state.json": NO_FILES, "card/README.md": ["a dangling link"]}
"""File -> what in its place changes nothing: it is not read, or what is said there is not needed."""
REASONS = {
    "a FIFO": "a FIFO, not a file|noted: 1 no such file",
    "a socket": "a socket, not a file|noted: 1 no such file",
    "a device": "a device, not a file|file outside the folder",
    "a folder": "",  # never mistaken for a file
    "a link to itself": "symbolic links|broken link|no such file",
    "a dangling link": "[Nn]o such file|broken link",
    "empty": "",
    "zeros": "",
    "10 GB": "",
}
"""What is in the place of a file -> what is said about it."""


@pytest.mark.parametrize("what", REASONS)
@pytest.mark.parametrize("file", FILES)
def test_what_is_no_file_is_named(
    data: Path,
    tmp_path: Path,
    file: str,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Small limits, so that 10 GB are no slower than 64 MiB.
    for module, name, size in (
        *((module, "MAX_BYTES", 1 << 20) for module in (stream, json_window)),
        *((module, "MOST_SKIPPED", 4 << 20) for module in (stream, json_window)),
    ):
        monkeypatch.setattr(module, name, size)
    top = Path(file).parts[0]
    if (data / top).is_dir():
        shutil.copytree(data / top, tmp_path / top)
        assert (tmp_path / file).exists(), "the table names no file"
    else:
        shutil.copy(data / "0.tar", tmp_path)
    put_in_place(tmp_path / file, what)
    word, source = FILES[file]
    kind, colon, place = word.partition(":")
    for leave_out in (False, True):
        account = Account(name="set", leave_out=leave_out)
        with in_time():
            try:
                (dataset,) = open_datasets(
                    [f"{kind}:{tmp_path / place}" if colon else word],
                    tmp_path / "cache",
                    source=tmp_path / source if source else None,
                )
                found = list(dataset.samples({}, account))
                account.close()
                assert found
                said = f"{account.text()} {account.first_faults}"
            except UserError as error:
                said = str(error)
        assert len(said) < 5000
        reason = "" if what in NO_MATTER.get(file, ()) else REASONS[what]
        if not re.search(reason, said):
            pytest.fail(f"{what} as {file}: {said}")


def test_a_card_with_aliases_of_aliases_is_refused_before_they_are_written_out(data: Path) -> None:
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    lines += ["configs:", "- config_name: default", "  data_files: *a11"]
    card = "\n".join(["---", *lines, "---", ""])
    folder = data / "card"
    (folder / "README.md").write_text(card)
    with in_time():
        assert len(open_datasets([f"hf:{folder}"], data / "cache")) == 1
