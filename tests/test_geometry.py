"""Gram matrices and the methods that follow from them, against their definitions on whole tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import mergecore
from mergecore import merging, ops
from mergecore.errors import SpecError
from mergecore.planning import MergePlan, plan
from tests import oracle
from tests.kernel_inputs import Inputs, inputs, plain, threads, windows
from tests.models import write_model
from tests.test_methods import QWEN, checkpoints, merge, of, special

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (F32, F16, BF16)
Longs = np.ndarray[Any, Any]
"""Long doubles."""
Tensors = dict[str, Tensor]

few = settings(max_examples=30, deadline=None)


# Kernels ------------------------------------------------------------------------------------------


def gram(made: Inputs, cuts: Sequence[int] = (), first_entry: int = 0) -> Tensor:
    """The whole window's Gram matrix, read in windows of one column that are cut at these blocks."""
    flat = Inputs(
        None if made.base is None else made.base.reshape(-1, 1),
        [model.reshape(-1, 1) for model in made.models],
        made.drops,
    )
    sums = torch.zeros(ops.gram_count(len(made.models)), 1, dtype=torch.float64)
    for first, last in windows(flat.shape[0], [cut * ops.GRAM_BLOCK for cut in cuts]):
        part = flat.rows(first, last)
        ops.gram(sums, part.base, part.models, first_row=first, first_entry=first_entry, drops=part.drops)
    return sums


def row_gram(made: Inputs, cuts: Sequence[int] = (), first_entry: int = 0) -> Tensor:
    sums = torch.full((ops.gram_count(len(made.models)), made.shape[0]), math.nan, dtype=torch.float64)
    for first, last in windows(made.shape[0], cuts):
        part = made.rows(first, last)
        ops.row_gram(sums, part.base, part.models, first_row=first, first_entry=first_entry, drops=part.drops)
    return sums


def column_gram(made: Inputs, cuts: Sequence[int] = (), first_entry: int = 0) -> Tensor:
    sums = torch.zeros(ops.gram_count(len(made.models)), made.shape[1], dtype=torch.float64)
    pending = torch.zeros_like(sums)
    for first, last in windows(made.shape[0], cuts):
        part = made.rows(first, last)
        ops.column_gram(
            sums, pending, part.base, part.models, first_row=first, first_entry=first_entry, drops=part.drops
        )
    return sums + pending


KERNELS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "tensor": (gram, (0, 1)),
    "rows": (row_gram, (1,)),
    "columns": (column_gram, (0,)),
}


def vectors(made: Inputs, first_entry: int = 0) -> list[Longs]:
    """The base and the deltas as long doubles."""
    start = made.start().astype(np.longdouble)
    kept = made.kept(first_entry)
    deltas = [
        keep.astype(np.longdouble) * (oracle.floats(model).astype(np.longdouble) - start)
        for model, keep in zip(made.models, kept, strict=True)
    ]
    return [start, *deltas]


@pytest.mark.parametrize("kind", KERNELS)
@few
@given(made=inputs(), cuts=st.lists(st.integers(1, 200), max_size=4), first_entry=st.sampled_from([0, 5]))
def test_gram_matrices_are_exact_up_to_float64_and_depend_on_no_window(
    kind: str, made: Inputs, cuts: list[int], first_entry: int
) -> None:
    kernel, axes = KERNELS[kind]
    found = kernel(made, (), first_entry)
    pairs = list(itertools.combinations_with_replacement(vectors(made, first_entry), 2))
    assert len(pairs) == found.shape[0] == ops.gram_count(len(made.models))
    for row, (v, w) in zip(found.numpy(), pairs, strict=True):
        wanted = np.atleast_1d((v * w).sum(axis=axes))
        noise = np.atleast_1d(np.abs(v * w).sum(axis=axes)) * 2.0**-44  # 200 additions of rounded products
        assert (np.abs(row - wanted) <= noise).all()
    assert torch.equal(oracle.bits(found), oracle.bits(kernel(made, cuts, first_entry)))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", KERNELS)
def test_gram_matrices_depend_on_no_number_of_threads(kind: str, count: int) -> None:
    kernel, _ = KERNELS[kind]
    made = plain(3, 130, 1030, BF16, F16, F32)
    made = Inputs(made.base, made.models, (ops.Drop(5, 1 << 31, 2.0), ops.Drop(6, 0, 1.0)))
    with threads(1):
        expected = kernel(made)
    with threads(count):
        assert torch.equal(oracle.bits(kernel(made, [1, 7])), oracle.bits(expected))


def narrow(seed: int, rows: int, columns: int) -> Inputs:
    """bf16 entries between 1/8 and 1, so that products are exact and only the order of additions shows."""
    random = torch.Generator().manual_seed(seed)
    values = torch.rand(3, rows, columns, generator=random) * 0.875 + 0.125
    base, *models = (values * torch.randn(3, rows, columns, generator=random).sign()).bfloat16()
    return Inputs(base, models)


def test_a_whole_tensor_is_summed_in_blocks_of_4096_and_64_lanes() -> None:
    """The order that is documented: lanes in order, lanes by halving, blocks in order."""
    made = narrow(9, 3, 3001)
    found = gram(made)[:, 0].tolist()
    for value, (v, w) in zip(found, itertools.combinations_with_replacement(vectors(made), 2), strict=True):
        products = (v * w).astype(np.float64).ravel()  # exact
        total = 0.0
        for begin in range(0, products.size, 4096):
            block = products[begin : begin + 4096]
            lanes = np.zeros(64)
            for piece in np.split(block, range(64, block.size, 64)):
                lanes[: piece.size] += piece
            while lanes.size > 1:
                lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
            total += float(lanes[0])
        assert value == total


def test_the_gram_ops_pass_opcheck_and_refuse_what_does_not_fit() -> None:
    window = plain(0, 5, 7, F32, BF16, F16)
    registered = torch.ops.mergecore
    none: tuple[Any, ...] = ([], [], [])
    drops: tuple[Any, ...] = ([1, -2], [1 << 30, 1 << 31], [1.0, 2.0])
    flat, by_row = torch.zeros(6, 1, dtype=torch.float64), torch.zeros(6, 8, dtype=torch.float64)
    by_column, pending = torch.zeros(2, 6, 7, dtype=torch.float64).unbind()
    for base, dropping in ((window.base, none), (window.base, drops), (None, none)):
        torch.library.opcheck(registered.gram.default, (flat, base, window.models, 0, 9, *dropping))
        torch.library.opcheck(registered.row_gram.default, (by_row, base, window.models, 3, 9, *dropping))
        torch.library.opcheck(
            registered.column_gram.default, (by_column, pending, base, window.models, 3, 9, *dropping)
        )
    with pytest.raises(RuntimeError, match="must start at a multiple of 4096 entries"):
        ops.gram(flat, window.base, window.models, first_row=1)
    with pytest.raises(RuntimeError, match="as many columns as the tensor has rows"):
        ops.row_gram(by_row, window.base, window.models, first_row=4)
    with pytest.raises(RuntimeError, match="sums must be"):
        ops.gram(torch.zeros(5, 1, dtype=torch.float64), window.base, window.models)
    with pytest.raises(RuntimeError, match="pending must be"):
        ops.column_gram(by_column, by_row, window.base, window.models)


# Methods against their definitions ------------------------------------------------------------------


def length(v: Longs) -> Any:
    return np.sqrt((v * v).sum())


def cosine(v: Longs, w: Longs) -> Any:
    both = length(v) * length(w)
    return np.clip((v * w).sum() / both, -1, 1) if both > 0 else np.longdouble(0)


def along_arc(v: Longs, w: Longs, t: Any, linear_from: float) -> Longs:
    """Shoemake 1985: from v to w along the arc between them, or along the line if |cos| is large."""
    share = np.longdouble(t)
    angle = np.arccos(cosine(v, w))
    if abs(np.cos(angle)) > linear_from:
        return (1 - share) * v + share * w
    return (np.sin((1 - share) * angle) * v + np.sin(share * angle) * w) / np.sin(angle)


def slerp(v: Longs, w: Longs, t: float) -> Longs:
    return along_arc(v, w, t, 0.9995)


def nuslerp(vectors: Sequence[Longs], weights: Sequence[float]) -> Longs:
    t = 0.5 if abs(sum(weights)) < 1e-6 else np.longdouble(weights[1]) / sum(map(np.longdouble, weights))
    return along_arc(vectors[0], vectors[1], t, 1 - 1e-13)


def multislerp(vectors: Sequence[Longs], weights: Sequence[float], normalize: bool = True, eps: float = 1e-8) -> Longs:
    """To the tangent space at the unit vectors' weighted mean, there their weighted mean, and back."""
    if len(vectors) == 1:
        return vectors[0]
    shares = np.array(weights, np.longdouble)
    shares = shares / shares.sum() if normalize else shares
    norms = [length(v) for v in vectors]
    units = [v / (norm + eps) for v, norm in zip(vectors, norms, strict=True)]
    mean: Any = sum(share * unit for share, unit in zip(shares, units, strict=True))
    if length(mean) < eps:
        return sum(share * v for share, v in zip(shares, vectors, strict=True))
    mean = mean / length(mean)
    tangent: Any = sum(share * (unit - (unit * mean).sum() * mean) for share, unit in zip(shares, units, strict=True))
    far = length(tangent)
    there = mean * np.cos(far) + (tangent * np.sin(far) / far if far > 0 else 0)
    return there * sum(share * norm for share, norm in zip(shares, norms, strict=True))


def karcher(vectors: Sequence[Longs], max_iter: int = 10, tol: float = 1e-5) -> Longs:
    """Karcher's mean of the directions by steps along the mean of their logarithms; then the mean length."""
    norms = [length(v) for v in vectors]
    units = [v / norm for v, norm in zip(vectors, norms, strict=True) if norm > 0]
    if len(vectors) == 1 or not units:
        return vectors[0]
    mean: Any = sum(units) / np.longdouble(len(units))
    mean = units[0] if length(mean) < tol else mean / length(mean)
    for _ in range(max_iter):
        step = np.zeros_like(mean)
        for unit in units:
            dot = np.clip((unit * mean).sum(), -1, 1)
            angle = np.arccos(dot)
            if angle >= tol:
                step = step + angle / np.sin(angle) * (unit - dot * mean) / len(units)
        size = length(step)
        if size < tol:
            break
        mean = np.cos(size) * mean + np.sin(size) * step / size
        mean = mean / length(mean)
    return mean * sum(norms) / len(norms)


def model_stock(deltas: Sequence[Longs]) -> Longs:
    """Jang et al. 2024, section 4: t = N cos / (1 + (N-1) cos); the cosine is the mean over all pairs."""
    count = len(deltas)
    cos: Any = np.mean([cosine(v, w) for v, w in itertools.combinations(deltas, 2)])
    denominator = 1 + (count - 1) * cos
    t = 0 if cos <= 0 else count * cos / denominator
    total: Any = sum(deltas)
    return min(t, np.longdouble(1)) * total / np.longdouble(count)


def longs(tensor: Tensor) -> Longs:
    return oracle.floats(tensor).astype(np.longdouble)


def exact(rule: Callable[[list[Longs]], Longs], inputs: Sequence[Tensor], kind: str = "tensor") -> oracle.Exact:
    """The rule on whole tensors, or on each stored row or column of a matrix (of each expert's matrix)."""
    shape = inputs[0].shape
    stacked = [longs(tensor) for tensor in inputs]
    if kind == "tensor" or len(shape) < 2:
        parts = [[v.reshape(1, -1) for v in stacked]]
        kind = "rows"
    elif len(shape) == 3:
        parts = [list(expert) for expert in zip(*stacked, strict=True)]
    else:
        parts = [[v.reshape(shape[0], -1) for v in stacked]]
    done = []
    for part in parts:
        turned = part if kind == "rows" else [v.T for v in part]
        result = np.stack([rule(list(rows)) for rows in zip(*turned, strict=True)])
        done.append(result if kind == "rows" else result.T)
    largest = np.max([np.abs(v) for v in stacked], axis=0)
    # Coefficients are good to a few units of 2**-53, times the few that are added up.
    return oracle.Exact(np.stack(done).reshape(shape), 64 * largest)


def assert_right(found: Tensors, name: str, wanted: oracle.Exact) -> None:
    wrong = wanted.wrong(found[name])
    assert not wrong.any(), f"{name}: {wrong.sum()} of {wrong.size} entries are not the exact result rounded"
    assert float(wanted.ulps(found[name]).max(initial=0.0)) <= 1.0


def each_of(weights: Sequence[float]) -> list[dict[str, float]]:
    return [{"weight": weight} for weight in weights]


def far(models: Sequence[Tensors], seed: int) -> list[Tensors]:
    """Models whose directions differ much."""
    random = torch.Generator().manual_seed(seed)
    return [
        {name: (v.float() + 0.03 * torch.randn(v.shape, generator=random)).to(v.dtype) for name, v in model.items()}
        for model in models
    ]


@pytest.mark.parametrize("distant", [False, True])
@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0, 1.25])
def test_slerp_goes_along_the_arc_from_the_base_to_the_model(t: float, distant: bool) -> None:
    base, models = checkpoints(QWEN, 1, 21, [F32, F16])
    models = far(models, 22) if distant else models
    found = merge(base, models, merge_method="slerp", parameters={"t": t})
    for name in QWEN:
        assert_right(found, name, exact(lambda v: slerp(v[0], v[1], t), [base[name], models[0][name]]))


SHAPES = {
    "tensor": {},
    "rows": {"nuslerp_flatten": False},
    "columns": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
}


@pytest.mark.parametrize("distant", [False, True])
@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("kind", SHAPES)
def test_nuslerp_goes_along_the_arc_between_two_models_or_their_deltas(kind: str, based: bool, distant: bool) -> None:
    base, models = checkpoints(QWEN, 2, 23, [BF16, F32, BF16])
    models = far(models, 24) if distant else models
    weights = [0.6, 1.1]
    spec: dict[str, Any] = {"merge_method": "nuslerp", "parameters": SHAPES[kind], "each": each_of(weights)}
    found = merge(base if based else None, models, **spec)
    for name in QWEN:
        if based:
            wanted = exact(
                lambda v: v[0] + nuslerp([v[1] - v[0], v[2] - v[0]], weights), [base[name], *of(models, name)], kind
            )
        else:
            wanted = exact(lambda v: nuslerp(v, weights), of(models, name), kind)
        assert_right(found, name, wanted)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("distant", [False, True])
@pytest.mark.parametrize("based", [False, True])
def test_multislerp_is_the_mean_on_the_sphere(based: bool, distant: bool, count: int) -> None:
    base, models = checkpoints(QWEN, count, 25, [F16, F32, F16])
    models = far(models, 26) if distant else models
    weights = [0.6, 1.1, 0.2, 0.7, 2.0][:count]
    parameters: dict[str, Any]
    for parameters in ({}, {"normalize_weights": False, "eps": 1e-6}):
        spec: dict[str, Any] = {"merge_method": "multislerp", "parameters": parameters, "each": each_of(weights)}
        found = merge(base if based else None, models, **spec)
        more: Any = (parameters.get("normalize_weights", True), parameters.get("eps", 1e-8))
        for name in QWEN:
            if based:
                wanted = exact(
                    lambda v: v[0] + multislerp([x - v[0] for x in v[1:]], weights, *more),  # noqa: B023
                    [base[name], *of(models, name)],
                )
            else:
                wanted = exact(lambda v: multislerp(v, weights, *more), of(models, name))  # noqa: B023
            assert_right(found, name, wanted)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
@pytest.mark.parametrize("distant", [False, True])
def test_karcher_is_the_mean_of_the_directions(distant: bool, count: int) -> None:
    base, models = checkpoints(QWEN, count, 27, [F32, F32, F16])
    models = far(models, 28) if distant else models
    each: list[dict[str, Any]] = [{}, {"max_iter": 2, "tol": 1e-3}]
    for options in each:
        found = merge(None, models, merge_method="karcher", parameters=options)
        with_base = merge(base, models, merge_method="karcher", parameters=options)
        for name in QWEN:
            assert_right(found, name, exact(lambda v: karcher(v, **options), of(models, name)))  # noqa: B023
            everyone = [*of(models, name), base[name]]
            assert_right(with_base, name, exact(lambda v: karcher(v, **options), everyone))  # noqa: B023


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("kind", ["tensor", "rows"])
def test_model_stock_interpolates_by_the_mean_cosine_of_the_deltas(kind: str, count: int) -> None:
    base, models = checkpoints(QWEN, count, 29, [BF16, F32, F16])
    found = merge(base, models, merge_method="model_stock", parameters={"filter_wise": kind == "rows"})
    for name in QWEN:
        inputs = [base[name], *of(models, name)]
        assert_right(found, name, exact(lambda v: v[0] + model_stock([x - v[0] for x in v[1:]]), inputs, kind))


# Properties ---------------------------------------------------------------------------------------

SPECS: dict[str, dict[str, Any]] = {
    "slerp": {"merge_method": "slerp", "parameters": {"t": 0.4}},
    "nuslerp": {"merge_method": "nuslerp"},
    "nuslerp, rows": {"merge_method": "nuslerp", "parameters": SHAPES["rows"]},
    "nuslerp, columns": {"merge_method": "nuslerp", "parameters": SHAPES["columns"]},
    "multislerp": {"merge_method": "multislerp"},
    "karcher": {"merge_method": "karcher"},
    "model_stock": {"merge_method": "model_stock"},
    "model_stock, rows": {"merge_method": "model_stock", "parameters": {"filter_wise": True}},
}
BASELESS = ("nuslerp", "nuslerp, rows", "nuslerp, columns", "multislerp", "karcher")
CASES = [*((name, True) for name in SPECS), *((name, False) for name in BASELESS)]


def count_of(name: str) -> int:
    return {"slerp": 1, "nuslerp": 2}.get(name.split(",")[0], 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "based"), CASES)
def test_copies_of_one_model_give_it_bit_for_bit(name: str, based: bool, dtype: torch.dtype) -> None:
    base = {key: tensor.clone() for key, tensor in special(dtype).items()}
    found = merge(base if based else None, [base] * count_of(name), **SPECS[name])
    for key, tensor in base.items():
        assert torch.equal(oracle.bits(found[key]), oracle.bits(tensor)), key


@pytest.mark.parametrize("based", [True, False])
@pytest.mark.parametrize("name", ["multislerp", "karcher"])
def test_equal_models_are_their_mean_however_far_from_the_base(name: str, based: bool) -> None:
    base, models = checkpoints(QWEN, 1, 30, [BF16, BF16])
    found = merge(base if based and name != "karcher" else None, models * 3, **SPECS[name])
    for key in QWEN:
        assert torch.equal(found[key], models[0][key]), key


@pytest.mark.parametrize(("name", "based"), [case for case in CASES if case[0] != "slerp"])
def test_the_order_of_models_changes_no_bit(name: str, based: bool) -> None:
    """In bf16; weights are equal."""
    base, models = checkpoints(QWEN, count_of(name), 31, [BF16, F16, F32])
    orders = itertools.permutations(models)
    results = [merge(base if based else None, list(order), dtype="bfloat16", **SPECS[name]) for order in orders]
    for key in QWEN:
        for other in results[1:]:
            assert torch.equal(results[0][key], other[key]), key


@pytest.mark.parametrize("based", [True, False])
def test_one_model_is_its_own_mean(based: bool) -> None:
    base, models = checkpoints(QWEN, 1, 32, [F32, BF16])
    found = merge(base if based else None, models, merge_method="multislerp", each=each_of([0.3]), dtype="bfloat16")
    alone = merge(None, models, merge_method="karcher")
    for key in QWEN:
        assert torch.equal(found[key], models[0][key]), key
        assert torch.equal(alone[key], models[0][key]), key


@pytest.mark.parametrize(("name", "based"), CASES)
def test_zeros_opposites_and_parallels_give_finite_numbers(name: str, based: bool) -> None:
    count = count_of(name)
    values = torch.randn(6, 10, generator=torch.Generator().manual_seed(33))
    choices = [torch.zeros_like(values), values, -values, 2 * values, values * 1e-30, values * 1e30]
    cases = {
        f"model.layers.{n}.mlp.up_proj.weight": case
        for n, case in enumerate(itertools.product(choices, repeat=min(count, 2) + 1))
    }
    base = {key: case[0].clone() for key, case in cases.items()}
    models = [{key: case[1 + n % 2 % (len(case) - 1)].clone() for key, case in cases.items()} for n in range(count)]
    found = merge(base if based else None, models, **SPECS[name])
    for key, case in cases.items():
        assert bool(found[key].isfinite().all())
        assert float(found[key].abs().max()) <= 4 * max(float(v.abs().max()) for v in case)


def test_opposite_models_meet_on_the_line_between_them() -> None:
    """The arc between opposite vectors could go anywhere: the line is taken."""
    key = "model.layers.0.mlp.up_proj.weight"
    values = torch.randn(40, 50, generator=torch.Generator().manual_seed(34))
    base, models = {key: values}, [{key: values}, {key: -values}]
    specs: list[dict[str, Any]] = [
        {"merge_method": "nuslerp", "each": each_of([3.0, 1.0])},
        {"merge_method": "multislerp", "each": each_of([0.5, 0.5])},
    ]
    for spec in specs:
        found = merge(None, models, **spec)[key]
        assert torch.equal(found, values * (0.5 if spec["merge_method"] == "nuslerp" else 0.0))
    assert torch.equal(merge(base, models[1:], merge_method="slerp", parameters={"t": 0.25})[key], values * 0.5)


def test_model_stock_stays_between_base_and_mean_where_its_formula_diverges() -> None:
    """Three deltas at 120 degrees have a mean cosine of -1/2 = -1/(N-1), its pole."""
    key = "model.layers.0.mlp.up_proj.weight"
    for turn in (0.0, 1e-4, -1e-4, 1e-2):
        angles = [0.0, 2 * math.pi / 3 + turn, 4 * math.pi / 3]
        deltas = [torch.tensor([[math.cos(angle), math.sin(angle)]]) for angle in angles]
        base = torch.tensor([[0.5, 0.25]])
        found = merge({key: base}, [{key: base + d} for d in deltas], merge_method="model_stock")[key]
        assert torch.allclose(found, base, atol=1e-6)


@pytest.mark.parametrize(("name", "based"), [case for case in CASES if case[0] != "multislerp"])
def test_angles_do_not_depend_on_scale(name: str, based: bool) -> None:
    """Powers of two: the same bits, but for the exponent."""
    base, models = checkpoints(QWEN, count_of(name), 40, [F32, F32])
    scale = 2.0**-40
    small = [{key: v * scale for key, v in tensors.items()} for tensors in (base, *models)]
    found = merge(base if based else None, models, **SPECS[name])
    scaled = merge(small[0] if based else None, small[1:], **SPECS[name])
    for key in QWEN:
        assert torch.equal(found[key] * scale, scaled[key]), key


def test_slerp_takes_the_base_where_it_is_listed_too(tmp_path: Path) -> None:
    base, models = checkpoints(QWEN, 1, 35, [F32, F32])
    config = {"model_type": "qwen2", "tie_word_embeddings": False}
    paths = [str(write_model(tmp_path / name, tensors, config)) for name, tensors in (("a", base), ("b", models[0]))]
    outputs: list[Tensors] = []
    for listed in ([paths[1]], paths, paths[::-1]):
        entries = [{"model": path} for path in listed]
        spec = {"merge_method": "slerp", "base_model": paths[0], "models": entries, "parameters": {"t": 0.25}}
        mergecore.merge(mergecore.load_spec(spec), tmp_path / f"out{len(outputs)}", device="cpu")
        outputs.append(load_file(tmp_path / f"out{len(outputs)}" / "model.safetensors"))
    for other in outputs[1:]:
        assert all(torch.equal(outputs[0][name], other[name]) for name in QWEN)


@pytest.mark.parametrize(("name", "based"), CASES)
def test_windows_of_any_size_and_any_number_of_threads_give_the_same_bytes(
    name: str, based: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: Mapping[str, Any] = {**QWEN, "model.layers.0.mlp.gate_proj.weight": ((200, 130), "columns")}
    base, models = checkpoints(shapes, count_of(name), 36, [F32, F32, BF16])
    results = []
    for rows, count in ((1 << 20, 1), (1, 2), (3, 2), (70, 1)):

        def cut(*args: Any, rows: int = rows, **keys: Any) -> MergePlan:
            planned = plan(*args, **keys)
            step = {job.name: ops.GRAM_BLOCK if job.statistics.value == "Gram matrix" else 1 for job in planned.jobs}
            jobs = [replace(job, window_rows=rows * step[job.name], keep=rows == 3) for job in planned.jobs]
            return replace(planned, jobs=tuple(jobs))

        monkeypatch.setattr(merging, "plan", cut)
        with threads(count):
            results.append(merge(base if based else None, models, **SPECS[name]))
    for other in results[1:]:
        assert all(torch.equal(oracle.bits(results[0][key]), oracle.bits(other[key])) for key in shapes)


@pytest.mark.parametrize("name", SPECS)
def test_deltas_can_be_dropped_in_front_of_every_method(name: str) -> None:
    """DARE first, then the method on what is left: the same as merging models that were thinned before."""
    base, models = checkpoints(QWEN, count_of(name), 37, [F32, F32])
    dare = oracle.Dare("0.4", rescale=False, seed=3)
    thinned = [
        {
            key: torch.where(torch.from_numpy(dare.kept(tuple(v.shape), key, n)), v, base[key])
            for key, v in model.items()
        }
        for n, model in enumerate(models)
    ]
    everyone = [*thinned, base] if name == "karcher" else thinned  # a base without a weight takes part
    sparsify = {"method": "dare", "drop_rate": 0.4, "rescale": False}
    found = merge(base, models, **SPECS[name], sparsify=sparsify, seed=3)
    wanted = merge(None if name == "karcher" else base, everyone, **SPECS[name])
    for key in QWEN:
        assert torch.allclose(found[key], wanted[key], rtol=2e-7, atol=1e-9), key


def test_a_tensor_that_is_not_finite_becomes_nan_where_that_is_let_through() -> None:
    base, models = checkpoints(QWEN, 3, 38, [F32, F32])
    broken = "model.layers.0.mlp.down_proj.weight"
    models[0][broken][0, 0] = math.inf
    for name, based in CASES:
        if name.endswith(("rows", "columns")):
            continue
        chosen = models[: count_of(name)]
        found = merge(base if based else None, chosen, **SPECS[name], on_nonfinite="warn")
        assert bool(found[broken].isnan().all()), name
        assert all(bool(found[key].isfinite().all()) for key in QWEN if key != broken)


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "based", "spec", "message"),
    [
        (
            2,
            True,
            {"merge_method": "slerp", "parameters": {"t": 0.5}},
            r"slerp merges 1 model.* beside the base; found 2",
        ),
        (2, False, {"merge_method": "slerp", "parameters": {"t": 0.5}}, "slerp moves away from a base"),
        (1, True, {"merge_method": "slerp"}, "slerp needs t for"),
        (3, False, {"merge_method": "nuslerp"}, r"nuslerp merges 2 model.*; found 3"),
        (1, True, {"merge_method": "model_stock"}, r"model_stock merges at least 2 model.* beside the base; found 1"),
        (2, False, {"merge_method": "model_stock"}, "model_stock moves away from a base"),
        (2, False, {"merge_method": "multislerp", "each": each_of([1.0, -1.0])}, r"add up to 0; they cannot be normal"),
    ],
)
def test_what_does_not_fit_a_method_is_refused_before_anything_is_read(
    count: int, based: bool, spec: dict[str, Any], message: str
) -> None:
    base, models = checkpoints(QWEN, count, 39, [F32, F32])
    with pytest.raises(SpecError, match=message):
        merge(base if based else None, models, **dict(spec))
