"""One entry of configs/encoders.yaml: the vision tower, and how it encodes an image.

encoder_config("clip-vit-l14-336")            # an entry
encoder_config("hf:dinov2-small", pool_image=4)    # a folder of transformers, or an id of the hub
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from configs import UserError, build, load, nearest, user_file, where_is

HF = "hf:"
"""What precedes a folder of transformers, or an id of the hub, where an encoder is named."""
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
"""An id of the Hugging Face hub."""


@dataclass(frozen=True, kw_only=True)
class DemoTowerConfig:
    """Sizes of a demo tower, and scales of its random weights, which only `library: demo` has."""

    image_size: int
    """Side of the input, pixels."""
    patch_size: int
    """Side of a patch, pixels."""
    width: int
    """Values per token."""
    depth: int
    """Transformer blocks."""
    heads: int
    """Attention heads in each block."""
    mlp_ratio: int = 4
    """Width of the MLP's hidden layer, as a multiple of `width`."""
    patch_gain: float = 1.0
    """Standard deviation of the patch embeddings of white noise with variance 1."""
    position_gain: float = 1.0
    """Standard deviation of the position embeddings."""
    attention_gain: float = 1.0
    """Standard deviation of queries and keys; larger values give sharper attention."""
    residual_gain: float = 1.0
    """Factor on the outputs of attention and MLP, which are added to the residual stream."""

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "width", "depth", "heads", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """One frozen encoder. Changing any value except `name` makes another feature space."""

    name: str
    """What `--encoder` takes: the key of an entry, or `hf:FOLDER` with an absolute path, or `hf:ORG/NAME`."""
    library: Literal["open_clip", "transformers", "demo"]
    """Library that builds the tower: `open_clip` (CLIP, SigLIP, SigLIP2), `transformers` (CLIP, SigLIP,
    DINOv2, DINOv3, the tower of a LLaVA), or `demo` for the random tower."""
    activation: Literal["quick_gelu", "gelu", "gelu_tanh", "swiglu"] | None = None
    """Activation of the MLPs that the weights were trained with. None: as a folder of transformers says.

    `model.vision.activation_check` compares it with the model as built and with all records of the weights,
    because a mismatch gives wrong features without an error.
    """
    blocks: tuple[int, ...] = ()
    """Blocks (0-based) whose outputs are concatenated, in this order: 22 is `hidden_states[-2]` of 24.

    Of a folder of transformers, those that LLaVA's config names, else the last but one.
    """
    tail: tuple[int, ...] = ()
    """Blocks whose outputs are the features, if training computes them from the one in `blocks`."""
    # Set by `with_tail`, for `encode.run --block N --tail`. Pooling is then what training does.
    model: str = ""
    """open_clip's model name; OpenAI's weights need the ones that end in `-quickgelu`. With `transformers`: a
    folder with config.json and model.safetensors, or its id on the hub."""
    image_size: int | None = None
    """Side of the input, pixels, for DINOv2 and DINOv3, which take several. None: as the folder says."""
    pretrained: str = ""
    """open_clip's tag of the weights, which also defines mean and standard deviation."""
    mean: tuple[float, float, float] | None = None
    """Mean colour in [0, 1]; None: that of the tag or the folder, .5 for the demo tower."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of the colours; None: that of the tag or the folder, .5 for the demo tower."""
    fit: Literal["squash", "pad", "crop"] = "squash"
    """How an image becomes square: squash (aspect ratio ignored), pad (mean colour), crop (centre)."""
    shorter_side: int | None = None
    """With `fit: crop`, pixels of the shorter side before the centre is cut out. None: the input's side."""
    decode: Literal["whole", "reduced"] = "whole"
    """`reduced`: a JPEG far larger than the input is decoded at 1/2, 1/4 or 1/8 of its size, which leaves it
    twice the pixels of the input along a side, at least. Faster; makes other features."""
    pool_image: int = 1
    """Images: side of the pooling window; n x n patches become one token, their mean."""
    pool_frame: int = 3  # as Molmo2 pools frames
    """Video frames: side of the pooling window."""
    batch_size: int = 8
    """Images in each batch; the last batch is padded. Part of the fingerprint: in bf16, features from batches
    of 1 and of 8 differ by 1 %."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision; `auto`: float16 on GPUs, bfloat16 on CPUs that support it, else float32."""
    seed: int = 0
    """Seed of random weights; unused with trained ones."""
    tower: DemoTowerConfig | None = None
    """Sizes of a demo tower: that of `library: demo`, or a small CLIP with `open_clip`. None for others."""

    def __post_init__(self) -> None:
        if not self.blocks or len(set(self.blocks)) != len(self.blocks):
            raise ValueError(f"blocks {list(self.blocks)}: name each block once, and at least one")
        if min(self.blocks) < 0:
            raise ValueError(f"blocks {list(self.blocks)}: count from 0, at the first block")
        if self.shorter_side is not None and self.fit != "crop":
            raise ValueError(f"shorter_side is for fit: crop, not for fit: {self.fit}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        if self.library != "demo" and not self.model:
            raise ValueError(f"library {self.library} needs a model")
        if self.library != "transformers":
            if self.activation is None:
                raise ValueError("missing key 'activation'")
            if self.image_size is not None:
                raise ValueError(
                    "image_size is for library transformers; other towers have one size"
                )
        if self.library == "demo" and self.tower is None:
            raise ValueError("library demo needs a tower")
        if self.library == "transformers" and self.tower is not None:
            raise ValueError(
                "tower is for demo towers; one of transformers has its sizes in config.json"
            )
        if self.library == "demo" and self.activation != "gelu":
            raise ValueError(f"the demo tower computes gelu, not {self.activation}")
        if self.tail and len(self.blocks) != 1:
            raise ValueError(f"blocks {list(self.blocks)}: with a tail, one block is stored")

    @property
    def space_name(self) -> str:
        """The first part of the folder names of spaces: `hf-dinov2-small` of `hf:/models/dinov2-small`."""
        if not self.name.startswith(HF):
            return self.name
        path = Path(self.name.removeprefix(HF))
        # In the hub's cache a folder is called by its commit: models--org--name/snapshots/1a2b3c.
        if path.parent.name == "snapshots":
            path = Path(path.parent.parent.name.rpartition("--")[2])
        name = re.sub(r"[^A-Za-z0-9._]+|\.\.+", "-", path.name)[:60].strip("-.")
        return f"hf-{name or 'tower'}"

    def with_tail(self, block: int) -> EncoderConfig:
        """Return this entry with another block stored, and its own blocks computed in training.

        Raises:
            UserError: its blocks are not behind that one, or its tower has blocks of another kind.
        """
        if self.library == "demo":
            raise UserError(
                f"--tail: encoder {self.name} has blocks of its own kind; a small CLIP is --encoder demo-clip"
            )
        most = min(min(self.blocks), max(self.blocks) - 1)
        if not 0 <= block <= most:
            raise UserError(
                f"--block {block}: the features of encoder {self.name} are the output of block "
                f"{', '.join(map(str, self.blocks))}; the blocks that this is computed from are 0 to {most}"
            )
        return replace(self, blocks=(block,), tail=self.blocks)

    def check_weights(self, weights: str | None, random_weights: bool) -> None:
        """Refuse weights that would not be loaded.

        Args:
            weights: file or folder that a user named, if any.
            random_weights: whether the user asked for untrained weights.

        Raises:
            UserError: `weights` is given, and so is `random_weights`, or the encoder has no others.
        """
        if weights is None:
            return
        if self.tower is not None:
            raise UserError(
                f"--weights {weights}: encoder {self.name} has random weights and loads none; leave out "
                "--weights, or name the encoder of these weights with --encoder NAME"
            )
        if random_weights:
            raise UserError(
                f"--weights {weights}: --random-weights loads none; leave out one of the two"
            )


def encoder_config(name: str, **overrides: Any) -> EncoderConfig:
    """Return the encoder that `--encoder` names. Overrides that are not None replace the values of an entry.

    What a folder of transformers says is filled in: blocks, activation, colours, fit and size.

    Args:
        name: an entry of configs/encoders.yaml, or `hf:` and a folder or an id of the hub.
        overrides: fields of `EncoderConfig`.

    Raises:
        UserError: there is no such entry or folder, or a value is invalid.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    if name.startswith(HF):
        source = _source(name.removeprefix(HF), Path.cwd())
        entry: Mapping[str, Any] = {"library": "transformers", "model": source}
        name, where = HF + source, f"--encoder {HF}{source}"
    else:
        entries = load("encoders")
        where = where_is("encoders", name)
        if name not in entries:
            raise UserError(
                f"encoder {name!r} is not in {where} (there are: {', '.join(map(str, entries))})"
                f"{nearest(name, map(str, entries))}; a folder of transformers: --encoder hf:FOLDER"
            )
        entry, where = entries[name], f"{where}: {name}"
        if not isinstance(entry, Mapping):
            raise UserError(f"{where}: expected keys and values")
        if entry.get("library") == "transformers" and isinstance(entry.get("model"), str):
            file = user_file()
            source = _source(entry["model"], file.parent if file else Path.cwd())
            entry = {**entry, "model": source}
    values = {"name": name, **entry, **given}
    if values.get("library") == "transformers" and values.get("model"):
        values = {**_folder_values(values), **values}
    return build(EncoderConfig, values, where)


def _source(source: str, beside: Path) -> str:
    """Return the absolute path of a folder, or an id of the hub as it is.

    Args:
        source: path or id.
        beside: the folder that a relative path starts from.

    Raises:
        UserError: it is neither.
    """
    folder = Path(source).expanduser()
    folder = folder if folder.is_absolute() else beside / folder
    if source and folder.is_dir():
        return str(folder.resolve() if ".." in folder.parts else folder.absolute())
    if folder.is_file():
        raise UserError(f"{folder}: a file; give its folder: --encoder {HF}{folder.parent}")
    if HUB_ID.fullmatch(source):
        return source
    raise UserError(
        f"{folder}: no such folder; give one with config.json and model.safetensors, or an id of the hub: "
        f"--encoder {HF}ORG/NAME"
    )


def tower_folder(source: str, encoder: str) -> Path:
    """Return the folder of a tower of transformers; an id of the hub is downloaded, if it is not here.

    Raises:
        UserError: it cannot be downloaded.
    """
    if Path(source).is_dir():
        return Path(source)
    if not HUB_ID.fullmatch(source):
        raise UserError(f"encoder {encoder}: {source}: no such folder; it moved? --weights FOLDER")
    # Imports the hub's client, which folders do not need.
    from model.io.hub import fetch_folder

    return fetch_folder(source, encoder=encoder)


def _folder_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a folder of transformers states of an entry, where that says nothing else."""
    from model.io.tower_config import read_tower_config

    found = read_tower_config(tower_folder(str(values["model"]), str(values["name"])))
    size = values.get("image_size")
    side = size if isinstance(size, int) else found.image_size
    grid = side // found.patch_size
    return {
        "activation": found.activation,
        "blocks": found.blocks,
        "mean": found.mean,
        "std": found.std,
        "fit": found.fit,
        "image_size": found.image_size,
        # Another size sees as much of an image.
        "shorter_side": round(found.shorter_side * side / found.image_size)
        if values.get("fit", found.fit) == "crop"
        else None,
        "pool_frame": next(window for window in (3, 2, 1) if grid % window == 0),
    }
