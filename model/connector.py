"""The connector: from the width of the features to the width of the language model."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from configs import UserError, nearest

KINDS = ("linear", "mlp")


def build_connector(kind: str, vision_width: int, language_width: int) -> nn.Module:
    """(…, V) -> (…, D): `linear`, or `mlp` = linear, exact GELU, linear, as wide inside as outside.

    Averaging features before a linear connector is the same as after it, so pooled caches lose nothing
    to the order of the two.
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
