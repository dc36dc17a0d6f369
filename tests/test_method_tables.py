"""The tables of methods in README.md and docs/methods.md say what METHODS and plans say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import mergecore
from mergecore.jobs import TensorJob
from mergecore.methods import METHODS
from mergecore.methods.base import Method, Parameter, Statistics
from tests.models import LLAMA, llama, moved, write_model
from tests.test_dialect import NAMES, ROOT, rows

NAME = "model.layers.0.mlp.up_proj.weight"
WORDS = {
    Statistics.NONE: "",
    Statistics.COLUMNS: "moments per column",
    Statistics.GRAM: "Gram matrix",
    Statistics.SQUARES: "mean squares",
    Statistics.SHARED: "counts of shared deltas",
    Statistics.DELTAS: "the deltas of a matrix",
    Statistics.SUM: "the sum of the deltas of a matrix",
    Statistics.FITTED: "a fit on samples of text",
}
README = {name: cells for cells in rows(ROOT / "README.md") for name in re.findall(NAMES, cells[0]) if len(cells) == 5}
PAGE = {name: cells for cells in rows(ROOT / "docs" / "methods.md") for name in re.findall(NAMES, cells[0])}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and three models, bfloat16."""
    folder, base = tmp_path_factory.mktemp("models"), llama(layers=1)
    return [write_model(folder / str(n), moved(base, 1e-3, n), LLAMA) for n in range(4)]


def planned(method: Method, models: list[Path], count: int, *, based: bool) -> TensorJob:
    """What is done to a linear layer of `count` models by a method that has something to select."""
    wanted = {"t": 0.5, "density": 0.5, "select_topk": 0.5}
    spec: dict[str, Any] = {"merge_method": method.name, "models": [{"model": str(m)} for m in models[1 : 1 + count]]}
    spec["parameters"] = {name: value for name, value in wanted.items() if method.parameter(name) is not None}
    if based:
        spec["base_model"] = str(models[0])
    if method.statistics is Statistics.FITTED:
        samples = models[0] / "samples.txt"
        samples.write_text("A text.\n")
        for entry in spec["models"]:
            entry["data"] = str(samples)
    return next(job for job in mergecore.plan(mergecore.load_spec(spec)).jobs if job.name == NAME)


def variants(method: Method) -> list[tuple[int, bool]]:
    """Numbers of models, and whether there is a base, that a method takes."""
    counts = [n for n in (1, 2, 3) if method.least <= n <= (method.most or 3)]
    based = [True, False] if method.base_optional else [method.deltas]
    return [(n, with_base) for n in counts for with_base in based]


def reads(text: str, count: int) -> int:
    """`2 (N + 1)`, `N` and the like."""
    match = re.fullmatch(r"(?:(\d+) )?\(?N( \+ 1)?\)?", text.strip())
    assert match is not None, text
    return int(match[1] or 1) * (count + (match[2] is not None))


def test_every_method_is_in_both_tables() -> None:
    assert set(README) - {"merge_method"} == set(PAGE) - {"merge_method"} == set(METHODS)


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_readme_says_what_plans_say(method: Method, models: list[Path]) -> None:
    _, statistics, read, base, number = (cell.strip() for cell in README[method.name])
    for count, based in variants(method):
        if method.name == "tsv" and count == 1:
            continue  # all triplets of a single model are kept: nothing is decomposed
        job = planned(method, models, count, based=based)
        with_base = ", with a base "
        formula = read.split(with_base)[based] if with_base in read else read
        assert job.bytes_to_read == reads(formula, count) * torch.Size(job.shape).numel() * 2
        ordered = "order statistics" if job.choosing_reads else ""
        assert statistics == (", ".join(filter(None, (ordered, WORDS[job.statistics]))) or "-")
    assert base == ("optional" if method.base_optional else "yes" if method.deltas else "no")
    least, most = method.least, method.most
    assert number == (str(most) if least == most else f"{least} or more")
    assert least == most or most is None


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_the_page_of_methods_has_every_parameter_with_its_default(method: Method, models: list[Path]) -> None:
    _, _, parameters, _, read, base, number = (cell.strip() for cell in PAGE[method.name])
    assert re.findall(NAMES, parameters) == [parameter.name for parameter in method.parameters]
    for parameter in method.parameters:
        assert f"`{parameter.name}`{default(parameter)}" in parameters
    count, based = variants(method)[-1]
    assert read.split(" ")[0] == str(planned(method, models, count, based=based).passes)
    assert [base, number] == [cell.strip() for cell in README[method.name][3:]]


def default(parameter: Parameter) -> str:
    """As the table writes it; of parameters without one, that there may be words of its own."""
    if parameter.default is None:
        return " (" if parameter.optional else ""
    if isinstance(parameter.default, bool):
        return f" ({str(parameter.default).lower()})"
    if isinstance(parameter.default, str):
        return f" ({parameter.default})"
    return f" ({parameter.default:g})".replace("e-0", "e-")
