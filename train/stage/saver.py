"""Write checkpoints while training goes on.

    saver = Saver(folder, group, background=True)     # every process, as for all of it
    saver.check()                                     # in every step: raises what a write has met
    saver.save(step, model, optimizer, meta)          # returns once the tensors are copied to CPU memory
    saver.wait()                                      # before the model is saved
    saver.close()                                     # at the end, also after an error

One checkpoint is written at a time, by one thread. On a CPU `background` is off, and `save` returns once the
checkpoint is written: a copy of all tensors would take as much memory again, to save less than a second of
each checkpoint (docs/BENCHMARKS.md).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from configs import one_line
from train.distributed.group import ProcessGroup
from train.stage import checkpoint

log = logging.getLogger(__name__)


class Saver:
    """Writes the checkpoints of a run.

    Args:
        folder: of the run's checkpoints.
        group: the processes that train together.
        background: whether `save` copies the tensors and returns before they are written.
    """

    def __init__(self, folder: Path, group: ProcessGroup, *, background: bool) -> None:
        self._folder, self._group = folder, group
        self._thread = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._pending: Future[Path] | None = None
        self._connection: dist.ProcessGroup | None = None
        if background and group.world_size > 1:
            # The exchanges of a write happen beside those of training, so they need their own connection.
            connection = dist.new_group(backend="gloo")
            assert isinstance(connection, dist.ProcessGroup)
            self._connection = connection

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Any,
        state: Mapping[str, Any],
    ) -> None:
        """Write the checkpoint after `step` steps, or begin to; see `checkpoint.save`.

        Raises:
            Exception: the failure of the write before, or of this one without `background`.
        """
        self.wait()
        if self._thread is None:
            checkpoint.save(self._folder, step, model, optimizer, state, self._group)
            return
        tensors, steps = checkpoint.snapshot(model, optimizer)
        copies = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        state = {**state, "step": step, checkpoint.OPTIMIZER_STEPS: steps}
        arguments = (self._folder, copies, state, self._group, self._connection)
        self._pending = self._thread.submit(checkpoint.write, *arguments)

    def check(self) -> None:
        """Raise the failure of a write, in all processes after the same step. Every process must call it."""
        if self._pending is None:  # in all processes or in none
            return
        done = self._group.gather_numbers([float(self._pending.done())])
        if all(finished for (finished,) in done):
            self.wait()

    def wait(self) -> None:
        """Return once nothing is being written, or raise the failure of the write."""
        if (pending := self._pending) is not None:
            pending.exception()  # waits; a signal meanwhile leaves it pending
            self._pending = None
            pending.result()

    def close(self) -> None:
        """End the thread after its write. A failure that was not raised yet is only logged."""
        try:
            self.wait()
        except Exception as error:
            log.warning("a checkpoint was not written: %s", one_line(error))
        if self._thread is not None:
            self._thread.shutdown()
