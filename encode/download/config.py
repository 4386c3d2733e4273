"""The limits of downloads."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """Limits of one `Fetcher`."""

    connections: int = 64
    """Largest number of simultaneous requests to all hosts together."""
    per_host: int = 8
    """Largest number of simultaneous requests to one host."""
    connect_s: float = 10
    """Seconds before a name lookup times out, and again before a connection (TLS included) does."""
    read_s: float = 20
    """Seconds without data before a download times out."""
    total_s: float = 60
    """Seconds before an attempt times out. Redirects count; waiting for a free connection does not."""
    max_bytes: int = 64 << 20
    """Largest accepted body."""
    redirects: int = 5
    """Largest number of redirects of one URL."""
    tries: int = 3
    """Attempts for a URL that fails temporarily: 408, 425, 429, 5xx, time-outs, broken connections."""
    backoff_s: float = 1.0
    """Seconds before the second attempt, varied by up to half; doubled before each further attempt."""
    retry_after_s: float = 30
    """Longest `Retry-After` in seconds that is obeyed. A longer one makes the download fail."""
    max_host_failures: int = 16
    """After this many failed downloads in a row, a host gets one attempt per URL, and none during a pause it
    asks for, until a download succeeds. Otherwise one dead host with many URLs would delay a whole job."""
    outage_s: float = 600
    """Seconds that downloads wait for the network when many hosts in a row are unreachable."""
    allow_private: bool = False
    """Allow private and loopback addresses. Link-local, multicast and reserved ones are never allowed."""
    budget_bytes: int = 512 << 20
    """Memory for bodies: those being received, and those received and not yet released."""

    def __post_init__(self) -> None:
        for name in ("connections", "per_host", "max_bytes", "tries", "max_host_failures"):
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

    def share(self, workers: int) -> DownloadConfig:
        """Return the limits of one of `workers` workers that share these."""
        return replace(
            self,
            connections=max(1, self.connections // workers),
            per_host=max(1, self.per_host // workers),
            budget_bytes=max(self.max_bytes, self.budget_bytes // workers),
        )
