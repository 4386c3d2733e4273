"""Loss, freezing and files of the trained half."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from configs import UserError
from model import loss
from model.attention.batch import PackedBatch
from model.connector import build_connector
from model.io import saved_model
from model.io.saved_model import find_run, load_final, read_meta, save_final, weights_of
from model.loss import weighted_cross_entropy
from model.vlm import VLM, build_vlm

VISION = 24
META = {"connector": "linear", "llm": "random:qwen3-tiny", "space": {}, "stage": 1, "step": 5}


def tiny(connector: str = "linear", seed: int = 0, **options: Any) -> VLM:
    return build_vlm(VISION, "random:qwen3-tiny", connector, seed, **options)[0]


def batch(images: int = 1, tokens: int = 3) -> PackedBatch:
    """Twelve tokens of one sample, its images from the second token on; the last four supervised."""
    places = torch.arange(12)
    return PackedBatch(
        input_ids=places + 40,
        position_ids=places,
        image_slots=places[1 : 1 + images * tokens],
        loss_positions=places[7:11],
        targets=places[8:12] + 40,
        loss_weights=torch.tensor([1.0, 0.5, 0.5, 2.0]),
        units=torch.tensor([[0, 12, 0, 0]]),
    )


def images(count: int = 1, tokens: int = 3) -> Tensor:
    return torch.randn(count, tokens, VISION, generator=torch.Generator().manual_seed(count))


# -------------------------------------------------------------------------------------- the loss


@dataclasses.dataclass
class Head:
    """Inputs of the loss, in float64 where they can be."""

    hidden: Tensor
    head: Tensor
    bias: Tensor | None
    targets: Tensor
    weights: Tensor

    @property
    def learnt(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.head, self.bias) if x is not None]


def random_head(positions: int, rows: int, bias: bool, dtype: torch.dtype) -> Head:
    g = torch.Generator().manual_seed(positions)
    return Head(
        hidden=(3 * torch.randn(positions, 16, generator=g)).to(dtype).requires_grad_(),
        head=torch.randn(rows, 16, generator=g).to(dtype).requires_grad_(),
        bias=torch.randn(rows, generator=g).to(dtype).requires_grad_() if bias else None,
        targets=torch.randint(0, rows, (positions,), generator=g),
        weights=torch.rand(positions, generator=g),
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 7 * 100, 1 << 26])
def test_loss_is_weighted_cross_entropy(
    bias: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", chunk)
    h = random_head(31, 100, bias, torch.float32)
    plain = F.cross_entropy(F.linear(h.hidden, h.head, h.bias), h.targets, reduction="none")
    wanted = (plain * h.weights).sum()
    found = weighted_cross_entropy(h.hidden, h.head, h.targets, h.weights, h.bias)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    # A factor on the loss (here 1 / 3, a trainer's is 1 / sum of weights) reaches every gradient.
    for a, b in zip(
        torch.autograd.grad(found / 3, h.learnt),
        torch.autograd.grad(wanted / 3, h.learnt),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_loss_survives_logits_that_overflow_exp() -> None:
    hidden = torch.tensor([[1000.0]], requires_grad=True)
    head = torch.tensor([[1.0], [-1.0]])
    found = weighted_cross_entropy(hidden, head, torch.tensor([1]), torch.ones(1))
    assert float(found.detach()) == 2000.0
    found.backward()
    assert hidden.grad is not None
    assert float(hidden.grad) == 2.0


def test_loss_in_bfloat16_sums_in_float32() -> None:
    h = random_head(500, 100, False, torch.bfloat16)
    found = weighted_cross_entropy(h.hidden, h.head, h.targets, h.weights)
    assert found.dtype == torch.float32
    logits = (h.hidden @ h.head.T).float()
    wanted = (F.cross_entropy(logits, h.targets, reduction="none") * h.weights).sum()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    found.backward()
    assert h.head.grad is not None
    assert h.head.grad.dtype == torch.bfloat16


def test_loss_can_be_differentiated_once_only() -> None:
    h = random_head(3, 10, False, torch.float32)
    found = weighted_cross_entropy(h.hidden, h.head, h.targets, h.weights)
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already"):
        found.backward()


class Largest(TorchDispatchMode):
    """The most elements any tensor had that was made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_all_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for all tokens nor for all supervised ones, forwards or backwards."""
    rows, positions = 5000, 64
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 4 * rows)
    h = random_head(positions, rows, False, torch.float32)
    with Largest() as seen:
        weighted_cross_entropy(h.hidden, h.head, h.targets, h.weights).backward()
    assert seen.elements == max(h.head.numel(), 4 * rows) < positions * rows


def test_only_supervised_positions_reach_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, seen = tiny(), []
    inner = loss.weighted_cross_entropy

    def spy(hidden: Tensor, *rest: Any) -> Tensor:
        seen.append(hidden.shape)
        return inner(hidden, *rest)

    monkeypatch.setattr("model.vlm.weighted_cross_entropy", spy)
    total, weight = vlm(batch(), images())
    assert seen == [(4, 64)]
    assert float(weight) == 4.0
    assert total.requires_grad
    assert not weight.requires_grad


# ------------------------------------------------------------------------- freezing, connectors


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
    features = images(count) if count else None
    vlm.loss(batch(images=count), features)[0].backward()
    for part, learns in (("connector", train_connector), ("language", train_llm)):
        for name, p in getattr(vlm, part).named_parameters():
            assert (p.grad is not None) == learns, name


def test_text_alone_touches_the_connector_with_nothing() -> None:
    """Its gradient is zero, not absent, and the loss does not change."""
    vlm = tiny("mlp")
    total, _ = vlm.loss(batch(images=0), None)
    total.backward()
    grads = [p.grad for p in vlm.connector.parameters()]
    assert all(g is not None and not bool(g.any()) for g in grads)
    words = vlm.language.get_input_embeddings()(batch().input_ids)
    assert torch.equal(vlm.embed(batch().input_ids, torch.empty(0, dtype=torch.int64), None), words)


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


def test_build_follows_its_seed_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one, two, other = tiny(seed=1), tiny(seed=1), tiny(seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.connector.weight, two.connector.weight)
    assert not torch.equal(one.connector.weight, other.connector.weight)


def test_build_on_meta_holds_nothing() -> None:
    vlm = tiny(device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in vlm.parameters())


def test_features_land_in_their_slots() -> None:
    vlm = tiny()
    two = batch(images=2)
    features = images(2)
    embedded = vlm.embed(two.input_ids, two.image_slots, features.half())
    wanted = vlm.connector(features.half().float()).view(6, 64)
    torch.testing.assert_close(embedded[1:7], wanted)
    words = vlm.language.get_input_embeddings()(two.input_ids)
    assert torch.equal(embedded[[0, 7, 8, 9, 10, 11]], words[[0, 7, 8, 9, 10, 11]])


# ------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("connector", ["linear", "mlp"])
def test_a_saved_model_is_the_same_model(tmp_path: Path, connector: str) -> None:
    vlm, tok = build_vlm(VISION, "random:qwen3-tiny", connector, 4)
    folder = tmp_path / "stage1" / "final"
    save_final(folder, vlm, tok, META | {"connector": connector, "note": "kept"})
    again, tok_again, meta = load_final(folder)
    state = again.state_dict()
    assert state.keys() == vlm.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in vlm.state_dict().items())
    assert again.language.lm_head.weight is again.language.model.embed_tokens.weight
    assert not again.training
    assert tok_again.get_vocab() == tok.get_vocab()
    assert (meta["vision_width"], meta["note"], meta["step"]) == (VISION, "kept", 5)
    assert torch.equal(again.loss(batch(), images())[0], vlm.eval().loss(batch(), images())[0])


def test_weights_are_stored_once_under_our_names(tmp_path: Path) -> None:
    vlm, tok = build_vlm(VISION, "random:qwen3-tiny", "linear", 0)
    save_final(tmp_path / "final", vlm, tok, META)
    stored = load_file(tmp_path / "final" / saved_model.WEIGHTS)
    assert "language.lm_head.weight" not in stored  # tied
    assert {name.split(".")[0] for name in stored} == {"connector", "language"}
    assert sum(x.numel() for x in stored.values()) == sum(p.numel() for p in vlm.parameters())
    modes = {p.stat().st_mode & 0o777 for p in (tmp_path / "final").iterdir()}
    assert len(modes) == 1, "readable alike"


def test_an_untied_head_is_stored_too(tmp_path: Path) -> None:
    vlm, tok = build_vlm(VISION, "random:qwen3-tiny", "linear", 0)
    vlm.language.config.tie_word_embeddings = False
    vlm.language.lm_head.weight = torch.nn.Parameter(vlm.language.lm_head.weight + 1)
    save_final(tmp_path / "final", vlm, tok, META)
    again, _, _ = load_final(tmp_path / "final")
    assert torch.equal(again.language.lm_head.weight, vlm.language.lm_head.weight)
    embedding = vlm.language.get_input_embeddings().weight
    assert torch.equal(again.language.get_input_embeddings().weight, embedding)


def test_saving_again_replaces_whole(tmp_path: Path) -> None:
    vlm, tok = build_vlm(VISION, "random:qwen3-tiny", "linear", 0)
    (tmp_path / "final.partial").mkdir()
    (tmp_path / "final.partial" / "half").write_text("a crash left this")
    for step in (1, 2):
        save_final(tmp_path / "final", vlm, tok, META | {"step": step})
    assert read_meta(tmp_path / "final")["step"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["final"]
    assert not (tmp_path / "final" / "half").exists()


def test_a_model_with_missing_weights_is_refused(tmp_path: Path) -> None:
    """transformers would fill the gap with random numbers."""
    vlm, tok = build_vlm(VISION, "random:qwen3-tiny", "linear", 0)
    save_final(tmp_path / "final", vlm, tok, META)
    weights = weights_of(vlm)
    del weights["language.model.norm.weight"]
    save_file(weights, tmp_path / "final" / saved_model.WEIGHTS)
    with pytest.raises(UserError, match=r"not the weights of this model: language\.model\.norm"):
        load_final(tmp_path / "final")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 99, this version reads 1"),
        ({"template": "chatml-0"}, "chat template chatml-0"),
    ],
)
def test_other_versions_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    vlm, tok = build_vlm(VISION, "random:qwen3-tiny", "linear", 0)
    save_final(tmp_path / "final", vlm, tok, META)
    path = tmp_path / "final" / saved_model.META
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_final(tmp_path / "final")


def test_broken_files_are_said(tmp_path: Path) -> None:
    vlm, tok = build_vlm(VISION, "random:qwen3-tiny", "linear", 0)
    with pytest.raises(UserError, match=r"train one: python -m train\.run --stage 1"):
        load_final(tmp_path / "final")
    save_final(tmp_path / "final", vlm, tok, META)
    weights = tmp_path / "final" / saved_model.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        load_final(tmp_path / "final")
    (tmp_path / "final" / saved_model.META).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_final(tmp_path / "final")


def test_the_newest_finished_stage_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for stage in (1, 2):
        (tmp_path / f"runs/cats/stage{stage}/final").mkdir(parents=True)
        (tmp_path / f"runs/cats/stage{stage}/final" / saved_model.META).write_text("{}")
    (tmp_path / "runs/cats/stage3").mkdir()
    (tmp_path / "runs/dogs/stage1").mkdir(parents=True)
    assert find_run("cats") == Path("runs/cats/stage2/final")
    assert find_run("cats", stage=1) == Path("runs/cats/stage1/final")
    assert find_run(str(tmp_path / "runs/cats")).resolve() == tmp_path / "runs/cats/stage2/final"
    assert find_run("runs/cats/stage1/final") == Path("runs/cats/stage1/final")
    with pytest.raises(UserError, match=r"stage 3 is not finished .*--stage 3 --run cats --resume"):
        find_run("cats", stage=3)
    with pytest.raises(UserError, match="run dogs: stage 1 is not finished"):
        find_run("dogs")
    with pytest.raises(UserError, match=r"no run cets .*nearest: cats; there are: cats, dogs"):
        find_run("cets")
    monkeypatch.chdir(tmp_path / "runs/dogs")
    with pytest.raises(UserError, match=r"train one: python -m train\.run --stage 1"):
        find_run("cats")
