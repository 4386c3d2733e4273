"""Share weights, gradients and optimizer state among processes, and keep them in the CPU's memory: FSDP2.

    shard(vlm, group, device, "full", offload=False)    # before the optimizer is built
    sync_gradients(vlm, on=micro.last)                   # before the backward pass of each micro-batch
    make_whole(vlm, group)                               # at the end: plain tensors, on the main process

Each decoder layer is a unit, and all the rest (embeddings, head, norm, connector, tail) is the root. The
weights of a unit are gathered before they are used and freed afterwards; its gradients are summed as soon as
the backward pass of a step's last micro-batch has them, while that of other layers goes on. Every function
also accepts a model that was not sharded: a single process trains plain tensors.

    none    mesh (processes, 1): each process has everything; gradients are summed
    full    mesh (processes,): each process has one part of everything
    node    mesh (machines, processes of one): the processes of a machine have one part each
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from configs import UserError
from model.vlm import VLM
from train.distributed.group import ProcessGroup, connect

Shard = Literal["none", "full", "node"]
REPLICATE, SHARD = "replicate", "shard"
"""Dimensions of the mesh."""

FINGERPRINT_CHUNK = 1 << 24
"""Values summed at a time for a fingerprint; limits the memory of the conversion to int64."""
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer type for each element size in bytes."""


# ---- sharding


def shard(
    vlm: VLM, group: ProcessGroup, device: torch.device, kind: Shard, *, offload: bool
) -> None:
    """Make each process keep its part of a model, in place. Every process must call it with an equal model.

    Args:
        vlm: the model, on the CPU; its parameters become DTensors. Call `vlm.loss` for a forward pass.
        group: the processes, of which there may be one.
        device: where to compute.
        kind: how the processes share.
        offload: keep parameters, gradients and what the optimizer adds in the CPU's memory.

    Raises:
        UserError: `node` with machines of different numbers of processes, or no such device.
    """
    shape = mesh_shape(kind, group)
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--offload on {device.type}: is for a GPU of CUDA; leave it out")
    if device.index is not None:  # FSDP2 takes the present GPU
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        connect(dist.HashStore(), 0, 1)  # type: ignore[attr-defined]  # torch exports it unseen
    names = (REPLICATE, SHARD)[-len(shape) :]
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    # Only CUDA copies faster from pinned memory, and only there can it be pinned.
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    packed = {p for p in vlm.parameters() if not p.is_floating_point()}  # weights of 4 bits
    layers = [m for m in vlm.modules() if isinstance(m, GradientCheckpointingLayer)]
    for unit in (*reversed(layers), vlm):  # inner ones first
        fully_shard(unit, mesh=mesh, offload_policy=policy, ignored_params=packed)
        assert isinstance(unit, FSDPModule)
        # The losses of micro-batches are parts of the step's loss, so gradients are sums. gloo has no other
        # reduction than a plain sum; without the second line, a factor of 1 asks for another one.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(vlm, "loss")


def mesh_shape(kind: Shard, group: ProcessGroup) -> tuple[int, ...]:
    """Return the shape of the mesh of processes.

    Raises:
        UserError: `node`, and the machines have different numbers of processes.
    """
    world = group.world_size
    if kind == "full":
        return (world,)
    if kind == "none":
        return (world, 1)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    everyone = group.gather_numbers([here, group.rank % here - group.local_rank])
    if any(numbers != [here, 0] for numbers in everyone):
        counts = ", ".join(f"{n:.0f}" for n in sorted({numbers[0] for numbers in everyone}))
        raise UserError(
            f"--shard node: needs equally many processes on every machine, with neighbouring ranks (found "
            f"{counts} a machine); start them with one --nproc-per-node, or give --shard full"
        )
    return (world // here, here)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called with a model."""
    return isinstance(model, FSDPModule)


def sync_gradients(model: nn.Module, *, on: bool) -> None:
    """Set whether the next backward pass sums gradients over the processes, with those of earlier passes."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)


def free_weights(model: nn.Module) -> None:
    """Free the gathered weights that a forward pass without a backward pass leaves; the parts stay."""
    if isinstance(model, FSDPModule):
        model.reshard()


def make_whole(model: nn.Module, group: ProcessGroup) -> None:
    """Turn a sharded model into plain tensors of the main process, on the CPU; the others have none of it.

    Every process must call it. Tied parameters stay tied. The model cannot compute afterwards.
    """
    whole: dict[nn.Parameter, nn.Parameter] = {}
    free_weights(model)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                if parameter not in whole:
                    full = parameter.full_tensor().detach()
                    kept = full.cpu() if group.is_main else full.new_empty(0)
                    whole[parameter] = nn.Parameter(kept, parameter.requires_grad)
                setattr(module, name, whole[parameter])


# ---- the part of this process


def mesh_of(tensors: Iterable[Tensor]) -> DeviceMesh | None:
    """Return the mesh of sharded tensors; None for plain ones."""
    return next((t.device_mesh for t in tensors if isinstance(t, DTensor)), None)


def part_number(model: nn.Module) -> int:
    """Return which part of the model this process has: processes with equal numbers have equal values."""
    mesh = mesh_of(model.parameters())
    return mesh.get_local_rank(SHARD) if mesh else 0


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, with its memory; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_parts(value: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """Return the sum of a value over the parts of a sharded model. Every process must call it."""
    if mesh is not None and mesh.shape[-1] > 1:
        dist.all_reduce(value, group=mesh.get_group(SHARD))
    return value


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Return a checksum of 16 hex digits of this process's part of tensors; equal on every device.

    It differs if one value has other bits.
    """
    total: Tensor | int = 0
    for tensor in tensors:
        part = local(tensor.detach()).contiguous()
        bits = part.view(INTEGERS[part.element_size()]).reshape(-1)
        for some in bits.split(FINGERPRINT_CHUNK):
            total = total * 31 + some.sum(dtype=torch.int64)  # wraps around, on the device
    return f"{int(total) & (1 << 64) - 1:016x}"
