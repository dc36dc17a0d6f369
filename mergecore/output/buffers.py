"""Host memory for results on their way to a file. Not for pinned memory, which a device makes (device.py)."""

from __future__ import annotations

import ctypes
import mmap
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

Buffer = Any
"""What `len` and `memoryview` know, writable: an mmap, a NumPy array of bytes."""

PAGE = mmap.PAGESIZE


def new_buffer(nbytes: int) -> Buffer:
    """A page-aligned buffer of at least `nbytes` bytes."""
    # Private: Python's default is shared memory, which counts as such and changes under a forked child.
    size = -(-max(nbytes, 1) // PAGE) * PAGE
    buffer = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A disk takes few large pages faster than many small ones; not every kernel has them.
    with suppress(OSError, AttributeError):
        buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


def address_of(data: memoryview) -> int:
    """Where the bytes, writable ones, lie in memory; there must be some."""
    return ctypes.addressof(ctypes.c_char.from_buffer(data))


@dataclass
class _Part:
    begin: int
    end: int
    is_free: bool = False


def ring_bytes(parts: int, largest: int) -> int:
    """Bytes of a ring in which there is always room for another part beside `parts` - 2 that are lent; each of at most
    `largest` bytes, wherever it lies in its page."""
    return parts * (largest + PAGE)


class Ring:
    """Page-aligned memory of which parts are lent one after the other and, mostly, given back in that order.

    It has `nbytes` bytes, or as many as the largest part needs, made by `new_buffer` when they are needed. Not for
    several threads at once.
    """

    def __init__(self, nbytes: int, new_buffer: Callable[[int], Buffer] = new_buffer) -> None:
        self._new_buffer = new_buffer
        self.nbytes = nbytes
        self._memory = memoryview(bytearray())
        self._parts: deque[_Part] = deque()

    def lend(self, nbytes: int, place: int) -> memoryview | None:
        """A part of `nbytes` bytes (1 or more) of arbitrary content, or None until others are given back. Its address
        and `place`, an offset in a file, are equally far from a page's beginning."""
        lead = place % PAGE
        if len(self._memory) < lead + nbytes:
            if self._parts:
                return None
            self.nbytes = max(self.nbytes, lead + nbytes)
            self._memory = memoryview(bytearray())  # the old one goes first
            self._memory = memoryview(self._new_buffer(self.nbytes))[: self.nbytes]
        begin = self._room(nbytes, lead)
        if begin is None:
            return None
        self._parts.append(_Part(begin, begin + nbytes))
        return self._memory[begin : begin + nbytes]

    def _room(self, nbytes: int, lead: int) -> int | None:
        """Where a part fits, behind the last one or in front of the first one."""
        if not self._parts:
            return lead
        first, last = self._parts[0].begin, self._parts[-1].end
        begin = last + (lead - last) % PAGE
        wrapped = last <= first
        if begin + nbytes <= (first if wrapped else len(self._memory)):
            return begin
        return lead if not wrapped and lead + nbytes <= first else None

    def give_back(self, part: memoryview) -> None:
        """A part that was lent, or the first bytes of it, is free again."""
        begin = address_of(part) - address_of(self._memory)
        next(each for each in self._parts if each.begin == begin and not each.is_free).is_free = True
        while self._parts and self._parts[0].is_free:
            self._parts.popleft()
