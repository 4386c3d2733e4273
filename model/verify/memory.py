"""What one training step holds in memory and how long a stage takes, from first principles.

Legend: T tokens of a micro-batch, D width, Q = query heads x head width, K = key/value heads x head
width, I width inside the MLP, V vocabulary rows; s bytes of a computed value (4, or 2 under autocast).

What autograd keeps of one decoder layer, per token, as transformers writes it (norm -> q, k, v -> norm of
q and k -> rotation -> attention -> projection -> norm -> SwiGLU); `tests/model/test_verify.py` counts the
same bytes on a running model with saved-tensor hooks and finds the formula exact:

  float32, everything learns   two norms x (input, normalised, scaled) x 4 D; q (projected, normalised,
                               rotated) and attention's output x 4 Q; k (the same three) and v x 4 K;
                               gate, silu(gate), up, product x 4 I
  float32, frozen layer        without what only weight gradients need: 8 D + 12 Q + 12 K + 12 I
  bfloat16 autocast            the residual stream and norms stay float32, each linear layer keeps its own
                               2-byte copy of its input: 26 D + 10 Q + 10 K + 8 I
  autocast, frozen layer       8 D + 8 Q + 8 K + 6 I
  always                       4 bytes for each norm and each head's norm and softmax: 4 (2 + 2 Hq + Hkv)

Qwen3-0.6B under autocast: 82 KB a token a layer; measured elsewhere 76 KB in pure bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from model.loss import CHUNK_ELEMENTS

GIB = 2**30

GPU_CONTEXT_BYTES = GIB
"""CUDA context, kernels and cuBLAS workspace: 0.5 to 1 GiB on Ampere and later."""
WASTE = 0.05
"""Of activations: what an allocator cannot reuse. Qwen3-0.6B on the CPU, float32, 1,414 tokens: peak 15.1
GiB resident where this file says 15.6 (2026-11-23); not measured on a GPU."""
CPU_PROCESS_BYTES = 750 * 2**20
"""Python, torch and transformers once imported (measured: 0.73 GiB)."""
USABLE = 0.97
"""Share of a card's nominal GiB that a process gets."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the arithmetic needs to know of a language model with its connector."""

    width: int
    """D."""
    layers: int
    """Decoder layers."""
    heads: int
    """Query heads, Hq."""
    kv_heads: int
    """Key and value heads, Hkv."""
    head_dim: int
    """Values per head."""
    inner: int
    """I."""
    rows: int
    """V."""
    language: int
    """Parameters of the language model, a tied head counted once."""
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
    """How a step is run."""

    tokens: int
    """T, of one micro-batch."""
    checkpointing: bool
    """Whether only each layer's input is kept."""
    autocast: bool
    """bfloat16 matrix products beside float32 weights; False: everything float32."""
    gpu: bool
    """Adds what a CUDA process holds; False: a process on the CPU."""
    train_connector: bool = True
    """Whether the connector learns."""
    train_llm: bool = True
    """Whether the language model learns."""


def layer_bytes(sizes: Sizes, autocast: bool, learns: bool) -> int:
    """What autograd keeps of one decoder layer for one token; see the module's text."""
    d, i = sizes.width, sizes.inner
    q, k = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    small = 4 * (2 + 2 * sizes.heads + sizes.kv_heads)
    if autocast:
        if learns:
            return 26 * d + 10 * q + 10 * k + 8 * i + small
        return 8 * d + 8 * q + 8 * k + 6 * i + small
    if learns:
        return 24 * d + 16 * q + 16 * k + 16 * i + small
    return 8 * d + 12 * q + 12 * k + 12 * i + small


def step_bytes(sizes: Sizes, step: Step) -> dict[str, int]:
    """Bytes held at the worst moment of a step, by part: when the loss is known and nothing yet freed.

    Weights, gradients and both moments of AdamW are float32: 16 bytes for each parameter that learns.
    """
    learning = sizes.language * step.train_llm + sizes.connector * step.train_connector
    value = 2 if step.autocast else 4
    one_layer = layer_bytes(sizes, step.autocast, step.train_llm)
    # Backwards through one layer: gradients of the three MLP activations and of the residual stream.
    working = 3 * sizes.inner * value + 3 * sizes.width * 4
    kept = (
        sizes.layers * 4 * sizes.width + one_layer
        if step.checkpointing
        else sizes.layers * one_layer
    )
    ends = 5 * 4 * sizes.width  # embeddings, features put into them, final norm (3)
    activations = int(step.tokens * (kept + working + ends) * (1 + WASTE))
    matrix = sizes.rows * sizes.width
    # A chunk of logits: computed, in float32, exponentials; then the gradient of the head, float32,
    # to which under autocast each chunk's part is added as a bfloat16 matrix of its own.
    chunk = min(CHUNK_ELEMENTS, step.tokens * sizes.rows) * (8 + (2 if step.autocast else 0))
    loss = chunk + ((6 if step.autocast else 4) * matrix if step.train_llm else 0)
    if step.train_llm and sizes.tied:
        # When the backward pass arrives at the embedding its activations are gone, but there are the head's
        # gradient, the embedding's and their sum.
        loss = max(loss, 12 * matrix - activations)
    parts = {
        "weights": 4 * (sizes.language + sizes.connector),
        "gradients": 4 * learning,
        "AdamW": 8 * learning,
        "bf16 copies": 2 * (sizes.language - (not sizes.tied) * matrix) if step.autocast else 0,
        "activations": activations,
        "loss": loss,
        "process": GPU_CONTEXT_BYTES if step.gpu else CPU_PROCESS_BYTES,
    }
    return parts | {"total": sum(parts.values())}


def sample_flops(sizes: Sizes, tokens: int, supervised: int, train_llm: bool = True) -> float:
    """Floating point operations of the model for one sample, forwards and backwards.

    2 for each parameter a token meets, 2 x 2 Q for each key a query sees (causal: half the tokens); the
    head sees supervised positions only. Backwards costs twice that, or once for weights that are frozen.
    Recomputation under checkpointing is not counted: MFU is about the model's own work.
    """
    body = sizes.language - sizes.embeddings
    linear = tokens * 2.0 * (body + sizes.connector) + supervised * 2.0 * sizes.rows * sizes.width
    attention = tokens * sizes.layers * 4.0 * sizes.heads * sizes.head_dim * tokens / 2
    return linear * (3 if train_llm else 2) + attention * 3


def stage_days(flops_per_step: float, steps: int, peak_tflops: float, mfu: float) -> float:
    """Days of a stage on GPUs that each do `flops_per_step` at a share `mfu` of their peak."""
    return flops_per_step * steps / (peak_tflops * 1e12 * mfu) / 86_400
