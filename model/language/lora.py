"""Low-rank adapters (LoRA) on a language model: peft trains them, and they are merged without it.

    adapters = add_adapters(language, rank=16, seed=0)             # every linear layer of the blocks
    save_adapters(folder, language, adapters, base="Qwen/Qwen3-0.6B")      # two files, in peft's format
    merge_saved(language, folder, adapters)                        # into the base that they were trained on

A layer computes W x + alpha / rank * B A x. W, the embeddings and the output layer are frozen; A and B train.
Merged, a layer has the weights W + alpha / rank * B A, and the model is one like any other. Embedding rows
that `load_language` added for control tokens are in no published model, and other machines draw other values:
a third file has them.

D inputs and E outputs of a layer, r rank: A is (r, D), B is (E, r).
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from cache.format.checksums import crc32c
from configs import UserError, one_line
from model.language.files import AGAIN, read_header
from model.language.records import AdaptersMeta

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""peft's names of its two files."""
ADDED = "added_rows.safetensors"
"""Rows that `load_language` added to the embedding and an untied output layer; missing if it added none."""
ALPHA = 2
"""alpha / rank, so the scale of the adapters and with it the best learning rate do not depend on the rank.
LLaVA-1.5 trains with rank 128 and alpha 256, too (scripts/v1_5/finetune_lora.sh)."""
NAME = "default"
"""peft's name of the one adapter, a part of the names of its parameters."""
PREFIX = "base_model.model."
"""What peft writes before the names of a model's layers."""
MARK = ".lora_"
"""In the names of the parameters of adapters, and of nothing else."""
MISSING = "{option} needs the package {package}; install it: pip install 'nanomolmo2[{extra}]'"


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """Which adapters a language model has."""

    rank: int
    """Rows of A and columns of B."""
    alpha: int
    """The adapters' part of a layer is scaled by alpha / rank."""
    target_modules: tuple[str, ...]
    """Last parts of the names of the layers that have one, such as `q_proj`."""
    load_in_4bit: bool = False
    """Whether the frozen weights were rounded to 4 bits in training."""

    @classmethod
    def from_meta(cls, meta: AdaptersMeta) -> Adapters:
        """Return what `meta` wrote."""
        return cls(
            rank=meta["rank"],
            alpha=meta["alpha"],
            target_modules=tuple(meta["target_modules"]),
            load_in_4bit=meta["load_in_4bit"],
        )

    def meta(self) -> dict[str, Any]:
        """Return the values as JSON has them."""
        return {**asdict(self), "target_modules": list(self.target_modules)}

    def __str__(self) -> str:
        bits = ", over weights of 4 bits" if self.load_in_4bit else ""
        return f"rank {self.rank}, alpha {self.alpha}, on {', '.join(self.target_modules)}{bits}"


# ---- for training


def check_packages(load_in_4bit: bool) -> None:
    """Check that what trains adapters is installed, without importing it.

    Raises:
        UserError: peft is not, or bitsandbytes for weights of 4 bits. The message has the command.
    """
    wanted = [("peft", "--lora", "lora")]
    if load_in_4bit:
        wanted.append(("bitsandbytes", "--load-in-4bit", "qlora"))
    for package, option, extra in wanted:
        if importlib.util.find_spec(package) is None:
            raise UserError(MISSING.format(option=option, package=package, extra=extra))


def linear_layers(language: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return name -> linear layer of the blocks: attention and MLP, without embeddings and output layer."""
    base = language.base_model
    prefix = next(name for name, module in language.named_modules() if module is base)
    return {
        f"{prefix}.{name}" if prefix else name: module
        for name, module in base.named_modules()
        # Blocks are numbered; what projects before the first or behind the last one is no part of them.
        if isinstance(module, nn.Linear) and any(part.isdecimal() for part in name.split("."))
    }


def add_adapters(
    language: PreTrainedModel, rank: int, *, seed: int, load_in_4bit: bool = False
) -> Adapters:
    """Freeze a language model and give the linear layers of its blocks adapters, which train.

    B starts at zero, so the model computes what it computed before. The global random state does not change.
    Adapters have the dtype of the layers.

    Args:
        language: on the CPU, or on `meta`.
        rank: of the adapters.
        seed: of the initial values of A.
        load_in_4bit: round the frozen layers to 4 bits; this happens when the model is moved to a GPU.

    Raises:
        UserError: the rank is larger than the model is wide, or it has no linear layers.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers = linear_layers(language)
    if not layers:
        raise UserError(
            f"language model {language.config.model_type}: its blocks have no linear layers (nn.Linear), "
            "which --lora adapts; train it whole: --lora 0"
        )
    width = language.get_input_embeddings().weight.shape[1]
    if rank > width:
        raise UserError(f"--lora {rank}: more than the {width} values that the model is wide")
    targets = tuple(sorted({name.rpartition(".")[2] for name in layers}))
    adapters = Adapters(
        rank=rank, alpha=ALPHA * rank, target_modules=targets, load_in_4bit=load_in_4bit
    )
    if load_in_4bit:
        _round_to_4bit(language, layers)
    language.requires_grad_(False)
    # Full names: a last part alone could also match a layer that is in no block.
    config = LoraConfig(
        r=rank, lora_alpha=adapters.alpha, target_modules=list(layers), task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, language, adapter_name=NAME)
    return adapters


def _round_to_4bit(language: PreTrainedModel, layers: Mapping[str, nn.Linear]) -> None:
    """Replace linear layers by bitsandbytes' of 4 bits (NF4, constants rounded, too), as QLoRA has them."""
    bnb: Any = importlib.import_module("bitsandbytes")
    fast = torch.cuda.is_bf16_supported(including_emulation=False)
    compute = torch.bfloat16 if fast else torch.float32
    for name, layer in layers.items():
        new = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=compute,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        # The values are rounded when this parameter is moved to a GPU.
        new.weight = bnb.nn.Params4bit(
            layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
        new.bias = layer.bias
        language.set_submodule(name, new)
    language.is_loaded_in_4bit = True  # what peft asks for


def adapter_parameters(language: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the adapters; {} if there are none."""
    return {name: value for name, value in language.named_parameters() if MARK in name}


def merge_adapters(language: PreTrainedModel) -> None:
    """Add the adapters in memory to the weights, and remove peft's layers."""
    from peft.tuners.lora import LoraLayer

    adapted = {n: one for n, one in language.named_modules() if isinstance(one, LoraLayer)}
    for name, layer in adapted.items():
        layer.merge()
        language.set_submodule(name, layer.get_base_layer())
    del language.peft_config


# ---- on disk


def save_adapters(
    folder: Path,
    language: PreTrainedModel,
    adapters: Adapters,
    tensors: Mapping[str, Tensor],
    base: str,
) -> None:
    """Write adapters as peft does, for `PeftModel.from_pretrained`.

    Args:
        folder: where to write.
        language: the model.
        adapters: which it has.
        tensors: name -> whole values of `adapter_parameters`.
        base: the model that they belong to: a hub id or a folder, for programs that load both.
    """
    config = language.peft_config[NAME]
    config.base_model_name_or_path, config.inference_mode = base, True
    config.target_modules = list(adapters.target_modules)
    config.save_pretrained(folder)
    state = {
        PREFIX + name.replace(f".{NAME}.", "."): value.detach().contiguous()
        for name, value in tensors.items()
    }
    save_file(state, folder / ADAPTER, metadata={"format": "pt"})
    if rows := _added_rows(language):
        save_file({name: value.contiguous() for name, value in rows.items()}, folder / ADDED)


def merge_saved(language: PreTrainedModel, folder: Path, adapters: Adapters) -> None:
    """Add saved adapters to the weights of the model that they were trained on.

    Args:
        language: the base, in float32 on the CPU.
        folder: with `ADAPTER`, whose checksum the caller has compared.
        adapters: which adapters it has.

    Raises:
        UserError: the file is damaged, or does not fit the model.
    """
    path = folder / ADAPTER
    stored = {name: tensor.shape for name, tensor in read_header(path).items()}
    layers = {
        name: layer
        for name, layer in linear_layers(language).items()
        if name.rpartition(".")[2] in adapters.target_modules
    }
    wanted = dict(_shapes(layers, adapters.rank))
    if stored != wanted:
        differ = sorted({name for name, _ in stored.items() ^ wanted.items()})
        raise UserError(
            f"{path}: {len(differ)} tensors are not those of rank {adapters.rank} on the base's layers, such "
            f"as {one_line(differ[0], 100)}; {AGAIN}"
        )
    values = _read(path)
    _load_added_rows(language, folder / ADDED)
    scale = adapters.alpha / adapters.rank
    with torch.no_grad():
        for name, layer in layers.items():
            a, b = (values[f"{PREFIX}{name}.lora_{x}.weight"].float() for x in "AB")
            layer.weight += (b @ a) * scale


def _shapes(layers: Mapping[str, nn.Linear], rank: int) -> Iterator[tuple[str, tuple[int, int]]]:
    for name, layer in layers.items():
        yield f"{PREFIX}{name}.lora_A.weight", (rank, layer.in_features)
        yield f"{PREFIX}{name}.lora_B.weight", (layer.out_features, rank)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        values = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); {AGAIN}") from None
    for name, value in values.items():
        if not bool(value.isfinite().all()):
            raise UserError(f"{path}: {name} has values that are not finite; {AGAIN}")
    return values


def _added_rows(language: PreTrainedModel) -> dict[str, Tensor]:
    """Return the rows that `load_language` added to the embedding and to an untied output layer."""
    number = getattr(language, "added_rows", 0)
    if not number:
        return {}
    layers = {
        "embedding": language.get_input_embeddings(),
        "output": language.get_output_embeddings(),
    }
    rows = {name: layer.weight.detach()[-number:] for name, layer in layers.items()}
    if layers["output"].weight is layers["embedding"].weight:
        del rows["output"]
    return rows


def _load_added_rows(language: PreTrainedModel, path: Path) -> None:
    """Copy the rows that adapters were trained with over those that were drawn."""
    if not (rows := _added_rows(language)):
        return
    stored = {name: tensor.shape for name, tensor in read_header(path).items()}
    if stored != {name: tuple(value.shape) for name, value in rows.items()}:
        raise UserError(f"{path}: its rows are not those that the base lacks; {AGAIN}")
    for name, value in _read(path).items():
        rows[name].copy_(value)
    language.added_rows = 0  # now it is a model of its own


def weights_checksum(language: PreTrainedModel) -> int:
    """Return the crc32c of names, shapes and values of a model without adapters, on the CPU.

    Adapters fit one model alone, and with another one they would give nonsense without an error. Rows that
    `load_language` added do not count.
    """
    total = 0
    kept = -getattr(language, "added_rows", 0) or None
    layers = (language.get_input_embeddings(), language.get_output_embeddings())
    with_rows = [layer.weight for layer in layers if layer is not None]
    for name, value in sorted(language.named_parameters()):
        if any(value is one for one in with_rows):
            value = value[:kept]
        head = f"{name} {tuple(value.shape)} {value.dtype}"
        total = crc32c(head.encode(), total)
        data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        total = crc32c(data, total)
    return total


def count(language: PreTrainedModel, rank: int) -> int:
    """Return the parameters of adapters of a rank on a model without them, also on `meta`."""
    return sum(math.prod(shape) for _, shape in _shapes(linear_layers(language), rank))
