"""Every exception of the package.

    Exception
    ├── UserError                   (configs) the user can act on it: one line, exit code 2
    │   └── TooManyFailuresError    too many sources failed in our own code
    ├── BadMediaError               (model.media) a media item cannot become features: recorded in the ledger
    │   └── DownloadError           an attempt to download it failed
    ├── WorkerLostError             a worker's process or node is gone: its sources are assigned again
    ├── OverBudgetError             a download needs more memory than is free: it waits and tries again
    └── BadRowError                 a row of a PixMo list cannot be used: counted by its reason

A full disk is a `cache.errors.DiskError`.
"""

from __future__ import annotations

from configs import UserError
from model.media.images import BadMediaError


class TooManyFailuresError(UserError):
    """Too many sources failed in our own code, so the job stops."""


class WorkerLostError(Exception):
    """The process of a worker is gone, or its node is, or cannot be reached."""


class DownloadError(BadMediaError):
    """A failed attempt to download a URL."""

    def __init__(
        self,
        reason: str,
        *,
        stage: str = "fetch",
        retryable: bool = False,
        wait_s: float = 0.0,
        unreachable: bool = False,
        attempted: bool = True,
    ) -> None:
        # Of the URL, `reason` contains only the host: queries may hold secrets, and ledgers are shared.
        # The stage is fetch, or verify for bytes with another sha256.
        super().__init__(reason, stage)
        self.retryable = retryable
        """Whether another attempt may succeed."""
        self.wait_s = wait_s
        """Seconds to wait before the next attempt."""
        self.unreachable = unreachable
        """Whether neither the host nor a name server answered."""
        self.attempted = attempted
        """Whether a request was made, so that the error says something about the host."""
        self.host = ""
        """Host that failed; empty if the error has nothing to do with a host."""


class OverBudgetError(Exception):
    """An attempt needs more memory than is free. The reservation records how much it needs."""


class BadRowError(Exception):
    """Why a row cannot be used: a few words, equal for all rows with this trouble."""
