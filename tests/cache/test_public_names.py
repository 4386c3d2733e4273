"""The names that `cache` itself offers.

from cache import CacheRoot, FeatureReader, find_space
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cache


def test_each_public_name_is_the_object_of_its_module() -> None:
    assert sorted(cache._MODULE_OF) == cache.__all__
    for name, module in cache._MODULE_OF.items():
        value = getattr(cache, name)
        assert (value.__name__, value.__module__) == (name, module)
        assert name in dir(cache)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(cache.__file__).read_text())
    (guarded,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in guarded.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module for node in imports for alias in node.names}
    assert seen == cache._MODULE_OF


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'cache' has no attribute 'FeatureWriter'"):
        _ = cache.FeatureWriter  # type: ignore[attr-defined]


def test_importing_the_package_imports_none_of_its_modules() -> None:
    code = "import sys, cache; print([m for m in sys.modules if m.startswith(('cache.', 'numpy'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
