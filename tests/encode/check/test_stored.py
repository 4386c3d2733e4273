"""`encode.run --check N` finds stored rows that encoding does not give.

python -m encode.run --check 50 --features cache
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cache.errors import CorruptError, NotFoundError
from cache.format.codec import CODECS
from cache.store.ledger import append_media, read_media
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.space import Space, find_space
from cache.store.writer import ShardWriter
from configs import UserError
from encode import run as encode_run
from encode.check.report import CodecLoss
from encode.download.media_store import MediaStore
from tests.support.encode_jobs import draw
from tests.support.videos import make_video
from tests.support.web_server import TroubleServer

pytestmark = pytest.mark.slow


Run = Callable[..., tuple[int, str]]
ENCODER = ("--encoder", "demo", "--max-frames", "5", "--workers", "0")


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run_encode(*words: Any) -> tuple[int, str]:
        capsys.readouterr()
        code = encode_run.main([*ENCODER, "--features", str(tmp_path / "cache"), *map(str, words)])
        return code, capsys.readouterr().out

    return run_encode


@pytest.fixture
def photos(tmp_path: Path, run: Run) -> Path:
    """Return a folder of six images and a video of five frames, encoded."""
    folder = tmp_path / "photos"
    draw(folder, 6, side=40)
    make_video(folder / "video.mp4", frames=30, fps=Fraction(10))
    assert run("--dataset", f"folder:{folder}")[0] == 0
    return folder


def test_rows_of_a_reduced_decode_are_checked_by_a_reduced_decode(photos: Path, run: Run) -> None:
    draw(photos, 1, first=9, side=99)
    with Image.open(photos / "0009.png") as small:
        small.resize((397, 531)).save(photos / "large.jpg", quality=95)
    data = ("--dataset", f"folder:{photos}")
    assert run(*data, "--decode", "reduced")[0] == 0
    code, out = run("--check", 50, "--decode", "reduced")
    assert code == 0 and "equal    13 of 13 rows, to the bit" in out
    assert run(*data)[0] == 0  # the space of whole images has the new ones too
    code, out = run("--check", 50)
    assert code == 0 and "equal    13 of 13 rows, to the bit" in out
    with pytest.raises(UserError, match=r"none of 2 spaces .* --frame-pool 2 --decode reduced"):
        run("--check", 50, "--pool", 3)


def reader_of(tmp_path: Path) -> FeatureReader:
    return FeatureReader(find_space(CacheRoot(tmp_path / "cache"), None))


def test_rows_just_encoded_are_equal_to_the_bit(photos: Path, run: Run) -> None:
    code, out = run("--check", 50)
    assert code == 0
    assert "6 images, 1 videos, 11 rows encoded again" in out
    assert "equal    11 of 11 rows, to the bit" in out
    assert "ok: stored rows are what encoding gives" in out
    table = out[out.index("the same features of random-demo through each codec (random") :]
    lines = {line.split()[0]: line.split()[-4:] for line in table.splitlines()[2:]}
    assert list(lines) == list(CODECS)
    stored = out[out.index("error ") :].splitlines()[0].replace(",", "").split()
    assert lines["int8"][:2] == [stored[stored.index(w) + 1] for w in ("mean", "max")]
    assert 0.003 < float(lines["int8"][0]) <= float(lines["int8"][1]) < 0.008
    assert float(lines["fp16"][1]) < 0.001 and float(lines["fp16"][3]) > 0.99999


def test_the_draw_is_random_and_repeatable(photos: Path, run: Run) -> None:
    first, again = run("--check", 3), run("--check", 3)
    assert first == again and first[0] == 0
    assert "3 images, 3 rows" in first[1] or "2 images, 1 videos, 7 rows" in first[1]


def test_rows_of_another_image_are_found(photos: Path, run: Run, tmp_path: Path) -> None:
    """Two rows are exchanged; their bytes and checksums are intact."""
    ledger = read_media(CacheRoot(tmp_path / "cache"))
    space = Space.open(reader_of(tmp_path).paths)
    keys = [ledger[str(photos / f"{n:04d}.png")].key for n in range(6)]
    out = np.empty((6, space.spec.row_bytes("image")), np.uint8)
    reader = reader_of(tmp_path)
    reader.read_into("image", reader.lookup("image", [str(key) for key in keys]), out)
    out[[1, 3]] = out[[3, 1]]
    shard = ShardWriter(space, "image", space.next_shard("image"))
    for key, row in zip(keys, out, strict=True):
        shard.append(str(key), "full", row)
    shard.commit(replaces=space.paths.committed("image"))
    code, text = run("--check", 50)
    assert code == 1
    assert "equal    9 of 11 rows" in text and "2 of 11 rows differ by more than int8 loses" in text
    differing = [line for line in text.splitlines() if line.startswith("DIFFERS")]
    assert sorted(line.split("(")[1] for line in differing) == [
        f"{photos / '0001.png'})",
        f"{photos / '0003.png'})",
    ]


def test_changed_and_missing_files_are_left_out_and_counted(photos: Path, run: Run) -> None:
    (photos / "0000.png").unlink()
    (photos / "0001.png").write_bytes((photos / "0002.png").read_bytes())
    (photos / "video.mp4").write_bytes(b"no video")
    code, out = run("--check", 50)
    assert code == 0
    assert "left out 2 sources: file has changed since it was encoded" in out
    assert "left out 1 sources: file cannot be read: No such file or directory" in out
    assert "4 images, 4 rows" in out


def test_a_video_with_other_frames_than_the_stored_ones_is_left_out(photos: Path, run: Run) -> None:
    assert "6 images, 6 rows" in run("--max-frames", 4, "--check", 50)[1]


def test_media_from_the_web_are_read_from_the_kept_folder_or_downloaded(
    photos: Path, run: Run, tmp_path: Path
) -> None:
    root, kept = CacheRoot(tmp_path / "cache"), MediaStore(tmp_path / "kept")
    with TroubleServer(photos=1) as server:
        (photos / "web.jpg").write_bytes(server.image("photo-0"))
        run("--dataset", f"folder:{photos}")
        ledger = read_media(root)
        names = {"web.jpg": server.url("photo-0"), "0001.png": server.url("404")}
        names["0002.png"] = "https://a.example/x.png"
        for name, url in names.items():
            append_media(root, [replace(ledger[str(photos / name)], source=url)], "test")
        data = (photos / "0002.png").read_bytes()
        kept.put(hashlib.sha256(data).hexdigest(), data)
        for path in photos.iterdir():
            path.unlink()
        with pytest.raises(
            UserError, match=r"no media .* can be loaded \(.*3 from the web.*--keep"
        ):
            run("--check", 50)
        code, out = run("--check", 50, "--keep-media", tmp_path / "kept")
        assert code == 0 and "1 images, 1 rows" in out
        assert "left out 2 sources: from the web, and not kept" in out
        asked = ("--check-urls", "--allow-private", "--fetch-tries", 1)
        code, out = run("--check", 50, *asked, "--keep-media", tmp_path / "kept")
        assert code == 0 and "2 images, 2 rows" in out and "equal    2 of 2 rows" in out
        assert "left out 1 sources: download failed: fetch: HTTP 404" in out
        assert server.counts == {"/photo-0": 1, "/404": 1}


def test_mistakes_are_reported_in_one_line(photos: Path, run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--check 0: must be at least 1"):
        run("--check", 0)
    with pytest.raises(UserError, match="no such folder"):
        run("--check", 1, "--keep-media", tmp_path / "nowhere")
    with pytest.raises(NotFoundError, match=r"no data set 'demo-videos' under"):
        run("--check", 1, "--dataset", "demo-videos")
    assert run("--check", 1, "--codec", "fp16")[0] == 0  # the only space there is
    assert run("--dataset", f"folder:{photos}", "--codec", "fp16")[0] == 0
    assert "fp16-" in run("--check", 1, "--codec", "fp16")[1].splitlines()[0]
    with pytest.raises(
        UserError, match=r"none of 2 .* --codec int8 --format zarr --pool \d --frame-pool"
    ):
        run("--check", 1, "--pool", "7")
    root = CacheRoot(tmp_path / "cache")
    (int8,) = (name for name in root.space_names() if "int8" in name)
    shard = root.space(int8).shard("image", 0)
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptError, match="fails its checksum"):
        run("--check", 50)


def test_codec_loss_is_relative_and_zero_for_rows_of_zeros() -> None:
    loss = CodecLoss()
    x = torch.zeros(3, 1, 4)
    x[1], x[2] = torch.tensor([3.0, 0, 0, 4]), 1.0
    y = x.clone()
    y[1, 0, 3] = 4.5
    loss.add(x, y)
    assert loss.errors == pytest.approx([0, 0.1, 0])
    assert loss.cosines == pytest.approx([1, 27 / (5 * (9 + 4.5**2) ** 0.5), 1])


def test_files_that_changed_or_moved_are_to_be_encoded_again(
    photos: Path, run: Run, tmp_path: Path
) -> None:
    run("--dataset", f"folder:{photos}")
    photos.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"can be loaded \(.*\); encode the data set again"):
        run("--check", 50)
