"""A stranger's cache names files of this machine; the three commands that open media do not open them.

    python -m cache.view --features download
    python -m train.report --run run --features download
    python -m encode.run --check 50 --features download

Every hostile name has a row, a question and a record, so each command would show it.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from cache import verify
from cache.format.embedded.names import member_source
from cache.maintenance.local_media import remembered
from cache.store.ledger import MediaRecord, append_media
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.samples import MediaRef, Sample, read_samples, write_samples
from cache.store.space import Space, find_space
from cache.store.writer import ShardWriter
from cache.view import __main__ as view
from configs import UserError
from encode import run as encode_run
from tests.support.encode_jobs import draw
from tests.support.html_page import Page, loads_nothing
from tests.support.trained_runs import BASE, turns
from train import run
from train.evaluate.result import Evaluation, save
from train.evaluate.scoring import Answer, summarize
from train.report import __main__ as report

pytestmark = pytest.mark.slow

PHOTOS = 8
SECRET = b"the text of a private file\n" * 9


@dataclass(frozen=True)
class Place:
    """The owner's folders, and what a stranger made of a copy of his cache."""

    folder: Path

    @property
    def photos(self) -> Path:
        return self.folder / "photos"

    @property
    def private(self) -> Path:
        """The user's files, which no data set has."""
        return self.folder / "private"

    @property
    def download(self) -> CacheRoot:
        return CacheRoot(self.folder / "download")

    def view(self, *words: object, features: str = "download") -> str:
        out = self.folder / "view.html"
        out.unlink(missing_ok=True)
        assert view.main(self._words(features, "--out", out, "--images", 99, *words)) == 0
        return out.read_text()

    def report(self, *words: object, features: str = "download") -> str:
        """Return the page of an evaluation that asked about every sample."""
        out, folder = self.folder / "report.html", self.folder / "run" / "stage1"
        out.unlink(missing_ok=True)
        answers = tuple(
            Answer(
                sample=f"photos/{sample.id}",
                task="caption",
                media=tuple(ref.source for ref in sample.media),
                item=sample.id,
                question="<image>What is this?",
                expected=sample.id,
                given="a cat",
                metric="exact",
                scores=(0.0,),
                correct=False,
            )
            for sample in read_samples(CacheRoot(self.folder / features), "photos")
        )
        tasks, mean = summarize(answers)
        result = Evaluation(
            run=str(folder.parent),
            stage=1,
            step=2,
            split="val",
            space="toy",
            samples=len(answers),
            loss=0.5,
            blind_loss=None,
            mean=mean,
            tasks=tasks,
            answers=answers,
        )
        save(result, folder)
        named = ("--run", folder.parent, "--output", out, "--images", 99)
        assert report.main(self._words(features, *named, *words)) == 0
        return out.read_text()

    def check(self, *words: object, features: str = "download") -> int:
        return encode_run.main(self._words(features, *ENCODER, "--check", 99, *words))

    def _words(self, features: str, *words: object) -> list[str]:
        return [str(word) for word in ("--features", self.folder / features, *words)]


ENCODER = ("--encoder", "demo", "--workers", "0")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Photographs with captions, encoded, and a run on them."""
    place = Place(tmp_path_factory.mktemp("named"))
    for path in draw(place.photos, PHOTOS, side=30):
        path.with_suffix(".txt").write_text(f"Picture {path.stem}.")
    where = ["--features", str(place.folder / "cache")]
    assert encode_run.main([*ENCODER, *where, "--dataset", f"folder:{place.photos}"]) == 0
    words = [*BASE, "--held-out", "0.4", "--max-steps", "2", "--run", str(place.folder / "run")]
    assert run.main([*words, *where]) == 0
    draw(place.private, 3, first=50, side=30)
    (place.private / "note.txt").write_bytes(SECRET)
    os.mkfifo(place.private / "pipe.png")
    with tarfile.open(place.private / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(place.private / "0052.png", "a.png")
    return place


@pytest.fixture(scope="module")
def names(place: Place) -> dict[str, str]:
    """Kind of hostile name -> the name, in a copy of the cache that has a row for each."""
    root, private = place.download, place.private
    shutil.copytree(place.folder / "cache", root.path)
    (root.path / "demo").mkdir()
    (root.path / "demo" / "link.png").symlink_to(private / "0050.png")
    size = (private / "0052.png").stat().st_size
    found = {
        "device": "/dev/zero",
        "fifo": str(private / "pipe.png"),
        "text": str(private / "note.txt"),
        "image": str(private / "0050.png"),
        "other": str(private / "0051.png"),
        "link": str(root.path / "demo" / "link.png"),
        "member": member_source(str(private / "a.tar"), 512, size, "a.png"),
        "relative": os.path.relpath(private / "0050.png"),
        "process": "/proc/self/environ",
    }
    files = {"text": "note.txt", "image": "0050.png", "link": "0050.png", "member": "0052.png"}
    keys = {
        kind: hashlib.sha256(
            (private / files[kind]).read_bytes() if kind in files else kind.encode()
        ).hexdigest()
        for kind in found
    }
    reader = FeatureReader(find_space(root, None))
    row = np.empty((1, reader.spec.row_bytes("image")), np.uint8)
    reader.read_into("image", np.array([0]), row)
    space = Space.open(reader.paths)
    shard = ShardWriter(space, "image", space.next_shard("image"))
    for key in dict.fromkeys(keys.values()):
        shard.append(key, "full", row[0])
    shard.commit()
    space.grow("image")
    records = [MediaRecord(source=name, key=keys[kind]) for kind, name in found.items()]
    append_media(root, records, "stranger")
    samples = [
        Sample(
            id=kind,
            dataset="photos",
            messages=turns("What is this?", f"a {kind}"),
            media=(MediaRef(source=name),),
        )
        for kind, name in found.items()
    ]
    write_samples(root, "photos", samples)
    assert verify.verify(root, deep=True).broken is False
    return found


def not_opened(name: str) -> str:
    return f"the cache names {name}, which was not opened; --media DIR allows it"


def pictures(html: str) -> set[bytes]:
    """The image files in a page."""
    sources = [str(a["src"]) for a in Page(html).all("img")]
    return {base64.b64decode(source.split(",", 1)[1]) for source in sources}


def test_the_owner_sees_his_photographs_without_an_option(place: Place) -> None:
    files = {path.read_bytes() for path in place.photos.glob("*.png")}
    assert pictures(place.report(features="cache")) == files
    jpegs = [uri for uri in pictures(place.view(features="cache")) if uri.startswith(b"\xff\xd8")]
    assert len(jpegs) >= PHOTOS
    assert place.check(features="cache") == 0


def test_pages_name_what_was_not_opened(
    place: Place, names: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    private = {path.read_bytes() for path in place.private.glob("*.png") if path.is_file()}
    for page in (place.report(), place.view()):
        text = Page(page).text
        for kind, name in names.items():
            if kind != "link" or "Training run" in text:  # a view names one file of each row
                assert not_opened(name) in text, kind
        assert not pictures(page) & private
        assert base64.b64encode(SECRET[:30]).decode()[:36] not in page
    printed = capsys.readouterr().out
    assert printed.count("which was not opened; --media DIR allows it\n") == 2
    assert not any(data.startswith(b"\xff\xd8") for data in pictures(place.view()))


def test_a_check_leaves_them_out(place: Place, names: dict[str, str]) -> None:
    with pytest.raises(
        UserError, match=r"no media .* can be loaded \(\d+ the cache names /.*, which"
    ):
        place.check()


def test_with_media_the_right_ones_are_shown(
    place: Place, names: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    allowed = ("--media", place.private)
    page = place.report(*allowed)
    right = {(place.private / name).read_bytes() for name in ("0050.png", "0052.png")}
    assert pictures(page) == right
    text = Page(page).text
    assert "image cannot be read: a FIFO, refused" in text
    assert "image has changed since it was encoded" in text
    assert "image cannot be read" in text
    for kind in ("device", "process", "relative"):
        assert not_opened(names[kind]) in text
    view_page = place.view(*allowed)
    jpegs = [data for data in pictures(view_page) if data.startswith(b"\xff\xd8")]
    assert len(jpegs) >= 2
    capsys.readouterr()
    assert place.check(*allowed) == 1  # the rows are those of another image
    out = capsys.readouterr().out
    assert "left out 1 sources: file cannot be read: a FIFO, refused" in out
    assert "which was not opened; --media DIR allows it" in out


def test_a_cache_that_moved_needs_the_option(place: Place) -> None:
    moved = shutil.copytree(place.folder / "cache", place.folder / "moved")
    first = min(place.photos.glob("*.png"))
    assert not_opened(str(first)) in Page(place.view(features="moved")).text
    assert remembered(CacheRoot(moved)) == []
    files = {path.read_bytes() for path in place.photos.glob("*.png")}
    assert pictures(place.report("--media", place.photos, features="moved")) == files
    assert place.check("--media", place.photos, features="moved") == 0
    assert place.check("--dataset", f"folder:{place.photos}", features="moved") == 0  # it is named


def test_both_pages_have_one_policy(place: Place, names: dict[str, str]) -> None:
    found = set()
    for page in (place.view(), place.report()):
        parsed = loads_nothing(page)
        tags = [tag for tag, _ in parsed.tags]
        metas = parsed.all("meta")
        (policy,) = (m["content"] for m in metas if "content-security" in str(m).lower())
        assert tags.index("style") > tags.index("meta")  # what is before a policy is not under it
        rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
        assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
        assert "unsafe" not in rules["script-src"] and rules["script-src"].startswith("'sha256-")
        assert {rules["base-uri"], rules["form-action"]} == {"'none'"}
        found.add(policy)
    assert len(found) == 1


def test_text_that_hides_or_turns_text_is_shown_escaped(
    place: Place, names: dict[str, str], tmp_path: Path
) -> None:
    root = CacheRoot(shutil.copytree(place.download.path, tmp_path / "turned", symlinks=True))
    name = "/pictures/\u202egnp.exe\x1b[31m\u200b\x7f\u2028.png"
    reader = FeatureReader(find_space(root, None))
    key = reader.index["image"].keys[0].tobytes().hex()
    append_media(root, [MediaRecord(source=name, key=key)], "stranger")
    talk = turns("Which \u2066word\x07?\nThe second line", "a\x9bcat")
    ref = MediaRef(source=name)
    write_samples(root, "photos", [Sample(id="1", dataset="photos", messages=talk, media=(ref,))])
    for page in (place.view(features=root.path.as_posix()), place.report(features=str(root.path))):
        assert "\\u202egnp.exe\\x1b[31m\\u200b\\x7f\\u2028.png" in page
        assert not set(page) & set("\u202e\x1b\u200b\x7f\u2028\u2066\x07\x9b")


def test_a_missing_folder_is_one_line(place: Place, names: dict[str, str]) -> None:
    nowhere = place.folder / "nowhere"
    for command in (place.view, place.report, place.check):
        with pytest.raises(Exception, match=rf"^--media {nowhere}: no such folder$"):
            command("--media", nowhere)
