"""docs/dialect.md names every key of a spec, and every test that it names is there; and what no other test shows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mergecore
from mergecore.spec import json_schema
from tests.models import llama, spec_dict, tensor_bytes, write_trio

ROOT = Path(__file__).parents[1]
DIALECT, PEERS = ROOT / "docs" / "dialect.md", ROOT / "docs" / "peers.md"
NAMES = r"`([^`]+)`"


def rows(page: Path) -> list[list[str]]:
    """The cells of every row of the page's tables, without heads and rules; `\\|` is no border."""
    lines = page.read_text().splitlines()
    tables = [line for line, below in zip(lines, [*lines[1:], ""], strict=True) if not below.startswith("|---")]
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in tables if line.startswith("|") and line[1] != "-"]


def documented(first: str) -> set[str]:
    """The names in the first cells of rows, those that begin with an option's dash or those that do not."""
    names = {name for cells in rows(DIALECT) for name in re.findall(NAMES, cells[0])}
    return {name for name in names if name.startswith("-") == (first == "-")}


def schema_keys() -> Iterator[str]:
    """Every key of the schema: `slices[].sources[].model`. A table that stands at several places is told once."""
    schema = json_schema()
    tables: list[tuple[str, Any]] = [("", schema)]
    seen = set()
    for place, table in tables:
        for key, value in table["properties"].items():
            yield f"{place}{key}"
            for suffix, name in references(value):
                if name not in seen:
                    seen.add(name)
                    tables.append((f"{place}{key}{suffix}.", schema["$defs"][name]))


def references(value: Any, suffix: str = "") -> Iterator[tuple[str, str]]:
    """The tables that a value may hold, and how they lie in it: `[]` in a list, `.NAME` in a mapping."""
    if not isinstance(value, dict):
        return
    if "$ref" in value:
        yield suffix, value["$ref"].rpartition("/")[2]
    for inner in value.get("anyOf", []):
        yield from references(inner, suffix)
    yield from references(value.get("items"), f"{suffix}[]")
    yield from references(value.get("additionalProperties"), f"{suffix}.NAME")


def test_every_key_of_a_spec_is_in_the_table() -> None:
    # A condition is reached through the parameters of a model first; its keys are told once, at the top.
    keys = {re.sub(r".*parameters\.NAME(\[\])?\.", "parameters.NAME[].", key) for key in schema_keys()}
    missing = keys - documented("")
    assert not missing
    unknown = {key for key in documented("") if key.partition(".")[0] != "model"} - keys
    assert not unknown


@pytest.mark.parametrize("page", [DIALECT, PEERS], ids=lambda page: page.name)
def test_every_test_that_a_page_names_is_there(page: Path) -> None:
    named = re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", page.read_text())
    assert named
    for file, test in named:
        path = ROOT / file
        assert path.is_file(), file
        assert f"def {test}(" in path.read_text() if test else True, f"{file}::{test}"


def test_every_row_names_a_test() -> None:
    assert [cells for cells in rows(DIALECT) if not re.search(r"`tests/[\w/]+\.py::\w+`", cells[-1])] == []


@pytest.mark.parametrize(
    ("sparsify", "parameters"),
    [
        ({"method": "magnitude", "density": 0.5}, {"density": 0.5, "gamma": 0.0}),
        ({"method": "breadcrumbs", "density": 0.5}, {"density": 0.5}),
        ({"method": "breadcrumbs", "density": 0.5, "gamma": 0.2}, {"density": 0.5, "gamma": 0.2}),
        ({"method": "breadcrumbs", "density": 0.5, "rescale": True}, {"density": 0.5, "rescale": True}),
    ],
)
def test_trimming_in_front_of_task_arithmetic_is_breadcrumbs(
    sparsify: dict[str, Any], parameters: dict[str, Any], tmp_path: Path
) -> None:
    base, *models = write_trio(tmp_path, llama(layers=1, dtype=torch.float32))
    inside = spec_dict("breadcrumbs", base, *models, parameters=parameters)
    in_front = spec_dict("task_arithmetic", base, *models, sparsify=sparsify)
    for name, spec in (("inside", inside), ("front", in_front)):
        mergecore.merge(mergecore.load_spec(spec), tmp_path / name, device="cpu")
    assert tensor_bytes(tmp_path / "inside") == tensor_bytes(tmp_path / "front")
