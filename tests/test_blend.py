"""The blend of a base and models, which is rounded once, and the deltas that statistics and blends drop."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from mergecore import ops
from tests import oracle
from tests.kernel_inputs import BF16, DTYPES, F16, F32, Inputs, chain, cuts, few, inputs

WINDOWS = (*DTYPES, torch.float64)
NOISE = Fraction(1, 2**50)  # of the sum of absolute values: what float64 sums of a few numbers may lose


def allowed(value: Fraction, size: Fraction, dtype: torch.dtype) -> tuple[float, float]:
    """The merge's rounding, 40 bits first, of values that float64 sums of `size` cannot tell apart."""
    noise = NOISE * size
    return oracle.nearest(value - noise, dtype, first=40), oracle.nearest(value + noise, dtype, first=40)


def coefficient(coefficients: Tensor, axis: ops.Axis, n: int, row: int, column: int) -> Fraction:
    place = {ops.Axis.TENSOR: 0, ops.Axis.COLUMNS: column, ops.Axis.ROWS: row}[axis]
    return Fraction(coefficients[n, place].item())


@few
@given(
    made=inputs(largest=600),
    axis=st.sampled_from(ops.Axis),
    dtype=st.sampled_from(DTYPES),
    base_coefficient=st.sampled_from([1.0, 0.0, -2.5]),
    kind=st.sampled_from(["half", "third", "any"]),
    cuts=cuts,
)
def test_a_blend_is_the_exact_sum_rounded_once(
    made: Inputs, axis: ops.Axis, dtype: torch.dtype, base_coefficient: float, kind: str, cuts: list[int]
) -> None:
    rows, columns = made.shape
    stride = {ops.Axis.TENSOR: 1, ops.Axis.COLUMNS: columns, ops.Axis.ROWS: rows}[axis]
    shape = (len(made.models), stride)
    coefficients = {
        "half": torch.full(shape, 0.5, dtype=torch.float64),
        "third": torch.full(shape, 1 / 3, dtype=torch.float64),
        "any": torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
    }[kind]
    arguments: Any = {"base_coefficient": base_coefficient, "first_entry": 3}
    out = made.blend(coefficients, axis, dtype, **arguments)
    assert torch.equal(oracle.bits(out), oracle.bits(made.blend(coefficients, axis, dtype, cuts=cuts, **arguments)))

    start, kept = made.start(), made.kept(first_entry=3)
    scale = Fraction(base_coefficient) if made.base is not None else Fraction(0)
    for row in range(rows):
        for column in range(columns):
            a = Fraction(start[row, column])
            value = scale * a
            size = abs(value)
            for n, model in enumerate(made.models):
                delta = Fraction(float(kept[n][row, column])) * (Fraction(model[row, column].item()) - a)
                term = coefficient(coefficients, axis, n, row, column) * delta
                value, size = value + term, size + abs(term)
            low, high = allowed(value, size, dtype)
            assert low <= out[row, column].item() <= high


@few
@given(made=inputs(largest=600), axis=st.sampled_from(ops.Axis), cuts=cuts)
def test_a_blend_in_float64_is_the_sum_of_its_terms_in_order_not_rounded_again(
    made: Inputs, axis: ops.Axis, cuts: list[int]
) -> None:
    rows, columns = made.shape
    stride = {ops.Axis.TENSOR: 1, ops.Axis.COLUMNS: columns, ops.Axis.ROWS: rows}[axis]
    random = torch.Generator().manual_seed(2)
    coefficients = torch.randn(len(made.models), stride, dtype=torch.float64, generator=random)
    out = made.blend(coefficients, axis, torch.float64, base_coefficient=0.75, cuts=cuts, first_entry=3)
    start, kept = made.start(), made.kept(first_entry=3)
    deltas = [keep * (oracle.floats(model) - start) for keep, model in zip(kept, made.models, strict=True)]
    for row, column in itertools.product(range(rows), range(columns)):
        places = [coefficient(coefficients, axis, n, row, column) for n in range(len(deltas))]
        total = chain(np.array([float(c) for c in places]), np.array([delta[row, column] for delta in deltas]))
        assert out[row, column].item() == (total if made.base is None else 0.75 * start[row, column] + total)


def average(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    half = torch.full((2, 1), 0.5, dtype=torch.float64)
    return Inputs(None, [x.view(1, -1), y.view(1, -1)]).blend(half, ops.Axis.TENSOR, dtype).view(-1)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_exact_ties_go_to_even_for_every_last_bit(dtype: torch.dtype) -> None:
    """The mean of two neighbours lies exactly between them: one half of all averages of bf16 numbers are ties."""
    every = torch.arange(0, 0x7C00 if dtype is F16 else 0x7F80, dtype=torch.int16)
    low, high = every[:-1].view(dtype), every[1:].view(dtype)
    even = torch.where(every[:-1] % 2 == 0, every[:-1], every[1:])
    assert torch.equal(oracle.bits(average(low, high, dtype)), even)
    negative = torch.where(even == 0, even, even - 0x8000)  # 0 + x underflows to +0 or -0
    assert torch.equal(oracle.bits(average(-low, -high, dtype))[1:], negative[1:].to(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_and_their_neighbours_round_as_exact_rationals_do(dtype: torch.dtype) -> None:
    form = oracle.FORMATS[dtype]
    exponents = [form.least, form.least + 1, -1, 0, 3, 14]  # the first one's small numbers are subnormal
    halves = [
        Fraction(2 * number + 1, 2) * Fraction(2) ** (exponent - form.significant + 1)
        for exponent in exponents
        for number in (
            0,
            1,
            2,
            3,
            2 ** (form.significant - 1),
            2 ** (form.significant - 1) + 1,
            2**form.significant - 1,
        )
    ]
    smallest = Fraction(2) ** form.least
    nearby = [half + sign * max(half, smallest) / 2**36 for half in halves for sign in (-1, 0, 1)]
    coefficients = torch.tensor([[float(value) for value in nearby]], dtype=torch.float64)
    one = Inputs(None, [torch.ones(1, len(nearby), dtype=BF16)])
    found = one.blend(coefficients, ops.Axis.COLUMNS, dtype)
    assert found[0].tolist() == [oracle.nearest(Fraction(float(value)), dtype) for value in nearby]


@pytest.mark.parametrize("dtype", DTYPES)
def test_float64_noise_decides_no_tie(dtype: torch.dtype) -> None:
    """A sum that is a tie in exact arithmetic rounds to even whatever the last float64 bits are."""
    form = oracle.FORMATS[dtype]
    tie = 1.0 + 2.0**-form.significant
    noisy = [math.nextafter(tie, 0), tie, math.nextafter(tie, 2), tie + 2.0**-42, tie - 2.0**-42]
    one = Inputs(None, [torch.ones(1, len(noisy), dtype=F32)])
    found = one.blend(torch.tensor([noisy], dtype=torch.float64), ops.Axis.COLUMNS, dtype)
    assert found[0].tolist() == [1.0] * len(noisy)


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_conversion_is_torchs_for_every_number(source: torch.dtype, target: torch.dtype) -> None:
    if source is F32:
        random = torch.Generator().manual_seed(5)
        every = torch.randint(-(2**31), 2**31, (1, 200_000), generator=random).to(torch.int32).view(F32)
        every = torch.cat([every, torch.arange(2**16).to(torch.int32).view(1, -1).view(F32)], 1)  # subnormals
    else:
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(1, -1).view(source)
    finite = every.isfinite()
    for base in (None, torch.zeros_like(every)):
        counts = torch.zeros(2, dtype=torch.int64)
        one = torch.ones(1, 1, dtype=torch.float64)
        found = Inputs(base, [every]).blend(one, ops.Axis.TENSOR, target, counts=counts)
        wanted = every.to(target)
        same = oracle.bits(found) == oracle.bits(wanted)
        if base is not None:
            same |= (found == 0) & (wanted == 0)  # a zero delta leaves the base's own zero
        assert bool(same[finite].all())
        assert torch.equal(found.isnan(), every.isnan())
        assert torch.equal(found.isinf(), wanted.isinf())
        assert counts.tolist() == [int((~finite).sum()), int((wanted.isinf() & finite).sum())]


@pytest.mark.parametrize("dtype", WINDOWS)
@pytest.mark.parametrize("axis", ops.Axis)
def test_copies_of_the_base_give_the_base_bit_for_bit(dtype: torch.dtype, axis: ops.Axis) -> None:
    """Negative zeros, subnormals and the largest numbers included."""
    if dtype.itemsize >= 4:
        ends = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.1754942e-38, 1.0], dtype=dtype)
        base = torch.cat([ends, torch.randn(504, dtype=dtype)]).view(8, 64)
    else:
        numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        base = numbers[numbers.isfinite()].view(-1, 32)
    made = Inputs(base, [base, base, base])
    coefficients = torch.tensor([0.3, -2.0, 1e3], dtype=torch.float64)[:, None].repeat(1, max(base.shape))
    assert torch.equal(oracle.bits(made.blend(coefficients, axis, dtype)), oracle.bits(base))


def test_signs_of_zeros_survive_without_a_base() -> None:
    zeros = torch.tensor([[-0.0, 0.0]], dtype=BF16)
    out = Inputs(None, [zeros, zeros]).blend(torch.full((2, 1), 0.5, dtype=torch.float64), ops.Axis.TENSOR, BF16)
    assert torch.equal(oracle.bits(out), oracle.bits(zeros))


@pytest.mark.parametrize(
    ("dtype", "largest"), [(F32, 3.4028235677973366e38), (F16, 65520.0), (BF16, 3.3961775292304957e38)]
)
def test_overflow_is_infinity_and_is_counted(dtype: torch.dtype, largest: float) -> None:
    """`largest` is the first number that rounds beyond the format; just below it rounds to the largest number."""
    values = [largest, -largest, largest * (1 - 2**-30), 1e300, -1e305, 1e308]
    counts = torch.tensor([10, 100])
    one = Inputs(None, [torch.ones(1, len(values), dtype=F32)])
    found = one.blend(torch.tensor([values], dtype=torch.float64), ops.Axis.COLUMNS, dtype, counts=counts)
    inf = math.inf
    assert found[0].tolist() == [inf, -inf, oracle.FORMATS[dtype].largest, inf, -inf, inf]
    assert counts.tolist() == [10, 105]


@pytest.mark.parametrize("dtype", WINDOWS)
def test_nan_and_infinity_are_counted_once_per_result(dtype: torch.dtype) -> None:
    nan, inf = math.nan, math.inf
    model = torch.tensor([[1.0, nan, inf, -inf, 2.0]], dtype=dtype)
    base = torch.tensor([[nan, 1.0, 1.0, 1.0, 1.0]], dtype=dtype)
    counts = torch.zeros(2, dtype=torch.int64)
    half = torch.full((2, 1), 0.5, dtype=torch.float64)
    found = Inputs(base, [model, model]).blend(half, ops.Axis.TENSOR, dtype, counts=counts)
    assert counts.tolist() == [4, 0]
    assert oracle.bits(found)[0, 2:].tolist() == oracle.bits(torch.tensor([inf, -inf, 2.0], dtype=dtype)).tolist()
    assert found[0, :2].isnan().all()


# Dropping (DARE) ----------------------------------------------------------------------------------


def test_the_reference_generator_gives_the_published_numbers() -> None:
    """Known answers of Random123's philox4x32-10."""
    ones = 0xFFFFFFFF
    assert oracle.philox4x32([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert oracle.philox4x32([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    assert oracle.philox4x32(pi[:4], pi[4:]) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def keep_mask(drop: ops.Drop, rows: int, columns: int, **place: Any) -> Tensor:
    """What blend multiplies each delta with."""
    made = Inputs(torch.zeros(rows, columns), [torch.ones(rows, columns)], (drop,))
    return made.blend(torch.ones(1, 1, dtype=torch.float64), ops.Axis.TENSOR, F32, **place)


@few
@given(
    key=st.integers(0, 2**64 - 1),
    first=st.integers(0, 2**40) | st.integers(0, 7) | st.integers(2**34 - 20, 2**34),
    count=st.integers(1, 20),
)
@example(key=0, first=0, count=4)
def test_entries_are_kept_by_their_philox_number(key: int, first: int, count: int) -> None:
    for place, number in enumerate(oracle.random_numbers(key, range(first, first + count))):
        for threshold, kept in ((number, 2.0), (number + 1, 0.0)):
            if threshold > 0:  # at 0 nothing is dropped
                assert keep_mask(ops.Drop(key, threshold, 2.0), 1, count, first_entry=first)[0, place] == kept


def test_the_key_comes_from_seed_tensor_and_model() -> None:
    for seed, name, model in ((0, "a.weight", 0), (1, "a.weight", 0), (0, "b.weight", 0), (0, "a.weight", 1)):
        drop = ops.Drop.of(0.5, False, seed=seed, tensor=name, model=model)
        kept = oracle.Dare("0.5", seed=seed).kept((9, 11), name, model)
        assert torch.equal(keep_mask(drop, 9, 11), torch.from_numpy(kept).float())


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropping_keeps_the_promised_share_and_the_mean(rate: float) -> None:
    """Each within 4 standard errors; the variance of the kept and rescaled deltas is p / (1 - p) (DARE, section 3)."""
    count = 1_000_000
    keep = keep_mask(ops.Drop.of(rate, True, seed=11, tensor="w", model=0), 1000, 1000).double()
    assert abs((keep > 0).double().mean() - (1 - rate)) < 4 * math.sqrt(rate * (1 - rate) / count)
    spread = rate / (1 - rate)
    assert abs(keep.mean() - 1) < 4 * math.sqrt(spread / count)
    kurtosis = ((keep - 1) ** 4).mean() - spread**2
    assert abs(((keep - 1) ** 2).mean() - spread) <= 4 * math.sqrt(kurtosis / count) + 1e-12
    neighbours = (keep[:, 1:] > 0) & (keep[:, :-1] > 0)
    joint = (1 - rate) ** 2
    assert abs(neighbours.double().mean() - joint) < 8 * math.sqrt(joint * (1 - joint) / count)


@few
@given(rows=st.integers(1, 140), columns=st.integers(1, 140), first=st.integers(0, 1000), cuts=cuts)
def test_statistics_and_blend_drop_the_same_entries_in_any_window(
    rows: int, columns: int, first: int, cuts: list[int]
) -> None:
    drop = ops.Drop(12345, 1 << 30, 1.0)
    keep = keep_mask(drop, rows, columns, first_entry=first)
    assert torch.equal(keep, keep_mask(drop, rows, columns, first_entry=first, cuts=cuts))
    made = Inputs(torch.zeros(rows, columns), [torch.ones(rows, columns)], (drop,))
    assert torch.equal(made.column_moments(cuts, first)[1], keep.double().sum(0))
    assert torch.equal(made.row_moments(cuts, first)[1], keep.double().sum(1))


def test_thresholds_at_the_ends_keep_everything_and_nothing() -> None:
    assert bool((keep_mask(ops.Drop(1, 0, 2.0), 10, 10) == 1).all())  # nor is anything scaled
    assert bool((keep_mask(ops.Drop(1, 2**32, 1.0), 10, 10) == 0).all())
