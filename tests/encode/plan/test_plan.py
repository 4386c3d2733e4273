"""The plan of a job: which sources are encoded, reused, failed before or missing.

counter = MediaCounter()
write_samples(root, "pets", counter.count(samples))
plan = make_plan(counter.media, MediaRows(root), Present.of(space), space="s")
plan.todo, plan.reused, plan.known_failures, plan.missing
"""

from __future__ import annotations

import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache.format.embedded.names import row_source
from cache.format.frame_sampling import frame_views
from cache.store.ledger import (
    MediaRecord,
    MediaRows,
    append_media,
    read_media,
    records_table,
)
from cache.store.paths import CacheRoot
from cache.store.samples import MediaRef
from cache.store.space import Present, Space
from cache.store.writer import ShardWriter
from encode.plan.known import OWN_ATTEMPTS
from encode.plan.media import Media, MediaCounter, Mention
from encode.plan.plan import Plan, make_plan
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


def plan(
    media: dict[str, Mention],
    *records: MediaRecord,
    present: Present | None = None,
    rehash: bool = False,
    retry_failed: bool = False,
) -> Plan:
    return make_plan(
        Media.of(media),
        [records_table(records)],
        present or Present(),
        space="s",
        rehash=rehash,
        retry_failed=retry_failed,
    )


def plan_of(path: Path, record: MediaRecord | None, *present: str, rehash: bool = False) -> Plan:
    records = () if record is None else (record,)
    return plan(
        {str(path): Mention("image")}, *records, present=Present(set(present)), rehash=rehash
    )


def sorted_as(found: Plan) -> str:
    names = {
        "todo": len(found.todo),
        "reused": found.reused,
        "failed": found.known_failures,
        "missing": len(found.missing),
    }
    (name,) = [name for name, count in names.items() if count]
    assert found.media == 1
    return name


def test_each_source_is_counted_once(image: Path) -> None:
    assert sorted_as(plan_of(image, None)) == "todo"
    assert sorted_as(plan_of(image, known(image), KEY)) == "reused"
    assert sorted_as(plan_of(image, known(image), OTHER)) == "todo"
    assert sorted_as(plan_of(image, known(image), KEY, rehash=True)) == "todo"


def test_many_inputs_are_worth_compiled_loops() -> None:
    some = [SourceTask(source=str(number)) for number in range(500)]
    assert Plan(todo=some).compiles
    assert not Plan(todo=some[1:]).compiles
    assert Plan(todo=some[:32], videos=32).compiles, "a video counts as 16 frames"
    assert not Plan(todo=some[:31], videos=31).compiles


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
    found = plan({str(p): Mention("image") for p in paths}, *map(known, paths[:2]))
    assert (len(found.todo), found.unread, found.rows) == (3, 1, 2)


# ---- the web


URL = "https://host.example/a.jpg"


def test_a_url_is_assumed_to_return_the_bytes_it_returned_before() -> None:
    media = {URL: Mention("image")}
    assert sorted_as(plan(media)) == "todo"
    came = MediaRecord(source=URL, key=KEY)
    assert sorted_as(plan(media, came, present=Present({KEY}))) == "reused"
    (task,) = plan(media, came, present=Present({OTHER})).todo
    assert task.key == KEY, "the media store finds the bytes by it"
    gone = MediaRecord(source=URL, status="failed", stage="fetch", error="HTTP 404")
    assert sorted_as(plan(media, gone)) == "failed"
    (task,) = plan(media, gone, retry_failed=True).todo
    assert task.attempts == 1


def test_a_url_whose_stated_sha256_is_in_the_space_is_not_downloaded() -> None:
    other = MediaRecord(source="/same.jpg", key=KEY, width=640, height=480, bytes=9)
    media = {URL: Mention("image", KEY)}
    found = plan(media, other, present=Present({KEY}))
    assert sorted_as(found) == "reused"
    assert found.recognised == (replace(other, source=URL),)
    assert sorted_as(plan(media, other)) == "todo", "another space does not have it"
    assert sorted_as(plan({URL: Mention("image", OTHER)}, other)) == "todo"


def test_a_url_is_downloaded_again_if_the_data_set_states_another_sha256() -> None:
    media = {URL: Mention("image", OTHER)}
    came = MediaRecord(source=URL, key=KEY)
    assert sorted_as(plan(media, came, present=Present({KEY}))) == "todo"
    assert sorted_as(plan({URL: Mention("image", KEY)}, came, present=Present({KEY}))) == "reused"
    refused = MediaRecord(source=URL, status="failed", stage="verify", error="other bytes")
    assert sorted_as(plan(media, refused)) == "failed", "but only once"


def test_urls_of_one_host_are_spread_out() -> None:
    slow = {f"https://slow.example/{i}": Mention("image") for i in range(4)}
    quick = {f"https://quick.example/{i}": Mention("image") for i in range(2)}
    sources = [task.source for task in plan(slow | quick).todo]
    hosts = [source.split("/")[2].split(".")[0] for source in sources]
    assert hosts == ["slow", "quick", "slow", "quick", "slow", "slow"]
    assert [source[-1] for source in sources if "slow" in source] == list("0123")


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
    found = plan(media, video, present=present)
    assert (sorted_as(found), dict(found.new_rows), found.unread) == ("todo", {"frame": 1}, 0)
    fewer = Present.of(space, max_frames=2)  # the first and the last, which is missing
    assert fewer.missing(KEY, frame_views(1.5, 2)) == ["t:1500000"]
    one = Present.of(space, max_frames=1)
    assert one.has("video", KEY, 1.5)
    assert not one.has("video", KEY, None), "its duration is unknown"
    assert not one.has("video", OTHER, 1.5)
    assert not one.has("image", KEY, None), "frames are not images"
    unknown = plan(media, present=present)
    assert (dict(unknown.new_rows), unknown.unread, unknown.untimed) == ({"frame": 128}, 1, 1)


def test_media_inside_a_file_are_read_again_only_when_that_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"rows")
    sources = [row_source("parquet", str(path), "image", row) for row in range(3)]
    identity = identify(sources[0])
    assert identity is not None
    records = [identity.stamp(MediaRecord(source=s, key=KEY)) for s in sources[:2]]
    media, present = dict.fromkeys(sources, Mention("image")), Present({KEY})
    found = plan(media, *records, present=present)
    assert (found.reused, [task.source for task in found.todo]) == (2, sources[2:])
    path.write_bytes(b"other rows")
    assert len(plan(media, *records, present=present).todo) == 3
    path.unlink()  # features outlive their file
    found = plan(media, *records, present=present)
    assert (found.reused, [one.source for one in found.missing]) == (2, sources[2:])


# ---- columns against objects


def sorted_by_objects(
    media: dict[str, Mention],
    ledger: dict[str, MediaRecord],
    present: Present,
    *,
    rehash: bool,
    retry_failed: bool,
) -> dict[str, list[object]]:
    """Return what a plan has, by its rules, one source after the other."""
    by_key = {r.key: r for r in ledger.values() if r.status == "ok" and r.width}
    found: dict[str, list[object]] = {name: [] for name in SORTED}
    for source, mention in media.items():
        record, web = ledger.get(source), source.startswith("https:")
        identity = None if web else identify(source)
        if record is not None and record.kind != mention.kind:
            record = None
        in_space = record is not None and present.has(record.kind, record.key, record.duration_s)
        if identity is None and not web:
            if in_space:
                found["reused"].append(source)
            elif record is not None and record.stage == "fetch":
                found["failed"].append(source)
            else:
                attempts = record.attempts if record and record.status == "failed" else 0
                found["missing"].append((source, attempts + 1))
            continue
        unchanged = record is not None and (
            identity is None or (not rehash and identity.matches(record))
        )
        if web and record and mention.sha256 and record.key and mention.sha256 != record.key:
            unchanged, in_space = unchanged and record.status == "failed", False
        twin = by_key.get(mention.sha256) if web and not in_space else None
        if unchanged and in_space:
            found["reused"].append(source)
        elif twin and twin.kind == mention.kind and present.has(twin.kind, twin.key, None):
            found["recognised"].append(source)
        elif unchanged and record and final(record) and not retry_failed:
            found["failed"].append(source)
        else:
            known = record if unchanged else None
            task = SourceTask(
                source=source,
                kind=mention.kind,
                attempts=known.attempts if known and known.status == "failed" else 0,
                sha256=mention.sha256,
                key=known.key if known and web and not mention.sha256 else None,
            )
            found["todo"].append(task)
    return found


SORTED = ("todo", "reused", "failed", "missing", "recognised")


def final(record: MediaRecord) -> bool:
    if record.status != "failed":
        return False
    ours = record.stage in ("encode", "write")
    return not ours or ((record.error or "").startswith("s: ") and record.attempts >= OWN_ATTEMPTS)


KEYS = [f"{digit}" * 64 for digit in "abc"]


@st.composite
def media_records(draw: st.DrawFn, source: str, path: str | None) -> MediaRecord:
    record = MediaRecord(
        source=source,
        key=draw(st.sampled_from([None, *KEYS])),
        kind=draw(st.sampled_from(["image", "image", "video"])),
        width=draw(st.sampled_from([0, 9])),
        attempts=draw(st.integers(1, 4)),
    )
    if path is not None and draw(st.booleans()) and (identity := identify(path)) is not None:
        record = identity.stamp(record)
        if draw(st.booleans()):
            record = replace(record, mtime_ns=(record.mtime_ns or 0) + 1)
    stage = draw(st.sampled_from([None, None, "fetch", "decode", "encode"]))
    if stage is None:
        return record if record.key else replace(record, key=KEYS[0])
    error = draw(st.sampled_from(["s: NaN", "t: NaN"]))
    return replace(record, status="failed", stage=stage, error=error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    for name in "ab":
        (folder / name).write_bytes(name.encode())
    return folder


@settings(deadline=None, max_examples=200, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_columns_sort_as_objects_do(folder: Path, data: st.DataObject) -> None:
    """Random ledgers of several parts, with rows that are replaced, and of which keys are kept."""
    files = [str(folder / name) for name in "abc"]  # c does not exist
    sources = [*files, "https://x.example/1", "https://x.example/2", "https://y.example/1"]
    media = {
        source: Mention(
            data.draw(st.sampled_from(["image", "image", "image", "video"])),
            data.draw(st.sampled_from([None, None, *KEYS])),
        )
        for source in data.draw(st.permutations(sources))
    }
    ledger = [
        [
            data.draw(media_records(source, source if source in files else None))
            for source in data.draw(st.lists(st.sampled_from([*sources, "/other"]), max_size=6))
        ]
        for _ in range(data.draw(st.integers(0, 3)))
    ]
    present = Present(set(data.draw(st.lists(st.sampled_from(KEYS), max_size=2))))
    options = {"rehash": data.draw(st.booleans()), "retry_failed": data.draw(st.booleans())}
    with tempfile.TemporaryDirectory() as name:
        root = CacheRoot(Path(name))
        for number, records in enumerate(ledger):
            append_media(root, records, f"job-{number}")
        latest = read_media(root)
        found = make_plan(Media.of(media), MediaRows(root), present, space="s", **options)
    expected = sorted_by_objects(media, latest, present, **options)
    assert {task.source: task for task in found.todo} == {t.source: t for t in expected["todo"]}  # type: ignore[attr-defined]
    reused = len(expected["reused"]) + len(expected["recognised"])
    assert (found.reused, found.known_failures) == (reused, len(expected["failed"]))
    assert [(one.source, one.attempts) for one in found.missing] == expected["missing"]
    assert [one.source for one in found.recognised] == expected["recognised"]


def test_a_source_takes_few_bytes() -> None:
    """Objects would take about 1 kB a source: a string, a mention, a record, a task and their places."""
    count = 100_000
    sources = (f"https://host{i % 99}.example/{i:09d}.jpg" for i in range(count))
    known = [
        MediaRecord(source=f"https://host{i % 99}.example/{i:09d}.jpg", key=f"{i:064x}")
        for i in range(5_000)
    ]
    ledger = [records_table(known)]
    del known
    tracemalloc.start()
    try:
        counter = MediaCounter()
        for source in sources:
            counter.add(MediaRef(source=source))
        found = make_plan(counter.media, ledger, Present({f"{0:064x}"}), space="s")
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (len(found.todo), found.reused, found.hosts) == (count - 1, 1, 99)
    assert found.busiest == -(-count // 99)
    assert held / count < 120
