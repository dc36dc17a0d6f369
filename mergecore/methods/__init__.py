"""The registry of merge methods, by the names that users write under `merge_method`."""

from __future__ import annotations

from mergecore.methods.base import Method
from mergecore.methods.elementwise import ELEMENTWISE
from mergecore.methods.geometry import KARCHER, MODEL_STOCK, MULTISLERP, NUSLERP, SLERP
from mergecore.methods.importance import IMPORTANCE
from mergecore.methods.linear import LINEAR, TASK_ARITHMETIC
from mergecore.methods.selection import SELECTION
from mergecore.methods.widen import WIDEN

GEOMETRY = (SLERP, NUSLERP, MULTISLERP, KARCHER, MODEL_STOCK)
ALL = (WIDEN, LINEAR, TASK_ARITHMETIC, *GEOMETRY, *SELECTION, *ELEMENTWISE, *IMPORTANCE)
METHODS: dict[str, Method] = {method.name: method for method in ALL}
