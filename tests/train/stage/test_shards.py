"""Checkpoints of several processes: each writes its part, and any number of processes reads all of it.

shards.write(folder, tensors, begin, commit, group)
shards.Stored(folder).read(targets)

One group of four processes runs `child`; the tests look at what it wrote.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from configs import UserError
from train.stage import checkpoint, shards
from train.stage.saver import Saver

LAYOUTS: dict[str, list[Any]] = {
    "one": [],
    "two full": [0, 1],
    "two none": [[0], [1]],
    "four full": [0, 1, 2, 3],
    "four node": [[0, 1], [2, 3]],
}
"""The mesh of each: processes that have the same part are in one column."""
STEP = 7


class Model(nn.Module):
    """Tied, frozen and never updated parameters, and fewer rows than processes."""

    def __init__(self) -> None:
        super().__init__()
        self.connector = nn.Linear(3, 5)
        self.words = nn.Embedding(9, 5)
        self.head = nn.Linear(5, 9, bias=False)
        self.head.weight = self.words.weight
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.last = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.frozen(self.connector(x))).sum() + self.head(self.words.weight).sum()


TRAINED = ["connector.weight", "connector.bias", "words.weight", "last.weight", "last.bias"]
UPDATED = TRAINED[:-1]
"""AdamW has no moments of the last parameter: it had no gradient yet."""


def reference() -> dict[str, Tensor]:
    """Return the values of every tensor in the checkpoint."""
    torch.manual_seed(1)
    shapes = {name: p.shape for name, p in Model().named_parameters() if name in TRAINED}
    names = TRAINED + [f"{name}/{m}" for name in UPDATED for m in checkpoint.MOMENTS]
    return {name: torch.rand(shapes[name.partition("/")[0]]) for name in names}


def steps() -> dict[str, int]:
    return {name: number + 3 for number, name in enumerate(UPDATED)}


@cache
def meshes() -> dict[str, DeviceMesh]:
    """Return the mesh of each layout. Every process must make all of them, also those without it."""
    return {
        name: DeviceMesh(
            "cpu", mesh, mesh_dim_names=("replicate", "shard")[-torch.tensor(mesh).ndim :]
        )
        for name, mesh in LAYOUTS.items()
        if mesh
    }


def built(layout: str, filled: bool) -> tuple[Model, torch.optim.AdamW]:
    """Return a model and an optimizer of this process, with the values of `reference` or with others."""
    torch.manual_seed(0)
    model = Model()
    if LAYOUTS[layout]:
        fully_shard(model, mesh=meshes()[layout])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    if filled:
        values = reference()
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name in TRAINED:
                parameters[name].copy_(like(parameters[name], values[name]))
        for name, step in steps().items():
            state = {m: like(parameters[name], values[f"{name}/{m}"]) for m in checkpoint.MOMENTS}
            optimizer.state[parameters[name]] = {"step": torch.tensor(float(step)), **state}
    return model, optimizer


def like(parameter: Tensor, full: Tensor) -> Tensor:
    """Return this process's part of a tensor, as it has the parameter's."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(full, parameter.device_mesh, parameter.placements)
    return full.clone()


def contents(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Return the whole tensors of a model and its moments, by the names in a checkpoint."""
    tensors, _ = checkpoint.snapshot(model, optimizer)
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}


def require_reference(model: nn.Module, optimizer: torch.optim.AdamW) -> None:
    found, expected = contents(model, optimizer), reference()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert checkpoint.snapshot(model, optimizer)[1] == steps()


# ---- what the four processes do


class Group(SimpleNamespace):
    """A part of the four processes."""

    def __init__(self, rank: int, size: int, connection: Any) -> None:
        super().__init__(
            rank=rank, world_size=size, is_main=rank == 0, local_rank=rank, connection=connection
        )

    def gather_numbers(self, values: list[float]) -> list[list[float]]:
        mine = torch.tensor(values, dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(everyone, mine, group=self.connection)
        return [one.tolist() for one in everyone]


def child(rank: int, place: Path) -> None:
    """Write with every layout and read with every other; then fail in several ways."""
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    store = dist.FileStore(str(place / "store"), 4)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4)
    pair = dist.new_group([0, 1])
    meshes()
    groups = {
        "one": Group(rank, 1, None),
        **{name: Group(rank, 2, pair) for name in ("two full", "two none")},
        **{name: Group(rank, 4, None) for name in ("four full", "four node")},
    }
    for name, group in groups.items():
        if rank < group.world_size:
            model, optimizer = built(name, filled=True)
            with torch.no_grad():  # an evaluation leaves the weights gathered
                model(torch.ones(1, 3))
            checkpoint.save(
                place / name, STEP, model, optimizer, {"more": 1}, group, group.connection
            )
    dist.barrier()
    for name, group in groups.items():
        if rank < group.world_size:
            for written in LAYOUTS:
                read(place, name, written)
                if rank == 0:
                    (place / f"read {written} with {name}").touch()
    dist.barrier()
    background(place / "background", groups["four full"])
    full_disk(place / "full disk", groups["four full"])
    elsewhere(place / "elsewhere", groups["four full"])
    dist.barrier()
    killed(place / "killed", groups["four full"])


def read(place: Path, name: str, written: str) -> None:
    path = checkpoint.newest(place / written)
    assert path is not None
    model, optimizer = built(name, filled=False)
    assert checkpoint.load(path, model, optimizer) == {"step": STEP, "more": 1}
    require_reference(model, optimizer)
    model, optimizer = built(name, filled=False)
    checkpoint.load_weights(path, model)
    found = contents(model, optimizer)
    assert all(torch.equal(found[n], reference()[n]) for n in TRAINED)


def background(folder: Path, group: Any) -> None:
    """Save, change every tensor, and save again: each checkpoint has the values of its own time."""
    model, optimizer = built("four full", filled=True)
    saver = Saver(folder, group, background=True)
    saver.save(1, model, optimizer, {})
    for tensor in checkpoint.snapshot(model, optimizer)[0].values():
        local(tensor).zero_()
    saver.save(2, model, optimizer, {})
    while saver._pending is not None:
        saver.check()
    again = built("four full", filled=False)
    checkpoint.load(folder / "step-00000001", *again)
    require_reference(*again)
    checkpoint.load(folder / "step-00000002", *again)
    assert not any(bool(value.any()) for value in contents(*again).values())
    saver.close()


def full_disk(folder: Path, group: Any) -> None:
    """Let the disk of one process be full: the same error is raised by all, after the same step."""
    model, optimizer = built("four full", filled=True)
    saver = Saver(folder, group, background=True)
    saver.save(1, model, optimizer, {})
    saver.wait()
    full = mock.patch.object(FileSystem, "create_stream", side_effect=OSError(errno.ENOSPC, "x"))
    with full if group.rank == 2 else mock.patch.dict({}, {}):
        saver.save(2, model, optimizer, {})
        raised = -1
        for step in range(10_000):
            try:
                saver.check()
            except OSError as error:
                assert error.errno == errno.ENOSPC
                raised = step
                break
            time.sleep(0.001 * (group.rank + 1))
    assert [raised >= 0, len({number for (number,) in group.gather_numbers([raised])})] == [True, 1]
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    saver.save(3, model, optimizer, {})  # there is room again
    saver.close()
    assert len(checkpoint.committed(folder)) == 2


def elsewhere(folder: Path, group: Any) -> None:
    """Let two processes be on another machine, with a disk of its own."""
    model, optimizer = built("four full", filled=True)
    mine = folder / f"machine {group.rank // 2}"
    with pytest.raises(UserError, match="must be on a disk that all machines share"):
        checkpoint.save(mine, 1, model, optimizer, {}, group)
    assert group.rank > 0 or not list(mine.glob("step-*"))


def killed(folder: Path, group: Any) -> None:
    """Kill one process while all write; the others end."""
    model, optimizer = built("four full", filled=True)
    saver = Saver(folder, group, background=True)
    saver.save(1, model, optimizer, {})
    saver.wait()
    if group.rank == 3:
        with mock.patch.object(FileSystem, "create_stream", side_effect=lambda *_: os._exit(9)):
            saver.save(2, model, optimizer, {})
            saver.wait()
    try:
        saver.save(2, model, optimizer, {})
        saver.wait()
    except Exception as error:
        (folder / f"survivor {group.rank}").write_text(f"{type(error).__name__}: {error}")
        os._exit(0)
    os._exit(1)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run the four processes; return the folder in which they wrote."""
    place = tmp_path_factory.mktemp("processes")
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # one import for all
    processes = [context.Process(target=child, args=(rank, place)) for rank in range(4)]
    for process in processes:
        process.start()
    failed = False
    while not failed and any(process.is_alive() for process in processes[:3]):
        failed = any(process.exitcode for process in processes[:3])  # the others would wait for it
        time.sleep(0.01)
    for process in processes:
        if failed:
            process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0, 9]
    yield place


# ---- what they wrote


@pytest.mark.slow
def test_any_number_of_processes_reads_what_any_number_wrote(place: Path) -> None:
    """Parameters, moments and steps are those that were saved, to the bit."""
    pairs = {
        tuple(path.name.removeprefix("read ").split(" with ")) for path in place.glob("read *")
    }
    assert pairs == {(written, name) for written in LAYOUTS for name in LAYOUTS}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_have_every_value_once_and_no_pickle(place: Path, layout: str) -> None:
    path = checkpoint.newest(place / layout)
    assert path is not None
    processes = torch.tensor(LAYOUTS[layout] or [0]).numel()
    files = sorted(path.glob("*.safetensors"))
    if processes == 1:
        assert [file.name for file in files] == ["model.safetensors", "optimizer.safetensors"]
    else:
        assert [file.name[:11] for file in files] == [
            f"shard-0000{i + 1}" for i in range(processes)
        ]
    assert {file.name for file in path.iterdir()} == {
        *(file.name for file in files),
        checkpoint.STATE,
        checkpoint.COMMITTED,
    }
    values = sum(t.numel() for file in files for t in load_file(file).values())
    assert values == sum(value.numel() for value in reference().values())
    assert {name for file in files for name in load_file(file)} == reference().keys()
    state = json.loads((path / checkpoint.STATE).read_text())
    assert state == {"more": 1, "step": STEP, checkpoint.OPTIMIZER_STEPS: steps()}


@pytest.mark.slow
def test_a_process_that_dies_while_all_write_leaves_the_checkpoint_before(place: Path) -> None:
    folder = place / "killed"
    assert [path.name for path in checkpoint.committed(folder)] == ["step-00000001"]
    assert len(list(folder.glob("survivor *"))) == 3
    again = built("one", filled=False)
    checkpoint.load(folder / "step-00000001", *again)
    require_reference(*again)


# ---- what somebody else may have written


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A checkpoint of two processes, without any process: rows 0-1 and rows 2-4 of the connector."""
    values = reference()
    path = tmp_path / "step-00000007"
    path.mkdir()
    for number, rows in enumerate((slice(0, 2), slice(2, None))):
        write_part(path, number, {n: v[rows].contiguous() for n, v in values.items()}, rows.start)
    (path / checkpoint.STATE).write_text(
        json.dumps({"step": STEP, checkpoint.OPTIMIZER_STEPS: steps()})
    )
    mark(path)
    return path


def write_part(path: Path, number: int, tensors: dict[str, Tensor], first: int) -> None:
    tensors = {name: value for name, value in tensors.items() if len(value)}
    places = {n: {"saved_offsets": [first, *[0] * (v.ndim - 1)]} for n, v in tensors.items()}
    file = path / f"shard-0000{number + 1}-model-00001-of-00001.safetensors"
    save_file(tensors, file, metadata={"DCP_SHARDING_INFO": json.dumps(places)})


def mark(path: Path) -> None:
    """Write COMMITTED for the files as they are."""
    names = [file.name for file in path.iterdir() if file.name != checkpoint.COMMITTED]
    sizes = {name: (path / name).stat().st_size for name in names}
    (path / checkpoint.COMMITTED).write_text(json.dumps(sizes))


def rewrite(
    path: Path, number: int, change: Callable[[dict[str, Tensor], dict[str, Any]], None]
) -> None:
    """Change the tensors and the places in the file of a process."""
    file = sorted(path.glob("shard-*"))[number]
    with safe_open(file, framework="pt") as opened:
        places = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
    tensors = load_file(file)
    change(tensors, places)
    save_file(tensors, file, metadata={"DCP_SHARDING_INFO": json.dumps(places)})
    mark(path)


def test_parts_are_read_by_one_process(parts: Path) -> None:
    again = built("one", filled=False)
    checkpoint.load(parts, *again)
    require_reference(*again)


NAME = "connector.weight"


def place_of(offsets: object) -> Callable[[Path], None]:
    def change(_: dict[str, Tensor], places: dict[str, Any]) -> None:
        places[NAME] = {"saved_offsets": offsets}

    return lambda path: rewrite(path, 1, change)


def without(name: str, number: int = 1) -> Callable[[Path], None]:
    return lambda path: rewrite(path, number, lambda tensors, _: tensors.pop(name))


def other_dtype(path: Path) -> None:
    for number in (0, 1):
        rewrite(path, number, lambda tensors, _: tensors.update({NAME: tensors[NAME].double()}))


def other_state(path: Path, **values: object) -> None:
    state = json.loads((path / checkpoint.STATE).read_text())
    (path / checkpoint.STATE).write_text(json.dumps(state | values))
    mark(path)


def raw_header(header: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        file = sorted(path.glob("shard-*"))[1]
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        mark(path)

    return change


def places_text(text: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        file = sorted(path.glob("shard-*"))[1]
        save_file(load_file(file), file, metadata={"DCP_SHARDING_INFO": text})
        mark(path)

    return change


def remove_last(path: Path) -> None:
    sorted(path.glob("shard-*"))[1].unlink()


def renamed(path: Path) -> None:
    sorted(path.glob("shard-*"))[1].rename(path / "other.safetensors")
    mark(path)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no marker": (lambda p: (p / checkpoint.COMMITTED).unlink(), "was not written to its end"),
    "a file is missing": (remove_last, "shard-00002.*: 0 bytes, should be"),
    "a file and its entry": (lambda p: (remove_last(p), mark(p)), "connector.bias and 8 more"),
    "the first file and its entry": (
        lambda p: (min(p.glob("shard-*")).unlink(), mark(p)),
        "is not whole",
    ),
    "a file of another name": (renamed, "names other files"),
    "a foreign file": (
        lambda p: save_file({}, p / "x.safetensors"),
        "x.safetensors: is not of this",
    ),
    "a gap": (place_of([3, 0]), "is not whole|another model"),
    "an overlap": (place_of([1, 0]), "is not whole|another model"),
    "columns": (place_of([2, 1]), "is not whole|another model"),
    "negative": (place_of([-2, 0]), "is not whole|another model"),
    "too few numbers": (place_of([2]), "is not whole|another model"),
    "too many numbers": (place_of([2, 0, 0]), "is not whole"),
    "text for numbers": (place_of(["a", "b"]), "remove it, and --resume"),
    "no numbers": (place_of(None), "remove it, and --resume"),
    "a huge number": (place_of([1 << 70, 0]), "remove it, and --resume"),
    "no places": (places_text("{}"), "remove it, and --resume"),
    "a list of places": (places_text("[]"), "remove it, and --resume"),
    "no JSON": (places_text("{"), "remove it, and --resume"),
    "deep JSON": (places_text("[" * 200_000), "remove it, and --resume"),
    "the end of a parameter": (without(NAME), r"another model \(connector.weight\)"),
    "the end of a moment": (
        without(f"{NAME}/exp_avg"),
        r"another model \(connector.weight/exp_avg\)",
    ),
    "the beginning": (without(NAME, 0), "connector.weight is not whole"),
    "a parameter": (without("last.weight", 0), r"another model \(last.weight\)"),
    "another dtype": (other_dtype, r"another model \(connector.weight\)"),
    "steps of no parameter": (
        lambda p: other_state(p, optimizer_steps={**steps(), "x\n": 1}),
        r"another model \(x /exp_avg and 1 more\)",
    ),
    "steps of a moment": (
        lambda p: other_state(p, optimizer_steps={**steps(), f"{NAME}/exp_avg": 1}),
        f"{NAME}/exp_avg/exp_avg and 1 more",
    ),
    "no steps": (lambda p: other_state(p, optimizer_steps={}), "connector.bias/exp_avg and 7 more"),
    "a negative step": (
        lambda p: other_state(p, optimizer_steps={**steps(), NAME: -1}),
        r"state\.json: cannot be read",
    ),
    "steps as text": (
        lambda p: other_state(p, optimizer_steps="all"),
        r"state\.json: cannot be read",
    ),
    "a cut header": (raw_header(b'{"a": '), "remove it, and --resume"),
    "no header": (raw_header(b""), "remove it, and --resume"),
    "an unknown dtype": (
        raw_header(b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'),
        "remove it, and --resume",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_or_foreign_is_refused_in_one_line(parts: Path, damage: str) -> None:
    change, said = DAMAGE[damage]
    change(parts)
    again = built("one", filled=False)
    with pytest.raises(UserError, match=said) as refused:
        checkpoint.load(parts, *again)
    assert "\n" not in str(refused.value)
    assert str(parts) in str(refused.value)


def test_files_of_a_process_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors builds a file in memory; a tensor is not divided."""
    monkeypatch.setattr(shards, "FILE_BYTES", 100)
    tensors = {name: torch.zeros(size) for name, size in zip("abcd", (10, 30, 200, 1), strict=True)}
    assert shards._files(tensors, 2) == {"a": 1, "b": 1, "c": 2, "d": 3}
