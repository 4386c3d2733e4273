"""Data sets with images inside their files, killed and continued, equal an undisturbed job.

python -m encode.run --dataset hf:FineVision --encoder demo        # a table with the columns of FineVision
python -m encode.run --dataset 'webdataset:tars/*.tar' --encoder demo
"""

from __future__ import annotations

import base64
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cache.store.ledger import media_table
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.samples import samples_digest, samples_table
from cache.store.space import find_space
from encode import run as encode_run
from tests.support import ROOT
from tests.support.encode_jobs import draw
from tests.support.videos import make_video

FILES = 4
ROW_GROUP = 10_000
RATINGS = ("relevance", "visual_dependency", "image_correspondence", "formatting")
SCHEMA = pa.schema(
    {
        "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        "texts": pa.list_(pa.struct({"user": pa.string(), "assistant": pa.string()})),
        "source": pa.string(),
        **{f"{name}_ratings": pa.list_(pa.int64()) for name in RATINGS},
        **{f"{name}_min": pa.int64() for name in RATINGS},
    }
)


def drawn(number: int) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "png")
    return out.getvalue()


def images(rows: int, different: int) -> Iterator[bytes]:
    """Yield an image for each row: a new one from time to time, otherwise one of those before."""
    made = [drawn(number) for number in range(different)]
    for row in range(rows):
        newest = row * different // rows
        yield made[newest if row % 3 == 0 else (row * 2654435761) % (newest + 1)]


def write_tables(folder: Path, rows: int, different: int) -> str:
    """Write tables with the columns of FineVision; return the word for --dataset."""
    folder.mkdir()
    of_row = images(rows, different)
    row = 0
    for file in range(FILES):
        name = f"train-{file:05}-of-{FILES:05}.parquet"
        with pq.ParquetWriter(folder / name, SCHEMA) as writer:
            while row < rows * (file + 1) // FILES:
                some = range(row, min(row + ROW_GROUP, rows * (file + 1) // FILES))
                row = some.stop
                ratings = [[1 + n * 7 % 5, 1 + n * 3 % 5] for n in some]
                columns = {
                    "images": [[{"bytes": next(of_row), "path": None}] for _ in some],
                    "texts": [
                        [
                            {"user": f"What is image {n}?", "assistant": f"Noise {n % different}."},
                            {"user": "And where?", "assistant": f"At place {n % 13}."},
                        ]
                        for n in some
                    ],
                    "source": ["made"] * len(some),
                    **{f"{name}_ratings": ratings for name in RATINGS},
                    **{f"{name}_min": list(map(min, ratings)) for name in RATINGS},
                }
                writer.write_table(pa.table(columns, SCHEMA))
    return f"hf:{folder}"


def write_tars(folder: Path, rows: int, different: int) -> str:
    """Write tars as img2dataset does; return the word for --dataset."""
    folder.mkdir()
    of_row = images(rows, different)
    for file in range(FILES):
        with tarfile.open(folder / f"{file:05}.tar", "w") as tar:
            for row in range(rows * file // FILES, rows * (file + 1) // FILES):
                for suffix, data in (("png", next(of_row)), ("txt", f"Image {row}.".encode())):
                    info = tarfile.TarInfo(f"{row:09}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return f"webdataset:{folder}/{{00000..{FILES - 1:05}}}.tar"


@dataclass
class Job:
    """One run of encode.run in a process of its own."""

    dataset: str
    features: Path

    def start(self, commit_every_s: str = "0.5") -> subprocess.Popen[bytes]:
        words = ["--dataset", self.dataset, "--features", str(self.features), "--encoder", "demo"]
        words += ["--workers", "0", "--commit-every-s", commit_every_s]
        return subprocess.Popen(
            [sys.executable, "-m", "encode.run", *words],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def finish(self) -> tuple[float, int]:
        """Run to the end; return its seconds and its largest memory in bytes."""
        started = time.monotonic()
        process = self.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return time.monotonic() - started, usage.ru_maxrss * 1024

    def commits(self) -> int:
        return len(list(self.features.glob("spaces/*/commits/*.parquet")))

    def kill_after(self, commits: int) -> None:
        """Start, and kill once this many shards were committed."""
        wanted = self.commits() + commits
        process = self.start("0.1")
        while process.poll() is None and self.commits() < wanted:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the job ended before it was killed"


@pytest.mark.slow
@pytest.mark.soak_counted
@pytest.mark.parametrize(
    ("write", "counts", "different"),
    [(write_tables, (4_000, 1_000_000), (400, 2_000)), (write_tars, (2_000, 20_000), (400, 2_000))],
    ids=["tables", "tars"],
)
def test_a_killed_job_equals_an_undisturbed_one(
    tmp_path: Path,
    write: Callable[[Path, int, int], str],
    counts: tuple[int, int],
    different: tuple[int, int],
    soak: Callable[[int, int], int],
) -> None:
    rows, new, kills = soak(*counts), soak(*different), soak(1, 3)
    dataset = write(tmp_path / "data", rows, new)
    whole = Job(dataset, tmp_path / "whole")
    seconds, memory = whole.finish()
    killed = Job(dataset, tmp_path / "killed")
    dice = random.Random(0)
    for _ in range(kills):
        killed.kill_after(dice.randrange(1, soak(2, 20)))
    again, _ = killed.finish()
    print(
        f"{rows:,} rows, {new:,} different images: {rows / seconds:,.0f} rows/s, largest memory "
        f"{memory / 1e9:.2f} GB; the job that continued after {kills} kills took {again / seconds:.2f} of it"
    )

    readers = {}
    for job in (whole, killed):
        root = CacheRoot(job.features)
        reader = readers[job.features] = FeatureReader(find_space(root, None))
        assert reader.rows("image") == new
        assert reader.index["image"].doubled.size == 0
        table = media_table(root)
        assert len(table) == rows and pc.all(pc.equal(table["status"], "ok")).as_py()
        assert len(pc.unique(table["key"])) == new
    assert readers[whole.features].logical_hash() == readers[killed.features].logical_hash()
    (name,) = (path.parent.name for path in (whole.features / "samples").glob("*/*.parquet"))
    whole_root, killed_root = CacheRoot(whole.features), CacheRoot(killed.features)
    assert len(samples_table(whole_root, name, ["id"])) == rows
    assert samples_digest(whole_root, name) == samples_digest(killed_root, name)
    # The list of samples and sources is in memory, about 1 kB each; images are not.
    assert memory < 1.5e9 + 2_000 * rows


def test_equal_bytes_in_files_tables_tars_and_json_are_encoded_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each kind of source finds the rows of the others, `--check` reads all of them again."""
    folder = tmp_path / "files"
    paths = draw(folder, 3, side=40)
    paths.append(make_video(folder / "video.mp4", frames=30, fps=Fraction(10)))
    contents = [path.read_bytes() for path in paths]
    table = pa.table({"image": contents[:3], "caption": list("abc")})
    pq.write_table(table, tmp_path / "images.parquet")
    with pa.ipc.new_stream(tmp_path / "images.arrow", table.schema) as stream:
        stream.write_table(table)
    pq.write_table(pa.table({"video": contents[3:], "caption": ["d"]}), tmp_path / "videos.parquet")
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for path in paths:
            tar.add(path, path.name)
    uris = ["data:image/png;base64," + base64.b64encode(data).decode() for data in contents[:3]]
    lines = [json.dumps({"image": uri, "caption": "A text."}) for uri in uris]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    common = ["--encoder", "demo", "--workers", "0", "--max-frames", "5"]
    common += ["--features", str(tmp_path / "cache")]
    words = {
        f"folder:{folder}": 4,
        f"hf:{tmp_path}/images.parquet": 3,
        f"a=hf:{tmp_path}/images.arrow": 3,
        f"hf:{tmp_path}/videos.parquet": 1,
        f"webdataset:{tmp_path}/all.tar": 4,
        f"json:{tmp_path}/lines.jsonl": 3,
    }
    for number, (word, media) in enumerate(words.items()):
        assert encode_run.main(["--dataset", word, *common]) == 0
        encoded = media if number == 0 else 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert f"encoded={encoded} reused={media - encoded} failed=0" in last, word
    reader = FeatureReader(find_space(CacheRoot(tmp_path / "cache"), None))
    assert (reader.rows("image"), reader.rows("frame")) == (3, 5)
    for path in paths:  # so that only the other sources can be read
        path.unlink()
    assert encode_run.main(["--check", "99", *common]) == 0
    assert "3 images, 1 videos, 8 rows encoded again" in capsys.readouterr().out
