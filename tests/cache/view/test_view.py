"""A feature space as one HTML page.

    python -m cache.view --features cache --out view.html

Every number on the page is what zarr-python and the commit files say. The page loads nothing, runs one
script, and never takes text as markup.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cache.errors import CacheError, CorruptError
from cache.format import codec
from cache.format.embedded.names import member_source
from cache.format.frame_sampling import time_view
from cache.format.spec import FeatureSpec
from cache.maintenance.local_media import LocalMedia
from cache.store.ledger import MediaRecord, append_media
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.samples import MediaRef, Message, Sample, write_samples
from cache.store.shard_files import LocalFiles
from cache.store.space import Space
from cache.store.writer import ShardWriter
from cache.view import __main__ as view
from cache.view import collect, media, sampling, statistics, thumbnails
from cache.view.collect import Findings, gather
from cache.view.media import thumbnail
from cache.view.sections import render
from configs import UserError
from model.media import images as model_images
from model.media.fit import fit_image
from model.media.images import decode_image
from tests.support.html_page import Page, loads_nothing
from tests.support.photos import heic_file
from tests.support.spaces import SPEC, features, key, make_space

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;<b>"
"""Text that a caption, a path or a server may hold."""


def shard(space: Space, rows: Sequence[tuple[str, str, int, float | None]], array: str) -> None:
    """Commit a shard of rows (key, view, number, time_s). The number decides features and error."""
    writer = ShardWriter(space, array, space.next_shard(array))
    for name, at, number, time_s in rows:
        packed = codec.pack(features(number, array, space.spec), space.spec.codec)
        writer.append(name, at, packed, error=number / 1000, time_s=time_s)
    writer.commit()
    space.grow(array)


def images(space: Space, numbers: Sequence[int]) -> None:
    """Commit made-up images, four a shard."""
    for start in range(0, len(numbers), 4):
        shard(space, [(key(n), "full", n, None) for n in numbers[start : start + 4]], "image")


def video(space: Space, number: int, frames: int, *, backwards: bool = False) -> None:
    """Commit a video with two frames a second; their numbers are 100 * number + 0, 1, ..."""
    views = [(key(number), time_view(500_000 * i), 100 * number + i, i / 2) for i in range(frames)]
    shard(space, views[::-1] if backwards else views, "frame")


def find(root: Path, count: int = 24, seed: int = 0, media: Path | None = None) -> Findings:
    (name,) = CacheRoot(root).space_names()
    reader = FeatureReader(CacheRoot(root).space(name))
    return gather(CacheRoot(root), reader, images=count, seed=seed, media=media)


def below(folder: Path) -> LocalMedia:
    """What opens files below a folder."""
    return LocalMedia(CacheRoot(folder / "cache"), media=folder)


# ---- figures


@pytest.mark.parametrize("codec_name", ["fp16", "int8"])
def test_figures_are_what_zarr_and_the_commits_say(tmp_path: Path, codec_name: str) -> None:
    space = make_space(tmp_path, codec_name)
    images(space, range(1, 11))
    video(space, 3, 4)
    found = find(tmp_path)
    assert [(one.chosen.array, one.chosen.of) for one in found.shown].count(("image", 1)) == 10
    recorded = {}
    for path in sorted(space.paths.commits_dir.glob("*.parquet")):
        array = path.name.split("-")[0]
        recorded |= {
            (array, row["key"].hex(), row["view"]): row for row in pq.read_table(path).to_pylist()
        }
    arrays = {
        array: zarr.open_array(space.paths.array(array), mode="r") for array in ("image", "frame")
    }
    for one in found.shown:
        for at, at_view in enumerate(one.chosen.views):
            row = recorded[one.chosen.array, one.chosen.key, at_view]
            stored = np.asarray(arrays[one.chosen.array][row["row"]]).astype(np.float32)
            side = round(len(stored) ** 0.5)
            norms = np.linalg.norm(stored.astype(np.float64), axis=-1).reshape(side, side)
            np.testing.assert_allclose(one.norms[at], norms, rtol=1e-5)
            assert one.chosen.errors[at] == row["error"]
            assert row["time_s"] in (None, one.chosen.times[at])
            colours = found.basis.colours(stored).reshape(side, side, 3)
            # The page projects all frames of a video in one product: the last bit may differ.
            assert np.abs(one.colours[at].astype(int) - colours).max() <= 1
            limit = 2 * found.norms[one.chosen.array].median
            assert (one.outliers[at] == (norms > limit)).all()
    errors = [row["error"] for (array, *_), row in recorded.items() if array == "image"]
    text = Page(render(found)).text
    assert f"Images: mean {np.mean(errors):.3%}" in text
    assert f"max {max(errors):.3%} (10 rows)" in text
    every = np.stack(
        [
            np.asarray(arrays["image"][row["row"]])
            for (array, *_), row in recorded.items()
            if array == "image"
        ]
    )
    tokens = every.reshape(-1, 64).astype(np.float64)
    np.testing.assert_allclose(found.channels.mean, tokens.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found.channels.std, tokens.std(axis=0), rtol=1e-5)
    assert found.norms["image"].median == pytest.approx(np.median(np.linalg.norm(tokens, axis=1)))


@pytest.mark.parametrize("count", [40, 900])  # fewer tokens than channels, and more
def test_directions_are_those_of_a_singular_value_decomposition(count: int) -> None:
    rng = np.random.default_rng(0)
    tokens = (rng.normal(size=(count, 64)) * np.geomspace(9, 0.1, 64) + 5).astype(np.float32)
    tokens[::10] *= 50  # outliers would be the first direction
    outliers = np.zeros(count, bool)
    outliers[::10] = True
    basis = statistics.fit_basis(tokens, outliers)
    usual = tokens[~outliers].astype(np.float64)
    _, singular, rows = np.linalg.svd(usual - usual.mean(axis=0), full_matrices=False)
    shares = singular**2 / (singular**2).sum()
    np.testing.assert_allclose(basis.shares, shares[: len(basis.shares)], atol=1e-5)
    assert abs(np.abs((basis.directions[:3] * rows[:3]).sum(axis=1)) - 1).max() < 1e-3
    assert (
        np.take_along_axis(basis.directions, np.abs(basis.directions).argmax(1)[:, None], 1) > 0
    ).all()
    colours = basis.colours(tokens[~outliers])
    ends = [(colours[:, c] == end).mean() for c in range(3) for end in (0, 255)]
    assert all(0 < share <= 0.06 for share in ends)  # the scale is used to both its ends


def test_the_nearest_neighbour_is_the_most_similar_other_one() -> None:
    rng = np.random.default_rng(1)
    means = rng.normal(size=(9, 64)).astype(np.float32) + 30  # a constant would make all alike
    centred = means - means.mean(axis=0)
    for at, (other, cosine) in enumerate(statistics.neighbours(means)):
        found = {
            i: float(v @ centred[at] / np.linalg.norm(v) / np.linalg.norm(centred[at]))
            for i, v in enumerate(centred)
            if i != at
        }
        assert other == max(found, key=found.__getitem__)
        assert cosine == pytest.approx(found[other], abs=1e-5)
    assert statistics.neighbours(means[:2]) == []


def test_the_script_compares_tokens_by_their_cosine(tmp_path: Path) -> None:
    images(make_space(tmp_path), range(6))
    found = find(tmp_path)
    codes = found.token_codes.astype(np.float64)
    rows = [sampling.read_rows(found.reader, "image", one.chosen.rows) for one in found.shown]
    vectors = found.basis.project(np.concatenate(rows).reshape(-1, 64), codes.shape[1])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert np.abs(codes @ codes.T / 127**2 - unit @ unit.T).max() < 0.03
    page = Page(render(found))
    starts = [int(tag["data-at"] or 0) for tag in page.all("div") if "data-at" in tag]
    assert starts == [4 * at for at in range(6)]
    (data,) = (text for attrs, text in page.scripts if attrs.get("type") == "text/plain")
    assert base64.b64decode(data) == found.token_codes.tobytes()


def test_a_ring_is_where_the_outlier_is(tmp_path: Path) -> None:
    space = make_space(tmp_path, "fp16")
    values = features(1)
    values[2] *= 5
    writer = ShardWriter(space, "image", 0)
    writer.append(key(0), "full", codec.pack(features(0), "fp16"))
    writer.append(key(1), "full", codec.pack(values, "fp16"))
    writer.commit()
    first, second = find(tmp_path).shown
    assert not first.outliers.any()
    assert second.outliers.tolist() == [[[False, False], [True, False]]]
    page = Page(render(find(tmp_path)))
    (circle,) = page.all("circle")
    assert (circle["cx"], circle["cy"]) == ("0.5", "1.5")


def test_the_script_has_as_many_directions_as_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images(make_space(tmp_path), range(4))
    monkeypatch.setattr(collect, "MAX_CODE_BYTES", 16 * 9)
    assert find(tmp_path).token_codes.shape == (16, 9)
    monkeypatch.setattr(collect, "MAX_CODE_BYTES", 16 * 7)
    found = find(tmp_path)
    assert found.token_codes.size == 0
    assert len(Page(render(found)).scripts) == 1


# ---- which rows


@given(st.integers(0, 40), st.integers(0, 10**7), st.integers(0, 2**32))
def test_a_draw_has_one_row_of_each_equal_stretch(count: int, total: int, seed: int) -> None:
    drawn = sampling.spread(count, total, np.random.default_rng(seed))
    assert len(drawn) == min(count, total)
    edges = np.linspace(0, total, len(drawn) + 1).astype(np.int64)
    assert ((edges[:-1] <= drawn) & (drawn < edges[1:])).all()


def test_equal_seeds_give_equal_pages(tmp_path: Path) -> None:
    space = make_space(tmp_path)
    images(space, range(40))
    video(space, 1, 3)
    pages = [render(find(tmp_path, 5, seed)) for seed in (0, 0, 1)]
    assert pages[0] == pages[1] != pages[2]
    assert "--images 5 --seed 1" in pages[2]
    found = find(tmp_path, 5)
    assert [one.chosen.array for one in found.shown] == ["image"] * 4 + ["frame"]
    assert len({one.chosen.key for one in found.shown}) == 5


def test_videos_fill_up_a_page_with_few_images(tmp_path: Path) -> None:
    space = make_space(tmp_path)
    images(space, range(2))
    for number in range(10, 16):
        video(space, number, 2)
    assert [one.chosen.array for one in find(tmp_path, 6).shown] == ["image"] * 2 + ["frame"] * 4


def test_frames_are_in_time_order_and_evenly_spaced(tmp_path: Path) -> None:
    space = make_space(tmp_path)
    video(space, 1, 15, backwards=True)
    video(space, 2, 3)
    video(space, 3, 1)
    found = {one.chosen.key: one for one in find(tmp_path).shown}
    assert found.keys() == {key(1), key(2), key(3)}
    long = found[key(1)]
    assert long.chosen.times.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert long.chosen.errors * 1000 == pytest.approx([100 + 2 * i for i in range(8)])
    assert long.chosen.of == 15
    page = Page(render(find(tmp_path)))
    assert re.findall(r"\d\.\d\d s", page.text)[:8] == [f"{i}.00 s" for i in range(8)]
    assert "Images" not in page.text  # a space of frames alone


def test_a_few_rows_of_a_large_space_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = make_space(tmp_path)
    images(space, range(240))
    monkeypatch.setattr(sampling, "SAMPLE_ROWS", 6)
    read: list[int] = []

    class Counting:  # not a LocalFiles, which has more ways to read
        def __init__(self, files: LocalFiles) -> None:
            self._files = files

        def read(self, array: str, shard: int, offset: int, targets: Any) -> None:
            read.append(sum(map(len, targets)))
            self._files.read(array, shard, offset, targets)

    reader = FeatureReader(space.paths)
    sizes = {array: index.nbytes for array, index in reader.index.items()}
    reader = FeatureReader(space.paths, files=Counting(LocalFiles(space.paths, sizes)))
    found = gather(CacheRoot(tmp_path), reader, images=4, seed=0)
    assert sum(read) == 10 * reader.geometry["image"].row_bytes
    assert found.norms["image"].rows == 6


def other_space(folder: Path, **changes: Any) -> Space:
    spec: FeatureSpec = dataclasses.replace(SPEC, **changes)
    return Space.create(CacheRoot(folder), spec, {}, shard_bytes=4 * spec.row_bytes("image"))


def test_pooled_grids_and_cls_tokens_are_shown_right(tmp_path: Path) -> None:
    images(other_space(tmp_path / "pooled", pool_image=2), range(3))
    assert find(tmp_path / "pooled").shown[0].colours.shape == (1, 1, 1, 3)
    assert "1 × 1 tokens, each the mean of 2 × 2 patches" in render(find(tmp_path / "pooled"))
    space = other_space(tmp_path / "cls", keep_cls=True, pool_frame=1)
    images(space, range(3))
    for one in find(tmp_path / "cls").shown:
        stored = sampling.read_rows(find(tmp_path / "cls").reader, "image", one.chosen.rows)[0]
        norms = np.linalg.norm(stored, axis=1)
        assert one.cls_norms[0] == pytest.approx(norms[0])
        np.testing.assert_allclose(one.norms.ravel(), norms[1:], rtol=1e-6)
    page = Page(render(find(tmp_path / "cls")))
    assert "2 × 2 tokens of 64 and a CLS token" in page.text


@pytest.mark.parametrize("numbers", [[0], [0, 1]])
def test_one_or_two_rows_give_a_page(tmp_path: Path, numbers: list[int]) -> None:
    images(make_space(tmp_path), numbers)
    assert len(Page(render(find(tmp_path))).all("article")) == len(numbers)


def test_equal_tokens_give_a_page(tmp_path: Path) -> None:
    space = make_space(tmp_path, "fp16")
    writer = ShardWriter(space, "image", 0)
    for number in range(3):
        writer.append(key(number), "full", np.zeros(512, np.uint8))
    writer.commit()
    page = Page(render(find(tmp_path)))
    assert len(page.all("article")) == 3
    assert "nan" not in page.text.lower()


# ---- the page


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the page of a cache in which every text from outside is HOSTILE."""
    folder = tmp_path_factory.mktemp("hostile")
    space = make_space(folder)
    images(space, range(4))
    video(space, 9, 2)
    root = CacheRoot(folder)
    sources = [f"/nowhere/{number}{HOSTILE}" for number in range(4)]
    append_media(
        root,
        [
            *(
                MediaRecord(source=s, key=key(n), width=40, height=20, note=HOSTILE)
                for n, s in enumerate(sources)
            ),
            MediaRecord(
                source=f"https://a.example/{HOSTILE}", key=key(9), kind="video", duration_s=0.5
            ),
            MediaRecord(source="http://b.example/x", status="failed", stage="fetch", error=HOSTILE),
        ],
        "job",
    )
    said = (
        Message(role="user", content=f"<image>ask {HOSTILE}"),
        Message(role="assistant", content=f"say {HOSTILE}"),
    )
    samples = [
        Sample(id=str(n), dataset="d", messages=said, media=(MediaRef(source=source),))
        for n, source in enumerate([*sources, "http://b.example/x"])
    ]
    write_samples(root, "d", samples)
    return render(find(folder))


def test_text_never_becomes_markup(hostile: str) -> None:
    page = Page(hostile)  # tags are balanced: nothing broke out
    # Question, answer, note and source of four images; source of a video; reason of a failure.
    assert page.text.count(HOSTILE) >= 4 * 4 + 2
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert len(page.scripts) == 2
    assert "alert" not in "".join(text for _, text in page.scripts)


def test_the_page_loads_nothing_and_runs_one_script(hostile: str) -> None:
    page = loads_nothing(hostile)
    (script,) = (text for attrs, text in page.scripts if "type" not in attrs)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src &#39;sha256-{digest}&#39;" in hostile
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|https?:|innerHTML|eval\(", script)


def test_images_have_alt_texts_and_tables_have_headers(hostile: str) -> None:
    page = Page(hostile)
    assert all("alt" in tag for tag in page.all("img"))
    assert all(tag.get("aria-label") for tag in page.all("svg"))
    assert all(tag.get("scope") for tag in page.all("th"))
    names = [tag["id"] for tag in page.all("article")]
    assert len(set(names)) == len(names)
    assert {tag["href"][1:] for tag in page.all("a") if tag["href"]} <= set(names)


def test_coverage_and_failures_are_shown(hostile: str) -> None:
    text = Page(hostile).text
    assert "80.0%" in text  # 4 of 5 samples
    assert "fetch1" in text
    assert "b.example" in text


# ---- media


@pytest.fixture
def photo(tmp_path: Path) -> tuple[Path, str]:
    path = tmp_path / "photo.png"
    noise = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((500, 300)).save(path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_image_comes_from_its_path_or_from_kept_downloads(
    tmp_path: Path, photo: tuple[Path, str]
) -> None:
    path, name = photo
    here, _ = thumbnail([str(path)], name, SPEC, below(tmp_path))
    assert here is not None
    assert max(here.size) == 336
    web = ["https://a.example/photo.png"]
    assert thumbnail(web, name, SPEC, below(tmp_path)) == (
        None,
        "image came from the web and was not kept",
    )
    keep = tmp_path / "kept"
    (keep / name[:2]).mkdir(parents=True)
    (keep / name[:2] / name).write_bytes(path.read_bytes())
    kept, _ = thumbnail(web, name, SPEC, below(tmp_path), keep)
    assert kept is not None
    assert (np.asarray(kept) == np.asarray(here)).all()


def test_a_media_item_inside_a_file_has_a_thumbnail(
    tmp_path: Path, photo: tuple[Path, str]
) -> None:
    path, name = photo
    # GNU: one header a member. The default writes another one for a time that is no whole second.
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(path, "photo.png")
    size, local = path.stat().st_size, below(tmp_path)
    source = member_source(str(tmp_path / "a.tar"), tarfile.BLOCKSIZE, size, "photo.png")
    shown, reason = thumbnail([source], name, SPEC, local)
    assert shown is not None and not reason
    assert thumbnail([source], key(1), SPEC, local)[1] == "image has changed since it was encoded"
    (tmp_path / "a.tar").unlink()
    assert thumbnail([source], name, SPEC, local) == (None, "image not on this machine")


def test_the_page_decodes_what_the_encoder_decodes() -> None:
    assert thumbnails.FORMATS == model_images.FORMATS
    assert thumbnails.MAX_PIXELS == model_images.MAX_PIXELS


def test_a_missing_or_changed_image_is_not_shown(tmp_path: Path, photo: tuple[Path, str]) -> None:
    path, name = photo
    sources, local = [str(path)], below(tmp_path)
    path.write_bytes(path.read_bytes() + b"x")
    assert thumbnail(sources, name, SPEC, local) == (None, "image has changed since it was encoded")
    path.unlink()
    assert thumbnail(sources, name, SPEC, local) == (None, "image not on this machine")
    os.mkfifo(path)  # reading it would wait for ever
    fifo = (None, "image cannot be read: a FIFO, refused")
    assert thumbnail(sources, name, SPEC, local) == fifo
    odd = tmp_path / "odd"
    odd.write_bytes(b"<svg/>")
    digest = hashlib.sha256(b"<svg/>").hexdigest()
    assert thumbnail([str(odd)], digest, SPEC, local) == (None, "image cannot be read")
    assert "was not opened" in thumbnail([f"{tmp_path}/\0"], digest, SPEC, local)[1]


@pytest.mark.parametrize("fit", ["squash", "pad", "crop"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16", "turned", "CMYK", "HEIC", "cut"])
def test_a_thumbnail_shows_what_the_encoder_saw(tmp_path: Path, fit: str, mode: str) -> None:
    y, x = np.mgrid[0:300, 0:200]
    soft = np.stack([x * 255 / 200, y * 255 / 300, 255 - x * 255 / 200], axis=-1).astype(np.uint8)
    out, image, options = io.BytesIO(), Image.fromarray(soft), {}
    if mode == "RGBA":
        image.putalpha(Image.fromarray((y * 255 / 300).astype(np.uint8)))
    elif mode == "I;16":
        image = Image.fromarray((y * 65535 / 300).astype(np.uint16))
    elif mode == "CMYK":
        image = image.convert("CMYK")
    elif mode == "turned":
        options = {"exif": Image.Exif()}
        options["exif"][0x0112] = 6
    if mode == "HEIC":
        out = io.BytesIO(heic_file(image, quality=90))
    else:
        image.save(out, "JPEG" if mode in ("CMYK", "turned", "cut") else "PNG", **options)
    if mode == "cut":
        out = io.BytesIO(out.getvalue()[:-100])
    path = tmp_path / "image"
    path.write_bytes(out.getvalue())
    spec = dataclasses.replace(SPEC, fit=fit, mean=(0.2, 0.5, 0.8))
    name = hashlib.sha256(out.getvalue()).hexdigest()
    shown, _ = thumbnail([str(path)], name, spec, below(tmp_path))
    assert shown is not None
    seen = fit_image(decode_image(out.getvalue()), 56, fit, spec.mean)
    small = np.asarray(shown.resize((56, 56), Image.Resampling.BICUBIC))
    assert np.abs(small.astype(int) - seen.astype(int)).mean() < 2


def test_a_page_shows_thumbnails_with_their_captions(
    tmp_path: Path, photo: tuple[Path, str]
) -> None:
    path, name = photo
    space = make_space(tmp_path / "cache")
    shard(space, [(name, "full", 1, None), (key(2), "full", 2, None)], "image")
    root = CacheRoot(tmp_path / "cache")
    record = MediaRecord(
        source=str(path), key=name, width=500, height=300, bytes=path.stat().st_size
    )
    append_media(root, [record], "job")
    said = (Message(role="user", content="<image>"), Message(role="assistant", content=HOSTILE))
    ref = MediaRef(source=str(path))
    samples = [
        Sample(id="0", dataset="d", messages=(), media=(ref, ref)),
        Sample(id="1", dataset="d", messages=said, media=(ref,)),
    ]
    write_samples(root, "d", samples)
    page = Page(render(find(tmp_path / "cache", media=tmp_path)))
    (image,) = (tag for tag in page.all("img") if "jpeg" in (tag["src"] or ""))
    assert image["alt"] == HOSTILE
    data = base64.b64decode((image["src"] or "").split(",")[1])
    with Image.open(io.BytesIO(data)) as shown:
        assert shown.size == (336, 202)
    assert "500 × 300 px" in page.text
    assert "not in the media table" in page.text  # the other one


def test_a_caption_about_other_bytes_is_not_shown(tmp_path: Path, photo: tuple[Path, str]) -> None:
    """A data set states another image's sha256 for the source: its caption is about that image."""
    path, name = photo
    space = make_space(tmp_path / "cache")
    shard(space, [(name, "full", 1, None)], "image")
    root = CacheRoot(tmp_path / "cache")
    append_media(root, [MediaRecord(source=str(path), key=name, width=500, height=300)], "job")
    for dataset, stated in (("other", key(5)), ("same", name)):
        said = (Message(role="assistant", content=f"caption of {dataset}"),)
        ref = MediaRef(source=str(path), sha256=stated)
        sample = Sample(id="0", dataset=dataset, messages=said, media=(ref,))
        write_samples(root, dataset, [sample])
    page = Page(render(find(tmp_path / "cache")))
    assert "caption of other" not in page.text
    assert "caption of same" in page.text
    assert (
        "other: 1 sample left out, because the bytes at the source have another sha256" in page.text
    )
    assert "same: 1 sample left out" not in page.text


# ---- the command


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images(make_space(tmp_path), range(4))
    out = tmp_path / "pages" / "view.html"
    assert view.main(["--features", str(tmp_path), "--out", str(out), "--images", "2"]) == 0
    assert len(Page(out.read_text()).all("article")) == 2
    assert "2 images and videos" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--features", "{nowhere}"], "no cache at"),
        (["--images", "0"], "--images 0: must be 1 to 500"),
        (["--images", "501"], "--images 501: must be 1 to 500"),
        (["--seed", "-1"], "--seed -1: must be"),
        (["--out", "{here}"], "a folder; name a file"),
        (["--space", "nix"], "no space 'nix'"),
        ([], "has no rows yet: nothing to show"),
    ],
)
def test_an_error_is_one_line(tmp_path: Path, argv: list[str], message: str) -> None:
    make_space(tmp_path)
    argv = [word.format(nowhere=tmp_path / "nowhere", here=tmp_path) for word in argv]
    if "--features" not in argv:
        argv += ["--features", str(tmp_path)]
    if "--out" not in argv:
        argv += ["--out", str(tmp_path / "view.html")]
    with pytest.raises((UserError, CacheError), match=re.escape(message)) as caught:
        view.main(argv)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "view.html").exists()


def test_a_damaged_row_ends_the_command(tmp_path: Path) -> None:
    space = make_space(tmp_path)
    images(space, range(4))
    path = space.paths.shard("image", 0)
    data = bytearray(path.read_bytes())
    data[30] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="fails its checksum"):
        find(tmp_path)


@pytest.mark.parametrize("mark", ["<image>", "<video>"])
def test_the_question_of_an_image_is_shown_without_its_mark(mark: str) -> None:
    def shown(*turns: tuple[str, str]) -> dict[str, str]:
        return media._exchange([Message(role=role, content=text) for role, text in turns])

    asked = ("user", f"Is {mark} a <image> tag?")
    said = ("assistant", f"No: {mark}")
    assert shown(asked, said) == {"question": "Is a <image> tag?", "answer": f"No: {mark}"}
    assert shown(("user", "What?"), said) == {"question": "What?", "answer": f"No: {mark}"}
    assert shown(said) == {"answer": f"No: {mark}"}
