"""Everything about a packed batch's attention that does not depend on the layer, made once a batch.

- CPU and MPS (and CUDA without a kernel for it): trees of similar length are padded into one SDPA call with
  a mask; long ones are taken by themselves, their beginning causally, their branches with a small mask.
- CUDA: one variable-length call over all units, keys gathered per unit (prefix, then own).

Units and trees: see `model.attention.batch`. Legend: T tokens in the batch, U units, L tokens in the
longest tree of a group, B trees in a group, R rows of all groups with their padding.
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
class PackedLayout:
    """The units of a batch, seen as trees and as tokens. All int64, on the CPU."""

    units: Tensor  # (U, 4)
    first: Tensor  # (trees + 1,) first unit of each tree
    start: Tensor  # (trees,) first token
    size: Tensor  # (trees,) tokens
    own: Tensor  # (T,) where a token's own run starts
    prefix: Tensor  # (T, 2) the prefix it sees


def forest_of(units: Tensor, tokens: int) -> PackedLayout:
    """Cut the units of a batch into trees: a unit without a prefix begins one, the others join it.

    Raises:
        ValueError: units leave tokens out, overlap, or have a prefix outside their tree's first unit.
    """
    q0, q1, p0, p1 = units.unbind(1)
    edges = torch.cat((q0, q1[-1:]))
    if edges[0] != 0 or edges[-1] != tokens or bool((edges[1:] != q1).any() | (q0 >= q1).any()):
        raise ValueError(f"units do not cover 0..{tokens} one after another")
    is_root = p0 == p1
    if not is_root[0]:
        raise ValueError("the first unit has a prefix")
    roots = is_root.nonzero().squeeze(1)
    root = roots[is_root.cumsum(0) - 1]  # (U,) the unit that began its tree
    outside = ~is_root & ((p0 < q0[root]) | (p1 <= p0) | (p1 > q1[root]))
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise ValueError(f"unit {units[at].tolist()}: its prefix leaves the first unit of its tree")
    start = q0[roots]
    lengths = q1 - q0
    return PackedLayout(
        units=units,
        first=F.pad(roots, (0, 1), value=len(units)),
        start=start,
        size=torch.cat((start[1:], edges[-1:])) - start,
        own=q0.repeat_interleave(lengths),
        prefix=torch.where(is_root.unsqueeze(1), 0, units[:, 2:]).repeat_interleave(lengths, dim=0),
    )


def tree_mask(forest: PackedLayout, trees: Tensor) -> Tensor:
    """(B,) -> (B, L, L) bool: which keys each query sees. Padding sees itself (no empty softmax)."""
    start, size = forest.start[trees].unsqueeze(1), forest.size[trees].unsqueeze(1)
    place = torch.arange(int(size.max()))
    token = torch.where(place < size, start + place, 0)  # (B, L)
    own = torch.where(place < size, forest.own[token] - start, place)
    prefix = torch.where((place < size).unsqueeze(2), forest.prefix[token] - start.unsqueeze(2), 0)
    key, query = place.view(1, 1, -1), place.view(1, -1, 1)
    in_own = (key >= own.unsqueeze(2)) & (key <= query)
    return in_own | (key >= prefix[:, :, :1]) & (key < prefix[:, :, 1:])


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
    forest = forest_of(units, tokens)
    branched = (forest.first.diff() > 1).tolist()
    parts: list[Group | LongTree] = []
    rows, index = [], []
    inverse = torch.empty(tokens, dtype=torch.int64)
    first = 0  # row where the part begins
    for members in _groups(forest.size):
        trees = torch.tensor(members)
        size = forest.size[trees].unsqueeze(1)
        place = torch.arange(int(size.max()))
        real = place < size  # (B, L)
        token = torch.where(real, forest.start[trees].unsqueeze(1) + place, 0)
        inverse[token[real]] = first + real.flatten().nonzero().squeeze(1)
        index.append(token.flatten())
        if len(place) > LONG_TREE:
            parts.append(_long_tree(forest, members[0], device, dtype))
        elif bool(real.all()) and not any(branched[t] for t in members):
            parts.append(Group(len(members), len(place), None))
        else:
            mask = _additive(tree_mask(forest, trees).unsqueeze(1), device, dtype)
            parts.append(Group(len(members), len(place), mask))
        rows.append(token.numel())
        first += token.numel()
    index_all = torch.cat(index)
    if torch.equal(index_all, torch.arange(tokens)):
        return SdpaPlan(None, None, tuple(parts), tuple(rows))
    return SdpaPlan(index_all.to(device), inverse.to(device), tuple(parts), tuple(rows))


def _groups(sizes: Tensor) -> list[list[int]]:
    """Trees, longest first, cut into groups: long ones alone, the others with bounded padding."""
    groups: list[list[int]] = []
    longest, used = 0, 0
    order = sizes.argsort(descending=True, stable=True).tolist()
    for tree, size in zip(order, sizes[order].tolist(), strict=True):
        cells = (len(groups[-1]) + 1) * longest**2 if groups else 0
        if (
            longest > LONG_TREE
            or cells > MASK_ELEMENTS
            or used + size**2 < (1 - MAX_PADDING) * cells
            or not groups
        ):
            groups.append([])
            longest, used = size, 0
        groups[-1].append(tree)
        used += size**2
    return [sorted(group) for group in groups]


def _long_tree(
    forest: PackedLayout, tree: int, device: torch.device, dtype: torch.dtype
) -> LongTree:
    start = forest.start[tree]
    units = forest.units[forest.first[tree] : forest.first[tree + 1]]
    beginning = int(units[0, 1] - start)
    pieces: list[list[int]] = []  # first and last token of each
    for q0, q1 in (units[1:, :2] - start).tolist():
        width = q1 - pieces[-1][0] if pieces else 0
        if not pieces or width * (beginning + width) > MASK_ELEMENTS:
            pieces.append([q0, q1])
        pieces[-1][1] = q1
    masks = []
    for q0, q1 in pieces:
        key = torch.cat((torch.arange(beginning), torch.arange(q0, q1)))
        own = (forest.own[start + q0 : start + q1] - start).unsqueeze(1)
        prefix = forest.prefix[start + q0 : start + q1] - start
        in_own = (key >= own) & (key <= torch.arange(q0, q1).unsqueeze(1))
        mask = in_own | (key >= prefix[:, :1]) & (key < prefix[:, 1:])
        masks.append(_additive(mask[None, None], device, dtype))
    return LongTree((beginning, *(q1 - q0 for q0, q1 in pieces)), tuple(masks))


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
