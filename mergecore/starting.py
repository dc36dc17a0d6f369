"""The imports with which a process starts: without garbage collection, and without what only some of them use.

Not for what runs afterwards.
"""

from __future__ import annotations

import gc
import importlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

SELDOM_USED = ("torch._meta_registrations",)
"""Modules of torch that `import torch` loads and merges do not use: shapes of what is computed without numbers, on the
device "meta" (a fifth of the import's time). The package `features` loads them: models of transformers use them."""

_loading = threading.RLock()


class _Deferred(ModuleType):
    """Stands in for a module; the first use of something in it loads the module.

    importlib's LazyLoader would load it at once: torch asks all modules for their file.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_load(self.__name__), name)


def _load(name: str) -> ModuleType:
    with _loading:
        if isinstance(sys.modules.get(name), _Deferred):
            del sys.modules[name]
        return importlib.import_module(name)


def load_deferred() -> None:
    """Load what `importing` has left out, for what uses all of torch."""
    for name in SELDOM_USED:
        if isinstance(sys.modules.get(name), _Deferred):
            _load(name)


@contextmanager
def importing() -> Iterator[None]:
    """Import what takes long in here; afterwards the collector is on again, if it was on.

    Modules make hundreds of thousands of objects that stay. The collector would go through them again and again, and
    find nothing. What there is at the end is exempt from later collections for the same reason. Of torch's modules
    those SELDOM_USED are loaded when something of them is used.
    """
    if "torch" not in sys.modules:  # whose import makes it its attribute, be it this or the module
        sys.modules.update({name: _Deferred(name) for name in SELDOM_USED})
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
