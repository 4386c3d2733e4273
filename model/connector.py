"""The connector: maps features to the width of the language model.

V vision width, D language width.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from configs import UserError, nearest

KINDS = ("linear", "mlp")


def build_connector(kind: str, vision_width: int, language_width: int) -> nn.Module:
    """Return a module (..., V) -> (..., D): `linear`, or `mlp` (linear to D, exact GELU, linear).

    A linear connector commutes with averaging, so a pooled cache loses nothing by pooling before it.

    Raises:
        UserError: `kind` is unknown.
    """
    if kind == "linear":
        return nn.Linear(vision_width, language_width)
    if kind == "mlp":
        return nn.Sequential(
            OrderedDict(
                linear_1=nn.Linear(vision_width, language_width),
                act=nn.GELU(),
                linear_2=nn.Linear(language_width, language_width),
            )
        )
    raise UserError(f"connector {kind!r} is none of {', '.join(KINDS)}{nearest(kind, KINDS)}")
