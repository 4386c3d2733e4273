"""Tars of img2dataset and of the library webdataset become samples, and every member is used or counted.

python -m encode.run --dataset 'webdataset:cc3m/{00000..00331}.tar'
"""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cache.format.embedded.names import read_embedded
from cache.store.samples import Sample
from configs import UserError
from encode.records.account import Account
from encode.sources.webdataset import WebDataset, expand


def picture(number: int = 0, form: str = "png") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (number % 256, number // 256, 0)).save(out, form)
    return out.getvalue()


CLIP = b"\0\0\0\x18ftypmp42" + bytes(40)
Members = Sequence[tuple[str, bytes]]


def pack(path: Path, members: Members, form: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read(*paths: Path, leave_out: bool = False) -> tuple[list[Sample], Account]:
    account = Account(name="set", leave_out=leave_out)
    return list(WebDataset(name="set", files=paths).samples(account=account)), account


def said(sample: Sample) -> list[str]:
    return [f"{message.role[0]}: {message.content}" for message in sample.messages]


def images_of(sample: Sample) -> list[bytes]:
    return [read_embedded(ref.source, 1 << 20) for ref in sample.media]


def img2dataset(number: int, caption: str | None = "A cat.") -> dict[str, object]:
    """Return what img2dataset writes beside an image."""
    return {
        "caption": caption,
        "url": f"https://example.org/{number}.jpg",
        "key": f"{number:09}",
        "status": "success",
        "error_message": None,
        "width": 4,
        "height": 4,
        "original_width": 4,
        "original_height": 4,
        "exif": '{"Image Make": "A maker of cameras, Image Model: one"}',
        "sha256": "0" * 64,
        "similarity": 0.31,
        "punsafe": 0.01,
        "pwatermark": 0.2,
    }


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_a_tar_of_img2dataset(tmp_path: Path, form: int) -> None:
    members: list[tuple[str, bytes]] = []
    for number in range(3):
        key = f"{number:09}"
        members += [
            (f"{key}.jpg", picture(number, "jpeg")),
            (f"{key}.json", json.dumps(img2dataset(number)).encode()),
            (f"{key}.txt", b"A cat.\n"),
        ]
    path = pack(tmp_path / "00000.tar", members, form)
    samples, account = read(path)
    assert [said(sample) for sample in samples] == [
        ["u: <image>Describe this image.", "a: A cat."]
    ] * 3
    assert [images_of(sample) for sample in samples] == [[picture(n, "jpeg")] for n in range(3)]
    assert [sample.id for sample in samples] == [f"00000/{n:09}" for n in range(3)]
    assert account.lines == {"captions": 3} and not account.left_out
    assert {"url", "key", "status", "exif", "sha256", "similarity", "txt"} <= set(account.ignored)


def test_members_are_recognised_by_content(tmp_path: Path) -> None:
    forms = ("jpeg", "png", "webp", "gif", "avif")
    members = [(f"a{form}.jpg", picture(1, form)) for form in forms] + [("clip.bin", CLIP)]
    samples, _ = read(pack(tmp_path / "a.tar", members))
    assert [ref.kind for sample in samples for ref in sample.media] == ["image"] * 5 + ["video"]
    assert all(sample.messages == () for sample in samples)


def to_json(value: object) -> tuple[str, bytes]:
    return "json", json.dumps(value).encode()


def test_texts_of_each_kind(tmp_path: Path) -> None:
    image = ("jpg", picture())
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A cat."}]
    chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]
    for number, (members, wanted) in enumerate(
        [
            (
                [image, ("txt", "Ein Öl.".encode())],
                ["u: <image>Describe this image.", "a: Ein Öl."],
            ),
            ([("caption", b"A cat."), image], ["u: <image>Describe this image.", "a: A cat."]),
            (
                [image, ("json", json.dumps({"conversations": turns}).encode())],
                ["u: <image>What?", "a: A cat."],
            ),
            ([image, ("json", json.dumps(turns).encode())], ["u: <image>What?", "a: A cat."]),
            ([image, ("json", json.dumps(chat).encode())], ["u: <image>What?", "a: A cat."]),
            (
                [
                    image,
                    (
                        "json",
                        json.dumps({"image": "k.jpg", "question": "Q?", "answer": "A."}).encode(),
                    ),
                ],
                ["u: <image>Q?", "a: A."],
            ),
            (
                [image, ("cls", b"3"), ("txt", b"A cat.")],
                ["u: <image>Describe this image.", "a: A cat."],
            ),
            (
                [("mp4", CLIP), ("txt", b"A clip.")],
                ["u: <image>Describe this video.", "a: A clip."],
            ),
            ([image, ("txt", b"")], []),
        ]
    ):
        path = pack(tmp_path / f"{number}.tar", [(f"k.{suffix}", data) for suffix, data in members])
        (sample,), account = read(path)
        assert said(sample) == wanted
        assert sample.id == f"{number}/k" and not account.left_out


def test_several_media_in_the_order_of_the_record(tmp_path: Path) -> None:
    members = [("k.right.png", picture(2)), ("k.left.png", picture(1))]
    (sample,), _ = read(pack(tmp_path / "a.tar", [*members, ("k.txt", b"Two.")]))
    assert images_of(sample) == [picture(2), picture(1)]
    record = {"images": ["k.left.png", "k.right.png"], "question": "Which?", "answer": "Both."}
    members.append(("k.json", json.dumps(record).encode()))
    (sample,), _ = read(pack(tmp_path / "b.tar", members))
    assert images_of(sample) == [picture(1), picture(2)]
    record["images"] = ["k.left.png", "../x.png"]
    members[-1] = ("k.json", json.dumps(record).encode())
    with pytest.raises(UserError, match=r"k: .*media"):
        read(pack(tmp_path / "c.tar", members))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            [("k.jpg", picture()), ("k.txt", b"A cat."), ("k.caption", b"A dog.")],
            "two members say txt",
        ),
        (
            [("k.jpg", picture()), ("k.txt", b"A cat."), ("k.json", b'{"caption": "A dog."}')],
            "has caption and txt",
        ),
        ([("k.jpg", picture()), ("k.txt", b"\xff")], "k.txt: not UTF-8"),
        ([("k.jpg", picture()), ("k.json", b'{"caption": "A", "caption": "B"}')], "caption"),
        ([("k.jpg", picture()), ("k.json", b"3")], "k.json: expected an object, found int"),
        ([("k.jpg", picture()), ("k.json", b'{"captoin": "A text."}')], "unknown key 'captoin'"),
        (
            [("k.jpg", picture()), ("k.json", b'{"image": "/etc/passwd"}')],
            "image names other media",
        ),
        ([("k.txt", b"A cat.")], "a caption of no image or video"),
        (
            [("a.jpg", picture()), ("b.jpg", picture()), ("a.txt", b"A."), ("b.txt", b"B.")],
            "a: other members of this name are before others",
        ),
    ],
)
def test_a_group_that_would_lose_something_is_a_fault(
    tmp_path: Path, members: Members, message: str
) -> None:
    path = pack(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=message):
        read(path)


def test_text_never_names_a_file_or_another_tar(tmp_path: Path) -> None:
    other = pack(tmp_path / "other.tar", [("x.png", picture())])
    for name in (f"tar:{other}#512+60:x.png", "https://example.org/a.jpg", str(other)):
        record = json.dumps({"image": name, "caption": "A text."}).encode()
        with pytest.raises(UserError, match=r"media outside the tar|is no member of its group"):
            read(pack(tmp_path / "a.tar", [("k.json", record)]))


def test_what_is_not_used_is_counted_by_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    unknown = b"\0\0\0\x18ftypjxl \0\0\0\0jxl jxl " + bytes(40)
    with tarfile.open(path, "w") as tar:
        for name, data in [
            ("a.png", picture()),
            ("a.npy", b"\x93NUMPY" + bytes(40)),
            ("b.jxl", unknown),
            ("b.txt", b"Its text."),
            ("README", b"text"),
            ("g.json", json.dumps(img2dataset(1) | {"status": "failed_to_download"}).encode()),
            (".hidden.png", picture()),
            ("./c.png", picture()),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, kind in (
            ("d.png", tarfile.SYMTYPE),
            ("e.png", tarfile.LNKTYPE),
            ("f.png", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("folder")
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
    samples, account = read(path)
    assert [sample.id for sample in samples] == ["a/a", "a/./c"]
    assert account.left_out["link in a tar"] == 2
    assert account.left_out["special file in a tar"] == 1
    assert account.left_out["hidden member or without a suffix"] == 2
    assert account.left_out["failed download"] == 1
    assert [n for why, n in account.left_out.items() if why.startswith(".jxl (JPEG XL")] == [1]
    assert any(reason.startswith(".npy") for reason in account.left_out)
    assert sum(account.left_out.values()) == 8


@pytest.mark.parametrize("form", ["--format=gnu", "--format=posix", "--format=oldgnu"])
def test_tars_of_the_program_tar(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "in"
    long = "deep/" * 30 + "x" * 200
    for name in ("a", long, "Ünï"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.png").write_bytes(picture(len(name)))
        (folder / f"{name}.txt").write_text(f"Text of {len(name)}.")
    with (folder / "sparse.png").open("wb") as file:
        file.write(picture())
        for at in (1 << 20, 3 << 20, 5 << 20, 7 << 20, 9 << 20, 11 << 20):
            file.seek(at)
            file.write(b"1")
    path = tmp_path / "a.tar"
    subprocess.run(
        ["tar", form, "--sparse", "--sort=name", "-cf", path, "-C", folder, "."], check=True
    )
    samples, account = read(path)
    assert {sample.id: images_of(sample) for sample in samples} == {
        f"a/./{name}": [picture(len(name))] for name in ("a", long, "Ünï")
    }
    assert account.left_out == {"sparse file in a tar": 1}


# ---- damage


def test_every_cut_of_a_tar_is_noticed(tmp_path: Path) -> None:
    members = [
        (f"{n}.{s}", d) for n in range(4) for s, d in (("png", picture(n)), ("txt", b"Text."))
    ]
    whole = pack(tmp_path / "whole.tar", members).read_bytes()
    end = whole.rindex(b"Text.") + 512  # what follows is zeros
    good = pack(tmp_path / "good.tar", [("g.png", picture()), ("g.txt", b"Good.")])
    cut = tmp_path / "cut.tar"
    for size in (*range(0, end - 512, 256), *range(1, end - 512, 509)):
        cut.write_bytes(whole[:size])
        samples, account = read(good, cut, leave_out=True)
        assert said(samples[0])[1] == "a: Good."
        assert all(sample.messages for sample in samples), "no image lost its text"
        complete = len(samples) - 1
        assert complete <= size // 2048
        assert account.faults == {"damaged tar": 1}, size


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 2559), bit=st.integers(0, 7))
def test_a_flipped_bit_gives_samples_or_a_fault(
    tmp_path_factory: pytest.TempPathFactory, at: int, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    path = pack(folder / "a.tar", [("k.png", picture()), ("k.txt", b"Text.")])
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)
    try:
        samples, account = read(path, leave_out=True)
    except UserError:
        return
    for sample in samples:
        assert all(len(image) < 10_000 for image in images_of(sample))
    assert samples or account.faults or account.left_out


def test_compressed_tars_and_other_files_are_named(tmp_path: Path) -> None:
    good = pack(tmp_path / "good.tar", [("g.png", picture())])
    packed = tmp_path / "a b.tar.gz"
    packed.write_bytes(gzip.compress(good.read_bytes()))
    with pytest.raises(UserError, match=r"compressed; unpack it: gunzip -k '.*/a b.tar.gz'"):
        read(good, packed)
    other = tmp_path / "other.tar"
    os.mkfifo(tmp_path / "pipe.tar")
    for data in (b"", b"x" * 2000, b"<html>" * 200):
        other.write_bytes(data)
        samples, account = read(good, other, tmp_path / "pipe.tar", leave_out=True)
        assert len(samples) == 1
        assert account.faults == {"damaged tar": 2}
    with pytest.raises(UserError, match=r"no member of .* is usable"):
        read(other, leave_out=True)


# ---- patterns


def test_patterns_with_braces_and_wildcards(tmp_path: Path) -> None:
    for name in ("000", "001", "010", "a", "b", "[x]"):
        pack(tmp_path / f"{name}.tar", [("k.png", picture())])
    (tmp_path / "folder.tar").mkdir()

    def names(pattern: str) -> list[str]:
        return [path.stem for path in expand(f"{tmp_path}/{pattern}")]

    assert names("{000..001}.tar") == ["000", "001"]
    assert names("{001..000}.tar") == ["000", "001"]
    assert names("{a,b}.tar") == names("{a..b}.tar") == ["a", "b"]
    assert names("0*.tar") == ["000", "001", "010"]
    assert names("{0?0,[ab]}.tar") == ["000", "010", "a", "b"]
    assert names("[x].tar") == ["[x]"]
    assert names("") == ["000", "001", "010", "[x]", "a", "b"]
    with pytest.raises(UserError, match=r"no such file: .*/002.tar"):
        names("{000..002}.tar")
    with pytest.raises(UserError, match="no such file; quote the pattern"):
        names("z*.tar")
    with pytest.raises(UserError, match="no such file"):
        names("{000000..999999999999}.tar")


def test_equal_names_in_several_tars_have_different_ids(tmp_path: Path) -> None:
    paths = [pack(tmp_path / part / "0.tar", [("k.png", picture())]) for part in ("a", "b")]
    twice = pack(
        tmp_path / "1.tar", [("k.png", picture()), ("l.png", picture()), ("k.png", picture())]
    )
    samples, _ = read(*paths, twice)
    assert [sample.id for sample in samples] == ["a/0/k", "b/0/k", "1/k", "1/l", "1/k#1"]
