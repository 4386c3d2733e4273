"""The loss: weighted cross-entropy and its gradients, computed in chunks.

total = weighted_cross_entropy(hidden, head, targets, weights)     # fp32 scalar
total.backward()                                                   # once only
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.language import loss
from model.language.loss import weighted_cross_entropy


class Head(NamedTuple):
    """Arguments of the loss."""

    hidden: Tensor
    head: Tensor
    targets: Tensor
    weights: Tensor
    bias: Tensor | None

    @property
    def trainable(self) -> list[Tensor]:
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
    found = weighted_cross_entropy(*h)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    # A factor on the loss (1 / sum of weights in training, 1 / 3 here) scales every gradient.
    for a, b in zip(
        torch.autograd.grad(found / 3, h.trainable),
        torch.autograd.grad(wanted / 3, h.trainable),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_logits_whose_exponential_overflows() -> None:
    hidden = torch.tensor([[1000.0]], requires_grad=True)
    head = torch.tensor([[1.0], [-1.0]])
    found = weighted_cross_entropy(hidden, head, torch.tensor([1]), torch.ones(1))
    assert float(found.detach()) == 2000.0
    found.backward()
    assert hidden.grad is not None
    assert float(hidden.grad) == 2.0


def test_loss_in_bfloat16_sums_in_float32() -> None:
    h = random_head(500, 100, False, torch.bfloat16)
    found = weighted_cross_entropy(*h)
    assert found.dtype == torch.float32
    logits = (h.hidden @ h.head.T).float()
    wanted = (F.cross_entropy(logits, h.targets, reduction="none") * h.weights).sum()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    found.backward()
    assert h.head.grad is not None
    assert h.head.grad.dtype == torch.bfloat16


def test_a_second_backward_pass_is_refused() -> None:
    h = random_head(3, 10, False, torch.float32)
    found = weighted_cross_entropy(*h)
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already"):
        found.backward()


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor created."""

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
    """No tensor has a row of logits for every position, in the forward or the backward pass."""
    rows, positions = 5000, 64
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 4 * rows)
    h = random_head(positions, rows, False, torch.float32)
    with Largest() as seen:
        weighted_cross_entropy(*h).backward()
    assert seen.elements == max(h.head.numel(), 4 * rows) < positions * rows
