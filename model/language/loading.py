"""Load the weights of a checkpoint into a model, so that every tensor is used and none is missing.

    names = fit(checkpoint, empty_model(config, folder))  # stored name -> name in the model, from the headers
    model = load_weights(checkpoint, config, names, dtype)

transformers draws missing tensors at random and skips unknown ones, with a warning. Both are errors here.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.utils import logging as transformers_logging

from configs import UserError, one_line
from model.language.checkpoint import CONFIG, Checkpoint
from model.language.files import AGAIN

log = logging.getLogger(__name__)

INNER_WRAPPERS = (
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
)
"""Parts that torch.compile, FSDP, activation checkpointing and Lightning put into names, at any depth."""
OUTER_WRAPPERS = ("module.", "base_model.model.")
"""What DistributedDataParallel and PEFT put before names."""
OUTPUT_LAYER = "lm_head.weight"
HARMLESS = re.compile(r"(?:rotary_emb\.inv_freq|\.masked_bias|(?:^|\.)position_ids)$")
"""Buffers that older versions of transformers stored: they are computed, not learned."""
EXPERTS = re.compile(r"\.experts\.(\d{1,6})\.")
"""In the names of tensors that transformers stacks when it loads a mixture of experts."""


def empty_model(config: Any, folder: Path) -> PreTrainedModel:
    """Return the model of a folder's config on `meta`: shapes without values.

    Raises:
        UserError: the config has no causal language model, or its sizes do not make one.
    """
    try:
        with quiet(), torch.device("meta"):
            return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    except Exception as error:  # whatever a config of any model may raise
        what = f"not a config of a model ({one_line(error)})"
        raise UserError(f"{folder / CONFIG}: {what}; {AGAIN}") from None


def fit(
    checkpoint: Checkpoint, model: PreTrainedModel, named: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return stored name -> name in the model, without the prefixes of wrappers.

    With `named`, that says which stored tensor is which, and no prefix is looked for.

    Harmless buffers, and an output layer that is tied, are left out. A mixture of experts has other names in
    its file than in the model, so the shapes of experts are compared when they are loaded.

    Raises:
        UserError: tensors are missing, left over, or of another shape.
    """
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    stored = set(checkpoint.tensors)
    candidates = [dict(named)] if named is not None else []
    candidates = candidates or list(
        _candidates(sorted(stored), model.base_model_prefix, set(shapes))
    )
    differences = [_difference(names, set(shapes), tied, checkpoint, model) for names in candidates]
    best = min(range(len(candidates)), key=lambda i: sum(map(len, differences[i])))
    names, (missing, left) = candidates[best], differences[best]
    folder = checkpoint.folder
    if len(set(names.values())) < len(names):
        raise UserError(
            f"{folder}: two tensors have one name without the prefixes of wrappers; {AGAIN}"
        )
    experts = any(EXPERTS.search(name) for name in names.values())
    if experts:
        missing = [name for name in missing if ".experts." not in name]
        missing += _missing_experts(names.values())
        left = [name for name in left if ".experts." not in names[name]]
    if missing or left:
        way_out = AGAIN
        if missing == [OUTPUT_LAYER] and not left:
            way_out = f'is it tied? Then write "tie_word_embeddings": true into {folder / CONFIG}'
        groups = {f"missing (of {len(shapes)})": missing, "left over": left}
        raise UserError(_message(folder, groups, way_out))
    for name, new in names.items():
        have = checkpoint.tensors[name]
        if new in shapes and have.shape != shapes[new]:
            raise UserError(
                f"{have.path}: tensor {name} is {have.shape}, by {CONFIG} it is {shapes[new]}: "
                "files of two models?"
            )
    used = {
        k: new for k, new in names.items() if new in shapes or (experts and EXPERTS.search(new))
    }
    # A name that became longer has only the base model's prefix, as transformers adds it.
    if named is None and (
        cut := next((pair for pair in used.items() if not pair[1].endswith(pair[0])), None)
    ):
        log.info("%s: names without the prefixes of wrappers: %s -> %s", folder, *cut)
    if skipped := len(names) - len(used):
        log.info("%s: %d tensors are not parameters of the model (buffers)", folder, skipped)
    return used


def _missing_experts(names: Iterable[str]) -> list[str]:
    """Return the names of tensors that some experts of a layer have and others do not."""
    found: dict[tuple[str, str], set[int]] = {}
    for name in names:
        if match := EXPERTS.search(name):
            around = (name[: match.start()], name[match.end() :])
            found.setdefault(around, set()).add(int(match[1]))
    every = set().union(*found.values())
    return [
        f"{before}.experts.{number}.{after}"
        for (before, after), numbers in found.items()
        for number in sorted(every - numbers)
    ]


def _candidates(stored: list[str], base: str, expected: set[str]) -> Iterator[dict[str, str]]:
    """Yield ways to name the stored tensors: as they are, then without more and more prefixes."""
    plain = {name: name for name in stored}
    bare = {name: _unwrapped(name) for name in stored}
    parts = [name.split(".") for name in bare.values()]
    common = 0
    while all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    for names in (plain, *(_cut(bare, depth) for depth in range(common + 1))):
        yield names
        # The base model alone, as AutoModel saves it: transformers adds the prefix, too.
        yield {
            name: new
            if new in expected
            else f"{base}.{new}"
            if f"{base}.{new}" in expected
            else new
            for name, new in names.items()
        }


def _cut(names: Mapping[str, str], depth: int) -> dict[str, str]:
    return {name: ".".join(new.split(".")[depth:]) for name, new in names.items()}


def _unwrapped(name: str) -> str:
    name = ".".join(part for part in name.split(".") if part not in INNER_WRAPPERS)
    while prefix := next((p for p in OUTER_WRAPPERS if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name


def _difference(
    names: Mapping[str, str],
    expected: set[str],
    tied: Mapping[str, str],
    checkpoint: Checkpoint,
    model: PreTrainedModel,
) -> tuple[list[str], list[str]]:
    """Return the model's names that are missing, and the stored names that the model does not have."""
    found = set(names.values())
    # Of two tied tensors either is enough: safetensors' save_model keeps the first by name, the output layer.
    either = {name for pair in tied.items() if found.intersection(pair) for name in pair}
    missing = sorted(expected - found - either)
    left = [
        name
        for name, new in names.items()
        if new not in expected and not _is_buffer(new, checkpoint.tensors[name].shape, model)
    ]
    return missing, left


def _is_buffer(name: str, shape: tuple[int, ...], model: PreTrainedModel) -> bool:
    """Whether a stored tensor is no parameter, by its name or by transformers' list for the model."""
    if HARMLESS.search(name):
        return True
    if re.search(r"\.attn(?:ention)?\.bias$", name) and len(shape) == 4:  # GPT-2's triangular mask
        return True
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(p, name) for p in patterns if "visual" not in p and "vision" not in p)


def _message(folder: Path, groups: Mapping[str, Collection[str]], way_out: str = AGAIN) -> str:
    """Return an error about tensors: what is wrong with them -> their names."""
    found = "; ".join(
        f"{len(names)} {what}: {_few(names)}" for what, names in groups.items() if names
    )
    return f"{folder}: its tensors are not those of the model in its {CONFIG}: {found}; {way_out}"


def _few(names: Iterable[str], most: int = 3) -> str:
    listed = sorted(names)
    more = f", ... ({len(listed):,} in all)" if len(listed) > most else ""
    return ", ".join(one_line(name, 80) for name in listed[:most]) + more


def check_tied(checkpoint: Checkpoint, names: Mapping[str, str], model: PreTrainedModel) -> None:
    """Compare a tied output layer with the embedding, if both are stored.

    Args:
        checkpoint: the folder.
        names: from `fit`.
        model: of its config.

    Raises:
        UserError: they differ.
    """
    stored = {new: name for name, new in names.items()}
    for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if name not in stored or source not in stored:
            continue
        pair = read_tensors(checkpoint, {stored[new]: new for new in (name, source)}, None)
        if not torch.equal(pair[name], pair[source]):
            path = checkpoint.folder / CONFIG
            raise UserError(
                f"{path}: says that {name} is {source} (tie_word_embeddings), but the weights have "
                f'another one; write "tie_word_embeddings": false into it'
            )


def load_weights(
    checkpoint: Checkpoint, config: Any, names: Mapping[str, str], dtype: torch.dtype
) -> PreTrainedModel:
    """Return the model with the stored weights, on the CPU.

    Args:
        checkpoint: the folder.
        config: its config, as transformers reads it.
        names: from `fit`.
        dtype: of the parameters.

    Raises:
        UserError: a file cannot be read, a tensor was missing or left over, or a value is not finite.
    """
    state = read_tensors(checkpoint, names, dtype)
    _check_values(checkpoint, names, state)
    try:
        with quiet():
            model, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported, instead of raised by the first one
            )
    except Exception as error:  # conversions of any model's tensors may fail in any way
        raise UserError(
            f"{checkpoint.folder}: cannot be loaded ({one_line(error)}); {AGAIN}"
        ) from None
    groups = {
        "missing": report["missing_keys"],
        "left over": report["unexpected_keys"],
        "of another shape": [key[0] for key in report["mismatched_keys"]],
        "in error": report["error_msgs"],
    }
    if any(groups.values()):
        raise UserError(_message(checkpoint.folder, groups))
    return model


def _check_values(
    checkpoint: Checkpoint, names: Mapping[str, str], state: Mapping[str, Tensor]
) -> None:
    """Refuse values that are not finite, and warn of matrices of zeros: the holes of a broken download."""
    stored = {new: name for name, new in names.items()}
    zero = []
    for new, value in state.items():
        total = value.sum(dtype=torch.float64)  # not finite if any value is not
        if not bool(torch.isfinite(total)):
            path = checkpoint.tensors[stored[new]].path
            raise UserError(f"{path}: tensor {stored[new]} has values that are not finite; {AGAIN}")
        if total == 0 and value.ndim > 1 and not bool(value.any()):
            zero.append(stored[new])
    if zero:
        log.warning(
            "%s: %d matrices are zero everywhere (%s): was it downloaded whole?",
            checkpoint.folder,
            len(zero),
            _few(zero),
        )


def read_tensors(
    checkpoint: Checkpoint, names: Mapping[str, str], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Return tensors under their names in the model: copies in a dtype, or as they are in the file.

    Raises:
        UserError: a file cannot be read.
    """
    state: dict[str, Tensor] = {}
    for path in sorted({checkpoint.tensors[name].path for name in names}):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    if name in names:
                        value = file.get_tensor(name)
                        if dtype is not None:
                            # A copy: the file is mapped, and a later change of it would change the model.
                            kind = dtype if value.is_floating_point() else None
                            value = value.to(kind, copy=True)
                        state[names[name]] = value
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({one_line(error)}); {AGAIN}") from None
    return state


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Switch off transformers' progress bar, and its warnings about what is an error here."""
    bar = transformers_logging.is_progress_bar_enabled()
    level = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
