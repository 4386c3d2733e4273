"""Packed batches: packing changes neither the loss nor a gradient, on any path.

    batch = PackedBatch(input_ids=..., units=torch.tensor([[0, 5, 0, 0], [5, 9, 0, 5]]), ...)
    loss, weight = vlm.loss(batch, features)      # one beginning of 5 tokens, one branch of 4

The reference is each sample computed alone, and attention written as loops.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import types
from inspect import Parameter, Signature

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from model.attention import kernels
from model.attention import plan as attention_plan
from model.attention.batch import PackedBatch
from model.attention.kernels import packed_attention, sdpa_packed, varlen_packed
from model.attention.plan import AttentionPlan, SdpaPlan, plan_sdpa, plan_varlen
from model.connector import build_connector
from model.vlm import VLM, build_vlm

VISION = 48  # feature width
TOKENS = 4  # feature tokens per image
CPU = torch.device("cpu")


IMAGE_ID = 276  # of the built-in tokenizer without extra words


@dataclasses.dataclass(frozen=True)
class Case:
    """A tree as token ids: a beginning with images in it, and its branches."""

    seed: int
    beginning: tuple[int, ...]
    images: int
    branches: tuple[tuple[int, ...], ...]


@pytest.fixture(scope="module")
def vlm() -> VLM:
    model, tokenizer = build_vlm(VISION, "random:qwen3-tiny", "linear", seed=1)
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE_ID
    generator = torch.Generator().manual_seed(7)
    for value in model.parameters():  # new norms are all ones; new weights are too small to matter
        scale = 0.2 if value.dim() == 1 else value.std().item()
        value.data += scale * torch.randn(value.shape, generator=generator)
    return model


def make_case(seed: int, branches: int, length: int = 8) -> Case:
    g = torch.Generator().manual_seed(seed)

    def words(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 250, (n,), generator=g).tolist())

    images = seed % 3
    beginning = words(3) + (IMAGE_ID,) * (images * TOKENS) + words(2 + seed % 5)
    tails = tuple(words(1 + (length + 3 * i + seed) % length) for i in range(branches))
    return Case(seed, beginning, images, tails)


def pack(cases: list[Case], shared: bool) -> PackedBatch:
    """Pack cases as trees (`shared`), or every branch with its own copy of the beginning.

    Every token of a branch is supervised, token i with weight 1 + i % 3.
    """
    ids: list[int] = []
    positions: list[int] = []
    supervised: list[tuple[int, int, float]] = []
    units: list[list[int]] = []

    def add(tokens: tuple[int, ...], position: int) -> int:
        at = len(ids)
        ids.extend(tokens)
        positions.extend(range(position, position + len(tokens)))
        return at

    for case in cases:
        n = len(case.beginning)
        start = None
        for branch in case.branches:
            if start is None or not shared:
                start = add(case.beginning, 0)
                units.append([start, start + n, start, start])
            at = add(branch, n)
            if shared:
                units.append([at, at + len(branch), start, start + n])
            else:
                units[-1][1] = at + len(branch)
            for i, target in enumerate(branch):
                supervised.append((start + n - 1 if i == 0 else at + i - 1, target, 1.0 + i % 3))
    where, targets, weights = map(torch.tensor, zip(*supervised, strict=True))
    input_ids = torch.tensor(ids)
    return PackedBatch(
        input_ids=input_ids,
        position_ids=torch.tensor(positions),
        image_slots=(input_ids == IMAGE_ID).nonzero().squeeze(1),
        loss_positions=where,
        targets=targets,
        loss_weights=weights,
        units=torch.tensor(units),
    )


def features_of(cases: list[Case], shared: bool) -> Tensor | None:
    rows = []
    for case in cases:
        g = torch.Generator().manual_seed(1000 + case.seed)
        one = torch.randn(case.images, TOKENS, VISION, generator=g)
        rows += [one] * (1 if shared else len(case.branches))
    out = torch.cat(rows)
    return out if len(out) else None


def gradients(vlm: VLM, parts: list[list[Case]], shared: bool) -> dict[str, Tensor]:
    """Return the gradient of every parameter, and the loss, summed over batches of cases."""
    vlm.zero_grad()
    total = torch.zeros(())
    for cases in parts:
        loss, weight = vlm.loss(pack(cases, shared), features_of(cases, shared))
        loss.backward()
        total += loss.detach()
        assert float(weight) == sum(
            1.0 + i % 3 for c in cases for b in c.branches for i in range(len(b))
        )
    named = {n: p.grad.clone() for n, p in vlm.named_parameters() if p.grad is not None}
    return named | {"loss": total}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    for name in a:
        scale = float(b[name].abs().max())
        assert scale > 0, name
        assert float((a[name] - b[name]).abs().max()) <= tolerance * scale, name


# ------------------------------------------------------------------------ packed equals unpacked


@pytest.fixture(params=["grouped", "long", "long in pieces", "every tree alone", "varlen"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Select one way to compute a batch: each kind of SDPA call, and the variable-length kernel."""
    if request.param.startswith("long"):
        monkeypatch.setattr(attention_plan, "LONG_TREE", 1)
    if request.param == "long in pieces":
        monkeypatch.setattr(attention_plan, "MASK_ELEMENTS", 1)
    if request.param == "every tree alone":
        monkeypatch.setattr(attention_plan, "MAX_PADDING", 0.0)
    if request.param == "varlen":  # the CUDA path, with a kernel written as loops
        monkeypatch.setattr(kernels, "choose_kernel", lambda q, flash: naive_kernel)
        monkeypatch.setattr(kernels, "sdpa_packed", None)
    return request.param


def test_packed_shared_and_alone_have_equal_gradients(vlm: VLM, layout: str) -> None:
    cases = [make_case(seed, branches=1 + seed % 4) for seed in range(7)]
    parts = plan_sdpa(pack(cases, True).units, len(pack(cases, True).input_ids), CPU).parts
    pieces = max(len(part.sizes) for part in parts)  # in one, or the beginning, then each branch
    assert pieces == {"long": 2, "long in pieces": 1 + 4}.get(layout, 1)
    alone = gradients(vlm, [[case] for case in cases], shared=False)
    assert_same(gradients(vlm, [cases], shared=True), alone)
    assert_same(gradients(vlm, [cases], shared=False), alone)


def assert_equal_to_transformers(vlm: VLM, case: Case) -> None:
    """Hidden states, loss and gradients of one plain sample equal transformers' own forward and loss."""
    ours = gradients(vlm, [[case]], shared=True)
    batch, features = pack([case], shared=False), features_of([case], shared=False)
    hidden = vlm.hidden(batch, features)
    vlm.zero_grad()
    vlm.language.set_attn_implementation("eager")
    try:
        embeddings = vlm.embed(batch.input_ids, batch.image_slots, features).unsqueeze(0)
        out = vlm.language(inputs_embeds=embeddings, output_hidden_states=True, use_cache=False)
    finally:
        vlm.language.set_attn_implementation("nano_packed")
    torch.testing.assert_close(hidden, out.hidden_states[-1][0], atol=2e-6, rtol=1e-5)
    logits = out.logits[0, batch.loss_positions]
    losses = F.cross_entropy(logits, batch.targets, reduction="none")
    loss = (losses * batch.loss_weights).sum()
    loss.backward()
    theirs = {n: p.grad.clone() for n, p in vlm.named_parameters() if p.grad is not None}
    assert_same(ours, theirs | {"loss": loss.detach()})


def test_one_sample_equals_transformers(vlm: VLM) -> None:
    assert_equal_to_transformers(vlm, make_case(5, branches=1, length=12))


def test_gradient_checkpointing_changes_nothing(vlm: VLM) -> None:
    cases = [make_case(seed, branches=1 + seed % 4) for seed in range(5)]
    plain = gradients(vlm, [cases], shared=True)
    calls = []
    norm = vlm.language.model.layers[0].input_layernorm
    vlm.gradient_checkpointing(True)
    with norm.register_forward_hook(lambda *_: calls.append(1)):
        assert_same(gradients(vlm, [cases], shared=True), plain, tolerance=0.0)
    assert len(calls) == 2, "each layer runs again in the backward pass"
    vlm.gradient_checkpointing(False)
    assert_same(gradients(vlm, [cases], shared=True), plain, tolerance=0.0)


def test_samples_and_branches_do_not_see_each_other(vlm: VLM) -> None:
    """Changing the tokens of one unit changes no bit of the hidden states of another tree or branch."""
    cases = [make_case(seed, branches=3) for seed in (3, 4, 5)]
    batch, features = pack(cases, shared=True), features_of(cases, shared=True)
    before = vlm.hidden(batch, features)
    for unit in batch.units.tolist():
        ids = batch.input_ids.clone()
        ids[unit[0] : unit[1]] = (ids[unit[0] : unit[1]] + 1) % 250
        ids[batch.image_slots] = IMAGE_ID
        after = vlm.hidden(dataclasses.replace(batch, input_ids=ids), features)
        changed = (before != after).any(1)
        mine = torch.zeros_like(changed)
        mine[unit[0] : unit[1]] = True
        if unit[2] == unit[3]:  # the beginning: all its branches see it
            for q0, q1, p0, p1 in batch.units.tolist():
                mine[q0:q1] |= p0 < p1 and p0 == unit[0]
        assert not bool((changed & ~mine).any())
        assert bool(changed[mine].any())


def test_autocast_computes_attention_in_two_bytes(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms and rotary positions leave float32 queries, for which no CUDA kernel would be chosen."""
    seen = []

    def spy(q: Tensor, k: Tensor, v: Tensor, plan: SdpaPlan, scale: float) -> Tensor:
        masks = [mask for part in plan.parts for mask in part.masks]
        seen.append({x.dtype for x in (q, k, v, *masks)})
        return sdpa_packed(q, k, v, plan, scale)

    monkeypatch.setattr(kernels, "sdpa_packed", spy)
    cases = [make_case(seed, branches=2) for seed in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        vlm.hidden(pack(cases, True), features_of(cases, True))
    assert seen == [{torch.bfloat16}] * 2


def test_autocast_gradients_are_close(vlm: VLM) -> None:
    cases = [make_case(seed, branches=2) for seed in range(4)]
    exact = gradients(vlm, [cases], shared=True)
    with torch.autocast("cpu", torch.bfloat16):
        rough = gradients(vlm, [cases], shared=True)
    assert rough["loss"].dtype == torch.float32
    assert_same(rough, exact, tolerance=0.1)
    assert abs(float(rough["loss"] / exact["loss"]) - 1) < 5e-3


def test_units_stay_on_the_cpu_when_a_batch_moves() -> None:
    batch = pack([make_case(1, branches=2)], shared=True)
    moved = batch.to("meta")
    assert {f.name for f in dataclasses.fields(moved) if getattr(moved, f.name).is_meta} == {
        f.name for f in dataclasses.fields(moved)
    } - {"units"}


# --------------------------------------------------------------------- the two paths of attention


@st.composite
def random_units(draw: st.DrawFn) -> Tensor:
    """Draw trees with up to four branches, whose prefixes are any part of the beginning."""
    units: list[list[int]] = []
    at = 0
    for _ in range(draw(st.integers(1, 5))):
        begin, size = at, draw(st.integers(1, 9))
        units.append([begin, begin + size, begin, begin])
        at += size
        for _ in range(draw(st.integers(0, 4))):
            p0 = begin + draw(st.integers(0, size - 1))
            p1 = draw(st.integers(p0 + 1, begin + size))
            length = draw(st.integers(1, 5))
            units.append([at, at + length, p0, p1])
            at += length
    return torch.tensor(units)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, units: Tensor, scale: float) -> Tensor:
    """Compute attention query by query, as a unit is defined."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = []
    for q0, q1, p0, p1 in units.tolist():
        for t in range(q0, q1):
            keys = [*range(p0, p1), *range(q0, t + 1)]
            scores = torch.einsum("hd,khd->hk", q[t], k[keys]) * scale
            out.append(torch.einsum("hk,khd->hd", scores.softmax(1), v[keys]))
    return torch.stack(out)


def naive_kernel(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *longest: int, scale: float
) -> Tensor:
    """Compute variable-length attention sequence by sequence, causal to the last key."""
    assert longest == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    assert len(q) == cu_q[-1] and len(k) == len(v) == cu_k[-1]
    out = []
    group = q.shape[1] // k.shape[1]
    for (a, b), (c, d) in zip(
        itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True
    ):
        visible = torch.ones(b - a, d - c, dtype=torch.bool).tril(diagonal=(d - c) - (b - a))
        keys, values = (x[c:d].repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * scale
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(out)


@settings(max_examples=25, deadline=None)
@given(
    units=random_units(),
    long_tree=st.sampled_from([1, 12, 1024]),
    cells=st.sampled_from([1, 60, 1 << 22]),
)
def test_both_paths_equal_the_definition_of_a_unit(
    units: Tensor, long_tree: int, cells: int
) -> None:
    tokens = int(units[-1, 1])
    g = torch.Generator().manual_seed(tokens)
    q, grad = torch.randn(2, tokens, 4, 8, generator=g, dtype=torch.float64).unbind()
    k, v = torch.randn(2, tokens, 2, 8, generator=g, dtype=torch.float64).unbind()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_plan, "LONG_TREE", long_tree)
        patch.setattr(attention_plan, "MASK_ELEMENTS", cells)
        plan = AttentionPlan(units, tokens, CPU)
        outputs = [
            naive_attention(q, k, v, units, 0.3),
            sdpa_packed(q, k, v, plan.sdpa(torch.float64), 0.3),
            varlen_packed(q, k, v, plan.varlen, 0.3, naive_kernel),
        ]
    wanted, *others = [(out, *torch.autograd.grad(out, inputs, grad)) for out in outputs]
    for other in others:
        for a, b in zip(wanted, other, strict=True):
            torch.testing.assert_close(b, a, atol=1e-10, rtol=1e-10)


def test_plain_samples_need_no_gathered_keys() -> None:
    plan = plan_varlen(torch.tensor([[0, 5, 0, 0], [5, 9, 5, 5]]), CPU)
    assert plan.keys is None
    assert plan.cu_keys.tolist() == plan.cu_queries.tolist() == [0, 5, 9]
    assert plan.cu_keys.dtype == torch.int32


def test_equal_plain_samples_are_one_causal_call_without_copies() -> None:
    plan = plan_sdpa(torch.tensor([[0, 4, 0, 0], [4, 8, 4, 4]]), 8, CPU)
    assert plan.index is None
    assert [(p.trees, p.sizes, p.masks) for p in plan.parts] == [(2, (4,), (None,))]


def test_padding_is_bounded() -> None:
    edges = torch.tensor([0, 100, 190, 230, 330, 430, 440, 520]).tolist()
    units = torch.tensor([[a, b, a, a] for a, b in itertools.pairwise(edges)])
    plan = plan_sdpa(units, 520, CPU)
    cells = sum(p.trees * p.sizes[0] ** 2 for p in plan.parts)
    used = sum((b - a) ** 2 for a, b in itertools.pairwise(edges))
    assert used >= (1 - attention_plan.MAX_PADDING) * cells
    assert len(plan.parts) < len(units)


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([[0, 4, 0, 0], [5, 8, 5, 5]], "cover"),
        ([[0, 4, 0, 0], [3, 8, 3, 3]], "cover"),
        ([[0, 4, 0, 0]], "cover"),
        ([[0, 4, 0, 0], [4, 4, 4, 4], [4, 8, 4, 4]], "cover"),
        ([[0, 4, 1, 2], [4, 8, 4, 4]], "first unit"),
        ([[0, 4, 0, 0], [4, 6, 0, 4], [6, 8, 4, 6]], "leaves"),
        ([[0, 2, 0, 0], [2, 4, 2, 2], [4, 8, 0, 2]], "leaves"),
    ],
)
def test_invalid_units_are_refused(units: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_sdpa(torch.tensor(units), 8, CPU)


def test_the_cpu_has_no_variable_length_kernel() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert kernels.choose_kernel(torch.empty(1, 1, 1, dtype=dtype), flash=True) is None


@pytest.mark.parametrize("names", ["window_size", "window_size enable_gqa", "is_causal"])
def test_torch_kernels_of_different_versions_are_called_as_they_take_it(
    names: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of torch 2.11, of later ones, and of one whose causal triangle begins at the first key."""
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    given: dict[str, object] = {}

    def attend(q: Tensor, *_rest: object, **options: object) -> Tensor:
        given.update(options)
        return q

    keywords = [Parameter(name, Parameter.KEYWORD_ONLY) for name in ("scale", *names.split())]
    varlen = types.ModuleType("torch.nn.attention.varlen")
    attend.__signature__ = Signature(keywords)  # type: ignore[attr-defined]
    varlen.varlen_attn = attend  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", varlen)
    kernel = kernels.cuda_kernel.__wrapped__()
    if "window_size" not in names:
        assert kernel is None
        return
    assert kernel is not None
    q, k = torch.zeros(3, 4, 8), torch.zeros(3, 2, 8)
    assert kernel(q, k, k, None, None, 3, 3, scale=0.5) is q
    expected = {"scale": 0.5, "window_size": (-1, 0)}
    assert given == expected | ({"enable_gqa": True} if "gqa" in names else {})


def test_attention_without_a_plan_is_refused(vlm: VLM) -> None:
    """Otherwise all samples of a batch would see each other without an error."""
    with pytest.raises(ValueError, match="without a plan"):
        vlm.language(input_ids=torch.arange(6).unsqueeze(0), use_cache=False)


def test_attention_refuses_unsupported_arguments() -> None:
    q = torch.randn(1, 2, 3, 4)
    plan = AttentionPlan(torch.tensor([[0, 3, 0, 0]]), 3, CPU)
    for message, mask, options in (
        ("masks", torch.zeros(1, 1, 3, 3), {}),
        ("dropout", None, {"dropout": 0.1}),
        *((name, None, {name: 2}) for name in ("sliding_window", "softcap", "s_aux")),
    ):
        with pytest.raises(ValueError, match=message):
            packed_attention(torch.nn.Module(), q, q, q, mask, packed=plan, **options)
    packed_attention(torch.nn.Module(), q, q, q, None, packed=plan, sliding_window=None)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(tie_word_embeddings=False),
        Qwen2Config(tie_word_embeddings=True),
        MistralConfig(sliding_window=None),
    ],
    ids=lambda config: str(config.model_type),
)
def test_other_language_models_pack_too(config: PreTrainedConfig) -> None:
    """Models with biases, without query norms, or with an untied head equal transformers' own forward."""
    small = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config.update({**small, **heads, "pad_token_id": 0})
    torch.manual_seed(0)
    vlm = VLM(AutoModelForCausalLM.from_config(config), build_connector("mlp", VISION, 32), VISION)
    cases = [make_case(seed, branches=2) for seed in (2, 3, 6)]  # 276 is in the vocabulary
    shared = gradients(vlm, [cases], shared=True)
    assert_same(shared, gradients(vlm, [[case] for case in cases], shared=False))
    assert_equal_to_transformers(vlm, make_case(2, branches=1))


def test_the_number_of_features_must_match(vlm: VLM) -> None:
    case = make_case(1, branches=1)
    batch, features = pack([case], True), features_of([case], True)
    with pytest.raises(ValueError, match="4 image slots for 8 features"):
        vlm.loss(batch, torch.cat((features, features)))
    with pytest.raises(ValueError, match="no features"):
        vlm.loss(batch, None)
