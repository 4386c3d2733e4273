"""What a job will do and cost, before it starts: counts, refusals, and the words for them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from cache.spec import FeatureSpec
from cache.tables import MediaRecord, MediaRef, Message, Sample
from configs import UserError
from encode.local import identify
from encode.plan import (
    OVERHEAD_BYTES,
    OWN_ATTEMPTS,
    SPARE_BYTES,
    MediaCounter,
    Plan,
    Speed,
    break_even,
    check_fits,
    describe,
    free_bytes,
    make_plan,
    size_text,
    table,
    time_text,
)
from encode.tasks import SourceTask

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
def picture(tmp_path: Path) -> Path:
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
    return make_plan({str(path): "picture"}, ledger, set(present), space="s", rehash=rehash)


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


def test_each_media_has_one_fate(picture: Path) -> None:
    assert sorted_as(plan_of(picture, None)) == "todo"
    assert sorted_as(plan_of(picture, known(picture), KEY)) == "reused"
    assert sorted_as(plan_of(picture, known(picture), OTHER)) == "todo"
    assert sorted_as(plan_of(picture, known(picture), KEY, rehash=True)) == "todo"


@pytest.mark.parametrize("stamp", ["size", "mtime_ns", "ctime_ns", "inode"])
def test_any_stamp_that_differs_means_reading_again(picture: Path, stamp: str) -> None:
    record = known(picture)
    moved = replace(record, **{stamp: getattr(record, stamp) + 1})
    assert sorted_as(plan_of(picture, moved, KEY)) == "todo"


def test_a_failure_of_the_media_stands_until_the_file_changes(picture: Path) -> None:
    broken = known(picture, status="failed", stage="decode", error="truncated")
    assert sorted_as(plan_of(picture, broken)) == "failed"
    assert sorted_as(plan_of(picture, broken, rehash=True)) == "todo"
    changed = replace(broken, size=1)
    assert plan_of(picture, changed).todo == (SourceTask(source=str(picture)),)


def test_a_failure_of_ours_is_tried_a_few_times_and_only_for_its_space(picture: Path) -> None:
    ours = known(picture, status="failed", stage="encode", error="s: NaN")
    assert plan_of(picture, ours).todo == (SourceTask(source=str(picture), attempts=1),)
    assert sorted_as(plan_of(picture, replace(ours, attempts=OWN_ATTEMPTS))) == "failed"
    elsewhere = replace(ours, attempts=OWN_ATTEMPTS, error="another-space: NaN")
    assert sorted_as(plan_of(picture, elsewhere)) == "todo"
    assert sorted_as(plan_of(picture, elsewhere, KEY)) == "reused", "a row that is here counts"


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
    plan = make_plan({str(p): "picture" for p in paths}, ledger, set(), space="s")
    assert (len(plan.todo), plan.unread, plan.new_keys) == (3, 1, 2)


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
    assert list(counter.watch(samples)) == samples
    assert (counter.samples, list(counter.media)) == (5, ["/0", "/x", "/1"])


# ---- the disk


def pictures(count: int) -> Plan:
    todo = (SourceTask(source="/a"),) * min(count, 1000)
    return Plan(todo=todo, new_keys=count, unread=count)


def test_bytes_are_rows_and_a_little() -> None:
    assert pictures(1000).bytes_needed(CLIP) == 1000 * (576 * 1024 + 576 * 16 * 2 + OVERHEAD_BYTES)


def test_a_job_that_cannot_fit_is_refused_with_what_would() -> None:
    plan = pictures(717_042)  # pixmo-cap
    free = 120_000_000_000
    with pytest.raises(UserError) as refused:
        check_fits(plan, CLIP, free)
    message = str(refused.value)
    assert "the job needs 436 GB, 120 GB free" in message
    assert "what would fit: --codec int8 --pool 2 (109 GB), --codec fp16 --pool 3 " in message
    assert "--pool 1" not in message
    assert "\n" not in message
    lines = table(plan, CLIP, free).splitlines()
    assert lines[0].split() == ["codec", "pool", "1", "pool", "2", "pool", "3", "pool", "4"]
    assert lines[1].split()[:4] == ["fp16", "846", "GB", "-"]
    assert lines[2].split()[4:7] == ["109", "GB", "fits"]


def test_the_last_bytes_of_a_disk_stay_free() -> None:
    plan = pictures(10)
    needed = plan.bytes_needed(CLIP)
    check_fits(plan, CLIP, needed + SPARE_BYTES)
    with pytest.raises(UserError):
        check_fits(plan, CLIP, needed + SPARE_BYTES - 1)
    check_fits(Plan(reused=10), CLIP, 0)


def test_nothing_fits() -> None:
    with pytest.raises(UserError, match="no codec and pooling would fit"):
        check_fits(pictures(10**9), CLIP, 10**9)


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
    assert break_even(pictures(1000), CLIP, speed(4.0)).startswith("from pass 2 on")
    slow_to_read = speed(0.0, cores=15, shared=False)
    assert break_even(pictures(1000), CLIP, slow_to_read).startswith("not in time")


def test_the_plan_in_words() -> None:
    plan = replace(pictures(3), reused=5, known_failures=1)
    text = describe(plan, CLIP, samples=20, free=10**12, speed=speed(4.0))
    assert text.splitlines()[:4] == [
        f"space    {CLIP.name}: 576 tokens x 1024, 608 kB a picture (int8, pool 1)",
        "media    9 in 20 samples: 3 to do, 5 reused, 1 failed before",
        "rows     at most 3, one view each",
        "disk     at most 1.8 MB needed, 1.0 TB free",
    ]
    assert text.splitlines()[4] == "time     about 2 s (made up)"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (99_449, "99.4 kB"),
        (99_600, "100 kB"),
        (608_256, "608 kB"),
        (1.5e9, "1.5 GB"),
        (1.2e12, "1.2 TB"),
        (5e15, "5000 TB"),
    ],
)
def test_sizes_for_people(size: float, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "under a second"),
        (1, "1 s"),
        (89, "89 s"),
        (91, "2 min"),
        (5399, "90 min"),
        (7300, "2 h"),
        (172_799, "48 h"),
        (172_801, "2.0 days"),
    ],
)
def test_times_for_people(seconds: float, text: str) -> None:
    assert time_text(seconds) == text
