"""The single values that a spec may hold: sizes, paths, choices, ranges. Each tells what it expects.

Mappings of them are in tables.py and spec.py; method parameters in settings.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from mergecore.sizes import SIZE_EXAMPLES, SIZE_PATTERN, parse_size
from mergecore.spec.problems import either, near, show

MIN_MEMORY = 16 << 20


def expected(value: Any, what: str, hint: str = "") -> PydanticCustomError:
    """The error that `what` was expected and `value` found."""
    return refused(f"found {show(value)}, expected {what}{hint}")


def refused(message: str) -> PydanticCustomError:
    """An error with a message of its own."""
    return PydanticCustomError("worded", "{message}", {"message": message})


def table(what: str) -> BeforeValidator:
    """A mapping; `what` describes it."""

    def check(value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise expected(value, what)
        return dict(value)

    return BeforeValidator(check)


def _bytes(value: Any) -> int:
    try:
        return parse_size(value)
    except ValueError:
        raise expected(value, SIZE_EXAMPLES) from None


def _memory(value: Any) -> int:
    size = _bytes(value)
    if size < MIN_MEMORY:
        raise expected(value, f"at least {MIN_MEMORY >> 20}MiB")
    return size


def _text(value: Any) -> str:
    return _filled(value, "text")


def _filled(value: Any, what: str) -> str:
    if isinstance(value, str) and value.strip() and "\0" not in value:
        return str(value)
    hint = "; put it in quotes" if isinstance(value, bool | int | float) else ""
    raise expected(value, what + (", neither empty nor with a NUL character" if isinstance(value, str) else ""), hint)


DEVICES = r"auto|cpu|cuda(:(0|[1-9][0-9]{0,2})(\+(0|[1-9][0-9]{0,2}))*)?"


def _device(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(DEVICES, value):
        numbers = value.partition(":")[2].split("+")
        if len(set(numbers)) == len(numbers):
            return value
    raise expected(value, "auto, cpu, cuda, cuda:N or cuda:N+M (several)", near(value, ("auto", "cpu", "cuda")))


def choice(*words: str, also: Mapping[str, str] | None = None) -> BeforeValidator:
    def check(value: Any) -> str:
        word = (also or {}).get(value, value) if isinstance(value, str) else None
        if word in words:
            return word
        raise expected(value, either(words), near(value, words) if len(words) > 1 else "")

    return BeforeValidator(check)


def integer(low: int, high: int, what: str) -> BeforeValidator:
    def check(value: Any) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return int(value)
        raise expected(value, what)

    return BeforeValidator(check)


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise expected(value, "true or false")


def _drop_rate(value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1:
        return float(value)
    raise expected(value, "a number from 0 up to, but not including, 1")


def _density(value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1:
        return float(value)
    raise expected(value, "a number above 0, up to 1")


def _model(value: Any) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, dict):
        value = _reference_text(value)
    return _filled(value, "the path of a model")


def _reference_text(value: dict[Any, Any]) -> str:
    """`model@revision+lora@revision` of mergekit's long form {model: {path, revision}, lora: {...}}."""
    form = "a path, or {model: {path: /models/A}, lora: {path: /models/lora}}"
    parts = []
    for key in ("model", "lora"):
        part = value.get(key)
        if part is None and key == "lora":
            continue
        if isinstance(part, dict) and part.keys() <= {"path", "revision"}:
            path, revision = part.get("path"), part.get("revision")
            if not isinstance(revision, str | None):
                raise expected(revision, "the revision's name; put it in quotes")
            part = path if revision is None or not isinstance(path, str) else f"{path}@{revision}"
        if not isinstance(part, str):
            raise expected(value, form)
        parts.append(part)
    # The architecture tells nothing here: names and shapes come from the checkpoints.
    if value.keys() - {"model", "lora", "override_architecture"}:
        raise expected(value, form)
    return "+".join(parts)


_SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "f16": "float16", "fp32": "float32", "f32": "float32"}
_TORCH_DTYPES = {f"torch.{name}": name for name in ("bfloat16", "float16", "float32")}
_SIZE_SCHEMA = WithJsonSchema(
    {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": SIZE_PATTERN}]}
)

Text = Annotated[str, BeforeValidator(_text), WithJsonSchema({"type": "string", "minLength": 1})]
ModelPath = Annotated[str, BeforeValidator(_model), WithJsonSchema({"type": ["string", "object"], "minLength": 1})]
Size = Annotated[int, BeforeValidator(_bytes), _SIZE_SCHEMA]
Memory = Annotated[int, BeforeValidator(_memory), _SIZE_SCHEMA]
Device = Annotated[str, BeforeValidator(_device), WithJsonSchema({"type": "string", "pattern": f"^({DEVICES})$"})]
Dtype = Annotated[
    Literal["bfloat16", "float16", "float32"],
    choice("bfloat16", "float16", "float32", also=_SHORT_DTYPES | _TORCH_DTYPES),
    WithJsonSchema({"enum": ["bfloat16", "float16", "float32", *_SHORT_DTYPES, *_TORCH_DTYPES]}),
]
Computed = Annotated[Literal["float32", "float64", "bfloat16"], choice("float32", "float64", "bfloat16")]
Count = Annotated[
    int,
    integer(1, 1_000_000, "a whole number from 1 to 1000000"),
    WithJsonSchema({"type": "integer", "minimum": 1, "maximum": 1_000_000}),
]
Length = Annotated[
    int,
    integer(2, 1 << 20, "a whole number from 2 to 1048576"),
    WithJsonSchema({"type": "integer", "minimum": 2, "maximum": 1 << 20}),
]
Sparsifier = Annotated[
    Literal["dare", "magnitude", "breadcrumbs", "della"], choice("dare", "magnitude", "breadcrumbs", "della")
]
OnNonfinite = Annotated[Literal["error", "warn"], choice("error", "warn")]
Read = Annotated[Literal["map", "pread"], choice("map", "pread")]
Write = Annotated[Literal["direct", "cached"], choice("direct", "cached")]
Orientation = Annotated[Literal["rows", "columns"], choice("rows", "columns")]
Switch = Annotated[bool, BeforeValidator(_boolean)]
DropRate = Annotated[
    float, BeforeValidator(_drop_rate), WithJsonSchema({"type": "number", "minimum": 0, "exclusiveMaximum": 1})
]
Density = Annotated[float, BeforeValidator(_density), WithJsonSchema({"type": "number", "minimum": 0, "maximum": 1})]
Seed = Annotated[
    int,
    integer(0, 2**64 - 1, "a whole number from 0 to 2**64 - 1"),
    WithJsonSchema({"type": "integer", "minimum": 0, "maximum": 2**64 - 1}),
]
Threads = Annotated[
    int,
    integer(0, 4096, "a whole number from 0 (all processors) to 4096"),
    WithJsonSchema({"type": "integer", "minimum": 0, "maximum": 4096}),
]
Priority = Annotated[
    int,
    integer(-1_000_000, 1_000_000, "a whole number from -1000000 to 1000000"),
    WithJsonSchema({"type": "integer", "minimum": -1_000_000, "maximum": 1_000_000}),
]
