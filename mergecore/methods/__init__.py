"""The registry of merge methods, by the names that users write under `merge_method`."""

from __future__ import annotations

from mergecore.methods.base import Method
from mergecore.methods.linear import LINEAR, TASK_ARITHMETIC
from mergecore.methods.selection import SELECTION
from mergecore.methods.widen import WIDEN

METHODS: dict[str, Method] = {method.name: method for method in (WIDEN, LINEAR, TASK_ARITHMETIC, *SELECTION)}
