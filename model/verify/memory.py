"""Estimate the memory of one training step and the days of a stage from the model's sizes.

T tokens of a micro-batch, D width, Hq query heads, Hkv key and value heads, Q = Hq x head width, K = Hkv x
head width, I width inside the MLP, V vocabulary rows, R rank of adapters.

Bytes that autograd keeps of one decoder layer, per token, as transformers writes the layer (norm; q, k, v;
norm of q and k; rotary positions; attention; projection; norm; SwiGLU). `tests/model/verify` counts the bytes
of a running model with saved-tensor hooks, and the formula is exact:

  float32, layer trains        two norms x (input, normalised, scaled) x 4 D; q (projected, normalised,
                               rotated) and attention's output x 4 Q; k (these three) and v x 4 K;
                               gate, silu(gate), up, product x 4 I
  float32, frozen layer        without the inputs of weight gradients: 8 D + 12 Q + 12 K + 12 I
  float32, adapters            the frozen layer, and the inputs of the seven adapters and of their second
                               halves: 16 D + 12 Q + 12 K + 16 I + 28 R
  bfloat16 autocast            the residual stream and norms stay float32, each linear layer keeps its own
                               2-byte copy of its input: 26 D + 10 Q + 10 K + 8 I
  autocast, frozen layer       8 D + 8 Q + 8 K + 6 I
  autocast, adapters           peft makes float32 of their inputs first: 18 D + 10 Q + 8 K + 8 I + 14 R
  always                       4 bytes for each norm, and for each head's norm and softmax: 4 (2 + 2 Hq + Hkv)

The encoder's last blocks, which a space with a tail has the trainer compute, are in tail.py.

Models without norms of q and k (Qwen2.5) keep less of them; see `layer_bytes`. Qwen3-0.6B under autocast: 82
KB a token a layer. Measured elsewhere in pure bfloat16: 76 KB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from model.language.loss import CHUNK_ELEMENTS
from model.verify.tail import TailSizes, backward_bytes, kept_bytes

GIB = 2**30

GPU_CONTEXT_BYTES = GIB
"""CUDA context, kernels and cuBLAS workspace: 0.5 to 1 GiB on Ampere and later."""
WASTE = 0.05
"""Share of activation memory that the allocator cannot reuse."""
CPU_PROCESS_BYTES = 800 * 2**20
"""A Python process with all that training imports (measured: 806 MiB, with peft 815)."""
USABLE = 0.97
"""Share of a GPU's nominal GiB that a process can use."""
FOUR_BIT_BYTES = 0.516
"""Bytes of a weight of 4 bits with its share of the scales, which have 8 bits for 64 weights, and theirs."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a language model with its connector, and of a tail."""

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
    head_norms: bool = True
    """Whether queries and keys have norms (Qwen3)."""
    tail: TailSizes | None = None
    """The encoder's last blocks, which a step computes; None: rows are what the connector gets."""

    @property
    def matrix(self) -> int:
        """Parameters of the embedding, and of the head."""
        return self.rows * self.width

    @property
    def embeddings(self) -> int:
        """Parameters of embedding and head."""
        return self.matrix * (1 if self.tied else 2)

    @property
    def body(self) -> int:
        """Parameters of the decoder layers (and of the final norm)."""
        return self.language - self.embeddings

    def adapters(self, rank: int) -> int:
        """Return the parameters of adapters of a rank on the seven linear layers of every decoder layer."""
        q, k = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.layers * rank * (7 * self.width + 2 * q + 2 * k + 3 * self.inner)


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
        head_norms=getattr(config, "model_type", "qwen3") == "qwen3",
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
    """Whether the language model trains, or its adapters."""
    lora: int = 0
    """Rank of the adapters, R; 0: the language model has none."""
    load_in_4bit: bool = False
    """Whether the frozen layers under the adapters have 4 bits a weight."""
    processes: int = 1
    """Processes that train together; more than one use FSDP2."""
    parts: int = 1
    """Parts into which weights, gradients and moments are divided (`--shard full`: one a process)."""
    offload: bool = False
    """Whether weights, gradients and moments are in the CPU's memory."""
    accumulates: bool = True
    """Whether a step has several micro-batches, so that the last one adds to gradients that exist."""
    rows: int | None = None
    """Rows of a micro-batch that pass through the tail, R; None: as many as fill it."""

    @property
    def whole(self) -> bool:
        """Whether the language model's own weights train."""
        return self.train_llm and not self.lora

    @property
    def gathers(self) -> bool:
        """Whether FSDP2 gathers the weights of a layer before it is used, and frees them afterwards."""
        return self.processes > 1 or self.offload


def layer_bytes(sizes: Sizes, autocast: bool, trains: bool, lora: int = 0) -> int:
    """Return the bytes that autograd keeps of one decoder layer for one token, by this module's table.

    Args:
        sizes: of the model.
        autocast: whether products are computed in bfloat16.
        trains: whether the layer trains, or its adapters.
        lora: rank of the adapters; 0: it has none.
    """
    d, i = sizes.width, sizes.inner
    q, k = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    small = 4 * (2 + 2 * sizes.heads + sizes.kv_heads)
    if not sizes.head_norms:
        # Nothing keeps what is projected: rotary positions have no weights, and attention keeps what is
        # rotated. Of a norm, its input, normalised and 4 bytes a head.
        small = 4 * (2 + sizes.heads)
    if lora and trains:
        kept = (18, 10, 8, 8, 14) if autocast else (16, 12, 12, 16, 28)
    elif trains:
        kept = (26, 10, 10, 8, 0) if autocast else (24, 16, 16, 16, 0)
    else:
        kept = (8, 8, 8, 6, 0) if autocast else (8, 12, 12, 12, 0)
    of_d, of_q, of_k, of_i, of_r = kept
    if not sizes.head_norms:
        of_norm = NORMED[autocast, trains and not lora]
        of_q, of_k = of_q - of_norm, of_k - of_norm
    return of_d * d + of_q * q + of_k * k + of_i * i + of_r * lora + small


NORMED = {(False, True): 8, (False, False): 4, (True, True): 6, (True, False): 4}
"""(autocast, whole layer trains) -> bytes that the norm of a query or key value keeps."""


def step_bytes(sizes: Sizes, step: Step) -> dict[str, int]:
    """Return the bytes of each part at the peak of a step, on the device that computes.

    Weights, gradients and both moments of AdamW are float32: 16 bytes for each parameter that trains. The
    peak is at the loss, at the last layer's backward pass, at the tail's, or at the end, where the gradients
    of the tied embedding and head are added: whatever is largest.

    Returns:
        `weights`, `gradients`, `AdamW`, `bf16 copies`, `gathered`, `activations`, `loss`, `process`, and
        their `total`.
    """
    state = state_bytes(sizes, step)
    divided = 0 if step.offload and step.gpu else 1 / step.parts
    kept = {name: int(state[name] * divided) for name in ("weights", "AdamW")}
    moments = _moments(sizes, step, state["gradients"], int(state["gradients"] * divided))
    parts = {
        **kept,
        **max(moments, key=lambda parts: sum(parts.values())),
        "gathered": _gathered(sizes, step),
        "process": GPU_CONTEXT_BYTES if step.gpu else CPU_PROCESS_BYTES + _holes(sizes, step),
    }
    order = ("weights", "gradients", "AdamW", "bf16 copies", "gathered")
    parts = {name: parts[name] for name in (*order, "activations", "loss", "process")}
    return parts | {"total": sum(parts.values())}


def state_bytes(sizes: Sizes, step: Step) -> dict[str, int]:
    """Return the bytes of `weights`, `gradients` and `AdamW` of a whole model, wherever they are."""
    adapters, tail = sizes.adapters(step.lora), sizes.tail
    trainable = sizes.language * step.whole + adapters * step.train_llm
    trainable += sizes.connector * step.train_connector + (tail.trainable if tail else 0)
    language = 4 * sizes.language
    if step.load_in_4bit:
        language -= int((4 - FOUR_BIT_BYTES) * sizes.body)
    return {
        "weights": language + 4 * (adapters + sizes.connector + (tail.parameters if tail else 0)),
        "gradients": 4 * trainable,
        "AdamW": 8 * trainable,
    }


def _moments(sizes: Sizes, step: Step, added: int, reduced: int) -> list[dict[str, int]]:
    """Return `gradients`, `bf16 copies`, `activations` and `loss` at each moment that may be the peak.

    Args:
        sizes: of the model.
        step: the settings.
        added: bytes of gradients that a process adds up, before the last micro-batch: FSDP2 has them whole,
            on the device.
        reduced: bytes of the gradients that it keeps of the sum.
    """
    tokens, matrix, layer = step.tokens, sizes.matrix, sizes.body // sizes.layers
    value = 2 if step.gpu else 4
    one_layer = layer_bytes(sizes, step.gpu, step.train_llm, step.lora)
    ends = 5 * 4 * sizes.width  # embeddings, embeddings with features, final norm (3)
    kept = sizes.layers * (4 * sizes.width if step.checkpointing else one_layer) + ends
    again = one_layer if step.checkpointing else 0
    # The backward pass of one layer: gradients of three MLP activations and of the residual stream.
    working = 3 * sizes.inner * value + 3 * sizes.width * 4
    # Autocast caches the copies of a step's weights if they train. The copies of frozen ones, and all of
    # FSDP2, are made when a layer is used, and are kept for its backward pass.
    caches = step.whole and not step.gathers
    layers = sizes.layers if caches or not step.checkpointing else 1
    copies = 2 * layers * layer * step.gpu
    if step.load_in_4bit:
        copies = 2 * max(sizes.width, sizes.heads * sizes.head_dim) * sizes.inner * step.gpu
    # A chunk has its logits and their exponentials in float32, and under autocast the bfloat16 logits. The
    # gradient of the head is float32; under autocast each chunk adds a bfloat16 matrix to it.
    chunk = min(CHUNK_ELEMENTS, tokens * sizes.rows) * (8 + (2 if step.gpu else 0))
    head = 2 * matrix * step.gpu
    d_head = 4 * matrix * step.whole

    # A single micro-batch has no gradients before its backward pass.
    before = added if step.accumulates else 0
    held = in_backward = of_tail = 0
    if (tail := sizes.tail) is not None:
        rows = tail.rows(tokens) if step.rows is None else step.rows
        held = kept_bytes(tail, rows, step.gpu, step.checkpointing)
        in_backward = backward_bytes(tail, rows, step.gpu, step.checkpointing)
        of_tail = 2 * tail.trainable * step.gpu
    copies += of_tail

    def moment(
        activations: float, loss: int, copied: int, gradients: int, more: int = 0
    ) -> dict[str, int]:
        used = int((tokens * activations + more) * (1 + WASTE))
        parts = {"gradients": gradients, "bf16 copies": copied}
        return parts | {"activations": used, "loss": loss}

    rounded = 2 * matrix * step.gpu if step.whole else 0
    at_loss = moment(kept, chunk + d_head + rounded, copies + head, before, held)
    last_layer = moment(kept + again + working, d_head, copies, before, held)
    found = [at_loss, last_layer]
    if in_backward:
        # When the language model's activations are free. Its gradients exist, and that of a tied head waits
        # for the embedding's, which comes last.
        found.append(moment(ends, d_head * sizes.tied, of_tail, added, held + in_backward))
    if step.whole:
        # The embedding's gradient, and that of a tied head, to which it is added, when activations are free.
        found.append(moment(ends, (8 if sizes.tied else 4) * matrix, 0, max(before, reduced)))
    return found


def _holes(sizes: Sizes, step: Step) -> int:
    """Return the bytes that adapters leave unused in the memory of a process on the CPU.

    peft makes four tensors of the size of a layer's output, W x, B A x, its multiple and their sum, and gives
    three back, in two places. torch asks for aligned memory, for which glibc before 2.38 needs 96 bytes more
    than the tensor has; once a small object has taken these, the place is too small for an equal tensor. So
    each adapter costs up to two outputs that nothing uses, and here counts for one and a half. Measured with
    53 million parameters and rank 16: 2.8 (256 tokens), 2.4 (1,024) and 1.6 (2,048, of most bytes); with a
    place of its own for each tensor (MALLOC_MMAP_THRESHOLD_=65536) none, and a step takes a third longer.
    With checkpointing it is as much, of all layers: Qwen3-0.6B is 0.2 % off, 53 million parameters 7 and 11.
    CUDA has another allocator.
    """
    if not (step.lora and step.train_llm):
        return 0
    q, k = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    outputs = q + 2 * k + 2 * sizes.width + 2 * sizes.inner
    return 6 * outputs * step.tokens * sizes.layers  # 1.5 x 4 bytes


def _gathered(sizes: Sizes, step: Step) -> int:
    """Return the bytes that FSDP2 has gathered: what is no layer, one layer and the next one."""
    if not step.gathers:
        return 0
    layer = sizes.body // sizes.layers + sizes.adapters(step.lora) // sizes.layers
    tail = sizes.tail.parameters if sizes.tail else 0
    return 4 * (sizes.embeddings + sizes.connector + tail + 2 * layer)


def sample_flops(sizes: Sizes, tokens: int, supervised: int, train_llm: bool = True) -> float:
    """Return the floating-point operations of one sample, forward and backward.

    Forward: 2 for each parameter and token (for the head, supervised tokens only), and 4 Q for each key
    that a query sees (half the tokens, because attention is causal). Backward: twice that, or once for frozen
    weights. Recomputation by checkpointing is not counted, as MFU is defined without it.
    """
    linear = tokens * 2.0 * (sizes.body + sizes.connector) + supervised * 2.0 * sizes.matrix
    attention = tokens * sizes.layers * 4.0 * sizes.heads * sizes.head_dim * tokens / 2
    return linear * (3 if train_llm else 2) + attention * 3


def stage_days(flops_per_step: float, steps: int, peak_tflops: float, mfu: float) -> float:
    """Return the days of a stage on GPUs that each compute `flops_per_step` at `mfu` of their peak."""
    return flops_per_step * steps / (peak_tflops * 1e12 * mfu) / 86_400
