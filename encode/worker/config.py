"""How the workers of one job are made: small, picklable, equal for inline workers and Ray actors."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cache.format.frame_sampling import MAX_FRAMES
from encode.download.config import DownloadConfig
from model.vision.config import EncoderConfig

if TYPE_CHECKING:
    from model.vision.encoder import VisionEncoder


SPINS = 1_000
"""Turns for which a thread of torch spins at the end of its part of an operation, before it sleeps: 20 us."""


def spin_briefly() -> None:
    """Let torch's threads sleep soon after their part of an operation, so that decoding gets their cores.

    libgomp, torch's pool of threads on Linux, lets them spin 300,000 times, about 6 ms. While a decoder has
    the core that one of them needs, the others of the pass would spin for nothing.
    Call this before torch is imported, which reads the environment once.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """What all workers of a job have in common."""

    encoder: EncoderConfig
    """Entry of configs/encoders.yaml, with the options of the command applied."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N, mps."""
    random_weights: bool = False
    """Use untrained weights."""
    weights: str | None = None
    """File or folder with the encoder's weights; None: from the hub."""
    threads: int = 2
    """Threads for reading, and as many for decoding."""
    decode_apart: bool = False
    """Whether each decoding thread lets a process of its own decode."""
    compiled: bool = False
    """Whether compiled loops resize: see `InputFit`."""
    timeout_s: float = 120.0
    """Seconds without progress after which a process that decodes counts as hanging."""
    torch_threads: int | None = None
    """Threads of one forward pass on the CPU; None: torch's default."""
    max_frames: int = MAX_FRAMES
    """Frames of one video, at most."""
    download: DownloadConfig = field(default_factory=DownloadConfig)
    """Limits of this worker's downloads."""
    media_store: Path | None = None
    """Folder in which downloaded bytes are kept, and searched for before a download; None: not kept."""
    commit_every_s: float = 300.0
    """Seconds after which a shard is committed although it is not full: the most work a crash can lose."""
    space: Path = Path()
    """Folder of the space. Set once the space exists."""
    token: str = ""
    """Token of the driver's lock. Set once the lock is held."""

    def load(self) -> VisionEncoder:
        """Load the encoder onto its device."""
        import torch  # takes 3 s, and commands that encode nothing do not need it

        from model.vision.encoder import load_encoder

        if self.torch_threads is not None:
            torch.set_num_threads(self.torch_threads)
        return load_encoder(
            self.encoder,
            device=self.device,
            random_weights=self.random_weights,
            weights=self.weights,
        )
