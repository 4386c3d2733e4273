"""Tensors by name: their hash, and random ones that are the same bits on every machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch


def seeded_weights(shape: Sequence[int], std: float, *, seed: int, name: str) -> torch.Tensor:
    """A float32 tensor of uniform values with mean 0 and standard deviation `std`.

    Uniform, from numpy: exact arithmetic on raw bits, where normal variates go through logarithms that
    differ in the last bit between processors, and with it the fingerprint of the space.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    values = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big"))).random(
        tuple(shape), dtype=np.float32
    )
    values -= np.float32(0.5)
    values *= np.float32(std * 12**0.5)
    return torch.from_numpy(values)


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 (hex) over the sorted (name, dtype, shape, bytes)."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        head = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        digest.update(json.dumps(head, separators=(",", ":")).encode())
        digest.update(
            tensor.numpy().astype(tensor.numpy().dtype.newbyteorder("<"), copy=False).data
        )
    return digest.hexdigest()
