"""The VLM: which parts train, where features go, and how it is built.

vlm, tokenizer = build_vlm(vision_width=1024, llm_source="random:qwen3-tiny", connector="mlp", seed=0)
total, weight = vlm.loss(batch, features)
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from configs import UserError
from model.connector import build_connector
from model.language import loss
from model.vlm import VLM, build_vlm
from tests.support.trained_runs import VISION, one_sample, random_features


def tiny(connector: str = "linear", seed: int = 0, **options: Any) -> VLM:
    return build_vlm(VISION, "random:qwen3-tiny", connector, seed, **options)[0]


def test_only_supervised_positions_reach_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, seen = tiny(), []
    inner = loss.weighted_cross_entropy

    def spy(hidden: Tensor, *rest: Any) -> Tensor:
        seen.append(hidden.shape)
        return inner(hidden, *rest)

    monkeypatch.setattr("model.vlm.weighted_cross_entropy", spy)
    total, weight = vlm.loss(one_sample(), random_features())
    assert seen == [(4, 64)]
    assert float(weight) == 4.0
    assert total.requires_grad
    assert not weight.requires_grad


@pytest.mark.parametrize(
    ("train_connector", "train_llm"), [(True, False), (False, True), (True, True)]
)
@pytest.mark.parametrize("count", [0, 1])
def test_frozen_means_no_gradient(train_connector: bool, train_llm: bool, count: int) -> None:
    vlm = tiny()
    counts = vlm.freeze(train_connector, train_llm)
    total = {
        "connector": VISION * 64 + 64,
        "language": sum(p.numel() for p in vlm.language.parameters()),
    }
    assert counts == {
        "connector": (total["connector"] * train_connector, total["connector"]),
        "language": (total["language"] * train_llm, total["language"]),
    }
    features = random_features(count) if count else None
    vlm.loss(one_sample(images=count), features)[0].backward()
    for part, learns in (("connector", train_connector), ("language", train_llm)):
        for name, p in getattr(vlm, part).named_parameters():
            assert (p.grad is not None) == learns, name


def test_a_batch_without_images_gives_the_connector_zero_gradients() -> None:
    """Its gradient is zero, not absent, and the loss does not change."""
    vlm = tiny("mlp")
    total, _ = vlm.loss(one_sample(images=0), None)
    total.backward()
    grads = [p.grad for p in vlm.connector.parameters()]
    assert all(g is not None and not bool(g.any()) for g in grads)
    words = vlm.language.get_input_embeddings()(one_sample().input_ids)
    assert torch.equal(
        vlm.embed(one_sample().input_ids, torch.empty(0, dtype=torch.int64), None), words
    )


def test_connectors_have_their_published_sizes() -> None:
    def size(kind: str) -> int:
        return sum(p.numel() for p in build_connector(kind, 1024, 1024).parameters())

    assert size("linear") == 1_049_600
    assert size("mlp") == 2 * 1_049_600
    with pytest.raises(
        UserError, match="connector 'linaer' is none of linear, mlp; nearest: linear"
    ):
        build_connector("linaer", 4, 4)


def test_a_linear_connector_commutes_with_pooling() -> None:
    connector = build_connector("linear", VISION, 8).double()
    x = torch.randn(2, 12, VISION, dtype=torch.float64)
    before = connector(x.view(2, 3, 4, VISION).mean(2))
    torch.testing.assert_close(before, connector(x).view(2, 3, 4, 8).mean(2))


def test_a_new_model_depends_on_its_seed_only() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one, two, other = tiny(seed=1), tiny(seed=1), tiny(seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, one.parameters(), two.parameters()))
    assert not torch.equal(one.connector.weight, other.connector.weight)
    up = [m.language.model.layers[0].mlp.up_proj.weight for m in (one, other)]
    assert not torch.equal(*up)


def test_a_model_on_meta_has_no_values() -> None:
    vlm = tiny(device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in vlm.parameters())


def test_features_replace_the_tokens_at_their_slots() -> None:
    vlm = tiny()
    two = one_sample(images=2)
    features = random_features(2)
    embedded = vlm.embed(two.input_ids, two.image_slots, features.half())
    wanted = vlm.connector(features.half().float()).view(6, 64)
    torch.testing.assert_close(embedded[1:7], wanted)
    words = vlm.language.get_input_embeddings()(two.input_ids)
    assert torch.equal(embedded[[0, 7, 8, 9, 10, 11]], words[[0, 7, 8, 9, 10, 11]])
