"""A spec: which models are merged, by which method, with which parameters.

Text or a dict -> MergeSpec, or one SpecError that lists the problems with their lines.

The dialect is mergekit's (with `models`), plus keys of our own: docs/spec.md. Not checked here: that models exist, and
which methods and method parameters there are; planning does that and words its findings with MergeSpec.error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError
from pydantic.fields import FieldInfo

from mergecore.errors import SpecError
from mergecore.spec.fields import (
    Dtype,
    ModelPath,
    OnNonfinite,
    Orientation,
    Seed,
    Text,
    TokenizerSource,
    expected,
    located,
    parse_size,
    table,
)
from mergecore.spec.problems import UNREAD, Keys, Problem, either, near
from mergecore.spec.settings import Condition, Setting, evaluate, number_or_same
from mergecore.spec.tables import ModelEntry, Parameters, Run, Sparsify, Table
from mergecore.spec.yaml_lines import MAX_BYTES, Document, read_yaml

__all__ = [
    "MergeSpec",
    "ModelEntry",
    "Run",
    "Setting",
    "Sparsify",
    "evaluate",
    "json_schema",
    "load_spec",
    "parse_size",
    "parse_spec",
]

UNSUPPORTED = {
    "slices": "list whole models under 'models'",
    "modules": "list whole models under 'models'",
    "tokenizer": "tokenizer_source names the model whose tokenizer is kept",
    "chat_template": "the base model's is kept",
    "name": "one file describes one merge (mergekit-multi)",
    "experts": "mixtures of experts are not built (mergekit-moe)",
    "gate_mode": "mixtures of experts are not built (mergekit-moe)",
}
"""Keys of mergekit's that are understood and refused, each with what there is instead."""

MAX_PROBLEMS = 100
"""As many are told; a file with more is no spec."""
MODELS_LOOK_LIKE = "a list of models such as [{model: /models/A}, {model: /models/B}]"


def _models(value: Any) -> Any:
    if isinstance(value, list | tuple) and value:
        return tuple(value)
    raise expected(value, MODELS_LOOK_LIKE)


class MergeSpec(Table):
    """A whole spec. Immutable; made by load_spec and parse_spec."""

    model_config = ConfigDict(title="mergecore spec")
    looks_like = "a mapping with the keys merge_method and models"
    ignored_when_empty = frozenset(UNSUPPORTED)

    merge_method: Text = Field(
        title="Merge method", description="Name of the method; `mergecore methods` lists them.", examples=["widen"]
    )
    base_model: ModelPath | None = Field(
        default=None,
        title="Base model",
        description="Path of the model that the others were trained from; deltas are differences to it.",
        examples=["/models/Qwen1.5-14B"],
    )
    models: Annotated[tuple[ModelEntry, ...], BeforeValidator(_models), Field(min_length=1)] = Field(
        title="Models", description="The models to merge, in order.", examples=[[{"model": "/models/A"}]]
    )
    parameters: Parameters = Field(
        default={},
        title="Parameters",
        description="Method parameters. Each is a value, a list of values from the first layer to the last, or a list "
        "of {filter, value}, of which the first whose filter is part of the tensor's name decides.",
        examples=[{"t": 1.0, "weight": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"value": 0.5}]}],
    )
    sparsify: Sparsify | None = Field(
        default=None,
        title="Sparsify",
        description="Drop delta entries at random in front of the method (DARE).",
        examples=[{"method": "dare", "drop_rate": 0.1}],
    )
    dtype: Dtype | None = Field(
        default=None,
        title="Dtype",
        description="Type of the result's tensors, if out_dtype is not given. Sums are always float64.",
    )
    out_dtype: Dtype | None = Field(
        default=None, title="Output dtype", description="Type of the result's tensors; without it, dtype."
    )
    tokenizer_source: TokenizerSource | None = Field(
        default=None,
        title="Tokenizer source",
        description="The model whose tokenizer files go into the output: base, or the path of a model.",
        examples=["base"],
    )
    orientation: Annotated[dict[str, Orientation], table("a mapping such as {'*.embed_tokens.weight': rows}")] = Field(
        default={},
        title="Orientation",
        description="Which tensors are scored per stored row or per stored column: glob of the tensor's name to rows "
        "or columns; the first that matches decides. Without one, the architecture tells.",
        examples=[{"*.embed_tokens.weight": "rows"}],
    )
    seed: Seed = Field(default=0, title="Seed", description="Seed of all random choices; 0 <= seed < 2**64.")
    on_nonfinite: OnNonfinite = Field(
        default="error",
        title="On non-finite",
        description="What NaN and Inf in an input lead to: error stops the merge, warn lets them through.",
    )
    run: Run = Field(
        default_factory=Run,
        title="Run",
        description="Where and with what the merge runs; no part of the result's identity.",
        examples=[{"memory": "1GiB"}],
    )

    _path: Path | None = PrivateAttr(default=None)
    _name: str | None = PrivateAttr(default=None)
    _text: str | None = PrivateAttr(default=None)
    _document: Document | None = PrivateAttr(default=None)

    @property
    def path(self) -> Path | None:
        """The spec's file; None if it was not read from one."""
        return self._path

    @property
    def text(self) -> str:
        """The spec as it was given; YAML made from the dict if it was given as one."""
        if self._text is None:
            return str(yaml.safe_dump(self.model_dump(mode="json", exclude_unset=True), sort_keys=False))
        return self._text

    def line_of(self, *keys: str | int) -> int | None:
        """The line of a key or value, or of the nearest thing around it that the text has; None without a text."""
        return None if self._document is None else self._document.line_of(keys)

    def error(self, message: str, *keys: str | int) -> SpecError:
        """A SpecError `FILE:LINE: key.path: message` about what stands at `keys`."""
        return SpecError(Problem(keys, message, self.line_of(*keys)).worded(self._name))

    def resolve(self, model: str) -> Path:
        """The absolute path of a model named in this spec; relative ones start at the spec's directory."""
        return located(model, None if self._path is None else self._path.parent)

    def parameter(
        self,
        name: str,
        tensor_name: str,
        t: float = 0.0,
        model_index: int | None = None,
        *,
        validate: Callable[[Any], Any] = number_or_same,
    ) -> Any:
        """The value of a method parameter for a tensor at layer place t (settings.evaluate); None if nothing sets it.

        The settings of models[model_index] come first; where they give nothing for this tensor, the spec's own decide.
        """
        own = {} if model_index is None else self.models[model_index].parameters
        for settings in (own, self.parameters):
            if name in settings:
                value = evaluate(settings[name], tensor_name, t, validate=validate)
                if value is not None:
                    return value
        return None

    def as_dict(self) -> dict[str, Any]:
        """Everything that is in effect, defaults included, as plain JSON values that load_spec accepts."""
        return self.model_dump(mode="json")

    def identity(self) -> str:
        """Canonical JSON of what decides the bytes of the result's tensors: all but `run`; model paths as written."""
        what = self.as_dict()
        del what["run"]
        what["orientation"] = list(what["orientation"].items())  # the first match decides: the order has a meaning
        return json.dumps(what, sort_keys=True, separators=(",", ":"), allow_nan=False)


def load_spec(source: str | os.PathLike[str] | Mapping[str, Any], *, name: str | None = None) -> MergeSpec:
    """Read a spec from a file, or from a dict of the same structure.

    name: how messages call the file, if not by its path. Raises SpecError with one line per problem.
    """
    if isinstance(source, Mapping):
        return _validated(Document(value=dict(source)), name, None, None)
    shown = name or os.fsencode(source).decode("utf-8", "replace")
    try:
        with open(source, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SpecError(f"{shown}: cannot be read: {reason}") from error
    return parse_spec(data, shown, path=Path(source))


def parse_spec(text: str | bytes, name: str = "spec", *, path: Path | None = None) -> MergeSpec:
    """Read a spec from text. name: how messages call it. path: its file, from whose directory relative models start.

    Raises SpecError with one line per problem.
    """
    document = read_yaml(text)
    return _validated(document, name, text if isinstance(text, str) else text.decode("utf-8", "replace"), path)


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a spec, for editors."""
    schema = MergeSpec.model_json_schema()
    for part in (schema, *schema.get("$defs", {}).values()):
        for key, field in part.get("properties", {}).items():
            field.setdefault("title", key.capitalize())  # pydantic drops titles beside references
            if key not in part.get("required", ()):
                _allow_null(field)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_any_of(schema)}


def _any_of(schema: Any) -> Any:
    """oneOf -> anyOf: an empty list is a gradient as well as a list of conditions."""
    if isinstance(schema, dict):
        return {"anyOf" if key == "oneOf" else key: _any_of(value) for key, value in schema.items()}
    return [_any_of(item) for item in schema] if isinstance(schema, list) else schema


def _allow_null(field: dict[str, Any]) -> None:
    kept: dict[str, Any] = {
        key: field.pop(key) for key in ("title", "description", "default", "examples") if key in field
    }
    alternatives = field.pop("anyOf") if set(field) == {"anyOf"} else [dict(field)]
    if not any("null" in alternative.get("type", ()) for alternative in alternatives):
        alternatives = [*alternatives, {"type": "null"}]
    field.clear()
    field.update(kept, anyOf=alternatives)


def _validated(document: Document, name: str | None, text: str | None, path: Path | None) -> MergeSpec:
    problems = list(document.problems)
    spec = None
    if document.value is not None:
        try:
            directory = None if path is None else path.parent
            spec = MergeSpec.model_validate(document.value, context={"directory": directory})
        except ValidationError as error:
            problems += _worded(error, document)
    if problems:
        lines = [problem.worded(name) for problem in sorted(problems, key=lambda problem: problem.line or 0)]
        more = [f"... and {len(lines) - MAX_PROBLEMS} more"] if len(lines) > MAX_PROBLEMS else []
        raise SpecError("\n".join(lines[:MAX_PROBLEMS] + more))
    assert spec is not None
    spec._path, spec._name, spec._text = path, name, text
    spec._document = document if text is not None else None
    return spec


def _worded(error: ValidationError, document: Document) -> list[Problem]:
    """What pydantic found, in the words of this program."""
    problems = []
    for found in error.errors(include_url=False):
        keys, kind = _without_tags(found["loc"]), found["type"]
        if found["input"] is UNREAD or kind == "too_short":
            continue  # told already; too_short: of the models that are right
        if kind == "worded":
            message = found["ctx"]["message"]
        elif kind == "missing":
            if keys == ("models",) and any(old in document.value for old in ("slices", "modules")):
                continue  # these are refused with their own message
            message = f"missing, expected {_looks_like(keys)}"
        elif kind == "extra_forbidden":
            message = _unknown(keys)
        elif kind in ("invalid_key", "string_type"):  # only from a dict that was not read from text
            keys, message = found["loc"][: -1 if kind == "invalid_key" else -2], "keys must be text"
        else:
            message = str(expected(found["input"], _looks_like(keys)))
        line = document.line_of(keys, key_first=kind == "extra_forbidden") if document.keys or document.values else None
        problems.append(Problem(keys, message, line))
    return problems


def _without_tags(loc: Keys) -> Keys:
    """The keys of a pydantic location, which also names the kind of a setting: ("parameters", "t", "gradient", 0)."""
    at = 2 if loc[:1] == ("models",) else 0
    if loc[at : at + 1] != ("parameters",):
        return loc
    inner = loc[at + 3 :]  # of one setting: a gradient's (index,), or a condition's (index, "value", kind, index)
    for i, key in enumerate(inner):
        if key == "value":
            inner = inner[: i + 1] + inner[i + 2 :]
            break
    return loc[: at + 2] + inner


def _table_at(keys: Keys) -> tuple[str, dict[str, FieldInfo]]:
    """What the mapping at `keys` looks like, and its fields."""
    tables: dict[Keys, type[Table]] = {(): MergeSpec, ("run",): Run, ("sparsify",): Sparsify}
    here = ModelEntry if keys[:1] == ("models",) and len(keys) == 2 else tables.get(keys)
    return ("", {}) if here is None else (here.looks_like, here.model_fields)


def _looks_like(keys: Keys) -> str:
    """What belongs at `keys`, for a value that is missing or of the wrong kind."""
    if keys == ("models",):
        return MODELS_LOOK_LIKE
    own, _ = _table_at(keys)
    field = _table_at(keys[:-1])[1].get(str(keys[-1])) if keys else None
    if own or field is None:
        return own or "the value that belongs to a filter"
    return f"a value such as {field.examples[0]}" if field.examples else str(field.description)


def _unknown(keys: Keys) -> str:
    *around, key = keys
    known = _table_at(tuple(around))[1] or Condition.__annotations__
    if not around and key in UNSUPPORTED:
        return f"not supported by this version; {UNSUPPORTED[key]}"
    if not around and key in Run.model_fields:
        return f"unknown key here; did you mean 'run.{key}'?"
    hint = near(key, [*known, *(() if around else UNSUPPORTED)])
    if around[:1] == ["models"] and len(around) == 2 and not hint:
        return "unknown key; method parameters of a model stand under its 'parameters'"
    return f"unknown key{hint or f', expected {either(known)}'}"
