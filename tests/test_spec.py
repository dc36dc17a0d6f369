"""The spec reader: what it accepts, what it refuses and in which words, and that it never fails in any other way."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergecore.errors import SpecError
from mergecore.sizes import parse_size
from mergecore.spec import MergeSpec, Part, evaluate, json_schema, load_spec, parse_spec

MINIMAL = "merge_method: linear\nmodels: [{model: A}]\n"
DOCS = Path(__file__).parents[1] / "docs" / "spec.md"
FULL, FITTED, SLICED, *OTHERS = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)

ANY_SPEED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def refusal(text: str | bytes, name: str = "merge.yaml") -> str:
    """The message of the SpecError that the text leads to."""
    with pytest.raises(SpecError) as caught:
        parse_spec(text, name)
    assert caught.value.exit_code == 2
    return str(caught.value)


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


# What is refused, and in which words


MESSAGES = """
run: {memory: 1 GX}
    run.memory: found '1 GX', expected a size such as 512MiB, 1GiB or 5GB
run: {memory: 15MiB}
    run.memory: found '15MiB', expected at least 16MiB
run: {device: gpu}
    run.device: found 'gpu', expected auto, cpu, cuda, cuda:N or cuda:N+M (several); did you mean 'cpu'?
run: {device: 'cuda:-1'}
    run.device: found 'cuda:-1', expected auto, cpu, cuda, cuda:N or cuda:N+M (several); did you mean 'cuda'?
run: {threads: -1}
    run.threads: found -1, expected a whole number from 0 (all processors) to 4096
run: {output: ''}
    run.output: found '', expected text, neither empty nor with a NUL character
run: {output: 7}
    run.output: found 7, expected text; put it in quotes
run: {read: mmap}
    run.read: found 'mmap', expected map or pread; did you mean 'map'?
run: [1]
    run: found a list, expected a mapping such as {memory: 1GiB, device: auto}
seed: abc
    seed: found 'abc', expected a whole number from 0 to 2**64 - 1
seed: true
    seed: found true, expected a whole number from 0 to 2**64 - 1
seed: 1.5
    seed: found 1.5, expected a whole number from 0 to 2**64 - 1
seed: -1
    seed: found -1, expected a whole number from 0 to 2**64 - 1
seed: 0x10000000000000000
    seed: found 18446744073709551616, expected a whole number from 0 to 2**64 - 1
dtype: bflot16
    dtype: found 'bflot16', expected bfloat16, float16 or float32; did you mean 'bfloat16'?
dtype: float64
    dtype: found 'float64', expected bfloat16, float16 or float32; did you mean 'float16'?
on_nonfinite: ignore
    on_nonfinite: found 'ignore', expected error or warn
sparsify: dare
    sparsify: found 'dare', expected a mapping such as {method: dare, drop_rate: 0.1}
sparsify: {method: dare}
    sparsify: drop_rate is missing: dare needs it
sparsify: {method: magnitude, density: 0.5, drop_rate: 0.1}
    sparsify: drop_rate has no meaning for magnitude; expected density
orientation: {'*.wte': row}
    orientation['*.wte']: found 'row', expected rows or columns; did you mean 'rows'?
parameters: 3
    parameters: found 3, expected a mapping of parameters such as {weight: 0.5}
parameters: {w: }
    parameters.w: found nothing, expected a number, a word, true or false
parameters: {w: [1, [2]]}
    parameters.w[1]: found a list, expected a number, a word, true or false
parameters: {w: {value: {a: 1}}}
    parameters.w.value: found a mapping, expected a number, a word, true, false or a list of these
parameters: {w: {vlaue: 1, value: 1}}
    parameters.w.vlaue: unknown key; did you mean 'value'?
parameters: {w: [{filter: 5, value: 1}]}
    parameters.w[0].filter: found 5, expected a part of a tensor's name (text, in quotes if it looks like a number)
paramters: {}
    paramters: unknown key; did you mean 'parameters'?
memory: 1GiB
    memory: unknown key here; did you mean 'run.memory'?
base_model: 3
    base_model: found 3, expected the path of a model; put it in quotes
base_model: {path: A}
    base_model: found a mapping, expected a path, or {model: {path: /models/A}, lora: {path: /models/lora}}
base_model: {model: {path: A, revision: 3}}
    base_model: found 3, expected the revision's name; put it in quotes
slices: [{}]
    slices[0].sources: missing, expected a list of sources such as [{model: /models/A, layer_range: [0, 16]}]
slices: [{sources: [{model: A, layer_range: [2, 2]}]}]
    slices[0].sources[0].layer_range: found a list, expected [first layer, layer after the last] such as [0, 16]
slices: [{sources: [{model: A, layer_range: [0, 2], layer_rang: 2}]}]
    slices[0].sources[0].layer_rang: unknown key; did you mean 'layer_range'?
modules: {text_decoder: {parameters: {t: 1}}}
    modules.text_decoder: expected either models or slices
tokenizer: {source: union, tokens: {'<s>': {source: {kind: zerro}}}}
    tokenizer.tokens['<s>'].source.kind: found 'zerro', expected zero or model_token; did you mean 'zero'?
tokenizer: {tokens: {'<s>': {source: {kind: model_token, model: A}}}}
    tokenizer.tokens['<s>'].source: model_token needs model, and one of token and token_id
tokenizer: {pad_to_multiple_of: 0}
    tokenizer.pad_to_multiple_of: found 0, expected a whole number from 1
sparsify: {method: della, density: 0.9}
    sparsify: density 0.9 +- epsilon 0.15 must lie between 0 and 1
"""


@pytest.mark.parametrize(("added", "message"), re.findall(r"(\S.*)\n {4}(.*)\n", MESSAGES))
def test_message(added: str, message: str) -> None:
    assert refusal(MINIMAL + added) == f"merge.yaml:3: {message}"


@pytest.mark.parametrize("rate", ["1.0", "-0.1", "1", ".nan", "true", "'0.1'", "[0.1]"])
def test_drop_rates_outside_of_0_to_1_are_refused(rate: str) -> None:
    message = refusal(MINIMAL + f"sparsify: {{method: dare, drop_rate: {rate}}}")
    assert "merge.yaml:3: sparsify.drop_rate: found" in message
    assert "expected a number from 0 up to, but not including, 1" in message


@pytest.mark.parametrize("weight", [".nan", ".inf", "-.inf", "nan", "'-Infinity'", "1e999", "0x" + "f" * 400])
@pytest.mark.parametrize("place", ["{w: %s}", "{w: [0, %s]}", "{w: {value: %s}}", "{w: [{value: [%s]}]}"])
def test_weights_that_are_not_finite_are_refused(weight: str, place: str) -> None:
    message = refusal(MINIMAL + "parameters: " + place % weight)
    assert message.startswith("merge.yaml:3: parameters.w")
    assert message.endswith(", expected a finite number")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "merge.yaml: empty"),
        ("# nothing\n", "merge.yaml: empty"),
        ("- a", "merge.yaml:1: found a list, expected a mapping with the keys merge_method and models"),
        ("foo", "merge.yaml:1: found 'foo', expected a mapping with the keys merge_method and models"),
        (b"a: \xff", "merge.yaml:1: not UTF-8 text"),
        (MINIMAL.encode("utf-16"), "merge.yaml:1: not UTF-8 text"),
        ("a: \x01", "merge.yaml:1: not valid YAML: the character U+0001 is not allowed"),
        ("a: b: c", "merge.yaml:1: not valid YAML: mapping values are not allowed here"),
        ('a: "\\UFFFFFFFF"', "merge.yaml:1: not valid YAML"),
        ("a:\n\t- b", "merge.yaml:2: not valid YAML: found character '\\t' that cannot start any token"),
        ("a: *b", "merge.yaml:1: not valid YAML: found undefined alias 'b'"),
        ("#" * (1 << 20) + "\n", "merge.yaml: larger than 1 MiB, which no spec is"),
        ("a: " + "[" * 60 + "]" * 60, "merge.yaml:1: nested deeper than 50 levels"),
        ("\n" + "[a,\n" * 10**5, "merge.yaml:51: nested deeper than 50 levels"),
        ("a: [" + "1," * 10**5 + "]", "merge.yaml:1: more than 100000 values (those that aliases repeat included)"),
        (MINIMAL + "seed: !!python/name:os.abort x", "merge.yaml:3: seed: the tag !!python/name:os.abort is not"),
        (MINIMAL + "seed: !secret 1", "merge.yaml:3: seed: the tag !secret is not supported"),
        (MINIMAL + "seed: " + "9" * 5000, "merge.yaml:3: seed: cannot be read as a YAML int; put it in quotes"),
        (MINIMAL + "parameters: &a {w: *a}", "merge.yaml:3: parameters.w: an anchor that contains itself"),
        (MINIMAL + "parameters: &a\n  <<: *a", "merge.yaml:4: an anchor that contains itself"),
        (MINIMAL + "? [a]\n: 1", "merge.yaml:3: a key must be plain text"),
        (MINIMAL + "---\n" + MINIMAL, "merge.yaml:4: only one merge of a file may be without a name"),
        ("merge_method: x\nmodels: foo", "merge.yaml:2: models: found 'foo', expected a list of models such as"),
        ("merge_method: x\nmodels: []", "merge.yaml:2: models: found an empty list, expected a list of models such as"),
        ("merge_method: x\nslices: [1]", "merge.yaml:2: slices[0]: found 1, expected a mapping such"),
    ],
)  # fmt: skip
def test_refused_text(text: str | bytes, message: str) -> None:
    found = refusal(text)
    assert found.startswith(message)
    assert len(found.splitlines()) == 1


def test_aliases_that_double_at_every_level_are_refused_before_they_are_expanded() -> None:
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 40)]
    assert "more than 100000 values" in refusal("\n".join(["a0: &a0 [1]", *levels]))
    merges = [f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 40)]
    assert "more than 100000 values" in refusal("\n".join(["a0: &a0 {x: 1}", *merges]))


def test_second_of_two_equal_keys_names_the_line_of_the_first() -> None:
    text = "merge_method: linear\nseed: 1\nmodels:\n- model: A\n  model: B\nseed: 2\n"
    assert refusal(text).splitlines() == [
        "merge.yaml:5: models[0].model: given twice; the first is on line 4",
        "merge.yaml:6: seed: given twice; the first is on line 2",
    ]


def test_all_problems_are_told_in_the_order_of_their_lines() -> None:
    text = """\
base_modell: /base
models:
  - model: A
    paramaters: {weight: 1}
  - model: B
    parameters: {weight: .nan}
  - foo
seed: !!timestamp 2024-01-31
run:
  memory: 1 GX
  devise: cpu
dtype:
  bflot16
"""
    assert refusal(text).splitlines() == [
        "merge.yaml:1: merge_method: missing, expected a value such as widen",
        "merge.yaml:1: base_modell: unknown key; did you mean 'base_model'?",
        "merge.yaml:4: models[0].paramaters: unknown key; did you mean 'parameters'?",
        "merge.yaml:6: models[1].parameters.weight: found nan, expected a finite number",
        "merge.yaml:7: models[2]: found 'foo', expected a mapping such as {model: /models/A, parameters: {weight: 0.5}}",  # noqa: E501
        "merge.yaml:8: seed: the tag !!timestamp is not supported",
        "merge.yaml:10: run.memory: found '1 GX', expected a size such as 512MiB, 1GiB or 5GB",
        "merge.yaml:11: run.devise: unknown key; did you mean 'device'?",
        "merge.yaml:13: dtype: found 'bflot16', expected bfloat16, float16 or float32; did you mean 'bfloat16'?",
    ]


def test_more_than_a_hundred_problems_are_told_by_their_number() -> None:
    lines = refusal(MINIMAL + "".join(f"k{n}: 1\n" for n in range(2_000))).splitlines()
    assert len(lines) == 101
    assert lines[-1] == "... and 1900 more"


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(SpecError, match=re.escape(f"{path}: cannot be read: {reason}")):
            load_spec(path)
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec("a\0b")


def test_dict_is_refused_without_file_and_line() -> None:
    wrong: dict[Any, Any] = {"merge_method": b"x", "models": ({"model": "A", 3: 4},), "parameters": {1: 2}, "seeds": 1}
    with pytest.raises(SpecError) as caught:
        load_spec(wrong)
    assert set(str(caught.value).splitlines()) == {
        "merge_method: found an object of type bytes, expected text",
        "models[0]: keys must be text",
        "parameters: keys must be text",
        "seeds: unknown key; did you mean 'seed'?",
    }
    cyclic: dict[str, Any] = {"merge_method": "x", "models": []}
    cyclic["parameters"] = {"w": [cyclic]}
    with pytest.raises(SpecError, match=re.escape("parameters.w[0].merge_method: unknown key")):
        load_spec(cyclic)


def test_errors_found_later_have_the_same_form() -> None:
    spec = parse_spec(FULL, "merge.yaml")
    message = "unknown method 'wident'; did you mean 'widen'?"
    assert str(spec.error(message, "merge_method")) == f"merge.yaml:1: merge_method: {message}"
    weight = ("models", 1, "parameters", "weight")
    assert str(spec.error("too large", *weight, 1)) == "merge.yaml:7: models[1].parameters.weight[1]: too large"
    assert spec.line_of(*weight) == 7
    assert spec.line_of("models", 1) == 5
    assert spec.line_of("models", 1, "absent", "deeper") == 5
    assert spec.line_of("out_dtype") == 1
    built = load_spec(yaml.safe_load(FULL))
    assert built.line_of("merge_method") is None
    assert str(built.error(message, "merge_method")) == f"merge_method: {message}"


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


# Any spec, any text

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
