"""Write and read the tensors of a checkpoint as safetensors, each process its own part.

    write(partial, tensors, begin, commit, group)    # every process, with torch.distributed.checkpoint
    stored = Stored(path)                            # names, shapes, dtypes of what one or several wrote
    stored.read(targets)                             # into whole tensors, or this process's part of DTensors

A file has whole tensors, or parts whose place in the tensor is in its header (`DCP_SHARDING_INFO`). So what
was written by any number of processes is read by any other number. Nothing is a pickle: of
torch.distributed.checkpoint only the safetensors writer and reader are used, which have no `.metadata` file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save

from configs import UserError
from train.distributed.group import ProcessGroup

FILE_BYTES = 256 << 20
"""Bytes of a process's file, at most, or one tensor: safetensors builds a file in memory, twice."""
MALFORMED = (
    *(SafetensorError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError),
    *(RecursionError, RuntimeError),
)
"""What the reader raises for a file that somebody made wrongly."""


# ---- write


class Writer(HuggingFaceStorageWriter):
    """Writes files of parts. The main process makes the folder first, and commits once all have written."""

    def __init__(
        self,
        folder: Path,
        files: dict[str, int],
        begin: Callable[[], None],
        commit: Callable[[Iterable[str]], None],
    ) -> None:
        super().__init__(str(folder), fqn_to_index_mapping=files, save_distributed=True)
        self.folder, self._begin, self._commit = folder, begin, commit

    def prepare_local_plan(self, plan: Any) -> Any:
        """Make no folder, which the base class makes here, in every process at once."""
        return plan

    def prepare_global_plan(self, plans: Any) -> Any:
        """Make the folder; called in the main process alone."""
        self._begin()
        return super().prepare_global_plan(plans)

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Write this process's part."""
        if not self.folder.is_dir():
            raise UserError(
                f"{self.folder}: another process made this folder, and process {dist.get_rank()} does not "
                "see it; the folder of a run must be on a disk that all machines share: --run PATH"
            )
        return super().write_data(plan, planner)

    def finish(self, metadata: Any, results: Any) -> None:  # noqa: ARG002  the base class's own arguments
        """Commit; called in the main process alone, once every process has written."""
        self._commit(sorted({one.storage_data.relative_path for each in results for one in each}))


def write(
    folder: Path,
    tensors: dict[str, Tensor],
    begin: Callable[[], None],
    commit: Callable[[Iterable[str]], None],
    group: ProcessGroup,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Write tensors to files in a folder, each process its part, and flush them. Every process must call it.

    Args:
        folder: where the files are.
        tensors: name -> a DTensor, or a tensor that one process has.
        begin: makes the folder; called in the main process before any file is written.
        commit: called in the main process with the names of the files, once all are written.
        group: the processes that train together.
        process_group: their connection for this; None: the default one.

    Raises:
        Exception: the first failure of any process, raised in all of them.
        RuntimeError: of gloo, if another process has ended.
    """
    writer = Writer(folder, _files(tensors, group.world_size), begin, commit)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        save(tensors, storage_writer=writer, planner=planner, process_group=process_group)
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def _files(tensors: Mapping[str, Tensor], processes: int) -> dict[str, int]:
    """Return the number of the file, from 1, in which each process writes its part of a tensor."""
    files, number, used = {}, 1, 0
    for name, tensor in tensors.items():
        part = tensor.nbytes // processes
        if used and used + part > FILE_BYTES:
            number, used = number + 1, 0
        files[name] = number
        used += part
    return files


# ---- read


class Stored:
    """The tensors in the files of a folder.

    Raises:
        ValueError: a file is malformed, or of a tensor some values are missing or there twice.
        OSError: a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._reader = HuggingFaceStorageReader(str(folder))
        try:
            self._metadata = self._reader.read_metadata()
            found = {
                name: one
                for name, one in self._metadata.state_dict_metadata.items()
                if isinstance(one, TensorStorageMetadata)
            }
            self.tensors = {n: (tuple(one.size), one.properties.dtype) for n, one in found.items()}
            broken = [name for name, one in found.items() if not _is_whole(one)]
        except MALFORMED as error:
            raise ValueError(str(error)) from None
        if broken:
            raise ValueError(f"{broken[0]} is not whole")

    def read(self, targets: dict[str, Tensor]) -> None:
        """Copy stored tensors into `targets`, tensors or DTensors of equal shape, by name.

        Raises:
            ValueError: a tensor is missing, or has another shape.
        """
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            with torch.no_grad():
                planner.set_up_planner(targets, self._metadata, is_coordinator=True)
                self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
                self._reader.read_data(planner.create_local_plan(), planner)
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(str(error)) from None


def _is_whole(stored: TensorStorageMetadata) -> bool:
    """Whether the parts of a tensor are ranges of its first dimension that follow each other without a gap.

    torch's reader leaves the values of a gap as they are, without an error.
    """
    parts = [part for part in stored.chunks if 0 not in part.sizes]
    if not stored.size:
        return len(parts) == 1
    rows = 0
    for part in sorted(parts, key=lambda part: tuple(part.offsets)):
        begins = (rows, *(0 for _ in stored.size[1:]))
        if tuple(part.offsets) != begins or part.sizes[1:] != stored.size[1:]:
            return False
        rows += part.sizes[0]
    return rows == stored.size[0]
