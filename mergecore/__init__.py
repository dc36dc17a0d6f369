"""mergecore merges language models by streaming their weights: see README.md.

`load_spec`, `plan`, `merge` and the types they return are loaded on first use: importing the package
alone imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mergecore.merging import merge
    from mergecore.planning import MergePlan, plan
    from mergecore.progress import MergeResult, Progress
    from mergecore.spec import MergeSpec, load_spec

_HOMES = {
    "load_spec": "mergecore.spec",
    "MergeSpec": "mergecore.spec",
    "plan": "mergecore.planning",
    "MergePlan": "mergecore.planning",
    "merge": "mergecore.merging",
    "MergeResult": "mergecore.progress",
    "Progress": "mergecore.progress",
}

__all__ = ["MergePlan", "MergeResult", "MergeSpec", "Progress", "__version__", "load_spec", "merge", "plan"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mergecore' has no attribute {name!r}")
