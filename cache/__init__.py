"""A feature cache: rows of a frozen encoder's output, and the samples and media they belong to.

    from cache import CacheRoot, FeatureReader, find_space

    reader = FeatureReader(find_space(CacheRoot(Path("cache")), None))
    features = reader.read("image", key)                # (tokens, width) float16

Rooms, each above the ones it may import:

    ls verify gc merge convert share    commands: python -m cache.ls; so are the packages export and view
    export/        standard files from a space: WebDataset tars, safetensors
    view/          an HTML page of what a cache contains
    maintenance/   what the commands do: check, repair, compact, copy, count
    remote/        read a cache over https, s3 and hf
    store/         one cache on a local disk: read it, write to it, find rows
    format/        what a feature is, and the bytes of a row, a shard and a space.json
    errors         every exception

This folder is also the default place of a cache. Its data are the folders samples, media, spaces, locks,
damaged and garbage, and the file listing.json (see `cache.store.paths`); everything else is code.

The names in `_MODULE_OF` are public. Each is imported on first use, so importing `cache` itself is fast.
Nothing in this package imports torch or Ray. Read cache/store/__init__.py first.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

# A command of ours imports `configs` first: see configs.signals. A reader of a cache never does.
if sys.argv[:1] == ["-m"] and any(word.split(".")[0] == "cache" for word in sys.orig_argv):
    import_module("configs")

_MODULE_OF = {
    "CacheError": "cache.errors",
    "CacheRoot": "cache.store.paths",
    "CorruptError": "cache.errors",
    "FeatureReader": "cache.store.reader",
    "FeatureSpec": "cache.format.spec",
    "MediaRecord": "cache.store.ledger",
    "MediaRef": "cache.store.samples",
    "Message": "cache.store.samples",
    "Origin": "cache.store.samples",
    "RemoteOptions": "cache.remote.open",
    "Sample": "cache.store.samples",
    "ShardWriter": "cache.store.writer",
    "Space": "cache.store.space",
    "append_media": "cache.store.ledger",
    "find_space": "cache.store.space",
    "open_reader": "cache.remote.open",
    "write_samples": "cache.store.samples",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULE_OF]
