"""What holds for every registered method: identity on copies of the base, order, any number of models, any windows.

A method that is added is tested here without a word; what it computes is held against its definition elsewhere.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mergecore
from mergecore import merging, topsets
from mergecore.methods import METHODS
from mergecore.methods.base import Method, Statistics
from mergecore.planning import MergePlan
from tests import oracle
from tests.models import LLAMA, load_tensors, write_model
from tests.statistics import random_statistics
from tests.test_methods import special

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
REQUIRED = {"t": 0.4}
RANDOM = {"dare_linear", "dare_ties", "della", "della_linear"}
"""Numbers are drawn for each model's place in the list."""
ORDERED = {"nuslerp"}
"""From the first model to the second."""
LAPACK = {"tsv", "iso_c", "regmean"}
"""Last bits of a decomposition depend on the order of its input."""
SHRINKS = {
    "density": 0.5, "select_topk": 0.5, "scope": "model", "k": 1,
}  # fmt: skip
"""Parameters that bring the interesting part of a method into play."""

DATA_FREE = [method for method in METHODS.values() if method.statistics is not Statistics.FITTED]
"""The others run models on texts, which random tensors of odd shapes are not: tests/test_slta.py and its like."""

Tensors = dict[str, Tensor]
every = pytest.mark.parametrize("method", DATA_FREE, ids=[method.name for method in DATA_FREE])


def given(method: Method, **more: Any) -> dict[str, Any]:
    """Parameters that the method has: those that it must have, and `more` as far as it knows them."""
    wanted = {**{name: value for name, value in REQUIRED.items() if method.name != "widen"}, **more}
    return {name: value for name, value in wanted.items() if method.parameter(name) is not None}


def counts(method: Method, *wanted: int) -> list[int]:
    """Of these numbers of models those that the method merges; at least one."""
    most = method.most or 64
    return sorted({max(method.least, min(most, count)) for count in wanted})


def model(shape_seed: int, dtype: torch.dtype) -> Tensors:
    """Odd shapes; a row, a column and a tensor of zeros; a convolution, fused experts, a scalar, nothing."""
    random = torch.Generator().manual_seed(shape_seed)

    def weight(*shape: int) -> Tensor:
        return (0.05 * torch.randn(shape, generator=random)).to(dtype)

    tensors = {
        "model.embed_tokens.weight": weight(37, 12),
        "model.layers.0.mlp.up_proj.weight": weight(19, 12),
        "model.layers.0.mlp.experts.gate_up_proj": weight(3, 10, 7),
        "model.layers.1.conv.weight": weight(6, 3, 2, 2),
        "model.layers.1.input_layernorm.weight": 1 + weight(12),
        "model.layers.1.untouched.weight": weight(5, 5),
        "model.scale": torch.tensor(0.5, dtype=dtype),
        "model.nothing.weight": torch.zeros(0, 4, dtype=dtype),
        "lm_head.weight": weight(37, 12),
    }
    tensors["model.layers.0.mlp.up_proj.weight"][3] = 0
    tensors["model.layers.0.mlp.up_proj.weight"][:, 5] = 0
    return tensors


def changed(base: Tensors, number: int, dtype: torch.dtype) -> Tensors:
    """Deltas large and small, of zeros in places; one tensor as in the base."""
    random = torch.Generator().manual_seed(100 + number)
    found = {}
    for name, tensor in base.items():
        delta = (4e-3, 3e-4, 3e-5)[number % 3] * torch.randn(tensor.shape, generator=random)
        if tensor.dim() > 1:
            delta[..., -1] = 0
        found[name] = (tensor.float() + (0 if "untouched" in name else 1) * delta).to(dtype)
    return found


def merge(method: Method, base: Tensors, models: Sequence[Tensors], parameters: dict[str, Any], **keys: Any) -> Tensors:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        entries = [{"model": str(write_model(folder / str(n), each, LLAMA))} for n, each in enumerate(models)]
        for n, entry in enumerate(entries if method.gathered is not None else ()):
            assert method.gathered is not None
            own = random_statistics(folder / f"statistics-{n}", Path(entry["model"]), method.gathered)
            entry["statistics"] = str(own)
        spec = {"merge_method": method.name, "models": entries, "parameters": parameters, **keys}
        if method.deltas:
            spec["base_model"] = str(write_model(folder / "base", base, LLAMA))
        mergecore.merge(mergecore.load_spec(spec), folder / "out", device="cpu")
        return load_tensors(folder / "out")


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(oracle.bits(found[name]), oracle.bits(tensor)), name


@every
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_copies_of_the_base_give_the_base_bit_for_bit(method: Method, dtype: torch.dtype) -> None:
    """Zeros of both signs, subnormals and the largest numbers included."""
    base = special(dtype)
    for count in counts(method, 1, 3, 16):
        assert_equal(merge(method, base, [base] * count, given(method)), base)
        # Where something is kept by lot or by rank, nothing is left of no difference.
        assert_equal(merge(method, base, [base] * count, given(method, density=0.5, select_topk=0.5)), base)


@every
@pytest.mark.parametrize("out", ["float32", "bfloat16"])
def test_any_number_of_models_of_any_dtypes_is_merged(method: Method, out: str) -> None:
    base = model(1, F32)
    dtypes = itertools.cycle([BF16, F32, F16, torch.float64])
    for count in counts(method, 1, 2, 16):
        models = [changed(base, n, next(dtypes)) for n in range(count)]
        merged = merge(method, base, models, given(method, **SHRINKS), dtype=out)
        assert merged.keys() == base.keys()
        for name, tensor in merged.items():
            assert tensor.isfinite().all(), name
            assert tensor.dtype == getattr(torch, out)
            assert tensor.shape == base[name].shape


@pytest.mark.parametrize("method", [each for each in DATA_FREE if each.name not in RANDOM | ORDERED])
def test_the_order_of_models_does_not_matter(method: Method) -> None:
    base = model(2, F32)
    (count,) = counts(method, 3)
    models = [changed(base, n, F32) for n in range(count)]
    first, *others = [
        merge(method, base, list(order), given(method, **SHRINKS), dtype="bfloat16")
        for order in itertools.permutations(models)
    ]
    for other in others:
        for name, tensor in first.items():
            if method.name in LAPACK:
                assert torch.allclose(tensor.float(), other[name].float(), rtol=2**-7, atol=1e-6), name
            else:
                assert torch.equal(oracle.bits(tensor), oracle.bits(other[name])), name


@every
@pytest.mark.parametrize("threads", [1, 2])
def test_any_windows_and_threads_give_the_same_bytes(
    method: Method, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = model(3, BF16)
    models = [changed(base, n, (BF16, F32)[n % 2]) for n in range(counts(method, 3)[-1])]
    parameters = given(method, **SHRINKS)
    whole = merge(method, base, models, parameters)

    def small(*arguments: Any, **options: Any) -> MergePlan:
        planned = mergecore.plan(*arguments, **options)
        jobs = [replace(job, window_rows=min(max(1, job.rows), job.block_rows), keep=False) for job in planned.jobs]
        return replace(planned, jobs=tuple(jobs))

    monkeypatch.setattr(merging, "plan", small)
    monkeypatch.setattr(topsets, "ROOM", 4)
    for read in ("map", "pread"):
        assert_equal(merge(method, base, models, parameters, run={"threads": threads, "read": read}), whole)


@pytest.mark.parametrize("sparsify", [
    {"method": "dare", "drop_rate": 0.3},
    {"method": "magnitude", "density": 0.5, "rescale": True},
    {"method": "breadcrumbs", "density": 0.6},
    {"method": "della", "density": 0.6, "epsilon": 0.2},
], ids=lambda sparsify: sparsify["method"])  # fmt: skip
@pytest.mark.parametrize("method", [each for each in DATA_FREE if each.deltas], ids=lambda each: each.name)
def test_any_thinning_stands_in_front_of_any_method(method: Method, sparsify: dict[str, Any]) -> None:
    """What is dropped is gone: with all differences in few entries, the others stay the base's."""
    base = model(4, F32)
    models = [changed(base, n, F32) for n in range(counts(method, 2)[-1])]
    plain = merge(method, base, models, given(method))
    found = merge(method, base, models, given(method), sparsify=sparsify)
    again = merge(method, base, models, given(method), sparsify=sparsify)
    assert_equal(found, again)
    assert any(bool((found[name] != plain[name]).any()) for name in base)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert_equal({"x": found["model.layers.1.untouched.weight"]}, {"x": base["model.layers.1.untouched.weight"]})
