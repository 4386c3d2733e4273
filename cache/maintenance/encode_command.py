"""Command lines of `encode.run` that messages suggest: with the user's own data set, encoder and cache.

encode_command(root, "photos", reader, load("encoders"), "--retry-failed")
# python -m encode.run --dataset photos=folder:/home/me/photos --encoder demo --codec int8
# --features /home/me/cache --retry-failed
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping
from typing import Any, Protocol

from cache.errors import CacheError
from cache.format.spec import FeatureSpec
from cache.store.paths import CacheRoot
from cache.store.samples import dataset_names, read_origin
from cache.store.space import read_info


class Encoded(Protocol):
    """A space's reader, or what its space.json says."""

    @property
    def spec(self) -> FeatureSpec:
        """What a feature is."""
        ...

    @property
    def load(self) -> Mapping[str, Any]:
        """How its encoder is built."""
        ...


def encode_command(
    root: CacheRoot,
    dataset: str | None = None,
    space: Encoded | None = None,
    presets: Mapping[str, Any] = {},
    *more: str,
) -> str:
    """Return the command line that encodes a data set into a space of this cache.

    Args:
        root: the cache.
        dataset: a data set of the cache, or a name that `--dataset` accepts; None: the first of the cache.
        space: the space; None: the one that was written to last, or without any the default encoder.
        presets: configs/encoders.yaml. Poolings that an encoder has there are not repeated.
        more: further words.
    """
    words = ["python", "-m", "encode.run", *dataset_words(root, dataset)]
    if space is None:
        space = _latest_space(root)
    if space is not None:
        words += encoder_words(space, presets)
    return shlex.join([*words, "--features", str(root.path), *more])


def dataset_words(root: CacheRoot, dataset: str | None) -> tuple[str, ...]:
    """Return the options of `encode.run` that read a data set again, from any folder."""
    names = dataset_names(root)
    if dataset is None:
        dataset = names[0] if names else "demo"
    if dataset in names:
        try:
            origin = read_origin(root, dataset)
        except CacheError:
            origin = None
        if origin is not None:
            return origin.words
    return ("--dataset", dataset)


def encoder_words(space: Encoded, presets: Mapping[str, Any]) -> list[str]:
    """Return the options of `encode.run` that choose this space."""
    spec, entry = space.spec, space.load.get("encoder")
    entry = entry if isinstance(entry, Mapping) else {"name": spec.encoder}
    words = ["--encoder", str(entry.get("name", spec.encoder)), "--codec", spec.codec]
    preset = presets.get(words[1])
    preset = preset if isinstance(preset, Mapping) else {"pool_image": None, "pool_frame": None}
    if preset.get("pool_image", 1) != spec.pool_image:
        words += ["--pool", str(spec.pool_image)]
    if preset.get("pool_frame", 3) != spec.pool_frame:
        words += ["--frame-pool", str(spec.pool_frame)]
    if spec.container != "zarr":
        words += ["--format", spec.container]
    if space.load.get("random_weights") and entry.get("library") == "open_clip":
        words.append("--random-weights")
    return words


def _latest_space(root: CacheRoot) -> Encoded | None:
    """Return the space that was written to last, whose encoder is the likeliest to be meant."""
    found: list[tuple[int, Encoded]] = []
    for name in root.space_names():
        paths = root.space(name)
        with contextlib.suppress(CacheError, OSError):  # damaged, or not written to yet
            found.append((paths.commits_dir.stat().st_mtime_ns, read_info(paths)))
    return max(found, key=lambda pair: pair[0])[1] if found else None
