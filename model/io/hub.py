"""Weights from the Hugging Face hub, or at once one line that says why not and what to do.

The hub's own client tries for 46 s before it gives up on a machine without network (measured); so the
connection is tried first.
"""

from __future__ import annotations

import os
import posixpath
import socket
import threading
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from configs import UserError

PROBE_TIMEOUT_S = 2.0


def fetch(place: str, *, encoder: str) -> Path:
    """The weights file at open_clip's hub `place` (`org/repo/` or `org/repo/file`), downloaded once.

    Raises:
        UserError: it is neither on this machine nor to be had.
    """
    # torch comes with it (3 s), which whoever only asks whether the hub is there does without
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    repo, name = posixpath.split(place)
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
        except LocalEntryNotFoundError as error:
            raise UserError(f"encoder {encoder}: {_short(error)}; {way_out}") from None
        except EntryNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise UserError(f"encoder {encoder}: {_short(error)}; {way_out}") from None
    raise UserError(f"encoder {encoder}: {repo} has none of {', '.join(names)}; {way_out}")


def unreachable() -> str:
    """Why the hub cannot be reached; '' when a connection to it, or to the proxy before it, opens."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    target = urlsplit(constants.ENDPOINT)
    proxy = next(
        (
            os.environ[v]
            for v in (f"{target.scheme}_proxy", f"{target.scheme}_proxy".upper())
            if os.environ.get(v)
        ),
        None,
    )
    if proxy:
        target = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    host, port = target.hostname or "", target.port or (443 if target.scheme == "https" else 80)
    answer = [f"{host} does not answer"]

    def knock() -> None:
        try:
            socket.create_connection((host, port), timeout=PROBE_TIMEOUT_S).close()
            answer[0] = ""
        except OSError as error:
            answer[0] = f"{host} cannot be reached ({_short(error)})"

    # In a thread: looking up a name has no timeout of its own.
    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(PROBE_TIMEOUT_S + 0.5)
    return answer[0]


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
