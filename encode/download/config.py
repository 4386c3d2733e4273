"""What a fetch may cost, and how it fails."""

from __future__ import annotations

from dataclasses import dataclass

from model.media.images import BadMediaError

__all__ = ["DownloadConfig", "DownloadError"]

USER_AGENT = "nanoMolmo2/0.1 (fetches each image of a training set once; honours Retry-After)"


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """Limits of one `Fetcher`, all its fetches together."""

    connections: int = 64
    """Requests under way at once, over all hosts."""
    per_host: int = 8
    """Requests under way at once to one host."""
    connect_s: float = 10
    """Seconds to look a name up, and again to connect (TLS included)."""
    read_s: float = 20
    """Seconds without a byte, before the answer or amid it."""
    total_s: float = 60
    """Seconds one try may take, redirects included, waiting for its turn not."""
    max_bytes: int = 64 << 20
    """Larger bodies are refused."""
    redirects: int = 5
    """Redirects followed for one URL."""
    tries: int = 3
    """Tries a URL gets when what failed may pass: 408, 425, 429, 5xx, time-outs, broken connections."""
    backoff_s: float = 1.0
    """Seconds before the second try, give or take half; doubled before each further one."""
    retry_after_s: float = 30
    """The longest `Retry-After` that is waited for, seconds. Who asks for more has failed at once."""
    patience: int = 16
    """After so many fetches in a row that failed for good, a host gets one try a URL, and none while it asks
    us to wait, until a fetch succeeds again. Without this a dead host with many URLs holds up a night."""
    outage_s: float = 600
    """When host after host gives no sign of life, the network is taken to be down, and fetches wait so long
    for it, seconds, before they fail."""
    allow_private: bool = False
    """Fetch from private and loopback addresses too. Link-local, multicast, reserved: never."""
    budget_bytes: int = 512 << 20
    """Bodies in memory at once: those being read, and those read and not yet released."""
    user_agent: str = USER_AGENT
    """How we introduce ourselves."""

    def __post_init__(self) -> None:
        for name in ("connections", "per_host", "max_bytes", "tries", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        for name in ("connect_s", "read_s", "total_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must be above 0")
        for name in ("redirects", "backoff_s", "retry_after_s", "outage_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must not be negative")
        if self.budget_bytes < self.max_bytes:
            raise ValueError(
                f"budget_bytes is {self.budget_bytes}, must hold one body of max_bytes {self.max_bytes}"
            )


class DownloadError(BadMediaError):
    """One attempt to download a URL failed."""

    def __init__(
        self, reason: str, *, again: bool = False, wait_s: float = 0.0, stage: str = "fetch"
    ) -> None:
        # Of the URL, only the host may be in `reason`: queries hold secrets, and the ledger is shared.
        super().__init__(reason, stage)
        self.again = again
        """Another try may succeed."""
        self.wait_s = wait_s
        """Seconds the host wants to be left alone before it."""
        self.host = ""
        """Who is to blame; empty when no host is."""
        self.asked = True
        """The host was asked, and this says something of it."""
        self.silent = False
        """Nobody answered, neither the host nor a name server."""
