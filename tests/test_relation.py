"""Models that have nothing to do with each other are told before they are merged."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mergecore
from mergecore import relation
from mergecore.planning import plan
from mergecore.spec import parse_spec
from tests.models import LLAMA, llama, moved, spec_dict, write_model


def strangers_of(tensors: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Weights of the same sizes that were drawn anew; norms stay near 1, as in every model."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: (0.05 * torch.randn(tensor.shape, generator=random) + float(tensor.ndim == 1)).to(tensor.dtype)
        for name, tensor in tensors.items()
    }


def permuted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same function with the features and neurons of every layer in another order."""
    random = torch.Generator().manual_seed(5)
    orders: dict[int, Tensor] = {}
    for tensor in tensors.values():
        for size in tensor.shape:
            orders.setdefault(size, torch.randperm(size, generator=random))
    found = {}
    for name, tensor in tensors.items():
        for axis, size in enumerate(tensor.shape):
            tensor = tensor.index_select(axis, orders[size])
        found[name] = tensor
    return found


BASE = llama(layers=3, hidden=64, vocabulary=90)
MODELS = {
    "base": BASE,
    "near": moved(BASE, 3e-4, 2),
    "far": moved(BASE, 0.05, 3),
    "stranger": strangers_of(BASE, 4),
    "permuted": permuted(BASE),
    "zeros": {name: torch.zeros_like(tensor) for name, tensor in BASE.items()},
    "nan": {name: torch.full_like(tensor, math.nan) for name, tensor in BASE.items()},
    "tiny": llama(layers=1, hidden=8, vocabulary=10),
    "other tiny": strangers_of(llama(layers=1, hidden=8, vocabulary=10), 6),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, tensors in MODELS.items():
        write_model(folder / name, tensors, LLAMA)
    return folder


def warnings(folder: Path, method: str, base: str | None, *models: str, **keys: Any) -> list[str]:
    paths = [folder / model for model in models]
    spec = spec_dict(method, None if base is None else folder / base, *paths, **keys)
    return relation.unrelated(plan(parse_spec(json.dumps(spec))))


@pytest.mark.parametrize("stranger", ["stranger", "permuted"])
def test_a_model_that_has_nothing_to_do_with_the_base_is_named_with_its_cosine(folder: Path, stranger: str) -> None:
    (warning,) = warnings(folder, "task_arithmetic", "base", "near", stranger)
    assert f"{folder / stranger} is no closer to {folder / 'base'} than chance: the median cosine of 8" in warning
    assert abs(float(warning.split("matrices is ")[1].split()[0])) < 0.05


def test_models_that_moved_as_far_as_they_are_long_are_still_related(folder: Path) -> None:
    assert warnings(folder, "task_arithmetic", "base", "near", "far") == []


def test_without_a_base_the_first_model_is_compared(folder: Path) -> None:
    found = warnings(folder, "linear", None, "near", "far", "stranger", parameters={"weight": 1})
    assert [warning.split(" is no closer to ")[0] for warning in found] == [str(folder / "stranger")]
    assert warnings(folder, "linear", None, "far", "near", parameters={"weight": 1}) == []


@pytest.mark.parametrize("silent", ["zeros", "nan"])
def test_zeros_and_nan_have_no_direction(folder: Path, silent: str) -> None:
    assert warnings(folder, "task_arithmetic", "base", silent) == []
    assert warnings(folder, "task_arithmetic", silent, "base") == []


def test_models_too_small_to_tell_are_not_judged(folder: Path) -> None:
    assert warnings(folder, "task_arithmetic", "tiny", "other tiny") == []


def test_little_is_read_however_large_the_models_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    pread = os.pread

    def counted(fd: int, size: int, at: int) -> bytes:
        read.append(size)
        return pread(fd, size, at)

    planned = plan(parse_spec(json.dumps(spec_dict("task_arithmetic", *(folder / m for m in ("base", "near", "far"))))))
    monkeypatch.setattr("mergecore.relation.os.pread", counted)
    relation.unrelated(planned)
    per_model = relation.MATRICES * relation.SEGMENTS * relation.ENTRIES * 2
    assert 0 < sum(read) <= 3 * per_model
    read.clear()
    monkeypatch.setattr(relation, "READ_BYTES", per_model)
    relation.unrelated(planned)
    assert 0 < sum(read) <= per_model


def test_the_merge_goes_on_and_its_result_and_manifest_carry_the_warning(folder: Path, tmp_path: Path) -> None:
    spec = parse_spec(json.dumps(spec_dict("task_arithmetic", folder / "base", folder / "stranger")))
    result = mergecore.merge(spec, tmp_path / "out", device="cpu")
    (warning,) = [warning for warning in result.warnings if "than chance" in warning]
    assert warning in (tmp_path / "out" / "mergecore_manifest.json").read_text()


def test_a_file_that_is_cut_or_gone_is_the_merge_s_to_tell(folder: Path, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", BASE, LLAMA)
    planned = plan(parse_spec(json.dumps(spec_dict("task_arithmetic", base, folder / "stranger"))))
    with (base / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert relation.unrelated(planned) == []
    (base / "model.safetensors").unlink()
    assert relation.unrelated(planned) == []
