"""How the workers of one job are made: small, picklable, the same wherever they run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cache.format.frame_sampling import MAX_FRAMES
from encode.download.config import DownloadConfig
from model.vision.config import EncoderConfig

if TYPE_CHECKING:
    from model.vision.encoder import VisionEncoder

COMMIT_EVERY_S = 300.0


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """What all workers of a job have in common."""

    encoder: EncoderConfig
    """Entry of configs/encoders.yaml, with the job's overrides."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N, mps."""
    random_weights: bool = False
    """Untrained weights."""
    weights: str | None = None
    """File or folder to take weights from."""
    threads: int = 2
    """For reading, and as many for decoding."""
    torch_threads: int | None = None
    """Cores of one worker's forward pass; None: as torch thinks best."""
    max_frames: int = MAX_FRAMES
    """Of one video, at most."""
    download: DownloadConfig = field(default_factory=DownloadConfig)
    """How servers are asked, by each worker."""
    media_store: Path | None = None
    """Where downloaded bytes are kept, and looked for; None: they are not."""
    commit_every_s: float = COMMIT_EVERY_S
    """A shard that fills slowly is committed at this age: the most work a crash can lose."""
    space: Path = Path()
    """Folder of the space, once it is known."""
    token: str = ""
    """Of the driver's lock, once it is held."""

    def load(self) -> VisionEncoder:
        """The encoder, on its device."""
        import torch  # 3 s, and the driver may not need it

        from model.vision.encoder import load_encoder

        if self.torch_threads is not None:
            torch.set_num_threads(self.torch_threads)
        return load_encoder(
            self.encoder,
            device=self.device,
            random_weights=self.random_weights,
            weights=self.weights,
        )
