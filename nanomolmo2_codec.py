"""Entry point for zarr-python: lets `zarr.open` read our int8 and int4 feature arrays, from any folder.

The name `cache` is not ours alone: the folder a reader works in may hold its own. So this module has
a name nobody else uses, and loads its two neighbours by their place on disk instead of by name.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

__all__ = ["RowCodec"]


def _neighbour(name: str) -> ModuleType:
    spec = spec_from_file_location(
        f"nanomolmo2_codec.{name}", Path(__file__).parent / "cache" / "format" / f"{name}.py"
    )
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RowCodec = _neighbour("zarr_codec").make_codec(_neighbour("codec"))
