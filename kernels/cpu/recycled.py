"""Memory of large results, used again once the result is freed, as torch's allocator does on a GPU.

malloc maps a block of 32 MiB or more afresh every time, and the kernel zeroes the pages of a fresh mapping one by one: for a
dequantized 4096 x 4096 weight that takes longer than the dequantization. One freed mapping is kept, of at most 256 MiB; the
next result that fits it takes it. Smaller blocks malloc itself keeps.
"""

from __future__ import annotations

import math
import mmap
import sys
import weakref

import torch
from torch import Tensor

MAPPED_BYTES = 32 << 20  # what glibc maps at the latest (DEFAULT_MMAP_THRESHOLD_MAX)
KEPT_BYTES = 256 << 20
_freed: list[mmap.mmap] = []


def _keep(memory: mmap.mmap) -> None:
    _freed[:] = [memory]


def _mapping(size: int) -> mmap.mmap:
    """The freed mapping if it fits and at most half of it would lie idle, else a fresh one."""
    try:
        memory = _freed.pop()
    except IndexError:
        memory = None
    if memory is not None and size <= len(memory) <= 2 * size:
        return memory
    # private: a process that is forked must not write into this one's tensors
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def empty(shape, dtype: torch.dtype) -> Tensor:
    """torch.empty on the CPU; a large result comes from recycled memory and cannot be resized to more."""
    n = math.prod(shape)
    if not MAPPED_BYTES <= n * dtype.itemsize <= KEPT_BYTES or sys.platform == "win32":
        return torch.empty(shape, dtype=dtype)
    memory = _mapping(n * dtype.itemsize)
    # the tensor's storage owns the view and nothing else does: the view dies with the last tensor on that storage
    view = memoryview(memory)
    weakref.finalize(view, _keep, memory).atexit = False
    return torch.frombuffer(view, dtype=dtype, count=n).view(shape)
