"""How many workers each node of a cluster gets.

NodeLayouts("auto", None, gpus=True).deal(nodes)        # {id: one for each GPU}
"""

from __future__ import annotations

from typing import Any

import pytest

from configs import UserError
from encode.driver.nodes import Node, NodeLayouts, use_gpus


def node(name: str, cpus: int = 0, gpus: int = 0) -> Node:
    return Node(id=name, address="10.0.0.1", cpus=cpus, gpus=gpus)


NODES = [node("head"), node("a", 16, 2), node("b", 64, 8), node("c", 4)]


def test_a_node_has_what_it_offers_to_ray() -> None:
    entry: dict[str, Any] = {
        "NodeID": "ab",
        "NodeManagerAddress": "10.0.0.5",
        "NodeManagerHostname": "gpu-5",
        "NodeName": "10.0.0.5",
        "Resources": {"CPU": 16.0, "GPU": 2.0, "memory": 1e9},
    }
    assert Node.of(entry) == Node(id="ab", address="10.0.0.5", host="gpu-5", cpus=16, gpus=2)
    assert str(Node.of(entry)) == "10.0.0.5 (gpu-5)"
    assert str(Node.of({**entry, "NodeName": "left"})) == "10.0.0.5 (left)"
    assert Node.of({"NodeID": "cd", "NodeManagerAddress": "10.0.0.6"}).cpus == 0


@pytest.mark.parametrize(
    ("workers", "gpus", "counts"),
    [
        ("auto", True, {"head": 0, "a": 2, "b": 8, "c": 0}),
        ("auto", False, {"head": 0, "a": 2, "b": 8, "c": 1}),
        (1, True, {"head": 0, "a": 1, "b": 0, "c": 0}),
        (5, True, {"head": 0, "a": 2, "b": 3, "c": 0}),
        (10, True, {"head": 0, "a": 2, "b": 8, "c": 0}),
        (11, True, {"head": 0, "a": 2, "b": 8, "c": 0}),
        (4, False, {"head": 0, "a": 2, "b": 1, "c": 1}),
    ],
)
def test_workers_are_dealt_over_the_nodes(workers: Any, gpus: bool, counts: dict[str, int]) -> None:
    assert NodeLayouts(workers, None, gpus).deal(NODES) == counts


def test_threads_are_those_of_the_nodes_cores() -> None:
    layouts = NodeLayouts("auto", None, gpus=True)
    one = layouts.layout(NODES[2], 8)
    assert (one.workers, one.gpus, one.threads, one.torch_threads) == (8, 1, 9, 8)
    assert layouts.layout(NODES[1], 1).threads == 17
    assert NodeLayouts(2, 3, gpus=False).layout(NODES[3], 1).threads == 3
    assert NodeLayouts("auto", None, gpus=False).layout(NODES[3], 1).gpus == 0


@pytest.mark.parametrize(
    ("device", "nodes", "expected"),
    [
        ("auto", NODES, True),
        ("auto", NODES[3:], False),
        ("cpu", NODES, False),
        ("cuda", NODES, True),
    ],
)
def test_all_workers_compute_on_one_kind_of_device(
    device: str, nodes: list[Node], expected: bool
) -> None:
    assert use_gpus(nodes, device) is expected


def test_options_that_no_cluster_can_fulfil_are_refused() -> None:
    with pytest.raises(UserError, match="--device cuda: no node of the cluster offers a GPU"):
        use_gpus(NODES[3:], "cuda")
    for device in ("cuda:1", "mps"):
        with pytest.raises(
            UserError, match=rf"--device {device}: on a cluster, each worker gets a GPU"
        ):
            use_gpus(NODES, device)
    with pytest.raises(
        UserError, match="--workers 11: each worker needs a GPU, and the nodes offer 10"
    ):
        NodeLayouts(11, None, gpus=True).check(NODES)
    with pytest.raises(
        UserError, match="--workers 99: each worker needs a core, and the nodes offer 84"
    ):
        NodeLayouts(99, None, gpus=False).check(NODES)
    with pytest.raises(UserError, match="no node of the cluster offers a core to Ray"):
        NodeLayouts("auto", None, gpus=False).check(NODES[:1])


def test_the_line_about_a_cluster_names_nodes_with_workers() -> None:
    line = NodeLayouts("auto", None, gpus=True).describe(NODES)
    assert line == "cluster  10 workers on the GPUs of 2 nodes (10.0.0.1: 2, 10.0.0.1: 8)"
    many = NodeLayouts("auto", None, gpus=True).describe([node(str(i), 8, 1) for i in range(20)])
    assert many.startswith("cluster  20 workers on the GPUs of 20 nodes (10.0.0.1: 1, ")
    assert many.endswith(", ...)")
