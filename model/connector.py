"""The connector: maps features to the width of the language model.

    connector = build_connector("linear", 1024, 896)
    connector = build_connector("mlp:silu,no-bias", 1024, 896)       # as an imported model may have it

V vision width, D language width.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import nn
from transformers.activations import ACT2FN

from configs import UserError, nearest

KINDS = ("linear", "mlp")
ACTIVATIONS = (
    *(
        "gelu",
        "gelu_pytorch_tanh",
        "gelu_new",
        "gelu_fast",
        "quick_gelu",
        "relu",
        "relu6",
        "leaky_relu",
    ),
    *("silu", "swish", "mish", "tanh", "sigmoid", "linear"),
)
"""Activations of an `mlp`, by transformers' names: those without parameters. `linear` is none at all."""
NO_BIAS = ",no-bias"


@dataclass(frozen=True)
class ConnectorKind:
    """What the name of a kind says."""

    mlp: bool
    """Whether there are two layers."""
    activation: str = "linear"
    """Between them, one of ACTIVATIONS."""
    bias: bool = True
    """Whether the layers have biases."""

    def __str__(self) -> str:
        name = "mlp" if self.mlp else "linear"
        special = self.mlp and self.activation != "gelu"
        return name + f":{self.activation}" * special + NO_BIAS * (not self.bias)


def connector_kind(kind: str) -> ConnectorKind:
    """Return what a name says: `linear`, `mlp`, `mlp:ACTIVATION`, each with `,no-bias` or without.

    Raises:
        UserError: there is no such kind.
    """
    name, colon, activation = kind.removesuffix(NO_BIAS).partition(":")
    if name not in KINDS or (colon and name == "linear"):
        raise UserError(f"connector {kind!r} is none of {', '.join(KINDS)}{nearest(kind, KINDS)}")
    if colon and activation not in ACTIVATIONS:
        raise UserError(
            f"connector {kind!r}: its activation is none of {', '.join(ACTIVATIONS)}"
            f"{nearest(activation, ACTIVATIONS)}"
        )
    is_mlp = name == "mlp"
    return ConnectorKind(
        is_mlp, activation or ("gelu" if is_mlp else "linear"), not kind.endswith(NO_BIAS)
    )


def build_connector(kind: str, vision_width: int, language_width: int) -> nn.Module:
    """Return a module (..., V) -> (..., D): `linear`, or `mlp` (linear to D, exact GELU, linear).

    An `mlp` of an imported model may have another activation, and its layers no biases, see `connector_kind`.
    A linear connector commutes with averaging, so a pooled cache loses nothing by pooling before it.

    Raises:
        UserError: `kind` is unknown.
    """
    named = connector_kind(kind)
    module: nn.Module = nn.Linear(vision_width, language_width, bias=named.bias)
    if named.mlp:
        module = nn.Sequential(
            OrderedDict(
                linear_1=module,
                act=nn.GELU() if named.activation == "gelu" else ACT2FN[named.activation],
                linear_2=nn.Linear(language_width, language_width, bias=named.bias),
            )
        )
    module.kind = named  # type: ignore[assignment]  # a module takes any attribute
    return module


def kind_of(connector: nn.Module) -> ConnectorKind:
    """Return the kind of a connector that `build_connector` built."""
    kind = vars(connector)["kind"]
    assert isinstance(kind, ConnectorKind)
    return kind
