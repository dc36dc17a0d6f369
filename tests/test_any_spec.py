"""Any spec means the same as dict, YAML and JSON; any text is a spec or a spec error that tells its line."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mergecore.errors import SpecError
from mergecore.spec import json_schema, load_spec, parse_spec
from tests.specs import ANY_SPEED, MINIMAL, refusal

WORDS = st.text(st.sampled_from("abcxyz_.-/ é#:'\"{"), min_size=1, max_size=8).map(lambda word: "m" + word)
SCALARS = st.booleans() | st.integers(-(10**9), 10**9) | st.floats(-1e9, 1e9) | WORDS
VALUES = SCALARS | st.lists(SCALARS, max_size=4)
CONDITIONS = st.fixed_dictionaries({"value": VALUES}, optional={"filter": st.none() | WORDS})
PARAMETERS = st.dictionaries(WORDS, VALUES | CONDITIONS | st.lists(CONDITIONS, max_size=3), max_size=3)
MODELS = st.fixed_dictionaries({"model": WORDS}, optional={"parameters": PARAMETERS})
DTYPES = st.sampled_from(["bfloat16", "float16", "f32", None])
SPECS = st.fixed_dictionaries(
    {"merge_method": WORDS, "models": st.lists(MODELS, min_size=1, max_size=4)},
    optional={
        "base_model": WORDS | st.none(),
        "parameters": PARAMETERS | st.none(),
        "sparsify": st.fixed_dictionaries(
            {"method": st.just("dare"), "drop_rate": st.just(0) | st.floats(0, 1, exclude_max=True)},
            optional={"rescale": st.booleans()},
        ),
        "dtype": DTYPES,
        "out_dtype": DTYPES,
        "tokenizer_source": st.just("base") | WORDS,
        "orientation": st.dictionaries(WORDS, st.sampled_from(["rows", "columns"]), max_size=3),
        "seed": st.integers(0, 2**64 - 1),
        "on_nonfinite": st.sampled_from(["error", "warn"]),
        "run": st.fixed_dictionaries(
            {},
            optional={
                "output": WORDS,
                "device": st.sampled_from(["auto", "cpu", "cuda", "cuda:0", "cuda:12", "cuda:2+0"]),
                "memory": st.sampled_from(["16MiB", "1.5GB", 1 << 30]),
                "threads": st.integers(0, 64),
                "shard_size": st.integers(1, 2**63 - 1) | st.just("5GB"),
                "priority": st.integers(-9, 9),
                "read": st.sampled_from(["map", "pread"]),
                "write": st.sampled_from(["direct", "cached"]),
            },
        ),
    },
)


def as_text(spec: Any, flow: bool | None = False, width: int = 80) -> str:
    return str(yaml.safe_dump(spec, default_flow_style=flow, sort_keys=False, allow_unicode=True, width=width))


@given(SPECS)
@ANY_SPEED
def test_dict_yaml_and_json_of_a_spec_mean_the_same(data: dict[str, Any]) -> None:
    spec = load_spec(data)
    plain = spec.as_dict()
    for same in (parse_spec(as_text(data)), parse_spec(as_text(data, True)), parse_spec(json.dumps(data, indent="\t"))):
        assert same.as_dict() == plain
        assert same.identity() == spec.identity()
    assert load_spec(json.loads(json.dumps(plain))).as_dict() == plain
    assert parse_spec(spec.text).as_dict() == plain


@given(SPECS)
@ANY_SPEED
def test_accepted_specs_satisfy_the_schema(data: dict[str, Any]) -> None:
    schema = json_schema()
    assert satisfies(data, schema, schema)
    assert satisfies(load_spec(data).as_dict(), schema, schema)
    assert not satisfies({**data, "sede": 1}, schema, schema)


@given(SPECS, SPECS)
@ANY_SPEED
def test_identity_is_all_but_run(one: dict[str, Any], other: dict[str, Any]) -> None:
    a, b = load_spec(one), load_spec({**one, "run": other.get("run")})
    assert a.identity() == b.identity()
    c = load_spec({**one, "seed": (one.get("seed", 0) + 1) % 2**64})
    assert a.identity() != c.identity()


def test_order_of_orientation_belongs_to_the_identity() -> None:
    one, other = ({"a*": "rows", "*a": "columns"}, {"*a": "columns", "a*": "rows"})
    base = yaml.safe_load(MINIMAL)
    assert load_spec({**base, "orientation": one}).identity() != load_spec({**base, "orientation": other}).identity()


def tables_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The mappings of a spec whose keys are known ones."""
    found = [spec, *spec["models"], *(spec[key] for key in ("run", "sparsify") if spec.get(key))]
    for owner in (spec, *spec["models"]):
        for setting in (owner.get("parameters") or {}).values():
            if isinstance(setting, dict):
                found.append(setting)
            elif isinstance(setting, list):
                found += [item for item in setting if isinstance(item, dict)]
    return found


@given(SPECS, st.data())
@ANY_SPEED
def test_unknown_key_anywhere_is_told_with_its_line(spec: dict[str, Any], data: st.DataObject) -> None:
    table = data.draw(st.sampled_from(tables_of(spec)))
    kept = list(table.items())
    kept.insert(data.draw(st.integers(0, len(kept))), ("qqqqqq", data.draw(SCALARS | st.lists(SCALARS))))
    table.clear()
    table.update(kept)
    text = as_text(spec, data.draw(st.sampled_from([False, None, True])), data.draw(st.sampled_from([20, 80])))
    line = next(n for n, content in enumerate(text.split("\n"), 1) if "qqqqqq" in content)
    message = refusal(text)
    assert len(message.splitlines()) == 1
    assert re.match(rf"merge\.yaml:{line}: [^ ].*qqqqqq: unknown key|merge\.yaml:{line}: qqqqqq: unknown key", message)


@given(SPECS, st.data())
@ANY_SPEED
def test_wrong_value_anywhere_is_told_with_its_line(spec: dict[str, Any], data: st.DataObject) -> None:
    places: list[tuple[Any, Any]] = [(spec, key) for key in ("dtype", "seed", "on_nonfinite", "run") if key in spec]
    places += [(spec["run"], key) for key in spec.get("run", {}) if key != "output"]
    places += [(entry, key) for entry in spec["models"] for key in entry if key == "parameters"]
    places += [(spec["models"], i) for i in range(len(spec["models"]))]
    owner, key = data.draw(st.sampled_from(places))
    owner[key] = "qqqqqq"
    text = as_text(spec, data.draw(st.sampled_from([False, None, True])), data.draw(st.sampled_from([20, 80])))
    line = next(n for n, content in enumerate(text.split("\n"), 1) if "qqqqqq" in content)
    message = refusal(text)
    assert len(message.splitlines()) == 1
    assert message.startswith(f"merge.yaml:{line}: ")
    assert "found 'qqqqqq', expected " in message


@given(SPECS, st.data())
@ANY_SPEED
def test_repeated_key_is_told_with_both_lines(spec: dict[str, Any], data: st.DataObject) -> None:
    lines = as_text(spec).splitlines()
    again = data.draw(
        st.sampled_from([key for key, value in spec.items() if isinstance(value, str | int) or not value])
    )
    text = "\n".join([*lines, f"{again}: {json.dumps(spec[again])}", ""])
    first = next(n for n, line in enumerate(lines, 1) if line.startswith(f"{again}:"))
    assert refusal(text) == f"merge.yaml:{len(lines) + 1}: {again}: given twice; the first is on line {first}"


def parses_or_is_refused(text: str | bytes) -> None:
    try:
        spec = parse_spec(text, "merge.yaml")
    except SpecError as error:
        str(error).encode()
    else:
        json.dumps(spec.as_dict(), allow_nan=False).encode()
        spec.identity().encode()
        for name, _ in spec.references():
            name.encode()


@given(st.text() | st.binary() | st.text(st.sampled_from("[]{}:,-?&*!|>'\"%@`#\\ \n\tab1.e<=~")))
@settings(ANY_SPEED, max_examples=300)
def test_any_text_is_a_spec_or_a_spec_error(text: str | bytes) -> None:
    parses_or_is_refused(text)


@given(SPECS, st.data())
@settings(ANY_SPEED, max_examples=300)
def test_any_mutated_spec_is_a_spec_or_a_spec_error(spec: dict[str, Any], data: st.DataObject) -> None:
    text = as_text(spec, data.draw(st.sampled_from([False, None, True])))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 12)))
        piece = st.sampled_from(
            ["- ", ": ", "\n", "\t", "&a ", "*a", "<<: *a", "!!set ", "!!int ", "? ", "{", "[", "'", "---\n"]
        )
        text = text[:start] + data.draw(piece | st.text(max_size=3) | st.just(text[:start][-20:])) + text[end:]
    parses_or_is_refused(text)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(), inner, max_size=4),
    max_leaves=8,
)


@given(SPECS, st.data())
@settings(ANY_SPEED, max_examples=300)
def test_any_value_in_a_dict_is_accepted_or_a_spec_error(spec: dict[str, Any], data: st.DataObject) -> None:
    table = data.draw(st.sampled_from(tables_of(spec)))
    table[data.draw(st.sampled_from(sorted(table)) | st.text())] = data.draw(ANYTHING)
    try:
        json.dumps(load_spec(spec).as_dict(), allow_nan=False)
    except SpecError as error:
        str(error).encode()


def satisfies(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether a value satisfies a JSON Schema; knows the keywords that ours uses and fails at others."""
    types: dict[str, Any] = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}

    def is_type(name: str) -> bool:
        if name in ("number", "integer"):
            return isinstance(value, int | float if name == "number" else int) and not isinstance(value, bool)
        return isinstance(value, types[name])

    for word, rule in schema.items():
        match word:
            case "$ref":
                good = satisfies(value, root["$defs"][rule.removeprefix("#/$defs/")], root)
            case "type":
                good = any(is_type(name) for name in ([rule] if isinstance(rule, str) else rule))
            case "anyOf":
                good = any(satisfies(value, part, root) for part in rule)
            case "enum":
                good = value in rule
            case "const":
                good = value == rule
            case "pattern":
                good = not isinstance(value, str) or re.search(rule, value) is not None
            case "minLength" | "minItems":
                good = not isinstance(value, str | list) or len(value) >= rule
            case "minimum":
                good = not isinstance(value, int | float) or value >= rule
            case "maximum":
                good = not isinstance(value, int | float) or value <= rule
            case "exclusiveMaximum":
                good = not isinstance(value, int | float) or value < rule
            case "required":
                good = not isinstance(value, dict) or all(key in value for key in rule)
            case "properties":
                good = not isinstance(value, dict) or all(
                    satisfies(value[key], part, root) for key, part in rule.items() if key in value
                )
            case "additionalProperties":
                others = set(value) - set(schema.get("properties", {})) if isinstance(value, dict) else set()
                good = not others if rule is False else all(satisfies(value[key], rule, root) for key in others)
            case "items":
                good = not isinstance(value, list) or all(satisfies(item, rule, root) for item in value)
            case "$schema" | "$defs" | "title" | "description" | "default" | "examples":
                good = True
            case _:
                raise AssertionError(f"unknown keyword {word}")
        if not good:
            return False
    return True
