"""Estimate the memory of one training step and the days of a stage from the model's sizes.

T tokens of a micro-batch, D width, Hq query heads, Hkv key and value heads, Q = Hq x head width, K = Hkv x
head width, I width inside the MLP, V vocabulary rows.

Bytes that autograd keeps of one decoder layer, per token, as transformers writes the layer (norm; q, k, v;
norm of q and k; rotary positions; attention; projection; norm; SwiGLU). `tests/model/test_verify.py` counts
the bytes of a running model with saved-tensor hooks, and the formula is exact:

  float32, layer trains        two norms x (input, normalised, scaled) x 4 D; q (projected, normalised,
                               rotated) and attention's output x 4 Q; k (these three) and v x 4 K;
                               gate, silu(gate), up, product x 4 I
  float32, frozen layer        without the inputs of weight gradients: 8 D + 12 Q + 12 K + 12 I
  bfloat16 autocast            the residual stream and norms stay float32, each linear layer keeps its own
                               2-byte copy of its input: 26 D + 10 Q + 10 K + 8 I
  autocast, frozen layer       8 D + 8 Q + 8 K + 6 I
  always                       4 bytes for each norm, and for each head's norm and softmax: 4 (2 + 2 Hq + Hkv)

Qwen3-0.6B under autocast: 82 KB a token a layer. Measured elsewhere in pure bfloat16: 76 KB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from model.language.loss import CHUNK_ELEMENTS

GIB = 2**30

GPU_CONTEXT_BYTES = GIB
"""CUDA context, kernels and cuBLAS workspace: 0.5 to 1 GiB on Ampere and later."""
WASTE = 0.05
"""Share of activation memory that the allocator cannot reuse.

Qwen3-0.6B on the CPU, float32, 1,414 tokens: at most 15.1 GiB resident, and 15.6 GiB by this file
(2026-11-23). On an H100 the totals are 2 to 8 % off, see docs/BENCHMARKS.md (2026-11-26).
"""
CPU_PROCESS_BYTES = 750 * 2**20
"""A Python process with torch and transformers imported (measured: 0.73 GiB)."""
USABLE = 0.97
"""Share of a GPU's nominal GiB that a process can use."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a language model with its connector."""

    width: int
    """Width of the residual stream, D."""
    layers: int
    """Decoder layers."""
    heads: int
    """Query heads, Hq."""
    kv_heads: int
    """Key and value heads, Hkv."""
    head_dim: int
    """Values per head."""
    inner: int
    """Width inside the MLP, I."""
    rows: int
    """Rows of the vocabulary, V."""
    language: int
    """Parameters of the language model; a tied head counts once."""
    connector: int
    """Parameters of the connector."""
    tied: bool
    """Whether the head is the embedding."""

    @property
    def embeddings(self) -> int:
        """Parameters of embedding and head."""
        return self.rows * self.width * (1 if self.tied else 2)


def sizes_of(config: Any, language: int, connector: int) -> Sizes:
    """Read a transformers config; `language` and `connector` are parameter counts."""
    heads = config.num_attention_heads
    return Sizes(
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        inner=config.intermediate_size,
        rows=config.vocab_size,
        language=language,
        connector=connector,
        tied=bool(config.tie_word_embeddings),
    )


@dataclass(frozen=True, kw_only=True)
class Step:
    """Settings of a training step."""

    tokens: int
    """Tokens of one micro-batch, T."""
    checkpointing: bool
    """Whether only the input of each layer is kept."""
    gpu: bool
    """Whether the process runs on CUDA, under bfloat16 autocast; False: on the CPU, all in float32."""
    train_connector: bool = True
    """Whether the connector trains."""
    train_llm: bool = True
    """Whether the language model trains."""


def layer_bytes(sizes: Sizes, autocast: bool, trains: bool) -> int:
    """Return the bytes that autograd keeps of one decoder layer for one token, by this module's table."""
    d, i = sizes.width, sizes.inner
    q, k = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    small = 4 * (2 + 2 * sizes.heads + sizes.kv_heads)
    if autocast:
        if trains:
            return 26 * d + 10 * q + 10 * k + 8 * i + small
        return 8 * d + 8 * q + 8 * k + 6 * i + small
    if trains:
        return 24 * d + 16 * q + 16 * k + 16 * i + small
    return 8 * d + 12 * q + 12 * k + 12 * i + small


def step_bytes(sizes: Sizes, step: Step) -> dict[str, int]:
    """Return the bytes of each part at the peak of a step: after the loss, before the backward pass.

    Weights, gradients and both moments of AdamW are float32: 16 bytes for each parameter that trains.

    Returns:
        `weights`, `gradients`, `AdamW`, `bf16 copies`, `activations`, `loss`, `process`, and their `total`.
    """
    trainable = sizes.language * step.train_llm + sizes.connector * step.train_connector
    value = 2 if step.gpu else 4
    one_layer = layer_bytes(sizes, step.gpu, step.train_llm)
    # The backward pass of one layer: gradients of three MLP activations and of the residual stream.
    working = 3 * sizes.inner * value + 3 * sizes.width * 4
    kept = sizes.layers * one_layer
    if step.checkpointing:
        kept = sizes.layers * 4 * sizes.width + one_layer
    ends = 5 * 4 * sizes.width  # embeddings, embeddings with features, final norm (3)
    activations = int(step.tokens * (kept + working + ends) * (1 + WASTE))
    matrix = sizes.rows * sizes.width
    # A chunk has its logits and their exponentials in float32, and under autocast the bfloat16 logits. The
    # gradient of the head is float32; under autocast each chunk adds a bfloat16 matrix to it.
    chunk = min(CHUNK_ELEMENTS, step.tokens * sizes.rows) * (8 + (2 if step.gpu else 0))
    loss = chunk + ((6 if step.gpu else 4) * matrix if step.train_llm else 0)
    if step.train_llm and sizes.tied:
        # When the backward pass reaches the embedding, activations are freed, but the gradients of head and
        # embedding and their sum exist together.
        loss = max(loss, 12 * matrix - activations)
    parts = {
        "weights": 4 * (sizes.language + sizes.connector),
        "gradients": 4 * trainable,
        "AdamW": 8 * trainable,
        "bf16 copies": 2 * (sizes.language - (not sizes.tied) * matrix) if step.gpu else 0,
        "activations": activations,
        "loss": loss,
        "process": GPU_CONTEXT_BYTES if step.gpu else CPU_PROCESS_BYTES,
    }
    return parts | {"total": sum(parts.values())}


def sample_flops(sizes: Sizes, tokens: int, supervised: int, train_llm: bool = True) -> float:
    """Return the floating-point operations of one sample, forward and backward.

    Forward: 2 for each parameter and token (for the head, supervised tokens only), and 4 Q for each key
    that a query sees (half the tokens, because attention is causal). Backward: twice that, or once for frozen
    weights. Recomputation by checkpointing is not counted, as MFU is defined without it.
    """
    body = sizes.language - sizes.embeddings
    linear = tokens * 2.0 * (body + sizes.connector) + supervised * 2.0 * sizes.rows * sizes.width
    attention = tokens * sizes.layers * 4.0 * sizes.heads * sizes.head_dim * tokens / 2
    return linear * (3 if train_llm else 2) + attention * 3


def stage_days(flops_per_step: float, steps: int, peak_tflops: float, mfu: float) -> float:
    """Return the days of a stage on GPUs that each compute `flops_per_step` at `mfu` of their peak."""
    return flops_per_step * steps / (peak_tflops * 1e12 * mfu) / 86_400
