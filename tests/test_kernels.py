"""The kernels as torch ops, held against exact arithmetic (oracle.py) and against the documented order of sums."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergecore import ops
from tests import oracle

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (F32, F16, BF16)
WINDOWS = (*DTYPES, torch.float64)
NOISE = Fraction(1, 2**50)  # of the sum of absolute values: what float64 sums of a few numbers may lose

few = settings(max_examples=30, deadline=None)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Inputs:
    """A base (or none) and models of one shape, with drops (or none)."""

    base: Tensor | None
    models: list[Tensor]
    drops: tuple[ops.Drop, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        return self.models[0].shape[0], self.models[0].shape[1]

    def rows(self, first: int, last: int) -> Inputs:
        base = None if self.base is None else self.base[first:last]
        return Inputs(base, [model[first:last] for model in self.models], self.drops)

    def start(self) -> oracle.Floats:
        """The base as float64; zeros where there is none."""
        return np.zeros(self.shape) if self.base is None else oracle.floats(self.base)

    def kept(self, first_entry: int = 0) -> list[oracle.Floats]:
        """What each delta is multiplied with."""
        rows, columns = self.shape
        if not self.drops:
            return [np.ones(self.shape)] * len(self.models)
        out = []
        for drop in self.drops:
            if drop.threshold == 0:
                out.append(np.ones(self.shape))
                continue
            numbers = oracle.random_numbers(drop.key, range(first_entry, first_entry + rows * columns))
            keep = np.array(numbers, dtype=np.uint64).reshape(rows, columns) >= drop.threshold
            out.append(np.where(keep, drop.scale, 0.0))
        return out

    def column_moments(self, cuts: Sequence[int] = (), first_entry: int = 0) -> Tensor:
        sums = torch.zeros(ops.moment_count(len(self.models)), self.shape[1], dtype=torch.float64)
        pending = torch.zeros_like(sums)
        for first, last in windows(self.shape[0], cuts):
            part = self.rows(first, last)
            ops.column_moments(
                part.base, part.models, sums, pending, first_row=first, first_entry=first_entry, drops=self.drops
            )
        return sums + pending

    def row_moments(self, cuts: Sequence[int] = (), first_entry: int = 0) -> Tensor:
        sums = torch.full((ops.moment_count(len(self.models)), self.shape[0]), math.nan, dtype=torch.float64)
        for first, last in windows(self.shape[0], cuts):
            part = self.rows(first, last)
            ops.row_moments(part.base, part.models, sums, first_row=first, first_entry=first_entry, drops=self.drops)
        return sums

    def blend(
        self,
        coefficients: Tensor,
        axis: ops.Axis,
        dtype: torch.dtype,
        *,
        base_coefficient: float = 1.0,
        cuts: Sequence[int] = (),
        first_entry: int = 0,
        counts: Tensor | None = None,
    ) -> Tensor:
        out = torch.empty(self.shape, dtype=dtype)
        counts = torch.zeros(2, dtype=torch.int64) if counts is None else counts
        for first, last in windows(self.shape[0], cuts):
            part = self.rows(first, last)
            ops.blend(
                out[first:last],
                part.base,
                part.models,
                coefficients,
                counts,
                base_coefficient=base_coefficient,
                axis=axis,
                first_row=first,
                first_entry=first_entry,
                drops=self.drops,
            )
        return out


def windows(rows: int, cuts: Sequence[int]) -> Iterator[tuple[int, int]]:
    places = [0, *sorted(cut for cut in cuts if 0 < cut < rows), rows]
    return itertools.pairwise(places)


@st.composite
def inputs(draw: st.DrawFn, *, largest: int = 20_000, dropping: bool = True) -> Inputs:
    """Windows of odd shapes, dtypes mixed, values as in real models or of many magnitudes."""
    rows = draw(st.sampled_from([1, 2, 3, 8, 63, 64, 65, 127, 200, 256, 257, 300]))
    columns = draw(st.sampled_from([1, 2, 7, 63, 64, 65, 255, 256, 257, 2049]))
    rows, columns = (rows, columns) if rows * columns <= largest else (max(1, largest // columns), columns)
    count = draw(st.sampled_from([1, 2, 3, 16]))
    count = min(count, max(1, largest // (rows * columns)))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    wide = draw(st.booleans())

    def values(scale: float) -> Tensor:
        spread = torch.randint(-12, 6, (rows, columns), generator=random) if wide else torch.tensor(0)
        return torch.randn(rows, columns, generator=random, dtype=torch.float64) * scale * torch.exp2(spread)

    start = values(0.02)
    start[:, torch.rand(columns, generator=random) < 0.1] = 0.0
    base = start.to(draw(st.sampled_from(DTYPES))) if draw(st.integers(0, 5)) else None
    models = []
    for _ in range(count):
        model = start + values(draw(st.sampled_from([0.0, 3e-5, 3e-3, 0.02])))
        model[:, torch.rand(columns, generator=random) < 0.1] = 0.0
        models.append(model.to(draw(st.sampled_from(DTYPES))))
    drops: tuple[ops.Drop, ...] = ()
    if dropping and base is not None and draw(st.booleans()):
        rates = draw(st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.99]), min_size=count, max_size=count))
        drops = tuple(ops.Drop.of(rate, True, seed=7, tensor="w", model=n) for n, rate in enumerate(rates))
    return Inputs(base, models, drops)


def plain(seed: int, rows: int, columns: int, *dtypes: torch.dtype, scale: float = 1e-3) -> Inputs:
    """A base and models of the given dtypes, the base's first."""
    random = torch.Generator().manual_seed(seed)
    start = torch.randn(rows, columns, generator=random) * 0.02
    models = [(start + torch.randn(rows, columns, generator=random) * scale).to(dtype) for dtype in dtypes[1:]]
    return Inputs(start.to(dtypes[0]), models)


def large() -> Inputs:
    """Large enough for several threads."""
    drops = (ops.Drop(3, 1 << 31, 2.0), ops.Drop(4, 0, 1.0), ops.Drop(2**64 - 1, 1 << 30, 4 / 3))
    made = plain(1, 257, 2049, BF16, F16, F32, BF16)
    return Inputs(made.base, made.models, drops)


cuts = st.lists(st.integers(1, 300), max_size=4)


# Registration -------------------------------------------------------------------------------------


def test_every_op_passes_opcheck() -> None:
    """Schema, mutation, fake tensors and tracing, as torch checks its own."""
    window = plain(0, 5, 7, F32, BF16, F16)
    drops: tuple[Any, ...] = ([1, -2], [1 << 30, 1 << 31], [1.0, 2.0])
    none: tuple[Any, ...] = ([], [], [])
    by_column, pending = torch.zeros(2, 5, 7, dtype=torch.float64).unbind()
    by_row = torch.zeros(5, 5, dtype=torch.float64)
    scores, thresholds = torch.rand(2, 9, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    counts, coefficients = torch.zeros(2, dtype=torch.int64), torch.rand(2, 7, dtype=torch.float64)
    out = torch.empty(5, 7, dtype=BF16)
    registered = torch.ops.mergecore
    for base, dropping in ((window.base, none), (window.base, drops), (None, none)):
        moments = (base, window.models)
        torch.library.opcheck(registered.column_moments.default, (*moments, by_column, pending, 3, 9, *dropping))
        torch.library.opcheck(registered.row_moments.default, (*moments, by_row, 0, 9, *dropping))
        blend = (out, *moments, coefficients, 1.0, 1, 0, 9, *dropping, counts)
        torch.library.opcheck(registered.blend.default, blend)
    torch.library.opcheck(registered.rank.default, (scores, torch.empty_like(scores), True))
    odds = torch.empty(2, 5, 7, dtype=torch.float64)
    for dropping in (none, drops):
        ranked = (window.base, window.models, [0.4, 0.5], [0.1, 0.0], odds, 0, 9, *dropping)
        torch.library.opcheck(registered.row_odds.default, ranked)
    softmax = (scores, thresholds, 9.0, 1.0, torch.empty_like(scores))
    torch.library.opcheck(registered.calibrated_softmax.default, softmax)


# Dtypes -------------------------------------------------------------------------------------------


def grams(made: Inputs) -> list[Tensor]:
    pairs, (rows, columns) = ops.gram_count(len(made.models)), made.shape
    whole, by_row, by_column, pending = (
        torch.zeros(pairs, n, dtype=torch.float64) for n in (1, rows, columns, columns)
    )
    ops.gram(whole, made.base, made.models, drops=made.drops)
    ops.row_gram(by_row, made.base, made.models, drops=made.drops)
    ops.column_gram(by_column, pending, made.base, made.models, drops=made.drops)
    return [whole, by_row, by_column, pending]


@few
@given(made=inputs(largest=3000), wide=st.sets(st.integers(0, 16)))
def test_float64_windows_give_the_bits_of_the_same_numbers_in_other_dtypes(made: Inputs, wide: set[int]) -> None:
    base = made.base.double() if made.base is not None and 0 in wide else made.base
    models = [model.double() if n + 1 in wide else model for n, model in enumerate(made.models)]
    widened = Inputs(base, models, made.drops)
    coefficients = torch.rand(len(models), made.shape[1], dtype=torch.float64)
    found, wanted = (
        [
            one.column_moments(),
            one.row_moments(),
            *grams(one),
            *(one.blend(coefficients, ops.Axis.COLUMNS, dtype) for dtype in DTYPES),
        ]
        for one in (widened, made)
    )
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(oracle.bits(x), oracle.bits(y))


def test_float64_windows_are_not_rounded_on_the_way() -> None:
    base = torch.full((1, 3), 1.0, dtype=torch.float64)
    model = base + torch.tensor([2.0**-30, 2.0**-40, -(2.0**-50)], dtype=torch.float64)
    one = torch.tensor([[2.0**20]], dtype=torch.float64)
    found = Inputs(base, [model]).blend(one, ops.Axis.TENSOR, F32)
    assert found.tolist() == [[1 + 2.0**-10, 1 + 2.0**-20, 1.0]]  # 1 - 2^-30 rounds to 1
    assert Inputs(base, [model]).column_moments()[1].tolist() == [2.0**-60, 2.0**-80, 2.0**-100]


# Moments ------------------------------------------------------------------------------------------


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


def chain(one: oracle.Floats, two: oracle.Floats) -> float:
    """The products added up in order, each product and sum rounded together (a fused multiply-add)."""
    total = 0.0
    for x, y in zip(one.tolist(), two.tolist(), strict=True):
        total = float(Fraction(x) * Fraction(y) + Fraction(total))
    return total


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 900])
def test_rows_are_added_one_by_one_in_tiles_of_256_and_tiles_in_order(rows: int) -> None:
    made = plain(rows, rows, 5, F32, F32, BF16)
    for found, (one, two) in zip(made.column_moments(), terms(made), strict=True):
        for column, value in enumerate(found.tolist()):
            tiles = [chain(one[i : i + 256, column], two[i : i + 256, column]) for i in range(0, rows, 256)]
            total = 0.0
            for tile in tiles:
                total = total + tile
            assert value == total


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 2049])
def test_a_row_is_added_in_64_lanes_which_are_halved(columns: int) -> None:
    made = plain(columns, 2, columns, F32, F32, BF16)
    for found, (one, two) in zip(made.row_moments(), terms(made), strict=True):
        for row, value in enumerate(found.tolist()):
            lanes = [chain(one[row, lane::64], two[row, lane::64]) for lane in range(64)]
            while len(lanes) > 1:
                half = len(lanes) // 2
                lanes = [lanes[i] + lanes[i + half] for i in range(half)]
            assert value == lanes[0]


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


def at_odd_address(tensor: Tensor) -> Tensor:
    """The same numbers at an address that no load of several bytes is aligned to."""
    memory = bytearray(tensor.numel() * tensor.element_size() + 1)
    moved = torch.frombuffer(memory, dtype=tensor.dtype, offset=1).view(tensor.shape)
    assert moved.data_ptr() % 2 == 1
    return moved.copy_(tensor)


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


# Blend --------------------------------------------------------------------------------------------


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


# Rank ---------------------------------------------------------------------------------------------

numbers = st.floats(allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, math.inf, -math.inf])


@few
@given(
    values=st.integers(1, 40).flatmap(
        lambda n: st.lists(st.lists(numbers, min_size=n, max_size=n), min_size=1, max_size=3)
    ),
    average=st.booleans(),
)
def test_ranks_ascend_and_ties_keep_their_order_or_share_their_mean(values: list[list[float]], average: bool) -> None:
    found = ops.rank(torch.tensor(values, dtype=torch.float64), average=average)
    for row, ranked in zip(values, found.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda j: (row[j], j))
        for place, j in enumerate(order):
            same = [p + 1 for p, other in enumerate(order) if row[other] == row[j]]
            assert ranked[j] == (sum(same) / len(same) if average else place + 1)


def test_nan_ranks_last_and_zeros_of_both_signs_are_equal() -> None:
    values = torch.tensor([[math.nan, -0.0, 0.0, math.inf, -math.nan, -1.0]], dtype=torch.float64)
    assert ops.rank(values).tolist() == [[5, 2, 3, 4, 6, 1]]


@pytest.mark.parametrize("count", [1, 2049, 151_936])
def test_long_rows_rank_as_numpys_stable_sort(count: int) -> None:
    random = np.random.default_rng(count)
    values = np.round(random.lognormal(-12, 2, (2, count)), 7)  # with ties
    wanted = np.empty_like(values)
    for row, out in zip(values, wanted, strict=True):
        out[np.argsort(row, kind="stable")] = np.arange(1, count + 1)
    assert np.array_equal(ops.rank(torch.from_numpy(values)).numpy(), wanted)


def of_row(seed: int, kind: str, columns: int) -> tuple[Tensor, Tensor]:
    """A row of a base and of a model in bf16, whose deltas differ in few or many bits."""
    random = torch.Generator().manual_seed(seed)
    start = torch.randn(columns, generator=random) * 0.02
    if kind == "equal":
        return start.to(BF16), start.to(BF16)
    if kind == "far":  # from tiny to large: most deltas have many bits, or need float64
        start *= torch.exp2(torch.randint(-30, 30, (columns,), generator=random))
    change = torch.randn(columns, generator=random) * {"small": 3e-4, "large": 4e-3, "far": 0.02}[kind]
    model = (start.to(BF16).float() + change).to(BF16)
    model[torch.rand(columns, generator=random) < 0.1] = 0.0
    return start.to(BF16), model


@few
@given(
    kinds=st.lists(st.sampled_from(["equal", "small", "large", "far"]), min_size=1, max_size=5),
    columns=st.sampled_from([1, 2, 7, 255, 256, 257, 1000, 5504]),
    seed=st.integers(0, 2**32),
    odd=st.sampled_from([None, math.inf, -math.inf, math.nan, 1e-38, 1e38]),
    wide=st.booleans(),
    dropping=st.booleans(),
)
def test_odds_by_rank_are_those_of_sorted_rows(
    kinds: list[str], columns: int, seed: int, odd: float | None, wide: bool, dropping: bool
) -> None:
    """Equal magnitudes have equal odds, whatever way they are ranked in; against a plain sort of float64."""
    rows = [of_row(seed + n, kind, columns) for n, kind in enumerate(kinds)]
    base, first = (torch.stack(parts) for parts in zip(*rows, strict=True))
    second = first.flip(0).contiguous()
    if odd is not None:
        first[-1, columns // 2] = odd
    models = [first.double() if wide else first, second]
    drops = [ops.Drop.of(0.5, True, seed=seed, tensor="w", model=n) for n in range(2)] if dropping else []
    place = ops.Place(first_entry=3 * columns, drops=drops)
    lowest, steps = [0.25, 0.5], [0.5 / columns, 0.0]
    found = ops.row_odds(base, models, lowest, steps, place)
    size = ops.magnitudes(base, models, place)
    for n in range(2):
        for row in range(len(kinds)):
            values = size[n, row].nan_to_num(math.inf, math.inf).numpy()
            below = (values[:, None] > values).sum(1) if columns < 2000 else np.searchsorted(np.sort(values), values)
            upto = np.searchsorted(np.sort(values), values, side="right")
            if odd is not None and math.isnan(odd) and n == 0 and row == len(kinds) - 1:
                assert found[n, row].isfinite().all()
                continue
            wanted = lowest[n] + (0.5 * (below + 1 + upto) - 1.0) * steps[n]
            assert np.array_equal(found[n, row].numpy(), wanted)


def test_no_values_have_no_ranks() -> None:
    nothing = torch.zeros(3, 0, dtype=BF16)
    assert ops.row_odds(nothing, [nothing], [0.5], [0.1], ops.Place()).shape == (1, 3, 0)
    assert ops.rank(torch.zeros(2, 0, dtype=torch.float64)).shape == (2, 0)
    assert ops.rank(torch.zeros(0, 5, dtype=torch.float64)).shape == (0, 5)


# Calibrated softmax -------------------------------------------------------------------------------


@few
@given(
    scores=st.integers(1, 16).flatmap(
        lambda n: st.lists(st.lists(st.floats(0, 40), min_size=n, max_size=n), min_size=1, max_size=16)
    ),
    divisor=st.sampled_from([1.0, 3.0, 5120.0]),
    s=st.floats(-2, 2),
)
def test_the_softmax_is_exact_up_to_float64_and_s_where_a_score_is_essential(
    scores: list[list[float]], divisor: float, s: float
) -> None:
    thresholds = [sorted(row)[len(row) // 2] for row in scores]  # equal to one of the scores: not exceeded by it
    found = ops.calibrated_softmax(
        torch.tensor(scores, dtype=torch.float64), torch.tensor(thresholds, dtype=torch.float64), divisor=divisor, s=s
    ).tolist()
    for j in range(len(scores[0])):
        powers = [(Decimal(row[j]) / Decimal(divisor)).exp() for row in scores]
        for n, power in enumerate(powers):
            if scores[n][j] > thresholds[n]:
                assert found[n][j] == s
            else:
                # exp's argument, up to 40, is rounded before; then exp, the sum and the quotient.
                assert found[n][j] == pytest.approx(float(power / sum(powers)), rel=2**-46, abs=0)


def test_equal_scores_share_equally_and_large_ones_do_not_overflow() -> None:
    scores = torch.tensor([[1e9, 0.0, 5.0], [1e9, 1e9, 5.0]], dtype=torch.float64)
    found = ops.calibrated_softmax(scores, torch.full((2,), math.inf, dtype=torch.float64), divisor=1.0, s=1.0)
    assert found.tolist() == [[0.5, 0.0, 0.5], [0.5, 1.0, 0.5]]


# Argument checks ----------------------------------------------------------------------------------


def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


WINDOW = zeros(4, 6, dtype=BF16)
MOMENTS: dict[str, Any] = {"base": WINDOW, "models": [WINDOW], "sums": zeros(3, 6), "pending": zeros(3, 6)}
BLEND: dict[str, Any] = {
    "out": zeros(4, 6, dtype=BF16),
    "base": WINDOW,
    "models": [WINDOW],
    "coefficients": zeros(1, 6),
    "counts": zeros(2, dtype=torch.int64),
    "axis": ops.Axis.COLUMNS,
}
DROP = ops.Drop(1, 1 << 31, 2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"models": [zeros(4, 6, dtype=torch.int64)]},
            "a model's window must be float32, float16, bfloat16 or float64",
        ),
        ({"base": zeros(4, 6, dtype=torch.int32)}, "the base's window must be float32, float16, bfloat16 or float64"),
        ({"models": []}, "the number of models must be 1 to 64"),
        ({"models": [WINDOW] * 65}, "the number of models must be 1 to 64"),
        ({"models": [WINDOW, WINDOW[:3]]}, "a model's window must be contiguous and of the same shape"),
        ({"models": [zeros(6, 4, dtype=BF16).T]}, "a model's window must be contiguous"),
        ({"base": WINDOW[:3]}, "the base's window must be contiguous and of the same shape"),
        ({"models": [zeros(24, dtype=BF16)]}, "windows must have two dimensions"),
        ({"drops": [DROP, DROP]}, "drop keys, thresholds and scales must be empty or one per model"),
        ({"drops": [ops.Drop(1, 2**32 + 1, 1.0)]}, "drop thresholds must be 0 to 2\\^32"),
        ({"drops": [ops.Drop(1, -1, 1.0)]}, "drop thresholds must be 0 to 2\\^32"),
        ({"drops": [DROP], "base": None}, "dropping deltas needs a base"),
        ({"first_row": -1}, "window positions must not be negative"),
        ({"first_entry": -1}, "window positions must not be negative"),
    ],
)
def test_windows_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    for call, arguments in ((ops.column_moments, MOMENTS), (ops.blend, BLEND)):
        with pytest.raises(RuntimeError, match=message):
            call(**{**arguments, **change})
    by_row = {key: value for key, value in MOMENTS.items() if key != "pending"}
    with pytest.raises(RuntimeError, match=message):
        ops.row_moments(**{**by_row, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sums": zeros(3, 7)}, "sums must be"),
        ({"sums": zeros(4, 6)}, "sums must be"),
        ({"sums": zeros(3, 6, dtype=F32)}, "sums must be contiguous float64"),
        ({"sums": zeros(6, 3).T}, "sums must be contiguous float64"),
        ({"pending": zeros(18)}, "pending must be"),
    ],
)
def test_moments_of_another_shape_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.column_moments(**{**MOMENTS, **change})


@pytest.mark.parametrize("sums", [zeros(3, 3), zeros(5, 4), zeros(3, 4, dtype=F32), zeros(12), zeros(3, 8)[:, ::2]])
def test_row_moments_need_room_for_every_row(sums: Tensor) -> None:
    with pytest.raises(RuntimeError, match="sums must be"):
        ops.row_moments(WINDOW, [WINDOW], sums)
    with pytest.raises(RuntimeError, match="sums must be"):
        ops.row_moments(WINDOW, [WINDOW], zeros(3, 4), first_row=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": zeros(4, 5, dtype=BF16)}, "out must be contiguous and of the windows' shape"),
        ({"out": zeros(6, 4, dtype=BF16).T}, "out must be contiguous"),
        ({"out": zeros(4, 6, dtype=torch.int64)}, "out must be float32, float16, bfloat16 or float64"),
        ({"coefficients": zeros(6)}, "coefficients must be \\(models, n\\)"),
        ({"coefficients": zeros(2, 6)}, "coefficients must be \\(models, n\\)"),
        ({"coefficients": zeros(1, 5)}, "fewer coefficients than columns or rows"),
        ({"coefficients": zeros(1, 6, dtype=F32)}, "coefficients must be contiguous float64"),
        ({"coefficients": zeros(1, 12)[:, ::2]}, "coefficients must be contiguous float64"),
        ({"coefficients": zeros(1, 4), "axis": ops.Axis.ROWS, "first_row": 1}, "fewer coefficients"),
        ({"coefficients": zeros(1, 0), "axis": ops.Axis.TENSOR}, "fewer coefficients"),
        ({"axis": 3}, "axis must be"),
        ({"counts": zeros(3, dtype=torch.int64)}, "counts must be two int64"),
        ({"counts": zeros(2)}, "counts must be two int64"),
    ],
)
def test_a_blend_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.blend(**{**BLEND, **change})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.row_odds(zeros(2, 3), [zeros(2, 3)], [0.5], [], ops.Place()),
            "one lowest probability and one step",
        ),
        (lambda: ops.rank(zeros(5)), "values and ranks must be \\(models, n\\)"),
        (lambda: ops.rank(zeros(2, 5, dtype=F32)), "values must be contiguous float64"),
        (lambda: ops.rank(zeros(5, 2).T), "values must be contiguous float64"),
        (lambda: ops.calibrated_softmax(zeros(5), zeros(1), divisor=1.0, s=1.0), "scores and out must be"),
        (lambda: ops.calibrated_softmax(zeros(2, 5), zeros(1), divisor=1.0, s=1.0), "thresholds must be .* at least 2"),
        (lambda: ops.calibrated_softmax(zeros(1, 5), zeros(1), divisor=0.0, s=1.0), "divisor must be positive"),
        (lambda: ops.calibrated_softmax(zeros(1, 5), zeros(1), divisor=math.nan, s=1.0), "divisor must be positive"),
    ],
)
def test_scores_that_do_not_fit_are_refused(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["out", "base", "coefficients", "counts"])
def test_tensors_of_two_devices_are_refused(name: str) -> None:
    on_gpu = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in BLEND.items()} | {"models": [WINDOW.cuda()]}
    with pytest.raises(RuntimeError, match="must be on the same device as the others"):
        ops.blend(**{**on_gpu, name: BLEND[name]})
