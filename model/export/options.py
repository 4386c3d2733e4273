"""The options of `python -m model.export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["f32", "f16"]
"""Type of the matrices for llama.cpp: as trained, or half the size and rounded."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Export a trained model as a Hugging Face folder."""

    run: str = "default"
    """Name of the run, below runs/, or a path."""
    out: Path = Path("exported")
    """Folder to make. It must not exist, or be empty."""
    stage: int | None = None
    """Stage of the model; when not given, the last finished one."""
    weights: str | None = None
    """File or folder of the encoder's weights, if they moved since encoding."""
    gguf: bool = False
    """Also write the two files that llama.cpp loads: the language model, and the tower with its projector."""
    gguf_type: Kind = "f32"
    """Type of their matrices: as trained, or half the size and rounded."""
    push: str | None = None
    """Repository ORG/NAME on the Hugging Face hub to upload the folder to. It is created private."""
    public: bool = False
    """Create that repository for everybody to see."""
