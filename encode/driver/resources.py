"""Choose how many workers encode, from cores and GPUs, and measure how fast one batch is."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from cache.format.spec import FeatureSpec
from configs import UserError
from configs.hardware import cores
from encode.plan.estimate import Speed
from encode.worker.config import WorkerConfig
from model.vision.encoder import VisionEncoder
from model.vision.pipeline import Pipeline

INLINE_S = 120.0
"""Shorter jobs run in the driver itself: starting Ray and loading the encoder again takes 10 s."""

CORES_PER_WORKER = 8
"""Cores that a worker on a CPU gets: one forward pass gains little from more threads."""

MAX_THREADS = 16
"""Cores of one worker, at most, for which it has reading threads, and as many decoding threads."""

GPU_BATCHES = 16
"""Batches that are encoded on a GPU to measure it."""

DECODE_APART_S = 10.0
"""Shorter jobs decode in threads: the processes take a second of all cores to start."""

MEASURE_BATCHES = 4
"""Jobs of at most this many batches are not measured: it would take as long as encoding them."""


@dataclass(frozen=True, kw_only=True)
class WorkerLayout:
    """The workers of a job and their threads."""

    workers: int
    """Worker processes; 0: the driver encodes itself."""
    gpus: int
    """GPUs that each worker has to itself: 0 or 1."""
    threads: int
    """Reading threads of each worker, and as many decoding threads."""
    torch_threads: int
    """Threads of one forward pass on the CPU."""
    decode_apart: bool = False
    """Whether each decoding thread lets a process of its own decode."""

    def apply(self, config: WorkerConfig) -> WorkerConfig:
        """Return `config` for one of these workers."""
        return replace(
            config,
            threads=self.threads,
            torch_threads=self.torch_threads,
            decode_apart=self.decode_apart,
        )


def gpus(device: str) -> int:
    """Return the number of GPUs that a job on this device uses side by side; 0 for one device or a CPU."""
    return (
        torch.cuda.device_count() if device in ("auto", "cuda") and torch.cuda.is_available() else 0
    )


def choose_layout(
    workers: int | Literal["auto"],
    threads: int | None,
    *,
    device: str,
    device_type: str,
    seconds: float,
) -> WorkerLayout:
    """Return the workers for a job that takes about `seconds`.

    Args:
        workers: option --workers.
        threads: option --threads.
        device: option --device; `auto` and `cuda` mean every GPU, `cuda:1` or `mps` mean that one.
        device_type: type of the device that the encoder is on: cpu, cuda or mps.
        seconds: estimated seconds of the whole job.

    Raises:
        UserError: more workers than GPUs.
    """
    available = gpus(device)
    if isinstance(workers, int):
        count = workers
    elif not starts_ray(workers, seconds):
        count = 0
    elif device_type == "cpu":
        count = max(1, cores() // CORES_PER_WORKER)
    else:
        count = max(1, available)
    if available and count > available:
        raise UserError(
            f"--workers {count}: each worker needs a GPU, and there are {available}; on the CPU: --device cpu"
        )
    share = max(1, cores() // max(1, count))
    return WorkerLayout(
        workers=count,
        gpus=1 if available and count else 0,
        threads=threads or decode_threads(share),
        # torch has one thread for each physical core, or OMP_NUM_THREADS.
        torch_threads=max(1, torch.get_num_threads() // max(1, count)),
        decode_apart=seconds >= DECODE_APART_S,
    )


def decode_threads(cores_of_worker: int) -> int:
    """Return the decoding threads of a worker, one more than its cores: some wait for the next file.

    With as many as cores, two cores decoded 69 images/s beside a GPU, with one more 82 (docs/BENCHMARKS.md,
    2026-11-27).
    """
    return min(MAX_THREADS, cores_of_worker) + 1


def starts_ray(workers: int | Literal["auto"], seconds: float) -> bool:
    """Return whether a job of about `seconds` runs in processes of its own, by option --workers."""
    return seconds >= INLINE_S if workers == "auto" else workers > 0


def measure_speed(encoder: VisionEncoder, spec: FeatureSpec, device: torch.device) -> Speed:
    """Measure batches of blank images, as a worker encodes and packs them, after a first one.

    If the first batch takes over a second, it is the measurement.

    Raises:
        UserError: a batch cannot be encoded on this device.
    """
    side = spec.image_size
    blank = [np.zeros((side, side, 3), np.uint8)] * spec.batch_size
    seconds = cpu_s = 0.0
    # One batch alone has all threads of a CPU: with half of them, that of a large tower takes twice as long.
    pipeline = Pipeline[None](encoder, spec.codec, side_by_side=False)
    with contextlib.closing(pipeline):
        # On a GPU a batch is copied while another one is encoded, so one alone takes longer.
        for count in (1, GPU_BATCHES if device.type == "cuda" else 1):
            start, cpu = time.perf_counter(), time.process_time()
            done = [one for _ in range(count) for one in pipeline.put(blank, "image", None)]
            for one in (*done, *pipeline.drain()):
                if one.failure is not None:
                    raise _cannot_encode(one.failure, spec, device) from one.failure
            seconds = (time.perf_counter() - start) / count
            cpu_s = (time.process_time() - cpu) / count
            if seconds > 1.0:
                break
    return Speed(
        encode_s=seconds / spec.batch_size / max(1, gpus(str(device))),
        encode_cpu_s=cpu_s / spec.batch_size,
        cores=cores(),
    )


def _cannot_encode(error: RuntimeError, spec: FeatureSpec, device: torch.device) -> UserError:
    text = " ".join(str(error).split())[:200]
    return UserError(
        f"a batch of {spec.batch_size} cannot be encoded on {device}: {type(error).__name__}: "
        f"{text}; another device: --device, a smaller batch: batch_size in configs/encoders.yaml"
    )
