"""Named tensors: their hash, and random ones with equal bits on every machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch


def seeded_weights(shape: Sequence[int], std: float, *, seed: int, name: str) -> torch.Tensor:
    """Return a float32 tensor of uniform values with mean 0 and standard deviation `std`.

    The values depend on seed and name only. Normal values would need logarithms, whose last bit differs
    between processors, and with it the fingerprint of a space. Uniform values need exact arithmetic only.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    values = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big"))).random(
        tuple(shape), dtype=np.float32
    )
    values -= np.float32(0.5)
    values *= np.float32(std * 12**0.5)
    return torch.from_numpy(values)


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the sha256 (hex) over (name, dtype, shape, bytes) of the tensors, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().cpu().contiguous().numpy()
        head = [name, values.dtype.name, list(values.shape)]
        digest.update(json.dumps(head, separators=(",", ":")).encode())
        digest.update(values.astype(values.dtype.newbyteorder("<"), copy=False).data)
    return digest.hexdigest()
