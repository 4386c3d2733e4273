"""The entry point for zarr-python: `zarr.open` reads int8 and int4 feature arrays from any working directory.

The working directory of a reader may contain another package named `cache`. So this module imports nothing of
ours by name, as `nanomolmo2/__init__.py` does: it loads two files of `cache/format` by their path.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

__all__ = ["RowCodec"]


def _load(name: str) -> ModuleType:
    spec = spec_from_file_location(
        f"{__name__}.{name.replace('/', '_')}",
        Path(__file__).parents[1] / "cache" / "format" / f"{name}.py",
    )
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RowCodec = _load("zarr/codec").make_codec(_load("codec"))
