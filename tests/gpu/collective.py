"""One process with its GPU joins gloo and NCCL as the trainer does, sums, and trains a sharded model.

torchrun --nproc-per-node 1 -m tests.gpu.collective cuda
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from model.attention.batch import PackedBatch
from model.vlm import VLM, build_vlm
from train.config import Options
from train.distributed.group import ProcessGroup, connect, disconnect
from train.distributed.shard import Shard, make_whole, shard, sync_gradients
from train.optim import build_optimizer, clip_gradients

IMAGE = 7
WAYS: tuple[tuple[Shard, bool], ...] = (("none", False), ("full", False), ("full", True))
"""`--shard` and `--offload`."""


def check_sums(device: torch.device) -> None:
    """Compare sums over NCCL (or gloo), and over gloo, with the values themselves."""
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


def two_steps(vlm: VLM, device: torch.device) -> list[float]:
    """Train two steps of two micro-batches; return losses and gradient norms."""
    optimizer = build_optimizer(vlm, Options())
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    trained, numbers = list(vlm.parameters()), []
    for step in range(2):
        for last in (False, True):
            generator = torch.Generator().manual_seed(2 * step + last)
            ids = torch.randint(10, 60, (40,), generator=generator)
            ids[3:7] = IMAGE
            weights = (torch.arange(40) >= 20).float() / 40
            features = torch.randn(4, 64, generator=generator).to(device)
            sync_gradients(vlm, on=last)
            loss = vlm.loss(PackedBatch.one_sample(ids, weights, IMAGE).to(device), features)[0]
            loss.backward()
            numbers.append(loss.item())
        numbers.append(clip_gradients(trained, 1.0))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return numbers


def model() -> VLM:
    """Return a model on the CPU, where a model that will be sharded is built."""
    vlm, _ = build_vlm(64, "random:qwen3-tiny", "mlp", seed=3)
    vlm.gradient_checkpointing(True)
    return vlm.train()


def main(name: str) -> None:
    """Print `sums: right` if sums have the right values and a sharded model learns as a plain one."""
    device = torch.device(name)
    connect(dist.TCPStore("127.0.0.1", 0, is_master=True), 0, 1)
    try:
        check_sums(device)
        expected = two_steps(model().to(device), device)
        for kind, offload in WAYS:
            vlm = model()
            shard(vlm, ProcessGroup(), device, kind, offload=offload)
            numbers = torch.tensor(two_steps(vlm, device))
            # The backward pass of CUDA kernels adds in no fixed order.
            torch.testing.assert_close(numbers, torch.tensor(expected), rtol=1e-5, atol=0)
            make_whole(vlm, ProcessGroup())
            assert {p.device.type for p in vlm.parameters()} == {"cpu"}
        backend = dist.get_backend_config()
    finally:
        disconnect()
    print(f"sums: right ({backend})")


if __name__ == "__main__":
    main(sys.argv[1])
