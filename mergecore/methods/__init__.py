"""The registry of merge methods, by the names that users write under `merge_method`."""

from __future__ import annotations

from mergecore.methods.base import Method
from mergecore.methods.elementwise import ELEMENTWISE
from mergecore.methods.fitted import FITTED
from mergecore.methods.geometry import KARCHER, MODEL_STOCK, MULTISLERP, NUSLERP, SLERP
from mergecore.methods.importance import IMPORTANCE
from mergecore.methods.layerwise import LAYERWISE
from mergecore.methods.linear import LINEAR, PASSTHROUGH, TASK_ARITHMETIC
from mergecore.methods.selection import SELECTION
from mergecore.methods.spectral import SPECTRAL
from mergecore.methods.widen import WIDEN

GEOMETRY = (SLERP, NUSLERP, MULTISLERP, KARCHER, MODEL_STOCK)
PLAIN = (LINEAR, TASK_ARITHMETIC, PASSTHROUGH)
ALL = (WIDEN, *PLAIN, *LAYERWISE, *GEOMETRY, *SELECTION, *ELEMENTWISE, *IMPORTANCE, *SPECTRAL, *FITTED)
METHODS: dict[str, Method] = {method.name: method for method in ALL}
