"""Jobs with Ray workers: the same rows as inline, and workers that crash or hang.

with ray_pool.session(cpus=3, gpus=0):
    encode(folder / "cache", "folder:photos", workers=2)
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest
import ray
from PIL import Image

from configs import UserError
from encode.driver import culprits, ray_pool
from encode.sources.demo_drawings import DemoWorld
from encode.sources.demo_videos import draw_video
from encode.worker.config import WorkerConfig
from encode.worker.media_item import Pixels
from encode.worker.worker import Worker
from model.media.images import DecodedImage
from tests.support.encode_jobs import CONFIG, Result, SlowWorker, draw, encode, shoot

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module", autouse=True)
def ray_session() -> Iterator[None]:
    """Start one Ray for all tests of this file, since a start takes seconds.

    Variables for another Ray are set: they change nothing.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_AUTH_TOKEN", "of another Ray")
        with ray_pool.session(cpus=3, gpus=0):
            yield


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    draw(tmp_path / "photos", 60)
    return tmp_path / "photos"


def assert_whole(result: Result, like: Result) -> None:
    """Check that every row exists once and equals that of an uninterrupted job."""
    assert all(index.doubled.size == 0 for index in result.reader.index.values())
    assert result.reader.rows("image") == like.reader.rows("image")
    assert result.reader.logical_hash() == like.reader.logical_hash()
    assert {n: (r.key, r.width, r.status) for n, r in result.ledger.items()} == {
        n: (r.key, r.width, r.status) for n, r in like.ledger.items()
    }


class Listeners(threading.Thread):
    """Collects who listens on which address, of this process and all that it has started."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, str]] = set()
        """Name of a process, and an address."""
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.2):
            self.found |= listening()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self.join()


def listening() -> set[tuple[str, str]]:
    owners = {}
    for process in family(os.getpid()):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            for entry in Path(f"/proc/{process}/fd").iterdir():
                owners[entry.readlink().name] = Path(f"/proc/{process}/comm").read_text().strip()
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            name = owners.get(f"socket:[{words[9]}]")
            if name is not None and words[3] == "0A":  # LISTEN
                found.add((name, address_of(words[1].split(":")[0])))
    return found


def family(process: int) -> list[int]:
    """Return the ids of a process and of all that it has started, which have not lost their parents."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
    found = [process]
    for known in found:  # grows meanwhile
        found += [child for child, parent in parents.items() if parent == known]
    return found


def address_of(words: str) -> str:
    """Return an address that the kernel has printed as 32-bit words of this machine's byte order."""
    data = b"".join(bytes.fromhex(words[i : i + 8])[::-1] for i in range(0, len(words), 8))
    address = ipaddress.ip_address(data)
    return str(getattr(address, "ipv4_mapped", None) or address)  # ::ffff:127.0.0.1 is 127.0.0.1


def test_ray_workers_store_the_same_rows_as_inline_and_listen_on_loopback_alone(
    photos: Path, tmp_path: Path
) -> None:
    (photos / "broken.png").write_bytes(b"no image")
    (photos / "twin.png").write_bytes((photos / "0007.png").read_bytes())
    shoot(photos, (2, 5, 16, 3))
    inline = encode(tmp_path / "inline", f"folder:{photos}")
    config = replace(CONFIG, commit_every_s=1000.0)
    with Listeners() as listeners:
        result = encode(
            tmp_path / "ray", f"folder:{photos}", workers=2, config=config, decode_apart=True
        )
    assert_whole(result, inline)
    assert result.job._tracker.encoded == 64
    assert result.job._tracker.reused == 1
    assert set(result.failures()) == {"broken.png"}
    assert len(result.paths.committed("image")) <= 3, "a shard has the rows of many tasks"

    names = {name for name, _ in listeners.found}
    assert {"gcs_server", "raylet"} < names
    assert any(name.startswith("ray::RemoteWork") for name in names), names
    addresses = {address for _, address in listeners.found}
    assert addresses <= {"127.0.0.1", "::1"}, listeners.found


def test_workers_have_the_priority_of_the_command() -> None:
    """Ray's own default would give them 3 % of a core that another process wants."""
    niceness = ray.remote(lambda: os.nice(0)).options(num_cpus=0)
    assert ray.get(niceness.remote()) == os.nice(0)


REFUSED = """
import os, sys
import ray._raylet as ray
address, right = sys.argv[1:]
for mode, token in ("disabled", ""), ("token", "0" * 64), ("token", right):
    os.environ.update(RAY_AUTH_MODE=mode, RAY_AUTH_TOKEN=token)
    ray.Config.initialize("")
    ray.AuthenticationTokenLoader.instance().reset_cache()
    try:
        ray.GcsClient(address=address).internal_kv_keys(b"", namespace=None)
        print("answered")
    except Exception as error:
        print(type(error).__name__)
"""


def test_nobody_else_can_enter_the_folder_or_call_ray() -> None:
    node = ray._private.worker._global_node
    folder = Path(node.get_session_dir_path()).parents[1]
    assert folder.name.startswith("nm2-")
    token = folder / "token"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, token)] == [0o700, 0o600]
    words = [sys.executable, "-c", REFUSED, node.gcs_address, token.read_text()]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["AuthenticationError", "AuthenticationError", "answered"]


class Marked(SlowWorker):
    """Writes its process id to a file."""

    def __init__(self, config: WorkerConfig, *more: Any, number: int):
        super().__init__(config, *more, number=number)
        folder = config.space.parent.parent / "pids"
        folder.mkdir(exist_ok=True)
        (folder / f".{number}").write_text(str(os.getpid()))
        (folder / f".{number}").rename(folder / str(number))


class Killer(threading.Thread):
    """Kills a worker of a job, `wait_s` seconds after the first one has started."""

    def __init__(self, pids: Path, wait_s: float):
        super().__init__()
        self.pids, self.wait_s = pids, wait_s
        self.hit = False

    def run(self) -> None:
        while not list(self.pids.glob("[0-9]*")):
            time.sleep(0.01)
        time.sleep(self.wait_s)
        victim = random.Random(self.wait_s).choice(sorted(self.pids.glob("[0-9]*")))
        with contextlib.suppress(ProcessLookupError):  # the job was over
            os.kill(int(victim.read_text()), signal.SIGKILL)
            self.hit = True


@pytest.mark.soak_counted
def test_a_killed_worker_loses_no_row(
    photos: Path, tmp_path: Path, soak: Callable[[int, int], int]
) -> None:
    inline = encode(tmp_path / "inline", f"folder:{photos}")
    hits = 0
    for i in range(soak(3, 20)):
        if hits >= soak(1, 20):
            break
        root = tmp_path / f"cache-{i}"
        killer = Killer(root / "pids", random.Random(i).uniform(0.0, 1.2))
        killer.start()
        result = encode(root, f"folder:{photos}", workers=2, worker_class=Marked)
        killer.join()
        hits += killer.hit
        assert result.code == 0
        assert_whole(result, inline)
        assert result.failures() == {}, "no image is rejected for it"
    assert hits, "no kill hit a working worker, so nothing was tested"


class Deadly(Worker):
    """Images of one size crash the process that decodes them."""

    def decode(self, data: bytes) -> DecodedImage:
        decoded = super().decode(data)
        if decoded.image.size == (31, 31):
            os.kill(os.getpid(), signal.SIGKILL)
        return decoded


def test_an_image_that_crashes_its_worker_is_recorded(photos: Path, tmp_path: Path) -> None:
    inline = encode(tmp_path / "inline", f"folder:{photos}")
    (deadly,) = draw(tmp_path / "deadly", 1, first=500, side=31)
    deadly.rename(photos / "0030-deadly.png")
    (photos / "9999-twin.png").write_bytes((photos / "0030-deadly.png").read_bytes())
    result = encode(tmp_path / "ray", f"folder:{photos}", workers=2, worker_class=Deadly)
    assert result.code == 0
    assert {n: stage for n, (stage, _) in result.failures().items()} == {
        "0030-deadly.png": "decode",
        "9999-twin.png": "decode",
    }
    assert result.failures()["0030-deadly.png"][1] == "crashed its worker, also when decoded alone"
    assert result.reader.logical_hash() == inline.reader.logical_hash()
    again = encode(tmp_path / "ray", f"folder:{photos}", workers=1, worker_class=Deadly)
    assert again.plan.todo == (), "the failure is final"


class Hanging(Worker):
    """Preparing a frame of 31 pixels never ends; one of 25 pixels takes 0.4 s."""

    def prepare(self, image: Image.Image | DecodedImage) -> Pixels:
        while image.size == (31, 31):
            time.sleep(1.0)
        if image.size == (25, 25):
            time.sleep(0.4)
        return super().prepare(image)


def test_a_video_that_hangs_its_worker_is_recorded(photos: Path, tmp_path: Path) -> None:
    # It takes 6.4 s, longer than the time-out, but makes progress, so it does not count as hanging.
    (photos / "0029-long.y4m").write_bytes(
        draw_video(DemoWorld(images=9, side=25, video_frames=16), 1)
    )
    inline = encode(tmp_path / "inline", f"folder:{photos}")
    (photos / "0030-endless.y4m").write_bytes(draw_video(DemoWorld(images=9, side=31), 1))
    result = encode(
        tmp_path / "ray", f"folder:{photos}", workers=2, worker_class=Hanging, timeout_s=4.0
    )
    assert {n: error for n, (_, error) in result.failures().items()} == {
        "0030-endless.y4m": "hung its worker, also when decoded alone"
    }
    assert result.reader.logical_hash() == inline.reader.logical_hash()


class Doomed(Worker):
    """Crashes whatever it is given."""

    def run(self, tasks: object) -> list[object]:  # type: ignore[override]
        os.kill(os.getpid(), signal.SIGKILL)
        return []


def test_workers_that_always_crash_stop_the_job(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(culprits, "CRASHES_WITHOUT_PROGRESS", 2)  # each takes seconds
    with pytest.raises(UserError, match=r"stopped: 2 workers in a row ended"):
        encode(tmp_path / "ray", f"folder:{photos}", workers=1, worker_class=Doomed)
    result = encode(tmp_path / "ray", f"folder:{photos}")
    assert result.failures() == {}
    assert result.reader.rows("image") == 60


class Refusing(Worker):
    """Raises a UserError when it starts."""

    def __init__(self, *args: object, **kwargs: object):
        raise UserError("the weights are not on this machine; give them: --weights PATH")


def test_a_user_error_of_a_worker_is_raised_by_the_job(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        encode(tmp_path / "ray", f"folder:{photos}", workers=1, worker_class=Refusing)
    assert str(refused.value) == "the weights are not on this machine; give them: --weights PATH"
