"""The trained half of the model: connector and language model, fed with cached features.

Legend: T tokens in a packed batch, N of them features of images and frames, V vision width,
D language width, S supervised predictions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from model.attention.batch import PackedBatch
from model.attention.kernels import register_packed_attention
from model.attention.plan import AttentionPlan
from model.connector import build_connector
from model.language.model import load_language
from model.loss import weighted_cross_entropy


class VLM(nn.Module):
    """Connector and language model."""

    def __init__(self, language: PreTrainedModel, connector: nn.Module, vision_width: int):
        super().__init__()
        self.language = language
        self.connector = connector
        self.vision_width = vision_width
        self.flash = True
        """Use a variable-length CUDA kernel where there is one; False = SDPA everywhere."""
        language.set_attn_implementation(register_packed_attention())

    def forward(self, batch: PackedBatch, features: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same as `loss`."""
        return self.loss(batch, features)

    def loss(self, batch: PackedBatch, features: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weighted loss sum and sum of weights, both fp32 scalars; only the first has a gradient.

        Args:
            batch: on the model's device.
            features: (N, V) of the batch's images and frames, in the order of their places; also
                (images, tokens an image, V). None when it has none.
        """
        hidden = self.hidden(batch, features)
        head = self.language.get_output_embeddings()
        total = weighted_cross_entropy(
            hidden.index_select(0, batch.loss_positions),
            head.weight,
            batch.targets,
            batch.loss_weights,
            head.bias,
        )
        return total, batch.loss_weights.sum(dtype=torch.float32)

    def hidden(self, batch: PackedBatch, features: Tensor | None) -> Tensor:
        """(T, D) final hidden states."""
        plan = AttentionPlan(batch.units, len(batch.input_ids), batch.input_ids.device, self.flash)
        # use_cache and a mask of ones would both silently let samples see each other.
        output = self.language.base_model(
            inputs_embeds=self.embed(batch.input_ids, batch.image_slots, features).unsqueeze(0),
            position_ids=batch.position_ids.unsqueeze(0),
            attention_mask=None,
            use_cache=False,
            packed=plan,
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def embed(self, input_ids: Tensor, image_slots: Tensor, features: Tensor | None) -> Tensor:
        """(T,), (N,), (N, V) -> (T, D): words, and features through the connector at the slots."""
        words: Tensor = self.language.get_input_embeddings()(input_ids)
        if features is None or features.shape[0] == 0:
            if len(image_slots):
                raise ValueError(f"{len(image_slots)} image slots but no features")
            # A batch without images gives the connector a gradient of zero, not None. AdamW skips a parameter
            # without a gradient, and with a frozen language model backward() would have nothing to do.
            unused = self.connector(words.new_zeros(1, self.vision_width, dtype=self.dtype))
            return words + 0.0 * unused.sum().to(words.dtype)
        tokens = self.connector(features.to(self.dtype).flatten(0, -2))  # (..., V) -> (N, D)
        if len(tokens) != len(image_slots):
            raise ValueError(f"{len(image_slots)} image slots for {len(tokens)} features")
        return words.index_copy(0, image_slots, tokens.to(words.dtype))

    @property
    def dtype(self) -> torch.dtype:
        """Of the connector's parameters."""
        return next(self.connector.parameters()).dtype

    def gradient_checkpointing(self, enabled: bool) -> None:
        """Keep only each layer's input for the backward pass and compute the rest again."""
        # transformers renamed the switch within 5.x; both take effect in training mode only.
        kind = (
            "activation"
            if hasattr(self.language, "activation_checkpointing_enable")
            else "gradient"
        )
        if enabled:
            getattr(self.language, f"{kind}_checkpointing_enable")({"use_reentrant": False})
        else:
            getattr(self.language, f"{kind}_checkpointing_disable")()

    def freeze(self, train_connector: bool, train_llm: bool) -> dict[str, tuple[int, int]]:
        """Say what learns; returns trainable and total parameters per part, for the log."""
        self.connector.requires_grad_(train_connector)
        self.language.requires_grad_(train_llm)
        return parameter_counts(self)


def parameter_counts(vlm: VLM) -> dict[str, tuple[int, int]]:
    """Trainable and total parameters of connector and language model."""
    parts = {"connector": vlm.connector, "language": vlm.language}
    return {
        name: (
            sum(p.numel() for p in part.parameters() if p.requires_grad),
            sum(p.numel() for p in part.parameters()),
        )
        for name, part in parts.items()
    }


def build_vlm(
    vision_width: int,
    llm_source: str,
    connector: str,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[VLM, PreTrainedTokenizerFast]:
    """A language model with a fresh connector; the global random state is left alone.

    Args:
        vision_width: values per feature token, from the space's spec.
        llm_source: see `model.language.load_language`.
        connector: `linear` or `mlp`.
        seed: of the connector, and of the language model when it is a `random:` one.
        dtype: of all parameters.
        device: `cpu`, or `meta` for the shapes alone.
    """
    language = load_language(llm_source, dtype=dtype, seed=seed, device=device)
    width = language.model.get_input_embeddings().embedding_dim
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        bridge = build_connector(connector, vision_width, width).to(dtype)
    return VLM(language.model, bridge, vision_width), language.tokenizer
