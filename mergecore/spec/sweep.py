"""The `sweep` of a spec: which methods and parameters are tried on the same inputs, and what each point is called.

Not for putting values into the spec (filling.py) or for merging the points (mergecore/sweeping.py).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Annotated, Any

import xxhash
from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from mergecore.spec.fields import expected, refused, table
from mergecore.spec.tables import Table

MOST_POINTS = 64
METHOD = "merge_method"
LONGEST_NAME = 100

Value = bool | int | float | str
Values = Mapping[str, Value]
"""The values of one point, by dotted path; the method stands under METHOD."""


def _scalar(value: Any) -> bool:
    return isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))


def _choices(value: Any) -> tuple[Value, ...]:
    if not isinstance(value, list | tuple) or not value or not all(map(_scalar, value)):
        raise expected(value, "a list of values such as [0.2, 0.4, 0.6]")
    if len({json.dumps(each) for each in value}) < len(value):
        raise refused("a value is listed twice")
    return tuple(value)


def _methods(value: Any) -> tuple[Value, ...]:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(each, str) and each for each in value):
        raise expected(value, "a list of methods such as [task_arithmetic, ties]")
    return _choices(value)


def _points(value: Any) -> tuple[dict[str, Value], ...]:
    if not isinstance(value, list | tuple) or not value:
        raise expected(value, "a list of points such as [{merge_method: ties, parameters.density: 0.2}]")
    for point in value:
        if not isinstance(point, Mapping) or not point or not all(map(_scalar, point.values())):
            raise expected(point, "a mapping of places to values such as {parameters.lambda: 0.5}")
    return tuple(dict(point) for point in value)


_VALUE = {"type": ["number", "string", "boolean"]}
Choices = Annotated[
    tuple[Value, ...],
    BeforeValidator(_choices),
    WithJsonSchema({"type": "array", "items": _VALUE, "minItems": 1}),
]
Methods = Annotated[
    tuple[Value, ...],
    BeforeValidator(_methods),
    WithJsonSchema({"type": "array", "items": {"type": "string"}, "minItems": 1}),
]
Points = Annotated[
    tuple[dict[str, Value], ...],
    BeforeValidator(_points),
    WithJsonSchema(
        {
            "type": "array",
            "minItems": 1,
            "items": {"type": "object", "minProperties": 1, "additionalProperties": _VALUE},
        }
    ),
]


def _paths(value: dict[str, Any]) -> dict[str, Any]:
    if not value:
        raise expected(value, "at least one parameter such as {parameters.lambda: [0.2, 0.4]}")
    return value


class Sweep(Table):
    """Many merges of the same inputs, which are read once."""

    looks_like = "a mapping such as {parameters: {parameters.lambda: [0.2, 0.4]}}"

    merge_method: Methods | None = Field(
        default=None,
        title="Merge methods",
        description="Methods that are tried.",
        examples=[["task_arithmetic", "ties"]],
    )
    parameters: (
        Annotated[
            dict[str, Choices],
            table("a mapping such as {parameters.lambda: [0.2, 0.4]}"),
            AfterValidator(_paths),
        ]
        | None
    ) = Field(
        default=None,
        title="Parameters",
        description="The place of a parameter in the spec, keys joined by dots and entries of lists by number from 0, "
        "to the values that are tried. Every combination of methods and values is a point.",
        examples=[{"parameters.lambda": [0.2, 0.4, 0.6], "models.0.parameters.weight": [0.5, 1.0]}],
    )
    points: Points | None = Field(
        default=None,
        title="Points",
        description="Further points, each with values of its own by place, and a merge_method if it has another.",
        examples=[[{"merge_method": "ties", "parameters.density": 0.2}]],
    )

    @model_validator(mode="after")
    def _some(self) -> Sweep:
        if self.merge_method is None and self.parameters is None and self.points is None:
            raise refused("expected merge_method, parameters or points, found none")
        sizes = [len(choices) for choices in self._axes().values()]
        count = math.prod(sizes) * bool(sizes) + len(self.points or ())
        if count > MOST_POINTS:
            raise refused(f"found {count} points, expected at most {MOST_POINTS}")
        seen = Counter(json.dumps(dict(values), sort_keys=True) for values in self.grid())
        twice = next((values for values, times in seen.items() if times > 1), None)
        if twice is not None:
            raise refused(f"the point {twice} is there twice")
        return self

    def grid(self) -> list[dict[str, Value]]:
        """The values of every point: all combinations, then the points listed."""
        axes = self._axes()
        combined = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())] if axes else []
        return [*combined, *map(dict, self.points or ())]

    def _axes(self) -> dict[str, Sequence[Value]]:
        methods = {} if self.merge_method is None else {METHOD: self.merge_method}
        return {**methods, **(self.parameters or {})}


def names_of(points: Sequence[Values]) -> list[str]:
    """The folder of each point: its method and its values, with a checksum where that is too long or not unique.

    A name depends on its own point and on which places the sweep has, not on the number or order of the points.
    """
    paths = list(dict.fromkeys(path for values in points for path in values if path != METHOD))
    short = {path: path.rpartition(".")[2] for path in paths}
    times = Counter(short.values())
    labels = {
        path: short[path]
        if times[short[path]] == 1
        else ".".join(key for key in path.split(".") if key != "parameters")
        for path in paths
    }
    plain = [_name(values, labels) for values in points]
    folded = Counter(name.lower() for name in plain)
    return [
        name
        if len(name) <= LONGEST_NAME and folded[name.lower()] == 1
        else f"{name[: LONGEST_NAME - 9]}_{_sum(values)}"
        for name, values in zip(plain, points, strict=True)
    ]


def _name(values: Values, labels: Mapping[str, str]) -> str:
    method = [str(values[METHOD])] if METHOD in values else []
    words = [f"{labels[path]}-{_shown(value)}" for path, value in values.items() if path != METHOD]
    return re.sub(r"[^A-Za-z0-9_.+-]", "-", "_".join([*method, *words])).lstrip(".")


def _shown(value: Value) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _sum(values: Values) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(dict(values), sort_keys=True).encode())[:8]
