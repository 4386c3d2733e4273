"""The plan of a job: which sources are encoded, reused, failed before or missing.

counter = MediaCounter()
write_samples(root, "pets", counter.count(samples))
plan = make_plan(counter.media, read_media(root), Present.of(space), space="s")
plan.todo, plan.reused, plan.known_failures, plan.missing
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cache.format.embedded.names import row_source
from cache.format.frame_sampling import frame_views
from cache.store.ledger import MediaRecord
from cache.store.paths import CacheRoot
from cache.store.samples import MediaRef, Message, Sample
from cache.store.space import Present, Space
from cache.store.writer import ShardWriter
from encode.plan.plan import OWN_ATTEMPTS, MediaCounter, Mention, Plan, make_plan
from encode.worker.local_files import identify
from encode.worker.messages import SourceTask
from tests.support.spaces import SPEC as TOY

KEY = "ab" * 32
OTHER = "cd" * 32


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    path.write_bytes(b"bytes")
    return path


def known(path: Path, **values: object) -> MediaRecord:
    """Return the ledger's record of a file as it is now."""
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


def test_each_source_is_counted_once(image: Path) -> None:
    assert sorted_as(plan_of(image, None)) == "todo"
    assert sorted_as(plan_of(image, known(image), KEY)) == "reused"
    assert sorted_as(plan_of(image, known(image), OTHER)) == "todo"
    assert sorted_as(plan_of(image, known(image), KEY, rehash=True)) == "todo"


def test_notes_of_reused_media_are_counted(image: Path) -> None:
    noted = known(image, note="ends early: 1.0 s of 2.0 s; HDR (PQ), shown")
    assert plan_of(image, noted, KEY).notes == {"ends early": 1, "HDR": 1}
    assert plan_of(image, noted, OTHER).notes == {}, "it is encoded again, so it is counted then"
    image.unlink()
    assert plan_of(image, noted, KEY).notes == {"ends early": 1, "HDR": 1}


@pytest.mark.parametrize("stamp", ["size", "mtime_ns", "ctime_ns", "inode"])
def test_a_file_is_read_again_if_any_part_of_its_identity_differs(image: Path, stamp: str) -> None:
    record = known(image)
    moved = replace(record, **{stamp: getattr(record, stamp) + 1})
    assert sorted_as(plan_of(image, moved, KEY)) == "todo"


def test_a_failure_is_final_until_the_file_changes(image: Path) -> None:
    broken = known(image, status="failed", stage="decode", error="truncated")
    assert sorted_as(plan_of(image, broken)) == "failed"
    assert sorted_as(plan_of(image, broken, rehash=True)) == "todo"
    changed = replace(broken, size=1)
    assert plan_of(image, changed).todo == (SourceTask(source=str(image)),)


def test_a_failure_of_our_own_is_tried_again_by_a_few_jobs_of_its_space(image: Path) -> None:
    ours = known(image, status="failed", stage="encode", error="s: NaN")
    assert plan_of(image, ours).todo == (SourceTask(source=str(image), attempts=1),)
    assert sorted_as(plan_of(image, replace(ours, attempts=OWN_ATTEMPTS))) == "failed"
    elsewhere = replace(ours, attempts=OWN_ATTEMPTS, error="another-space: NaN")
    assert sorted_as(plan_of(image, elsewhere)) == "todo"
    assert sorted_as(plan_of(image, elsewhere, KEY)) == "reused", "its row exists"


def test_a_missing_file_is_recorded_once(tmp_path: Path) -> None:
    gone = tmp_path / "gone.png"
    (record,) = plan_of(gone, None).missing
    assert (record.status, record.stage, record.error) == ("failed", "fetch", "no such file")
    assert sorted_as(plan_of(gone, record)) == "failed"
    encoded = MediaRecord(source=str(gone), key=KEY)
    assert sorted_as(plan_of(gone, encoded, KEY)) == "reused", "features outlive their file"
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


def test_a_url_is_assumed_to_return_the_bytes_it_returned_before() -> None:
    media = {URL: Mention("image")}
    assert sorted_as(web_plan(media)) == "todo"
    came = MediaRecord(source=URL, key=KEY)
    assert sorted_as(web_plan(media, came, present=Present({KEY}))) == "reused"
    (task,) = web_plan(media, came, present=Present({OTHER})).todo
    assert task.key == KEY, "the media store finds the bytes by it"
    gone = MediaRecord(source=URL, status="failed", stage="fetch", error="HTTP 404")
    assert sorted_as(web_plan(media, gone)) == "failed"
    (task,) = web_plan(media, gone, retry_failed=True).todo
    assert task.attempts == 1


def test_a_url_whose_stated_sha256_is_in_the_space_is_not_downloaded() -> None:
    other = MediaRecord(source="/same.jpg", key=KEY, width=640, height=480, bytes=9)
    media = {URL: Mention("image", KEY)}
    plan = web_plan(media, other, present=Present({KEY}))
    assert sorted_as(plan) == "reused"
    assert plan.recognised == (replace(other, source=URL),)
    assert sorted_as(web_plan(media, other)) == "todo", "another space does not have it"
    assert sorted_as(web_plan({URL: Mention("image", OTHER)}, other)) == "todo"


def test_a_url_is_downloaded_again_if_the_data_set_states_another_sha256() -> None:
    media = {URL: Mention("image", OTHER)}
    came = MediaRecord(source=URL, key=KEY)
    assert sorted_as(web_plan(media, came, present=Present({KEY}))) == "todo"
    assert (
        sorted_as(web_plan({URL: Mention("image", KEY)}, came, present=Present({KEY}))) == "reused"
    )
    refused = MediaRecord(source=URL, status="failed", stage="verify", error="other bytes")
    assert sorted_as(web_plan(media, refused)) == "failed", "but only once"


def test_urls_of_one_host_are_spread_out() -> None:
    slow = {f"https://slow.example/{i}": Mention("image") for i in range(4)}
    quick = {f"https://quick.example/{i}": Mention("image") for i in range(2)}
    sources = [task.source for task in web_plan(slow | quick).todo]
    hosts = [source.split("/")[2].split(".")[0] for source in sources]
    assert hosts == ["slow", "quick", "slow", "quick", "slow", "slow"]
    assert [source[-1] for source in sources if "slow" in source] == list("0123")


def test_the_first_stated_sha256_of_a_source_counts() -> None:
    counter = MediaCounter()
    for sha256 in (None, KEY, OTHER):
        counter.add(MediaRef(source=URL, sha256=sha256))
    assert counter.media == {URL: Mention("image", KEY)}


# ---- videos


def test_a_video_is_present_if_all_its_frames_are(tmp_path: Path) -> None:
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
    assert not one.has("video", KEY, None), "its duration is unknown"
    assert not one.has("video", OTHER, 1.5)
    assert not one.has("image", KEY, None), "frames are not images"
    unknown = web_plan(media, present=present)
    assert (dict(unknown.new_rows), unknown.unread) == ({"frame": 128}, 1)


def test_counting_yields_the_samples_and_counts_each_source_once() -> None:
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


def test_media_inside_a_file_are_read_again_only_when_that_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"rows")
    sources = [row_source("parquet", str(path), "image", row) for row in range(3)]
    identity = identify(sources[0])
    assert identity is not None
    ledger = {s: identity.stamp(MediaRecord(source=s, key=KEY)) for s in sources[:2]}
    media = dict.fromkeys(sources, Mention("image"))
    plan = make_plan(media, ledger, Present({KEY}), space="s")
    assert (plan.reused, [task.source for task in plan.todo]) == (2, sources[2:])
    path.write_bytes(b"other rows")
    assert len(make_plan(media, ledger, Present({KEY}), space="s").todo) == 3
    path.unlink()  # features outlive their file
    plan = make_plan(media, ledger, Present({KEY}), space="s")
    assert (plan.reused, [one.source for one in plan.missing]) == (2, sources[2:])
