"""Gradients of several processes put together, and proof that their models stayed the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 32 << 20
"""Gradients summed in one message, so also the memory that takes; a larger one is summed where it lies."""
CHUNK = 1 << 24
"""Values added up at a time for a fingerprint."""
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sum_over_processes(parameters: Sequence[nn.Parameter]) -> None:
    """Give each parameter the sum of all processes' gradients, the same bits everywhere.

    One that has no gradient on some processes counts as zeros there. One that has none on any stays without:
    AdamW leaves it alone, as it does when one process trains.
    """
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    gradients: list[Tensor] = []
    for parameter, somewhere in zip(parameters, used.tolist(), strict=True):
        if somewhere and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad is not None:
            gradients.append(parameter.grad)
    for bucket in buckets(gradients, BUCKET_BYTES):
        _sum(bucket)


def buckets(tensors: Iterable[Tensor], most_bytes: int) -> Iterator[list[Tensor]]:
    """Neighbours of one type in groups of at most `most_bytes`; a larger tensor is a group of its own."""
    group: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if group and (size + tensor.nbytes > most_bytes or tensor.dtype != group[0].dtype):
            yield group
            group, size = [], 0
        group.append(tensor)
        size += tensor.nbytes
    if group:
        yield group


def _sum(bucket: Sequence[Tensor]) -> None:
    if len(bucket) == 1 and bucket[0].is_contiguous():
        dist.all_reduce(bucket[0])
        return
    flat = torch.cat([t.reshape(-1) for t in bucket])
    dist.all_reduce(flat)
    for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Short, and another one as soon as one value has other bits. The same on every device."""
    total: Tensor | int = 0
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(INTEGERS[tensor.element_size()]).reshape(-1)
        for part in bits.split(CHUNK):
            total = total * 31 + part.sum(dtype=torch.int64)  # wraps around, on the device
    return f"{int(total) & (1 << 64) - 1:016x}"
