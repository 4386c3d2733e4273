"""What reading needs: numpy, pyarrow, awscrt and msgspec; for a remote cache certifi may be needed too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cache.share import share
from cache.store.paths import CacheRoot
from tests.support.feature_caches import ask, features, new_world
from tests.support.remote_servers import WebServer

pytestmark = pytest.mark.slow

READER = """
import sys

PACKAGES = {"numpy", "pyarrow", "awscrt", "_awscrt", "msgspec", "cache", "nanomolmo2"}
ALLOWED = set(sys.stdlib_module_names) | PACKAGES

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED and not name.startswith("_sysconfigdata"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
for finder in sys.modules.copy():
    if finder.partition(".")[0] not in ALLOWED | {"__main__"} and not finder.startswith("_"):
        del sys.modules[finder]

import nanomolmo2 as nm

cache = nm.open(WHERE, mirror="mirror")
image, clip = cache["/a.png"], cache["/video v.mp4"]
print(image.sum(dtype="f8"), len(clip.times), len(cache), "/nope.png" in cache)
try:
    cache["/nope.png"]
except KeyError as error:
    assert "python -m encode.run" in str(error)
try:
    cache.dataset("d")
except ModuleNotFoundError as error:
    print(error)
print(sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "yaml", "tyro", "configs"}))
"""


@pytest.mark.parametrize("remote", [False, True], ids=["folder", "server"])
def test_reading_needs_few_packages(
    tmp_path: Path, in_process: Callable[..., tuple[int, str, str]], remote: bool
) -> None:
    world = new_world(tmp_path)
    world.write(d=[ask("1", ["a"])])
    world.encode(["a"])
    world.encode_videos({"video v": 2.2})
    share(CacheRoot(world.root.path))
    for name in ("configs", "encode", "model", "train"):  # a user's own
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is imported')\n")
    with WebServer(world.root.path) as server:
        where = server.url if remote else str(world.root.path)
        script = READER.replace("WHERE", repr(where))
        code, out, error = in_process(tmp_path, script)
    assert code == 0, error
    total = features("a").sum(dtype="f8")
    assert out.splitlines() == [
        f"{total} 6 2 False",
        "Cache.dataset needs torch: pip install torch",
        "[]",
    ]


def test_importing_the_package_imports_nothing(
    tmp_path: Path, in_process: Callable[..., tuple[int, str, str]]
) -> None:
    code = "import sys, nanomolmo2; print(sorted(set(sys.modules) & {'cache', 'numpy', 'torch'}))"
    assert in_process(tmp_path, code) == (0, "[]\n", "")
