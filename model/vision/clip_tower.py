"""open_clip's vision towers, cut down to the blocks asked for: CLIP's own ViT, and timm's (SigLIP, SigLIP2).

A tower is built on the meta device, without the text tower. Its weights are set afterwards, from a file or a
seed. No weight is initialised twice, and ViT-L/14@336 takes seconds.

B images, S side of the input in pixels, N patches, V width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import open_clip
import torch
from open_clip.model import _build_vision_tower
from torch import nn

from configs import UserError, nearest
from model.io.tensors import seeded_weights
from model.vision.config import EncoderConfig

_ACTIVATIONS = {"QuickGELU": "quick_gelu", "GELU": "gelu", "GELUTanh": "gelu_tanh"}


class ClipTower(nn.Module):
    """A vision tower without weights: call `load` or `initialize` before `forward`."""

    def __init__(
        self,
        model: str,
        blocks: Sequence[int],
        *,
        keep_cls: bool = False,
        demo: EncoderConfig | None = None,
    ) -> None:
        """Build `model` and keep what `blocks` need.

        Args:
            model: open_clip's name.
            blocks: whose outputs are returned.
            keep_cls: whether they have the CLS token, if the tower has one.
            demo: the entry of a small CLIP whose sizes it states; None: open_clip knows the model.

        Raises:
            UserError: open_clip has no such model, it is not a plain ViT, or it has fewer blocks.
        """
        super().__init__()
        if demo is not None:
            config = _demo_config(demo)
        else:
            known = open_clip.list_models()
            if model not in known:  # for 'hf-hub:...' open_clip would use the network
                raise UserError(f"open_clip has no model {model!r}{nearest(model, known)}")
            config = open_clip.get_model_config(model)
        self.take, self.keep_cls = tuple(blocks), keep_cls
        with torch.device("meta"):
            visual = _build(config)
        self.is_timm = hasattr(visual, "trunk")
        named = [*visual.named_parameters(), *visual.named_buffers()]
        if set(visual.state_dict()) != {name for name, _ in named}:
            # Tables computed at construction (rotary positions) are in no file, so build them for real.
            visual = _build(config)
        vit: Any = visual.trunk if self.is_timm else visual
        self.total_parameters = sum(p.numel() for p in visual.parameters())
        layers = getattr(vit, "blocks", None) or getattr(
            getattr(vit, "transformer", None), "resblocks", None
        )
        if layers is None or not hasattr(vit, "prune_intermediate_layers"):
            raise UserError(f"open_clip's {model} is not a Vision Transformer: it has no blocks")
        if max(blocks) >= len(layers):
            raise UserError(
                f"blocks {list(blocks)}: {model} has {len(layers)} blocks, 0 to {len(layers) - 1}"
            )
        self.depth = len(layers)
        vit.prune_intermediate_layers(indices=sorted(blocks), prune_norm=True, prune_head=True)
        self.vit = vit
        self.image_size, self.patch_size = _sizes(visual, vit, model)
        self.width = int(vit.embed_dim if self.is_timm else vit.conv1.out_channels)
        self.activation = _activation(vit, model)
        self.prefix_tokens = int(vit.num_prefix_tokens) if self.is_timm else 1
        """Tokens before the patches: CLS, and in some of timm's towers registers."""
        sizes = "" if demo is None else f"-{self.depth}x{self.width}-heads{_heads(demo)}"
        self.architecture = f"open_clip:{model}{sizes}"

    @property
    def prefix(self) -> str:
        """Prefix of the tower's tensor names in a checkpoint of the whole model."""
        return "visual.trunk." if self.is_timm else "visual."

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return every tensor the features depend on, by open_clip's name without `prefix`."""
        return dict(self.vit.state_dict())

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the weights. Names and shapes must equal those of `tensors()`."""
        self.vit.load_state_dict(dict(tensors), strict=True, assign=True)

    def initialize(self, seed: int) -> None:
        """Set random weights, at about the scale of open_clip's own initialisation."""
        self.load({name: _random(name, t, self.width, seed) for name, t in self.tensors().items()})

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Return the output of each block of `blocks`, in that order: (B, 3, S, S) -> (B, N, V) each.

        Pixels are normalised. The outputs have no final norm, and the CLS token only with `keep_cls`.
        """
        keep = self.keep_cls and self.prefix_tokens > 0
        taken = self.vit.forward_intermediates(
            pixels,
            indices=sorted(self.take),
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            **{"return_prefix_tokens" if self.is_timm else "output_extra_tokens": keep},
        )
        if not self.is_timm:
            patches, before = (taken.get(f"image_intermediates{x}") for x in ("", "_prefix"))
            taken = list(zip(patches, before, strict=True)) if keep else patches
        if keep:  # pairs of patches and what precedes them
            taken = [torch.cat([first, rest], dim=1) for rest, first in taken]
        # Both libraries return blocks in ascending order, in whatever order `indices` are.
        by_block = dict(zip(sorted(self.take), taken, strict=True))
        return [by_block[block] for block in self.take]


def _demo_config(entry: EncoderConfig) -> dict[str, Any]:
    """Return the config of a CLIP of the sizes that an entry states, as open_clip's files have it."""
    sizes = entry.tower
    assert sizes is not None
    return {
        "embed_dim": sizes.width,
        "quick_gelu": entry.activation == "quick_gelu",
        "vision_cfg": {
            "image_size": sizes.image_size,
            "patch_size": sizes.patch_size,
            "width": sizes.width,
            "layers": sizes.depth,
            "head_width": sizes.width // sizes.heads,
            "mlp_ratio": float(sizes.mlp_ratio),
        },
    }


def _heads(entry: EncoderConfig) -> int:
    assert entry.tower is not None
    return entry.tower.heads


def _build(config: Mapping[str, Any]) -> nn.Module:
    # Some configs would download weights here.
    vision = {**config["vision_cfg"], "timm_model_pretrained": False}
    tower: nn.Module = _build_vision_tower(
        config["embed_dim"], vision, config.get("quick_gelu", False)
    )
    return tower


def _sizes(visual: Any, vit: Any, model: str) -> tuple[int, int]:
    """Return the side of the input and of a patch, pixels."""
    side, other_side = visual.image_size
    embed = getattr(vit, "patch_embed", vit)  # a layer of its own in timm
    patch, other_patch = embed.patch_size
    if side != other_side or patch != other_patch or tuple(embed.grid_size) != (side // patch,) * 2:
        raise UserError(
            f"open_clip's {model} does not cut a square input into a square grid of patches: "
            "not supported"
        )
    return int(side), int(patch)


def _activation(vit: nn.Module, model: str) -> str:
    """Return the activation of the MLPs, as built."""
    found = set()
    for module in vit.modules():
        kind = type(module).__name__  # timm has its own classes under these names
        if kind in _ACTIVATIONS:
            approximate = getattr(module, "approximate", "none") == "tanh"
            found.add("gelu_tanh" if approximate else _ACTIVATIONS[kind])
    if len(found) != 1:
        raise UserError(
            f"open_clip's {model} has activations {sorted(found) or 'of an unknown kind'}: not supported"
        )
    return found.pop()


def _random(name: str, like: torch.Tensor, width: int, seed: int) -> torch.Tensor:
    if name.endswith("bias"):
        return torch.zeros(like.shape)
    if name.endswith(("weight", "gamma")) and like.ndim == 1:  # norms, layer scales
        return torch.ones(like.shape)
    is_matrix = name.endswith("weight")
    fan_in = like[0].numel() if is_matrix else width  # else: class token, positions
    return seeded_weights(like.shape, fan_in**-0.5, seed=seed, name=name)
