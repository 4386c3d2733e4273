"""Names of what the folder of a stage has, and what run.json says. Importing it takes no torch.

run_folder.py says what each file is.
"""

from __future__ import annotations

from typing import Annotated, NotRequired, TypedDict

import msgspec

from model.io.base_model import Base
from model.io.run_files import Count, Name

CONFIG, RUN, SAMPLES = "config.yaml", "run.json", "samples.safetensors"
FINAL, CHECKPOINTS, START = "final", "checkpoints", "start"


class Facts(TypedDict):
    """Content of run.json; `parameters`: those that are trained, and all."""

    id: Annotated[str, msgspec.Meta(pattern=r"^[0-9A-Za-z_-]{1,64}$")]
    space: Name
    fingerprint: str
    samples: dict[str, int]
    samples_digest: str
    command: list[str]
    origin: tuple[str, str] | None
    base: NotRequired[Base]
    parameters: NotRequired[tuple[Count, Count]]
