"""A tiny Vision Transformer with random, seeded weights: the encoder that needs no download.

Plain pre-LN: patches + positions, then blocks of x + attention(norm(x)), x + mlp(norm(x)). Random features
still show which colours and edges are where, which is enough for the demo.

B images, S side of the input in pixels, N patches, V width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from configs import UserError
from model.io.tensors import seeded_weights
from model.vision.config import DemoTowerConfig


class DemoTower(nn.Module):
    """The tower, up to the last block asked for."""

    def __init__(self, config: DemoTowerConfig, blocks: Sequence[int], *, seed: int) -> None:
        super().__init__()
        if max(blocks) >= config.depth:
            raise UserError(
                f"blocks {list(blocks)}: the demo tower has {config.depth} blocks, "
                f"0 to {config.depth - 1}"
            )
        self.take = tuple(blocks)
        # For the fingerprint; the shapes of the weights do not show the number of heads.
        self.architecture = f"demo:vit-{config.depth}x{config.width}-heads{config.heads}"
        self.activation = "gelu"
        self.image_size, self.patch_size = config.image_size, config.patch_size
        self.width, self.depth = config.width, config.depth
        grid = config.image_size // config.patch_size
        self.patches = nn.Conv2d(
            3, config.width, config.patch_size, stride=config.patch_size, bias=False
        )
        self.positions = nn.Parameter(torch.empty(grid * grid, config.width))
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.total_parameters = sum(p.numel() for p in self.parameters())
        del self.blocks[max(blocks) + 1 :]
        self._initialize(config, seed)

    def _initialize(self, config: DemoTowerConfig, seed: int) -> None:
        """Set each weight from the seed and its name, so that `blocks` changes no weight."""
        by_width = config.width**-0.5
        std = {
            "patches": config.patch_gain * (3 * config.patch_size**2) ** -0.5,
            "positions": config.position_gain,
            "queries_keys": config.attention_gain * by_width,
            "values": by_width,
            "attended": config.residual_gain * by_width,
            "expand": by_width,
            "contract": config.residual_gain * (config.width * config.mlp_ratio) ** -0.5,
        }
        with torch.no_grad():
            for name, weight in self.named_parameters():
                kind = name.removesuffix(".weight").rpartition(".")[2]
                weight.copy_(seeded_weights(weight.shape, std[kind], seed=seed, name=name))

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Return the output of each block of `blocks`, in that order: (B, 3, S, S) -> (B, N, V) each."""
        x = self.patches(pixels).flatten(2).transpose(1, 2) + self.positions  # -> (B, N, V)
        after = []
        for block in self.blocks:
            x = block(x)
            after.append(x)
        return [after[index] for index in self.take]


class _Block(nn.Module):
    def __init__(self, config: DemoTowerConfig) -> None:
        super().__init__()
        width, inner = config.width, config.width * config.mlp_ratio
        self.heads = config.heads
        self.queries_keys = nn.Linear(width, 2 * width, bias=False)
        self.values = nn.Linear(width, width, bias=False)
        self.attended = nn.Linear(width, width, bias=False)
        self.expand = nn.Linear(width, inner, bias=False)
        self.contract = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = F.layer_norm(x, x.shape[-1:])
        queries, keys = self.queries_keys(normed).chunk(2, dim=-1)
        queries, keys, values = (  # (B, N, V) -> (B, heads, N, V / heads)
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (queries, keys, self.values(normed))
        )
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        # (B, heads, N, V / heads) -> (B, N, V)
        x = x + self.attended(mixed.transpose(1, 2).flatten(2))
        return x + self.contract(F.gelu(self.expand(F.layer_norm(x, x.shape[-1:]))))
