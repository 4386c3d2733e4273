"""A JPEG that lacks its last bytes is shown as browsers show it, with a note.

found = decode_noted(jpeg[:-200])
found.note      # "the JPEG ends early: its last 2.1% is missing and grey"
"""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import skimage.data
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from model.media.cut_jpeg import find_cut
from model.media.images import MAX_MISSING, BadMediaError, decode_image, decode_noted
from tests.support.photos import GRADIENT, saved

PHOTO = Image.fromarray(skimage.data.astronaut())  # 512 x 512
GREY = Image.fromarray(skimage.data.camera())
OPTIONS = {
    "4:2:0": {"quality": 85},
    "4:4:4": {"quality": 90, "subsampling": 0},
    "4:2:2": {"quality": 90, "subsampling": 1},
    "restart": {"quality": 85, "restart_marker_rows": 1},
    "optimized": {"quality": 60, "optimize": True},
    "progressive": {"quality": 85, "progressive": True},
}
WHOLE = {name: saved(PHOTO, "JPEG", **options) for name, options in OPTIONS.items()}
WHOLE["grey"] = saved(GREY, "JPEG", quality=85)
WHOLE["grey progressive"] = saved(GREY, "JPEG", quality=85, progressive=True)
WHOLE["cmyk"] = saved(PHOTO.convert("CMYK"), "JPEG", quality=85)


def as_pil_shows(data: bytes, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Return the pixels by PIL's own way for files that end early, which holds for the whole process."""
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))


def share_in(note: str | None) -> float:
    assert note is not None and note.startswith("the JPEG ends early: its last ")
    assert note.endswith("% is missing and grey") and "\n" not in note
    return float(note.split("last ")[1].split("%")[0]) / 100


@pytest.mark.parametrize("name", WHOLE)
def test_a_missing_end_marker_costs_no_pixel(name: str) -> None:
    whole = WHOLE[name]
    for lost in (1, 2):
        found = decode_noted(whole[:-lost])
        assert np.array_equal(np.asarray(found.image), np.asarray(decode_image(whole)))
        assert found.note == "the JPEG ends early: no pixel is missing"


@pytest.mark.parametrize("progressive", [False, True])
def test_the_note_does_not_depend_on_how_the_file_is_read(progressive: bool) -> None:
    """PIL accepts some small files without an end marker as they are."""
    for side in range(16, 240, 16):
        flat = Image.new("RGB", (side, 96), (200, 30, 60))
        whole = saved(flat, "JPEG", progressive=progressive)
        for lost in (1, 2):
            found = decode_noted(whole[:-lost])
            assert np.array_equal(np.asarray(found.image), np.asarray(decode_image(whole)))
            assert found.note == "the JPEG ends early: no pixel is missing", side


def test_another_setting_of_pil_does_not_hide_a_large_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.media.images._make_pil_strict", lambda: None)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    whole = WHOLE["4:2:0"]
    with pytest.raises(BadMediaError, match="of it is missing"):
        decode_image(whole[: len(whole) // 2])


@pytest.mark.parametrize("lost", [20, 200, 2000])
@pytest.mark.parametrize("name", WHOLE)
def test_a_missing_tail_is_shown_as_browsers_show_it(
    name: str, lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = WHOLE[name]
    found = decode_noted(whole[:-lost])
    seen, intact = np.asarray(found.image), np.asarray(decode_image(whole))
    share = share_in(found.note)
    assert 0 < share <= MAX_MISSING
    # Everything above the rows that the note names is intact.
    rows = 512 - int(np.ceil(512 * share / 16) + 1) * 16
    assert rows > 350 and np.array_equal(seen[:rows], intact[:rows])
    if "progressive" not in name:
        assert lost == 20 or (seen[-1, -8:] == (64 if name == "cmyk" else 128)).all()
        assert np.array_equal(seen, as_pil_shows(whole[:-lost], monkeypatch))


def test_the_share_is_that_of_the_missing_blocks() -> None:
    whole = WHOLE["4:2:0"]
    intact = np.asarray(decode_image(whole)).astype(int)
    for kept in np.linspace(0.88, 0.999, 12):
        found = decode_noted(whole[: int(len(whole) * kept)])
        differs = (np.asarray(found.image) != intact).any(-1).mean()
        assert abs(share_in(found.note) - differs) < 0.03


@pytest.mark.parametrize("name", WHOLE)
def test_a_larger_part_missing_fails_with_the_share(name: str) -> None:
    whole = WHOLE[name]
    for kept in (0.3, 0.5):
        with pytest.raises(BadMediaError) as caught:
            decode_noted(whole[: int(len(whole) * kept)])
        reason = caught.value.reason
        assert reason.startswith("the JPEG ends early: ") and "missing" in reason


def test_a_file_cut_before_its_pixels_is_not_an_image() -> None:
    whole = WHOLE["4:2:0"]
    for kept in (3, 20, 100, whole.index(b"\xff\xda") + 4):
        with pytest.raises(BadMediaError):
            decode_image(whole[:kept])


def test_a_small_image_may_lack_a_few_bytes() -> None:
    whole = saved(Image.fromarray(np.tile(GRADIENT, (5, 5, 1))), "JPEG", quality=75)
    assert len(whole) < 2500
    assert share_in(decode_noted(whole[:-10]).note) < MAX_MISSING


def test_upright_after_the_cut_is_filled() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = saved(PHOTO, "JPEG", quality=85, exif=exif)
    found = decode_noted(whole[:-500])
    seen = np.asarray(found.image)
    assert (seen[-1, :4] == 128).all()  # the stored end is at the lower left after a quarter turn
    assert share_in(found.note) < 0.05


def test_whole_files_have_no_cut_and_no_note() -> None:
    for whole in WHOLE.values():
        assert find_cut(whole) is None and decode_noted(whole).note is None
        assert decode_noted(whole + b"garbage behind the end").note is None


def test_a_damaged_middle_is_no_missing_end() -> None:
    """A file whose header is broken fails, whether or not its end is missing."""
    whole = bytearray(WHOLE["4:2:0"])
    tables = whole.index(b"\xff\xc4")
    whole[tables + 4 : tables + 40] = b"\xff" * 36
    for data in (bytes(whole), bytes(whole[:-30])):
        with pytest.raises(BadMediaError):
            decode_image(data)


def test_threads_and_other_settings_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [WHOLE[name][:-lost] for name in WHOLE for lost in (2, 300)] * 3
    alone = [np.asarray(decode_image(data)).tobytes() for data in jobs]
    with ThreadPoolExecutor(8) as pool:
        assert [i.tobytes() for i in pool.map(decode_image, jobs)] == alone
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@given(st.binary(max_size=300))
def test_any_bytes_have_an_answer(data: bytes) -> None:
    find_cut(b"\xff\xd8" + data)


@given(st.sampled_from(sorted(WHOLE)), st.integers(2, 700), st.binary(max_size=30))
def test_any_damage_to_the_header_has_an_answer(name: str, kept: int, rest: bytes) -> None:
    find_cut(WHOLE[name][:kept] + rest)
    find_cut(WHOLE[name][:kept] + rest + WHOLE[name][kept:-50])


@given(
    st.lists(st.tuples(st.sampled_from([0xE1, 0xE2, 0xED, 0xEE, 0xFE]), st.binary(max_size=50)), max_size=4)
)  # fmt: skip
def test_any_segments_of_metadata_leave_the_pixels_as_they_are(
    segments: list[tuple[int, bytes]],
) -> None:
    whole = saved(Image.fromarray(GRADIENT), "JPEG")
    extra = b"".join(
        b"\xff" + bytes([marker]) + (len(body) + 2).to_bytes(2, "big") + body
        for marker, body in segments
        if not body.startswith((b"Exif", b"Adobe"))
    )
    seen = np.asarray(decode_image(whole[:2] + extra + whole[2:]))
    assert np.array_equal(seen, np.asarray(decode_image(whole)))
