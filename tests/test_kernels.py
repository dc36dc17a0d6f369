"""The kernels as torch ops: schemas, float64 windows, ranks, the calibrated softmax, and arguments that do not fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergecore import ops
from tests import oracle
from tests.kernel_inputs import BF16, DTYPES, F16, F32, Inputs, few, inputs, plain

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
