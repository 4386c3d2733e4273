"""What a job will do and cost, before it starts: counts, refusals, and the words for them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from cache.format.frame_sampling import frame_views
from cache.format.spec import FeatureSpec
from cache.store.ledger import MediaRecord
from cache.store.paths import CacheRoot
from cache.store.references import Present
from cache.store.samples import MediaRef, Message, Sample
from cache.store.space import Space
from cache.store.writer import ShardWriter
from configs import UserError
from configs.console import free_bytes
from encode.estimate import (
    SPARE_BYTES,
    Speed,
    break_even,
    check_fits,
    describe,
    table,
)
from encode.plan import OVERHEAD_BYTES, OWN_ATTEMPTS, MediaCounter, Mention, Plan, make_plan
from encode.worker.local_files import identify
from encode.worker.messages import SourceTask
from tests.support.spaces import SPEC as TOY

KEY = "ab" * 32
OTHER = "cd" * 32

CLIP = FeatureSpec(
    encoder="clip",
    architecture="open_clip:ViT-L-14-336-quickgelu",
    weights="0" * 64,
    activation="quick_gelu",
    blocks=(22,),
    image_size=336,
    patch_size=14,
    width=1024,
    fit="squash",
    resize="pillow:bicubic",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    compute_dtype="float32",
    batch_size=8,
    codec="int8",
)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    path.write_bytes(b"bytes")
    return path


def known(path: Path, **values: object) -> MediaRecord:
    """The ledger's record of a file as it is now."""
    identity = identify(str(path))
    assert identity is not None
    record = MediaRecord(source=str(path), key=KEY)
    return replace(identity.stamp(record), **values)  # type: ignore[arg-type]


def plan_of(path: Path, record: MediaRecord | None, *present: str, rehash: bool = False) -> Plan:
    ledger = {} if record is None else {str(path): record}
    media = {str(path): Mention("image")}
    return make_plan(media, ledger, Present(set(present)), space="s", rehash=rehash)


def sorted_as(plan: Plan) -> str:
    names = {
        "todo": len(plan.todo),
        "reused": plan.reused,
        "failed": plan.known_failures,
        "missing": len(plan.missing),
    }
    (name,) = [name for name, count in names.items() if count]
    assert plan.media == 1
    return name


def test_each_media_has_one_fate(image: Path) -> None:
    assert sorted_as(plan_of(image, None)) == "todo"
    assert sorted_as(plan_of(image, known(image), KEY)) == "reused"
    assert sorted_as(plan_of(image, known(image), OTHER)) == "todo"
    assert sorted_as(plan_of(image, known(image), KEY, rehash=True)) == "todo"


@pytest.mark.parametrize("stamp", ["size", "mtime_ns", "ctime_ns", "inode"])
def test_any_stamp_that_differs_means_reading_again(image: Path, stamp: str) -> None:
    record = known(image)
    moved = replace(record, **{stamp: getattr(record, stamp) + 1})
    assert sorted_as(plan_of(image, moved, KEY)) == "todo"


def test_a_failure_of_the_media_stands_until_the_file_changes(image: Path) -> None:
    broken = known(image, status="failed", stage="decode", error="truncated")
    assert sorted_as(plan_of(image, broken)) == "failed"
    assert sorted_as(plan_of(image, broken, rehash=True)) == "todo"
    changed = replace(broken, size=1)
    assert plan_of(image, changed).todo == (SourceTask(source=str(image)),)


def test_a_failure_of_ours_is_tried_a_few_times_and_only_for_its_space(image: Path) -> None:
    ours = known(image, status="failed", stage="encode", error="s: NaN")
    assert plan_of(image, ours).todo == (SourceTask(source=str(image), attempts=1),)
    assert sorted_as(plan_of(image, replace(ours, attempts=OWN_ATTEMPTS))) == "failed"
    elsewhere = replace(ours, attempts=OWN_ATTEMPTS, error="another-space: NaN")
    assert sorted_as(plan_of(image, elsewhere)) == "todo"
    assert sorted_as(plan_of(image, elsewhere, KEY)) == "reused", "a row that is here counts"


def test_a_missing_file_is_news_once(tmp_path: Path) -> None:
    gone = tmp_path / "gone.png"
    (record,) = plan_of(gone, None).missing
    assert (record.status, record.stage, record.error) == ("failed", "fetch", "no such file")
    assert sorted_as(plan_of(gone, record)) == "failed"
    gone.write_bytes(b"here now")
    assert sorted_as(plan_of(gone, record)) == "todo"


def test_known_bytes_are_counted_once(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths:
        path.write_bytes(b"same")
    ledger = {str(p): known(p) for p in paths[:2]}
    plan = make_plan({str(p): Mention("image") for p in paths}, ledger, Present(), space="s")
    assert (len(plan.todo), plan.unread, plan.rows) == (3, 1, 2)


# ---- the web


def web_plan(
    media: dict[str, Mention],
    *records: MediaRecord,
    present: Present | None = None,
    retry_failed: bool = False,
) -> Plan:
    ledger = {record.source: record for record in records}
    return make_plan(media, ledger, present or Present(), space="s", retry_failed=retry_failed)


URL = "https://host.example/a.jpg"


def test_what_a_url_once_gave_counts_as_what_it_gives() -> None:
    media = {URL: Mention("image")}
    assert sorted_as(web_plan(media)) == "todo"
    came = MediaRecord(source=URL, key=KEY)
    assert sorted_as(web_plan(media, came, present=Present({KEY}))) == "reused"
    (task,) = web_plan(media, came, present=Present({OTHER})).todo
    assert task.key == KEY, "kept bytes are found by it"
    gone = MediaRecord(source=URL, status="failed", stage="fetch", error="HTTP 404")
    assert sorted_as(web_plan(media, gone)) == "failed"
    (task,) = web_plan(media, gone, retry_failed=True).todo
    assert task.attempts == 1


def test_an_image_known_by_its_hash_is_not_asked_for() -> None:
    other = MediaRecord(source="/same.jpg", key=KEY, width=640, height=480, bytes=9)
    media = {URL: Mention("image", KEY)}
    plan = web_plan(media, other, present=Present({KEY}))
    assert sorted_as(plan) == "reused"
    assert plan.recognised == (replace(other, source=URL),)
    assert sorted_as(web_plan(media, other)) == "todo", "another space lacks it"
    assert sorted_as(web_plan({URL: Mention("image", OTHER)}, other)) == "todo"


def test_a_url_that_gave_other_bytes_than_its_data_set_means_is_asked_again() -> None:
    media = {URL: Mention("image", OTHER)}
    came = MediaRecord(source=URL, key=KEY)
    assert sorted_as(web_plan(media, came, present=Present({KEY}))) == "todo"
    assert (
        sorted_as(web_plan({URL: Mention("image", KEY)}, came, present=Present({KEY}))) == "reused"
    )
    refused = MediaRecord(source=URL, status="failed", stage="verify", error="other bytes")
    assert sorted_as(web_plan(media, refused)) == "failed", "and not every time"


def test_one_host_does_not_stand_in_a_row() -> None:
    slow = {f"https://slow.example/{i}": Mention("image") for i in range(4)}
    quick = {f"https://quick.example/{i}": Mention("image") for i in range(2)}
    sources = [task.source for task in web_plan(slow | quick).todo]
    hosts = [source.split("/")[2].split(".")[0] for source in sources]
    assert hosts == ["slow", "quick", "slow", "quick", "slow", "slow"]
    assert [source[-1] for source in sources if "slow" in source] == list("0123")


def test_the_first_hash_that_a_data_set_gives_is_believed() -> None:
    counter = MediaCounter()
    for sha256 in (None, KEY, OTHER):
        counter.add(MediaRef(source=URL, sha256=sha256))
    assert counter.media == {URL: Mention("image", KEY)}


# ---- videos


def test_a_video_is_present_when_every_frame_asked_for_is(tmp_path: Path) -> None:
    space = Space.create(CacheRoot(tmp_path), TOY, {})
    shard = ShardWriter(space, "frame", 0)
    for view in frame_views(1.5, 128)[:-1]:
        shard.append(KEY, view, bytes(TOY.row_bytes("frame")))
    shard.commit()
    video = MediaRecord(source=URL, key=KEY, kind="video", duration_s=1.5)
    media = {URL: Mention("video")}
    present = Present.of(space)
    plan = web_plan(media, video, present=present)
    assert (sorted_as(plan), dict(plan.new_rows), plan.unread) == ("todo", {"frame": 1}, 0)
    fewer = Present.of(space, max_frames=2)  # the first and the last, which is missing
    assert fewer.missing(KEY, frame_views(1.5, 2)) == ["t:1500000"]
    one = Present.of(space, max_frames=1)
    assert one.has("video", KEY, 1.5)
    assert not one.has("video", KEY, None), "of unknown length"
    assert not one.has("video", OTHER, 1.5)
    assert not one.has("image", KEY, None), "frames are no image"
    unknown = web_plan(media, present=present)
    assert (dict(unknown.new_rows), unknown.unread) == ({"frame": 128}, 1)


def test_samples_pass_through_and_their_media_are_counted_once() -> None:
    samples = [
        Sample(
            id=str(i),
            dataset="d",
            messages=(Message(role="user", content="?"),),
            media=(MediaRef(source=f"/{i % 2}"), MediaRef(source="/x")),
        )
        for i in range(5)
    ]
    counter = MediaCounter()
    assert list(counter.count(samples)) == samples
    assert (counter.samples, list(counter.media)) == (5, ["/0", "/x", "/1"])


# ---- the disk


def images(count: int) -> Plan:
    todo = (SourceTask(source="/a"),) * min(count, 1000)
    return Plan(todo=todo, new_rows={"image": count}, unread=count)


def test_bytes_are_rows_and_a_little() -> None:
    row = 576 * 1024 + 576 * 16 * 2 + 1024 * 2
    assert images(1000).bytes_needed(CLIP) == 1000 * (row + 4 + OVERHEAD_BYTES)
    tar = replace(CLIP, container="webdataset")
    assert images(1000).bytes_needed(tar) == 1000 * (row + 2048 + OVERHEAD_BYTES)


def test_a_job_that_cannot_fit_is_refused_with_what_would() -> None:
    plan = images(717_042)  # pixmo-cap
    free = 120_000_000_000
    with pytest.raises(UserError) as refused:
        check_fits(plan, CLIP, free)
    message = str(refused.value)
    assert "the job needs 438 GB, 120 GB free" in message
    assert "what would fit: --codec int8 --pool 2 (111 GB), --codec fp16 --pool 3 " in message
    assert "--pool 1" not in message
    assert "\n" not in message
    lines = table(plan, CLIP, free).splitlines()
    assert lines[0].split() == ["codec", "pool=1", "pool=2", "pool=3", "pool=4"]
    assert lines[1].split()[:4] == ["fp16", "846", "GB", "-"]
    assert lines[2].split()[4:7] == ["111", "GB", "fits"]
    assert lines[3].split()[:7] == ["int4", "226", "GB", "-", "57.8", "GB", "fits"]


def test_the_last_bytes_of_a_disk_stay_free() -> None:
    plan = images(10)
    needed = plan.bytes_needed(CLIP)
    check_fits(plan, CLIP, needed + SPARE_BYTES)
    with pytest.raises(UserError):
        check_fits(plan, CLIP, needed + SPARE_BYTES - 1)
    check_fits(Plan(reused=10), CLIP, 0)


def test_nothing_fits() -> None:
    with pytest.raises(UserError, match="no codec and pooling would fit"):
        check_fits(images(10**9), CLIP, 10**9)


def test_free_space_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    assert free_bytes(tmp_path / "not" / "yet") == pytest.approx(
        status.f_bavail * status.f_frsize, rel=0.05
    )


# ---- time


def speed(batch_s: float, **values: object) -> Speed:
    fields = {"batch_size": 8, "devices": 1, "cores": 2, "shared": True, "how": "made up"}
    return Speed(batch_s=batch_s, **{**fields, **values})  # type: ignore[arg-type]


def test_time_adds_up_on_a_cpu_and_overlaps_on_a_gpu() -> None:
    assert speed(4.0).seconds(100) == pytest.approx(100 * (0.5 + 0.0075))
    assert speed(0.08, shared=False, devices=4).seconds(100) == pytest.approx(0.75)
    assert speed(0.8, shared=False, devices=4).seconds(100) == pytest.approx(2.5)


def test_caching_pays_from_the_second_pass_unless_reading_is_as_slow() -> None:
    assert break_even(images(1000), CLIP, speed(4.0)).startswith("from pass 2 on")
    slow_to_read = speed(0.0, cores=15, shared=False)
    assert break_even(images(1000), CLIP, slow_to_read).startswith("not in time")


def test_the_plan_in_words() -> None:
    plan = replace(images(3), reused=5, known_failures=1)
    text = describe(plan, CLIP, samples=20, free=10**12, speed=speed(4.0))
    assert text.splitlines()[:4] == [
        f"space    {CLIP.name}: 576 tokens x 1024, 610 kB per image (int8, pool 1)",
        "media    9 in 20 samples: 3 to do, 5 reused, 1 failed before",
        "rows     at most 3, one view each",
        "disk     at most 1.83 MB needed, 1 TB free",
    ]
    assert text.splitlines()[4] == "time     about 2 s (made up)"
