"""The names that `cache` itself offers.

from cache import CacheRoot, FeatureReader, find_space
"""

from __future__ import annotations

import subprocess
import sys

import pytest

import cache


def test_each_public_name_is_the_object_of_its_module() -> None:
    for name, module in cache._MODULE_OF.items():
        value = getattr(cache, name)
        assert (value.__name__, value.__module__) == (name, module)
        assert name in dir(cache)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'cache' has no attribute 'FeatureWriter'"):
        _ = cache.FeatureWriter


def test_importing_the_package_imports_none_of_its_modules() -> None:
    code = "import sys, cache; print([m for m in sys.modules if m.startswith(('cache.', 'numpy'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
