"""Estimate what the encoder's last blocks need in a training step: model/tail.py, beside memory.py's model.

R rows of a micro-batch, T tokens of a row as stored, CLS included, S = R T; V width of the encoder, H hidden
width of its MLPs, h attention heads, C width of the connector's input.

Bytes that autograd keeps of one block that trains, per stored token. `tests/model/verify` counts those of
running blocks with saved-tensor hooks, and the formula is exact:

  float32              two norms x (input, normalised) x 4 V; queries, keys, values and attention's output
                       x 4 V; up and its activation x 4 H; QuickGELU keeps its sigmoid too: 4 H
  bfloat16 autocast    the residual stream stays float32, each linear layer keeps a 2-byte copy of its input:
                       20 V + 4 H, with QuickGELU 6 H
  always               8 bytes for each norm, 4 h of attention: 16 + 4 h

Blocks before the first one that trains keep nothing, since nothing before them has a gradient. With
checkpointing each block that trains keeps its input, 4 V.
"""

from __future__ import annotations

from dataclasses import dataclass

from cache.format.spec import FeatureSpec
from model.tail import CHUNK_TOKENS


@dataclass(frozen=True, kw_only=True)
class TailSizes:
    """Sizes of the blocks behind stored rows."""

    width: int
    """Values of a stored token, V."""
    hidden: int
    """Width of the hidden layer of each MLP, H."""
    heads: int
    """Attention heads, h."""
    quick: bool
    """Whether the activation is QuickGELU."""
    blocks: int
    """Blocks behind the stored one."""
    trained: int
    """How many of them train, the last ones."""
    outputs: int
    """Blocks whose outputs the connector gets side by side: C = V x outputs."""
    stored: int
    """Tokens of a stored row, T."""
    seen: int
    """Tokens that the language model gets of a row."""

    @property
    def block(self) -> int:
        """Parameters of one block."""
        v, h = self.width, self.hidden
        return v * (4 * v + 2 * h + 9) + h

    @property
    def parameters(self) -> int:
        """Parameters of all blocks."""
        return self.block * self.blocks

    @property
    def trainable(self) -> int:
        """Parameters of the blocks that train."""
        return self.block * self.trained

    def rows(self, tokens: int) -> int:
        """Return how many rows fill a micro-batch of `tokens` with features and nothing else."""
        return max(1, tokens // self.seen)

    def row_flops(self) -> float:
        """Return the floating-point operations of one row, forward and backward."""
        forward = self.stored * (2.0 * self.block + 4.0 * self.width * self.stored)
        return forward * (self.blocks + 2 * self.trained)


def tail_sizes(spec: FeatureSpec, trained: int, array: str = "image") -> TailSizes:
    """Return the sizes of the tail of a space, with as many tokens a row as one of its arrays has."""
    tail = spec.tail
    assert tail is not None, "a space without a tail"
    return TailSizes(
        width=spec.width,
        hidden=tail.hidden,
        heads=tail.heads,
        quick=spec.activation == "quick_gelu",
        blocks=len(tail.numbers),
        trained=trained,
        outputs=len(tail.blocks),
        stored=spec.tokens(array),
        seen=spec.seen.tokens(array),
    )


def block_bytes(sizes: TailSizes, autocast: bool) -> int:
    """Return the bytes that autograd keeps of one block that trains for one stored token."""
    v, h = sizes.width, sizes.hidden
    of_v, of_h = (20, 4) if autocast else (32, 8)
    of_h += (of_h // 2) * sizes.quick
    return of_v * v + of_h * h + 16 + 4 * sizes.heads


def kept_bytes(sizes: TailSizes, rows: int, autocast: bool, checkpointing: bool) -> int:
    """Return the bytes that the tail holds while the language model computes.

    These are the stored rows in float16, what autograd keeps of the blocks that train, and the connector's
    input, (R x seen, C), in float32 or as autocast's copy.
    """
    tokens = rows * sizes.stored
    a_block = 4 * sizes.width if checkpointing else block_bytes(sizes, autocast)
    connector = (2 if autocast else 4) * sizes.width * sizes.outputs * rows * sizes.seen
    return tokens * (2 * sizes.width + sizes.trained * a_block) + connector


def backward_bytes(sizes: TailSizes, rows: int, autocast: bool, checkpointing: bool) -> int:
    """Return the bytes that the backward pass of a block needs for one chunk, beside what is kept.

    What is kept of the MLP is freed as its gradients are made, so that one of them (with QuickGELU two) is
    more, and three of the residual stream; with checkpointing the block is computed again, from its input.
    """
    chunk = max(1, CHUNK_TOKENS // sizes.stored) * sizes.stored
    value = 2 if autocast else 4
    again = block_bytes(sizes, autocast) - 4 * sizes.width if checkpointing else 0
    working = (1 + sizes.quick) * value * sizes.hidden + 12 * sizes.width
    return min(rows * sizes.stored, chunk) * (again + working) if sizes.trained else 0
