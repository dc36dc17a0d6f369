"""The locks that keep two merges from writing one output, and merges that are kept apart otherwise."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager

_needed = True


@contextmanager
def without_locks() -> Iterator[None]:
    """From now on nothing is locked: the caller sees to it that nobody else writes to the same output.

    For file systems that have no locks. Holds for the whole process.
    """
    global _needed
    before = _needed
    _needed = False
    try:
        yield
    finally:
        _needed = before


def take(descriptor: int) -> None:
    """Locks an open file or folder until it is closed. BlockingIOError if another process has it; OSError."""
    if _needed:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
