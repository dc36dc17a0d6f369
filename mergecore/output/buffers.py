"""Host memory for results on their way to a file. Not for pinned memory, which a device makes (device.py)."""

from __future__ import annotations

import mmap
from typing import Any

Buffer = Any
"""What `len` and `memoryview` know, writable: an mmap, a NumPy array of bytes."""


def new_buffer(nbytes: int) -> Buffer:
    """A page-aligned buffer of at least `nbytes` bytes."""
    # Private: Python's default is shared memory, which counts as such and changes under a forked child.
    size = -(-max(nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
