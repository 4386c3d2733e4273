"""Download weights from the Hugging Face hub, or fail within seconds with the reason and a way out.

Without network the hub's own client tries for 46 s before it gives up (measured), so a connection is tried
first.
"""

from __future__ import annotations

import posixpath
import socket
import threading
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import RemoteEntryNotFoundError

from configs import UserError, one_line
from model.language.files import hub_error

TOWER_FILES = (
    "config.json",
    "*processor_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
)
"""Files of a tower on the hub."""
PROBE_TIMEOUT_S = 2.0
"""Seconds to wait for a connection to the hub."""


def fetch(hub_path: str, *, encoder: str) -> Path:
    """Return the local path of a weights file on the hub, after downloading it if necessary.

    Args:
        hub_path: `org/repo/` or `org/repo/file`, as open_clip records it.
        encoder: name of the encoder, for messages.

    Raises:
        UserError: the file is not on this machine and cannot be downloaded.
    """
    # Imports torch (3 s), which `unreachable` does not need.
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    repo, name = posixpath.split(hub_path)
    if not repo:
        raise UserError(f"encoder {encoder} names no weights on the hub; give them: --weights PATH")
    names = (name,) if name else (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME)
    for candidate in names:
        cached = huggingface_hub.try_to_load_from_cache(repo, candidate)
        if isinstance(cached, str):
            return Path(cached)
    way_out = f"give {repo} as a local file or folder: --weights PATH"
    why = unreachable()
    if why:
        raise UserError(f"encoder {encoder}: no weights on this machine, and {why}; {way_out}")
    for candidate in names:
        try:
            return Path(huggingface_hub.hf_hub_download(repo, candidate))
        except RemoteEntryNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise UserError(f"encoder {encoder}: {hub_error(error)}; {way_out}") from None
    raise UserError(f"encoder {encoder}: {repo} has none of {', '.join(names)}; {way_out}")


def fetch_folder(repo: str, *, encoder: str) -> Path:
    """Return the local folder of a vision tower on the hub, after downloading it if necessary.

    A tower that is on this machine is used without asking the hub.

    Args:
        repo: `org/name`.
        encoder: name of the encoder, for messages.

    Raises:
        UserError: it is not on this machine and cannot be downloaded.
    """
    config = huggingface_hub.try_to_load_from_cache(repo, "config.json")
    folder = Path(config).parent if isinstance(config, str) else None
    has_weights = folder is not None and any(folder.glob("model*.safetensors"))
    if has_weights and folder is not None and any(folder.glob("*processor_config.json")):
        return folder
    way_out = f"give {repo} as a local folder: --encoder hf:FOLDER"
    if why := unreachable():
        if has_weights and folder is not None:
            return folder  # what is missing in it is said when it is read
        raise UserError(f"encoder {encoder}: {repo} is not on this machine, and {why}; {way_out}")
    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=[*TOWER_FILES]))
    except (OSError, ValueError) as error:
        raise UserError(f"encoder {encoder}: {hub_error(error)}; {way_out}") from None


def unreachable() -> str:
    """Return why the hub cannot be reached, '' if a connection to it or to the configured proxy opens."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    target = urlsplit(constants.ENDPOINT)
    if proxy := urllib.request.getproxies().get(target.scheme):
        target = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    host, port = target.hostname or "", target.port or (443 if target.scheme == "https" else 80)
    result = [f"no answer from {host}"]

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=PROBE_TIMEOUT_S).close()
            result[0] = ""
        except OSError as error:
            result[0] = f"{host} cannot be reached ({one_line(error)})"

    # In a thread, because a name lookup has no timeout.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PROBE_TIMEOUT_S + 0.5)
    return result[0]
