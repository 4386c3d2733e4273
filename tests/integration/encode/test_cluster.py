"""Jobs over three nodes of a Ray cluster on this machine: nodes are killed, join, freeze, see other files.

with ray_pool.cluster_session(cluster.address):
    encode(folder / "cache", "folder:photos", nodes=NodeLayouts("auto", None, gpus=False, decode_apart=False))
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from configs import UserError
from encode.driver import pool, ray_pool
from encode.driver.nodes import NodeLayouts
from encode.driver.ray_session import ray_environment
from encode.worker.config import WorkerConfig
from model.media.images import DecodedImage
from tests.support.encode_jobs import (
    Result,
    SlowWorker,
    committed,
    draw,
    encode,
    shoot,
    start,
    wait_for_rows,
)

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

LAYOUTS = NodeLayouts("auto", None, gpus=False, decode_apart=False)
IMAGES = 60
NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 << 20}
SOON = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 4,
}
"""Ray finds after about 2 s, instead of 15 s or more, that a node is gone."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without cores, which the driver is on, and two nodes with a core each."""
    with (
        tempfile.TemporaryDirectory(prefix="g", dir="/tmp") as folder,
        pytest.MonkeyPatch.context() as patch,
        ray_environment(Path(folder, "token")),
    ):
        Path(folder, "token").write_text("ab" * 32)
        patch.setenv("RAY_TMPDIR", folder)
        ray_pool._read_environment()
        head = {**NODE, "num_cpus": 0, "temp_dir": f"{folder}/ray", "include_dashboard": False}
        found = Cluster(initialize_head=True, head_node_args={**head, "_system_config": SOON})
        try:
            for name in "bc":
                found.add_node(**NODE, node_name=name)
            yield found
        finally:
            ray.shutdown()
            found.shutdown()
    ray_pool._read_environment()


@pytest.fixture
def nodes(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, with the two nodes of its start again."""
    yield cluster
    alive = {node._ray_params.node_name for node in cluster.worker_nodes}
    for node in list(cluster.worker_nodes):
        if node._ray_params.node_name not in ("b", "c"):
            cluster.remove_node(node, allow_graceful=False)
    for name in sorted({"b", "c"} - alive):
        cluster.add_node(**NODE, node_name=name)


class Marked(SlowWorker):
    """Writes its process id and its node to a file. Waits after a few images while there is a file `hold`."""

    def __init__(self, config: WorkerConfig, *more: Any, number: int):
        super().__init__(config, *more, number=number)
        cache = config.space.parent.parent
        here = ray.get_runtime_context().get_node_id()
        (cache / "pids").mkdir(exist_ok=True)
        (cache / "pids" / f".{number}").write_text(f"{os.getpid()} {here}")
        (cache / "pids" / f".{number}").rename(cache / "pids" / str(number))
        self._hold, self._decoded = cache / "hold", 0

    def decode(self, data: bytes) -> DecodedImage:
        self._decoded += 1
        until = time.monotonic() + 100.0
        while self._decoded > 8 and self._hold.exists() and time.monotonic() < until:
            time.sleep(0.05)
        return super().decode(data)


def marks(cache: Path) -> dict[int, str]:
    """Return process id -> id of its node, of all workers that have been ready."""
    words = [path.read_text().split() for path in (cache / "pids").glob("[0-9]*")]
    return {int(process): node for process, node in words}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    draw(folder, IMAGES)
    shoot(folder, (2, 5, 16, 3) * 2)
    return folder


@pytest.fixture(scope="module")
def calm(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The job on one machine, uninterrupted."""
    return encode(tmp_path_factory.mktemp("calm"), f"folder:{photos}")


@pytest.fixture
def job(cluster: Cluster, photos: Path, tmp_path: Path) -> Callable[[], Result]:
    def run() -> Result:
        with ray_pool.cluster_session(cluster.address):
            spec = f"folder:{photos}"
            return encode(
                tmp_path / "cache", spec, nodes=LAYOUTS, worker_class=Marked, timeout_s=300.0
            )

    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "hold").touch()
    return run


def assert_whole(result: Result, calm: Result) -> None:
    """Check that every row counts once and equals that of an uninterrupted job, and no file is at fault."""
    assert result.code == 0
    assert result.failures() == {}
    assert result.reader.rows("image") == calm.reader.rows("image") == IMAGES
    assert result.reader.rows("frame") == calm.reader.rows("frame")
    assert result.reader.logical_hash() == calm.reader.logical_hash()
    assert {n: r.key for n, r in result.ledger.items()} == {
        n: r.key for n, r in calm.ledger.items()
    }


def during(job: Callable[[], Result], act: Callable[[], object]) -> Result:
    """Run a job in a thread, and call `act` here meanwhile: Ray starts nodes only in the main thread."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(job)
        act()
        return future.result()


def wait_until(condition: Callable[[], object], timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it has not happened in time"
        time.sleep(0.05)


def node_called(cluster: Cluster, name: str) -> Any:
    (node,) = [n for n in cluster.worker_nodes if n._ray_params.node_name == name]
    return node


def test_a_node_is_killed_and_another_one_joins(
    nodes: Cluster,
    job: Callable[[], Result],
    tmp_path: Path,
    calm: Result,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = tmp_path / "cache"

    def act() -> None:
        wait_until(lambda: len(set(marks(cache).values())) == 2)
        wait_for_commits(cache, 3)
        nodes.remove_node(node_called(nodes, "b"), allow_graceful=False)
        nodes.add_node(**NODE, node_name="d")
        wait_until(lambda: len(set(marks(cache).values())) == 3)
        (cache / "hold").unlink()

    result = during(job, act)
    assert_whole(result, calm)
    assert "(b) has left; 1 workers and" in caplog.text
    assert "decoding:" not in caplog.text, "no file is at fault"
    assert len(set(marks(cache).values())) == 3, "the node that has joined had a worker"


def wait_for_commits(cache: Path, count: int) -> None:
    wait_until(lambda: len(list(cache.glob("spaces/*/commits/*.parquet"))) >= count)


# A child process that Ray starts has the mounts of its parent.
OTHER_MOUNT = """
mount --make-rprivate / && mount --bind {other} {cache} &&
exec {ray} start --address {address} --num-cpus 1 --object-store-memory 80000000 --node-name stranger --block
"""


@contextlib.contextmanager
def stranger(cluster: Cluster, cache: Path, other: Path) -> Iterator[None]:
    """A node on which another folder has the name of the cache."""
    command = OTHER_MOUNT.format(
        other=other,
        cache=cache,
        ray=Path(sys.executable).with_name("ray"),
        address=cluster.address,
    )
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", command],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_until(lambda: is_alive(cluster, "stranger") or process.poll() is not None)
        assert process.poll() is None, process.communicate()[0]
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate()
        wait_until(lambda: not is_alive(cluster, "stranger"))


def is_alive(cluster: Cluster, name: str) -> bool:
    return any(n["Alive"] and n["NodeName"] == name for n in cluster.global_state.node_table())


def test_a_node_with_another_folder_is_named(
    nodes: Cluster, job: Callable[[], Result], tmp_path: Path, calm: Result
) -> None:
    if subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("this user may not mount")
    cache, other = tmp_path / "cache", tmp_path / "other"
    (cache / "hold").unlink()
    locks = calm.paths.locks_dir.relative_to(calm.root.path)
    for folder in (cache, other):
        (folder / locks).mkdir(parents=True)
    with stranger(nodes, cache, other):
        with pytest.raises(UserError) as refused:
            job()
        assert str(refused.value).startswith("node ")
        assert f"(stranger) has another folder at {cache / locks}: mount the one of" in str(
            refused.value
        )
        assert str(refused.value).endswith("; or run ray stop on a node, to encode without it")
        assert not marks(cache)
    assert_whole(job(), calm)


def stop(processes: Sequence[int], how: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, how)


@pytest.mark.soak_counted
def test_a_node_that_freezes_and_wakes_up_doubles_no_row(
    nodes: Cluster,
    job: Callable[[], Result],
    tmp_path: Path,
    calm: Result,
    soak: Callable[[int, int], int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    if not soak(0, 1):
        pytest.skip("takes a minute; only in `make soak`")
    cache = tmp_path / "cache"
    frozen: list[int] = []

    def act() -> None:
        wait_until(lambda: len(set(marks(cache).values())) == 2)
        wait_for_commits(cache, 3)
        node = node_called(nodes, "b")
        # The workers first: they end when Ray's own process on their node does.
        frozen.extend(p for p, where in marks(cache).items() if where == node.node_id)
        frozen.extend(started.process.pid for started in node.all_processes["raylet"])
        stop(frozen, signal.SIGSTOP)
        (cache / "hold").unlink()

    result = during(job, act)
    assert_whole(result, calm)
    assert "(b) has left" in caplog.text or "(b) cannot be reached" in caplog.text
    stop(frozen, signal.SIGCONT)
    wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in frozen[:-1]))
    assert_whole(job(), calm)
    node = node_called(nodes, "b")
    nodes.remove_node(node, allow_graceful=False)


@pytest.mark.soak_counted
def test_a_driver_is_killed_and_the_job_submitted_again(
    nodes: Cluster,
    photos: Path,
    tmp_path: Path,
    calm: Result,
    soak: Callable[[int, int], int],
) -> None:
    if not soak(0, 1):
        pytest.skip("takes half a minute; only in `make soak`")
    (tmp_path / "images").symlink_to(photos)
    process = start(tmp_path, workers=0, address=nodes.address)
    wait_for_rows(tmp_path, process, rows=5)
    pids = workers()
    assert pids
    stop(pids, signal.SIGSTOP)
    process.kill()
    process.communicate()
    assert committed(tmp_path) < IMAGES

    def job() -> Result:
        with ray_pool.cluster_session(nodes.address):
            return encode(tmp_path / "cache", f"folder:{tmp_path / 'images'}", nodes=LAYOUTS)

    def wake_up() -> None:
        time.sleep(8.0)
        stop(pids, signal.SIGCONT)

    assert_whole(during(job, wake_up), calm)
    assert job().plan.todo == ()


def workers() -> list[int]:
    """Return the processes of all workers of this cluster, and of no other on this machine."""
    ours = f"RAY_TMPDIR={os.environ['RAY_TMPDIR']}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name = (process / "comm").read_text()
            if name.startswith("ray::RemoteWork") and ours in (process / "environ").read_bytes():
                found.append(int(process.name))
    return found


@pytest.mark.soak_counted
def test_random_kills_lose_and_double_nothing(
    nodes: Cluster,
    photos: Path,
    tmp_path: Path,
    calm: Result,
    soak: Callable[[int, int], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a worker, of a whole node, of the driver: 20 kills."""
    if not soak(0, 1):
        pytest.skip("takes minutes; only in `make soak`")
    monkeypatch.setattr(pool, "GRACE_S", 2.0)
    hits = 0
    for i in range(soak(0, 60)):
        if hits >= soak(1, 20):
            break
        dice = random.Random(i)
        folder = tmp_path / f"job-{i}"
        folder.mkdir()
        (folder / "images").symlink_to(photos)
        process = start(folder, workers=0, address=nodes.address)
        wait_for_rows(folder, process, rows=dice.randrange(1, IMAGES // 2))
        what = dice.choice(["worker", "node", "driver"])
        if what == "driver":
            process.kill()
        elif what == "node":
            nodes.remove_node(node_called(nodes, "c"), allow_graceful=False)
            nodes.add_node(**NODE, node_name="c")
        elif pids := workers():
            stop([dice.choice(pids)], signal.SIGKILL)
        hits += committed(folder) < IMAGES
        process.communicate(timeout=300)
        with ray_pool.cluster_session(nodes.address):
            result = encode(folder / "cache", f"folder:{folder / 'images'}", nodes=LAYOUTS)
        assert result.code == 0
        assert result.failures() == {}
        assert result.reader.rows("image") == IMAGES
        assert result.reader.logical_hash() == calm.reader.logical_hash(), (i, what)
    assert hits, "no kill hit a working job, so nothing was tested"
    print(f"{hits} kills of a worker, a node or a driver hit a working job")
