"""The options of `python -m model.generate`."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from cache.format.media_marks import MARK


@dataclass(frozen=True, kw_only=True)
class Options:
    """Ask a trained model about images and videos."""

    prompt: str = ""
    """Question; `<image>` and `<video>` mark the places of media, which are put first without marks."""
    image: tuple[Path, ...] = ()
    """Image files, in the order of their marks."""
    video: tuple[Path, ...] = ()
    """Video files, in the order of their marks."""
    max_frames: int | None = None
    """Most frames of one video; when not given, as in the model's training."""
    run: str = "default"
    """Name of the run, below runs/, or a path."""
    stage: int | None = None
    """Stage of the model; when not given, the last finished one."""
    max_new_tokens: int = 256
    """Longest answer, tokens."""
    temperature: float = 0.0
    """0: the likeliest token each time; above 0: sampled, more randomly the higher it is."""
    seed: int = 0
    """Seed of the sampling."""
    weights: str | None = None
    """File or folder of the encoder's weights, if they moved since encoding."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    verbose: bool = False
    """Print to standard error what was loaded, and the seconds each part took."""

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("no --prompt: give a question")
        if self.temperature < 0:
            raise ValueError(f"temperature {self.temperature} is below 0")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} is below 1")
        if self.max_frames is not None and self.max_frames < 1:
            raise ValueError(f"max_frames {self.max_frames} is below 1")
        for option, paths in (("--image", self.image), ("--video", self.video)):
            for path in paths:
                _refuse_url(option, str(path))
        images, videos, marks = len(self.image), len(self.video), len(MARK.findall(self.prompt))
        # Without files, marks are plain text.
        if images + videos and marks not in (0, images + videos):
            raise ValueError(
                f"{images} --image and {videos} --video but {marks} marks (<image> or <video>) in the "
                "prompt; give one mark for each, or none at all"
            )


def _refuse_url(option: str, path: str) -> None:
    """Raise ValueError with the command that downloads it, if `path` is a URL."""
    # A Path writes one slash for two.
    url = re.sub(r"^(https?):/+", r"\1://", path, flags=re.IGNORECASE)
    if re.match(r"https?://", url, re.IGNORECASE):
        name = shlex.quote(urlsplit(url).path.rstrip("/").rpartition("/")[2] or "downloaded")
        raise ValueError(
            f"{option} takes files, not URLs; download it first: curl -fL -o {name} {shlex.quote(url)}"
        )
