"""One worker of a pool: its actor, its calls, and what becomes of its sources when it is gone."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cache.format.spec import ARRAY_OF
from cache.store.space import Space
from encode.driver.nodes import Backend, Node
from encode.driver.tracker import Tracker
from encode.worker.decode_log import DecodeEntry, decode_log_file, read_entries
from encode.worker.messages import SourceTask, media_id


@dataclass(kw_only=True)
class Loss:
    """An actor of another machine that is gone: whether its process or its node, is not known yet."""

    why: str
    """What Ray said."""
    since: float
    """When."""
    ping: Any = None
    """The call that asks the node."""
    ping_after: float
    """When to ask."""


@dataclass(kw_only=True)
class Slot:
    """One actor and its work."""

    number: int
    """Number of its worker."""
    node: Node
    """Where it runs."""
    actor: Any
    calls: list[Any] = field(default_factory=list)
    """Its unfinished calls, in order."""
    started: bool = False
    """Whether its worker is ready. Until then it gets no sources: its node may be busy for hours."""
    busy_since: float
    """When it got a call after it had none."""
    to_retry: deque[SourceTask] = field(default_factory=deque)
    """Files that may have crashed a worker, for this one to retry alone."""
    alone: SourceTask | None = None
    """The file it is retrying alone."""
    loss: Loss | None = None
    """Set once it is gone."""

    def entries(self, space: Space) -> list[DecodeEntry]:
        """Return what the worker was decoding when it last wrote its log."""
        paths = space.paths
        return read_entries(decode_log_file(paths, self.number), paths.cache_root)


def release(
    slot: Slot, entries: Sequence[DecodeEntry], tracker: Tracker, space: Space, backend: Backend
) -> list[SourceTask]:
    """Take back the sources of a worker that is gone; return those of `entries`, for the caller."""
    withdrawn = tracker.withdraw(slot.number, [entry.source for entry in entries])
    # Images only: a video may lack some rows, and the next worker that has it encodes just these.
    shards = [n for array, n in backend.ask("shards", slot.number) if array == ARRAY_OF["image"]]
    committed = {key for shard in shards for key, _ in space.shard_keys("image", shard)}
    released = backend.ask("release", slot.number, committed)
    # Duplicates of the files that are retried alone must wait until these are settled.
    waiting = {media_id(kind, entry.key) for entry in entries for kind in ARRAY_OF}
    tracker.worker_died(slot.number, committed, set(released) - waiting)
    return withdrawn
