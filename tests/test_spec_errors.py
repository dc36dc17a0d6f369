"""What the spec reader refuses, and in which words and with which lines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergecore.errors import SpecError
from mergecore.spec import load_spec, parse_spec
from tests.specs import FULL, MINIMAL, refusal

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
