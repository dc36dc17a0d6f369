"""Blends of bf16 are decided in float32 where that is enough: every result is the float64 one, rounded."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def blended(
    base: Tensor | None,
    models: list[Tensor],
    coefficients: Tensor,
    axis: ops.Axis,
    scale: float,
    drops: Sequence[ops.Drop] = (),
) -> Tensor:
    """The bf16 blend, after it was held against the float64 one."""
    found, exact = torch.empty(models[0].shape, dtype=BF16), torch.empty(models[0].shape, dtype=torch.float64)
    for out in (found, exact):
        counts = torch.zeros(2, dtype=torch.int64)
        ops.blend(out, base, models, coefficients, counts, base_coefficient=scale, axis=axis, drops=drops)
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


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    models=st.sampled_from([1, 2, 3, 4, 5, 8, 9, 64]),
    based=st.booleans(),
    scale=st.sampled_from([1.0, 0.0, -0.5, 3.0]),
    digits=st.integers(1, 12),
    binades=st.integers(0, 30),
    size=st.sampled_from([2.0**-126, 2.0**-101, 2.0**-99, 1.0, 2.0**60, 2.0**110]),
    zeros=st.booleans(),
    axis=st.sampled_from(ops.Axis),
)
def test_coefficients_of_few_digits_which_make_ties(
    seed: int,
    models: int,
    based: bool,
    scale: float,
    digits: int,
    binades: int,
    size: float,
    zeros: bool,
    axis: ops.Axis,
) -> None:
    """Where float32 computes exactly, and where it nearly does: numbers of one entry lie `binades` apart at most."""
    random = torch.Generator().manual_seed(seed)

    def numbers() -> Tensor:
        binade = torch.randint(0, binades + 1, (ROWS, COLUMNS), generator=random)
        signed = 1 - 2 * torch.randint(0, 2, binade.shape, generator=random)
        few = 128 + torch.randint(0, 128, binade.shape, generator=random)
        return (size * signed * few.double() * torch.exp2(-7.0 - binade.double())).to(BF16)

    base, tensors = numbers(), [numbers() for _ in range(models)]
    if zeros:
        base[torch.rand(ROWS, COLUMNS, generator=random) < 0.02] = -0.0
        tensors[0][torch.rand(ROWS, COLUMNS, generator=random) < 0.02] = -0.0
        tensors[-1][0] = base[0]
    length = {ops.Axis.TENSOR: 1, ops.Axis.COLUMNS: COLUMNS, ops.Axis.ROWS: ROWS}[axis]
    whole = torch.randint(-(2**digits), 2**digits + 1, (models, length), generator=random).double()
    coefficients = whole * 2.0 ** -float(torch.randint(0, digits + 2, (1,), generator=random))
    blended(base if based else None, tensors, coefficients, axis, scale)


@pytest.mark.parametrize("binade", range(4, 32))
def test_a_tie_but_for_what_float32_cannot_hold(binade: int) -> None:
    """1 + 2^-8 is a tie; the last digit of 2^-binade * (1 + 2^-7) - 2^-binade makes it none."""
    small = 2.0**-binade
    numbers = [1.0, 2.0**-8, small * (1 + 2.0**-7), -small]
    models = [torch.full((ROWS, COLUMNS), number, dtype=BF16) for number in numbers]
    out = blended(None, models, torch.ones(4, 1, dtype=torch.float64), ops.Axis.TENSOR, 1.0)
    assert (out == 1 + 2.0**-7).all()


def test_a_tie_but_for_the_last_digit_of_the_coefficient_of_the_base() -> None:
    base = torch.full((ROWS, COLUMNS), 2.0**-3 + 2.0**-7, dtype=BF16)
    model = torch.full((ROWS, COLUMNS), 2.0, dtype=BF16)
    half = torch.full((1, 1), 0.5, dtype=torch.float64)
    assert (blended(base, [model], half, ops.Axis.TENSOR, 1.0) == 136 / 128).all()
    assert (blended(base, [model], half, ops.Axis.TENSOR, 1.0 + 2.0**-23) == 137 / 128).all()


def test_ties_among_coefficients_that_make_none() -> None:
    """As WIDEN's: some columns have importance 1, others any."""
    random = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(64, 512, generator=random)).to(BF16)
    models = [(base + 0.002 * torch.randn(base.shape, generator=random)).to(BF16) for _ in range(2)]
    coefficients = torch.rand(2, 512, dtype=torch.float64, generator=random)
    coefficients[:, ::2] = 1.0
    coefficients[:, ::8] = 0.5
    coefficients[:, 1::8] = 0.1
    blended(base, models, coefficients, ops.Axis.COLUMNS, 1.0)


@pytest.mark.parametrize("weight", [0.5, 0.25])
def test_ties_that_are_exact_go_to_even(weight: float) -> None:
    base = torch.full((4, 4096), 1.0, dtype=BF16)
    base[:, ::2] += 2**-7
    model = base + 2**-7 / weight / 2
    out = blended(base, [model.to(BF16)], torch.full((1, 1), weight, dtype=torch.float64), ops.Axis.TENSOR, 1.0)
    assert np.all(out.view(torch.int16).numpy() % 2 == 0)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    bits=st.integers(8, 53),
    apart=st.integers(0, 40),
    signs=st.tuples(st.sampled_from([-1, 0, 1]), st.sampled_from([-1, 0, 1])),
    power=st.sampled_from([0, 1, 3, 15, 16, 17, 45]),
    size=st.sampled_from([2.0**-125, 2.0**-118, 1.0]),
    based=st.booleans(),
    axis=st.sampled_from(ops.Axis),
)
@example(0, 30, 0, (0, 1), 45, 1.0, False, ops.Axis.TENSOR)  # only the second coefficient has many bits
@example(0, 53, 18, (1, 0), 0, 1.0, False, ops.Axis.TENSOR)  # numbers too far apart for float32
def test_coefficients_of_few_bits_and_numbers_far_apart(
    seed: int, bits: int, apart: int, signs: tuple[int, int], power: int, size: float, based: bool, axis: ops.Axis
) -> None:
    """Half a step of the result is added to it, and something that may be too little for float32."""
    random = torch.Generator().manual_seed(seed)
    near = (size * (1 + torch.rand(ROWS, COLUMNS, generator=random, dtype=torch.float64))).to(BF16)
    bits_of_little = (near.double() * 2.0**-apart).to(BF16).view(torch.int16) | 1
    sign = signs[0] * (torch.rand(ROWS, COLUMNS, generator=random) < 0.9)
    little, less = (sign * of_bits.view(BF16) for of_bits in (bits_of_little, bits_of_little - 1))
    models = [near, (step(near) / 2).to(BF16), little, -less]  # of the last two a single bit remains
    length = {ops.Axis.TENSOR: 1, ops.Axis.COLUMNS: COLUMNS, ops.Axis.ROWS: ROWS}[axis]
    coefficients = torch.full((4, length), 2.0**-power, dtype=torch.float64)
    coefficients[1] *= 1 + signs[1] * 2.0**-bits
    base = torch.zeros_like(near)
    base[:, ::3] = little[:, ::3]
    blended(base if based else None, models, coefficients, axis, 1.0)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rates=st.tuples(st.sampled_from([0.0, 0.3, 0.5]), st.sampled_from([0.5, 0.9])),
    rescale=st.booleans(),
    bits=st.integers(8, 53),
    axis=st.sampled_from(ops.Axis),
)
def test_what_is_dropped(seed: int, rates: tuple[float, float], rescale: bool, bits: int, axis: ops.Axis) -> None:
    random = torch.Generator().manual_seed(seed)
    base = (torch.randn(ROWS, COLUMNS, generator=random) * 0.02 + 0.1).to(BF16)
    odd = 2 * torch.randint(-3, 3, base.shape, generator=random) + 1
    models = [(base.double() + odd * step(base)).to(BF16) for _ in rates]
    models[1][:, ::7] = -0.0
    drops = [ops.Drop.of(rate, rescale, seed=seed, tensor="w", model=n) for n, rate in enumerate(rates)]
    length = {ops.Axis.TENSOR: 1, ops.Axis.COLUMNS: COLUMNS, ops.Axis.ROWS: ROWS}[axis]
    coefficients = torch.full((2, length), 0.25, dtype=torch.float64)
    coefficients[1] *= 1 + 2.0**-bits
    blended(base, models, coefficients, axis, 1.0, drops)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    models=st.sampled_from([1, 2, 3, 4, 5, 9]),
    based=st.booleans(),
    scale=st.sampled_from([1.0, -1.0, 0.0, -0.0, 0.75]),
    whole=st.booleans(),
    sparse=st.sampled_from([0.02, 0.5, 1.0]),
    drops=st.booleans(),
    axis=st.sampled_from(ops.Axis),
)
def test_zeros_of_either_sign(
    seed: int, models: int, based: bool, scale: float, whole: bool, sparse: float, drops: bool, axis: ops.Axis
) -> None:
    """Where all numbers of an entry are zeros, where some are, and where what they add up to is."""
    random = torch.Generator().manual_seed(seed)

    def chosen(share: float) -> Tensor:
        return torch.rand(ROWS, COLUMNS, generator=random) < share

    def numbers() -> Tensor:
        one = torch.full((ROWS, COLUMNS), 0.5, dtype=BF16)
        return torch.where(chosen(0.5), one, -one)

    base, tensors = numbers(), [numbers() for _ in range(models)]
    everywhere = chosen(sparse)
    for tensor in (base, *tensors):
        zeros = torch.zeros_like(tensor)
        tensor[:] = torch.where(everywhere | chosen(0.1), torch.where(chosen(0.5), zeros, -zeros), tensor)
    length = {ops.Axis.TENSOR: 1, ops.Axis.COLUMNS: COLUMNS, ops.Axis.ROWS: ROWS}[axis]
    coefficients = torch.randint(-2, 3, (models, length), generator=random).double() / 4
    if not whole:
        coefficients += 1 / 3
    dropping = (
        [ops.Drop.of(0.5, True, seed=seed, tensor="w", model=n) for n in range(models)] if drops and based else []
    )
    blended(base if based else None, tensors, coefficients, axis, scale, dropping)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    models=st.sampled_from([1, 2, 3, 4, 8, 64]),
    divisor=st.integers(3, 130),
    based=st.booleans(),
    scale=st.sampled_from([1.0, 0.0, -1.0, 0.5, 1 / 3]),
    size=st.sampled_from([2.0**-133, 2.0**-126, 2.0**-118, 1.0, 2.0**110]),
    apart=st.integers(0, 12),
    cancel=st.booleans(),
    dropped=st.sampled_from([0.0, 0.5, 0.7]),
    off=st.sampled_from([0, 0, 1, 5, 200, 2**12]),
)
@example(0, 2, 10, True, 1.0, 1.0, 0, False, 0.0, 0)
@example(0, 2, 10, True, 1.0, 1.0, 0, True, 0.0, 0)
def test_fractions_which_make_ties_that_binary_digits_do_not(
    seed: int,
    models: int,
    divisor: int,
    based: bool,
    scale: float,
    size: float,
    apart: int,
    cancel: bool,
    dropped: float,
    off: int,
) -> None:
    """Weights such as 0.3 or 2/3, or a few units in the last place off, of numbers on a coarse grid."""
    random = torch.Generator().manual_seed(seed)

    def numbers() -> Tensor:
        signed = 1 - 2 * torch.randint(0, 2, (ROWS, COLUMNS), generator=random)
        few = 1 + torch.randint(0, 2 ** (8 - apart % 8) - 1, (ROWS, COLUMNS), generator=random)
        lower = torch.randint(0, apart + 1, (ROWS, COLUMNS), generator=random)
        return (size * signed * few.double() * torch.exp2(-lower.double())).to(BF16)

    base = numbers()
    tensors = [
        (base + step(base) * torch.randint(-9, 10, base.shape, generator=random)).to(BF16) for _ in range(models)
    ]
    if apart % 2:
        tensors = [numbers() for _ in tensors]
    numerators = torch.randint(-divisor, divisor + 1, (models, 1), generator=random).double()
    if cancel:  # b' = 0, and two that are each other's opposite
        numerators[-1] = divisor - numerators[:-1].sum()
        tensors[-1] = (-tensors[0].double() + step(base)).to(BF16)
    coefficients = numerators / divisor
    coefficients[0] *= 1 + off * 2.0**-52
    drops = [ops.Drop.of(dropped, True, seed=seed, tensor="w", model=n) for n in range(models)] if based else []
    blended(base if based else None, tensors, coefficients, ops.Axis.TENSOR, scale, drops)
