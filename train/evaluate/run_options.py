"""The options of a run, read beside its model: the split, the data sets, and where its features are."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import configs
from cache.remote.open import RemoteOptions
from cache.store.paths import is_url
from configs import UserError
from train.config import Options, read_saved
from train.stage.files import CONFIG

log = logging.getLogger(__name__)


T = TypeVar("T", bound=RemoteOptions)


def trained_with(final: Path) -> Options:
    """Return the options of the stage that made a model; the defaults if its config.yaml is missing."""
    path = final.parent / CONFIG
    if not path.exists():
        log.warning("%s does not exist, so the split is made with default options", path)
        return Options()
    return configs.build(Options, read_saved(path), str(path))


def with_features(options: T, final: Path) -> T:
    """Return `options` with the cache that a model was trained on, unless they name one.

    Args:
        options: has a field `features`, which is None when the user did not give it.
        final: the folder of the model.

    Raises:
        UserError: the cache is not at its place any more.
    """
    if vars(options)["features"] is not None:
        return options
    trained = trained_with(final)
    found: dict[str, Any] = {"features": trained.features}
    if is_url(trained.features):
        # The run was allowed to read this URL, and its copies are in this folder.
        found |= {"mirror": trained.mirror, "allow_private": trained.allow_private}
    elif not (Path(trained.features) / "spaces").is_dir():
        raise UserError(
            f"{final.parent}: was trained on the features in {trained.features}, where there are none any "
            "more; say where they are now: --features DIR"
        )
    return replace(options, **found)
