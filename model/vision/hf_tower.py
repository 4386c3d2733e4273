"""transformers' vision towers, cut down to the blocks asked for: CLIP, SigLIP, DINOv2, DINOv3.

    tower = HfTower(read_tower_config(folder), blocks=(8,))
    tower.load(read_tensors(open_tower(folder), (8,)))
    (features,) = tower(pixels)          # hidden_states[9] of the class in transformers, patches alone

A tower is built on the meta device, as deep as the last block asked for, without the norm behind it. Its
tensors have the names of published checkpoints: see model.io.tower_folder.

B images, S side of the input in pixels, N patches, V width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.io.tensors import seeded_weights
from model.io.tower_config import TowerConfig
from model.io.tower_folder import (
    architecture,
    check_blocks,
    class_tensors,
    empty_tower,
    published,
)

BEHIND = ("post_layernorm", "layernorm", "norm")
"""Names of the norm behind the last block."""


class HfTower(nn.Module):
    """A vision tower without weights: call `load` before `forward`."""

    def __init__(
        self,
        config: TowerConfig,
        blocks: Sequence[int],
        image_size: int,
        *,
        keep_cls: bool = False,
    ) -> None:
        """Build the tower, up to the last block asked for.

        Args:
            config: of its folder.
            blocks: whose outputs are features.
            image_size: side of the input, pixels; DINOv2 interpolates its positions to it.
            keep_cls: whether the outputs have what precedes the patches.

        Raises:
            UserError: it has fewer blocks, or its config makes no tower.
        """
        super().__init__()
        check_blocks(config, blocks)
        self.take, self.keep_cls = tuple(blocks), keep_cls
        self.kind = config.kind
        self.image_size, self.patch_size = image_size, config.patch_size
        self.width, self.depth = config.width, config.depth
        self.activation = config.activation
        self.architecture = architecture(config)
        self.prefix_tokens = config.prefix_tokens
        self.total_parameters = sum(p.numel() for p in empty_tower(config).parameters())
        self.vit = _without_norm(empty_tower(config, max(blocks) + 1))
        self._shapes = published(self.vit, self.kind)
        self._exact = _fill_buffers(self.vit)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the weights: those that the features depend on, by published name, float32."""
        found = {name: tuple(value.shape) for name, value in tensors.items()}
        assert found == self._shapes, "open_tower compares them"
        state = class_tensors(self.vit, self.kind, tensors)
        self.vit.load_state_dict(state, strict=True, assign=True)

    def random_tensors(self, seed: int) -> dict[str, Tensor]:
        """Return random weights, at about the scale of trained ones."""
        return {
            name: _random(name, shape, self.width, seed) for name, shape in self._shapes.items()
        }

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks."""
        return next(
            m
            for m in self.vit.modules()
            if isinstance(m, nn.ModuleList) and len(m) > max(self.take)
        )

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Return the output of each block of `blocks`, in that order: (B, 3, S, S) -> (B, N, V) each.

        Pixels are normalised. The outputs have no final norm, and CLS and registers only with `keep_cls`.
        """
        after: dict[int, Tensor] = {}

        def keep(block: int) -> Callable[[Any, Any, Any], None]:
            def hook(_module: Any, _given: Any, output: Any) -> None:
                after[block] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [self.layers[block].register_forward_hook(keep(block)) for block in self.take]
        try:
            self.vit(pixels)
        finally:
            for handle in handles:
                handle.remove()
        first = 0 if self.keep_cls else self.prefix_tokens
        return [after[block][:, first:] for block in self.take]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HfTower:
        super()._apply(fn, recurse)
        # Tables of numbers that are no weights: angles in float16 would be others.
        for module, name, value in self._exact:
            setattr(module, name, value.to(getattr(module, name).device))
        return self


def _without_norm(vit: nn.Module) -> nn.Module:
    """Return the tower without what no feature of a patch depends on."""
    for module in list(vit.modules()):
        for name in BEHIND:
            if isinstance(getattr(module, name, None), nn.LayerNorm):
                setattr(module, name, nn.Identity())
        if isinstance(getattr(module, "mask_token", None), nn.Parameter):
            setattr(module, "mask_token", None)  # noqa: B010 - by the name that is looked for above
    return vit


def _fill_buffers(vit: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Set the tables that are in no file, such as positions; return module, name, value of each."""
    found = []
    for module in vit.modules():
        names = [name for name, value in module.named_buffers(recurse=False) if value.is_meta]
        if not names:
            continue
        with torch.random.fork_rng(devices=[]):  # its weights are drawn, and not used
            made = type(module)(module.config)
        for name in names:
            value = made.get_buffer(name)
            setattr(module, name, value)
            found.append((module, name, value))
    return found


def _random(name: str, shape: tuple[int, ...], width: int, seed: int) -> Tensor:
    """Return a random tensor of a tower without trained weights."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1 and name.endswith(("weight", "lambda1")):  # norms, layer scales
        return torch.ones(shape)
    is_matrix = name.endswith("weight") and "position" not in name
    fan_in = torch.Size(shape[1:]).numel() if is_matrix else width  # else: tokens, positions
    return seeded_weights(shape, fan_in**-0.5, seed=seed, name=name)
