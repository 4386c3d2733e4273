"""Compute on CUDA by replaying a recording of the kernels: equal bits, one call instead of hundreds.

    run = Replay(work)
    rows, facts = run(x)        # the outputs of work(x); overwritten by the next call

`work` takes a tensor, returns tensors, and never waits for the GPU.

Each operation of torch releases Python's lock and waits for it again. Beside threads that decode images, a
forward pass of hundreds of operations waits longer for the lock than the GPU computes: 186 images/s in a job
and 644 without such threads, on an H100. With the replay the job had 266, on a machine with faster cores.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

log = logging.getLogger(__name__)

WARM_UP = 3
"""Passes before a recording, as torch's documentation asks for: libraries choose their kernels in them."""

Work = Callable[[Tensor], Sequence[Tensor]]


class Replay:
    """A computation, recorded at its first input on CUDA. On a CPU, or in another shape, it runs as it is."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._graph: torch.cuda.CUDAGraph | None = None
        self._input = torch.empty(0)
        self._outputs: Sequence[Tensor] = ()
        self._can_record = True

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """Return the outputs for `x`. They are valid until the next call."""
        if x.device.type != "cuda":
            return self._work(x)
        if self._graph is None and self._can_record:
            try:
                self._record(x)
            except RuntimeError as error:  # an operation that cannot be recorded
                log.warning("encoding is not recorded, which makes it slower: %s", error)
                self._graph, self._can_record = None, False
                torch.cuda.synchronize(x.device)
        if self._graph is None or x.shape != self._input.shape or x.dtype != self._input.dtype:
            return self._work(x)
        self._input.copy_(x)
        self._graph.replay()
        return self._outputs

    def _record(self, x: Tensor) -> None:
        with torch.cuda.device(x.device):
            self._input = x.clone()
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(WARM_UP):
                    self._work(self._input)
            torch.cuda.current_stream().wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            # Other threads of this process may use CUDA meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._outputs = self._work(self._input)
            self._graph = graph
