"""What the spec reader accepts and what it means, and what parameters evaluate to."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mergecore.sizes import parse_size
from mergecore.spec import MergeSpec, Part, evaluate, json_schema, load_spec, parse_spec
from tests.specs import ANY_SPEED, DOCS, FITTED, FULL, MINIMAL, SLICED, refusal


def of(spec: MergeSpec) -> Part:
    """What a spec of whole models merges."""
    (part,) = spec.parts()
    return part


# What is accepted


def test_example_of_the_documentation_has_the_meaning_that_it_shows() -> None:
    spec = parse_spec(FULL)
    assert spec.merge_method == "widen"
    assert spec.base_model == "/models/Qwen1.5-14B"
    assert [entry.model for entry in spec.models or ()] == ["/models/Qwen1.5-14B-Chat", "/models/Sailor-14B"]
    assert spec.sparsify is not None
    assert (spec.sparsify.method, spec.sparsify.drop_rate, spec.sparsify.rescale) == ("dare", 0.1, None)
    assert (spec.dtype, spec.out_dtype, spec.seed, spec.on_nonfinite) == ("bfloat16", None, 0, "error")
    assert (spec.run.output, spec.run.memory, spec.run.shard_size) == ("my-merge", 1 << 30, 5 * 10**9)
    assert of(spec).parameter("weight", "w", 0.5, 1) == pytest.approx(0.5)
    assert of(spec).parameter("s", "layers.0.self_attn.q_proj", 0.0) == 1.0
    assert of(spec).parameter("s", "layers.0.mlp.up_proj", 0.0, 0) == 0.5


def test_slices_and_modules_become_parts_with_their_parameters_nearest_first() -> None:
    assert [source.layers for part in parse_spec(SLICED).parts() for source in part.sources] == [(0, 16), (8, 24)]
    assert [text for text, _ in parse_spec(FITTED).data()] == ["/data/math.jsonl", "/data/code.txt"]
    text = """\
merge_method: linear
base_model: base
parameters: {weight: 1, a: 1, b: 1, c: 1}
modules:
  text_decoder:
    parameters: {weight: 2, a: 2, b: 2}
    slices:
      - sources:
          - {model: A, layer_range: [0, 2], parameters: {weight: 4}}
          - {model: base, layer_range: [4, 6]}
        parameters: {weight: 3, a: 3}
  vision_tower:
    models: [{model: B, parameters: {weight: 5}}]
"""
    text_decoder, vision = parse_spec(text, "f").parts()
    assert (text_decoder.module, vision.module) == ("text_decoder", "vision_tower")
    assert [text_decoder.parameter("weight", "x", 0, source) for source in (0, 1, None)] == [4, 3, 3]
    assert [text_decoder.parameter(name, "x", 0, 0) for name in "abc"] == [3, 2, 1]
    assert [vision.parameter(name, "x", 0, 0) for name in ("weight", "a")] == [5, 1]
    assert text_decoder.sources[1].keys == ("modules", "text_decoder", "slices", 0, "sources", 1, "model")


def test_references_are_told_with_their_places() -> None:
    spec = parse_spec(
        "merge_method: x\nbase_model: {model: {path: a, revision: r}, lora: {path: l}, override_architecture: C}\n"
        "models: [{model: b}]\ntokenizer: {source: c, tokens: {x: {source: d}, y: {source: {kind: zero}}}}\n"
    )
    assert dict(spec.references()) == {
        "a@r+l": ("base_model",),
        "b": ("models", 0, "model"),
        "c": ("tokenizer", "source"),
        "d": ("tokenizer", "tokens", "x", "source"),
    }
    assert load_spec(spec.as_dict()).as_dict() == spec.as_dict()


SEVERAL = """\
name: second
merge_method: linear
models: [{model: first}, {model: A}]
---
merge_method: slerp
base_model: second+lora
models: [{model: B}]
---
name: first
merge_method: linear
models: [{model: C}, {model: D}]
---
name: unused
merge_method: linear
models: [{model: first}]
"""


def test_merges_of_one_file_come_in_the_order_in_which_they_need_each_other() -> None:
    spec = parse_spec(SEVERAL)
    assert (spec.name, spec.merge_method) == (None, "slerp")
    assert [earlier.name for earlier in spec.earlier] == ["first", "second"]
    without = parse_spec(SEVERAL.replace("name: unused\n", "").replace("base_model: second+lora", "name: last"))
    assert without.name is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nmerge_method: x\nmodels: [{model: b}]\n---\nname: b\nmerge_method: x\nmodels: [{model: a}]\n",
         "f:3: models[0].model: 'b' needs the result of this merge itself"),
        ("name: a\nmerge_method: x\nmodels: [{model: q}]\n---\nname: a\nmerge_method: x\nmodels: [{model: q}]\n",
         "f:5: name: 'a' is the name of an earlier merge"),
        ("name: a/b\nmerge_method: x\nmodels: [{model: q}]\n",
         "f:1: name: found 'a/b', expected letters, digits and _.- only: it names a folder"),
        ("merge_method: x\nmodels: [{model: q}]\nslices: [{sources: [{model: A, layer_range: [0, 2]}]}]\n",
         "f:1: expected one of models, slices and modules, found models and slices"),
        ("merge_method: x\n", "f:1: expected one of models, slices and modules, found none of them"),
        ("merge_method: x\nmodels: [{model: q}]\ntokenizer: {source: base}\ntokenizer_source: base\n",
         "f:1: expected one of tokenizer and tokenizer_source, found both"),
        ("merge_method: x\nslices: [{sources: [{model: A, layer_range: [0, 2]}, {model: B, layer_range: [0, 3]}]}]\n",
         "f:2: slices[0]: the sources of a slice must have the same number of layers; found [0, 2], [0, 3]"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(text: str, message: str) -> None:
    assert refusal(text, "f") == message


def test_documentation_names_every_key_and_the_schema_describes_it() -> None:
    schema, text = json_schema(), DOCS.read_text()
    tables = {"": schema, "run.": schema["$defs"]["Run"], "sparsify.": schema["$defs"]["Sparsify"]}
    tables |= {"tokenizer.": schema["$defs"]["Tokenizer"]}
    tables |= {"evolve.": schema["$defs"]["Evolve"], "evolve.score.": schema["$defs"]["Score"]}
    inner = ("ModelEntry", "SliceSource", "OutputSlice", "Module", "Token", "TokenOf", "Condition")
    tables |= {f"{name}'s ": schema["$defs"][name] for name in inner}
    children = ("run", "sparsify", "tokenizer", "evolve", "score")
    for prefix, table in tables.items():
        assert table["additionalProperties"] is False
        for key, described in table["properties"].items():
            assert f"`{prefix}{key}" in text or key in children or "'s " in prefix
            assert described["title"]
            assert described["description"]
    assert set(schema["properties"]) == set(MergeSpec.model_fields)
    assert schema["required"] == ["merge_method"]
    assert "2020-12" in schema["$schema"]


def test_json_is_accepted_with_tabs_and_surrogate_pairs() -> None:
    spec = parse_spec('{\n\t"merge_method": "linear",\t"models": [\n\t\t{"model":"\\ud83d\\ude00\\/x"}]}')
    assert (spec.models or ())[0].model == "\U0001f600/x"


@pytest.mark.parametrize("written", ["1e-5", "1E-5", "1.e-5", "+.1e-4", "0.00001", "'1e-5'"])
def test_exponents_are_numbers(written: str) -> None:
    value = of(parse_spec(MINIMAL + f"parameters: {{tol: {written}}}")).parameter("tol", "w")
    assert value == pytest.approx(1e-5)
    assert isinstance(value, float)


def test_booleans_are_those_of_yaml_1_1_and_dates_stay_text() -> None:
    spec = parse_spec(MINIMAL + "parameters: {a: yes, b: off, c: 'on'}\nrun: {output: 2024-01-31}")
    assert [of(spec).parameter(name, "w") for name in "abc"] == [True, False, "on"]
    assert spec.run.output == "2024-01-31"


def test_key_without_value_counts_as_not_given() -> None:
    text = MINIMAL + "run:\nseed:\nslices:\ndtype: null\nparameters: ~\nsparsify:\n"
    assert parse_spec(text).as_dict() == parse_spec(MINIMAL).as_dict()


@pytest.mark.parametrize(
    ("written", "dtype"),
    [("bf16", "bfloat16"), ("fp16", "float16"), ("f16", "float16"), ("fp32", "float32"), ("f32", "float32")]
    + [(name, name) for name in ("bfloat16", "float16", "float32")]
    + [("torch.bfloat16", "bfloat16")],
)
def test_dtypes_have_short_names(written: str, dtype: str) -> None:
    spec = parse_spec(MINIMAL + f"dtype: {written}\nout_dtype: {written}")
    assert (spec.dtype, spec.out_dtype) == (dtype, dtype)


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("512MiB", 512 << 20),
        ("1GiB", 1 << 30),
        ("2 gib", 2 << 30),
        ("0.1GiB", (1 << 30) // 10),
        ("5GB", 5 * 10**9),
        ("1.5GB", 1_500_000_000),
        ("3kB", 3000),
        ("7B", 7),
        ("1073741824", 1 << 30),
        (1 << 30, 1 << 30),
    ],
)
def test_sizes(written: str | int, size: int) -> None:
    assert parse_size(written) == size


@pytest.mark.parametrize(
    "written", ["1 GX", "1G", "GB", "", "-1GB", "0", 0, -1, True, 1.5, None, "1.5", "9" * 30, 2**63]
)
def test_other_sizes_are_refused(written: Any) -> None:
    with pytest.raises(ValueError, match="expected a size such as 512MiB, 1GiB or 5GB"):
        parse_size(written)


def test_anchors_and_merge_keys_are_expanded() -> None:
    spec = parse_spec(
        "x: &x {a: 1, b: 2}\n".replace("x: ", "parameters: ", 1)
        + MINIMAL.replace("A}", "A, parameters: {<<: *x, a: 3}}")
    )
    assert (spec.models or ())[0].parameters == {"a": 3, "b": 2}


def test_a_spec_knows_its_file(tmp_path: Path) -> None:
    file = tmp_path / "specs" / "merge.yaml"
    file.parent.mkdir()
    file.write_text(MINIMAL)
    spec = load_spec(file)
    assert spec.path == file
    assert spec.text == MINIMAL
    assert spec.directory == tmp_path / "specs"
    assert load_spec(yaml.safe_load(MINIMAL)).directory == Path()


def test_plus_and_at_signs_are_fine_in_the_path_of_a_model_that_exists(tmp_path: Path) -> None:
    (tmp_path / "A+B@c").mkdir()
    file = tmp_path / "merge.yaml"
    file.write_text(MINIMAL.replace("A", "A+B@c"))
    assert (load_spec(file).models or ())[0].model == "A+B@c"


def test_specs_are_immutable() -> None:
    spec = parse_spec(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        spec.seed = 1


def test_reading_a_spec_imports_no_torch() -> None:
    subprocess.run([sys.executable, "-c", "import sys, mergecore.spec; assert 'torch' not in sys.modules"], check=True)


# What parameters evaluate to

NUMBERS = st.floats(-1e6, 1e6) | st.integers(-1000, 1000)
PLACES = st.floats(0, 1)


@given(st.lists(NUMBERS, min_size=1, max_size=9), PLACES)
@ANY_SPEED
def test_gradient_of_numbers_is_the_sum_of_hat_functions(values: list[float], t: float) -> None:
    place = Fraction(t) * (len(values) - 1)
    exact = sum(Fraction(value) * max(Fraction(0), 1 - abs(place - i)) for i, value in enumerate(values))
    result = evaluate(values, "w", t)
    assert isinstance(result, float)
    assert abs(result - exact) <= 1e-12 * max(1.0, *(abs(value) for value in values))


@given(st.lists(NUMBERS, min_size=1, max_size=9), st.data())
@ANY_SPEED
def test_gradient_passes_through_its_numbers(values: list[float], data: st.DataObject) -> None:
    i = data.draw(st.integers(0, len(values) - 1))
    assert evaluate(values, "w", i / max(1, len(values) - 1)) == pytest.approx(values[i], rel=1e-9, abs=1e-6)


@given(st.lists(st.sampled_from(["a", "b", "c"]) | st.booleans(), min_size=1, max_size=9), PLACES)
@ANY_SPEED
def test_gradient_of_words_and_booleans_selects(values: list[str | bool], t: float) -> None:
    assert evaluate(values, "w", t) is values[int(t * (len(values) - 1))]


def test_first_filter_that_is_part_of_the_name_decides() -> None:
    setting = [{"filter": "mlp", "value": 1}, {"filter": "up", "value": 2}, {"filter": "attn", "value": []}]
    assert evaluate(setting, "layers.0.mlp.up_proj") == 1
    assert evaluate(setting, "layers.0.up_proj") == 2
    assert evaluate(setting, "layers.0.attn") is None
    assert evaluate(setting, "norm") is None
    for catch_all in ({"value": 3}, {"filter": None, "value": 3}, {"filter": "*", "value": 3}):
        assert evaluate([*setting, catch_all], "norm") == 3
        assert evaluate([*setting, catch_all], "layers.0.attn") is None
        assert evaluate(catch_all, "norm") == 3


def test_level_that_gives_nothing_falls_through() -> None:
    spec = load_spec(
        {
            "merge_method": "x",
            "models": [{"model": "A", "parameters": {"w": {"filter": "mlp", "value": [0, 1]}}}, {"model": "B"}],
            "parameters": {"w": [{"filter": "mlp", "value": 5}, {"filter": "attn", "value": 6}]},
        }
    )
    assert of(spec).parameter("w", "mlp", 0.25, 0) == 0.25
    assert of(spec).parameter("w", "mlp", 0.25, 1) == 5
    assert of(spec).parameter("w", "mlp", 0.25) == 5
    assert of(spec).parameter("w", "attn", 0.25, 0) == 6
    assert of(spec).parameter("w", "norm", 0.25, 0) is None
    assert of(spec).parameter("density", "mlp", 0.25, 0) is None


def test_validate_decides_what_a_gradient_is_made_of() -> None:
    assert evaluate(["1e-1", "3e-1"], "w", 0.5) == pytest.approx(0.2)
    assert evaluate(["1e-1", "3e-1"], "w", 0.5, validate=str) == "1e-1"
    assert evaluate([True, False], "w", 0.25, validate=float) == 0.75
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
        evaluate([1, 2], "w", 1.5)
