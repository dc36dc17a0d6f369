"""Scaled sums of models and their gradients by the coefficients, held against DAM's own equation and exact sums."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergecore import ops
from mergecore.features.columns import scaled_sum
from mergecore.ops import Axis
from tests import oracle
from tests.kernel_inputs import Inputs, at_odd_address, cuts, few, in_lanes, in_tiles, inputs, plain, threads, windows

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
DTYPES = (F32, F16, BF16, F64)


def gradient_of(made: Inputs, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Of at most 24 significant bits, which the exact oracle takes."""
    return torch.randn(made.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_column(made: Inputs, gradient: Tensor, cuts: Sequence[int] = ()) -> Tensor:
    sums, pending = torch.zeros(2, len(made.models), made.shape[1], dtype=F64).unbind()
    for first, last in windows(made.shape[0], cuts):
        part = made.rows(first, last)
        ops.column_gradient(gradient[first:last], part.base, part.models, sums, pending, first_row=first)
    return sums + pending


def by_row(made: Inputs, gradient: Tensor, cuts: Sequence[int] = ()) -> Tensor:
    sums = torch.full((len(made.models), made.shape[0]), torch.nan, dtype=F64)
    for first, last in windows(made.shape[0], cuts):
        part = made.rows(first, last)
        ops.row_gradient(gradient[first:last], part.base, part.models, sums, first_row=first)
    return sums


def turned(made: Inputs) -> Inputs:
    return Inputs(None if made.base is None else made.base.T, [model.T for model in made.models])


def assert_gradients(found: Tensor, made: Inputs, gradient: Tensor) -> None:
    """dL/dc_nj = sum_r dL/dW_rj (W_n - W_0)_rj, from exact sums."""
    outer, start = oracle.floats(gradient), made.start()
    for row, model in zip(found.tolist(), made.models, strict=True):
        ends = oracle.column_dots(outer, oracle.floats(model)), oracle.column_dots(outer, start)
        sizes = np.abs(outer * (oracle.floats(model) - start)).sum(axis=0)
        for value, of_model, of_base, size in zip(row, *ends, sizes.tolist(), strict=True):
            # 256 additions at most within a tile or lane, a few tiles or halvings; the delta is rounded itself.
            assert abs(Fraction(value) - (of_model - of_base)) <= 270 * Fraction(1, 2**53) * Fraction(size)


# Kernels ------------------------------------------------------------------------------------------


@few
@given(made=inputs(dropping=False), dtype=st.sampled_from(DTYPES), cuts=cuts)
def test_gradients_by_column_are_exact_up_to_float64_and_depend_on_no_window(
    made: Inputs, dtype: torch.dtype, cuts: list[int]
) -> None:
    gradient = gradient_of(made, dtype)
    whole = by_column(made, gradient)
    assert_gradients(whole, made, gradient)
    assert torch.equal(oracle.bits(whole), oracle.bits(by_column(made, gradient, cuts)))


@few
@given(made=inputs(dropping=False), dtype=st.sampled_from(DTYPES), cuts=cuts)
def test_gradients_by_row_are_those_by_column_of_the_transposed_tensor(
    made: Inputs, dtype: torch.dtype, cuts: list[int]
) -> None:
    gradient = gradient_of(made, dtype)
    whole = by_row(made, gradient)
    assert_gradients(whole, turned(made), gradient.T)
    assert torch.equal(oracle.bits(whole), oracle.bits(by_row(made, gradient, cuts)))


@few
@given(made=inputs(largest=3000, dropping=False), wide=st.sets(st.integers(0, 17)))
def test_float64_gives_the_bits_of_the_same_numbers_in_other_dtypes(made: Inputs, wide: set[int]) -> None:
    gradient = gradient_of(made, BF16)
    base = made.base.double() if made.base is not None and 0 in wide else made.base
    models = [model.double() if n + 1 in wide else model for n, model in enumerate(made.models)]
    for sums in (by_column, by_row):
        found = sums(Inputs(base, models), gradient.double() if 17 in wide else gradient)
        assert torch.equal(oracle.bits(found), oracle.bits(sums(made, gradient)))


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 900])
def test_rows_are_added_one_by_one_in_tiles_of_256_and_tiles_in_order(rows: int) -> None:
    made = plain(rows, rows, 5, F32, F32, BF16)
    gradient = gradient_of(made, F32)
    outer, start = oracle.floats(gradient), made.start()
    for found, model in zip(by_column(made, gradient), made.models, strict=True):
        delta = oracle.floats(model) - start
        for column, value in enumerate(found.tolist()):
            assert value == in_tiles(outer[:, column], delta[:, column])


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 2049])
def test_a_row_is_added_in_64_lanes_which_are_halved(columns: int) -> None:
    made = plain(columns, 2, columns, F32, F32, BF16)
    gradient = gradient_of(made, F32)
    outer, start = oracle.floats(gradient), made.start()
    for found, model in zip(by_row(made, gradient), made.models, strict=True):
        delta = oracle.floats(model) - start
        for row, value in enumerate(found.tolist()):
            assert value == in_lanes(outer[row], delta[row])


def test_threads_and_addresses_change_no_bit() -> None:
    made = plain(1, 257, 2049, BF16, F16, F32, BF16)
    assert made.base is not None
    gradient = gradient_of(made, F32)
    moved = Inputs(at_odd_address(made.base), [at_odd_address(model) for model in made.models])
    for sums in (by_column, by_row):
        with threads(1):
            wanted = sums(made, gradient)
        with threads(2):
            assert torch.equal(oracle.bits(sums(made, gradient)), oracle.bits(wanted))
        assert torch.equal(oracle.bits(sums(moved, at_odd_address(gradient))), oracle.bits(wanted))


def test_the_kernels_pass_opcheck() -> None:
    made = plain(0, 5, 7, F32, BF16, F16)
    gradient, sums, rows = gradient_of(made, F32), torch.zeros(2, 7, dtype=F64), torch.zeros(2, 9, dtype=F64)
    registered = torch.ops.mergecore
    for base in (made.base, None):
        columns = (gradient, base, made.models, sums, torch.zeros_like(sums), 3)
        torch.library.opcheck(registered.column_gradient.default, columns)
        torch.library.opcheck(registered.row_gradient.default, (gradient, base, made.models, rows, 3))


WINDOW = torch.zeros(4, 6, dtype=BF16)
SUMS = torch.zeros(1, 6, dtype=F64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient": WINDOW[:3]}, "the gradient must be contiguous and of the same shape as the others"),
        ({"gradient": WINDOW.view(6, 4).T}, "the gradient must be contiguous"),
        ({"gradient": WINDOW.long()}, "the gradient must be float32, float16, bfloat16 or float64"),
        ({"models": [WINDOW, WINDOW[:3]]}, "a model's window must be contiguous and of the same shape"),
        ({"first_row": -1}, "window positions must not be negative"),
        ({"sums": torch.zeros(2, 6, dtype=F64)}, "sums must be \\(models, "),
        ({"sums": torch.zeros(1, 3, dtype=F64)}, "sums must be \\(models, "),
        ({"sums": torch.zeros(6, dtype=F64)}, "sums must be \\(models, "),
        ({"sums": torch.zeros(1, 6)}, "sums must be contiguous float64"),
        ({"pending": torch.zeros(1, 5, dtype=F64)}, "pending must be \\(models, columns\\)"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"gradient": WINDOW, "base": WINDOW, "models": [WINDOW], "sums": SUMS}
    with pytest.raises(RuntimeError, match=message):
        ops.column_gradient(**{**arguments, "pending": SUMS.clone(), **change})
    if "pending" not in change:
        with pytest.raises(RuntimeError, match=message):
            ops.row_gradient(**{**arguments, **change})


# The differentiable function ----------------------------------------------------------------------


def coefficients_of(made: Inputs, axis: Axis) -> Tensor:
    width = {Axis.TENSOR: 1, Axis.COLUMNS: made.shape[1], Axis.ROWS: made.shape[0]}[axis]
    random = torch.Generator().manual_seed(3)
    return torch.randn(len(made.models), width, dtype=F64, generator=random, requires_grad=True)


def by_the_paper(made: Inputs, coefficients: Tensor, axis: Axis) -> oracle.Floats:
    """W = sum_i W_i diag(c_i1 .. c_iN) (DAM, section 3.2); with a base W_0 + sum_i (W_i - W_0) diag(c_i)."""
    start = made.start()
    total = start.copy()
    for model, numbers in zip(made.models, oracle.floats(coefficients), strict=True):
        delta = oracle.floats(model) - start
        if axis is Axis.ROWS:
            total += (delta.T @ np.diag(numbers)).T
        else:
            total += delta @ np.diag(np.broadcast_to(numbers, made.shape[1]))
    return total


@few
@given(
    made=inputs(largest=3000, dropping=False), axis=st.sampled_from(Axis), dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_the_sum_and_its_gradient_are_those_of_the_paper(
    made: Inputs, axis: Axis, dtype: torch.dtype, seed: int
) -> None:
    coefficients = coefficients_of(made, axis)
    weight = scaled_sum(coefficients, made.models, made.base, dtype=dtype, axis=axis)
    assert weight.dtype is dtype
    wanted, limits = by_the_paper(made, coefficients, axis), torch.finfo(dtype)
    noise = 1e-13 * sum(
        np.abs(c).max() * np.abs(oracle.floats(model) - made.start()).max()
        for c, model in zip(oracle.floats(coefficients), made.models, strict=True)
    )
    grid = limits.smallest_normal * limits.eps  # of subnormal numbers
    half = 0.5001 * limits.eps  # one rounding
    assert (np.abs(oracle.floats(weight) - wanted) <= half * np.abs(wanted) + grid + noise).all()

    # L = sum(W * outer) is linear in every coefficient: its derivative is L at 1 less L at 0.
    outer = gradient_of(made, dtype, seed)
    weight.backward(outer)
    assert coefficients.grad is not None
    zero = by_the_paper(made, torch.zeros_like(coefficients), axis)
    for n, i in {(0, 0), (coefficients.shape[0] - 1, coefficients.shape[1] - 1)}:
        one = torch.zeros_like(coefficients)
        one[n, i] = 1.0
        terms = oracle.floats(outer) * (by_the_paper(made, one, axis) - zero)
        assert coefficients.grad[n, i].item() == pytest.approx(terms.sum(), rel=0, abs=1e-12 * np.abs(terms).sum())


@pytest.mark.parametrize("axis", Axis)
@pytest.mark.parametrize("based", [False, True], ids=["sum", "deltas"])
def test_the_gradient_is_that_of_finite_differences(axis: Axis, based: bool) -> None:
    made = plain(4, 70, 6, F64, BF16, F64, F32, scale=1.0)
    base = made.base if based else None

    def loss(coefficients: Tensor) -> Tensor:
        weight = scaled_sum(coefficients, made.models, base, dtype=F64, axis=axis)
        return torch.tanh(weight).sum(0)

    assert torch.autograd.gradcheck(loss, (coefficients_of(made, axis),))


@pytest.mark.parametrize("axis", Axis)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_passes_opcheck(axis: Axis, dtype: torch.dtype) -> None:
    made = plain(0, 5, 7, F32, BF16, F16)
    for base in (made.base, None):
        arguments = (coefficients_of(made, axis), made.models, base, dtype, int(axis))
        torch.library.opcheck(torch.ops.mergecore.scaled_sum.default, arguments)
        gradient = (gradient_of(made, dtype), made.models, base, int(axis))
        torch.library.opcheck(torch.ops.mergecore.scaled_sum_gradient.default, gradient)


def test_a_layer_learns_the_coefficients_that_made_its_target() -> None:
    """Adam on the output of a linear layer finds the columns' coefficients again."""
    made = plain(5, 40, 12, F32, BF16, BF16, scale=1.0)
    wanted = torch.rand(2, 12, dtype=F64, generator=torch.Generator().manual_seed(1))
    x = torch.randn(64, 12, dtype=F64, generator=torch.Generator().manual_seed(2))
    target = x @ torch.from_numpy(by_the_paper(Inputs(None, made.models), wanted, Axis.COLUMNS)).T
    coefficients = torch.full((2, 12), 0.5, dtype=F64, requires_grad=True)
    optimizer = torch.optim.Adam([coefficients], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(x @ scaled_sum(coefficients, made.models, dtype=F64).T, target)
        loss.backward()
        optimizer.step()
    assert float((coefficients.detach() - wanted).abs().max()) < 1e-3


@pytest.mark.parametrize("axis", Axis)
def test_any_number_of_threads_gives_the_same_sum_and_gradient(axis: Axis) -> None:
    made = plain(6, 300, 2049, BF16, BF16, F32)
    results = []
    for count in (1, 2):
        with threads(count):
            coefficients = coefficients_of(made, axis)
            weight = scaled_sum(coefficients, made.models, made.base, axis=axis)
            weight.backward(gradient_of(made, F32))
            assert coefficients.grad is not None
            results.append((oracle.bits(weight), oracle.bits(coefficients.grad)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_gradient_that_is_not_contiguous_is_taken_as_it_is() -> None:
    made = plain(7, 9, 5, F32, F32, F32)
    one, two = (coefficients_of(made, Axis.COLUMNS) for _ in range(2))
    scaled_sum(one, made.models).sum().backward()  # an expanded 1
    scaled_sum(two, made.models).backward(torch.ones(5, 9).T)
    assert one.grad is not None
    assert two.grad is not None
    assert torch.equal(one.grad, two.grad)


def test_models_and_base_get_no_gradient() -> None:
    made = plain(8, 4, 3, F32, F32)
    model = made.models[0].requires_grad_()
    scaled_sum(coefficients_of(made, Axis.COLUMNS), [model], made.base).sum().backward()
    assert model.grad is None


def test_a_second_derivative_is_refused() -> None:
    made = plain(9, 4, 3, F32, F32)
    coefficients = coefficients_of(made, Axis.COLUMNS)
    loss = scaled_sum(coefficients, made.models).square().sum()
    (gradient,) = torch.autograd.grad(loss, coefficients, create_graph=True)
    with pytest.raises(RuntimeError, match="scaled_sum_gradient"):
        gradient.sum().backward()


@pytest.mark.parametrize("axis", Axis)
def test_coefficients_of_another_shape_are_refused(axis: Axis) -> None:
    made = plain(10, 4, 3, F32, F32, F32)
    for shape in ((2, 5), (1, 3), (6,)):
        with pytest.raises(ValueError, match=f"coefficients are .*{shape[0]}.*, but must be \\(2, [134]\\)"):
            scaled_sum(torch.zeros(shape, dtype=F64), made.models, axis=axis)


@pytest.mark.parametrize("models", [[], [torch.zeros(3)]], ids=["none", "a vector"])
def test_only_matrices_can_be_summed(models: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="one or more matrices"):
        scaled_sum(torch.zeros(1, 3, dtype=F64), models)
