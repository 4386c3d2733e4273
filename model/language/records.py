"""What a saved model records of its language model. Importing it takes no torch.

version in VERSIONS    # this version of the package reads the model's chat template
"""

from __future__ import annotations

from typing import Annotated, TypedDict

import msgspec

RANDOM = "random:"
"""Beginning of the source of an untrained language model, before the name of its preset."""
TEMPLATE_VERSION = "chatml-2"
"""Version of our chat template. Change it whenever equal messages would give other ids or weights: tokenised
text is stored under it."""
FOLDER_TEMPLATE = "folder-1"
"""Version of the rules of folder_template.py. Change it whenever equal messages would give other ids or
weights."""
VERSIONS = (TEMPLATE_VERSION, FOLDER_TEMPLATE)
"""Templates of models that this version reads."""


class AdaptersMeta(TypedDict):
    """What nanomolmo2.json and state.json say of adapters; see `Adapters`."""

    rank: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
    alpha: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    target_modules: Annotated[
        list[Annotated[str, msgspec.Meta(pattern=r"^\w{1,64}$")]], msgspec.Meta(max_length=64)
    ]
    load_in_4bit: bool
