"""Record a run: metrics.jsonl with every step, a line on the screen, and trackers on request.

    log = RunLog(folder, every=10, last_step=1000, trackers=open_trackers(("tensorboard",), folder, ...))
    log.step(StepRecord(step=1, loss=3.2, ...))

Rates cover the steps since the previous line, not the whole run. Waiting for data is measured where the
trainer waits. On resume, metrics.jsonl is cut at the checkpoint, so that it has every step once.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import json
import logging
import math
import resource
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NotRequired, TypedDict

import msgspec

from cache.format.gate import fit, parse_json
from cache.store.files import write_atomic
from configs import UserError, one_line
from configs.console import duration_text
from configs.progress import Meter, number_text
from model.io.run_files import MOST_METRICS, Count, read_bytes

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
PROJECT = "nanoMolmo2"
"""Name of the project in wandb and trackio."""
WITHOUT = "; the training goes on without it"
WAYS_OUT = {
    "wandb": " (log in: wandb login, or keep the curves on this machine: WANDB_MODE=offline)"
}
CLOSE_S = 60.0
"""Seconds that a tracker may take to write what is buffered."""
GIB = 2**30
RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes that getrusage counts in: KiB on Linux, bytes on macOS."""


@dataclass(frozen=True, kw_only=True)
class StepTotals:
    """The totals of one optimizer step over all processes."""

    loss: float
    """Weighted cross-entropy per supervised token of all samples, nats; NaN if a part of it is not finite."""
    samples: int
    """Number of samples."""
    tokens: int
    """Number of tokens, image tokens included."""
    wait_s: float
    """Seconds of waiting for data of the process that waited longest: the others wait for it."""
    memory_gib: float
    """Peak memory so far of the process with the highest peak, of its GPU or, on a CPU, its own, GiB."""


@dataclass(frozen=True, kw_only=True)
class StepRecord(StepTotals):
    """One optimizer step, as metrics.jsonl has it."""

    step: int
    """Steps done, this one included."""
    epoch: float
    """Epochs finished when this step started."""
    lr: float
    """Learning rate of the language model; 0 if it is frozen."""
    connector_lr: float
    """Learning rate of the connector; 0 if it is frozen."""
    vision_lr: float = 0.0
    """Learning rate of the encoder's last blocks; 0 if they are frozen, or not part of the model."""
    grad_norm: float
    """Norm of all gradients together, before clipping."""
    step_s: float
    """Duration, seconds."""


Amount = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
"""Seconds or GiB."""


class _Line(TypedDict):
    """A line of metrics.jsonl."""

    step: Count
    held_out_loss: NotRequired[float]


class _StepLine(_Line):
    """The line of one optimizer step: what reports, comparisons and the ends of a run read of it."""

    loss: float
    lr: NotRequired[float]
    connector_lr: NotRequired[float]
    vision_lr: NotRequired[float]
    grad_norm: NotRequired[float]
    samples: NotRequired[Count]
    tokens: NotRequired[Count]
    step_s: NotRequired[Amount]
    wait_s: NotRequired[Amount]
    memory_gib: NotRequired[Amount]


class Tracker:
    """A tool that draws curves. Training does not need it: its first failure is a warning, and its end."""

    def __init__(
        self,
        name: str,
        log: Callable[[Mapping[str, float], int], object],
        close: Callable[[], object],
        *,
        after: int = 0,
    ) -> None:
        """Take over a tool that is open.

        Args:
            name: what `--log` calls it.
            log: adds one point to each curve, at a step.
            close: writes what is buffered, and ends.
            after: step up to which it has every point, from the process that a resumed run continues.
        """
        self._name, self._log, self._close, self._after = name, log, close, after
        self._works = True

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add one point to each curve, unless the tool has it or has failed."""
        if self._works and step > self._after:
            self._try(lambda: self._log(values, step))

    def close(self) -> None:
        """Write what is buffered, for at most CLOSE_S: without network, wandb would try for hours."""
        if not self._works:
            return
        # trackio finds its run by a context variable.
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(self._try, self._close), daemon=True)
        thread.start()
        thread.join(CLOSE_S)
        if thread.is_alive():
            self._warn(f"not finished after {CLOSE_S:.0f} s, so its last points may be missing")

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            self._warn(_reason(error))

    def _warn(self, reason: str) -> None:
        self._works = False
        log.warning("--log %s: %s%s", self._name, reason, WITHOUT)


class RunLog:
    """Write metrics.jsonl; every `every` steps print a line and add points to the trackers."""

    def __init__(
        self,
        folder: Path,
        *,
        every: int,
        last_step: int,
        start: int = 0,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        """Open the file, and show a bar below the lines on a terminal.

        Args:
            folder: of the stage.
            every: steps between two lines.
            last_step: the step after which the stage ends.
            start: steps done before.
            trackers: they get the same points.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        self._every, self._last = every, last_step
        self._trackers = trackers
        self._window: list[StepRecord] = []
        self._bar = Meter("train", last_step, text=number_text, start=start, lines=False)

    def step(self, record: StepRecord) -> None:
        """Record one step."""
        self._write({"step": record.step} | asdict(record))  # the step first, for people
        self._window.append(record)
        self._bar.add(1)
        if record.step % self._every == 0 or record.step == self._last or record.step == 1:
            print(screen_line(self._window, self._last), flush=True)
            self._track(window_values(self._window), record.step)
            self._window = []

    def held_out(self, step: int, loss: float, samples: int) -> None:
        """Record the loss on held-out samples after `step` steps."""
        self._write({"step": step, "held_out_loss": loss, "held_out_samples": samples})
        print(
            f"step {step:>{len(str(self._last))}}/{self._last}  held-out loss {loss:.4f} ({samples} samples)",
            flush=True,
        )
        self._track({"held_out_loss": loss}, step)

    def close(self) -> None:
        """Close the file and the trackers."""
        self._bar.close()
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def _write(self, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def _track(self, values: Mapping[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.log(values, step)


class NoLog:
    """The log of a process that is not the main one: it records nothing."""

    def step(self, record: StepRecord) -> None:
        """Do nothing."""

    def held_out(self, step: int, loss: float, samples: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def window_values(window: Sequence[StepRecord]) -> dict[str, float]:
    """Return one point for a window of steps: means, and rates over its whole duration."""
    seconds = math.fsum(r.step_s for r in window)
    last = window[-1]
    return {
        "loss": math.fsum(r.loss for r in window) / len(window),
        "lr": last.lr,
        "connector_lr": last.connector_lr,
        **({"vision_lr": last.vision_lr} if last.vision_lr else {}),
        "grad_norm": math.fsum(r.grad_norm for r in window) / len(window),
        "tokens_per_s": sum(r.tokens for r in window) / seconds,
        "samples_per_s": sum(r.samples for r in window) / seconds,
        "data_wait": math.fsum(r.wait_s for r in window) / seconds,
        "step_s": seconds / len(window),
        "memory_gib": last.memory_gib,
        "epoch": last.epoch,
    }


def screen_line(window: Sequence[StepRecord], last_step: int) -> str:
    """Return the line on the screen for a window of steps."""
    v = window_values(window)
    step = window[-1].step
    names = ("lr", "connector_lr", "vision_lr")
    rates = " ".join(f"{v[name]:.2e}" for name in names if v.get(name))
    return (
        f"step {step:>{len(str(last_step))}}/{last_step}  loss {v['loss']:.4f}  lr {rates}  "
        f"grad {v['grad_norm']:.2f}  {v['tokens_per_s']:,.0f} tok/s  {v['samples_per_s']:.1f} samples/s  "
        f"wait {v['data_wait']:.1%}  {v['step_s'] * 1000:.0f} ms  {v['memory_gib']:.1f} GiB  "
        f"ETA {duration_text((last_step - step) * v['step_s'])}"
    )


def memory_gib(device: torch.device) -> float:
    """Return peak memory in GiB: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        import torch  # here: what reads metrics alone takes no seconds to start

        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / GIB


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, without a last line that a kill left incomplete."""
    path = folder / METRICS
    way_out = "remove it, and the run goes on without its curves"
    try:
        data = read_bytes(path, way_out, most=MOST_METRICS)
    except FileNotFoundError:
        return []
    found: list[dict[str, Any]] = []
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            values = parse_json(line, not_finite=True)
            fit(values, _StepLine if isinstance(values, dict) and "loss" in values else _Line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: cannot be read ({error}); {way_out}") from None
        found.append(values)
    return found


def cut_metrics(folder: Path, step: int) -> int:
    """Remove what was recorded after `step` steps, because a resumed run records it again.

    Returns:
        The last step that was recorded; 0 if none was.
    """
    lines = read_metrics(folder)
    kept = [line for line in lines if line["step"] <= step]
    write_atomic(folder / METRICS, "".join(json.dumps(line) + "\n" for line in kept).encode())
    return max((line["step"] for line in lines), default=0)


# ---- trackers


def open_trackers(
    names: Sequence[str],
    folder: Path,
    *,
    run_id: str,
    start: int,
    recorded: int,
    config: Mapping[str, Any],
) -> list[Tracker]:
    """Open the trackers named by `--log`; a resumed run continues their curves.

    A tracker that cannot be opened is a warning.

    Args:
        names: of trackers.
        folder: of the stage.
        run_id: identifies the run, also after it is resumed.
        start: step of the checkpoint that is continued; 0 at the start.
        recorded: the last step that was recorded before.
        config: the options of the run.

    Raises:
        UserError: a tracker's package is not installed.
    """
    title = f"{folder.absolute().parent.name}-{folder.name}"
    # As JSON, because a tracker may not take a path or a tuple.
    plain = json.loads(json.dumps(dict(config), default=str))
    wandb = {
        "name": title,
        "id": run_id,
        "resume": "allow",
        "dir": str(folder),
        # The question for a key would keep a terminal waiting for ever.
        "settings": {"login_timeout": 60},
    }
    # trackio finds a run by its name, and another folder may have one of this name.
    trackio = {"name": f"{title}-{run_id}", "resume": "allow" if start else "never"}
    openers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: _open_tensorboard(folder / "tb", start),
        "wandb": lambda: _open_hosted("wandb", recorded, config=plain, **wandb),
        "trackio": lambda: _open_hosted("trackio", recorded, config=plain, **trackio),
    }
    found = []
    for name in dict.fromkeys(names):
        try:
            found.append(openers[name]())
        except UserError:
            raise
        except Exception as error:
            way_out = WAYS_OUT.get(name, "")
            log.warning("--log %s: %s%s%s", name, _reason(error), WITHOUT, way_out)
    return found


def _reason(error: Exception) -> str:
    return one_line(error).rstrip(". ")


def _open_tensorboard(folder: Path, start: int) -> Tracker:
    """Write curves for `tensorboard --logdir runs`."""
    # Imported here, because it takes 1 s.
    from torch.utils.tensorboard import SummaryWriter

    # Steps after the checkpoint are recorded again, so their old points are removed.
    writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def add(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker("tensorboard", add, writer.close)


def _open_hosted(package: str, recorded: int, **options: Any) -> Tracker:
    """Open a run of wandb or trackio (the local tracker by Hugging Face), which have one interface."""
    module: Any = None
    with contextlib.suppress(ImportError):
        module = importlib.import_module(package)
    if not hasattr(module, "init"):  # a folder of this name in the working directory is no package
        raise UserError(
            f"--log {package} needs a package that is not installed: pip install {package}, or use --log "
            "tensorboard"
        )
    module.init(project=PROJECT, **options)
    # Through the module: both document this, while not every trackio returns its run.
    return Tracker(
        package,
        lambda values, step: module.log(dict(values), step=step),
        module.finish,
        after=recorded,
    )
