"""Read a feature cache in your own programs.

    import nanomolmo2 as nm

    cache = nm.open("cache")                        # a folder, or https://, s3://, hf://
    cache["photos/cat.jpg"]                         # (tokens, width) float16
    data = cache.dataset("pixmo-cap", split="train")
    for batch in DataLoader(data, 64, num_workers=4, collate_fn=data.collate):
        features, messages = batch.features(device), batch.messages

    opened     open, Cache: features by path, URL or key; numpy only          opened.py, clip.py, ...
    dataset    the samples of a split as a torch Dataset; batches             dataset.py, batch.py, memory.py
    unpack     stored rows to features in torch, on any device                unpack.py
    codec      zarr-python reads int8 and int4 arrays by it                   codec.py
    __main__   the console script: nanomolmo2 encode, train, ls, ...

docs/PACKAGE.md is the guide. The names in `_MODULE_OF` are public. Each is imported on first use, so `codec`
works beside another package named `cache`, and reading arrays needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cache.errors import CacheError as CacheError
    from cache.errors import CorruptError as CorruptError
    from cache.errors import NotFoundError as NotFoundError
    from cache.errors import UnreachableError as UnreachableError
    from nanomolmo2.batch import Batch as Batch
    from nanomolmo2.batch import Example as Example
    from nanomolmo2.batch import Features as Features
    from nanomolmo2.batch import collate as collate
    from nanomolmo2.clip import Clip as Clip
    from nanomolmo2.dataset import FeatureDataset as FeatureDataset
    from nanomolmo2.opened import Cache as Cache
    from nanomolmo2.opened import MissingFeaturesError as MissingFeaturesError
    from nanomolmo2.opened import open as open  # noqa: A004

_MODULE_OF = {
    "Batch": "nanomolmo2.batch",
    "Cache": "nanomolmo2.opened",
    "CacheError": "cache.errors",
    "Clip": "nanomolmo2.clip",
    "CorruptError": "cache.errors",
    "Example": "nanomolmo2.batch",
    "FeatureDataset": "nanomolmo2.dataset",
    "Features": "nanomolmo2.batch",
    "MissingFeaturesError": "nanomolmo2.opened",
    "NotFoundError": "cache.errors",
    "UnreachableError": "cache.errors",
    "collate": "nanomolmo2.batch",
    "open": "nanomolmo2.opened",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _check_place()
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULE_OF]


def _check_place() -> None:
    """Raise ImportError if another module named `cache` hides the package beside this one."""
    found = import_module("cache")
    if not hasattr(found, "_MODULE_OF"):
        place = getattr(found, "__file__", None) or "a folder `cache` without __init__.py"
        raise ImportError(
            f"{place} hides the package `cache` of nanomolmo2; rename it, or start Python elsewhere"
        )
