"""Everything about a packed batch's attention that does not depend on the layer, made once a batch.

- CPU and MPS (and CUDA without a kernel for it): trees of similar length are padded into one SDPA call with
  a mask; long ones are taken by themselves, their beginning causally, their branches with a small mask.
- CUDA: one variable-length call over all units, keys gathered per unit (prefix, then own).

Units and trees: see `model.packed`. Legend: T tokens in the batch, U units, L tokens in the longest tree of
a group, B trees in a group, R rows of all groups with their padding.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LONG_TREE = 1024
"""Trees of more tokens are not padded into a group."""
MASK_ELEMENTS = 1 << 22
"""Most elements of one mask that is not a single tree's own (16 MiB in fp32)."""
MAX_PADDING = 0.3
"""Share of a group's score matrix that may be padding before a new group begins."""


@dataclass(frozen=True)
class Tree:
    """Consecutive units: the first has no prefix, the others' prefixes lie within it."""

    start: int
    stop: int
    units: Tensor  # (u, 4), counted from `start`


def trees_of(units: Tensor, tokens: int) -> list[Tree]:
    """Cut the units of a batch into trees.

    Raises:
        ValueError: units leave tokens out, overlap, or have a prefix outside their tree.
    """
    rows = units.tolist()
    if [r[0] for r in rows] + [tokens] != [0] + [r[1] for r in rows]:
        raise ValueError(f"units do not cover 0..{tokens} one after another")
    roots = [i for i, (_, _, p0, p1) in enumerate(rows) if p0 == p1]
    if not roots or roots[0] != 0:
        raise ValueError("the first unit has a prefix")
    trees = []
    for i, j in zip(roots, [*roots[1:], len(rows)], strict=True):
        start, root_end = rows[i][:2]
        for q0, q1, p0, p1 in rows[i + 1 : j]:
            if not start <= p0 < p1 <= root_end:
                raise ValueError(f"unit {q0}..{q1}: prefix {p0}..{p1} leaves {start}..{root_end}")
        local = units[i:j] - start
        if rows[i][2] != start:  # an empty prefix may stand anywhere
            local = torch.cat((torch.tensor([[0, root_end - start, 0, 0]]), local[1:]))
        trees.append(Tree(start, rows[j - 1][1], local))
    return trees


def tree_mask(trees: list[Tree]) -> Tensor:
    """(B, L, L) bool: which keys each query of each tree sees. Padding sees itself (no empty softmax)."""
    longest = max(t.stop - t.start for t in trees)
    place = torch.arange(longest)
    # Per query: start of its own run, and its prefix. Padding: own run of one, no prefix.
    own = place.expand(len(trees), longest).clone()
    p0, p1 = torch.zeros_like(own), torch.zeros_like(own)
    for row, tree in enumerate(trees):
        lengths = tree.units[:, 1] - tree.units[:, 0]
        size = tree.stop - tree.start
        own[row, :size] = tree.units[:, 0].repeat_interleave(lengths)
        p0[row, :size] = tree.units[:, 2].repeat_interleave(lengths)
        p1[row, :size] = tree.units[:, 3].repeat_interleave(lengths)
    key, query = place.view(1, 1, -1), place.view(1, -1, 1)
    in_prefix = (key >= p0.unsqueeze(2)) & (key < p1.unsqueeze(2))
    return in_prefix | ((key >= own.unsqueeze(2)) & (key <= query))


@dataclass(frozen=True)
class Group:
    """Trees padded to one length, attended to in one call."""

    trees: int
    length: int
    mask: Tensor | None  # (B, 1, L, L) additive; None = plain causal, no padding


@dataclass(frozen=True)
class LongTree:
    """A tree attended to in pieces: its beginning causally, then its branches, some at a time."""

    sizes: tuple[int, ...]  # tokens of the beginning, then of each piece
    masks: tuple[Tensor, ...]  # per piece (1, 1, n, beginning + n) additive


@dataclass(frozen=True)
class SdpaPlan:
    """Rows gathered once, split into parts, attended to, and put back in order."""

    index: Tensor | None  # (R,) token of each row; padding repeats token 0. None = rows are tokens
    inverse: Tensor | None  # (T,) row of each token
    parts: tuple[Group | LongTree, ...]
    rows: tuple[int, ...]  # rows of each part


@dataclass(frozen=True)
class VarlenPlan:
    """What a variable-length kernel wants: queries as they are, keys gathered per unit."""

    keys: Tensor | None  # (K,) token of each key; None = keys are the tokens as they are
    cu_queries: Tensor  # (U + 1,) int32
    cu_keys: Tensor  # (U + 1,) int32
    max_queries: int
    max_keys: int


class AttentionPlan:
    """Everything about a batch's attention that does not depend on the layer; made once a batch."""

    def __init__(self, units: Tensor, tokens: int, device: torch.device, flash: bool = True):
        self.units, self.tokens, self.device, self.flash = units.cpu(), tokens, device, flash
        self._sdpa: dict[torch.dtype, SdpaPlan] = {}

    def sdpa(self, dtype: torch.dtype) -> SdpaPlan:
        """The plan for SDPA, its masks in the queries' dtype (a boolean one would be converted a layer)."""
        if dtype not in self._sdpa:
            self._sdpa[dtype] = plan_sdpa(self.units, self.tokens, self.device, dtype)
        return self._sdpa[dtype]

    @functools.cached_property
    def varlen(self) -> VarlenPlan:
        """The plan for a variable-length kernel."""
        return plan_varlen(self.units, self.device)


def plan_sdpa(
    units: Tensor, tokens: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> SdpaPlan:
    """Group the trees of a batch into as few SDPA calls as little padding allows."""
    trees = sorted(trees_of(units, tokens), key=lambda t: t.start - t.stop)  # longest first
    parts: list[Group | LongTree] = []
    rows, index = [], []
    inverse = torch.empty(tokens, dtype=torch.int64)
    first = 0  # row where the part begins
    for members in _groups(trees):
        length = members[0].stop - members[0].start
        starts = torch.tensor([t.start for t in members]).unsqueeze(1)
        sizes = torch.tensor([t.stop - t.start for t in members]).unsqueeze(1)
        place = torch.arange(length).unsqueeze(0)
        real = place < sizes  # (B, L)
        token = torch.where(real, starts + place, 0)
        inverse[token[real]] = first + real.flatten().nonzero().squeeze(1)
        index.append(token.flatten())
        if length > LONG_TREE:
            parts.append(_long_tree(members[0], device, dtype))
        elif all(len(t.units) == 1 for t in members) and bool(real.all()):
            parts.append(Group(len(members), length, None))
        else:
            mask = _additive(tree_mask(members).unsqueeze(1), device, dtype)
            parts.append(Group(len(members), length, mask))
        rows.append(token.numel())
        first += token.numel()
    index_all = torch.cat(index)
    if torch.equal(index_all, torch.arange(tokens)):
        return SdpaPlan(None, None, tuple(parts), tuple(rows))
    return SdpaPlan(index_all.to(device), inverse.to(device), tuple(parts), tuple(rows))


def _groups(trees: list[Tree]) -> list[list[Tree]]:
    """Trees, longest first, cut into groups: long ones alone, the others with bounded padding."""
    groups: list[list[Tree]] = []
    longest, used = 0, 0
    for tree in trees:
        size = tree.stop - tree.start
        cells = (len(groups[-1]) + 1) * longest**2 if groups else 0
        if (
            not groups
            or longest > LONG_TREE
            or cells > MASK_ELEMENTS
            or used + size**2 < (1 - MAX_PADDING) * cells
        ):
            groups.append([])
            longest, used = size, 0
        groups[-1].append(tree)
        used += size**2
    return groups


def _long_tree(tree: Tree, device: torch.device, dtype: torch.dtype) -> LongTree:
    beginning = int(tree.units[0, 1])
    pieces: list[list[Tensor]] = []
    width = 0
    for unit in tree.units[1:]:
        size = int(unit[1] - unit[0])
        if not pieces or (width + size) * (beginning + width + size) > MASK_ELEMENTS:
            pieces.append([])
            width = 0
        pieces[-1].append(unit)
        width += size
    sizes, masks = [beginning], []
    for piece in pieces:
        q0, q1 = int(piece[0][0]), int(piece[-1][1])
        query = torch.arange(q0, q1).unsqueeze(1)
        key = torch.cat((torch.arange(beginning), torch.arange(q0, q1))).unsqueeze(0)
        mask = torch.zeros(q1 - q0, key.numel(), dtype=torch.bool)
        for u0, u1, p0, p1 in (unit.tolist() for unit in piece):
            inside = slice(u0 - q0, u1 - q0)
            mask[inside] = (key >= p0) & (key < p1) | (key >= u0) & (key <= query[inside])
        sizes.append(q1 - q0)
        masks.append(_additive(mask[None, None], device, dtype))
    return LongTree(tuple(sizes), tuple(masks))


def _additive(mask: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    zero = torch.zeros(mask.shape, dtype=dtype)
    return zero.masked_fill_(~mask, float("-inf")).to(device)


def plan_varlen(units: Tensor, device: torch.device) -> VarlenPlan:
    """Key indices and cumulative lengths, per unit: its prefix, then its own tokens."""
    q0, q1, p0, p1 = units.unbind(1)
    queries, prefixes = q1 - q0, p1 - p0
    lengths = queries + prefixes
    cu_keys = F.pad(lengths.cumsum(0), (1, 0))
    keys = None
    if bool((prefixes > 0).any()):
        place = torch.arange(int(cu_keys[-1])) - cu_keys[:-1].repeat_interleave(lengths)
        prefix = prefixes.repeat_interleave(lengths)
        own = place - prefix + q0.repeat_interleave(lengths)
        keys = torch.where(place < prefix, place + p0.repeat_interleave(lengths), own).to(device)
    return VarlenPlan(
        keys=keys,
        cu_queries=F.pad(queries.cumsum(0), (1, 0)).to(device, torch.int32),
        cu_keys=cu_keys.to(device, torch.int32),
        max_queries=int(queries.max()),
        max_keys=int(lengths.max()),
    )
