"""A shard's file as memory: rows that the page cache holds, at the speed of a plain copy.

The kernel copies a row of 1 MB at 8 GB/s; a program that has the file mapped, at 11 (docs/BENCHMARKS.md).
What makes a mapped file dangerous is a page that has to be fetched when it is touched: if the disk fails, or
the file was cut short, the process dies by SIGBUS and no error names the shard. So nothing is touched before
`mincore` has said that all of it is in memory; anything else is left to `preadv`, which can fail. What
remains is a page that is evicted, and cannot be read again, within the microseconds of the copy.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

PAGE = mmap.PAGESIZE
PAGES = 4096
"""Asked about at a time: 16 MB, more than any row or run of rows. What is longer is not copied."""

SMALL = 256 << 10
"""Bytes above which copying beats reading: asking first costs 1.7 microseconds. A smaller piece of what is
copied keeps Python's other threads waiting meanwhile: it is over before one of them would have begun."""


class MappedFile:
    """A file that is open for reading, mapped. Any number of threads may copy from it."""

    def __init__(self, fd: int, nbytes: int):
        """Map all of it.

        Raises:
            OSError, ValueError: this file system cannot, or there is no room in the address space.
        """
        memory = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ)
        self._bytes = memoryview(memory)
        self._array = np.frombuffer(memory, np.uint8)
        self._address: int = self._array.ctypes.data
        self._length = nbytes

    def copy(self, offset: int, targets: Sequence[memoryview], length: int) -> bool:
        """Fill `targets`, `length` bytes in all, with what stands at `offset`, if all of it is in memory;
        else False, and they are as they were."""
        first = offset & -PAGE
        nbytes = offset + length - first
        pages = (nbytes + PAGE - 1) // PAGE
        if pages > PAGES or offset + length > self._length or _mincore is None:
            return False
        answer = _answer
        if _mincore(self._address + first, nbytes, answer.address) != 0:
            return False
        if answer.pages.find(0, 0, pages) >= 0:
            return False
        for target in targets:
            end = offset + len(target)
            if len(target) <= SMALL:
                target[:] = self._bytes[offset:end]
            else:
                np.frombuffer(target, np.uint8)[:] = self._array[offset:end]
            offset = end
        return True


def can_map(path: str) -> bool:
    """Whether the kernel would tell us which pages of a file are in memory: it tells its owner and who may
    write it, and lets everybody else believe that all are (Linux 5.2, mm/mincore.c)."""
    if _mincore is None:
        return False
    return Path(path).stat().st_uid == os.geteuid() or os.access(path, os.W_OK)


class _Answer(threading.local):
    """Where `mincore` puts a byte a page; each thread has its own."""

    def __init__(self) -> None:
        self.pages = bytearray(PAGES)
        self.address = ctypes.addressof((ctypes.c_char * PAGES).from_buffer(self.pages))


_answer = _Answer()
_mincore = None
if sys.platform == "linux":
    _mincore = ctypes.CDLL(None).mincore
    _mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    _mincore.restype = ctypes.c_int
