"""Use a Ray cluster that is running: its address, and what each node must prove before it gets a worker.

    address = cluster_address("10.0.0.1:6379", os.environ)       # --ray-address before RAY_ADDRESS
    with Proof([folder of the locks]) as proof:
        report = look(proof.texts, proof.packages)               # on the node, without our package
        proof.problem(report)                                    # "" or what is wrong with the node

A node proves that it sees the same folders: it reads files that the driver has just written into them. Its
versions of Python, Ray and of our code must be the driver's, since rows that were made by other code are
other rows. Our code is installed on each node, or `ray job submit --working-dir .` brings it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from cache.store.files import create_file, remove_file
from configs import UserError, one_line

LOCAL = "local"
"""Value of --ray-address for a Ray of this machine alone."""

AUTO = "auto"
"""Value of --ray-address for the cluster that this machine is a node of."""

CONNECT_S = 10.0
"""Seconds that the head of a cluster may take to accept a connection."""

PACKAGES = ("cache", "configs", "encode", "model")
"""Packages that a worker imports."""

NONCE = ".nanomolmo2-nonce-"
"""Beginning of the names of the files that nodes must read."""

SEEN_S = 5.0
"""Seconds in which a new file may become visible on another machine: NFS remembers folders that long."""


# ---- the address


def cluster_address(option: str | None, environment: Mapping[str, str]) -> str | None:
    """Return the address of the cluster to use: `host:port` or `auto`; None for a Ray of this machine alone.

    Args:
        option: option --ray-address; goes before the variable.
        environment: variables; of RAY_ADDRESS, which `ray job submit` sets, an empty one counts as none.

    Raises:
        UserError: the address is that of another kind of server.
    """
    name = "--ray-address" if option else "RAY_ADDRESS"
    address = (option or environment.get("RAY_ADDRESS", "")).strip()
    if address in ("", LOCAL):
        return None
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"{name} {address}: this is the dashboard, which takes jobs by `ray job submit`; give the "
            "address of the cluster, such as 10.0.0.1:6379, or auto on one of its nodes"
        )
    if "://" in address:
        raise UserError(
            f"{name} {address}: Ray Client is not supported, since the driver writes to the cache; run the "
            "command on a node of the cluster (ray start --address HOST:6379 --num-cpus 0 makes this machine "
            "one that gets no worker), or by `ray job submit`"
        )
    if address != AUTO:
        _split(name, address)
    return address


def _split(name: str, address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(
            f"{name} {address}: give HOST:PORT, such as 10.0.0.1:6379, or auto, or local"
        )
    return host.strip("[]"), int(port)


def check_answers(address: str) -> None:
    """Check that a server accepts connections at `address`: Ray itself would try for a minute.

    Raises:
        UserError: none does.
    """
    if address == AUTO:
        return
    try:
        socket.create_connection(_split("--ray-address", address), CONNECT_S).close()
    except OSError as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({error.strerror or error}); start one there: "
            "ray start --head --port 6379; or encode on this machine alone: --ray-address local"
        ) from None


def connection_error(address: str, error: BaseException) -> UserError:
    """Return in one line why Ray could not connect, and what to do."""
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(texts) < 5:
        texts.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    text = "\n".join(texts)
    versions = re.findall(r"Ray: (\S+)\s+Python: (\S+)", text)
    if "Version mismatch" in text and len(versions) >= 2:
        (ray, python), (our_ray, our_python) = versions[:2]
        return UserError(
            f"the cluster at {address} runs Ray {ray} and Python {python}, this machine Ray {our_ray} and "
            f"Python {our_python}: install the same versions on the driver and on every node"
        )
    if "uthenticat" in text or "token" in text.lower():
        return UserError(
            f"the cluster at {address} refuses this machine's token: copy ~/.ray/auth_token of the cluster's "
            "head to this machine, and set RAY_AUTH_MODE=token"
        )
    if "resolve node to connect to" in text or "find any running Ray" in text:
        return UserError(
            f"this machine is no node of the cluster at {address}: first run ray start --address HOST:6379 "
            "on it (with --num-cpus 0 it gets no worker), or send the command by `ray job submit`"
        )
    return UserError(
        f"cannot connect to the Ray cluster at {address} ({one_line(error)}); encode on this machine alone: "
        "--ray-address local"
    )


# ---- what a node proves


def code_hash(packages: Sequence[str] = PACKAGES) -> str:
    """Return a hash of the code and the settings in `packages`, '' if one of them is not installed.

    Only folders of code count: `cache` may contain a cache.
    """
    found = hashlib.sha256()
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            return ""
        top = os.path.dirname(spec.origin)  # noqa: PTH120 - this function runs where our package may not be
        for folder, inside, files in os.walk(top):
            inside[:] = sorted(
                name
                for name in inside
                if os.path.exists(os.path.join(folder, name, "__init__.py"))  # noqa: PTH110, PTH118
            )
            for name in sorted(files):
                if name.endswith((".py", ".yaml")):
                    path = os.path.join(folder, name)  # noqa: PTH118
                    found.update(f"{package}/{os.path.relpath(path, top)}\n".encode())
                    with open(path, "rb") as file:  # noqa: PTH123
                        found.update(hashlib.sha256(file.read()).digest())
    return found.hexdigest()


def versions() -> dict[str, str]:
    """Return what must be equal on all nodes, apart from our code."""
    return {
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "Ray": importlib.metadata.version("ray"),
    }


def look(nonces: Mapping[str, tuple[str, str]], packages: Sequence[str]) -> dict[str, str]:
    """Return what a node sees. Runs on the node, shipped as code, since our package may be missing there.

    Args:
        nonces: folder -> name and text of a file in it.
        packages: whose code is hashed.

    Returns:
        version of `Python` and `Ray`; the `code` hash; and folder -> '' or what is wrong with it.
    """
    report = {**versions(), "code": code_hash(packages)}
    for folder, (name, text) in nonces.items():
        report[folder] = _see(folder, name, text)
    return report


def _see(folder: str, name: str, text: str) -> str:
    deadline = time.monotonic() + SEEN_S
    while True:
        try:
            with open(os.path.join(folder, name)) as file:  # noqa: PTH118, PTH123
                same = file.read(len(text) + 1) == text
        except FileNotFoundError:
            same = False
        except OSError as error:
            return f"cannot read {folder} ({error.strerror})"
        if same:
            writable = os.access(folder, os.W_OK | os.X_OK)
            return "" if writable else f"cannot write to {folder}"
        if time.monotonic() > deadline:
            there = os.path.isdir(folder)  # noqa: PTH112
            return f"has another folder at {folder}" if there else f"has no folder {folder}"
        time.sleep(0.25)


class Proof:
    """Files in folders that every node must see, as a context manager which removes them."""

    def __init__(self, folders: Sequence[Path]):
        """Prove `folders`, which exist."""
        self.packages = PACKAGES
        self.nonces = {
            str(folder): (NONCE + secrets.token_hex(8), secrets.token_hex(16)) for folder in folders
        }
        """Folder -> name and text of its file."""
        self._own = {**versions(), "code": code_hash()}

    def __enter__(self) -> Self:
        for folder, (name, text) in self.nonces.items():
            with os.fdopen(create_file(Path(folder, name), Path(folder)), "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # other machines read what the server has
        return self

    def __exit__(self, *_error: object) -> None:
        """Remove the files."""
        for folder, (name, _) in self.nonces.items():
            with contextlib.suppress(OSError):
                remove_file(Path(folder, name), Path(folder))

    def problem(self, report: Mapping[str, str]) -> str:
        """Return in words what is wrong with the node that made `report`, and the way out; '' if nothing."""
        for name in versions():
            if report[name] != self._own[name]:
                return (
                    f"has {name} {report[name]}, this machine {self._own[name]}: install the same "
                    "version there"
                )
        if not report["code"]:
            return "has no nanomolmo2: install it there, in the environment in which Ray runs"
        if report["code"] != self._own["code"]:
            return "has other code of nanomolmo2 than this machine: install the same version there"
        for folder in self.nonces:
            if report[folder]:
                return f"{report[folder]}: mount the one of this machine there, under the same path"
        return ""


def remove_stale(folder: Path) -> None:
    """Remove the files of jobs that were killed. The caller is the only job that writes into `folder`."""
    for path in folder.glob(f"{NONCE}*"):
        with contextlib.suppress(OSError):
            remove_file(path, folder)
