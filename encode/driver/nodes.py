"""Choose which nodes of a Ray cluster get workers, and how many.

    nodes   Node.of(entry) for each entry of ray.nodes()
    -> Membership        those that see the same folders and have the same code (encode.driver.cluster)
    -> NodeLayouts("auto", None, gpus=False).deal(nodes)     {node id: number of workers}

A node that is in the cluster at the start and cannot have workers ends the job, which names it. One that
joins later is left out, with a warning. A GPU is one worker's own. On CPUs, `auto` is one worker for 8
cores, as on one machine. Cores and GPUs are those that a node's `ray start` offers: a node that offers none
gets no worker.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from configs import UserError, one_line
from encode.driver.cluster import Proof
from encode.driver.resources import CORES_PER_WORKER, WorkerLayout, decode_threads
from encode.worker.config import WorkerConfig
from encode.worker.worker import Worker

log = logging.getLogger(__name__)

DEVICES = ("auto", "cpu", "cuda")
"""Values of --device that have a meaning on several machines."""

NODES_EVERY_S = 2.0
"""Seconds between two looks for nodes that have joined or left."""

LOOK_S = 120.0
"""Seconds that a node may take to say what it sees. It starts a process for that."""

POLL_S = 0.5
"""Seconds between two looks for a stop."""

NAMED = 8
"""Nodes that the line about a cluster names, at most."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One machine of a Ray cluster."""

    id: str
    """Ray's id. A machine that leaves and joins again gets another one."""
    address: str = ""
    """Its IP address."""
    host: str = ""
    """Its name, or what `ray start --node-name` has called it."""
    cpus: int = 0
    """Cores that it offers."""
    gpus: int = 0
    """GPUs that it offers."""

    @staticmethod
    def of(entry: Mapping[str, Any]) -> Node:
        """Return the node of one entry of `ray.nodes()`."""
        resources = entry.get("Resources", {})
        address = str(entry.get("NodeManagerAddress", ""))
        given = str(entry.get("NodeName", ""))
        host = given if given not in ("", address) else str(entry.get("NodeManagerHostname", ""))
        return Node(
            id=str(entry["NodeID"]),
            address=address,
            host=host,
            cpus=int(resources.get("CPU", 0)),
            gpus=int(resources.get("GPU", 0)),
        )

    def __str__(self) -> str:
        return f"{self.address} ({self.host})" if self.host else self.address


def use_gpus(nodes: Iterable[Node], device: str) -> bool:
    """Return whether the workers of a job compute on GPUs: all of them do, or none.

    Args:
        nodes: the nodes of the cluster.
        device: option --device.

    Raises:
        UserError: the option has no meaning on a cluster, or no node has a GPU.
    """
    if device not in DEVICES:
        raise UserError(
            f"--device {device}: on a cluster, each worker gets a GPU of its own; give auto, cpu or cuda"
        )
    found = any(node.gpus for node in nodes)
    if device == "cuda" and not found:
        raise UserError("--device cuda: no node of the cluster offers a GPU; give auto or cpu")
    return found and device != "cpu"


class Layouts(Protocol):
    """How many workers each node gets."""

    def most(self, node: Node) -> int:
        """Return the largest number of workers that a node may have."""
        ...

    def deal(self, nodes: Sequence[Node]) -> dict[str, int]:
        """Return node id -> number of its workers."""
        ...

    def check(self, nodes: Sequence[Node]) -> None:
        """Check that the nodes can have the workers that the options ask for. Raises UserError."""
        ...

    def layout(self, node: Node, workers: int) -> WorkerLayout:
        """Return the layout of one node that gets `workers` workers."""
        ...


@dataclass(frozen=True)
class NodeLayouts:
    """The workers of each node of a cluster."""

    workers: int | Literal["auto"]
    """Option --workers: of all nodes together."""
    threads: int | None
    """Option --threads."""
    gpus: bool
    """Whether the workers compute on GPUs."""
    decode_apart: bool = True
    """Whether each decoding thread lets a process of its own decode. Tests decode in threads."""

    def most(self, node: Node) -> int:
        """Return the largest number of workers that a node may have."""
        return node.gpus if self.gpus else node.cpus

    def deal(self, nodes: Sequence[Node]) -> dict[str, int]:
        """Return node id -> number of its workers. A given number is spread evenly."""
        if self.workers == "auto":
            return {node.id: self._usual(node) for node in nodes}
        counts = {node.id: 0 for node in nodes}
        for _ in range(min(self.workers, sum(map(self.most, nodes)))):
            free = [node for node in nodes if counts[node.id] < self.most(node)]
            counts[min(free, key=lambda node: counts[node.id]).id] += 1
        return counts

    def _usual(self, node: Node) -> int:
        most = self.most(node)
        return most if self.gpus or not most else max(1, most // CORES_PER_WORKER)

    def check(self, nodes: Sequence[Node]) -> None:
        """Check that the nodes can have the workers that the options ask for.

        Raises:
            UserError: more workers than GPUs or cores; or no node offers any.
        """
        what, possible = "a GPU" if self.gpus else "a core", sum(map(self.most, nodes))
        if not possible:
            raise UserError(
                f"no node of the cluster offers {what} to Ray, so none can have a worker; on a machine that "
                "has some: ray stop, and ray start again without --num-cpus 0"
            )
        if self.workers != "auto" and self.workers > possible:
            raise UserError(
                f"--workers {self.workers}: each worker needs {what}, and the nodes offer {possible}"
            )

    def describe(self, nodes: Sequence[Node]) -> str:
        """Return the line that says where the workers will be."""
        counts = self.deal(nodes)
        with_workers = [f"{node}: {counts[node.id]}" for node in nodes if counts[node.id]]
        named = ", ".join(with_workers[:NAMED]) + (", ..." if len(with_workers) > NAMED else "")
        kind = "GPUs" if self.gpus else "CPUs"
        return f"cluster  {sum(counts.values())} workers on the {kind} of {len(with_workers)} nodes ({named})"

    def layout(self, node: Node, workers: int) -> WorkerLayout:
        """Return the layout of one node that gets `workers` workers."""
        share = max(1, node.cpus // max(1, workers))
        return WorkerLayout(
            workers=workers,
            gpus=int(self.gpus),
            threads=self.threads or decode_threads(share),
            torch_threads=share,
            decode_apart=self.decode_apart,
        )


@dataclass(frozen=True)
class OneMachine:
    """The workers of the one node that is this machine."""

    machine: WorkerLayout
    """The workers, as `choose_layout` returns them."""

    def most(self, node: Node) -> int:  # noqa: ARG002
        """Return the number of workers."""
        return self.machine.workers

    def deal(self, nodes: Sequence[Node]) -> dict[str, int]:
        """Return node id -> number of its workers."""
        return {node.id: self.machine.workers for node in nodes}

    def check(self, nodes: Sequence[Node]) -> None:
        """`choose_layout` has checked it."""

    def layout(self, node: Node, workers: int) -> WorkerLayout:  # noqa: ARG002
        """Return the layout of this machine."""
        return self.machine


class Backend(Protocol):
    """Actors on nodes, and the calls to them: Ray, or the tests' own."""

    home: str
    """Id of the node that this process runs on."""

    def nodes(self) -> Mapping[str, Node]:
        """Return id -> node, of those that are alive."""
        ...

    def look(self, node: Node, proof: Proof) -> Any:
        """Start `cluster.look` on a node; return the call."""
        ...

    def ping(self, node: Node) -> Any:
        """Start a task on a node that does nothing; return the call."""
        ...

    def start(
        self, node: Node, gpus: int, config: WorkerConfig, number: int, worker_class: type[Worker]
    ) -> tuple[Any, Any]:
        """Start a worker on a node; return its actor, and the call that ends when the worker is ready."""
        ...

    def call(self, actor: Any, method: str, *values: Any) -> Any:
        """Start a method of a worker; return the call."""
        ...

    def wait(self, calls: Sequence[Any], timeout_s: float) -> Collection[Any]:
        """Return the calls that have ended, after the first one has or `timeout_s` is over."""
        ...

    def result(self, call: Any, timeout_s: float | None = None) -> Any:
        """Return the result of a call.

        Raises:
            WorkerLostError: the process or its node is gone, or the time is over.
            Exception: what the method has raised.
        """
        ...

    def ask(self, method: str, *values: Any) -> Any:
        """Call a method of the Registrar. Raises UserError if its process is gone."""
        ...

    def kill(self, actor: Any) -> None:
        """End the process of an actor, if it can be reached."""
        ...

    def end(self, actors: Sequence[Any], closing: Sequence[Any]) -> None:
        """Wait a little for the calls in `closing`, then end all actors and the Registrar."""
        ...


class Membership:
    """The nodes that may have workers. `close` removes the files that nodes had to read."""

    def __init__(self, backend: Backend, layouts: Layouts, folders: Sequence[Path] | None):
        """Know no node.

        Args:
            backend: asks the nodes.
            layouts: says which nodes offer something.
            folders: what each node must see; None if this machine is the only node.
        """
        self._backend, self._layouts, self._folders = backend, layouts, folders
        self.nodes: dict[str, Node] = {}
        """Id -> node that may have workers."""
        self._out: set[str] = set()
        self._looks: dict[Any, tuple[Node, Proof, float]] = {}
        self._looked_s = 0.0

    @property
    def calls(self) -> list[Any]:
        """The unfinished calls to nodes."""
        return list(self._looks)

    def begin(self, stopping: Callable[[], bool]) -> None:
        """Wait until each node has proven what it sees.

        Raises:
            UserError: some cannot have workers; names all of them.
        """
        nodes = self._backend.nodes()
        self._layouts.check(list(nodes.values()))
        if self._folders is None:
            self.nodes = dict(nodes)
            return
        self._look_at(nodes.values())
        problems: dict[str, str] = {}
        while self._looks and not stopping():
            problems.update(self._collect(self._backend.wait(self.calls, POLL_S)))
        alive = self._backend.nodes()
        found = [f"node {nodes[name]} {why}" for name, why in problems.items() if name in alive]
        if found:
            raise UserError(f"{'; '.join(found)}; or run ray stop on a node, to encode without it")

    def update(self, ready: Collection[Any]) -> list[Node]:
        """Take note of nodes that have joined or left; return those that have left.

        Args:
            ready: calls that have ended.
        """
        for name, why in self._collect(ready).items():
            log.warning("node %s %s; it is left out", self._backend.nodes().get(name, name), why)
            self._out.add(name)
        now = time.monotonic()
        if self._folders is None or now - self._looked_s < NODES_EVERY_S:
            return []
        self._looked_s = now
        alive = self._backend.nodes()
        left = [self.nodes.pop(name) for name in list(self.nodes) if name not in alive]
        known = {*self.nodes, *self._out, *(node.id for node, _, _ in self._looks.values())}
        self._look_at(node for name, node in alive.items() if name not in known)
        return left

    def leave_out(self, node: Node) -> None:
        """Give this node no further workers."""
        self.nodes.pop(node.id, None)
        self._out.add(node.id)

    def close(self) -> None:
        """Remove the files of nodes that have not answered."""
        for _, proof, _ in self._looks.values():
            proof.__exit__()
        self._looks.clear()

    def _look_at(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if self._layouts.most(node):
                proof = Proof(self._folders or ()).__enter__()
                self._looks[self._backend.look(node, proof)] = (node, proof, time.monotonic())

    def _collect(self, ready: Collection[Any]) -> dict[str, str]:
        """Return node id -> why it cannot have workers, of the nodes that have answered or take too long."""
        problems = {}
        for call, (node, proof, since) in list(self._looks.items()):
            late = time.monotonic() - since > LOOK_S
            if call not in ready and not late:
                continue
            why = f"has not run a task for {LOOK_S:.0f} s"
            if call in ready:
                try:
                    why = proof.problem(self._backend.result(call))
                except Exception as error:  # of Ray, or of a Python that cannot run it
                    why = f"cannot run a task of this job ({one_line(error)})"
            del self._looks[call]
            with contextlib.suppress(OSError):
                proof.__exit__()
            if why:
                problems[node.id] = why
            else:
                self.nodes[node.id] = node
        return problems
