"""The estimate of a plan: bytes, seconds, and what fits on the disk.

print(describe(plan, spec, samples=20, free=free_bytes(folder), speed=speed))
check_fits(plan, spec, free_bytes(folder))      # UserError names the codecs and poolings that would fit
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from configs import UserError
from configs.console import SPARE_BYTES, free_bytes
from encode.plan.estimate import Speed, break_even, check_fits, describe, table
from encode.plan.plan import OVERHEAD_BYTES, Plan
from encode.worker.messages import SourceTask
from tests.support.spaces import SPEC

CLIP = replace(SPEC, encoder="clip", image_size=336, patch_size=14, width=1024, batch_size=8)


def images(count: int) -> Plan:
    todo = (SourceTask(source="/a"),) * min(count, 1000)
    return Plan(todo=todo, new_rows={"image": count}, unread=count)


def test_bytes_needed_are_those_of_slots_and_tables() -> None:
    row = 576 * 1024 + 576 * 16 * 2 + 1024 * 2
    assert images(1000).bytes_needed(CLIP) == 1000 * (row + 4 + OVERHEAD_BYTES)
    tar = replace(CLIP, container="webdataset")
    assert images(1000).bytes_needed(tar) == 1000 * (row + 2048 + OVERHEAD_BYTES)


def test_a_job_that_does_not_fit_is_refused_with_codecs_that_would() -> None:
    plan = images(717_042)  # pixmo-cap
    free = 120_000_000_000
    with pytest.raises(UserError) as refused:
        check_fits(plan, CLIP, free)
    message = str(refused.value)
    assert "the job needs 438 GB and 64 MiB to spare, 120 GB free" in message
    assert "what would fit: --codec int8 --pool 2 (111 GB), --codec fp16 --pool 3 " in message
    assert "--pool 1" not in message
    assert "\n" not in message
    lines = table(plan, CLIP, free).splitlines()
    assert lines[0].split() == ["codec", "pool=1", "pool=2", "pool=3", "pool=4"]
    assert lines[1].split()[:4] == ["fp16", "846", "GB", "-"]
    assert lines[2].split()[4:7] == ["111", "GB", "fits"]
    assert lines[3].split()[:7] == ["int4", "226", "GB", "-", "57.8", "GB", "fits"]


def test_some_bytes_of_the_disk_stay_free() -> None:
    plan = images(10)
    needed = plan.bytes_needed(CLIP)
    check_fits(plan, CLIP, needed + SPARE_BYTES)
    with pytest.raises(UserError):
        check_fits(plan, CLIP, needed + SPARE_BYTES - 1)
    check_fits(Plan(reused=10), CLIP, 0)
    with pytest.raises(UserError, match="no codec and pooling would fit"):
        check_fits(images(10**9), CLIP, 10**9)


@pytest.mark.parametrize("free", [0, 602_112, SPARE_BYTES])
def test_a_disk_without_the_spare_bytes_is_said_to_lack_them(free: int) -> None:
    """A job of a few kB on a disk with more than that free: the message must not contradict itself."""
    plan = images(1)
    with pytest.raises(UserError) as refused:
        check_fits(plan, CLIP, free)
    message = str(refused.value)
    assert "the job needs 610 kB and 64 MiB to spare, " in message
    assert message.endswith("free; free some space, or put the cache elsewhere with --features DIR")
    assert "fits" not in table(plan, CLIP, free)


def test_free_bytes_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    assert free_bytes(tmp_path / "not" / "yet") == pytest.approx(
        status.f_bavail * status.f_frsize, rel=0.05
    )


def speed(encode_s: float, cores: int = 2, *, shared: bool = True) -> Speed:
    return Speed(encode_s=encode_s, cores=cores, shared=shared, how="made up")


def test_encoding_and_decoding_add_up_on_a_cpu_and_overlap_on_a_gpu() -> None:
    assert speed(0.5).seconds(100) == pytest.approx(100 * (0.5 + 0.0075))
    assert speed(0.0025, shared=False).seconds(100) == pytest.approx(0.75)
    assert speed(0.025, shared=False).seconds(100) == pytest.approx(2.5)


def test_caching_pays_from_the_second_pass_unless_reading_is_as_slow() -> None:
    assert break_even(images(1000), CLIP, speed(0.5)).startswith("from pass 2 on")
    slow_to_read = speed(0.0, cores=15, shared=False)
    assert break_even(images(1000), CLIP, slow_to_read).startswith("not in time")


def test_the_printed_plan() -> None:
    plan = replace(images(3), reused=5, known_failures=1)
    text = describe(plan, CLIP, samples=20, free=10**12, speed=speed(0.5))
    assert text.splitlines()[:4] == [
        f"space    {CLIP.name}: 576 tokens x 1024, 610 kB per image (int8, pool 1)",
        "media    9 in 20 samples: 3 to do, 5 reused, 1 failed before",
        "rows     at most 3, one view each",
        "disk     at most 1.83 MB needed and 64 MiB to spare, 1 TB free",
    ]
    assert text.splitlines()[4] == "time     about 2 s (made up)"
