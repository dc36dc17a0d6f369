"""tsv and iso_c, held against their definitions in NumPy and against what they must do by their mathematics."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mergecore
from mergecore import estimate
from mergecore.errors import NonFiniteError, SpecError
from mergecore.methods import METHODS
from mergecore.methods.base import Dense, TensorView
from tests import oracle
from tests.models import write_model
from tests.test_methods import BF16, F16, F32, QWEN, assert_right, checkpoints, merge, of, special

few = settings(max_examples=30, deadline=None)
SPECTRAL = ("tsv", "iso_c")
Matrix = oracle.Floats


# The definitions, in NumPy ------------------------------------------------------------------------


def polar(matrix: Matrix) -> Matrix:
    """All singular values 1, but for those that say that vectors agree in half of the digits of float64."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    reached = s > 2.0**-26 * s[0]
    return np.asarray(u[:, reached] @ vt[reached])


def tsv(deltas: Sequence[Matrix]) -> Matrix:
    """The top 1/N of each delta's triplets, U and V each replaced by the nearest orthogonal matrix."""
    us, ss, vts = [], [], []
    for delta in deltas:
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        kept = min(max(1, s.size // len(deltas)), int((s > 1e-13 * s[0]).sum()))
        us.append(u[:, :kept])
        ss.append(s[:kept])
        vts.append(vt[:kept])
    if sum(s.size for s in ss) == 0:
        return np.zeros_like(deltas[0])
    return polar(np.concatenate(us, axis=1)) @ np.diag(np.concatenate(ss)) @ polar(np.concatenate(vts))


def iso_c(deltas: Sequence[Matrix]) -> Matrix:
    """The sum of the deltas, every singular value that is not 0 replaced by the mean of all."""
    total: Matrix = np.sum(deltas, axis=0)
    u, s, vt = np.linalg.svd(total, full_matrices=False)
    kept = s > 1e-13 * s[0]
    return np.asarray(s.mean() * u[:, kept] @ vt[kept])


DEFINITIONS = {"tsv": tsv, "iso_c": iso_c}


def matrices(values: Matrix, layout: oracle.Layout) -> list[Matrix]:
    """A tensor as the matrices that are decomposed: experts apart, a convolution as out x rest."""
    return list(values) if layout == "experts" else [values.reshape(values.shape[0], -1)]


def exact(base: Tensor, deltas: Sequence[Matrix], method: str, scale: float, layout: oracle.Layout | None) -> Any:
    """W0 + scale * delta; `layout` None: a tensor that is not decomposed."""
    start = oracle.floats(base)
    if layout is None:
        merged = np.sum(deltas, axis=0) / len(deltas)
    else:
        apart = zip(*(matrices(delta, layout) for delta in deltas), strict=True)
        merged = np.stack([DEFINITIONS[method](each) for each in apart]).reshape(start.shape)
    values = start.astype(np.longdouble) + scale * merged
    # What rounding does to singular vectors goes by the largest entries, not by each.
    largest = np.abs(deltas).max(initial=0.0) * len(deltas)
    return oracle.Exact(values, np.abs(start) + np.ldexp(np.longdouble(largest), 24))


def decomposed(name: str, layout: oracle.Layout) -> oracle.Layout | None:
    return None if layout == "vector" or "embed_tokens" in name or name == "lm_head.weight" else layout


# Whole merges -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 16])
@pytest.mark.parametrize("method", SPECTRAL)
def test_whole_merges_are_the_definitions(method: str, count: int) -> None:
    base, models = checkpoints(QWEN, count, 1, [BF16, F32, F16, BF16])
    weights = [(1.0, 0.5, -0.75)[n % 3] for n in range(count)]
    found = merge(
        base,
        models,
        merge_method=method,
        each=[{"weight": weight} for weight in weights],
        parameters={"lambda": 0.8},
        dtype="float32",
    )
    for name, (shape, layout) in QWEN.items():
        assert found[name].shape == shape
        deltas = [
            weight * (oracle.floats(model) - oracle.floats(base[name]))
            for weight, model in zip(weights, of(models, name), strict=True)
        ]
        assert_right(found[name], exact(base[name], deltas, method, 0.8, decomposed(name, layout)), name)


@pytest.mark.parametrize("method", SPECTRAL)
def test_what_is_dropped_in_front_is_not_decomposed(method: str) -> None:
    base, models = checkpoints(QWEN, 2, 2, [F32, F32])
    sparsify = {"method": "magnitude", "density": 0.5}
    thin = [merge(base, [model], merge_method="task_arithmetic", sparsify=sparsify) for model in models]
    found = merge(base, models, merge_method=method, sparsify=sparsify)
    other = merge(base, thin, merge_method=method)
    for name in QWEN:
        assert torch.allclose(found[name], other[name], rtol=0, atol=1e-7), name


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("method", SPECTRAL)
def test_copies_of_the_base_give_the_base_bit_for_bit(method: str, count: int, dtype: torch.dtype) -> None:
    base = special(dtype)
    found = merge(base, [base] * count, merge_method=method)
    for name, tensor in base.items():
        assert torch.equal(oracle.bits(found[name]), oracle.bits(tensor)), name


@pytest.mark.parametrize("method", SPECTRAL)
def test_the_order_of_models_does_not_matter(method: str) -> None:
    base, models = checkpoints(QWEN, 3, 3, [BF16, BF16, F16, F32])
    first, *others = (
        merge(base, [models[n] for n in order], merge_method=method, dtype="float32")
        for order in ((0, 1, 2), (1, 2, 0), (2, 1, 0))
    )
    for name in QWEN:
        for other in others:
            assert torch.allclose(first[name], other[name], rtol=2.0**-23, atol=1e-12), name


def test_tsv_of_one_model_is_task_arithmetic_bit_for_bit() -> None:
    base, models = checkpoints(QWEN, 1, 4, [BF16, F32])
    parameters = {"weight": 0.7, "lambda": 0.9}
    one = merge(base, models, merge_method="tsv", parameters=parameters)
    other = merge(base, models, merge_method="task_arithmetic", parameters=parameters)
    for name in QWEN:
        assert torch.equal(one[name], other[name]), name


# One matrix ---------------------------------------------------------------------------------------


def merged(method: str, deltas: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """What a method makes of deltas (models, rows, columns)."""
    weights = weights or [1.0] * len(deltas)
    parameters = {"weight": tuple(weights), "lambda": 1.0}
    if method == "iso_c":
        deltas = torch.stack([weight * delta for weight, delta in zip(weights, deltas, strict=True)]).sum(
            0, keepdim=True
        )
    view = TensorView(len(weights), False, parameters, is_linear=True, deltas=deltas)
    found = METHODS[method].coefficients(view)
    assert isinstance(found, Dense)
    return found.delta


@st.composite
def some_deltas(draw: st.DrawFn) -> Tensor:
    """Deltas with zero rows and columns, of low rank, or of models that are equal."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    count = draw(st.sampled_from([2, 3, 5, 16]))
    rows, columns = draw(st.sampled_from([(1, 1), (1, 7), (6, 1), (5, 5), (12, 31), (40, 9), (33, 34)]))
    deltas = torch.randn(count, rows, columns, generator=random, dtype=torch.float64) * 1e-3
    kind = draw(st.sampled_from(["any", "zero rows", "low rank", "equal models", "a copy of the base"]))
    if kind == "zero rows":
        deltas[:, :: draw(st.integers(2, 4))] = 0
        deltas[..., -1] = 0
    elif kind == "low rank":
        rank = draw(st.integers(1, 3))
        deltas = deltas[:, :, :rank] @ torch.randn(count, min(rank, columns), columns, generator=random).double()
    elif kind == "equal models":
        deltas[1] = deltas[0]
    elif kind == "a copy of the base":
        deltas[0] = 0
    return deltas


def assert_near(found: Tensor, expected: Matrix, deltas: Tensor) -> None:
    limit = 1e-7 * float(deltas.abs().max()) * len(deltas)
    assert np.abs(found.numpy() - expected).max() <= limit


@few
@given(some_deltas())
@pytest.mark.parametrize("method", SPECTRAL)
def test_any_matrix_is_merged_by_the_definition(method: str, deltas: Tensor) -> None:
    assert_near(merged(method, deltas), DEFINITIONS[method](list(deltas.numpy())), deltas)


@few
@given(some_deltas())
@pytest.mark.parametrize("method", SPECTRAL)
def test_rows_and_columns_that_no_model_changed_stay(method: str, deltas: Tensor) -> None:
    found = merged(method, deltas)
    assert not found[(deltas == 0).all(dim=2).all(dim=0)].any()
    assert not found[:, (deltas == 0).all(dim=1).all(dim=0)].any()


@few
@given(some_deltas())
def test_iso_c_leaves_equal_singular_values(deltas: Tensor) -> None:
    before = torch.linalg.svdvals(deltas.sum(dim=0))
    after = torch.linalg.svdvals(merged("iso_c", deltas))
    rank = int((before > 1e-13 * before[0]).sum())
    assert torch.allclose(after[:rank], before.mean().expand(rank), rtol=1e-9)
    assert float(after[rank:].sum()) <= 1e-9 * float(before.mean())


def test_tsv_puts_orthogonal_models_side_by_side() -> None:
    """Models that change rows and columns of their own do not disturb one another."""
    deltas = torch.zeros(2, 12, 12, dtype=torch.float64)
    random = torch.Generator().manual_seed(1)
    deltas[0, :6, :6] = torch.randn(6, 6, generator=random)
    deltas[1, 6:, 6:] = torch.randn(6, 6, generator=random)
    assert torch.allclose(merged("tsv", deltas), deltas.sum(dim=0), atol=1e-13)


def test_tsv_counts_what_models_share_once() -> None:
    """Two equal models, weighted or not, give the top half of their delta, at the mean of the weights."""
    delta = torch.randn(20, 30, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    half = (u[:, :10] * s[:10]) @ vt[:10]
    assert torch.allclose(merged("tsv", torch.stack([delta, delta])), half, atol=1e-12)
    weighted = merged("tsv", torch.stack([delta, delta]), [0.3, 0.9])
    assert torch.allclose(weighted, 0.6 * half, atol=1e-12)


@pytest.mark.parametrize("method", SPECTRAL)
def test_models_that_equal_the_base_move_nothing(method: str) -> None:
    assert not merged(method, torch.zeros(3, 8, 9, dtype=torch.float64)).any()


def test_the_estimate_counts_decompositions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that ticks once per look: one decomposition takes a second, and the time goes by size and number."""
    tensors = {
        "model.layers.0.mlp.up_proj.weight": torch.zeros(768, 1536, dtype=BF16),
        "model.norm.weight": torch.ones(4),
    }
    folders = [str(write_model(tmp_path / name, tensors)) for name in ("base", "a", "b")]

    def estimated(method: str) -> float:
        spec = {"merge_method": method, "base_model": folders[0], "models": [{"model": each} for each in folders[1:]]}
        ticks = itertools.count()
        monkeypatch.setattr(estimate, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
        return estimate.seconds(mergecore.plan(mergecore.load_spec(spec)))

    once = 768 * 1536 * 768 / estimate.SIDE**3
    assert estimated("iso_c") - estimated("task_arithmetic") == pytest.approx(once)
    assert estimated("tsv") - estimated("task_arithmetic") == pytest.approx(2 * once)


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SPECTRAL)
def test_a_matrix_that_does_not_fit_the_memory_is_named_before_anything_is_read(method: str, tmp_path: Path) -> None:
    tensors = {"model.layers.0.mlp.up_proj.weight": torch.zeros(900, 1100, dtype=BF16)}
    folders = [str(write_model(tmp_path / name, tensors)) for name in ("base", "a", "b")]
    spec = {
        "merge_method": method,
        "base_model": folders[0],
        "models": [{"model": folder} for folder in folders[1:]],
        "run": {"memory": "32MiB"},
    }
    message = r"up_proj\.weight \[900, 1100\] needs \d+\.\d MiB for its statistics .* raise run\.memory"
    with pytest.raises(SpecError, match=message):
        mergecore.plan(mergecore.load_spec(spec))


@pytest.mark.parametrize("method", SPECTRAL)
def test_inputs_that_are_not_finite_are_named_or_spoil_their_matrix_alone(method: str) -> None:
    base, models = checkpoints(QWEN, 2, 5, [F32, F32])
    clean = merge(base, models, merge_method=method)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    models[1][name][1, 2, 3] = math.nan
    with pytest.raises(NonFiniteError, match=r"gate_up_proj holds NaN or Inf in .*\(1 entries\)"):
        merge(base, models, merge_method=method)
    found = merge(base, models, merge_method=method, on_nonfinite="warn")
    assert not found[name][1].isfinite().any()
    assert torch.equal(found[name][::2], clean[name][::2])
    for other in QWEN:
        assert other == name or torch.equal(found[other], clean[other]), other
