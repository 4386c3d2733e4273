"""The options of `python -m train.run`, their presets, and which of them a resumed run may change."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import configs
from cache.format.frame_sampling import MAX_FRAMES
from cache.remote.open import RemoteOptions
from cache.store.samples import check_held_out
from configs import UserError, nearest
from configs.hardware import may_have_gpu, on_hardware, one_card
from model.io.run_files import refuse_links_beside

SELECTORS = (
    *("stage", "hardware", "device", "run", "max_steps", "max_sequence_length"),
    *("lora", "resume", "inspect"),
)
"""Options that decide the defaults of other options."""

STAGES = (1, 2, 3)

LORA_RATE = 10
"""Default learning rate of adapters, as a multiple of the language model's own. LLaVA-1.5 takes 2e-4 instead
of 2e-5; "LoRA Without Regret" (Thinking Machines, 2025) finds about 10 for models and data of many sizes."""

MACHINE_KEYS = frozenset(
    {
        *("config", "run", "resume", "inspect", "hardware", "device", "features", "min_coverage"),
        *("mirror", "mirror_gb", "allow_private"),
        *("max_tokens", "use_gradient_checkpointing", "use_flash_attention", "shard", "offload"),
        *("log", "log_every", "save_every", "eval_every", "eval_samples"),
        *("read_threads", "read_ahead"),
    }
)
"""Options for where and how fast a run computes, not what it learns: a resumed run may change them."""

COMMON_KEYS = frozenset(
    {"run", "eval_every", "eval_samples", "save_every", "max_tokens", "shard", "offload"}
)
"""Options of MACHINE_KEYS that no process may change alone: they decide what all processes do together."""


@dataclass(frozen=True, kw_only=True)
class Options(RemoteOptions):
    """Train the connector and the language model on cached features, one stage at a time."""

    stage: Literal[1, 2, 3] = 1
    """1 pre-training, 2 fine-tuning, 3 long context; each starts from the previous stage of the run."""
    hardware: Literal[
        "auto", "cpu", "16gb", "24gb", "40gb", "2x40gb", "4x40gb", "80gb", "2x80gb"
    ] = "auto"
    """Preset for batch size, length and memory (configs/train.yaml); `auto`: by the memory of the GPU.
    `2x40gb` is for two GPUs of 40 GB."""

    config: Path | None = None
    """Your own file of stages, over configs/train.yaml. Default: nanomolmo2.yaml in this folder, if any."""
    features: str = "cache"
    """The feature cache: a folder, or a URL: https://HOST/PATH, s3://BUCKET/PREFIX, hf://datasets/ORG/NAME."""
    space: str | None = None
    """The feature space to read, by the start of its name; not needed if there is only one."""
    datasets: str = ""
    """The mix: `cap,points` (by size) or `cap=0.6,points=0.3`. Empty: every data set in the cache."""
    held_out: float = 0.05
    """Share of the media in the split `val`, and the same share in `test`, chosen by the hash of their bytes.
    Neither is trained on: `val` is for choosing, `test` for reporting."""
    min_coverage: float = 0.95
    """Least share of samples that have all their features. Samples with failed media do not count."""
    max_frames: int = MAX_FRAMES
    """Most frames of one video, at two a second. Encode with the same limit (encode.run --max-frames)."""
    order: Literal["random", "blocks"] = "random"
    """Order of samples. `blocks` keeps neighbours on disk near in time, for disks that seek slowly."""

    run: str = "default"
    """Name of the run, below runs/, or a path."""
    resume: bool = False
    """Continue from the newest checkpoint of this run, or start it if there is none."""
    from_: Annotated[str | None, tyro.conf.arg(name="from", metavar="RUN")] = None
    """The model to start from: a run (NAME or PATH), a stage, a checkpoint or a `final` folder. Of an
    unfinished stage, the newest checkpoint is taken. Or somebody else's LLaVA: a folder in llava-hf's layout,
    or a hub id; its features are made by `encode.run --encoder hf:FOLDER`. The optimizer starts afresh."""
    inspect: bool = False
    """Print the first packed micro-batches as text, then stop."""
    seed: int = 0
    """Decides the connector's initial weights, those of a random language model, and the order of samples."""

    llm: str | None = None
    """The language model: a hub id, a folder, or `random:qwen3-tiny`. Default: the checkpoint's, else
    that of configs/model.yaml."""
    connector: Annotated[str | None, tyro.conf.arg(metavar="{linear,mlp}")] = None
    """Type of the map from encoder width to language width. Default: the checkpoint's, else that of
    configs/model.yaml. `mlp:silu` has another activation than GELU, `mlp,no-bias` no biases."""
    freeze_vision_encoder: bool = True
    """Must be true: the features were made once, by a frozen encoder."""
    train_vision_blocks: int = 0
    """In a space with a tail (encode.run --tail), how many of the encoder's last blocks to train; the tail's
    other blocks are computed, and stay as they are. 0: none."""
    train_connector: bool = True
    """Whether to train the connector."""
    train_llm: bool = True
    """Whether to train the language model; with `lora`, its adapters."""
    lora: Annotated[int, tyro.conf.arg(metavar="RANK")] = 0
    """Train adapters of this rank (LoRA; 8 to 256 are usual) instead of the language model's own weights, on
    every linear layer of its blocks; 0: train it whole. Needs `pip install 'nanomolmo2[lora]'`."""
    load_in_4bit: bool = False
    """With `lora`, round the frozen weights under the adapters to 4 bits (QLoRA). Needs an NVIDIA GPU and
    `pip install 'nanomolmo2[qlora]'`."""

    batch_size_per_gpu: Annotated[int, tyro.conf.arg(aliases=("--batch-size",))] = 32
    """Samples of one process (one GPU), before gradient accumulation."""
    gradient_accumulation_steps: int = 1
    """Multiplies the samples of one optimizer step. The size of micro-batches depends on max_tokens alone."""
    processes: int = 0
    """Number of processes whose batches make one optimizer step; 0: those that torchrun started. It starts
    no process. A resumed run keeps its number, whatever the number of processes that resume it."""
    max_sequence_length: int = 4096
    """Longest sequence, in tokens: one image (or several) with its annotations."""
    over_long: Literal["refuse", "split", "leave-out"] = "refuse"
    """What becomes of a sample longer than `max_sequence_length`: the training is refused; it is cut between
    turns, with the media repeated in each part; or it is left out. Parts and samples left out are counted."""
    max_tokens: int = 8192
    """Longest micro-batch, in tokens. Changes memory and speed, not what is learned."""
    use_gradient_checkpointing: bool = True
    """Recompute each layer in the backward pass: a sequence of 32 k tokens takes 1.8 instead of 65 GiB."""
    shard: Literal["none", "full", "node"] = "none"
    """What each of several processes has of weights, gradients and optimizer state: `none`, all; `full`, a
    part; `node`, a part of those of its machine. Changes memory and speed, not what is learned."""
    offload: bool = False
    """Keep weights, gradients and optimizer state in the CPU's memory, and run AdamW there: the GPU has one
    layer at a time. For models that do not fit otherwise; slower."""
    use_flash_attention: bool = True
    """On CUDA, compute attention by a variable-length kernel; no effect elsewhere."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the forward pass; weights are float32. `auto`: bfloat16 if the device computes it fast and
    the model is not tiny."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""

    learning_rate: float = 1e-4
    """Peak learning rate of the language model. With `lora` the default is ten times that of the stage."""
    connector_learning_rate: float = 1e-3
    """Peak learning rate of the connector."""
    vision_learning_rate: float = 6e-6  # Molmo's for its vision encoder
    """Peak learning rate of the encoder's last blocks; they warm up with the language model."""
    max_steps: int = 1000
    """Optimizer steps of the stage."""
    warmup_steps: int = 100
    """Steps of the language model's warm-up; a cosine down to `min_lr_ratio` follows."""
    connector_warmup_steps: int = 100
    """Steps of the connector's warm-up."""
    min_lr_ratio: float = 0.1
    """Learning rate of the last step, as a share of the peak."""
    weight_decay: float = 0.01
    """AdamW's weight decay; norms and biases have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to this norm."""

    log_every: int = 10
    """Steps between lines on the screen and in trackers; metrics.jsonl has every step."""
    save_every: int = 5000
    """Steps between checkpoints; the newest two are kept."""
    eval_every: int = 1000
    """Steps between evaluations of the held-out loss; 0: never."""
    eval_samples: int = 512
    """Held-out samples of each evaluation."""
    log: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers, besides metrics.jsonl: project nanoMolmo2. `pip install wandb`, `pip install trackio`."""
    read_threads: int = 4
    """Threads that read feature rows."""
    read_ahead: int = 4
    """Micro-batches read ahead of the current one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.freeze_vision_encoder:
            raise ValueError(
                "freeze_vision_encoder: false is not possible: training reads features that the frozen "
                "encoder made once, and a moving encoder would make every stored row stale; leave it true "
                "(its last blocks can train: encode.run --block N --tail, then --train-vision-blocks)"
            )
        if not (self.train_connector or self.train_llm or self.train_vision_blocks):
            raise ValueError("train_connector and train_llm are both false: nothing would learn")
        if self.lora > 0 and not self.train_llm:
            raise ValueError(
                f"lora {self.lora} with train_llm false: adapters are how the language model would train; "
                "leave out --no-train-llm to train them, or give --lora 0 to train the connector alone"
            )
        if self.load_in_4bit and not self.lora:
            raise ValueError(
                "load_in_4bit without lora: weights of 4 bits cannot train, adapters on them can; give "
                "--lora 16"
            )
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} {value} is not finite")
        _check_at_least(self, 1, _COUNTS)
        _check_at_least(self, 0, _AMOUNTS)
        for name in ("min_coverage", "min_lr_ratio"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} {getattr(self, name)} is not between 0 and 1")
        check_held_out(self.held_out)
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed {self.seed} is not between 0 and 2**31 - 1")
        if self.max_grad_norm <= 0 or self.adam_eps <= 0:
            raise ValueError("max_grad_norm and adam_eps must be above 0")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must be in [0, 1)")
        if self.run.strip(" /") in ("", ".", ".."):
            raise ValueError(f"run {self.run!r} is no name and no path of a run")
        if self.max_tokens < self.max_sequence_length:
            raise ValueError(
                f"max_tokens {self.max_tokens} is below max_sequence_length {self.max_sequence_length}: "
                f"a sequence must fit one micro-batch; give --max-tokens {self.max_sequence_length}"
            )

    @property
    def samples_per_step(self) -> int:
        """Number of samples of one optimizer step, all processes together."""
        return self.batch_size_per_gpu * self.gradient_accumulation_steps * max(1, self.processes)


_COUNTS = (
    *("batch_size_per_gpu", "gradient_accumulation_steps", "max_sequence_length", "max_steps"),
    *("log_every", "save_every", "read_threads", "read_ahead", "max_frames"),
)
_AMOUNTS = (
    *("warmup_steps", "connector_warmup_steps", "eval_every", "eval_samples", "weight_decay"),
    *("learning_rate", "connector_learning_rate", "vision_learning_rate", "processes", "lora"),
    "train_vision_blocks",
)


def _check_at_least(options: Options, least: int, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(options, name) < least:
            raise ValueError(f"{name} {getattr(options, name)} is below {least}")


def common_options(options: Options) -> dict[str, str]:
    """Return the options that all processes of a training have in common, as text."""
    own = MACHINE_KEYS - COMMON_KEYS
    return {name: str(value) for name, value in vars(options).items() if name not in own}


def stage_folder(run: str, stage: int) -> Path:
    """Return the folder of one stage of a run: runs/<name>/stage<k>, or <path>/stage<k>."""
    named = Path(run)
    folder = named if named.is_absolute() or len(named.parts) > 1 else Path("runs") / run
    return folder / f"stage{stage}"


def free_name(run: str) -> str:
    """Return the name of a run that does not exist, for a run that goes on from `run`: r-2, r-3, ..."""
    named = run.rstrip("/")
    before, dash, number = named.rpartition("-")
    if dash and number.isdecimal() and stage_folder(before, 1).parent.exists():
        named = before
    numbers = itertools.count(2)
    return next(
        name for n in numbers if not stage_folder(name := f"{named}-{n}", 1).parent.exists()
    )


def preset(selected: Mapping[str, str]) -> dict[str, Any]:
    """Return values for `Options`, by the SELECTORS found on the command line.

    With `--resume` (or `--inspect`), a stage that exists is its own preset: `--run NAME --resume` has its
    options.
    """
    stage = _stage(selected.get("stage", "1"))
    hardware = selected.get("hardware", "auto")
    saved = stage_folder(selected.get("run", "default"), stage) / "config.yaml"
    if selected.keys() & {"resume", "inspect"} and saved.exists():
        values = {k: v for k, v in read_saved(saved).items() if k not in ("resume", "inspect")}
        if "hardware" not in selected:
            return values
        _, machine = _hardware(hardware, selected)
        return _fit_window(values | {k: v for k, v in machine.items() if k in MACHINE_KEYS})
    _check_user_stages()
    users = configs.user_section("stages").get(stage, {})
    ours = configs.read_yaml(configs.FOLDER / "train.yaml")["stages"][stage]
    values = _scale_warmups(ours, str(users.get("max_steps", ""))) | users
    values = _scale_warmups(values, selected.get("max_steps", ""))
    name, machine = _hardware(hardware, selected)
    values = on_hardware(values, name, machine) | {"stage": stage, "hardware": hardware}
    rank = selected.get("lora", str(values.get("lora", 0)))
    if rank.isdecimal() and int(rank) and "learning_rate" not in users:
        values["learning_rate"] = round(values["learning_rate"] * LORA_RATE, 12)
    if (window := selected.get("max_sequence_length", "")).isdecimal():
        values["max_sequence_length"] = int(window)
    return _fit_window(values)


def _check_user_stages() -> None:
    """Check the stages of the user's file; an error names that file."""
    for stage, values in configs.user_section("stages").items():
        where = f"{configs.where_is('stages', stage)}: {stage}"
        if not isinstance(values, Mapping):
            raise UserError(f"{where}: expected options of train.run and their values")
        if stage not in STAGES:
            raise UserError(f"{where}: there are stages {', '.join(map(str, STAGES))}")
        configs.build(Options, values, where)


def _stage(text: str) -> int:
    """Return the stage of a command line; raise UserError if configs/train.yaml does not have it."""
    stages = configs.load("train")["stages"]
    if text not in map(str, stages):
        raise UserError(
            f"--stage {text}: there are stages {', '.join(map(str, stages))} (configs/train.yaml)"
        )
    return int(text)


def _hardware(name: str, selected: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """Return the name and the values of a hardware preset; of `auto`, those for the device."""
    presets: dict[str, Any] = configs.load("train")["hardware"]
    if name == "auto":
        name = detect_hardware(selected.get("device", "auto"))
    if name not in presets:
        known = ("auto", *presets)
        raise UserError(
            f"--hardware {name}: there are {', '.join(known)}{nearest(name, known)} (configs/train.yaml)"
        )
    return name, dict(presets[name])


def _scale_warmups(stage: dict[str, Any], max_steps: str) -> dict[str, Any]:
    """Shorten the warm-ups in proportion to `--max-steps`: 20 steps need no warm-up of 2,000."""
    if not max_steps.isdigit() or int(max_steps) >= stage["max_steps"]:
        return stage
    share = int(max_steps) / stage["max_steps"]
    warm_ups = {k: round(stage[k] * share) for k in ("warmup_steps", "connector_warmup_steps")}
    return stage | warm_ups


def _fit_window(values: dict[str, Any]) -> dict[str, Any]:
    """Raise max_tokens to the length of a sequence, which must fit one micro-batch."""
    return values | {"max_tokens": max(values["max_tokens"], values["max_sequence_length"])}


def detect_hardware(device: str) -> str:
    """Return the name of the hardware preset for a device, by its memory."""
    if device in ("cpu", "mps") or not may_have_gpu():
        return "cpu"
    import torch  # here, because it takes seconds and is not needed otherwise

    if not torch.cuda.is_available():
        return "cpu"
    index = torch.device(device if device.startswith("cuda") else "cuda").index or 0
    return one_card(torch.cuda.get_device_properties(index).total_memory)


def read_saved(path: Path) -> dict[str, Any]:
    """Return the saved options of a stage.

    Raises:
        UserError: the file is missing or damaged.
    """
    refuse_links_beside(path)
    try:
        return configs.read_yaml(path)
    except UserError as error:
        raise UserError(f"{error}; the run needs a new name") from None


def parse_mix(text: str) -> dict[str, float | None]:
    """Return data set -> share for `a=0.6,b=0.4`; with `a,b` the shares are None.

    Raises:
        UserError: a share is no finite number.
    """
    mix: dict[str, float | None] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, share = part.partition("=")
        try:
            mix[name.strip()] = float(share) if equals else None
            known = not equals or math.isfinite(float(share))
        except ValueError:
            known = False
        if not known:
            raise UserError(f"--datasets {part}: {share!r} is no number; write NAME=SHARE")
    return mix


def format_mix(mix: Mapping[str, float | None]) -> str:
    """Return the text that `parse_mix` parses to `mix`."""
    return ",".join(n if share is None else f"{n}={share}" for n, share in mix.items())
