"""A method parameter as a spec gives it, and its value for one tensor: name filters and per-layer gradients.

The meaning is mergekit's. Not for knowing which parameters a method has: methods/ does that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, PlainValidator, Tag, WithJsonSchema
from typing_extensions import TypedDict  # pydantic takes typing's own only from Python 3.12 on

from mergecore.spec.fields import expected

_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


def _scalar(value: Any) -> bool | int | float | str:
    """The value itself if it is a scalar; NaN and infinity are refused, as numbers and as text."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float | str):
        plain = int(value) if isinstance(value, int) else float(value) if isinstance(value, float) else str(value)
        if _is_finite(plain):
            return plain
        raise expected(value, "a finite number")
    raise expected(value, "a number, a word, true or false")


def _is_finite(value: int | float | str) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:  # an int beyond float's range
        return False
    except ValueError:  # text that is no number
        return True


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return "condition"
    if isinstance(value, list | tuple):
        return "conditions" if any(isinstance(item, dict) for item in value) else "gradient"
    return "scalar"


def _condition(value: Any) -> Any:
    if not isinstance(value, dict):
        raise expected(value, "a mapping such as {filter: self_attn, value: 0.5}, like the others in this list")
    return value


def _filter(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise expected(value, "a part of a tensor's name (text, in quotes if it looks like a number)")


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _value(value: Any) -> Any:
    if isinstance(value, list | tuple | dict) and _kind(value) != "gradient":
        raise expected(value, "a number, a word, true, false or a list of these")
    return value


Scalar = Annotated[
    bool | int | float | str, PlainValidator(_scalar), WithJsonSchema({"type": ["number", "string", "boolean"]})
]
Gradient = Annotated[list[Scalar], BeforeValidator(_as_list)]


class Condition(TypedDict):
    """A value for the tensors whose name contains `filter`; without a filter, or with '*', for all."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # type: ignore[misc]  # noqa: RUF012

    filter: NotRequired[
        Annotated[
            str | None,
            PlainValidator(_filter),
            WithJsonSchema({"type": ["string", "null"], "description": "A part of the tensor's name."}),
        ]
    ]
    value: Annotated[
        Annotated[Scalar, Tag("scalar")] | Annotated[Gradient, Tag("gradient")],
        Discriminator(_kind),
        BeforeValidator(_value),
        Field(description="A value, or a list of values from the first layer to the last."),
    ]


Conditions = Annotated[list[Annotated[Condition, BeforeValidator(_condition)]], BeforeValidator(_as_list)]
Setting = Annotated[
    Annotated[Scalar, Tag("scalar")]
    | Annotated[Gradient, Tag("gradient")]
    | Annotated[Conditions, Tag("conditions")]
    | Annotated[Condition, AfterValidator(lambda condition: [condition]), Tag("condition")],
    Discriminator(_kind),
]
"""A scalar, a gradient (list of scalars, first layer to last), or conditions (a single one becomes a list)."""


def number_or_same(value: Any) -> Any:
    """Text that reads as a number becomes that number ("1e-5"); all else stays."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return int(value) if re.fullmatch(r"[-+]?[0-9]{1,18}", value) else float(value)
    return value


def evaluate(setting: Any, tensor_name: str, t: float = 0.0, *, validate: Callable[[Any], Any] = number_or_same) -> Any:
    """The value of a setting for one tensor; None if no filter matches or the gradient is empty.

    t: the place of the tensor's layer, from 0 (first) to 1 (last); 0 for tensors outside the layers.
    validate: makes every scalar the parameter's own type, before interpolation and again after it; raises for others.

    Of conditions the first whose filter is part of the name decides, even if its value is an empty gradient.
    A gradient of n numbers is piecewise linear with its knots at t = i / (n - 1); one that holds words or booleans
    gives its entry number int(t * (n - 1)).
    """
    if not 0.0 <= t <= 1.0:
        raise ValueError(f"t must lie in [0, 1], got {t}")
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list | tuple):
        return validate(setting)
    if any(isinstance(item, dict) for item in setting):
        for condition in setting:
            pattern = condition.get("filter")
            if pattern is None or pattern == "*" or (tensor_name and pattern in tensor_name):
                return evaluate(condition["value"], tensor_name, t, validate=validate)
        return None
    if not setting:
        return None
    values = [validate(item) for item in setting]
    place = t * (len(values) - 1)
    i = int(place)
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        return values[i]
    after = values[min(i + 1, len(values) - 1)]
    return validate((1 - (place - i)) * values[i] + (place - i) * after)
