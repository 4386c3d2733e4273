"""One process with its GPU joins gloo and NCCL as the trainer does, and sums. Started by torchrun.

torchrun --nproc-per-node 1 -m tests.gpu.collective cuda
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from train.distributed.group import ProcessGroup


def main(name: str) -> None:
    """Print `sums: right` if sums over NCCL (or gloo) and over gloo have the right values."""
    group = ProcessGroup(0, 1, 0, dist.TCPStore("127.0.0.1", 0, is_master=True))
    device = torch.device(name)
    group.connect(device)
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            values = torch.arange(1000, device=device).to(dtype)
            summed = values.clone()
            dist.all_reduce(summed)
            assert torch.equal(summed, values)
            parts = [torch.empty_like(values)]
            dist.all_gather(parts, values)
            assert torch.equal(parts[0], values)
        on_host = torch.ones(3, dtype=torch.float64)
        dist.all_reduce(on_host)
        assert on_host.tolist() == [1.0] * 3
        backend = dist.get_backend_config()
    finally:
        dist.destroy_process_group()
    print(f"sums: right ({backend})")


if __name__ == "__main__":
    main(sys.argv[1])
