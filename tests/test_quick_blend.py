"""Blends of bf16 are decided in float32 where that is enough: every result is the float64 one, rounded."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergecore import ops
from tests import oracle

BF16 = torch.bfloat16
ROWS, COLUMNS = 3, 200  # three blocks of 64 in a row, and a rest


def blended(base: Tensor | None, models: list[Tensor], coefficients: Tensor, axis: ops.Axis, scale: float) -> Tensor:
    """The bf16 blend, after it was held against the float64 one."""
    found, exact = torch.empty(models[0].shape, dtype=BF16), torch.empty(models[0].shape, dtype=torch.float64)
    for out in (found, exact):
        counts = torch.zeros(2, dtype=torch.int64)
        ops.blend(out, base, models, coefficients, counts, base_coefficient=scale, axis=axis)
        if out is found:
            told = counts.tolist()
    overflow = 0
    for value, result in zip(exact.flatten().tolist(), found.double().flatten().tolist(), strict=True):
        if not math.isfinite(value):
            assert not math.isfinite(result)
            continue
        wanted = oracle.nearest(Fraction(value), BF16, first=40)
        overflow += math.isinf(wanted)
        assert result == wanted, (value, result, wanted)
        assert wanted != 0 or math.copysign(1, result) == math.copysign(1, value)
    assert told == [int((~exact.isfinite()).sum()), overflow]
    return found


def step(numbers: Tensor) -> Tensor:
    """One in the last place of each bf16 number, float64."""
    return torch.exp2(torch.floor(torch.log2(numbers.double().abs())) - 7)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    bits=st.integers(8, 52),
    sign=st.sampled_from([-1, 0, 1]),
    others=st.integers(0, 5),
    axis=st.sampled_from(ops.Axis),
)
def test_results_as_near_to_a_tie_as_you_like(seed: int, bits: int, sign: int, others: int, axis: ops.Axis) -> None:
    random = torch.Generator().manual_seed(seed)
    base = (torch.randn(ROWS, COLUMNS, generator=random) * 0.02 + 0.1).to(BF16)
    odd = 2 * torch.randint(-3, 3, base.shape, generator=random) + 1
    near = (base.double() + odd * step(base)).to(BF16)
    models = [near, *([base] * others)]
    length = {ops.Axis.TENSOR: 1, ops.Axis.COLUMNS: COLUMNS, ops.Axis.ROWS: ROWS}[axis]
    coefficients = torch.rand(len(models), length, dtype=torch.float64, generator=random)
    coefficients[0] = 0.5 * (1 + sign * 2.0**-bits)
    blended(base, models, coefficients, axis, 1.0)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    models=st.sampled_from([1, 2, 3, 4, 5, 8, 9, 64]),
    based=st.booleans(),
    scale=st.sampled_from([1.0, 0.0, -0.75, 1e-70, 3e20]),
    size=st.sampled_from([1e-41, 1e-37, 1e-6, 1.0, 1e30, 3e38]),
    spread=st.sampled_from([0.0, 1e-3, 1.0]),
    special=st.booleans(),
    coefficient=st.sampled_from([1.0, 1e-3, 1e-25, 1e-42, 1e25]),
    axis=st.sampled_from(ops.Axis),
)
@example(0, 1, False, 1.0, 1e30, 1.0, False, 1e-42, ops.Axis.TENSOR)  # what float32 holds of it is 3 digits
def test_numbers_of_any_size(
    seed: int,
    models: int,
    based: bool,
    scale: float,
    size: float,
    spread: float,
    special: bool,
    coefficient: float,
    axis: ops.Axis,
) -> None:
    random = torch.Generator().manual_seed(seed)

    def numbers() -> Tensor:
        return 2 * torch.rand(ROWS, COLUMNS, generator=random, dtype=torch.float64) - 1

    base = (size * numbers()).to(BF16)
    tensors = [(base.double() + spread * size * numbers()).to(BF16) for _ in range(models)]
    if special:
        for number in (0.0, -0.0, math.inf, -math.inf, math.nan):
            tensors[0][torch.rand(ROWS, COLUMNS, generator=random) < 0.02] = number
            base[torch.rand(ROWS, COLUMNS, generator=random) < 0.02] = number
    length = {ops.Axis.TENSOR: 1, ops.Axis.COLUMNS: COLUMNS, ops.Axis.ROWS: ROWS}[axis]
    coefficients = coefficient * torch.randn(models, length, dtype=torch.float64, generator=random)
    if special:
        coefficients[:, ::2] = 0.0
    blended(base if based else None, tensors, coefficients, axis, scale)


@pytest.mark.parametrize("weight", [0.5, 0.25])
def test_ties_that_are_exact_go_to_even(weight: float) -> None:
    base = torch.full((4, 4096), 1.0, dtype=BF16)
    base[:, ::2] += 2**-7
    model = base + 2**-7 / weight / 2
    out = blended(base, [model.to(BF16)], torch.full((1, 1), weight, dtype=torch.float64), ops.Axis.TENSOR, 1.0)
    assert np.all(out.view(torch.int16).numpy() % 2 == 0)
