"""Checkpoints: everything that a run needs to continue after a crash with the same numbers.

    path = save(folder, step, model, optimizer, {"samples_digest": digest}, group)    # every process
    state = load(newest(folder), model, optimizer)    # state["step"]: steps done

    checkpoints/step-00000500/
        model.safetensors       the parameters that are trained; frozen ones come from where the run started
        optimizer.safetensors   AdamW's two moments, as <parameter>/<moment>
        state.json              the number of steps done, AdamW's step of each parameter, and what the caller
                                adds (see origin.py)
        COMMITTED               the sizes of the files above; written last

Several processes write parts of both, each its own: shard-<process>-model-<file>-of-<files>.safetensors (see
shards.py). A checkpoint is read by any number of processes, whatever number wrote it.

A checkpoint is written to a temporary folder, each file is flushed to disk, and the folder is renamed once
every process has written. So a folder without `.partial` that has a COMMITTED file is complete. The newest
two are kept.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from cache.store.files import fsync_folder
from configs import UserError, one_line
from model.io.run_files import Count, read_json, refuse_links
from train.distributed.group import ProcessGroup
from train.stage import shards


class State(TypedDict):
    """What state.json has at least; see origin.py for what the caller adds."""

    step: Count
    optimizer_steps: NotRequired[dict[str, Count]]


KEEP = 2
"""Checkpoints kept. If the newest is damaged, delete its folder: the run continues from the one before."""
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
STATE, COMMITTED = "state.json", "COMMITTED"
TENSORS = re.compile(r"(model|optimizer|shard-\d{5,}-model-\d{5,}-of-\d{5,})\.safetensors")
"""Names of the files with tensors."""
OPTIMIZER_STEPS = "optimizer_steps"
"""Key in state.json: parameter -> steps in which AdamW has updated it."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter, in its shape."""
PARTIAL = ".partial"
DIVERGED = "diverged-"
"""Begins the name of a checkpoint whose weights have diverged."""
TENSOR_BYTES, STATE_BYTES = 1000, 16 << 10
"""Bytes beside the values: of each parameter and process (its name, seven times), and of the JSON."""
SINGLE_PROCESS = ProcessGroup()


# ---- write


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    group: ProcessGroup = SINGLE_PROCESS,
    process_group: dist.ProcessGroup | None = None,
) -> Path:
    """Write the checkpoint after `step` steps below `folder`, and remove all but the newest two.

    Every process must call it. The parameters and moments of several processes are DTensors; of a plain
    tensor, which all have, the main process writes its own.

    Args:
        folder: of the run's checkpoints.
        step: steps done.
        model: whose trained parameters are written.
        optimizer: of them.
        state: what state.json has beside the step.
        group: the processes that train together.
        process_group: their connection for this; None: the default one.

    Returns:
        The folder of the checkpoint.
    """
    tensors, steps = snapshot(model, optimizer)
    state = {**state, "step": step, OPTIMIZER_STEPS: steps}
    return write(folder, tensors, state, group, process_group)


def snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return the trained parameters and their moments by name, and AdamW's step of each parameter.

    The tensors are those that training changes, not copies.
    """
    tensors: dict[str, Tensor] = {}
    steps: dict[str, int] = {}
    for name, parameter in _trained(model).items():
        tensors[name] = parameter.detach()
        if values := optimizer.state.get(parameter):  # it has been updated
            tensors |= {f"{name}/{moment}": values[moment] for moment in MOMENTS}
            steps[name] = int(values["step"])
    # A single process has DTensors too, with --offload.
    alone = {
        name: value.to_local()
        for name, value in tensors.items()
        if isinstance(value, DTensor) and value.device_mesh.size() == 1
    }
    return tensors | alone, steps


def write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    group: ProcessGroup = SINGLE_PROCESS,
    process_group: dist.ProcessGroup | None = None,
) -> Path:
    """Write what `snapshot` returned as a checkpoint; see `save`."""
    final = folder / f"step-{state['step']:08d}"
    partial = final.with_name(final.name + PARTIAL)

    def begin() -> None:
        for path in folder.glob("step-*"):  # what a killed run left half-written or half-removed
            if path.suffix == PARTIAL or not (path / COMMITTED).is_file():
                shutil.rmtree(path)
        partial.mkdir(parents=True)

    def commit(names: Iterable[str]) -> None:
        _commit(partial, final, names, state)

    try:
        if group.world_size == 1:
            begin()
            for file, is_moment in ((MODEL, False), (OPTIMIZER, True)):
                save_file(
                    {n: t.contiguous() for n, t in tensors.items() if ("/" in n) == is_moment},
                    partial / file,
                )
            commit((MODEL, OPTIMIZER))
        else:
            mine = {n: t for n, t in tensors.items() if group.is_main or isinstance(t, DTensor)}
            shards.write(partial, mine, begin, commit, group, process_group)
    except BaseException:
        if group.is_main:  # on a full disk, room for what the user does next
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _commit(partial: Path, final: Path, names: Iterable[str], state: Mapping[str, Any]) -> None:
    """Write and flush the other files, rename the folder, and remove all but the newest two."""
    (partial / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    sizes = {name: (partial / name).stat().st_size for name in (*names, STATE)}
    for name in sizes:
        _flush(partial / name)
    (partial / COMMITTED).write_text(json.dumps(sizes) + "\n", encoding="utf-8")
    _flush(partial / COMMITTED)
    fsync_folder(partial)
    partial.rename(final)
    fsync_folder(final.parent)
    for old in committed(final.parent)[:-KEEP]:
        # First, so that a half-removed checkpoint does not count as complete.
        (old / COMMITTED).unlink()
        shutil.rmtree(old)


def nbytes(model: nn.Module) -> int:
    """Return about how many bytes a checkpoint takes: the trained parameters and AdamW's two moments."""
    trained = [p for p in model.parameters() if p.requires_grad]
    processes = dist.get_world_size() if dist.is_initialized() else 1
    return sum(3 * p.nbytes + TENSOR_BYTES * processes for p in trained) + STATE_BYTES


def set_aside(path: Path) -> Path:
    """Rename a checkpoint whose weights cannot be trained on, so that no run continues from it."""
    new = path.with_name(f"{DIVERGED}{path.name}")
    shutil.rmtree(new, ignore_errors=True)
    path.rename(new)
    fsync_folder(path.parent)
    return new


def committed(folder: Path) -> list[Path]:
    """Return the complete checkpoints below `folder`, oldest first."""
    found = {
        int(p.name.removeprefix("step-")): p
        for p in folder.glob("step-*")
        if p.name.removeprefix("step-").isdecimal() and (p / COMMITTED).is_file()
    }
    return [found[step] for step in sorted(found)]


def newest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint below `folder`, if there is one."""
    return next(reversed(committed(folder)), None)


# ---- read


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load a checkpoint into the model and the optimizer; return its state.json.

    Every process reads its part of each tensor, by itself.

    Raises:
        UserError: a file is missing, damaged, or of another model.
    """
    stored, state = _open(path), read_state(path)
    trained, steps = _trained(model), state.pop(OPTIMIZER_STEPS, None)
    try:
        found = {n: t for n, t in stored.tensors.items() if not n.endswith("/step")}
        if steps is None:  # an earlier version wrote the steps as tensors
            numbers = {name: torch.zeros(()) for name in stored.tensors.keys() - found.keys()}
            stored.read(numbers)
            steps = {n.removesuffix("/step"): int(value) for n, value in numbers.items()}
        shapes = {name: (tuple(p.shape), p.dtype) for name, p in trained.items()}
        of_steps = {f"{n}/{m}": shapes.get(n, "no parameter") for n in steps for m in MOMENTS}
        _check_equal(path, found, shapes | of_steps)
        moments = {n: {m: torch.zeros_like(trained[n].detach()) for m in MOMENTS} for n in steps}
        targets = {name: parameter.detach() for name, parameter in trained.items()}
        targets |= {
            f"{n}/{m}": value for n, values in moments.items() for m, value in values.items()
        }
        stored.read(targets)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{path}: {one_line(error, 120)}; {_remedy(path)}") from None
    of_parameter = {
        id(trained[name]): {"step": torch.tensor(float(steps[name])), **values}
        for name, values in moments.items()
    }
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # load_state_dict puts each tensor on the device that AdamW, fused or not, needs it on.
    optimizer.load_state_dict(
        {
            "state": {
                i: of_parameter[id(p)] for i, p in enumerate(parameters) if id(p) in of_parameter
            },
            "param_groups": optimizer.state_dict()["param_groups"],
        }
    )
    return state


def load_weights(path: Path, model: nn.Module) -> None:
    """Load the parameters that a checkpoint has into a model; the others stay as they are.

    Raises:
        UserError: a file is missing, damaged, or of another model.
    """
    stored, parameters = _open(path), _parameters(model)
    found = {name: shape for name, (shape, _) in stored.tensors.items() if "/" not in name}
    targets = {name: parameters[name].detach() for name in found if name in parameters}
    _check_equal(path, found, {name: tuple(value.shape) for name, value in targets.items()})
    try:
        stored.read(targets)
    except ValueError as error:
        raise UserError(f"{path}: {one_line(error, 120)}; {_remedy(path)}") from None


def read_state(path: Path) -> dict[str, Any]:
    """Return the state.json of a checkpoint.

    Raises:
        UserError: it is damaged, or of another version.
    """
    way_out = "take another checkpoint"
    try:
        state: dict[str, Any] = read_json(path / STATE, State, way_out)
    except FileNotFoundError:
        raise UserError(f"{path / STATE}: no such file; {way_out}") from None
    return state


def _open(path: Path) -> shards.Stored:
    """Return the tensors of a checkpoint whose files are those that COMMITTED names, in the sizes it records.

    Raises:
        UserError: they are not, or one is damaged.
    """
    refuse_links(path)
    try:
        sizes = read_json(path / COMMITTED, dict[str, Count], _remedy(path))
    except FileNotFoundError:
        raise UserError(f"{path}: was not written to its end; {_remedy(path)}") from None
    names = sizes.keys() - {STATE}
    if STATE not in sizes or not names or not all(TENSORS.fullmatch(name) for name in names):
        raise UserError(f"{path / COMMITTED}: names other files; {_remedy(path)}")
    for name, size in sizes.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else 0
        if found != size:
            raise UserError(f"{file}: {found} bytes, should be {size}; {_remedy(path)}")
    if more := sorted({file.name for file in path.glob("*.safetensors")} - names):
        raise UserError(f"{path / more[0]}: is not of this checkpoint; remove that file")
    try:
        return shards.Stored(path)
    except ValueError as error:
        raise UserError(f"{path}: {one_line(error, 120)}; {_remedy(path)}") from None


def _check_equal(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise UserError unless the stored tensors are those of the model."""
    if differ := sorted(n for n in found.keys() | expected if found.get(n) != expected.get(n)):
        more = f" and {len(differ) - 1} more" if len(differ) > 1 else ""
        raise UserError(
            f"{path}: has tensors of another model ({one_line(differ[0], 80)}{more}); resume with the "
            "options the run was started with"
        )


def _remedy(path: Path) -> str:
    return f"remove it, and --resume continues from the one before: rm -r {shlex.quote(str(path))}"


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name; one that has several names by the first."""
    return {name: p for name, p in _parameters(model).items() if p.requires_grad}


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # After a forward pass without a backward one its parameters are whole, and not the optimizer's.
            module.reshard()
    return dict(model.named_parameters())


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
