"""Where a language model comes from: a folder, or an id of the Hugging Face hub, which becomes a folder.

folder = local_folder("Qwen/Qwen3-0.6B", weights=True)
"""

from __future__ import annotations

import contextlib
import http.client
import shlex
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub

from configs import UserError
from model.language.checkpoint import INDEX, WAY_OUT, WEIGHTS, shard_names
from model.language.files import AGAIN, NEEDS_LOGIN, check_folder, hub_error

HUB_TIMEOUT_S = 5.0
"""Seconds without an answer before the hub counts as unreachable."""
TEXT_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja")
"""Files of a model on the hub that are needed without its weights."""
WEIGHT_FILES = ("model*.safetensors",)
"""Files of a model on the hub with its weights."""
ELSEWHERE = ("*/*", "training_args*", "trainer_state*")
"""Files that are never downloaded: other formats are in folders."""


def local_folder(source: str, *, weights: bool, way_out: str = WAY_OUT) -> Path:
    """Return the folder of a language model; a hub id is downloaded, as far as it is not here.

    A model that is on this machine is used without asking the hub.

    Args:
        source: a folder, or an id such as `Qwen/Qwen3-0.6B`.
        weights: whether the weights are needed, besides config and tokenizer.
        way_out: end of an error about a source that cannot be had.

    Raises:
        UserError: there is no such folder or id, or the hub cannot be reached.
    """
    folder = Path(source).expanduser()
    if source and folder.is_dir():
        check_folder(folder)
        return folder
    cached = _cached(source)
    if cached is not None and _is_complete(cached, weights):
        check_folder(cached)
        return cached
    if problem := _hub_problem(source):
        if cached is not None:
            return cached  # what is missing in it is said when it is read
        raise UserError(f"{source}: no such folder, not downloaded before, {problem}; {way_out}")
    patterns = [*TEXT_FILES, *(WEIGHT_FILES if weights else ())]
    try:
        found = huggingface_hub.snapshot_download(
            source, allow_patterns=patterns, ignore_patterns=list(ELSEWHERE)
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: cannot be downloaded: {hub_error(error)}; {way_out}") from None
    return Path(found)


def _cached(source: str) -> Path | None:
    """Return the folder of a hub id in the hub's cache on this machine, if it has at least config.json.

    Raises:
        UserError: `source` is no hub id.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix == ".gguf":
            raise UserError(f"{source}: a GGUF file (of llama.cpp), mostly quantised; {WAY_OUT}")
        raise UserError(f"{source}: a file; give its folder: --llm {shlex.quote(str(path.parent))}")
    if not source or source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise UserError(f"{source or 'empty --llm'}: no such folder; {WAY_OUT}")
    try:
        config = huggingface_hub.try_to_load_from_cache(source, "config.json")
    except ValueError:
        raise UserError(
            f"{source}: no such folder, and no id of the Hugging Face hub; {WAY_OUT}"
        ) from None
    return Path(config).parent if isinstance(config, str) else None


def _is_complete(folder: Path, weights: bool) -> bool:
    """Whether a snapshot in the hub's cache has the tokenizer, and all weights if they are needed."""
    return (folder / "tokenizer.json").exists() and (not weights or has_weights(folder))


def has_weights(folder: Path) -> bool:
    """Whether a folder has model.safetensors, or all shards of its index, in whatever state."""
    if (folder / WEIGHTS).exists():
        return True
    try:
        return (folder / INDEX).exists() and all(
            (folder / name).exists() for name in shard_names(folder / INDEX)
        )
    except UserError:
        return False


@contextlib.contextmanager
def hub_hint(source: str) -> Iterator[None]:
    """Add the command that downloads a hub id again to an error about a file of it."""
    try:
        yield
    except UserError as error:
        if Path(source).expanduser().exists() or not str(error).endswith(AGAIN):
            raise
        raise UserError(f"{error}: hf download {source} --force-download") from None


def _hub_problem(source: str) -> str:
    """Return within seconds why a model cannot be had from the hub, '' if it can.

    The hub's own client retries for most of a minute before it fails.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    url = f"{huggingface_hub.constants.ENDPOINT}/api/models/{source}"
    request = urllib.request.Request(url)  # noqa: S310  the hub's own https
    if token := huggingface_hub.get_token():
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S):  # noqa: S310  the hub's own https
            return ""
    except urllib.error.HTTPError as error:
        login = f" ({NEEDS_LOGIN})" if error.code in (401, 403) else ""
        return f"huggingface.co returns {error.code}{login}"
    except (OSError, http.client.HTTPException) as error:
        return f"huggingface.co cannot be reached: {getattr(error, 'reason', error)}"
