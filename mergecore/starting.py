"""The imports with which a process starts, without garbage collection. Not for what runs afterwards."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Import what takes long in here; afterwards the collector is on again, if it was on.

    Modules make hundreds of thousands of objects that stay. The collector would go through them again and again, and
    find nothing. What there is at the end is exempt from later collections for the same reason.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
