"""Run workers as Ray actors. No other file of the project imports Ray.

    session(cpus=3, gpus=0)            a Ray of this machine alone (encode.driver.ray_session)
    cluster_session("10.0.0.1:6379")   a Ray that is running, with all its nodes (encode.driver.cluster)
    RayBackend(paths)                  actors on its nodes, for encode.driver.pool

Each actor has a `encode.worker.worker.Worker`. One more actor, on the driver's node, is the Registrar. Tasks
and outcomes are sent through Ray, features never are.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cache.format.spec import ARRAYS
from cache.store.paths import SpacePaths
from cache.store.space import Present, Space
from configs import UserError, one_line
from configs.hardware import keep_memory
from encode.driver import cluster
from encode.driver.cluster import Proof, check_answers, connection_error, look
from encode.driver.ray_session import LOOPBACK, private_folder, ray_environment
from encode.errors import WorkerLostError
from encode.worker.config import WorkerConfig, spin_briefly
from encode.worker.messages import Outcome, Registrar, SourceTask, Timings

if TYPE_CHECKING:
    # The registrar's process imports this file, and needs no torch: 2 s and 470 MB less.
    from encode.driver.nodes import Node
    from encode.worker.worker import Worker

log = logging.getLogger(__name__)

CLOSE_S = 5.0
"""Seconds that all workers together may take to end their threads, before they are killed."""

PARENT_S = 2.0
"""Seconds between two looks of a worker at whether the Ray of its node is there."""

OBJECT_STORE_BYTES = 96 << 20
"""Ray requires 75 MiB. It holds only tasks and outcomes."""

OTHER_RAY = "install another one: pip install 'ray==2.60.0', or encode without Ray: --workers 0"


class RemoteWorker:
    """A Worker that is created inside the actor's process. Its methods are those of Worker."""

    def __init__(self) -> None:
        """Set what torch reads when the arguments of `start` import it."""
        spin_briefly()
        keep_memory()

    def start(
        self, config: WorkerConfig, number: int, registrar: Any, worker_class: type[Worker]
    ) -> None:
        """Load the encoder and take the lease."""
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
        coordinator = _RemoteCoordinator(registrar)
        self._worker = worker_class(config, config.load(), coordinator, number=number)

    def run(self, tasks: Sequence[SourceTask]) -> list[Outcome]:
        """Start `tasks`; return the outcomes known so far."""
        return self._worker.run(tasks)

    def flush(self) -> list[Outcome]:
        """Encode and commit all started tasks; return their outcomes."""
        return self._worker.flush()

    def close(self) -> None:
        """End the worker's threads and release its lease."""
        self._worker.close()


def _end_with(parent: int) -> None:
    """End this process once its parent, the Ray of its node, has ended: nobody else would, seen in Ray 2.60.

    A node that was frozen or cut off finds that the cluster goes on without it, and ends. Its workers do not
    always: they would keep their memory and their GPU.
    """
    while os.getppid() == parent:
        time.sleep(PARENT_S)
    os._exit(1)


class SpaceRegistrar(Registrar):
    """A Registrar that reads what is committed from the space itself, in its own process."""

    def __init__(self, paths: SpacePaths):
        space = Space.open(paths)
        super().__init__(Present.of(space).images, {a: space.next_shard(a) for a in ARRAYS})


class _RemoteCoordinator:
    """The Coordinator of a worker in another process: calls the registrar's actor."""

    def __init__(self, actor: Any):
        self._actor = actor

    def reserve(self, worker: int, ids: Sequence[str]) -> list[bool]:
        return ray.get(self._actor.reserve.remote(worker, ids))

    def next_shard(self, worker: int, array: str) -> int:
        return ray.get(self._actor.next_shard.remote(worker, array))

    def report(self, worker: int, timings: Timings) -> bool:
        return ray.get(self._actor.report.remote(worker, timings))


@contextlib.contextmanager
def session(cpus: int, gpus: int) -> Iterator[None]:
    """Start a Ray of this process alone, and end it afterwards. If Ray is running already, use it.

    Its ports are on the loopback address and require a token, and nobody else can enter its folder.

    Raises:
        UserError: Ray cannot be started in this way.
    """
    if ray.is_initialized():
        yield
        return
    _check_ray()
    with contextlib.ExitStack() as stack:
        stack.callback(_read_environment)  # for a Ray that this process may start later
        folder = stack.enter_context(private_folder())
        stack.enter_context(ray_environment(folder / "token"))
        try:
            _read_environment()
            with _no_other_address(), _one_line():
                context = ray.init(
                    "local",
                    num_cpus=cpus,
                    num_gpus=gpus,
                    include_dashboard=False,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _node_ip_address=LOOPBACK,
                    _temp_dir=str(folder / "ray"),
                )
            if context.address_info["node_ip_address"] != LOOPBACK:
                raise _unknown_ray()
            _be_quiet()
            yield
        finally:
            ray.shutdown(wait_for_processes=True)


@contextlib.contextmanager
def cluster_session(address: str) -> Iterator[None]:
    """Connect to a cluster, and disconnect afterwards. If this process is connected already, use that.

    Args:
        address: `host:port` or `auto`, as `cluster_address` returns it.

    Raises:
        UserError: it cannot be reached, or has other versions of Ray or Python.
    """
    if ray.is_initialized():
        yield
        return
    check_answers(address)
    # It would go before `auto`, and may be `local`, for which Ray starts a cluster open to everybody.
    variable = os.environ.pop("RAY_ADDRESS", None)
    try:
        with _silent():
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
    except Exception as error:  # Ray raises many types, Exception itself among them
        raise connection_error(address, error) from error
    finally:
        if variable is not None:
            os.environ["RAY_ADDRESS"] = variable
    try:
        _be_quiet()
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Drop what Ray's C++ code prints: a line a second, to standard output, while it cannot connect."""
    with contextlib.ExitStack() as stack:
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            with contextlib.suppress(OSError, ValueError):  # it is closed
                stream.flush()
                before = os.dup(number)
                stack.callback(os.close, before)
                stack.callback(os.dup2, before, number)
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, number)
                os.close(nothing)
        yield


def nodes() -> dict[str, Node]:
    """Return id -> node of the Ray that this process is connected to, of those that are alive."""
    from encode.driver.nodes import Node

    return {entry["NodeID"]: Node.of(entry) for entry in ray.nodes() if entry["Alive"]}


def _be_quiet() -> None:
    # We report dead workers ourselves; Ray would print a paragraph about each to stdout.
    ray._private.worker._worker_logs_enabled = False


def _check_ray() -> None:
    """Raise UserError unless Ray has what `session` needs, of which no version promises to keep any."""
    parts = (
        (ray._private.services, "resolve_ip_for_localhost"),
        (ray._raylet, "Config"),
        (ray._raylet, "AuthenticationTokenLoader"),
    )
    if not all(hasattr(module, name) for module, name in parts):
        raise _unknown_ray()


@contextlib.contextmanager
def _no_other_address() -> Iterator[None]:
    """Let Ray use the loopback address, which it otherwise replaces by the machine's."""
    services = ray._private.services
    before = services.resolve_ip_for_localhost
    services.resolve_ip_for_localhost = lambda host: host
    try:
        yield
    finally:
        services.resolve_ip_for_localhost = before


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Ray raises many types, Exception itself among them
        raise UserError(
            f"Ray cannot be started ({one_line(error)}); encode without it: --workers 0"
        ) from error


def _read_environment() -> None:
    """Let Ray read its variables again. It keeps those that it has read for an earlier session."""
    ray._raylet.Config.initialize("")
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()


def _unknown_ray() -> UserError:
    return UserError(
        f"Ray {ray.__version__} cannot be kept to this machine's loopback address with a token: {OTHER_RAY}"
    )


class RayBackend:
    """Actors on the nodes of Ray. Use it inside `session` or `cluster_session`."""

    def __init__(self, paths: SpacePaths):
        """Start the Registrar, on this machine, for the space at `paths`."""
        self.home = ray.get_runtime_context().get_node_id()
        self._registrar = (
            ray.remote(SpaceRegistrar)
            .options(num_cpus=0, scheduling_strategy=_on(self.home))
            .remote(paths)
        )

    def nodes(self) -> Mapping[str, Node]:
        """Return id -> node, of those that are alive."""
        return nodes()

    def look(self, node: Node, proof: Proof) -> Any:
        """Start `cluster.look` on a node; return the call."""
        # By value: a node without our package answers too.
        ray.cloudpickle.register_pickle_by_value(cluster)
        try:
            task = ray.remote(look).options(
                num_cpus=0, max_retries=0, scheduling_strategy=_on(node.id)
            )
            return task.remote(proof.nonces, proof.packages)
        finally:
            ray.cloudpickle.unregister_pickle_by_value(cluster)

    def ping(self, node: Node) -> Any:
        """Start a task on a node that does nothing; return the call."""
        task = ray.remote(_nothing).options(
            num_cpus=0, max_retries=0, scheduling_strategy=_on(node.id)
        )
        return task.remote()

    def start(
        self, node: Node, gpus: int, config: WorkerConfig, number: int, worker_class: type[Worker]
    ) -> tuple[Any, Any]:
        """Start a worker on a node; return its actor, and the call that ends when the worker is ready."""
        actor = (
            ray.remote(RemoteWorker)
            .options(
                num_cpus=1,
                num_gpus=gpus,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=_on(node.id),
            )
            .remote()
        )
        return actor, actor.start.remote(config, number, self._registrar, worker_class)

    def call(self, actor: Any, method: str, *values: Any) -> Any:
        """Start a method of a worker; return the call."""
        return getattr(actor, method).remote(*values)

    def wait(self, calls: Sequence[Any], timeout_s: float) -> Collection[Any]:
        """Return the calls that have ended, after the first one has or `timeout_s` is over."""
        ray.wait(calls, num_returns=1, timeout=timeout_s)
        ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        return set(ready)

    def result(self, call: Any, timeout_s: float | None = None) -> Any:
        """Return the result of a call.

        Raises:
            WorkerLostError: the process or its node is gone, or the time is over.
            Exception: what the method has raised.
        """
        try:
            return ray.get(call, timeout=timeout_s)
        except RayTaskError as error:
            if isinstance(error.cause, RayError):
                self.ask("timings")  # raises a better message if the registrar's process is gone
                raise WorkerLostError(one_line(error.cause)) from None
            if isinstance(error.cause, Exception):
                raise error.cause from None
            raise
        except RayError as error:
            raise WorkerLostError(str(error).split("\n")[0]) from None

    def ask(self, method: str, *values: Any) -> Any:
        """Call a method of the Registrar.

        Raises:
            UserError: its process is gone.
        """
        try:
            return ray.get(getattr(self._registrar, method).remote(*values))
        except RayActorError as error:
            raise UserError(
                f"the process that coordinates the workers has died ({str(error).splitlines()[0]}); "
                "everything committed is kept: run the same command again"
            ) from None

    def kill(self, actor: Any) -> None:
        """End the process of an actor, if it can be reached."""
        ray.kill(actor)

    def end(self, actors: Sequence[Any], closing: Sequence[Any]) -> None:
        """Wait a little for the calls in `closing`, then end all actors and the Registrar."""
        if closing:
            ray.wait(list(closing), num_returns=len(closing), timeout=CLOSE_S)
        for actor in (*actors, self._registrar):
            ray.kill(actor)


def _on(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node, soft=False)


def _nothing() -> None:
    """A task that only shows that its node runs tasks."""
