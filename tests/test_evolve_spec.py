"""The section evolve of a spec: where its parameters may stand; what is wrong is told before the first merge."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

import mergecore
from mergecore.cli import main
from mergecore.errors import SpecError
from mergecore.spec import filled, load_spec, parse_spec
from tests.searches import search_dict, write_search

DOCS = Path(__file__).parents[1] / "docs" / "spec.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and a scorer."""
    folder = tmp_path_factory.mktemp("search")
    write_search(folder)
    return folder


def test_the_example_of_the_documentation_can_be_filled_in() -> None:
    (text,) = (text for text in re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL) if "evolve:" in text)
    spec = parse_spec(text)
    assert spec.evolve is not None
    assert (spec.evolve.candidates, spec.evolve.generations, spec.evolve.sigma) == (8, 10, 0.3)
    made = filled(spec, dict.fromkeys(spec.evolve.parameters, 0.25))
    assert made.parameters == {"lambda": 0.25}
    assert [entry.parameters["weight"] for entry in made.models or ()] == [0.25, [0.5, 0.5, 0.25]]


def test_entries_of_gradients_and_of_filters_are_parameters_too(folder: Path) -> None:
    spec = search_dict(folder)
    spec["models"][0]["parameters"] = {"weight": [0.1, 0.2]}
    spec["parameters"] = {"lambda": [{"filter": "mlp", "value": 0.5}, {"value": "1"}]}
    spec["sparsify"] = {"method": "dare", "drop_rate": 0.1}
    values = {
        "models.0.parameters.weight.1": 0.9,
        "parameters.lambda.1.value": 0.7,
        "sparsify.drop_rate": 0.3,
        "models.1.parameters.weight": 0.6,
    }
    made = filled(load_spec(spec), values)
    assert made.evolve is None
    assert made.models is not None
    assert [entry.parameters["weight"] for entry in made.models] == [[0.1, 0.9], 0.6]
    assert made.parameters == {"lambda": [{"filter": "mlp", "value": 0.5}, {"value": 0.7}]}
    assert made.sparsify is not None
    assert made.sparsify.drop_rate == 0.3


TEXT = """\
merge_method: task_arithmetic
base_model: {folder}/models/base
models:
  - model: {folder}/models/near
    parameters: {{weight: [0.1, 0.5]}}
  - model: {folder}/models/far
parameters: {{lambda: 1}}
sparsify: {{method: dare, drop_rate: 0.1}}
evolve:
  parameters:
    parameters.lambda: [0.0, 2.0]
  score: {{command: "true {{model}}"}}
  generations: 2
"""
PATH = "parameters.lambda: [0.0, 2.0]"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (PATH, "parameters.lamda: [0, 1]", ":11: evolve.parameters['parameters.lamda']: at 0: task_arithmetic"),
        (PATH, "parameters.lambda: [2, 0]", ":11: evolve.parameters['parameters.lambda']: found [2, 0], expected"),
        (PATH, "parameters.lambda: [0, .nan]", "expected [lower bound, upper bound]"),
        (PATH, "parameters.lambda: 1", ":11: evolve.parameters['parameters.lambda']: found 1, expected [lower bound"),
        ("\n    parameters.lambda: [0.0, 2.0]", " {{}}", "found an empty mapping, expected at least one"),
        (PATH, "models.2.parameters.weight: [0, 1]", "models is a list: found '2', expected a number from 0 to 1"),
        (PATH, "models.00.parameters.weight: [0, 1]", "models is a list: found '00'"),
        (PATH, "models.-1.parameters.weight: [0, 1]", "models is a list: found '-1'"),
        (PATH, "models.0.parameters.weight: [0, 1]", "found a list there, expected a number"),
        (PATH, "models.0.parameters.weight.2: [0, 1]", "models.0.parameters.weight is a list: found '2'"),
        (PATH, "models.0.parameters.weight.1.x: [0, 1]", "weight.1 is 0.5, which has nothing below it"),
        (PATH, "model.0.parameters.weight: [0, 1]", "the spec has no 'model'; did you mean 'models'?"),
        (PATH, "parameters.: [0, 1]", "parameters has no ''"),
        (PATH, "parameters.weights: [0, 1]", "at 0: task_arithmetic has no such parameter; did you mean 'weight'?"),
        (PATH, "seed: [0, 1]", "not the place of a method parameter"),
        (PATH, "run.threads: [0, 1]", "not the place of a method parameter"),
        (PATH, "run.parameters.threads: [0, 1]", "the spec has no 'run'"),
        (PATH, "evolve.parameters.lambda: [0, 1]", "the spec has no 'evolve'"),
        (PATH, "sparsify.method: [0, 1]", "['sparsify.method']: found 'dare' there, expected a number"),
        (PATH, "sparsify.drop_rate: [0.5, 1.0]", ":11: evolve.parameters['sparsify.drop_rate']: at 1: found 1.0"),
        ("task_arithmetic", "task_arithmetik", "unknown method 'task_arithmetik'"),
        ("{{model}}", "model", "the command does not say where the model goes: write {model} in it"),
        ("true {{model}}", "nosuchprogram {{model}}", ":12: evolve.score.command: nosuchprogram is not a program"),
        ("true {{model}}", "./search.json {{model}}", "./search.json is not a program that can be run"),
        ("true {{model}}", "true '{{model}}", "evolve.score.command: cannot be split into words: No closing quotation"),
        ('command: "true {{model}}"', "text: [models]", "evolve.score.text[0]: "),
        ('command: "true {{model}}"', "text: nowhere.txt", ":12: evolve.score.text[0]: nowhere.txt does not exist"),
        ('command: "true {{model}}"', "text: []", "found an empty list, expected a list of text files"),
        ('command: "true {{model}}"', "", "expected one of text and command, found none"),
        ('command: "true {{model}}"', 'command: "true {{model}}", text: a', "found both"),
        ('command: "true {{model}}"', 'command: "true {{model}}", samples: 3', "samples has no meaning for command"),
        ('command: "true {{model}}"', "text: a, direction: maximise", "direction has no meaning for text"),
        ('command: "true {{model}}"', 'command: "true {{model}}", direction: up', "expected minimise or maximise"),
        ("generations: 2", "generation: 2", "evolve.generation: unknown key; did you mean 'generations'?"),
        ("generations: 2", "population: 4", "evolve.generations: missing, expected a value such as 10"),
        ("generations: 2", "generations: 2\n  population: 2", "found 2, expected a whole number from 3"),
        ("generations: 2", "generations: 1000000\n  population: 9", "are more than 1000000 merges"),
        ("generations: 2", "generations: 2\n  sigma: 0", "evolve.sigma: found 0, expected a number above 0"),
        ("generations: 2", "generations: 2\n  seed: -1", "evolve.seed: found -1, expected a whole number from 0"),
    ],
)  # fmt: skip
def test_a_wrong_section_is_told_with_its_line_before_the_first_merge(
    folder: Path, tmp_path: Path, old: str, new: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert old in TEXT
    (tmp_path / "spec.yaml").write_text(TEXT.replace(old, new, 1).format(folder=folder))
    for command in (["plan"], ["evolve", str(tmp_path / "out")]):
        assert main([command[0], str(tmp_path / "spec.yaml"), *command[1:]]) == 2
        shown = capsys.readouterr().err
        assert f"mergecore: {tmp_path}/spec.yaml:" in shown
        assert told in shown
    assert os.listdir(tmp_path) == ["spec.yaml"]


def test_a_whole_number_cannot_be_searched_for(folder: Path, tmp_path: Path) -> None:
    spec = search_dict(folder, parameters={"parameters.max_iter": [1, 10]})
    spec["merge_method"] = "karcher"
    del spec["base_model"]
    with pytest.raises(SpecError, match=r"evolve.parameters\['parameters.max_iter'\]: at 4.4.*expected a whole number"):
        mergecore.merge(load_spec(spec), tmp_path / "out")


def test_only_the_last_merge_of_a_file_can_search(folder: Path, tmp_path: Path) -> None:
    first = {**search_dict(folder), "name": "first"}
    second = {"merge_method": "linear", "models": [{"model": "first"}]}
    (tmp_path / "spec.yaml").write_text(f"{json.dumps(first)}\n---\n{json.dumps(second)}\n")
    with pytest.raises(SpecError, match="evolve: only the last merge of a file can search"):
        mergecore.merge(tmp_path / "spec.yaml", tmp_path / "out")


def test_a_spec_without_the_section_is_no_search(folder: Path, tmp_path: Path, capsys: Any) -> None:
    spec = search_dict(folder)
    del spec["evolve"]
    (tmp_path / "plain.json").write_text(json.dumps(spec))
    assert main(["evolve", str(tmp_path / "plain.json"), str(tmp_path / "out")]) == 2
    assert "has no section evolve" in capsys.readouterr().err


def test_the_plan_tells_how_many_merges_a_search_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder / "search.json")]) == 0
    assert "search    3 generations of 4 candidates; one merge is:" in capsys.readouterr().out
    assert main(["plan", str(folder / "search.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["candidates"] == 12
