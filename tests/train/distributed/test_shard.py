"""A sharded model in one process, and the shapes of meshes; test_distributed.py has several processes.

shard(vlm, group, device, "full", offload=True)
sync_gradients(vlm, on=last)
vlm.loss(batch, features)[0].backward()
"""

from __future__ import annotations

import contextlib
import filecmp
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from configs import UserError
from model.attention.batch import PackedBatch
from model.io.saved_model import load_final, save_final
from model.language.model import load_tokenizer
from model.vlm import VLM, build_vlm
from train.config import Options
from train.data.packing import nothing
from train.distributed.group import ProcessGroup, disconnect
from train.distributed.shard import (
    fingerprint,
    free_weights,
    is_sharded,
    make_whole,
    mesh_shape,
    part_number,
    shard,
    sync_gradients,
)
from train.optim import broken_gradients, build_optimizer, clip_gradients

CPU = torch.device("cpu")
LLM = "random:qwen3-tiny"
IMAGE = 7
Micro = tuple[PackedBatch, Tensor | None]


@pytest.fixture(autouse=True)
def _disconnected() -> Iterator[None]:
    yield
    disconnect()


def micro_batch(seed: int, features: int) -> Micro:
    """Return a sample of 30 tokens, of which the last half is predicted."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 60, (30,), generator=generator)
    ids[1 : 1 + features] = IMAGE
    weights = torch.zeros(30)
    weights[15:] = 1.0
    shown = torch.randn(features, 64, generator=generator) if features else None
    return PackedBatch.one_sample(ids, weights, IMAGE), shown


STEPS: list[list[Micro]] = [
    [micro_batch(0, 4), micro_batch(1, 0)],
    [micro_batch(2, 0)],  # a step of text alone
    [micro_batch(3, 0), micro_batch(4, 3), (nothing(), None)],
    [micro_batch(5, 2)],
]


def model(freeze: Sequence[bool] = (True, True)) -> VLM:
    vlm, _ = build_vlm(64, LLM, "mlp", seed=3)
    vlm.gradient_checkpointing(True)
    vlm.freeze(*freeze)
    return vlm.train()


def learn(vlm: VLM, autocast: torch.dtype | None = None) -> list[float]:
    """Train four steps; return each loss and gradient norm."""
    optimizer = build_optimizer(vlm, Options())
    trained = [p for p in vlm.parameters() if p.requires_grad]
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    numbers = []
    for micro_batches in STEPS:
        loss = 0.0
        for i, (batch, features) in enumerate(micro_batches):
            sync_gradients(vlm, on=i == len(micro_batches) - 1)
            with torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext():
                part = vlm.loss(batch, features)[0] / 30
            part.backward()
            loss += part.item()
        numbers += [loss, clip_gradients(trained, 1.0)]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return numbers


@pytest.mark.parametrize("freeze", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("kind", ["full", "none"])
def test_a_sharded_model_in_one_process_learns_the_same_to_the_bit(
    freeze: tuple[bool, bool], kind: str
) -> None:
    """With --offload, also for a frozen language model, a frozen connector, and a step of text alone."""
    plain, sharded = model(freeze), model(freeze)
    shard(sharded, ProcessGroup(), CPU, kind, offload=kind == "full")  # type: ignore[arg-type]
    assert is_sharded(sharded) and not is_sharded(plain)
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    assert fingerprint(sharded.parameters()) == fingerprint(plain.parameters())
    assert learn(sharded) == learn(plain)
    assert fingerprint(sharded.parameters()) == fingerprint(plain.parameters())
    assert part_number(sharded) == part_number(plain) == 0


def test_adapters_are_the_same_to_the_bit() -> None:
    """Trained and frozen weights are in one unit; only the former have gradients."""
    plain, sharded = model(), model()
    for vlm in (plain, sharded):
        vlm.add_adapters(4, seed=0)
        vlm.freeze(True, True)
    shard(sharded, ProcessGroup(), CPU, "full", offload=True)
    assert learn(sharded) == learn(plain)
    assert fingerprint(sharded.parameters()) == fingerprint(plain.parameters())
    make_whole(sharded, ProcessGroup())
    for vlm in (plain, sharded):
        vlm.merge_adapters()
    assert fingerprint(sharded.parameters()) == fingerprint(plain.parameters())


def test_bfloat16_is_the_same_to_the_bit() -> None:
    plain, sharded = model(), model()
    shard(sharded, ProcessGroup(), CPU, "full", offload=True)
    assert learn(sharded, torch.bfloat16) == learn(plain, torch.bfloat16)


def test_an_evaluation_leaves_no_gathered_weights_and_sees_the_present_ones() -> None:
    plain, sharded = model(), model()
    shard(sharded, ProcessGroup(), CPU, "full", offload=False)
    for vlm in (plain, sharded):
        learn(vlm)
    with torch.no_grad():
        losses = [vlm.eval().loss(*micro_batch(9, 4))[0].item() for vlm in (plain, sharded)]
    assert losses[0] == losses[1]
    assert not all(isinstance(p, DTensor) for p in sharded.parameters())  # the root's are gathered
    free_weights(sharded)
    assert all(isinstance(p, DTensor) for p in sharded.parameters())


def test_a_saved_model_has_the_same_files(tmp_path: Path) -> None:
    """Tied weights are stored once, under the name that they have in a model that was not sharded."""
    tokenizer = load_tokenizer(LLM)
    meta = {"connector": "mlp", "llm": LLM, "space": None, "stage": 1, "step": 4}
    plain, sharded = model(), model()
    shard(sharded, ProcessGroup(), CPU, "none", offload=False)
    for vlm, name in ((plain, "plain"), (sharded, "sharded")):
        learn(vlm)
        with torch.no_grad():
            vlm.loss(*micro_batch(9, 4))  # an evaluation, which gathers
        make_whole(vlm, ProcessGroup())
        assert not any(isinstance(p, DTensor) for p in vlm.parameters())
        words, head = vlm.language.get_input_embeddings(), vlm.language.get_output_embeddings()
        assert head.weight is words.weight
        save_final(tmp_path / name, vlm, tokenizer, meta)
    files = sorted(p.name for p in (tmp_path / "plain").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "sharded").iterdir())
    same, differ, errors = filecmp.cmpfiles(
        tmp_path / "plain", tmp_path / "sharded", files, shallow=False
    )
    assert (sorted(same), differ, errors) == (files, [], [])
    loaded, _, _ = load_final(tmp_path / "sharded")
    head = loaded.language.get_output_embeddings()
    assert head.weight is loaded.language.get_input_embeddings().weight


def test_a_gradient_that_is_not_finite_is_found_in_a_part() -> None:
    vlm = model()
    shard(vlm, ProcessGroup(), CPU, "full", offload=False)
    batch, features = micro_batch(0, 4)
    assert features is not None
    features[2, 5] = torch.nan
    sync_gradients(vlm, on=True)
    vlm.loss(batch, features)[0].backward()
    trained = list(vlm.parameters())
    before = [p.grad.to_local().clone() for p in trained]
    assert not torch.tensor(clip_gradients(trained, 1.0)).isfinite()
    for p, gradient in zip(trained, before, strict=True):  # nothing is scaled
        torch.testing.assert_close(p.grad.to_local(), gradient, rtol=0, atol=0, equal_nan=True)
    assert "connector.linear_1.weight" in broken_gradients(vlm)


def test_integers_stay_whole() -> None:
    """A base of 4 bits has them, packed: each process keeps all of them."""
    vlm = model()
    layer = vlm.language.base_model.layers[0]
    layer.packed = torch.nn.Parameter(torch.arange(9, dtype=torch.uint8), requires_grad=False)
    shard(vlm, ProcessGroup(), CPU, "full", offload=False)
    sync_gradients(vlm, on=True)
    vlm.loss(*micro_batch(0, 4))[0].backward()
    assert layer.packed.tolist() == list(range(9)) and not isinstance(layer.packed, DTensor)


class FakeGroup(ProcessGroup):
    """A process of several machines, with the numbers of all."""

    def __init__(self, rank: int, counts: Sequence[int]) -> None:
        self.counts = counts
        self.rank, self.world_size = rank, sum(counts)

    def gather_numbers(self, values: Sequence[float]) -> list[list[float]]:
        return [[float(count), 0.0] for count in self.counts for _ in range(count)]


def test_the_mesh_has_a_row_for_each_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    group = FakeGroup(0, [4, 4])
    group.local_rank = 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert mesh_shape("none", group) == (8, 1)
    assert mesh_shape("full", group) == (8,)
    assert mesh_shape("node", group) == (2, 4)
    uneven = FakeGroup(0, [4, 2])
    uneven.local_rank = 0
    with pytest.raises(UserError, match=r"found 2, 4 a machine.*--shard full"):
        mesh_shape("node", uneven)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    alone = FakeGroup(0, [3])
    alone.local_rank = 0
    assert mesh_shape("node", alone) == (1, 3)  # one machine: as `full`


def test_a_metal_gpu_offloads_nothing() -> None:
    with pytest.raises(UserError, match="--offload on mps"):
        shard(model(), ProcessGroup(), torch.device("mps"), "full", offload=True)


def test_a_fingerprint_changes_with_one_bit_and_with_the_order() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(50, 3, generator=generator), torch.randn(7, generator=generator).half()]
    before = fingerprint(tensors)
    assert before == fingerprint([t.clone() for t in tensors])
    assert before != fingerprint(tensors[::-1])
    tensors[0].view(torch.int32)[17, 1] ^= 1
    assert before != fingerprint(tensors)
