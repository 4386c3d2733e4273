"""The estimate of a plan: bytes, seconds and what bounds them, and what fits on the disk.

costs = estimate(plan, spec, speed, found, max_frames=128, download=config)
print(describe(plan, spec, samples=20, free=free_bytes(folder), costs=costs))
check_fits(plan, spec, free_bytes(folder), command=command, samples=20, max_frames=128)
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs import UserError
from configs.command_line import CommandLine
from configs.console import SPARE_BYTES, free_bytes
from encode.download.config import DownloadConfig
from encode.plan.estimate import (
    DECODE_S,
    ROW_BYTE_CPU_S,
    SOURCE_CPU_S,
    Estimate,
    Speed,
    break_even,
    describe,
    estimate,
    expected_rows,
)
from encode.plan.fits import check_fits, table
from encode.plan.plan import OVERHEAD_BYTES, Plan
from encode.plan.probe import DownloadCost, KindCost, Probe
from encode.worker.messages import SourceTask
from tests.support.spaces import SPEC

CLIP = replace(SPEC, encoder="clip", image_size=336, patch_size=14, width=1024, batch_size=8)
COMMAND = CommandLine("python -m encode.run", ("--dataset", "folder:my photos", "--limit", "9"))


class Sources(list[SourceTask]):
    """A number of tasks without their memory."""

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count


def images(count: int, **values: Any) -> Plan:
    return Plan(todo=Sources(count), new_rows={"image": count}, unread=count, **values)


def videos(count: int) -> Plan:
    rows = {"frame": 128 * count}
    return Plan(todo=Sources(count), new_rows=rows, unread=count, videos=count, untimed=count)


def test_bytes_needed_are_those_of_slots_and_tables() -> None:
    row = 576 * 1024 + 576 * 16 * 2 + 1024 * 2
    assert images(1000).bytes_needed(CLIP) == 1000 * (row + 4 + OVERHEAD_BYTES)
    tar = replace(CLIP, container="webdataset")
    assert images(1000).bytes_needed(tar) == 1000 * (row + 2048 + OVERHEAD_BYTES)


# ---- what fits


def refusal(plan: Plan, free: int, **values: Any) -> str:
    given = {"command": COMMAND, "samples": 1000, "max_frames": 128, **values}
    with pytest.raises(UserError) as refused:
        check_fits(plan, CLIP, free, **given)
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_a_job_that_does_not_fit_is_refused_with_the_command_that_does() -> None:
    plan = images(717_042)  # pixmo-cap
    free = 120_000_000_000
    message = refusal(plan, free)
    assert "the job needs 438 GB and 64 MiB to spare, 120 GB free" in message
    assert message.endswith(
        "or this fits (111 GB): python -m encode.run --dataset 'folder:my photos' --limit 9 --pool 2"
    )
    assert refusal(plan, 300_000_000_000).endswith("(226 GB): " + COMMAND.text(codec="int4"))
    assert refusal(plan, 20_000_000_000).endswith(
        "(15.6 GB): " + COMMAND.text(codec="int4", pool=4)
    )
    lines = table(plan.new_rows, CLIP, free).splitlines()
    assert lines[0].split() == ["codec", "pool=1", "pool=2", "pool=3", "pool=4"]
    assert lines[1].split()[:4] == ["fp16", "846", "GB", "-"]
    assert lines[2].split()[4:7] == ["111", "GB", "fits"]
    assert lines[3].split()[:7] == ["int4", "226", "GB", "-", "57.8", "GB", "fits"]


def test_a_job_of_videos_is_refused_with_pooling_codecs_or_fewer_frames() -> None:
    plan, frames = videos(1000), replace(CLIP, pool_frame=4)
    needed = plan.bytes_needed(frames)
    given: dict[str, Any] = {"command": COMMAND, "samples": 1000, "max_frames": 128}
    found = []
    for share in (0.7, 0.45, 0.2, 0.05):
        with pytest.raises(UserError) as refused:
            check_fits(plan, frames, int(share * needed) + SPARE_BYTES, **given)
        found.append(str(refused.value).rpartition("--limit 9 ")[2])
    assert found == [
        "--codec int4",
        "--max-frames 32",
        "--max-frames 16",
        "--codec int4 --max-frames 8",
    ]
    # Short videos need less than their most frames: these fit.
    short = Probe(kinds={"video": KindCost(probed=50, durations=(1.0,) * 50)})
    check_fits(plan, frames, needed // 30 + SPARE_BYTES, found=short, **given)


def test_where_no_codec_fits_a_part_of_the_samples_does() -> None:
    plan = images(10**9)
    message = refusal(plan, 10**9, samples=10**9, datasets=2)
    room = (10**9 - SPARE_BYTES) / plan.bytes_needed(CLIP)
    most = int(10**9 * room * 0.9 / 2)
    assert message.endswith(f"python -m encode.run --dataset 'folder:my photos' --sample {most}")
    assert "no codec and pooling fits" in message
    assert "not one sample fits" in refusal(plan, 10**9, samples=1)


def test_the_parts_of_a_job_must_fit_together() -> None:
    plan = images(1000)
    needed = plan.bytes_needed(CLIP)
    given: dict[str, Any] = {"command": COMMAND, "samples": 1000, "max_frames": 128}
    check_fits(plan, CLIP, 4 * needed + SPARE_BYTES, parts=4, **given)
    with pytest.raises(UserError, match=r"the job needs 2\.44 GB"):
        check_fits(plan, CLIP, 3 * needed + SPARE_BYTES, parts=4, **given)


def test_some_bytes_of_the_disk_stay_free() -> None:
    plan = images(10)
    needed = plan.bytes_needed(CLIP)
    given: dict[str, Any] = {"command": COMMAND, "samples": 10, "max_frames": 128}
    check_fits(plan, CLIP, needed + SPARE_BYTES, **given)
    refusal(plan, needed + SPARE_BYTES - 1)
    check_fits(Plan(reused=10), CLIP, 0, **given)


@pytest.mark.parametrize("free", [0, 602_112, SPARE_BYTES])
def test_a_disk_without_the_spare_bytes_is_said_to_lack_them(free: int) -> None:
    """A job of a few kB on a disk with more than that free: the message must not contradict itself."""
    plan = images(1)
    message = refusal(plan, free)
    assert "the job needs 610 kB and 64 MiB to spare, " in message
    assert message.endswith("free; free some space, or put the cache elsewhere with --features DIR")
    assert "fits" not in table(plan.new_rows, CLIP, free)


def test_free_bytes_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    assert free_bytes(tmp_path / "not" / "yet") == pytest.approx(
        status.f_bavail * status.f_frsize, rel=0.05
    )


# ---- seconds and rows


def costs_of(
    plan: Plan, encode_s: float, found: Probe | None = None, *, gpu: bool = False, cores: int = 2
) -> Estimate:
    """Return the estimate for a tower that takes all cores, or a GPU."""
    speed = Speed(encode_s=encode_s, encode_cpu_s=0.0 if gpu else cores * encode_s, cores=cores)
    download = DownloadConfig(connections=10, per_host=4)
    return estimate(plan, CLIP, speed, found or Probe(), max_frames=128, download=download)


def our_s(plan: Plan) -> float:
    """Return the processor seconds of our own code."""
    return len(plan.todo) * SOURCE_CPU_S + plan.bytes_needed(CLIP) * ROW_BYTE_CPU_S


def decoding(cpu_s: float, **values: Any) -> Probe:
    return Probe(kinds={"image": KindCost(probed=100, cpu_s=cpu_s, **values)})


def test_encoding_and_decoding_share_the_cores_of_a_cpu_and_overlap_on_a_gpu() -> None:
    plan = images(100)
    cpu = costs_of(plan, 0.5, decoding(0.02))
    assert cpu.seconds == pytest.approx(100 * (0.5 + 0.02 / 2) + our_s(plan) / 2)
    assert cpu.bound == "encode"
    gpu = costs_of(plan, 0.05, decoding(0.02), gpu=True)
    assert (gpu.bound, gpu.seconds) == ("encode", pytest.approx(5.0))
    cheap = costs_of(plan, 0.0001, decoding(0.02), gpu=True)
    assert (cheap.bound, cheap.seconds) == ("decode", pytest.approx(1.0 + our_s(plan) / 2))
    busy = costs_of(plan, 0.0001, replace(decoding(0.02), share=0.5), gpu=True)
    assert busy.seconds == pytest.approx(2 * cheap.seconds)
    assumed = costs_of(plan, 0.0001, gpu=True)
    assert assumed.seconds == pytest.approx((100 * DECODE_S + our_s(plan)) / 2)
    assert "assumed: 15 ms" in assumed.how


def test_files_of_a_slow_disk_bound_a_job() -> None:
    slow = costs_of(images(100), 0.001, decoding(0.001, read_s=0.5))
    assert (slow.bound, slow.seconds) == ("read", pytest.approx(25.0))


def test_downloads_bound_a_job_by_all_connections_or_by_those_to_one_host() -> None:
    web = DownloadCost(probed=100, failed=25, slot_s=2.0, cpu_s=0.001)
    found = Probe(kinds={"image": KindCost(probed=75, cpu_s=0.001)}, downloads=web)
    many = images(1000, downloads=1000, hosts=500, busiest=2)
    costs = costs_of(many, 0.001, found)
    assert (costs.bound, costs.seconds) == ("download", pytest.approx(1000 * 2.0 / 10))
    assert costs.rows == {"image": pytest.approx(750)}
    one = costs_of(replace(many, hosts=1, busiest=1000), 0.001, found)
    assert one.seconds == pytest.approx(1000 * 2.0 / 4)
    most = costs_of(replace(many, busiest=900), 0.001, found)
    assert most.seconds == pytest.approx(900 * 2.0 / 4)
    kept = costs_of(many, 0.001, replace(found, kept=0.5))
    assert kept.bounds["download"] == pytest.approx(100.0)


def test_rows_are_those_of_media_that_can_be_used() -> None:
    found = Probe(
        kinds={
            "image": KindCost(probed=100, failed=20),
            "video": KindCost(probed=40, failed=20, durations=(2.0, 3.0) * 10),
        }
    )
    plan = replace(videos(10), new_rows={"image": 50, "frame": 1280 + 30}, todo=Sources(60))
    expected = expected_rows(plan, found, 128)
    assert expected == {"image": pytest.approx(40), "frame": pytest.approx((10 * 6 + 30) / 2)}
    assert expected_rows(plan, found, 4)["frame"] == pytest.approx((10 * 4) / 2)
    assert expected_rows(plan, Probe(), 128) == {"image": 50, "frame": 1280}


def test_caching_pays_from_the_second_pass_unless_reading_is_as_slow() -> None:
    plan = images(1000)
    assert break_even(costs_of(plan, 0.5), CLIP).startswith("from pass 2 on")
    slow_to_read = replace(costs_of(plan, 0.5), bounds={"encode": 1.0})
    assert break_even(slow_to_read, CLIP).startswith("not in time")


def test_the_printed_plan() -> None:
    plan = replace(images(3), reused=5, known_failures=1)
    costs = replace(costs_of(plan, 0.5), how="made up", start_s=1.0)
    text = describe(plan, CLIP, samples=20, free=10**12, costs=costs)
    assert text.splitlines()[:5] == [
        f"space    {CLIP.name}: 576 tokens x 1024, 610 kB per image (int8, pool 1)",
        "media    9 in 20 samples: 3 to do, 5 reused, 1 failed before",
        "rows     at most 3, one view each",
        "disk     at most 1.83 MB needed and 64 MiB to spare, 1 TB free",
        "time     about 3 s, bound by encode (made up)",
    ]


def test_the_printed_plan_of_media_that_were_probed() -> None:
    plan = videos(100)
    found = Probe(kinds={"video": KindCost(probed=10, cpu_s=0.1, durations=(2.0,) * 10)})
    costs = costs_of(plan, 0.01, found)
    lines = describe(plan, CLIP, samples=20, free=10**12, costs=costs, parts=2).splitlines()
    assert lines[0].startswith("parts    2, one after the other")
    assert lines[3] == "rows     about 1000, at most 25600: 0 images, 25600 frames of videos"
    assert lines[4].startswith("disk     about ") and ", at most " in lines[4]
    assert "measured on 10 of 100 sources" in lines[5]
