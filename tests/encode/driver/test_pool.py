"""Jobs on the nodes of a cluster, here without processes: nodes that join, leave, or see other files.

machines = Machines("a", "b")                       # two nodes with a core each
result = encode(root, "folder:photos", nodes=LAYOUTS)
machines.leave("b")                                 # at any step of the job
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pytest

from cache.errors import StaleJobError
from cache.format.spec import ARRAYS
from cache.store.paths import SpacePaths
from cache.store.space import Present, Space
from configs import UserError
from encode.driver import cluster, pool, ray_pool, unread
from encode.driver.cluster import Proof
from encode.driver.nodes import Node, NodeLayouts
from encode.driver.slots import Slot
from encode.errors import WorkerLostError
from encode.worker.config import WorkerConfig
from encode.worker.decode_log import DecodeEntry
from encode.worker.messages import Outcome, Registrar, SourceTask
from encode.worker.worker import Worker
from model.media.images import Failure
from tests.support.encode_jobs import Result, draw, encode, shoot

pytestmark = pytest.mark.slow

LAYOUTS = NodeLayouts("auto", None, gpus=False, decode_apart=False)
IMAGES = 24


class Machines:
    """Nodes of a cluster in this process. Each `wait` is a step, in which every worker does one call."""

    def __init__(self, *names: str):
        self.home = "a"
        self.alive = {name: node(name) for name in names}
        self.reports: dict[str, dict[str, str]] = {}
        """What is different in what a node reports."""
        self.hidden: dict[str, Callable[[str], bool]] = {}
        """Node -> which sources it cannot read."""
        self.steps: dict[int, Callable[[], object]] = {}
        """What happens at which step."""
        self.step = 0
        self.worked: dict[str, set[str]] = {}
        """Node -> sources that it was given."""
        self.workers: dict[int, tuple[str, Worker]] = {}
        self.alone: list[bool] = []
        """Of each source that another worker had: whether its worker had no other one."""
        self.frozen: list[Worker] = []
        self._numbers = itertools.count(1)
        self._queues: dict[int, list[tuple[int, Callable[[], object]]]] = {}
        self._results: dict[int, object] = {}

    def __call__(self, paths: SpacePaths) -> Machines:
        space = Space.open(paths)
        numbers = {array: space.next_shard(array) for array in ARRAYS}
        self.registrar = Registrar(Present.of(space).images, numbers)
        return self

    # ---- what happens to nodes

    def join(self, name: str) -> None:
        self.alive[name] = node(name)

    def leave(self, name: str, *, frozen: bool = False) -> None:
        """A node is gone; its workers are, or go on where nobody reaches them."""
        del self.alive[name]
        for actor, (where, worker) in list(self.workers.items()):
            if where == name:
                if frozen:
                    self.frozen.append(worker)
                    self.workers.pop(actor)
                self._lose(actor)

    def crash(self, name: str) -> None:
        """A process ends, its node does not."""
        self._lose(next(actor for actor, (where, _) in self.workers.items() if where == name))

    def _lose(self, actor: int) -> None:
        if actor in self.workers:
            self.workers.pop(actor)[1].close()
        for call, _ in self._queues.pop(actor, []):
            self._results[call] = WorkerLostError("The actor died unexpectedly.")

    # ---- the backend

    def nodes(self) -> dict[str, Node]:
        if not any(self._queues.values()):  # the job waits for a node
            self._tick()
        return dict(self.alive)

    def _tick(self) -> None:
        self.step += 1
        self.steps.get(self.step, lambda: None)()

    def look(self, node: Node, proof: Proof) -> int:
        report = cluster.look(proof.nonces, proof.packages)
        other = {
            k if k != "folder" else next(iter(proof.nonces)): v
            for k, v in self.reports.get(node.id, {}).items()
        }
        return self._ended(report | other)

    def ping(self, node: Node) -> int:
        return self._ended(None if node.id in self.alive else WorkerLostError("no such node"))

    def start(
        self, node: Node, gpus: int, config: WorkerConfig, number: int, worker_class: type[Worker]
    ) -> tuple[int, int]:
        actor = next(self._numbers)
        self._queues[actor] = []

        def begin() -> None:
            worker = worker_class(config, config.load(), self.registrar, number=number)
            self.workers[actor] = node.id, worker

        if node.id not in self.alive:
            return actor, self._ended(WorkerLostError("no such node"))
        return actor, self._queue(actor, begin)

    def call(self, actor: int, method: str, *values: Any) -> int:
        if actor not in self._queues:
            return self._ended(WorkerLostError("The actor died unexpectedly."))

        def act() -> object:
            where, worker = self.workers[actor]
            if method != "run":
                return getattr(worker, method)()
            (tasks,) = values
            self.worked.setdefault(where, set()).update(Path(t.source).name for t in tasks)
            self.alone += [worker._under_way == 0 for task in tasks if task.reassigned]
            hides = self.hidden.get(where, lambda source: False)
            failed = [cannot_read(task) for task in tasks if hides(task.source)]
            return failed + worker.run([task for task in tasks if not hides(task.source)])

        return self._queue(actor, act)

    def wait(self, calls: Sequence[int], timeout_s: float) -> Collection[int]:
        self._tick()
        for queue in list(self._queues.values()):
            if queue:
                call, act = queue.pop(0)
                try:
                    self._results[call] = act()
                except Exception as error:
                    self._results[call] = error
        return {call for call in calls if call in self._results}

    def result(self, call: int, timeout_s: float | None = None) -> object:
        while call not in self._results:
            self.wait([call], 0.0)
        got = self._results[call]
        if isinstance(got, Exception):
            raise got
        return got

    def ask(self, method: str, *values: Any) -> object:
        return getattr(self.registrar, method)(*values)

    def kill(self, actor: int) -> None:
        self._lose(actor)

    def end(self, actors: Sequence[int], closing: Sequence[int]) -> None:
        for actor in actors:
            self._lose(actor)

    def _ended(self, result: object) -> int:
        call = next(self._numbers)
        self._results[call] = result
        return call

    def _queue(self, actor: int, act: Callable[[], object]) -> int:
        call = next(self._numbers)
        self._queues[actor].append((call, act))
        return call


def node(name: str) -> Node:
    return Node(id=name, address=f"10.0.0.{ord(name) - 96}", host=f"host-{name}", cpus=1)


def cannot_read(task: SourceTask) -> Outcome:
    from encode.worker.local_files import unreadable

    failure = Failure("fetch", "Permission denied")
    return Outcome(task=task, record=unreadable(task), result="failed", failure=failure)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    draw(folder, IMAGES)
    shoot(folder, (2, 16))
    return folder


@pytest.fixture(scope="module")
def calm(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A job on one machine, to compare with."""
    return encode(tmp_path_factory.mktemp("calm"), f"folder:{photos}")


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Machines:
    """Three nodes, of which this process is on the first."""
    found = Machines("a", "b", "c")
    monkeypatch.setattr(ray_pool, "RayBackend", found)
    monkeypatch.setattr("encode.driver.nodes.NODES_EVERY_S", 0.0)
    monkeypatch.setattr(pool, "GRACE_S", 0.0)
    monkeypatch.setattr(pool, "POLL_S", 0.0)
    monkeypatch.setattr(cluster, "SEEN_S", 0.0)
    return found


Run = Callable[[], Result]


@pytest.fixture
def run(photos: Path, tmp_path: Path, machines: Machines) -> Run:
    return lambda: encode(tmp_path / "cache", f"folder:{photos}", nodes=LAYOUTS)


def assert_whole(result: Result, calm: Result) -> None:
    assert result.code == 0
    assert result.failures() == {}
    assert result.reader.logical_hash() == calm.reader.logical_hash()
    assert {n: r.key for n, r in result.ledger.items()} == {
        n: r.key for n, r in calm.ledger.items()
    }


def test_all_nodes_encode(machines: Machines, run: Run, calm: Result) -> None:
    result = run()
    assert_whole(result, calm)
    assert set(machines.worked) == {"a", "b", "c"}
    assert not list((result.paths.locks_dir).glob(f"{cluster.NONCE}*"))


def test_a_node_that_leaves_gives_its_sources_to_others(
    machines: Machines, run: Run, calm: Result, caplog: pytest.LogCaptureFixture
) -> None:
    machines.steps[6] = lambda: machines.leave("b")
    assert_whole(run(), calm)
    assert "node 10.0.0.2 (host-b) has left; 1 workers and" in caplog.text
    assert "decoding:" not in caplog.text, "no file is blamed"


def test_a_node_that_joins_gets_a_worker(machines: Machines, run: Run, calm: Result) -> None:
    del machines.alive["c"]
    machines.steps[5] = lambda: machines.join("c")
    assert_whole(run(), calm)
    assert machines.worked["c"]


def test_a_job_outlives_all_its_first_nodes(machines: Machines, run: Run, calm: Result) -> None:
    machines.alive.pop("a")
    machines.steps |= {
        4: lambda: machines.leave("b"),
        6: lambda: machines.leave("c"),
        9: lambda: machines.join("d"),
    }
    assert_whole(run(), calm)
    assert machines.worked["d"]


def test_a_job_without_nodes_ends_after_a_while(
    machines: Machines, run: Run, monkeypatch: pytest.MonkeyPatch, calm: Result
) -> None:
    monkeypatch.setattr(pool, "NO_NODE_S", 0.0)
    machines.alive.pop("a")
    machines.steps |= {5: lambda: machines.leave("b"), 6: lambda: machines.leave("c")}
    with pytest.raises(
        UserError, match=r"no node that can have workers has joined .* run the same"
    ):
        run()
    machines.alive |= {"a": node("a")}
    machines.steps.clear()
    assert_whole(run(), calm)


def test_a_frozen_node_that_wakes_up_changes_nothing(
    machines: Machines, run: Run, calm: Result
) -> None:
    machines.steps[6] = lambda: machines.leave("b", frozen=True)
    result = run()
    assert_whole(result, calm)
    (awake,) = machines.frozen
    with contextlib.suppress(StaleJobError):  # or it had nothing left
        awake.flush()
    awake.close()
    assert result.reader.logical_hash() == calm.reader.logical_hash()
    assert result.reader.rows("image") == calm.reader.rows("image")


def test_a_process_that_crashes_is_replaced_on_its_node(
    machines: Machines, run: Run, calm: Result, caplog: pytest.LogCaptureFixture
) -> None:
    machines.steps |= {5: lambda: machines.crash("b"), 7: lambda: machines.crash("a")}
    assert_whole(run(), calm)
    assert "worker 2 on node 10.0.0.2 (host-b): The actor died" in caplog.text
    assert "worker 1 on node 10.0.0.1 (host-a): The actor died" in caplog.text


def test_files_of_a_crashed_worker_are_retried_alone_by_busy_workers(
    machines: Machines, run: Run, calm: Result, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [DecodeEntry(source=str(path), key="ab" * 32, since=1.0) for path in photos.iterdir()]

    def entries(slot: Slot, space: object) -> list[DecodeEntry]:
        return files if slot.number == 2 else []

    monkeypatch.setattr(Slot, "entries", entries)
    machines.steps[5] = lambda: machines.crash("b")
    assert_whole(run(), calm)
    assert machines.alone and all(machines.alone)


def test_workers_that_end_before_they_are_ready_leave_their_node_out(
    machines: Machines,
    photos: Path,
    tmp_path: Path,
    calm: Result,
    caplog: pytest.LogCaptureFixture,
) -> None:
    start = machines.start

    def starts_on_a(node: Node, *more: Any) -> tuple[int, int]:
        actor, call = start(node, *more)
        if node.id == "b":
            machines._lose(actor)
        return actor, call

    machines.start = starts_on_a  # type: ignore[method-assign]
    result = encode(tmp_path / "cache", f"folder:{photos}", nodes=LAYOUTS)
    assert_whole(result, calm)
    assert "host-b): its workers end before they are ready; it is left out" in caplog.text


# ---- what a node must prove


@pytest.mark.parametrize(
    ("report", "problem"),
    [
        (
            {"folder": "has another folder at /x"},
            r"has another folder at /x: mount the one of this mac",
        ),
        (
            {"code": "ab"},
            "has other code of nanomolmo2 than this machine: install the same version",
        ),
        ({"code": ""}, "has no nanomolmo2: install it there, in the environment in which Ray runs"),
        (
            {"Python": "3.9"},
            r"has Python 3\.9, this machine 3\.\d+: install the same version there",
        ),
        ({"Ray": "2.9"}, r"has Ray 2\.9, this machine 2\.\d+\.\d+: install the same version there"),
    ],
)
def test_a_node_of_the_start_that_cannot_have_workers_ends_the_job(
    machines: Machines, run: Run, report: dict[str, str], problem: str
) -> None:
    machines.reports["b"] = report
    with pytest.raises(
        UserError, match=rf"^node 10\.0\.0\.2 \(host-b\) {problem}.*; or run ray stop"
    ):
        run()
    assert machines.worked == {}


def test_all_nodes_that_cannot_have_workers_are_named(machines: Machines, run: Run) -> None:
    machines.reports = {name: {"folder": "has no folder /x"} for name in "abc"}
    with pytest.raises(UserError, match=r"host-a\) has no .*host-b\) has no .*host-c\) has no"):
        run()


def test_a_node_that_joins_and_cannot_have_workers_is_left_out(
    machines: Machines, run: Run, calm: Result, caplog: pytest.LogCaptureFixture
) -> None:
    machines.reports["d"] = {"folder": "has another folder at /x"}
    machines.steps[4] = lambda: machines.join("d")
    assert_whole(run(), calm)
    assert "node 10.0.0.4 (host-d) has another folder at /x: mount the one" in caplog.text
    assert caplog.text.count("host-d") == 1, "one line"
    assert "d" not in machines.worked


class Refusing(Worker):
    """Raises a UserError when it starts, but not as the first ones."""

    first = 99

    def __init__(self, *args: Any, number: int, **kwargs: Any):
        if number >= self.first:
            raise UserError("weights.pt does not exist")
        super().__init__(*args, number=number, **kwargs)


def test_an_error_of_a_worker_names_its_node(
    machines: Machines,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    calm: Result,
) -> None:
    def job() -> Result:
        spec = f"folder:{photos}"
        return encode(tmp_path / "cache", spec, nodes=LAYOUTS, worker_class=Refusing)

    monkeypatch.setattr(Refusing, "first", 1)
    with pytest.raises(
        UserError, match=r"^node 10\.0\.0\.1 \(host-a\): weights\.pt does not exist$"
    ):
        job()
    monkeypatch.setattr(Refusing, "first", 4)
    machines.steps[machines.step + 5] = lambda: machines.join("d")
    assert_whole(job(), calm)
    assert "node 10.0.0.4 (host-d): weights.pt does not exist; it is left out" in caplog.text


# ---- sources that a node cannot read


def test_a_source_that_one_node_cannot_read_is_read_by_another(
    machines: Machines, run: Run, calm: Result
) -> None:
    machines.hidden["b"] = lambda source: source.endswith(("3.png", "4.png", "video00.y4m"))
    assert_whole(run(), calm)
    tried = {name for name in machines.worked["b"] if name.endswith(("3.png", "4.png"))}
    assert tried, "none was given to it, so nothing was tested"


def test_what_no_node_can_read_is_our_failure_and_names_the_nodes(
    machines: Machines, run: Run, calm: Result, photos: Path
) -> None:
    del machines.alive["a"]
    for name in "bc":
        machines.hidden[name] = lambda source: source.endswith("0007.png")
    result = run()
    ((name, (stage, error)),) = result.failures().items()
    assert (name, stage) == ("0007.png", "encode")
    assert error is not None and error.startswith(
        f"{result.paths.root.name}: this machine can read it"
    )
    assert "10.0.0.2 (host-b): Permission denied" in error
    assert "10.0.0.3 (host-c): Permission denied" in error
    machines.hidden.clear()
    assert_whole(run(), calm)


def test_what_this_machine_cannot_read_either_is_the_medias_failure(
    machines: Machines, tmp_path: Path
) -> None:
    *_, gone = draw(tmp_path / "few", 6)
    machines.steps[1] = lambda: gone.unlink(missing_ok=True)
    machines.hidden["b"] = machines.hidden["c"] = lambda source: source == str(gone)
    result = encode(tmp_path / "cache", f"folder:{tmp_path / 'few'}", nodes=LAYOUTS)
    assert result.failures() == {"0005.png": ("fetch", "no such file")}
    assert result.reader.rows("image") == 5


def test_a_node_that_can_read_nothing_is_left_out(
    machines: Machines,
    run: Run,
    calm: Result,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(unread, "PROBATION", 3)
    machines.hidden["b"] = lambda source: True
    assert_whole(run(), calm)
    assert "node 10.0.0.2 (host-b) cannot read most of its sources" in caplog.text
    assert len(machines.worked["b"]) < IMAGES / 2


def test_nodes_that_can_read_nothing_end_the_job(
    machines: Machines, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unread, "PROBATION", 3)
    del machines.alive["a"]
    machines.hidden["b"] = machines.hidden["c"] = lambda source: True
    with pytest.raises(
        UserError, match=r"no node can read .*png: Permission denied.*: mount their"
    ):
        run()


def test_a_worker_without_a_sign_of_life_is_replaced(
    machines: Machines,
    run: Run,
    calm: Result,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(pool, "WATCH_EVERY_S", 0.0)
    silent: dict[int, float] = {}
    ask = machines.ask

    def asked(method: str, *values: Any) -> object:
        return silent if method == "silent_s" else ask(method, *values)

    machines.ask = asked  # type: ignore[method-assign]
    monkeypatch.setattr(pool, "SILENT_S", 0.0)
    machines.steps[6] = lambda: silent.update({2: 1e9})
    machines.steps[8] = silent.clear
    assert_whole(run(), calm)
    assert "worker 2 on node 10.0.0.2 (host-b): no report for" in caplog.text
