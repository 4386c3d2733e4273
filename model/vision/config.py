"""One entry of configs/encoders.yaml: the vision tower, and how it encodes an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from configs import UserError, build, load, nearest, where_is


@dataclass(frozen=True, kw_only=True)
class DemoTowerConfig:
    """Sizes of the demo tower, and scales of its random weights."""

    image_size: int
    """Side of the input, pixels."""
    patch_size: int
    """Side of a patch, pixels."""
    width: int
    """Values per token."""
    depth: int
    """Transformer blocks."""
    heads: int
    """Attention heads in each block."""
    mlp_ratio: int = 4
    """Width of the MLP's hidden layer, as a multiple of `width`."""
    patch_gain: float = 1.0
    """Standard deviation of the patch embeddings of white noise with variance 1."""
    position_gain: float = 1.0
    """Standard deviation of the position embeddings."""
    attention_gain: float = 1.0
    """Standard deviation of queries and keys; larger values give sharper attention."""
    residual_gain: float = 1.0
    """Factor on the outputs of attention and MLP, which are added to the residual stream."""

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "width", "depth", "heads", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """One frozen encoder. Changing any value except `name` makes another feature space."""

    name: str
    """Key of the entry; the first part of a space's folder name."""
    library: Literal["open_clip", "demo"]
    """Library that builds the tower: `open_clip` (CLIP, SigLIP, SigLIP2), or `demo` for the random tower."""
    activation: Literal["quick_gelu", "gelu", "gelu_tanh"]
    """Activation of the MLPs that the weights were trained with.

    `model.vision.activation_check` compares it with the model as built and with all records of the weights,
    because a mismatch gives wrong features without an error.
    """
    blocks: tuple[int, ...]
    """Blocks (0-based) whose outputs are concatenated, in this order: 22 is `hidden_states[-2]` of 24."""
    model: str = ""
    """open_clip's model name; OpenAI's weights need the ones that end in `-quickgelu`."""
    pretrained: str = ""
    """open_clip's tag of the weights, which also defines mean and standard deviation."""
    mean: tuple[float, float, float] | None = None
    """Mean colour in [0, 1]; None: that of the tag, .5 for the demo tower."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of the colours; None: that of the tag, .5 for the demo tower."""
    fit: Literal["squash", "pad", "crop"] = "squash"
    """How an image becomes square: squash (aspect ratio ignored), pad (mean colour), crop (centre)."""
    pool_image: int = 1
    """Images: side of the pooling window; n x n patches become one token, their mean."""
    pool_frame: int = 3  # as Molmo2 pools frames
    """Video frames: side of the pooling window."""
    batch_size: int = 8
    """Images in each batch; the last batch is padded. Part of the fingerprint: in bf16, features from batches
    of 1 and of 8 differ by 1 %."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision; `auto`: float16 on GPUs, bfloat16 on CPUs that support it, else float32."""
    seed: int = 0
    """Seed of random weights; unused with trained ones."""
    tower: DemoTowerConfig | None = None
    """Sizes of the demo tower; None for open_clip."""

    def __post_init__(self) -> None:
        if not self.blocks or len(set(self.blocks)) != len(self.blocks):
            raise ValueError(f"blocks {list(self.blocks)}: name each block once, and at least one")
        if min(self.blocks) < 0:
            raise ValueError(f"blocks {list(self.blocks)}: count from 0, at the first block")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        if self.library == "open_clip" and not self.model:
            raise ValueError("library open_clip needs a model")
        if (self.library == "demo") != (self.tower is not None):
            raise ValueError("library demo, and no other, needs a tower")
        if self.tower is not None and self.activation != "gelu":
            raise ValueError(f"the demo tower computes gelu, not {self.activation}")

    def check_weights(self, weights: str | None, random_weights: bool) -> None:
        """Refuse weights that would not be loaded.

        Args:
            weights: file or folder that a user named, if any.
            random_weights: whether the user asked for untrained weights.

        Raises:
            UserError: `weights` is given, and so is `random_weights`, or the encoder has no others.
        """
        if weights is None:
            return
        if self.library == "demo":
            raise UserError(
                f"--weights {weights}: encoder {self.name} has random weights and loads none; leave out "
                "--weights, or name the encoder of these weights with --encoder NAME"
            )
        if random_weights:
            raise UserError(
                f"--weights {weights}: --random-weights loads none; leave out one of the two"
            )


def encoder_config(name: str, **overrides: Any) -> EncoderConfig:
    """Return the entry `name` of configs/encoders.yaml. Overrides that are not None replace its values.

    Raises:
        UserError: there is no such entry, or a value is invalid.
    """
    entries = load("encoders")
    where = where_is("encoders", name)
    if name not in entries:
        raise UserError(
            f"encoder {name!r} is not in {where} (there are: {', '.join(map(str, entries))})"
            f"{nearest(name, map(str, entries))}"
        )
    entry = entries[name]
    if not isinstance(entry, Mapping):
        raise UserError(f"{where}: {name}: expected keys and values")
    given = {key: value for key, value in overrides.items() if value is not None}
    return build(EncoderConfig, {"name": name, **entry, **given}, f"{where}: {name}")
