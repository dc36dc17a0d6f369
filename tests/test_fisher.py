"""fisher, held against its definition in NumPy and against what it must do by its mathematics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mergecore
from mergecore import merging as merging_module
from mergecore.errors import CheckpointError, Interrupted, NonFiniteError, SpecError
from mergecore.methods.base import Gathered
from tests import oracle
from tests.models import LLAMA, load_tensors, tensor_bytes, write_model
from tests.statistics import random_statistics, write_statistics
from tests.test_every_method import changed, model
from tests.vocabularies import save, words

Tensors = dict[str, Tensor]
UP = "model.layers.0.mlp.up_proj.weight"
COUNT = 3
MODELS = [changed(model(5, torch.float32), n, dtype) for n, dtype in enumerate((torch.bfloat16, torch.float32) * 2)][
    :COUNT
]
"""Vectors, a scalar, matrices, a convolution, fused experts, an empty tensor."""


def information(seed: int) -> Tensors:
    """What the diagonal of a Fisher information may look like: from nothing to much, and zeros."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in MODELS[0].items():
        size = torch.randn(tensor.shape, generator=random)
        found[name] = size.square() * 10.0 ** -(4 + 3 * torch.rand(tensor.shape, generator=random))
        found[name] *= torch.rand(tensor.shape, generator=random) > 0.2
    return found


INFORMATION = [information(n) for n in range(COUNT)]


class Merging:
    """Models with their statistics, and their merge."""

    def __init__(self, folder: Path, models: Sequence[Tensors] = MODELS) -> None:
        self.folder = folder
        self.paths = [write_model(folder / f"model-{n}", each, LLAMA) for n, each in enumerate(models)]
        self.entries: list[dict[str, Any]] = [{"model": str(path)} for path in self.paths]

    def given(self, statistics: Sequence[Mapping[str, Tensor]]) -> Merging:
        for n, (entry, path, each) in enumerate(zip(self.entries, self.paths, statistics, strict=True)):
            named = {f"fisher.{name}": tensor for name, tensor in each.items()}
            entry["statistics"] = str(write_statistics(self.folder / f"statistics-{n}", path, named))
        return self

    def spec(self, **keys: Any) -> dict[str, Any]:
        return {"merge_method": "fisher", "models": self.entries, "dtype": "float32", **keys}

    def merge(self, name: str = "out", **keys: Any) -> Tensors:
        mergecore.merge(mergecore.load_spec(self.spec(**keys)), self.folder / name, device="cpu")
        return load_tensors(self.folder / name)


def expected(name: str, weights: Sequence[float], epsilon: float) -> Any:
    """sum w F W / sum w F with F of epsilon at least; where there is no F at all, sum w W / sum w."""
    values = np.stack([oracle.floats(each[name]).astype(np.longdouble) for each in MODELS])
    shares = np.stack([np.maximum(oracle.floats(each[name]), epsilon).astype(np.longdouble) for each in INFORMATION])
    by_model = np.array(weights, np.longdouble).reshape(-1, *[1] * (values.ndim - 1))
    shares *= by_model
    unknown = shares.sum(axis=0) == 0
    shares = np.where(unknown, by_model, shares)
    return (shares * values).sum(axis=0) / shares.sum(axis=0)


@pytest.mark.parametrize(("parameters", "weights", "epsilon"), [
    ({}, (1, 1, 1), 1e-6),
    ({"weight": 2.0, "epsilon": 0.0}, (1, 1, 1), 0.0),
    ({"weight": [0.5, 0.0, 2.0], "epsilon": 1e-3}, (0.5, 0.0, 2.0), 1e-3),
])  # fmt: skip
def test_every_entry_is_weighted_by_its_information(
    parameters: dict[str, Any], weights: Sequence[float], epsilon: float, tmp_path: Path
) -> None:
    merging = Merging(tmp_path).given(INFORMATION)
    own = parameters.pop("weight", None)
    for n, entry in enumerate(merging.entries if own is not None else ()):
        entry["parameters"] = {"weight": own[n] if isinstance(own, list) else own}
    found = merging.merge(parameters=parameters)
    assert found.keys() == MODELS[0].keys()
    for name, tensor in found.items():
        exact = expected(name, weights, epsilon)
        np.testing.assert_allclose(tensor.double().numpy(), exact.astype(float), rtol=2.0**-23, atol=1e-12)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 0.25, 2.0)])
def test_equal_information_gives_the_average_bit_for_bit(weights: Sequence[float], tmp_path: Path) -> None:
    merging = Merging(tmp_path).given([INFORMATION[0]] * COUNT)
    for entry, weight in zip(merging.entries, weights, strict=True):
        entry["parameters"] = {"weight": weight}
    found = merging.merge(dtype="bfloat16")
    average = merging.merge("average", merge_method="linear", dtype="bfloat16")
    for name, tensor in average.items():
        assert torch.equal(oracle.bits(found[name]), oracle.bits(tensor)), name


@pytest.mark.parametrize("only", range(COUNT))
def test_a_model_that_alone_has_information_is_the_result(only: int, tmp_path: Path) -> None:
    models = [{name: tensor.bfloat16() for name, tensor in each.items()} for each in MODELS]
    statistics = [
        {name: torch.full(tensor.shape, 3e-7 if n == only else 0.0) for name, tensor in MODELS[0].items()}
        for n in range(COUNT)
    ]
    merging = Merging(tmp_path, models).given(statistics)
    found = merging.merge(parameters={"epsilon": 0}, dtype="bfloat16")
    for name, tensor in models[only].items():
        assert torch.equal(oracle.bits(found[name]), oracle.bits(tensor)), name


def test_tensors_without_statistics_are_averaged_and_told(tmp_path: Path) -> None:
    merging = Merging(tmp_path).given([{UP: each[UP]} for each in INFORMATION])
    found, average = merging.merge(), merging.merge("average", merge_method="linear")
    assert {name for name, tensor in found.items() if not torch.equal(tensor, average[name])} == {UP}
    told = [text for text in mergecore.plan(mergecore.load_spec(merging.spec())).warnings if "averaged, for" in text]
    assert len(told) == 1
    assert "model.scale" in told[0]
    assert UP not in told[0]


def test_embeddings_in_another_vocabulary_are_averaged(tmp_path: Path) -> None:
    """Rows of the statistics are those of the model's own tokens."""
    merging = Merging(tmp_path)
    for n, path in enumerate(merging.paths):
        save(path, words(*(f"w{(row + 5 * n) % 37}" for row in range(37))))
    merging.given(INFORMATION)
    found = merging.merge(tokenizer_source="base")
    average = merging.merge("average", tokenizer_source="base", merge_method="linear")
    same = {name for name, tensor in found.items() if torch.equal(tensor, average[name])}
    assert same >= {"model.embed_tokens.weight", "lm_head.weight"}
    assert UP not in same


def test_windows_and_interruptions_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merging = Merging(tmp_path).given(INFORMATION)
    merging.merge()
    whole = tensor_bytes(tmp_path / "out")
    plan = mergecore.plan

    def small(*arguments: Any, **options: Any) -> Any:
        planned = plan(*arguments, **options)
        jobs = tuple(replace(job, window_rows=50) for job in planned.jobs)
        return replace(planned, jobs=jobs)

    monkeypatch.setattr(merging_module, "plan", small)
    spec, seen = mergecore.load_spec(merging.spec()), []

    def stop() -> bool:
        seen.append(0)
        return len(seen) > 9

    with pytest.raises(Interrupted):
        mergecore.merge(spec, tmp_path / "again", device="cpu", should_stop=stop)
    assert mergecore.merge(spec, tmp_path / "again", device="cpu", resume=True).resumed
    assert tensor_bytes(tmp_path / "again") == whole


def test_plans_count_the_statistics(tmp_path: Path) -> None:
    planned = mergecore.plan(mergecore.load_spec(Merging(tmp_path).given(INFORMATION).spec()))
    job = next(job for job in planned.jobs if job.name == UP)
    assert job.passes == 1
    assert job.bytes_to_read == 19 * 12 * (2 + 4 + 2 + 3 * 4)


@pytest.mark.parametrize(("weights", "epsilon", "message"), [
    ((1, -1, 1), 0, "expected none below 0"),
    ((0, 0, 0), 0, "expected none below 0, and one above"),
    ((1, 1, 1), -1e-6, "expected 0 or more"),
])  # fmt: skip
def test_wrong_parameters_are_refused(weights: Sequence[float], epsilon: float, message: str, tmp_path: Path) -> None:
    merging = Merging(tmp_path).given(INFORMATION)
    for entry, weight in zip(merging.entries, weights, strict=True):
        entry["parameters"] = {"weight": weight}
    with pytest.raises(SpecError, match=message):
        merging.merge(parameters={"epsilon": epsilon})


def test_gram_matrices_alone_are_refused(tmp_path: Path) -> None:
    merging = Merging(tmp_path).given(INFORMATION)
    merging.entries[1]["statistics"] = str(
        random_statistics(tmp_path / "grams", merging.paths[1], Gathered.INPUTS),
    )
    with pytest.raises(CheckpointError, match=r"models\[1\].statistics: .*no tensors fisher\.\*.*--kind fisher"):
        merging.merge()


def test_information_of_another_shape_is_refused(tmp_path: Path) -> None:
    merging = Merging(tmp_path).given([INFORMATION[0], INFORMATION[1] | {UP: torch.ones(12, 19)}, INFORMATION[2]])
    with pytest.raises(CheckpointError, match=rf"fisher.{UP} is F32 \[12, 19\], expected F32 or F64 \[19, 12\]"):
        merging.merge()


def test_nan_in_statistics_is_told_with_its_file(tmp_path: Path) -> None:
    broken = INFORMATION[1] | {UP: INFORMATION[1][UP].clone()}
    broken[UP][3, 4] = float("nan")
    merging = Merging(tmp_path).given([INFORMATION[0], broken, INFORMATION[2]])
    with pytest.raises(NonFiniteError, match=rf"{UP} holds NaN or Inf in .*statistics-1/model.safetensors \(1 entr"):
        merging.merge()
