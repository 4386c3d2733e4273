"""The address of a cluster, and what its nodes must prove.

cluster_address(None, {"RAY_ADDRESS": "10.0.0.1:6379"})     # "10.0.0.1:6379"
with Proof([folder]) as proof:
    proof.problem(look(proof.nonces, proof.packages))       # ""
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from configs import UserError
from encode.driver import cluster
from encode.driver.cluster import (
    NONCE,
    Proof,
    check_answers,
    cluster_address,
    code_hash,
    connection_error,
    look,
    remove_stale,
)
from tests.support import ROOT


@pytest.mark.parametrize(
    ("option", "variable", "address"),
    [
        (None, None, None),
        (None, "", None),
        (None, " ", None),
        (None, "local", None),
        (None, "10.0.0.1:6379", "10.0.0.1:6379"),
        (None, "auto", "auto"),
        ("auto", "10.0.0.1:6379", "auto"),
        ("head:6379", None, "head:6379"),
        ("[fd00::1]:6379", None, "[fd00::1]:6379"),
        ("local", "10.0.0.1:6379", None),
    ],
)
def test_the_option_goes_before_the_variable(
    option: str | None, variable: str | None, address: str | None
) -> None:
    environment = {} if variable is None else {"RAY_ADDRESS": variable}
    assert cluster_address(option, environment) == address


@pytest.mark.parametrize(
    ("option", "variable", "message"),
    [
        (None, "http://head:8265", r"^RAY_ADDRESS http://head:8265: this is the dashboard"),
        ("https://head", None, r"^--ray-address https://head: this is the dashboard"),
        ("ray://head:10001", None, r"^--ray-address ray://head:10001: Ray Client is not supported"),
        (None, "head", r"^RAY_ADDRESS head: give HOST:PORT, such as 10\.0\.0\.1:6379, or auto"),
        ("head:", None, "give HOST:PORT"),
        (":6379", None, "give HOST:PORT"),
        ("head:70000", None, "give HOST:PORT"),
        ("head:x", None, "give HOST:PORT"),
    ],
)
def test_other_addresses_are_refused(
    option: str | None, variable: str | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        cluster_address(option, {"RAY_ADDRESS": variable or ""})


def test_an_address_without_a_server_is_one_line() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(
            UserError, match=rf"^no Ray cluster answers at {address} \(.*--ray-address"
        ):
            check_answers(address)
        server.listen()
        check_answers(address)
    check_answers("auto")


def raised(text: str, cause: Exception | None = None) -> Exception:
    try:
        raise ConnectionError(text) from cause
    except ConnectionError as error:
        return error


OTHER_VERSIONS = RuntimeError(
    "Version mismatch: The cluster was started with:\n    Ray: 2.50.1\n    Python: 3.12.4\n"
    "This process on node 10.0.0.9 was started with:\n    Ray: 2.60.0\n    Python: 3.11.7\n"
)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            raised("Failed to connect to Ray cluster at 10.0.0.1:6379", OTHER_VERSIONS),
            "the cluster at 10.0.0.1:6379 runs Ray 2.50.1 and Python 3.12.4, this machine Ray 2.60.0 and Py",
        ),
        (
            raised(
                "x",
                RuntimeError("No node info found ... when trying to resolve node to connect to."),
            ),
            "this machine is no node of the cluster at 10.0.0.1:6379: first run ray start --address HOST:6",
        ),
        (
            raised("x", RuntimeError("InvalidAuthToken: Authentication token is missing")),
            "the cluster at 10.0.0.1:6379 refuses this machine's token: copy ~/.ray/auth_token of the",
        ),
        (
            raised("two\nlines"),
            "cannot connect to the Ray cluster at 10.0.0.1:6379 (two lines); encode on this machine alone",
        ),
    ],
)
def test_why_ray_cannot_connect_is_one_line(error: Exception, message: str) -> None:
    found = str(connection_error("10.0.0.1:6379", error))
    assert found.startswith(message)
    assert "\n" not in found


def test_the_text_of_other_versions_is_rays_own() -> None:
    ours = {"ray_version": "2.50.1", "python_version": "3.12.4"}
    with pytest.raises(RuntimeError) as refused:
        ray._private.utils.check_version_info(ours, "node 10.0.0.9")
    assert "runs Ray 2.50.1 and Python 3.12.4, this" in str(connection_error("a:1", refused.value))


# ---- what a node proves


def test_a_node_that_sees_the_same_has_no_problem(tmp_path: Path) -> None:
    with Proof([tmp_path]) as proof:
        assert len(list(tmp_path.iterdir())) == 1
        assert proof.problem(look(proof.nonces, proof.packages)) == ""
    assert list(tmp_path.iterdir()) == []


def test_another_folder_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "SEEN_S", 0.0)
    shared = tmp_path / "shared"
    shared.mkdir()
    with Proof([shared]) as proof:
        shutil.copytree(shared, tmp_path / "copy")
        name, text = proof.nonces[str(shared)]

        def problem(folder: Path, text: str = text) -> str:
            report = look({str(folder): (name, text)}, proof.packages)
            return proof.problem(report | {str(shared): report[str(folder)]})

        assert (
            problem(tmp_path / "copy") == ""
        )  # it holds the file; a node cannot have it by chance
        other = problem(shared, "0" * 32)
        assert (
            other
            == f"has another folder at {shared}: mount the one of this machine there, under the same path"
        )
        (tmp_path / "empty").mkdir()
        assert problem(tmp_path / "empty").startswith(f"has another folder at {tmp_path / 'empty'}")
        assert problem(tmp_path / "none").startswith(f"has no folder {tmp_path / 'none'}")
        (tmp_path / "file").touch()
        assert "cannot read" in problem(tmp_path / "file")
        monkeypatch.setattr(os, "access", lambda *_: False)
        assert problem(shared).startswith(f"cannot write to {shared}")


def test_a_file_that_becomes_visible_late_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late: list[float] = []

    def sleep(seconds: float) -> None:
        late.append(seconds)
        (tmp_path / "nonce").write_text("text")

    monkeypatch.setattr("encode.driver.cluster.time.sleep", sleep)
    assert look({str(tmp_path): ("nonce", "text")}, ())[str(tmp_path)] == ""
    assert late


def test_a_node_without_our_package_can_look(tmp_path: Path) -> None:
    """It gets code instead of a name, so it answers instead of failing to import it."""
    ray.cloudpickle.register_pickle_by_value(cluster)
    try:
        sent = ray.cloudpickle.dumps(look)
    finally:
        ray.cloudpickle.unregister_pickle_by_value(cluster)
    (tmp_path / "sent").write_bytes(sent)
    with Proof([tmp_path]) as proof:
        code = (
            "import pickle, sys; from pathlib import Path\n"
            f"look = pickle.loads(Path({str(tmp_path / 'sent')!r}).read_bytes())\n"
            f"print(look({proof.nonces!r}, {proof.packages!r}))\n"
            "print(sorted(m for m in sys.modules if m.startswith(('encode', 'cache', 'configs'))))"
        )
        done = subprocess.run(
            [sys.executable, "-I", "-c", code], cwd="/", capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        report, modules = done.stdout.splitlines()
        found = eval(report)
        assert modules == "[]"
        installed = proof.problem(found)
        if not found["code"]:  # our package is not in this environment
            assert installed.startswith("has no nanomolmo2: install it there")


def test_other_code_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in cluster.PACKAGES:
        shutil.copytree(
            ROOT / package,
            tmp_path / package,
            ignore=lambda folder, names: [n for n in names if n == "__pycache__"],
        )
    (tmp_path / "cache" / "spaces").mkdir(exist_ok=True)
    (tmp_path / "cache" / "spaces" / "data.py").write_text("not code: no package has it")
    program = "from encode.driver.cluster import code_hash; print(code_hash())"

    def hash_there() -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    assert hash_there() == code_hash() != ""
    path = tmp_path / "encode" / "worker" / "worker.py"
    path.write_text(path.read_text() + "\n")
    assert hash_there() != code_hash()
    assert code_hash(["no_such_package"]) == ""


def test_files_of_a_killed_driver_are_removed(tmp_path: Path) -> None:
    (tmp_path / f"{NONCE}ab").touch()
    (tmp_path / "driver.lock").touch()
    remove_stale(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["driver.lock"]
