"""LLaVA that drops register tokens and averages windows of patches before its projector.

    AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)

A copy of this file is in the exported folder. It needs transformers 5 and nothing else. The processor is
LlavaProcessor, whose `patch_size` is the side of a window in pixels.

B images, N patches, V width of features, D width of the language model.
"""

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

FP16_MAX = 65504.0


class PooledLlavaConfig(LlavaConfig):
    """The config of LLaVA with the side of the windows."""

    model_type = "pooled_llava"

    pool_size: int = 1
    """Patches along one side of a window, which becomes one token."""
    register_tokens: int = 0
    """Tokens between CLS and the patches, which are dropped."""
    pool_rounded: bool = True
    """Whether values are rounded to float16 before they are averaged, as where features are stored pooled."""


class PooledProjector(LlavaMultiModalProjector):
    """LLaVA's projector behind the pooling."""

    def __init__(self, config: PooledLlavaConfig) -> None:
        super().__init__(config)
        self.pool_size = config.pool_size
        self.register_tokens = config.register_tokens
        self.pool_rounded = config.pool_rounded

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """Average and project features: (B, registers + N, V) -> (B, N / pool_size^2, D)."""
        image_features = image_features[:, self.register_tokens :]
        size = self.pool_size
        if size == 1:
            alone: torch.Tensor = super().forward(image_features)
            return alone
        batch, patches, width = image_features.shape
        side = round(patches**0.5) // size
        # As in training: values of stored features are rounded to float16 first, and summed in one order.
        values = image_features.float()
        if self.pool_rounded:
            values = values.clamp(-FP16_MAX, FP16_MAX).half().float()
        blocks = values.view(batch, side, size, side, size, width)
        total = torch.zeros(batch, side, side, width, device=image_features.device)
        for row in range(size):
            for column in range(size):
                total = total + blocks[:, :, row, :, column]
        pooled = total.mul(1 / size**2).flatten(1, 2)
        projected: torch.Tensor = super().forward(pooled.to(image_features.dtype))
        return projected


class PooledLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA with pooled image features."""

    config_class = PooledLlavaConfig

    def __init__(self, config: PooledLlavaConfig) -> None:
        super().__init__(config)
        self.model.multi_modal_projector = PooledProjector(config)
        self.post_init()
