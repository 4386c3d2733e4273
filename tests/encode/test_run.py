"""The command encode.run: what it prints, what it refuses, and what it does not import.

main(["--dataset", "folder:photos", "--encoder", "tiny", "--features", "cache"])
# encoded=6 reused=0 failed=1 images/s=3.0 bound=encode seconds=2.0
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import configs
from cache import ls
from cache.errors import InUseError
from cache.store import index_file
from cache.store.ledger import read_media
from cache.store.locks import DriverLock
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.samples import dataset_names, read_origin, read_samples
from cache.store.space import find_space, read_info
from cache.verify import verify
from configs import UserError
from configs.console import SPARE_BYTES
from encode.run import main
from encode.sources.catalogue import SPEC_KINDS
from tests.support import ROOT
from tests.support.encode_jobs import TINY, draw
from tests.support.videos import ffmpeg, make_video

CLOSING = re.compile(
    r"encoded=(\d+) reused=(\d+) failed=(\d+) images/s=[\d.]+ bound=(download|read|decode|encode|write|none) "
    r"seconds=[\d.]+"
)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Draw six images, and make a configs folder in which `tiny` is an encoder."""
    (tmp_path / "configs").mkdir()
    values = yaml.safe_load(configs.dump(TINY))
    values.pop("name")
    (tmp_path / "configs" / "encoders.yaml").write_text(yaml.safe_dump({"tiny": values}))
    (tmp_path / "configs" / "datasets.yaml").write_text(
        "datasets: {pets: {source: folder, path: /pets, about: cats and dogs}}\ngroups: {all: [pets]}\n"
    )
    monkeypatch.setattr(configs, "FOLDER", tmp_path / "configs")
    draw(tmp_path / "photos", 6)
    return tmp_path / "photos"


def run(photos: Path, *more: str) -> int:
    return run_only(photos, f"folder:{photos}", *more)


def run_only(photos: Path, dataset: str, *more: str) -> int:
    words = ["--dataset", dataset, "--encoder", "tiny", "--device", "cpu"]
    return main([*words, "--features", str(photos.parent / "cache"), *more])


def test_a_job_prints_its_plan_and_its_result(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "bad.png").write_bytes(b"no image")
    assert run(photos) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "photos: 7 images"
    assert [line.split()[0] for line in lines[1:5]] == ["space", "media", "rows", "disk"]
    assert lines[2] == "media    7 in 7 samples: 7 to do, 0 reused, 0 failed before"
    assert lines[-2].startswith(
        "failed   1 at decode; each with its reason: python -m cache.ls --failures"
    )
    found = CLOSING.fullmatch(lines[-1])
    assert found is not None
    assert found.groups()[:3] == ("6", "0", "1")
    assert run(photos) == 0
    found = CLOSING.fullmatch(capsys.readouterr().out.splitlines()[-1])
    assert found is not None
    assert found.groups() == ("0", "6", "1", "none")


def test_a_job_keeps_the_memory_that_it_frees(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[bool] = []
    monkeypatch.setattr("encode.run.keep_memory", lambda: kept.append(True))
    assert run(photos, "--plan") == 0
    assert run(photos) == 0
    assert kept


def test_the_callback_of_the_guide_gets_the_progress(
    photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "bad.png").write_bytes(b"no image")
    guide = (ROOT / "docs" / "FEATURE_CACHE.md").read_text().split("## Progress")[1]
    found = re.search(r"```python\n(.*?)```", guide, re.DOTALL)
    assert found is not None
    monkeypatch.chdir(photos.parent)
    exec(found[1].replace('"demo"', '"tiny"'), {"__name__": "notebook"})
    said = capsys.readouterr()
    shown = [line for line in said.out.splitlines() if re.match(r"\d+ of 7, ", line)]
    assert len(shown) >= 2 and shown[-1].startswith("7 of 7, ")
    assert shown[-1].endswith("/s, 0 s left, 1 failed")
    assert "encode" not in said.err


def test_notes_of_media_that_are_used_are_counted_in_every_job(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A JPEG without its end, a clip without its end, and a whole clip whose clock starts late."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    noise.save(photos / "cut.jpg", quality=90)
    whole = (photos / "cut.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(whole[:-60])
    clip = make_video(photos / "cut.mkv", frames=20, fps=10)
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    ffmpeg("-i", make_video(photos / "late.mkv", frames=20, fps=10), "-c", "copy",
           "-output_ts_offset", 3600, photos / "later.mkv")  # fmt: skip
    features = photos.parent / "cache"
    command = f"python -m cache.ls --notes --features {features}"
    for _ in range(2):  # the second job reuses them
        assert run(photos) == 0
        lines = capsys.readouterr().out.splitlines()
        notes = [line for line in lines if line.startswith("notes ")]
        assert sorted(notes[0].split(";")[0].split("    ")[1].split(", ")) == [
            "1 ends early",
            "1 the JPEG ends early",
        ]
        assert notes == [lines[-2]] and lines[-2].endswith(f"; which media: {command}")
        assert not any(line.startswith("failed ") for line in lines)
    found = {Path(s).name: r.note for s, r in read_media(CacheRoot(features)).items() if r.note}
    assert found.keys() == {"cut.jpg", "cut.mkv"}
    assert found["cut.mkv"].endswith(" of 2.0 s")


def test_folders_and_files_of_any_name_work(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = photos.parent / "my ‘größte’ 写真 it's"
    photos.rename(named)
    for n, name in enumerate(('a "q" b.png', "-.png", "猫\n.png", "$HOME.png", "#1?.png")):
        (named / f"000{n}.png").rename(named / name)
    (named / "bad one.png").write_bytes(b"no image")
    words = ["--dataset", f"folder:{named}", "--encoder", "tiny", "--device", "cpu"]
    features = photos.parent / "a cache's"
    assert main([*words, "--features", str(features)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "encoded=6 reused=0 failed=1 " in lines[-1]
    command = shlex.split(lines[-2].split("reason: ")[1])
    assert command == ["python", "-m", "cache.ls", "--failures", "--features", str(features)]


def test_an_interrupted_job_prints_the_command_that_goes_on(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    named = photos.rename(photos.parent / "it's mine")
    with monkeypatch.context() as patch:
        patch.setattr("configs.signals.Interrupts.stopping", lambda _: True)
        patch.setattr("configs.signals.Interrupts.exit_code", 130)
        assert run(named, "--codec", "fp16", "--workers", "0") == 130
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("interrupted: 0 encoded and kept, 6 left; go on: python -m encode.run ")
    words = shlex.split(last.partition("go on: ")[2])
    assert words[:5] == ["python", "-m", "encode.run", "--dataset", f"folder:{named}"]
    assert main(words[3:]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "fp16" in lines[1] and lines[-1].startswith("encoded=6 reused=0 failed=0 ")


def test_a_job_saves_an_index_of_a_large_space(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(photos) == 0
    paths = find_space(CacheRoot(photos.parent / "cache"), None)
    assert not paths.index_dir.exists(), "one commit is read as fast"
    monkeypatch.setattr(index_file, "WORTH_COMMITS", 1)
    with pytest.MonkeyPatch.context() as patch:
        full = OSError(28, "full")
        patch.setattr(index_file, "new_file", lambda _, **__: (_ for _ in ()).throw(full))
        with pytest.raises(OSError, match="full"):
            index_file.save_index(paths, read_info(paths))
        assert run(photos) == 0, "a job does not fail for lack of an index"
    assert run(photos) == 0
    assert [p.name for p in paths.index_dir.iterdir()] == ["image.bin"]
    assert FeatureReader(paths).rows("image") == 6
    assert not verify(CacheRoot(photos.parent / "cache"), deep=True).all_findings


def test_planning_writes_nothing(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(photos, "--plan") == 0
    assert not (photos.parent / "cache").exists()
    words = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert words == ["photos:", "space", "media", "rows", "disk", "time", "pays"]


def test_a_job_of_too_many_sources_works_through_parts(
    photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "bad.png").write_bytes(b"no image")
    shutil.copy(photos / "0000.png", photos / "same.png")
    assert run(photos) == 0
    (cache := photos.parent / "cache").rename(photos.parent / "whole")
    monkeypatch.setattr("encode.plan.media.MOST_SOURCES", 2)
    capsys.readouterr()
    assert run(photos, "--plan") == 0
    planned = capsys.readouterr().out.splitlines()[1]
    parts = re.match(r"parts    (\d+), one after the other", planned)
    assert parts is not None and int(parts[1]) > 1  # how many depends on the hashes of the paths
    for counts in (("6", "1", "1"), ("0", "7", "1")):
        assert run(photos) == 0
        out = capsys.readouterr().out
        assert re.search(rf"^part     2 of {parts[1]}: \d to do$", out, re.MULTILINE)
        found = CLOSING.fullmatch(out.splitlines()[-1])
        assert found is not None and found.groups()[:3] == counts
    hashes = {
        FeatureReader(find_space(CacheRoot(folder), None)).logical_hash()
        for folder in (cache, photos.parent / "whole")
    }
    assert len(hashes) == 1


def test_beside_another_driver_a_job_is_refused_and_planned_without_a_change(photos: Path) -> None:
    assert run(photos) == 0
    root = CacheRoot(photos.parent / "cache")
    with DriverLock(find_space(root, None), "process 42 on elsewhere"):
        before = sorted(root.path.rglob("*"))
        assert run(photos, "--plan") == 0
        assert sorted(root.path.rglob("*")) == before
        with pytest.raises(InUseError, match="process 42 on elsewhere"):
            run(photos)


def test_a_limit_takes_the_first_samples(photos: Path) -> None:
    assert run(photos, "--limit", "2") == 0
    root = CacheRoot(photos.parent / "cache")
    assert [s.id for s in read_samples(root, "photos")] == ["0000.png", "0001.png"]
    assert FeatureReader(find_space(root, None)).rows("image") == 2
    assert run(photos) == 0
    assert len(list(read_samples(root, "photos"))) == 6
    assert FeatureReader(find_space(root, None)).rows("image") == 6


def test_a_sample_is_spread_and_the_same_each_time(photos: Path) -> None:
    root = CacheRoot(photos.parent / "cache")
    draw(photos, 40)
    found = []
    for more in ((), (), ("--seed", "1")):
        assert run(photos, "--sample", "6", *more, "--plan") == 0
        assert run(photos, "--sample", "6", *more) == 0
        found.append([sample.id for sample in read_samples(root, "photos")])
        origin = read_origin(root, "photos")
        assert origin is not None
        assert origin.words == ("--dataset", f"photos=folder:{photos}", "--sample", "6", *more)
    assert found[0] == found[1] != found[2]
    assert [len(ids) for ids in found] == [6, 6, 6]
    assert found[0] == sorted(found[0]) != [f"{n:04}.png" for n in range(6)]


def test_the_users_file_has_encoders_and_data_sets(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are found from another folder with the words that the samples remember."""
    monkeypatch.chdir(photos.parent)
    tiny = (photos.parent / "configs" / "encoders.yaml").read_text()
    user = yaml.safe_load(tiny)["tiny"]
    config = {
        "datasets": {"holidays": {"source": "folder", "path": "photos", "about": "my own"}},
        "encoders": {"mine": {**user, "pool_image": 2}},
    }
    (photos.parent / "nanomolmo2.yaml").write_text(yaml.safe_dump(config))
    words = ["--encoder", "mine", "--device", "cpu", "--features", str(photos.parent / "cache")]
    assert main(["--dataset", "holidays", *words]) == 0
    assert main(["--list"]) == 0
    assert "my own" in capsys.readouterr().out
    origin = read_origin(CacheRoot(photos.parent / "cache"), "holidays")
    assert origin is not None
    file = str(photos.parent / "nanomolmo2.yaml")
    assert origin.words == ("--dataset", "holidays", "--config", file)
    monkeypatch.chdir("/")
    assert main([*origin.words, *words]) == 0
    assert "encoded=0 reused=6" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"made by other words: python -m encode.run .* --config "):
        main(["--dataset", "holidays", *words])


def printed_command(text: str, before: str) -> list[str]:
    """Return the words after `python -m encode.run` of a line that begins with `before`."""
    (line,) = (line for line in text.splitlines() if line.startswith(before))
    python, _, module, *words = shlex.split(line.removeprefix(before))
    assert (python, module) == ("python", "encode.run")
    return words


@pytest.mark.parametrize("name", ["", "my-photos=", "写真="])
def test_the_commands_that_ls_prints_can_be_run(
    photos: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    run_command: Callable[..., tuple[None, str]],
) -> None:
    """From another folder, for a folder with spaces and no entry."""
    folder = photos.rename(photos.parent / "my photos")
    (folder / "zero.png").write_bytes(b"")
    (folder / "0.heif.txt").write_text("no image")
    cache = folder.parent / "my cache"
    monkeypatch.chdir(folder.parent)
    words = ["--encoder", "tiny", "--device", "cpu", "--workers", "0"]
    assert main(["--dataset", f"{name}folder:my photos", *words, "--features", "my cache"]) == 0
    account = capsys.readouterr().out.splitlines()[0]
    monkeypatch.chdir("/")
    listed = run_command(ls, "--features", cache)[1]
    assert account in listed.splitlines()
    failures = run_command(ls, "--failures", "--features", cache)[1]
    assert main(printed_command(failures, "try them again: ")) == 0
    assert "7 in 7 samples: 1 to do, 6 reused, 0 failed before" in capsys.readouterr().out
    draw(folder, 1, first=50)
    assert main([*printed_command(failures, "try them again: "), "--limit", "1"]) == 0
    shutil.rmtree(cache / "spaces")
    assert main([*printed_command(failures, "try them again: "), "--limit", "1"]) == 0
    assert main([*printed_command(failures, "try them again: "), "--plan"]) == 0
    assert "8 in 8 samples: 7 to do, 1 reused, 0 failed" in capsys.readouterr().out


def test_bad_lines_refuse_all_data_sets_and_the_printed_command_goes_on(
    photos: Path, capsys: pytest.CaptureFixture[str], run_command: Callable[..., tuple[None, str]]
) -> None:
    """Nothing is encoded before every line of every data set was read."""
    lines = [{"image": f"000{n}.png", "caption": f"Shape {n}."} for n in range(6)]
    lines[2]["captoin"] = "A shape."
    lines[4] = {"image": "0004.png", "conversations": "no list"}
    records = photos.parent / "my records.jsonl"
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    cache = photos.parent / "cache"
    words = (
        "--media",
        str(photos),
        "--encoder",
        "tiny",
        "--device",
        "cpu",
        "--features",
        str(cache),
    )
    specs = ("--dataset", f"folder:{photos}", f"json:{records}")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as refused:
        patch.setattr("encode.worker.config.WorkerConfig.load", lambda _: pytest.fail("encoding"))
        main([*specs, *words])
    said = str(refused.value)
    assert (
        f"{records}:3: " in said and f"{records}:5: " in said and "2 lines cannot be used" in said
    )
    assert not CacheRoot(cache).space_names()
    command = said.partition("go on without them: ")[2].partition(", or without")[0]
    assert command.endswith("--bad-lines leave-out")
    capsys.readouterr()
    assert main(shlex.split(command)[3:]) == 0
    out = capsys.readouterr().out
    assert "my-records: 4 lines (captions), 4 images; left out: " in out
    assert CLOSING.search(out)
    assert "my-records: 4 lines (captions)" in run_command(ls, "--features", cache)[1]


def test_the_command_that_completes_can_be_run(
    photos: Path, capsys: pytest.CaptureFixture[str], run_command: Callable[..., tuple[None, str]]
) -> None:
    cache = photos.parent / "cache"
    assert run(photos, "--pool", "2", "--limit", "4") == 0
    assert run(photos, "--codec", "fp16", "--limit", "5") == 0
    assert run(photos, "--plan") == 0
    for _ in range(2):  # the space that lacks one of the five samples
        listed = run_command(ls, "--features", cache)[1]
        if "complete: " not in listed:
            break
        assert main(printed_command(listed, "complete: ")) == 0
    assert "complete: " not in listed
    pooled = next(n for n in CacheRoot(cache).space_names() if "int8" in n)
    assert FeatureReader(CacheRoot(cache).space(pooled)).rows("image") == 5


def test_each_pooling_and_codec_has_its_own_space(photos: Path) -> None:
    for more in ((), ("--pool", "2"), ("--codec", "fp16"), ("--codec", "int4")):
        assert run(photos, *more) == 0
    root = CacheRoot(photos.parent / "cache")
    sizes = {
        (r.spec.codec, r.spec.tokens("image"))
        for r in (FeatureReader(root.space(n)) for n in root.space_names())
    }
    assert sizes == {("int8", 4), ("int8", 1), ("fp16", 4), ("int4", 4)}


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("encode.job.free_bytes", lambda folder: 602_112)
    needs = r"the job needs 2\.54 kB and 64 MiB to spare, "
    with pytest.raises(UserError, match=needs + r"602 kB free; free some space, or put the cache"):
        run(photos)
    assert "fits" not in capsys.readouterr().out
    monkeypatch.setattr("encode.job.free_bytes", lambda folder: SPARE_BYTES + 2000)
    fits = r".* or this fits \(1\.78 kB\): python -m encode\.run --dataset .* --codec int4$"
    with pytest.raises(UserError, match=needs + fits):
        run(photos)
    assert "1.78 kB fits" in capsys.readouterr().out
    assert not (photos.parent / "cache" / "spaces").exists()


def test_another_folder_of_the_same_name_does_not_replace_the_first(photos: Path) -> None:
    assert run(photos) == 0
    twin = photos.parent / "elsewhere" / "photos"
    draw(twin, 1, first=70)
    with pytest.raises(UserError, match=r"would both be the data set 'photos'"):
        run(photos, "--dataset", f"folder:{twin}")
    with pytest.raises(UserError, match=r"has the samples of photos=folder:") as refused:
        run_only(photos, f"folder:{twin}")
    fixed = shlex.split(str(refused.value).partition("of its own: ")[2].partition(", or ")[0])
    assert run_only(photos, *fixed[1:]) == 0
    assert dataset_names(CacheRoot(photos.parent / "cache")) == ["photos", "photos-2"]
    (photos / "sub").mkdir()
    (photos / "0000.png").rename(photos / "sub" / "0000.png")
    assert run(photos) == 0, "the same folder may change"
    assert run(photos, "--dataset", f"twin=folder:{twin}") == 0


@pytest.mark.parametrize("words", [["--workers", "0"], ["--ray-address", "local"]])
def test_a_cluster_in_the_environment_is_not_used_where_none_is_wanted(
    photos: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "localhost:1")
    job = ["--dataset", f"folder:{photos}", "--encoder", "tiny", "--device", "cpu"]
    job += ["--features", str(tmp_path / "cache")]
    assert main([*job, *words]) == 0
    with pytest.raises(UserError, match="no Ray cluster answers at localhost:1"):
        main(job)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "name at least one data set"),
        (["--dataset", "folder:/x", "--pool", "0"], "--pool 0: must be at least 1"),
        (["--dataset", "folder:/x", "--limit", "-3"], "--limit -3"),
        (["--dataset", "folder:/x", "--sample", "0"], "--sample 0: must be at least 1"),
        (["--dataset", "folder:/x", "--sample", "1", "--limit", "1"], "use one of them"),
        (["--dataset", "folder:/x", "--source", "/x"], "--source /x: no data set named by"),
        (["--dataset", "folder:/x", "--media", "/x"], "--media /x: no data set named by"),
        (["--dataset", "my photos=folder:/x"], "for example: --dataset my-photos=folder:/x"),
        (["--dataset", "folder:/x", "--config", "/no.yaml"], "/no.yaml: cannot be read"),
        (["--dataset", "folder:.", "--encoder", "tiny", "--weights", "/x"], "has random weights"),
        (["--dataset", "folder:/x", "--workers", "-1"], "--workers -1"),
        (["--dataset", "folder:/x", "--workers", "many"], "many"),
        (["--dataset", "folder:/x", "--codec", "int3"], "int3"),
        (
            ["--dataset", "folder:.", "--encoder", "tiny", "--ray-address", "head"],
            "--ray-address head: give HOST:PORT",
        ),
        (
            ["--dataset", "folder:.", "--encoder", "tiny", "--ray-address", "localhost:1"],
            "no Ray cluster answers at localhost:1",
        ),
        (
            ["--dataset", "folder:.", "--ray-address", "auto", "--workers", "0"],
            "this machine alone",
        ),
        (["--check", "1", "--ray-address", "auto"], "work on this machine alone"),
        (["--dataset", "folder:/x", "--timeout-s", "0"], "--timeout-s"),
        (["--dataset", "folder:/x", "--wrokers", "2"], "no option --wrokers; nearest: --workers"),
        (["--dataset", "folder:/nowhere"], "folder:/nowhere: no such folder"),
        (["--dataset", "pest"], "nearest: pets"),
        (["--dataset", "all"], "folder:/pets: no such folder"),
    ],
)
@pytest.mark.usefixtures("photos")
def test_invalid_options_are_refused_in_one_line(argv: list[str], says: str) -> None:
    with pytest.raises(UserError) as refused:
        main([*argv])
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("photos")
def test_the_list_names_data_sets_and_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["data", "pets", "all"]
    assert lines[1].split()[1:] == ["?"] * 6 + ["cats", "and", "dogs"]
    for kind in SPEC_KINDS:
        assert any(line.startswith(f"{kind}:") for line in lines)


@pytest.mark.slow
def test_small_commands_import_neither_torch_nor_ray(tmp_path: Path) -> None:
    """--list and a wrong path need neither; a small job needs no Ray."""
    code = (
        "import sys; from encode.run import main; from configs import UserError\n"
        "main(['--list'])\n"
        "try: main(['--dataset', 'folder:/nowhere'])\n"
        "except UserError: pass\n"
        "assert not {'torch', 'ray', 'open_clip'} & set(sys.modules), 'slow imports'\n"
        f"main(['--dataset', 'folder:{tmp_path}/p', '--encoder', 'demo', '--device', 'cpu',"
        f" '--features', '{tmp_path}/c'])\n"
        "assert not {'ray', 'open_clip', 'transformers'} & set(sys.modules), 'slow imports'\n"
    )
    draw(tmp_path / "p", 3)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "encoded=3 " in done.stdout
