"""The entry point for zarr-python: `zarr.open` reads int8 and int4 feature arrays from any working directory.

The working directory of a reader may contain another package named `cache`. So this module has a unique name,
and loads two files of `cache/format` by their path instead of by name.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

__all__ = ["RowCodec"]


def _load(name: str) -> ModuleType:
    spec = spec_from_file_location(
        f"nanomolmo2_codec.{name}", Path(__file__).parent / "cache" / "format" / f"{name}.py"
    )
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RowCodec = _load("zarr_codec").make_codec(_load("codec"))
