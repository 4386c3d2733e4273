"""Start from somebody else's LLaVA: its weights, its template, and whether the features are of its tower.

    vlm, tokenizer = load(folder)          # a LlavaForConditionalGeneration in llava-hf's layout
    check_tower(folder, reader)            # UserError with the command that encodes with the folder's tower

A folder that `model.export` wrote is recognised by its chat template, which gives the tokens of ours.
Training then goes on with ours.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from cache.errors import CacheError, command_line
from cache.format.gate import parse_json, read_regular
from cache.format.spec import FeatureSpec
from cache.format.tail import Tail, read_tail
from cache.remote.mirror import is_copy
from cache.remote.open import cache_root
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.samples import dataset_words
from cache.store.space import read_info
from configs import UserError
from model.export.template import SPACE, chat_template
from model.io.llava_folder import LlavaFolder, open_llava
from model.io.tensors import hash_tensors
from model.io.tower_config import read_tower_config
from model.io.tower_folder import architecture, open_tower, read_tensors, tower_hash
from model.language.folder_template import attached, detach
from model.language.tokenizer import IMAGE_TOKEN, image_token, prepare_tokenizer
from model.media.fit import resize_text
from model.tail import block_tensors, load_tail
from model.vlm import VLM

log = logging.getLogger(__name__)


def load(folder: Path) -> tuple[VLM, PreTrainedTokenizerFast]:
    """Return the model of a folder, without its vision tower, and its tokenizer.

    Raises:
        UserError: see `LlavaFolder.load`.
    """
    llava = open_llava(folder)
    language, connector, tokenizer = llava.load()
    return VLM(language, connector, llava.vision_width), with_own_template(tokenizer)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a folder, after a check of everything but the values of the weights.

    Raises:
        UserError: see `LlavaFolder.load`.
    """
    tokenizer = with_own_template(open_llava(folder).check())
    template = attached(tokenizer)
    if template is not None and template.end_token() is None:
        log.warning(
            "%s: its chat template writes no control token behind an answer, so training does not teach the "
            "model where an answer ends",
            folder,
        )
    return tokenizer


def with_own_template(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a folder, with our own template if it is one of our exports."""
    template = attached(tokenizer)
    assert template is not None
    if image_token(tokenizer) == IMAGE_TOKEN and template.text == chat_template(tokenizer):
        detach(tokenizer)
        prepare_tokenizer(tokenizer)
    return tokenizer


# ---- the vision tower


def check_tower(folder: Path, reader: FeatureReader) -> None:
    """Check that features are what a folder's projector was trained on.

    Raises:
        UserError: they are of another tower, of other blocks, or of images that were prepared in another way.
            The message names the differences, and the command that encodes with the folder's tower.
    """
    llava = open_llava(folder)
    tower, root, spec = _Tower(llava), cache_root(reader), reader.spec
    different = _differences(spec, tower.wanted(spec))
    if not different and not (different := _other_tail(tower, reader)):
        return
    others = []
    for name in root.space_names():
        with contextlib.suppress(CacheError, OSError):  # damaged, or of another version
            info = read_info(root.space(name))
            if name != spec.name and not _differences(info.spec, tower.wanted(info.spec)):
                others.append(name)
    if others:
        way_out = f"choose the one that is: --space {others[0]}"
    else:
        way_out = (
            f"encode with the folder's own: {own_command(folder, root, spec.codec, spec.tail)}"
        )
    raise UserError(
        f"{folder}: space {spec.name} is not made by its vision tower ({'; '.join(different)}); "
        f"{way_out}"
    )


def own_command(folder: Path, root: CacheRoot, codec: str = "", tail: Tail | None = None) -> str:
    """Return the command that encodes a data set of a cache with the tower of a folder."""
    pool = open_llava(folder).pool
    words = [*dataset_words(root, None), "--encoder", f"hf:{folder}"]
    words += ["--pool", str(pool)] if pool > 1 else []
    words += ["--codec", codec] if codec else []
    words += ["--block", str(tail.first - 1), "--tail"] if tail else []
    # A space has one tail, so another one is in another cache.
    features = "DIR" if is_copy(root) or tail else root.path
    return command_line("encode.run", *words, "--features", features)


class _Tower:
    """What a folder's projector needs of the features."""

    def __init__(self, llava: LlavaFolder) -> None:
        self.llava = llava
        self.config = read_tower_config(llava.folder)

    def wanted(self, spec: FeatureSpec) -> dict[str, Any]:
        """Return the values of a spec's fields that are needed.

        An export says on which spec its model was trained. That counts if `spec` has its weights, as the
        folder's tower has other names of tensors and therefore another hash.
        """
        tower = self.config
        fields: dict[str, Any] = {
            "blocks": tower.blocks,
            "image_size": tower.image_size,
            "patch_size": tower.patch_size,
            "width": self.llava.vision_width,
            "fit": tower.fit,
            "resize": resize_text(tower.fit, tower.shorter_side),
            "activation": tower.activation,
            "keep_cls": False,
            "pool_image": self.llava.pool,
        }
        fields |= {
            name: value for name in ("mean", "std") if (value := getattr(tower, name)) is not None
        }
        trained = self._trained_on
        if trained is not None and trained.weights == spec.weights:
            return fields | {"weights": trained.weights, "architecture": trained.architecture}
        blocks = (
            tower.blocks if spec.tail is None else spec.blocks
        )  # the last ones are in the tail's file
        return fields | {"weights": self._weights(blocks), "architecture": architecture(tower)}

    @functools.cache  # noqa: B019 - one check of one folder
    def _weights(self, blocks: tuple[int, ...]) -> str:
        return tower_hash(self.llava.folder, blocks)

    @functools.cached_property
    def _trained_on(self) -> FeatureSpec | None:
        """The spec that an export names, if the folder's tower is still the one that was exported."""
        try:
            values = parse_json(read_regular(self.llava.folder / SPACE))
            spec, tower = FeatureSpec.from_json(values["spec"]), values["tower"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no export of ours
            return None
        return spec if tower == hash_tensors(self.llava.tower_tensors()) else None


def _other_tail(tower: _Tower, reader: FeatureReader) -> list[str]:
    """Return that the blocks behind the stored one are not those of the folder, if they are not.

    The hash of the weights in a spec ends with the stored block.
    """
    spec, paths = reader.spec, reader.paths
    if spec.tail is None:
        return []
    arrays = read_tail(paths.tail, paths.cache_root, spec.tail, spec.width)
    theirs = read_tensors(open_tower(tower.llava.folder), spec.tail.blocks)
    ours = block_tensors(load_tail(spec, arrays))
    different = [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
    return [f"tail: {len(different)} other tensors, such as {different[0]}"] if different else []


def _differences(spec: FeatureSpec, wanted: Mapping[str, Any]) -> list[str]:
    """Return the fields that differ, in words."""
    found = vars(spec.seen)
    return [
        f"{name} {_short(value)} there, {_short(found[name])} here"
        for name, value in wanted.items()
        if not _equal(value, found[name])
    ]


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, tuple) and isinstance(two, tuple):
        return len(one) == len(two) and all(
            abs(a - b) < 1e-6 for a, b in zip(one, two, strict=True)
        )
    return bool(one == two)


def _short(value: object) -> str:
    text = str(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 40 else f"{text[:8]}…"
