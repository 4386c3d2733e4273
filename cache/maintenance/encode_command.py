"""Command lines of `encode.run` that messages suggest: with the user's own data set, encoder and cache.

encode_command(root, "photos", reader, load("encoders"), "--retry-failed")
# python -m encode.run --dataset photos=folder:/home/me/photos --encoder demo --codec int8
# --features /home/me/cache --retry-failed
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from cache.errors import CacheError, command_line
from cache.format.spec import FeatureSpec
from cache.remote.mirror import is_copy
from cache.store.paths import CacheRoot
from cache.store.samples import DEMO_WORDS, dataset_words
from cache.store.space import read_info

HUB_FOLDER = "/models--"
"""Part of the path of a file that the hub's client downloaded: such weights need no `--weights`."""


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


@dataclass(frozen=True)
class WantedSpace:
    """A space that does not exist here."""

    spec: FeatureSpec
    load: Mapping[str, Any] = field(default_factory=dict)


def encode_command(
    root: CacheRoot,
    dataset: str | None = None,
    space: Encoded | None = None,
    presets: Mapping[str, Any] = {},
    *more: str,
    codec: str = "",
) -> str:
    """Return the command line that encodes a data set into a space of this cache.

    Args:
        root: the cache.
        dataset: a data set of the cache, or a name that `--dataset` accepts; None: the first of the cache.
        space: the space; None: the one that was written to last, or without any the default encoder.
        presets: configs/encoders.yaml. Poolings that an encoder has there are not repeated.
        more: further words.
        codec: another codec than the space's.
    """
    words = [*dataset_words(root, dataset)]
    if space is None:
        space = _latest_space(root)
    if space is not None:
        words += encoder_words(space, presets, codec)
    else:
        words += ["--encoder", "demo"] if words == [*DEMO_WORDS] else []
        words += ["--codec", codec] if codec else []
    features = "DIR" if is_copy(root) else root.path  # the folder is on the machine of that cache
    return command_line("encode.run", *words, "--features", features, *more)


def encoder_words(space: Encoded, presets: Mapping[str, Any], codec: str = "") -> list[str]:
    """Return the options of `encode.run` that choose this space."""
    spec, entry = space.spec, space.load.get("encoder")
    entry = entry if isinstance(entry, Mapping) else {}
    name = str(entry.get("name", spec.encoder.removeprefix("random-")))
    words = ["--encoder", name, "--codec", codec or spec.codec]
    preset = presets.get(name)
    preset = preset if isinstance(preset, Mapping) else {"pool_image": None, "pool_frame": None}
    if spec.tail is not None:
        words += ["--block", str(spec.tail.first - 1), "--tail"]
    if preset.get("pool_image", 1) != spec.seen.pool_image:
        words += ["--pool", str(spec.seen.pool_image)]
    if preset.get("pool_frame", 3) != spec.seen.pool_frame:
        words += ["--frame-pool", str(spec.seen.pool_frame)]
    if preset.get("decode", "whole") != spec.decode:
        words += ["--decode", spec.decode]
    if spec.container != "zarr":
        words += ["--format", spec.container]
    if spec.encoder.startswith("random-") and not entry.get("tower"):  # demo towers have no others
        words.append("--random-weights")
    weights = space.load.get("weights")
    known = weights == entry.get("model")  # --encoder hf:FOLDER says it
    if isinstance(weights, str) and HUB_FOLDER not in weights and not known:
        words += ["--weights", weights]
    return words


def _latest_space(root: CacheRoot) -> Encoded | None:
    """Return the space that was written to last, whose encoder is the likeliest to be meant."""
    found: list[tuple[int, Encoded]] = []
    for name in root.space_names():
        paths = root.space(name)
        with contextlib.suppress(CacheError, OSError):  # damaged, or not written to yet
            found.append((paths.commits_dir.stat().st_mtime_ns, read_info(paths)))
    return max(found, key=lambda pair: pair[0])[1] if found else None
