"""The options of `python -m train.run`, their presets, and which of them a resumed run may change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml

import configs
from cache.format.frame_sampling import MAX_FRAMES
from cache.remote.open import Elsewhere
from configs import UserError, nearest

SELECTORS = ("stage", "hardware", "device", "run", "max_steps")
"""Options that decide the defaults of others."""

MACHINE_KEYS = frozenset(
    {
        *("run", "resume", "inspect", "hardware", "device", "features", "min_coverage"),
        *("mirror", "mirror_gb", "allow_private"),
        *("max_tokens", "use_gradient_checkpointing", "use_flash_attention"),
        *("log", "log_every", "save_every", "eval_every", "eval_samples"),
        *("read_threads", "read_ahead"),
    }
)
"""Where and how fast a run goes, not what it learns: a resumed run may change these."""


@dataclass(frozen=True, kw_only=True)
class Options(Elsewhere):
    """Train the connector and the language model on cached features, one stage at a time."""

    stage: Literal[1, 2, 3] = 1
    """1 pre-training, 2 fine-tuning, 3 long context; each starts from the one before in the same run."""
    hardware: Literal["auto", "cpu", "24gb", "40gb", "80gb"] = "auto"
    """Preset for batch, length and memory (configs/train.yaml); `auto` looks at the GPU."""

    features: str = "cache"
    """The feature cache: a folder, or where it lies: https://HOST/PATH, s3://BUCKET/PREFIX, hf://datasets/ORG/NAME."""
    space: str | None = None
    """Which feature space to read, by the start of its name; not needed when there is only one."""
    datasets: str = ""
    """The mix: `cap,points` (by size) or `cap=0.6,points=0.3`; every data set in the cache when empty."""
    held_out: float = 0.05
    """Share of the media kept for evaluation, chosen by the hash of their bytes."""
    min_coverage: float = 0.95
    """Least share of samples whose media must be in the space; known failures do not count."""
    max_frames: int = MAX_FRAMES
    """Frames of one video, at most, of two a second; encode with the same limit (encode.run --max-frames)."""
    order: Literal["random", "blocks"] = "random"
    """Order of reading within an epoch: `blocks` keeps neighbours on disk together, for disks that seek."""

    run: str = "default"
    """Name of the run, below runs/, or a path."""
    resume: bool = False
    """Go on from the newest checkpoint of this run, or begin it when there is none."""
    from_: Annotated[str | None, tyro.conf.arg(name="from", metavar="RUN")] = None
    """Start from this model: a finished run (NAME or PATH), or the `final` folder of one of its stages."""
    inspect: bool = False
    """Print the first packed batches as text, and stop."""
    seed: int = 0
    """Of the connector's first weights, a random language model's, and the order of samples."""

    llm: str | None = None
    """Hub id, folder, or `random:qwen3-tiny`; when not given, the checkpoint's, else configs/model.yaml's."""
    connector: Literal["linear", "mlp"] | None = None
    """From encoder width to language width; when not given, the checkpoint's, else configs/model.yaml's."""
    freeze_vision_encoder: bool = True
    """Must stay on: features are made once, by a frozen encoder."""
    train_connector: bool = True
    """Whether the connector learns."""
    train_llm: bool = True
    """Whether the language model learns."""

    batch_size_per_gpu: Annotated[int, tyro.conf.arg(aliases=("--batch-size",))] = 32
    """Samples a process (a GPU), before accumulation."""
    gradient_accumulation_steps: int = 1
    """Multiplies the samples of one optimizer step; micro-batches are cut by max_tokens alone."""
    processes: int = 0
    """Multiplies them too: how many processes the batch is counted for; 0: as many as torchrun started. It
    starts none. A run keeps the number it began with, and any number of processes may go on with it."""
    max_sequence_length: int = 4096
    """Longest sequence, tokens: one image (or several) with its annotations."""
    max_tokens: int = 8192
    """Longest micro-batch, tokens. Changes memory and speed, never what is learned."""
    use_gradient_checkpointing: bool = True
    """Recompute each layer in the backward pass: a 32 k sequence takes 1.8 instead of 65 GiB."""
    use_flash_attention: bool = True
    """On CUDA, attention by a variable-length kernel; elsewhere it has no effect."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the forward pass; weights stay float32. `auto`: bfloat16 where fast and the model is not tiny."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""

    learning_rate: float = 1e-4
    """Peak, of the language model."""
    connector_learning_rate: float = 1e-3
    """Peak, of the connector."""
    max_steps: int = 1000
    """Optimizer steps."""
    warmup_steps: int = 100
    """Steps until the language model's rate is at its peak; a cosine to `min_lr_ratio` follows."""
    connector_warmup_steps: int = 100
    """The same, for the connector."""
    min_lr_ratio: float = 0.1
    """Where the cosine ends, as a share of the peak."""
    weight_decay: float = 0.01
    """AdamW's; norms and biases have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    adam_eps: float = 1e-8
    """AdamW's."""
    max_grad_norm: float = 1.0
    """Gradients longer than this are scaled down to it."""

    log_every: int = 10
    """Steps between lines on the screen and in trackers; metrics.jsonl has every step."""
    save_every: int = 5000
    """Steps between checkpoints; the newest two are kept."""
    eval_every: int = 1000
    """Steps between held-out losses; 0: none."""
    eval_samples: int = 512
    """Held-out samples at each of them."""
    log: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers, beside metrics.jsonl. wandb and trackio come with `pip install nanomolmo2[track]`."""
    read_threads: int = 4
    """Threads that read feature rows."""
    read_ahead: int = 4
    """Micro-batches read ahead of the one in use."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.freeze_vision_encoder:
            raise ValueError(
                "freeze_vision_encoder: false is not possible: training reads features that the frozen "
                "encoder made once, and a moving encoder would make every stored row stale; leave it true"
            )
        if not (self.train_connector or self.train_llm):
            raise ValueError("train_connector and train_llm are both false: nothing would learn")
        _check_at_least(self, 1, _COUNTS)
        _check_at_least(self, 0, _AMOUNTS)
        for name in ("held_out", "min_coverage", "min_lr_ratio"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} {getattr(self, name)} is not between 0 and 1")
        if self.held_out == 1.0:
            raise ValueError("held_out 1.0 leaves nothing to train on")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed {self.seed} is not between 0 and 2**31 - 1")
        if self.max_grad_norm <= 0 or self.adam_eps <= 0:
            raise ValueError("max_grad_norm and adam_eps must be above 0")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must be in [0, 1)")
        if self.max_tokens < self.max_sequence_length:
            raise ValueError(
                f"max_tokens {self.max_tokens} is below max_sequence_length {self.max_sequence_length}: "
                f"a sequence must fit one micro-batch; give --max-tokens {self.max_sequence_length}"
            )

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimizer step, all processes together."""
        return self.batch_size_per_gpu * self.gradient_accumulation_steps * max(1, self.processes)


_COUNTS = (
    *("batch_size_per_gpu", "gradient_accumulation_steps", "max_sequence_length", "max_steps"),
    *("log_every", "save_every", "read_threads", "read_ahead", "max_frames"),
)
_AMOUNTS = (
    *("warmup_steps", "connector_warmup_steps", "eval_every", "eval_samples", "weight_decay"),
    *("learning_rate", "connector_learning_rate", "processes"),
)


def _check_at_least(options: Options, least: int, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(options, name) < least:
            raise ValueError(f"{name} {getattr(options, name)} is below {least}")


def stage_folder(run: str, stage: int) -> Path:
    """Where one stage of a run keeps everything: runs/<name>/stage<k>, or <path>/stage<k>."""
    named = Path(run)
    folder = named if named.is_absolute() or len(named.parts) > 1 else Path("runs") / run
    return folder / f"stage{stage}"


def preset(selected: Mapping[str, str]) -> dict[str, Any]:
    """Values for `Options` from the SELECTORS found on the command line.

    A stage that exists already is its own preset, so that `--run NAME --resume` goes on as it began.
    """
    stage = _stage(selected.get("stage", "1"))
    hardware = selected.get("hardware", "auto")
    saved = stage_folder(selected.get("run", "default"), stage) / "config.yaml"
    if saved.exists():
        values = {k: v for k, v in read_saved(saved).items() if k not in ("resume", "inspect")}
        if "hardware" not in selected:
            return values
        machine = {k: v for k, v in _hardware(hardware, selected).items() if k in MACHINE_KEYS}
        return _fit_window(values | machine)
    values = _shorten(configs.load("train")["stages"][stage], selected.get("max_steps", ""))
    return _fit_window(
        values | _hardware(hardware, selected) | {"stage": stage, "hardware": hardware}
    )


def _stage(text: str) -> int:
    stages = configs.load("train")["stages"]
    if text not in map(str, stages):
        raise UserError(
            f"--stage {text}: there are stages {', '.join(map(str, stages))} (configs/train.yaml)"
        )
    return int(text)


def _hardware(name: str, selected: Mapping[str, str]) -> dict[str, Any]:
    presets: dict[str, Any] = configs.load("train")["hardware"]
    if name == "auto":
        name = detect_hardware(selected.get("device", "auto"))
    if name not in presets:
        known = ("auto", *presets)
        raise UserError(
            f"--hardware {name}: there are {', '.join(known)}{nearest(name, known)} (configs/train.yaml)"
        )
    return dict(presets[name])


def _shorten(stage: dict[str, Any], max_steps: str) -> dict[str, Any]:
    """A stage cut by `--max-steps` keeps its proportions: 20 steps do not warm up for 2000."""
    if not max_steps.isdigit() or int(max_steps) >= stage["max_steps"]:
        return stage
    share = int(max_steps) / stage["max_steps"]
    warm_ups = {k: round(stage[k] * share) for k in ("warmup_steps", "connector_warmup_steps")}
    return stage | warm_ups


def _fit_window(values: dict[str, Any]) -> dict[str, Any]:
    return values | {"max_tokens": max(values["max_tokens"], values["max_sequence_length"])}


def detect_hardware(device: str) -> str:
    """The hardware preset of the device the run would use, by its memory."""
    if device in ("cpu", "mps"):
        return "cpu"
    import torch  # 2 s: only when the machine must be asked

    from model.io.device import hardware_preset

    if not torch.cuda.is_available():
        return "cpu"
    index = torch.device(device if device.startswith("cuda") else "cuda").index or 0
    return hardware_preset(torch.cuda.get_device_properties(index).total_memory)


def read_saved(path: Path) -> dict[str, Any]:
    """The options a stage was started with.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({' '.join(str(error).split())}); the run needs a new name"
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected keys and values; the run needs a new name")
    return {"processes": 1} | values  # runs begun before there could be several do not say so


def parse_mix(text: str) -> dict[str, float | None]:
    """`a=0.6,b=0.4` or `a,b` as data set -> share.

    Raises:
        UserError: a share is no number.
    """
    mix: dict[str, float | None] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, share = part.partition("=")
        try:
            mix[name.strip()] = float(share) if equals else None
        except ValueError:
            raise UserError(
                f"--datasets {part}: {share!r} is no number; write NAME=SHARE"
            ) from None
    return mix


def format_mix(mix: Mapping[str, float | None]) -> str:
    """The inverse of `parse_mix`."""
    return ",".join(n if share is None else f"{n}={share}" for n, share in mix.items())
