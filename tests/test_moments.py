"""Moments of columns and rows, held against exact sums and against the documented order of additions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from mergecore import ops
from tests import oracle
from tests.kernel_inputs import (
    BF16,
    F16,
    F32,
    Inputs,
    at_odd_address,
    cuts,
    few,
    in_lanes,
    in_tiles,
    inputs,
    plain,
    threads,
)


def large() -> Inputs:
    """Large enough for several threads."""
    drops = (ops.Drop(3, 1 << 31, 2.0), ops.Drop(4, 0, 1.0), ops.Drop(2**64 - 1, 1 << 30, 4 / 3))
    made = plain(1, 257, 2049, BF16, F16, F32, BF16)
    return Inputs(made.base, made.models, drops)


def exact_moments(made: Inputs, kept: Sequence[oracle.Floats]) -> tuple[list[list[Fraction]], list[list[Fraction]]]:
    """a.a, then d.d of each model and d.a of each per column; and the sums of the terms' absolute values."""
    a = made.start()
    aa = oracle.column_dots(a, a)
    squares: list[list[Fraction]] = []
    products: list[list[Fraction]] = []
    sizes: list[list[Fraction]] = []
    for model, keep in zip(made.models, kept, strict=True):
        scale = Fraction(float(keep.max()))
        b, x = np.where(keep > 0, a, 0.0), np.where(keep > 0, oracle.floats(model), 0.0)
        bb, bx, xx = oracle.column_dots(b, b), oracle.column_dots(b, x), oracle.column_dots(x, x)
        dd = [scale**2 * (p - 2 * q + r) for p, q, r in zip(xx, bx, bb, strict=True)]
        ad = [scale * (q - r) for q, r in zip(bx, bb, strict=True)]
        size = np.abs(keep * (oracle.floats(model) - a)) * np.abs(a)
        squares.append(dd)
        products.append(ad)
        sizes.append([Fraction(value) for value in size.sum(axis=0).tolist()])
    return [aa, *squares, *products], [aa, *squares, *sizes]


def assert_moments(found: Tensor, made: Inputs, kept: Sequence[oracle.Floats]) -> None:
    wanted, sizes = exact_moments(made, kept)
    for row, exact, size in zip(found.tolist(), wanted, sizes, strict=True):
        for value, right, scale in zip(row, exact, size, strict=True):
            # 300 rows at most are added, in two tiles.
            assert abs(Fraction(value) - right) <= 270 * Fraction(1, 2**53) * scale


@few
@given(made=inputs(), cuts=cuts)
def test_column_moments_are_exact_up_to_float64_and_depend_on_no_window(made: Inputs, cuts: list[int]) -> None:
    whole = made.column_moments(first_entry=5)
    assert_moments(whole, made, made.kept(first_entry=5))
    assert torch.equal(oracle.bits(whole), oracle.bits(made.column_moments(cuts, first_entry=5)))


@few
@given(made=inputs(), cuts=cuts)
def test_row_moments_are_the_column_moments_of_the_transposed_tensor(made: Inputs, cuts: list[int]) -> None:
    whole = made.row_moments(first_entry=6)
    turned = Inputs(None if made.base is None else made.base.T, [model.T for model in made.models])
    assert_moments(whole, turned, [keep.T for keep in made.kept(first_entry=6)])
    assert torch.equal(oracle.bits(whole), oracle.bits(made.row_moments(cuts, first_entry=6)))


def terms(made: Inputs) -> Iterator[tuple[oracle.Floats, oracle.Floats]]:
    """The two factors of what each moment adds up."""
    a = made.start()
    deltas = [oracle.floats(model) - a for model in made.models]
    yield a, a
    yield from ((d, d) for d in deltas)
    yield from ((d, a) for d in deltas)


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 900])
def test_rows_are_added_one_by_one_in_tiles_of_256_and_tiles_in_order(rows: int) -> None:
    made = plain(rows, rows, 5, F32, F32, BF16)
    for found, (one, two) in zip(made.column_moments(), terms(made), strict=True):
        for column, value in enumerate(found.tolist()):
            assert value == in_tiles(one[:, column], two[:, column])


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 2049])
def test_a_row_is_added_in_64_lanes_which_are_halved(columns: int) -> None:
    made = plain(columns, 2, columns, F32, F32, BF16)
    for found, (one, two) in zip(made.row_moments(), terms(made), strict=True):
        for row, value in enumerate(found.tolist()):
            assert value == in_lanes(one[row], two[row])


def test_threads_change_no_bit() -> None:
    made, results = large(), []
    coefficients = torch.rand(3, 2049, dtype=torch.float64)
    divergences = torch.rand(3, 20_000, dtype=torch.float64)
    for count in (1, 2):
        with threads(count):
            results.append(
                [
                    made.column_moments(),
                    made.row_moments(),
                    made.blend(coefficients, ops.Axis.COLUMNS, BF16),
                    made.blend(coefficients[:, :1].contiguous(), ops.Axis.TENSOR, F16),
                    ops.rank(divergences),
                    ops.calibrated_softmax(divergences, torch.full((3,), 0.5, dtype=torch.float64), divisor=1.0, s=1.0),
                ]
            )
    for one, two in zip(*results, strict=True):
        assert torch.equal(oracle.bits(one), oracle.bits(two))


def test_windows_may_lie_at_any_address() -> None:
    """Files need not align their tensors."""
    made = large()
    assert made.base is not None
    moved = Inputs(at_odd_address(made.base), [at_odd_address(model) for model in made.models], made.drops)
    coefficients = torch.rand(3, 2049, dtype=torch.float64)
    assert torch.equal(made.column_moments(), moved.column_moments())
    assert torch.equal(made.row_moments(), moved.row_moments())
    assert torch.equal(
        made.blend(coefficients, ops.Axis.COLUMNS, BF16), moved.blend(coefficients, ops.Axis.COLUMNS, BF16)
    )


def test_a_window_without_rows_changes_nothing() -> None:
    made = plain(2, 3, 5, BF16, BF16)
    sums, pending = torch.zeros(2, 3, 5, dtype=torch.float64).unbind()
    empty = made.rows(0, 0)
    assert empty.base is not None
    ops.column_moments(empty.base, empty.models, sums, pending)
    assert not sums.any()
    assert not pending.any()
    assert empty.row_moments().shape == (3, 0)
    assert empty.blend(torch.ones(1, 1, dtype=torch.float64), ops.Axis.TENSOR, BF16).shape == (0, 5)
