"""Text or a dict -> MergeSpec, or one SpecError that lists the problems with their lines."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mergecore.errors import SpecError
from mergecore.spec.fields import expected
from mergecore.spec.problems import UNREAD, Keys, Problem, either, near
from mergecore.spec.settings import Condition
from mergecore.spec.spec import MergeSpec
from mergecore.spec.tables import Run, Table
from mergecore.spec.yaml_lines import MAX_BYTES, Document, read_yaml

OTHER_TOOLS = {
    "experts": "mixtures of experts are not built (mergekit-moe)",
    "gate_mode": "mixtures of experts are not built (mergekit-moe)",
}
"""Keys of files for mergekit's other tools, each with what there is to say."""

MAX_PROBLEMS = 100
"""As many are told; a file with more is no spec."""


def load_spec(source: str | os.PathLike[str] | Mapping[str, Any], *, name: str | None = None) -> MergeSpec:
    """Read a spec from a file, or from a dict of the same structure.

    name: how messages call the file, if not by its path. Raises SpecError with one line per problem.
    """
    if isinstance(source, Mapping):
        spec, problems = _validated(Document(value=dict(source)), name, None, None)
        _raise(problems, name)
        assert spec is not None
        return spec
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

    Of several documents (mergekit-multi) the one without a name is the spec, or else the last; those that it needs
    are its `earlier` ones. Raises SpecError with one line per problem.
    """
    documents = read_yaml(text)
    text = text if isinstance(text, str) else text.decode("utf-8", "replace")
    specs, problems = [], []
    for document in documents:
        spec, found = _validated(document, name, text, path)
        problems += found
        specs += [] if spec is None else [spec]
    if not problems:
        problems += _naming_problems(specs)
    _raise(problems, name)
    return _ordered(specs)


def _naming_problems(specs: list[MergeSpec]) -> list[Problem]:
    """What is wrong with the names of several merges in one file."""
    unnamed = [spec for spec in specs if spec.name is None]
    message = "only one merge of a file may be without a name"
    problems = [Problem((), message, spec.line_of()) for spec in unnamed[1:]]
    seen: set[str] = set()
    for spec in specs:
        if spec.name is None:
            continue
        if spec.name in seen:
            problems.append(Problem(("name",), f"{spec.name!r} is the name of an earlier merge", spec.line_of("name")))
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", spec.name):
            message = f"found {spec.name!r}, expected letters, digits and _.- only: it names a folder"
            problems.append(Problem(("name",), message, spec.line_of("name")))
        seen.add(spec.name)
    return problems


def _ordered(specs: list[MergeSpec]) -> MergeSpec:
    """The final merge, with those that it needs before it; raises SpecError for a circle."""
    named = {spec.name: spec for spec in specs if spec.name is not None}
    final = next((spec for spec in specs if spec.name is None), specs[-1])
    order: list[MergeSpec] = []

    def add(spec: MergeSpec, above: tuple[str | None, ...]) -> None:
        for reference, keys in spec.references():
            needed = named.get(reference.partition("+")[0])
            if needed is None or needed in order:
                continue
            if needed.name in above:
                raise spec.error(f"{needed.name!r} needs the result of this merge itself", *keys)
            add(needed, (*above, needed.name))
        if spec is not final:
            order.append(spec)

    add(final, (final.name,))
    final._earlier = tuple(order)
    return final


def validated(value: Mapping[str, Any], like: MergeSpec, text: str) -> MergeSpec:
    """The spec `like` with another value and text, but with the places of its own. Raises SpecError."""
    places = like._document or Document()
    spec, problems = _validated(replace(places, value=dict(value), problems=[]), like._name, text, like.path)
    _raise(problems, like._name)
    assert spec is not None
    spec._earlier = like.earlier
    return spec


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


def _validated(
    document: Document, name: str | None, text: str | None, path: Path | None
) -> tuple[MergeSpec | None, list[Problem]]:
    problems = list(document.problems)
    spec = None
    if document.value is not None:
        try:
            spec = MergeSpec.model_validate(document.value)
        except ValidationError as error:
            problems += _worded(error, document)
    if spec is not None:
        spec._path, spec._name, spec._text = path, name, text
        spec._document = document if text is not None else None
    return spec, problems


def _raise(problems: list[Problem], name: str | None) -> None:
    """One SpecError for all problems, if there are any."""
    if problems:
        lines = [problem.worded(name) for problem in sorted(problems, key=lambda problem: problem.line or 0)]
        more = [f"... and {len(lines) - MAX_PROBLEMS} more"] if len(lines) > MAX_PROBLEMS else []
        raise SpecError("\n".join(lines[:MAX_PROBLEMS] + more), problems[0])


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
    if loc[:2] == ("tokenizer", "tokens"):  # and the kind of a token's source: ("source", "row", "kind")
        return loc[:4] + loc[5:]
    if "parameters" not in loc:
        return loc
    at = loc.index("parameters")
    inner = loc[at + 3 :]  # of one setting: a gradient's (index,), or a condition's (index, "value", kind, index)
    for i, key in enumerate(inner):
        if key == "value":
            inner = inner[: i + 1] + inner[i + 2 :]
            break
    return loc[: at + 2] + inner


def _table_at(keys: Keys) -> type[Table] | None:
    """The table whose keys stand below `keys`; None where something else stands."""
    here: type[Table] = MergeSpec
    rest = list(keys)
    while rest:
        key = rest.pop(0)
        child = here.children.get(str(key))
        if child is None:
            return None
        if key in ("sparsify", "calibration", "tokenizer", "evolve", "sweep", "score", "run"):
            here = child
        elif rest:  # of a list or a mapping: its number or name
            rest.pop(0)
            here = child
        else:
            return None
    return here


def _looks_like(keys: Keys) -> str:
    """What belongs at `keys`, for a value that is missing or of the wrong kind."""
    own = _table_at(keys)
    if own is not None:
        return own.looks_like
    around = _table_at(keys[:-1])
    field = around.model_fields.get(str(keys[-1])) if around is not None else None
    if field is None:
        return "the value that belongs to a filter"
    return f"a value such as {field.examples[0]}" if field.examples else str(field.description)


def _unknown(keys: Keys) -> str:
    *around, key = keys
    here = _table_at(tuple(around))
    known = here.model_fields if here is not None else Condition.__annotations__
    if not around and key in OTHER_TOOLS:
        return f"not supported; {OTHER_TOOLS[key]}"
    if not around and key in Run.model_fields:
        return f"unknown key here; did you mean 'run.{key}'?"
    hint = near(key, known)
    if here is not None and "model" in here.model_fields and not hint:
        return "unknown key; method parameters of a model stand under its 'parameters'"
    return f"unknown key{hint or f', expected {either(known)}'}"
