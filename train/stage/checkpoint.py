"""Checkpoints: everything that a run needs to continue after a crash with the same numbers.

    path = save(folder, step, model, optimizer, {"samples_digest": digest})
    state = load(newest(folder), model, optimizer)    # state["step"]: steps done

    checkpoints/step-00000500/
        model.safetensors       the parameters that are trained; frozen ones come from where the run started
        optimizer.safetensors   AdamW's two moments and step count, as <parameter>/<name>
        state.json              the number of steps done, and what the caller adds (see origin.py)
        COMMITTED               the sizes of the files above; written last

A checkpoint is written to a temporary folder, each file is flushed to disk, and the folder is renamed. So a
folder without `.partial` that has a COMMITTED file is complete. The newest two are kept. There is no pickle,
which torch.distributed.checkpoint would write as its `.metadata` file.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from cache.store.files import fsync_folder
from configs import UserError, one_line
from model.io.run_files import Count, read_json, refuse_links
from train.distributed.group import ProcessGroup


class State(TypedDict):
    """What state.json has at least; see origin.py for what the caller adds."""

    step: Count


ALONE = ProcessGroup()
KEEP = 2
"""Checkpoints kept. If the newest is damaged, delete its folder: the run continues from the one before."""
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
STATE, COMMITTED = "state.json", "COMMITTED"
PARTIAL = ".partial"
DIVERGED = "diverged-"
"""Begins the name of a checkpoint whose weights have diverged."""
TENSOR_BYTES, STATE_BYTES = 600, 16 << 10
"""Bytes beside the values: of each parameter (its name, three times, and AdamW's step), and of the JSON."""


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    group: ProcessGroup = ALONE,
) -> Path:
    """Write the checkpoint after `step` steps below `folder`, and remove all but the newest two.

    Every process must call it.

    Returns:
        The folder of the checkpoint.
    """
    weights = {n: _whole(p.detach()) for n, p in model.named_parameters() if p.requires_grad}
    moments = {name: _whole(value) for name, value in _moments(model, optimizer).items()}
    with group.main_process_first():
        if group.is_main:
            _save(folder, step, weights, moments, state)
    return folder / f"step-{step:08d}"


def _save(
    folder: Path,
    step: int,
    weights: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor],
    state: Mapping[str, Any],
) -> None:
    final = folder / f"step-{step:08d}"
    partial = final.with_name(final.name + PARTIAL)
    for path in folder.glob("step-*"):  # what a killed run left half-written or half-removed
        if path.suffix == PARTIAL or not (path / COMMITTED).is_file():
            shutil.rmtree(path)
    partial.mkdir(parents=True)
    try:
        _write(partial, weights, moments, {**state, "step": step})
        partial.rename(final)
    except BaseException:
        shutil.rmtree(
            partial, ignore_errors=True
        )  # on a full disk, room for what the user does next
        raise
    fsync_folder(folder)
    for old in committed(folder)[:-KEEP]:
        # First, so that a half-removed checkpoint does not count as complete.
        (old / COMMITTED).unlink()
        shutil.rmtree(old)


def _write(
    folder: Path,
    weights: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor],
    state: Mapping[str, Any],
) -> None:
    """Write and flush the files of a checkpoint."""
    save_file(weights, folder / MODEL)
    save_file(moments, folder / OPTIMIZER)
    (folder / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    sizes = {name: (folder / name).stat().st_size for name in (MODEL, OPTIMIZER, STATE)}
    for name in sizes:
        _flush(folder / name)
    (folder / COMMITTED).write_text(json.dumps(sizes) + "\n", encoding="utf-8")
    _flush(folder / COMMITTED)
    fsync_folder(folder)


def nbytes(model: nn.Module) -> int:
    """Return about how many bytes a checkpoint takes: the trained parameters and AdamW's two moments."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return sum(3 * p.nbytes + TENSOR_BYTES for p in trained) + STATE_BYTES


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


def load(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    group: ProcessGroup = ALONE,  # noqa: ARG001
) -> dict[str, Any]:
    """Load a checkpoint into the model and the optimizer; return its state.json.

    Raises:
        UserError: a file is missing, truncated, or of another model.
    """
    _check_sizes(path)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    _copy_weights(path, model, trained)
    _load_moments(path / OPTIMIZER, model, optimizer)
    return read_state(path)


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


def load_weights(path: Path, model: nn.Module) -> None:
    """Load the parameters that a checkpoint has into a model; the others stay as they are.

    Raises:
        UserError: a file is missing, truncated, or of another model.
    """
    _check_sizes(path)
    _copy_weights(path, model, None)


def _copy_weights(path: Path, model: nn.Module, names: Set[str] | None) -> None:
    """Copy the stored parameters, which must be those of `names`; None: any of the model's."""
    parameters = dict(model.named_parameters())
    try:
        with safe_open(path / MODEL, framework="pt") as stored, torch.no_grad():
            shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118  safe_open is no mapping
            wanted = shapes.keys() & parameters.keys() if names is None else names
            expected = {name: tuple(parameters[name].shape) for name in wanted}
            if shapes != expected:
                differ = sorted(dict(shapes.items() ^ expected.items()))
                raise UserError(
                    f"{path}: was written by another model: {len(differ)} parameters differ, such as "
                    f"{differ[0]}; resume with the options the run was started with"
                )
            for name in shapes:
                parameters[name].copy_(_like(parameters[name], stored.get_tensor(name)))
    except SafetensorError as error:
        raise UserError(f"{path / MODEL}: {error}; {_remedy(path)}") from None


def _check_sizes(path: Path) -> None:
    """Raise UserError unless every file has the size that COMMITTED records."""
    refuse_links(path)
    sizes = read_json(path / COMMITTED, dict[str, Count], _remedy(path))
    if sizes.keys() != {MODEL, OPTIMIZER, STATE}:
        raise UserError(f"{path / COMMITTED}: names other files; {_remedy(path)}")
    for name, size in sizes.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else 0
        if found != size:
            raise UserError(f"{file}: {found} bytes, should be {size}; {_remedy(path)}")


def _remedy(path: Path) -> str:
    return f"remove it, and --resume continues from the one before: rm -r {shlex.quote(str(path))}"


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the parameter names in the order in which the optimizer numbers them."""
    names = {id(p): n for n, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer's state as <parameter>/<name> -> tensor."""
    names = _names(model, optimizer)
    state = optimizer.state_dict()["state"]
    return {
        f"{names[i]}/{k}": v.contiguous() for i, values in state.items() for k, v in values.items()
    }


def _load_moments(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load what `_moments` returned from a file."""
    index = {name: i for i, name in enumerate(_names(model, optimizer))}
    state: dict[int, dict[str, torch.Tensor]] = {}
    parameters = dict(model.named_parameters())
    try:
        with safe_open(path, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118  safe_open is no mapping
                name, _, moment = key.rpartition("/")
                shape = tuple(stored.get_slice(key).get_shape())
                if name not in index or shape not in ((), tuple(parameters[name].shape)):
                    raise UserError(
                        f"{path}: {one_line(key, 80)} does not fit the model; {_remedy(path.parent)}"
                    )
                value = stored.get_tensor(key)
                value = _like(parameters[name], value) if shape else value
                state.setdefault(index[name], {})[moment] = value
    except SafetensorError as error:
        raise UserError(f"{path}: {error}; {_remedy(path.parent)}") from None
    # load_state_dict puts each tensor on the device that AdamW, fused or not, needs it on.
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _whole(value: torch.Tensor) -> torch.Tensor:
    """Return all of a tensor of which this process has a part."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).contiguous()


def _like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return a whole tensor, shared among the processes as a parameter is."""
    if not isinstance(parameter, DTensor):
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
