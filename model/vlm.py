"""The trained part of the model: connector and language model, on cached features, and perhaps a tail.

T tokens in a packed batch, N of them features of images and frames, S supervised predictions, V vision width,
D language width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from model.attention.batch import PackedBatch
from model.attention.kernels import register_packed_attention
from model.attention.plan import AttentionPlan
from model.connector import build_connector
from model.language import lora
from model.language.loss import weighted_cross_entropy
from model.language.model import load_language
from model.tail import StoredRows, VisionTail


class VLM(nn.Module):
    """Connector and language model, and the encoder's last blocks if the cache has what precedes them."""

    def __init__(
        self,
        language: PreTrainedModel,
        connector: nn.Module,
        vision_width: int,
        tail: VisionTail | None = None,
    ):
        super().__init__()
        self.language = language
        self.connector = connector
        self.tail = tail
        self.vision_width = vision_width
        self.flash = True
        """Whether CUDA may use a variable-length kernel; False: SDPA everywhere."""
        self.adapters: lora.Adapters | None = None
        """The adapters of the language model; None: it has none."""
        self.base_checksum = 0
        """`lora.weights_checksum` of the language model before it had adapters."""
        language.set_attn_implementation(register_packed_attention())

    def loss(
        self, batch: PackedBatch, features: Tensor | StoredRows | None
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of losses and the sum of weights, fp32 scalars.

        Only the first has a gradient.

        Args:
            batch: on the model's device.
            features: (N, V) or (images, tokens, V), in the order of `batch.image_slots`, or the stored rows
                of a space with a tail; None without images.

        Raises:
            ValueError: the number of features is not the number of image slots.
        """
        hidden = self.hidden(batch, features)  # (T, D)
        head = self.language.get_output_embeddings()
        total = weighted_cross_entropy(
            hidden.index_select(0, batch.loss_positions),  # (T, D) -> (S, D)
            head.weight,
            batch.targets,
            batch.loss_weights,
            head.bias,
        )
        return total, batch.loss_weights.sum(dtype=torch.float32)

    def hidden(self, batch: PackedBatch, features: Tensor | StoredRows | None) -> Tensor:
        """Return the final hidden states, (T, D)."""
        plan = AttentionPlan(batch.units, len(batch.input_ids), batch.input_ids.device, self.flash)
        # With a mask of ones, or with use_cache, samples would see each other without an error
        # (measured: loss 6.2742 instead of 6.2837).
        output = self.language.base_model(
            inputs_embeds=self.embed(batch.input_ids, batch.image_slots, features).unsqueeze(0),
            position_ids=batch.position_ids.unsqueeze(0),
            attention_mask=None,
            use_cache=False,
            packed=plan,
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def embed(
        self, input_ids: Tensor, image_slots: Tensor, features: Tensor | StoredRows | None
    ) -> Tensor:
        """Embed words, and put features through the connector into the slots: (T,), (N,), (N, V) -> (T, D).

        Stored rows pass through the tail first.

        Raises:
            ValueError: the number of features is not the number of slots.
        """
        words: Tensor = self.language.get_input_embeddings()(input_ids)
        if isinstance(features, StoredRows):
            assert self.tail is not None, "stored rows for a model without a tail"
            seen: Tensor = self.tail(features.rows)
            features = seen.index_select(0, features.order)
        if features is None or features.shape[0] == 0:
            if len(image_slots):
                raise ValueError(f"{len(image_slots)} image slots but no features")
            return words + self.unused().to(words.dtype)
        tokens = self.connector(features.to(self.dtype).flatten(0, -2))  # (..., V) -> (N, D)
        if len(tokens) != len(image_slots):
            raise ValueError(f"{len(image_slots)} image slots for {len(tokens)} features")
        return words.index_copy(0, image_slots, tokens.to(words.dtype))

    def unused(self) -> Tensor:
        """Return a zero that depends on every parameter through which features pass.

        So a batch without features gives them a gradient of zero, not None. AdamW skips a parameter without
        one, with a frozen language model backward() would have nothing to do, and several processes have to
        sum the gradients of the same parameters, whichever of them has features.
        """
        parameter = next(self.connector.parameters())
        nothing = parameter.new_zeros(1, self.vision_width)
        if self.tail is not None:
            nothing = self.tail({}).to(self.dtype)
        return 0.0 * self.connector(nothing).sum()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the connector's parameters."""
        return next(self.connector.parameters()).dtype

    def gradient_checkpointing(self, enabled: bool) -> None:
        """Keep only the input of each layer for the backward pass, and compute the rest again.

        Takes effect in training mode only.
        """
        if self.tail is not None:
            self.tail.checkpointing = enabled
        # transformers renamed the switch within 5.x.
        has_new_name = hasattr(self.language, "activation_checkpointing_enable")
        kind = "activation" if has_new_name else "gradient"
        if enabled:
            getattr(self.language, f"{kind}_checkpointing_enable")({"use_reentrant": False})
        else:
            getattr(self.language, f"{kind}_checkpointing_disable")()

    def add_adapters(self, rank: int, seed: int, *, load_in_4bit: bool = False) -> None:
        """Give the language model, on the CPU, adapters (LoRA); see `model.language.lora.add_adapters`."""
        self.base_checksum = lora.weights_checksum(self.language)
        self.adapters = lora.add_adapters(self.language, rank, seed=seed, load_in_4bit=load_in_4bit)

    def merge_adapters(self) -> None:
        """Add the adapters to the weights of the language model, which is then one like any other."""
        lora.merge_adapters(self.language)
        self.adapters = None

    def freeze(
        self, train_connector: bool, train_llm: bool, vision_blocks: int = 0
    ) -> dict[str, tuple[int, int]]:
        """Set which parts train. Return `parameter_counts`.

        Of a language model with adapters only those train, and of the tail its last `vision_blocks`.
        """
        self.connector.requires_grad_(train_connector)
        self.language.requires_grad_(train_llm and self.adapters is None)
        for parameter in lora.adapter_parameters(self.language).values():
            parameter.requires_grad_(train_llm)
        if self.tail is not None:
            self.tail.freeze(vision_blocks)
        return parameter_counts(self)


def parameter_counts(vlm: VLM) -> dict[str, tuple[int, int]]:
    """Return the trainable and the total parameters of `connector` and `language`.

    If there are any, also those of `adapters`, without which `language` counts, and of `tail`.
    """
    adapters = lora.adapter_parameters(vlm.language)
    parts = {
        "connector": list(vlm.connector.parameters()),
        "language": [p for n, p in vlm.language.named_parameters() if n not in adapters],
    }
    parts |= {"adapters": list(adapters.values())} if adapters else {}
    parts |= {} if vlm.tail is None else {"tail": list(vlm.tail.parameters())}
    return {
        name: (sum(p.numel() for p in part if p.requires_grad), sum(p.numel() for p in part))
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
    """Load a language model and give it a new connector. The global random state does not change.

    Args:
        vision_width: values per feature token, from the space's spec.
        llm_source: see `model.language.model.load_language`.
        connector: `linear` or `mlp`.
        seed: of the connector, and of a `random:` language model.
        dtype: of all parameters.
        device: `cpu`, or `meta` for shapes without values.

    Raises:
        UserError: the language model cannot be loaded, or the connector is of an unknown kind.
    """
    language, tokenizer = load_language(llm_source, dtype=dtype, seed=seed, device=device)
    width = language.get_input_embeddings().embedding_dim
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        new_connector = build_connector(connector, vision_width, width).to(dtype)
    return VLM(language, new_connector, vision_width), tokenizer
