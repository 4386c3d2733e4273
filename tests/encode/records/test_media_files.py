"""Names of media in records become references to files, URLs and data: URIs, or faults.

files = MediaFiles([Path("/photos")], account, outside="copy it into the folder")
files.resolve(MediaName(text="a.jpg"), Path("/photos"))
"""

from __future__ import annotations

import base64
import os
import unicodedata
from pathlib import Path

import pytest

from cache.store.samples import MediaRef
from configs import UserError
from encode.records.account import Account, FaultError
from encode.records.media_files import MediaFiles, suffix_of
from encode.records.record import MediaName

PNG = b"\x89PNG\r\n\x1a\n" + bytes(32)
MP4 = b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(32)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for name in ("a.jpg", "b.png", "sub/c d.webp", "sub/ü.png", "100%.png", "clip.gif"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(MP4 if name == "clip.gif" else PNG)
    return folder


def ADVICE(first: str) -> str:
    return f"give the folder of {Path(first).name}"


class Found:
    """What names mean in a folder, and the remarks about them."""

    def __init__(self, folder: Path, *more: Path) -> None:
        self.account = Account(name="photos")
        self.folder = folder
        self.files = MediaFiles([folder, *more], self.account, outside="copy it")

    def __call__(self, text: str, **fields: str) -> MediaRef:
        return self.files.resolve(MediaName(text=text, **fields), self.folder)  # type: ignore[arg-type]

    def relative(self, text: str) -> str:
        return Path(self(text).source).relative_to(self.folder).as_posix()


def test_a_path_is_relative_or_absolute_below_the_folder(photos: Path) -> None:
    found = Found(photos)
    assert found("a.jpg") == MediaRef(source=str(photos / "a.jpg"))
    assert found(str(photos / "a.jpg")) == found("a.jpg")
    for text in ("./a.jpg", "sub/../a.jpg", "sub//../a.jpg", f"file://{photos}/a.jpg"):
        assert found.relative(text) == "a.jpg"
    assert found.relative("sub/c d.webp") == "sub/c d.webp"
    assert found.relative("100%.png") == "100%.png"
    assert not found.account.notes


def test_content_decides_between_image_and_video(photos: Path) -> None:
    found = Found(photos)
    assert found("clip.gif").kind == "video"
    assert found("clip.gif", kind="image").kind == "video"
    assert found("b.png", kind="video").kind == "image"


def test_without_a_file_the_key_decides_and_then_the_suffix(photos: Path) -> None:
    found = Found(photos)
    assert found("gone.bin", kind="video").kind == "video"
    assert found("gone.mp4").kind == "video"
    assert found("gone2.mp4", kind="image").kind == "image"
    assert found("gone").kind == "image"
    assert found.account.notes == {"no such file": 4}
    found("gone.mp4")
    assert found.account.notes == {"no such file": 4}, "each file once"


@pytest.mark.parametrize(
    ("text", "actual", "note"),
    [
        (r"sub\c d.webp", "sub/c d.webp", r"path with \ read as /"),
        ("sub/c%20d.webp", "sub/c d.webp", "path with % escapes decoded"),
        (r"sub\c%20d.webp", "sub/c d.webp", "path with % escapes decoded"),
        ("sub/%C3%BC.png", "sub/ü.png", "path with % escapes decoded"),
        (" a.jpg\n", "a.jpg", "path with spaces around it"),
        ("/sub/c d.webp", "sub/c d.webp", "path with / before it"),
        (unicodedata.normalize("NFD", "sub/ü.png"), "sub/ü.png", "path in another Unicode form"),
    ],
)
def test_other_spellings_of_a_file_that_exists_are_read_and_counted(
    photos: Path, text: str, actual: str, note: str
) -> None:
    found = Found(photos)
    assert found.relative(text) == actual
    assert found.account.notes == {note: 1}
    assert found.relative(text) == actual
    assert found.account.notes == {note: 1}, "each file once"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("A.JPG", "'A.JPG': no such file; there is 'a.jpg'"),
        ("Sub/C D.webp", "there is 'sub/c d.webp'"),
        ("sub/Ü", "'sub/Ü': no such file; there is 'sub/ü.png'"),
        ("b", "there is 'b.png'"),
        ("sub", "'sub' is a folder, not a file"),
        ("", "empty name"),
        ("   ", "empty name"),
        ("a\0.jpg", "is not a file name"),
        ("\udcff.jpg", "is not a file name"),
        ("x" * 5000, "is not a file name"),
        ("..", "'..' is outside"),
        (".", "'.' is outside"),
        ("../other.jpg", "'../other.jpg' is outside"),
        ("sub/../../x.jpg", "is outside"),
        ("/etc/passwd", "'/etc/passwd' is outside"),
        ("/no/coco/1.jpg", "there is no such folder here: write paths relative to"),
        ("//cdn.example.org/1.jpg", "there is no such folder here"),
        ("file:///etc/passwd", "is outside"),
        (r"..\x.jpg", ""),
        ("link.jpg", "'link.jpg' is outside"),
        ("linked/x.jpg", "'linked/x.jpg' is outside"),
        ("s3://bucket/a.jpg", "only http and https are downloaded"),
        ("http://", "without a host"),
        ("https://user:secret@example.org/a.jpg", "user name or password"),
        ("https://example.org/a\x07.jpg", "control characters in a URL"),
        ("https://example.org:port/a.jpg", "invalid URL"),
        ("data:image/png;base64,@@@", "damaged base64"),
    ],
)
def test_what_cannot_be_meant_is_a_fault(photos: Path, text: str, reason: str) -> None:
    (photos / "link.jpg").symlink_to("/etc/hostname")
    (photos / "linked").symlink_to("/etc", target_is_directory=True)
    found = Found(photos)
    if not reason:
        assert found(text).source == str(photos / text)
        return
    with pytest.raises(FaultError) as fault:
        found.files.resolve(MediaName(text=text), photos, data_uri=lambda uri: uri)
    assert reason in str(fault.value)
    assert "\n" not in str(fault.value)
    assert len(str(fault.value)) < 600


def test_links_inside_the_folder_are_followed(photos: Path) -> None:
    (photos / "again.jpg").symlink_to("a.jpg")
    (photos / "same").symlink_to("sub", target_is_directory=True)
    found = Found(photos)
    assert found.relative("again.jpg") == "again.jpg"
    assert found.relative("same/c d.webp") == "same/c d.webp"


def test_an_absolute_path_may_name_the_folder_by_a_link(photos: Path) -> None:
    alias = photos.parent / "alias"
    alias.symlink_to(photos, target_is_directory=True)
    assert Found(photos).relative(f"{alias}/a.jpg") == "a.jpg"


def test_names_that_look_like_other_sources_are_paths(photos: Path) -> None:
    found = Found(photos)
    for text in ("tar:/etc/passwd#0+10:x", "parquet:/a#b:1", "json:/x#0+1:0", "hf:x/y#1"):
        assert found(text).source == str(photos / text)


def test_urls_are_kept_as_written(photos: Path) -> None:
    found, url = Found(photos), "https://example.org/a%20b.MP4?size=1#x"
    assert found(url) == MediaRef(source=url, kind="video")
    assert found(f" {url}\n").source == url
    assert found(url, kind="image").kind == "image"
    assert found("http://example.org/x", sha256="A" * 64).sha256 == "a" * 64
    with pytest.raises(FaultError, match="not 64 hex digits"):
        found("http://example.org/x", sha256="abc")


def test_a_data_uri_is_recognised_by_its_bytes(photos: Path) -> None:
    found = Found(photos)
    for data, kind in ((PNG, "image"), (MP4, "video")):
        uri = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
        name = MediaName(text=uri)
        ref = found.files.resolve(name, photos, lambda text: f"json:/x#0+{len(text)}:0")
        assert ref == MediaRef(source=f"json:/x#0+{len(uri)}:0", kind=kind)
        with pytest.raises(FaultError, match=r"read from \.json and \.jsonl only"):
            found.files.resolve(name, photos)


def test_files_that_are_all_missing_mean_a_wrong_folder(photos: Path) -> None:
    found = Found(photos)
    found.files.refuse_if_all_are_missing("data.json", ADVICE)
    for text in ("x/1.jpg", "x/2.jpg", "x/1.jpg"):
        found(text)
    with pytest.raises(UserError) as refused:
        found.files.refuse_if_all_are_missing("data.json", ADVICE)
    assert str(refused.value) == (
        f"data.json: none of the 2 files it names exists (first: {photos}/x/1.jpg); give the folder of 1.jpg"
    )
    found("a.jpg")
    found.files.refuse_if_all_are_missing("data.json", ADVICE)
    assert found.account.notes == {"no such file": 2}


def test_several_folders_may_be_named(photos: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "z.png").write_bytes(PNG)
    with pytest.raises(FaultError, match="outside"):
        Found(photos)(str(other / "z.png"))
    assert Found(photos, other)(str(other / "z.png")).source == str(other / "z.png")
    with pytest.raises(FaultError, match="outside"):
        Found(photos, other)(str(tmp_path / "others.png"))


def test_a_folder_whose_name_begins_like_another_is_outside(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "photos2").mkdir()
    (tmp_path / "photos2" / "a.jpg").write_bytes(PNG)
    with pytest.raises(FaultError, match="outside"):
        Found(photos)("../photos2/a.jpg")


def test_special_files_are_not_opened(photos: Path) -> None:
    os.mkfifo(photos / "pipe.jpg")
    assert Found(photos)("pipe.jpg").kind == "image"


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.JPG", ".jpg"),
        ("a.tar.gz", ".gz"),
        ("a", ""),
        (".bashrc", ""),
        ("x/.y", ""),
        ("a. b", ""),
    ],
)
def test_suffixes(name: str, suffix: str) -> None:
    assert suffix_of(name) == suffix
