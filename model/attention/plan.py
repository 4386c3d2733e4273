"""What the attention of a packed batch needs and no layer changes, computed once a batch.

    unit            a run of tokens: its queries see the unit's prefix in full and the unit itself causally
    prefix          a range of earlier tokens, empty for the first unit of a tree
    tree            one plain sample (one unit), or one set of media with several annotations: a unit for the
                    beginning they share, then one unit, a *branch*, for each annotation. The prefix of a
                    branch is inside the beginning, so branches do not see each other
    PackedLayout    the units of a batch, looked up by tree and by token
    SdpaPart        trees padded to one length: one SDPA call; or a tree above `LONG_TREE` tokens: several
    AttentionPlan   both plans of a batch, each made when first used:
      SdpaPlan        for CPU, MPS, and CUDA without a kernel: parts
      VarlenPlan      for CUDA: one variable-length call over all units, keys gathered for each unit

Units are in the order of their tokens and cover all of them; the units of a tree are adjacent.

T tokens in the batch, U units, B trees in a group, L tokens in the longest of them, R rows of all groups with
their padding, K keys gathered for all units.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LONG_TREE = 1024
"""Longest tree that is padded into a group, tokens."""
MASK_ELEMENTS = 1 << 22
"""Most elements of one mask, 16 MiB in fp32. A mask for one tree or one branch may be larger."""
MAX_PADDING = 0.3
"""Largest share of padding in the score matrices of a group."""


@dataclass(frozen=True)
class PackedLayout:
    """The units of a batch, looked up by tree and by token. All int64, on the CPU."""

    units: Tensor  # (U, 4)
    first: Tensor  # (trees + 1,) first unit of each tree; the last entry is U
    start: Tensor  # (trees,) first token of each tree
    size: Tensor  # (trees,) tokens of each tree
    own: Tensor  # (T,) first token of each token's unit
    prefix: Tensor  # (T, 2) the prefix each token sees


def packed_layout(units: Tensor, tokens: int) -> PackedLayout:
    """Cut (U, 4) units into trees: a unit without a prefix begins a tree, the others join the last one.

    Raises:
        ValueError: units skip tokens, overlap, or have a prefix outside the first unit of their tree.
    """
    q0, q1, p0, p1 = units.unbind(1)
    edges = torch.cat((q0, q1[-1:]))
    if edges[0] != 0 or edges[-1] != tokens or bool((edges[1:] != q1).any() | (q0 >= q1).any()):
        raise ValueError(f"units do not cover 0..{tokens} one after another")
    is_root = p0 == p1
    if not is_root[0]:
        raise ValueError("the first unit has a prefix")
    roots = is_root.nonzero().squeeze(1)
    root = roots[is_root.cumsum(0) - 1]  # (U,) first unit of each unit's tree
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


def tree_mask(layout: PackedLayout, trees: Tensor) -> Tensor:
    """Return which keys each query sees, (B,) trees -> (B, L, L) bool.

    A padding query sees itself: a softmax over no key would be NaN.
    """
    start, size = layout.start[trees].unsqueeze(1), layout.size[trees].unsqueeze(1)
    place = torch.arange(int(size.max()))
    token = torch.where(place < size, start + place, 0)  # (B, L)
    own = torch.where(place < size, layout.own[token] - start, place)
    prefix = torch.where((place < size).unsqueeze(2), layout.prefix[token] - start.unsqueeze(2), 0)
    return _visible(place, place.unsqueeze(1), own.unsqueeze(2), prefix)


def _visible(key: Tensor, query: Tensor, own: Tensor, prefix: Tensor) -> Tensor:
    """Return which keys the queries see: (keys,), (..., n, 1), (..., n, 1), (..., n, 2) -> (..., n, keys)."""
    in_own = (key >= own) & (key <= query)
    return in_own | (key >= prefix[..., :1]) & (key < prefix[..., 1:])


@dataclass(frozen=True)
class SdpaPart:
    """Trees padded to one length, in one piece, or a long tree: its beginning, then runs of branches.

    The queries of a later piece see the keys of the first piece and of their own.
    """

    trees: int  # B
    sizes: tuple[int, ...]  # tokens of each piece; their sum is L
    # Additive, of each piece: (B, 1, L, L) if single, (1, 1, n, first piece + n) of a later one.
    # None: causal, without padding and branches.
    masks: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class SdpaPlan:
    """How SDPA computes a batch: gather tokens into rows, one part after another, gather rows into tokens."""

    index: Tensor | None  # (R,) token of each row, token 0 for padding; None: rows are the tokens
    inverse: Tensor | None  # (T,) row of each token; None with `index`
    parts: tuple[SdpaPart, ...]
    rows: tuple[int, ...]  # rows of each part


@dataclass(frozen=True)
class VarlenPlan:
    """How a variable-length kernel computes a batch: queries in order, keys gathered for each unit."""

    keys: Tensor | None  # (K,) token of each key; None: keys are the tokens
    cu_queries: Tensor  # (U + 1,) int32
    cu_keys: Tensor  # (U + 1,) int32
    max_queries: int
    max_keys: int


class AttentionPlan:
    """Both plans of one batch, each made when first used.

    Args:
        units: (U, 4) int64, see `PackedBatch.units`.
        tokens: T.
        device: of the queries.
        flash: whether CUDA may use a variable-length kernel.
    """

    def __init__(self, units: Tensor, tokens: int, device: torch.device, flash: bool = True):
        self.units, self.tokens, self.device, self.flash = units.cpu(), tokens, device, flash
        self._sdpa: dict[torch.dtype, SdpaPlan] = {}

    def sdpa(self, dtype: torch.dtype) -> SdpaPlan:
        """Return the plan for SDPA, with masks in the dtype of the queries.

        SDPA would convert a boolean mask in every layer.
        """
        if dtype not in self._sdpa:
            self._sdpa[dtype] = plan_sdpa(self.units, self.tokens, self.device, dtype)
        return self._sdpa[dtype]

    @functools.cached_property
    def varlen(self) -> VarlenPlan:
        """Plan for a variable-length kernel."""
        return plan_varlen(self.units, self.device)


def plan_sdpa(
    units: Tensor, tokens: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> SdpaPlan:
    """Group the trees of a batch into few SDPA calls with at most `MAX_PADDING` padding."""
    layout = packed_layout(units, tokens)
    branched = (layout.first.diff() > 1).tolist()
    parts: list[SdpaPart] = []
    rows, index = [], []
    inverse = torch.empty(tokens, dtype=torch.int64)
    first = 0  # first row of the part
    for members in _groups(layout.size):
        trees = torch.tensor(members)
        size = layout.size[trees].unsqueeze(1)
        place = torch.arange(int(size.max()))
        real = place < size  # (B, L)
        token = torch.where(real, layout.start[trees].unsqueeze(1) + place, 0)
        inverse[token[real]] = first + real.flatten().nonzero().squeeze(1)
        index.append(token.flatten())
        if len(place) > LONG_TREE:
            parts.append(_long_tree(layout, members[0], device, dtype))
        else:
            mask = None
            if not real.all() or any(branched[t] for t in members):
                mask = _additive(tree_mask(layout, trees).unsqueeze(1), device, dtype)
            parts.append(SdpaPart(len(members), (len(place),), (mask,)))
        rows.append(token.numel())
        first += token.numel()
    index_all = torch.cat(index)
    if torch.equal(index_all, torch.arange(tokens)):
        return SdpaPlan(None, None, tuple(parts), tuple(rows))
    return SdpaPlan(index_all.to(device), inverse.to(device), tuple(parts), tuple(rows))


def _groups(sizes: Tensor) -> list[list[int]]:
    """Cut the trees, longest first, into groups: long trees alone, the others with bounded padding."""
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
    layout: PackedLayout, tree: int, device: torch.device, dtype: torch.dtype
) -> SdpaPart:
    start = layout.start[tree]
    units = layout.units[layout.first[tree] : layout.first[tree + 1]]
    beginning = int(units[0, 1] - start)
    pieces: list[list[int]] = []  # first and last token of each
    for q0, q1 in (units[1:, :2] - start).tolist():
        width = q1 - pieces[-1][0] if pieces else 0
        if not pieces or width * (beginning + width) > MASK_ELEMENTS:
            pieces.append([q0, q1])
        pieces[-1][1] = q1
    masks: list[Tensor | None] = [None]
    for q0, q1 in pieces:
        key = torch.cat((torch.arange(beginning), torch.arange(q0, q1)))
        own = (layout.own[start + q0 : start + q1] - start).unsqueeze(1)
        prefix = layout.prefix[start + q0 : start + q1] - start
        mask = _visible(key, torch.arange(q0, q1).unsqueeze(1), own, prefix)
        masks.append(_additive(mask[None, None], device, dtype))
    return SdpaPart(1, (beginning, *(q1 - q0 for q0, q1 in pieces)), tuple(masks))


def _additive(mask: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    zero = torch.zeros(mask.shape, dtype=dtype)
    return zero.masked_fill_(~mask, float("-inf")).to(device)


def plan_varlen(units: Tensor, device: torch.device) -> VarlenPlan:
    """Return key indices and cumulative lengths: the keys of a unit are its prefix, then its own tokens."""
    q0, q1, p0, p1 = units.unbind(1)
    queries, prefixes = q1 - q0, p1 - p0
    lengths = queries + prefixes  # (U,) keys of each unit
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
