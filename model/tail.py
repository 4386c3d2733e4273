"""The last blocks of a vision encoder, computed in training behind the stored ones: the model's tail.

    tail = load_tail(spec, read_tail(paths.tail, root, spec.tail, spec.width))
    tail.freeze(trained=3)                       # the last three learn, those before them do not
    tokens = tail({"image": rows})               # (R, T, V) stored -> (R * M, C) for the connector

Pre-norm blocks as CLIP and SigLIP have them: x + attention(norm(x)), then x + MLP(norm(x)). There is no norm
behind the last one, as the features have none. CLS is dropped and patches are pooled at the end.

R rows, T tokens of a row, CLS included, M tokens of a row behind pooling, V width of the encoder, C width of
the connector's input (V for each block in `spec.tail.blocks`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cache.format.spec import FeatureSpec
from cache.format.tail import Arrays

CHUNK_TOKENS = 1 << 14
"""Stored tokens that pass through the blocks together: 28 images of CLIP-336. It bounds the memory of a clip,
of which every patch of every frame is computed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredRows:
    """Stored rows of a batch, and which of their tokens are where in its sequence."""

    rows: Mapping[str, Tensor]
    """Array -> (R, T, V) rows."""
    order: Tensor
    """(N,) int64: for each image slot a token behind the tail, of all rows of all arrays in turn."""


class QuickGELU(nn.Module):
    """The activation of OpenAI's CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x * sigmoid(1.702 x)."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "quick_gelu": QuickGELU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
}


class TailBlock(nn.Module):
    """One block. The names of its tensors are those of `cache.format.tail.Tail.shapes`."""

    def __init__(self, width: int, heads: int, hidden: int, activation: str, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width, eps=eps)
        self.up = nn.Linear(width, hidden)
        self.act = ACTIVATIONS[activation]()
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the block: (R, T, V) -> (R, T, V)."""
        # (R, T, 3 V) -> 3 x (R, heads, T, V / heads)
        parts = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts.unbind())
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(self.act(self.up(self.norm_2(x))))


class VisionTail(nn.Module):
    """The blocks behind the stored one. Each batch calls `forward` once, also one without rows."""

    def __init__(self, spec: FeatureSpec) -> None:
        """Build the blocks that the spec of a space describes, with weights of no meaning."""
        super().__init__()
        assert spec.tail is not None, "a space without a tail"
        self.spec = spec
        self.checkpointing = False
        """Whether blocks that train are computed again in the backward pass."""
        tail = spec.tail
        self.blocks = nn.ModuleDict(
            {
                str(number): TailBlock(
                    spec.width, tail.heads, tail.hidden, spec.activation, tail.eps
                )
                for number in tail.numbers
            }
        )

    def freeze(self, trained: int) -> None:
        """Let the last `trained` blocks learn, and no other."""
        numbers = list(self.blocks)
        for number, block in self.blocks.items():
            block.requires_grad_(number in numbers[len(numbers) - trained :])

    @property
    def numbers(self) -> list[int]:
        """The numbers of all blocks."""
        return [int(number) for number in self.blocks]

    @property
    def trained(self) -> list[int]:
        """The numbers of the blocks that learn."""
        return [
            int(number)
            for number, block in self.blocks.items()
            if any(p.requires_grad for p in block.parameters())
        ]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return next(self.parameters()).dtype

    def forward(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Return the tokens of all rows of all arrays in turn: array -> (R, T, V) to (sum of R * M, C)."""
        parts = [self.see(some, array).flatten(0, 1) for array, some in rows.items() if len(some)]
        if not parts:
            # Zero times this is what a batch without media adds to its loss, so that every batch touches
            # every parameter.
            parts = [self.see(self.nothing(), "image").flatten(0, 1)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def nothing(self) -> Tensor:
        """Return one row of zeros, (1, T, V)."""
        like = next(self.parameters())
        return like.new_zeros(1, self.spec.tokens("image"), self.spec.width)

    def see(self, rows: Tensor, array: str) -> Tensor:
        """Return what the connector gets of the rows of one array: (R, T, V) -> (R, M, C)."""
        some = max(1, CHUNK_TOKENS // rows.shape[1])
        done = [self._pool(self.outputs(part), array) for part in rows.split(some)]
        return torch.cat(done) if len(done) > 1 else done[0]

    def outputs(self, rows: Tensor) -> Tensor:
        """Return the outputs of the blocks in `spec.tail.blocks`, with CLS: (R, T, V) -> (R, T, C)."""
        tail = self.spec.tail
        assert tail is not None
        x = rows.to(self.dtype)
        after = {tail.first - 1: x}
        for number, block in self.blocks.items():
            again = self.checkpointing and self.training and torch.is_grad_enabled()
            if again and (x.requires_grad or any(p.requires_grad for p in block.parameters())):
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            after[int(number)] = x
        return torch.cat([after[number] for number in tail.blocks], dim=-1)

    def _pool(self, x: Tensor, array: str) -> Tensor:
        """Drop CLS and average windows of patches: (R, T, C) -> (R, M, C)."""
        x = x[:, int(self.spec.keep_cls) :]
        window = self.spec.seen.pool(array)
        if window == 1:
            return x
        side = self.spec.grid // window
        return x.unflatten(1, (side, window, side, window)).mean((2, 4)).flatten(1, 2)


def empty_tail(spec: FeatureSpec) -> VisionTail:
    """Return the blocks of a space with memory for their weights, which are not set."""
    with torch.device("meta"):  # no weight is drawn, and no random state changes
        tail = VisionTail(spec)
    return tail.to_empty(device="cpu")


def load_tail(spec: FeatureSpec, arrays: Arrays) -> VisionTail:
    """Return the blocks of a space with the weights of its file, which are copied."""
    tail = empty_tail(spec)
    with torch.no_grad():
        for name, parameter in tail.named_parameters():
            parameter.copy_(torch.tensor(arrays[name]))
    return tail


def block_tensors(tail: VisionTail) -> dict[str, Tensor]:
    """Return the weights by transformers' names of CLIP and SigLIP: `encoder.layers.20.mlp.fc1.weight`."""
    names = {
        "norm_1": "layer_norm1",
        "out": "self_attn.out_proj",
        "norm_2": "layer_norm2",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    }
    found: dict[str, Any] = {}
    for name, value in tail.state_dict().items():
        _, number, layer, kind = name.split(".")
        there, value = f"encoder.layers.{number}", value.detach()
        if layer == "qkv":
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                found[f"{there}.self_attn.{letter}_proj.{kind}"] = third.clone()
        else:
            found[f"{there}.{names[layer]}.{kind}"] = value
    return found
