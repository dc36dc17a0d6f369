"""Selections of entries: exact top sets, order statistics, signs that are elected, and the kernels for them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergecore import ops, selecting, topsets
from mergecore.methods.base import Keep
from mergecore.ops import Drop, Elect, Measure, Place
from mergecore.selecting import choose
from tests import oracle
from tests.kernel_inputs import threads
from tests.selections import (
    BF16,
    F16,
    F32,
    InMemory,
    assert_right,
    deltas_of,
    elected,
    mask_of,
    room_for,
    share,
    spread,
    top,
    trimmed,
)

few = settings(max_examples=40, deadline=None)


@st.composite
def tensors(draw: st.DrawFn, most: int = 16) -> InMemory:
    """Deltas with few or many ties, of one magnitude or many, all zero in places; dtypes mixed."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    count = draw(st.sampled_from([1, 2, 3, most]))
    entries = draw(st.sampled_from([1, 2, 3, 7, 8, 63, 64, 65, 500, 1031]))
    shape = draw(st.sampled_from([(entries,), (entries, 1), (1, entries)]))
    dtypes = draw(st.lists(st.sampled_from([F32, F16, BF16]), min_size=count + 1, max_size=count + 1))
    base = torch.randn(shape, generator=random) * draw(st.sampled_from([0.0, 0.02, 1.0]))
    kind = draw(st.sampled_from(["any", "grid", "zeros", "wide", "beyond"]))
    models = []
    for _ in range(count):
        delta = torch.randn(shape, generator=random) * 0.05
        if kind == "grid":
            delta = torch.randint(-2, 3, shape, generator=random) / 64
        elif kind == "zeros":
            delta = delta * (torch.rand(shape, generator=random) < 0.3)
        elif kind == "wide":
            delta = delta * 2.0 ** torch.randint(-30, 10, shape, generator=random)
        models.append(base + delta)
    base, *models = [tensor.to(dtype) for tensor, dtype in zip([base, *models], dtypes, strict=True)]
    if kind == "beyond":  # what no float32 can hold, or float32 numbers as float64
        models = [model.double() * 2.0 ** draw(st.sampled_from([-400, 0, 300])) for model in models]
        base = torch.zeros_like(base)
    cuts = tuple(draw(st.lists(st.integers(0, entries), max_size=3)))
    return InMemory(base, models, cuts, block=draw(st.sampled_from([1, 5, 8, 4096])))


densities = st.sampled_from([0.0, 1e-6, 0.1, 0.25, 0.5, 0.7, 0.999, 1.0])

# Order statistics ---------------------------------------------------------------------------------


@few
@given(
    tensors(), st.lists(densities, min_size=16, max_size=16), st.sampled_from([0.0, 0.01, 0.3]),
    st.sampled_from([1, 3, 1 << 20]), st.integers(1, 3),
)  # fmt: skip
def test_top_sets_are_exact_ties_in_index_order(
    made: InMemory, shares: list[float], gamma: float, room: int, workers: int
) -> None:
    keeps = [Keep(density=shares[n], outliers=gamma if shares[n] < 1 else 0.0) for n in range(len(made.models))]
    with room_for(room), threads(workers):
        drops = choose(keeps, made, Place(), range(len(keeps)))
    for keep, drop, delta in zip(keeps, drops, deltas_of(made.base, made.models), strict=True):
        assert np.array_equal(mask_of(drop, np.abs(delta)), trimmed(delta, keep.density, keep.outliers))
    assert made.reads + made.skipped == selecting.planned_reads(keeps)


@few
@given(tensors(most=8), st.sampled_from([0.1, 0.5, 0.9]), st.sampled_from([2, 1 << 20]))
def test_top_sets_of_the_spread_are_exact(made: InMemory, density: float, room: int) -> None:
    keeps = [Keep(density=density, measure=Measure.SPREAD)] * len(made.models)
    with room_for(room):
        drops = choose(keeps, made, Place(measure=Measure.SPREAD), range(len(keeps)))
    assert len(set(map(repr, [replace(drop, key=0) for drop in drops]))) == 1
    found = spread(deltas_of(made.base, made.models))
    varied = int(np.count_nonzero(found))
    expected = top(found, max(1, share(density, varied)) if varied else 0)
    kept = mask_of(drops[0], found)
    # Standard deviations that are equal to 40 bits may rank either way: rounding here and there differs.
    doubtful = np.isclose(found, drops[0].least, rtol=2.0**-38, atol=0)
    assert np.array_equal(kept[~doubtful], expected[~doubtful])


@few
@given(tensors(most=4), st.integers(0, 2**32))
def test_order_statistics_are_those_of_what_was_dropped_before(made: InMemory, seed: int) -> None:
    before = [Drop.of(0.5, True, seed=seed, tensor="t", model=n) for n in range(len(made.models))]
    keeps = [Keep(density=0.3)] * len(made.models)
    drops = choose(keeps, made, Place(drops=before), range(len(keeps)))
    for drop, earlier, delta in zip(drops, before, deltas_of(made.base, made.models), strict=True):
        numbers = np.array(oracle.random_numbers(earlier.key, range(delta.size)), dtype=np.uint64)
        left = np.where(numbers.reshape(delta.shape) >= earlier.threshold, earlier.scale * delta, 0.0)
        assert np.array_equal(mask_of(drop, np.abs(left)), trimmed(left, 0.3))


def test_the_windows_change_no_limit() -> None:
    random = torch.Generator().manual_seed(3)
    base = torch.randn(3000, generator=random).to(BF16)
    models = [(base.float() + 0.01 * torch.randn(3000, generator=random)).to(BF16) for _ in range(2)]
    keeps = [Keep(density=0.4, outliers=0.05)] * 2
    results = [
        choose(keeps, InMemory(base, models, cuts, block), Place(), (0, 1))
        for cuts in ((), (1, 2, 3), (1500,), (7, 2999))
        for block in (1, 64, 4096)
    ]
    assert all(result == results[0] for result in results)


# Kernels ------------------------------------------------------------------------------------------


@few
@given(
    tensors(), st.data(), st.sampled_from(["none", "weighted", "unweighted"]), st.booleans(),
    st.sampled_from([F32, F16, BF16]),
)  # fmt: skip
def test_elect_is_the_exact_result_rounded(
    made: InMemory, data: st.DataObject, elect: str, normalize: bool, dtype: torch.dtype
) -> None:
    weights = [data.draw(st.sampled_from([0.3, 0.5, 1.0, -0.2])) for _ in made.models]
    keeps = [Keep(density=data.draw(densities)) for _ in made.models]
    chosen = choose(keeps, made, Place(), range(len(keeps)))
    results = []
    for cuts, workers in ((made.cuts, 1), ((), 2)):
        out, counts = torch.empty(made.entries, 1, dtype=dtype), torch.zeros(2, dtype=torch.int64)
        with threads(workers):
            for part in replace(made, cuts=cuts).further():
                assert part.base is not None
                ops.elect(
                    out[part.first_entry : part.first_entry + part.models[0].numel()],
                    part.base, part.models, weights, counts, scale=0.7, elect=Elect[elect.upper()],
                    normalize=normalize and elect != "none", keeps=chosen, place=Place(first_entry=part.first_entry),
                )  # fmt: skip
        assert counts[0] == 0
        results.append(out)
    assert torch.equal(oracle.bits(results[0]), oracle.bits(results[1]))
    deltas = deltas_of(made.base, made.models)
    values = [np.where(trimmed(d, k.density), d, 0).astype(np.longdouble) for d, k in zip(deltas, keeps, strict=True)]
    exact = elected(
        oracle.floats(made.base), values, weights, scale=0.7, elect=elect, normalize=normalize and elect != "none"
    )
    with np.errstate(invalid="ignore"):
        assert_right(results[0].view(made.base.shape), exact, elect)


@few
@given(tensors(most=4), st.floats(0.1, 0.9))
def test_kept_sums_are_those_of_the_kept_deltas(made: InMemory, density: float) -> None:
    keeps = [Keep(density=density, rescale="l1")] * len(made.models)
    drops = choose(keeps, made, Place(), range(len(keeps)))
    sums = selecting.kept_sums(keeps, drops, made, Place())
    for (whole, kept, squares), drop, delta in zip(sums, drops, deltas_of(made.base, made.models), strict=True):
        values = np.where(mask_of(drop, np.abs(delta)), delta, 0.0).astype(np.longdouble)
        assert whole == pytest.approx(float(np.abs(delta.astype(np.longdouble)).sum()), rel=1e-14)
        assert kept == pytest.approx(float(np.abs(values).sum()), rel=1e-14)
        assert squares == pytest.approx(float((values * values).sum()), rel=1e-14)
        assert drop.scale == (whole / kept if kept > 0 else 1.0)


@pytest.mark.parametrize("entries", [1, 255, 600])
def test_keys_of_bf16_differences_are_those_of_float64(entries: int) -> None:
    """Also where float32 does not hold the difference: far exponents, subnormals, overflow, Inf, NaN."""
    tiny, large = 2.0**-133, 3.0e38
    odd = torch.tensor([0.0, -0.0, 1.0, 2.0**-20, -(2.0**-20), 2.0**-16, tiny, -3 * tiny, large, -large, math.inf])
    pairs = torch.cartesian_prod(odd, torch.cat([odd, torch.tensor([math.nan])])).to(BF16)
    random = torch.randn(700, 2, generator=torch.Generator().manual_seed(5)).to(BF16)
    for both in (pairs[:entries], torch.cat([random, pairs])[-entries:], random[:entries]):
        base, model = (column.reshape(-1, 1).contiguous() for column in both.T)
        keys = (model.double() - base.double()).abs().view(torch.int64).view(-1).numpy() & (2**63 - 1)
        bins = np.clip((keys >> topsets.SHIFT) - topsets.FIRST, 1, topsets.BINS - 2)
        bins = np.where(keys == 0, 0, np.where(keys >= topsets.INFINITE, topsets.BINS - 1, bins))
        histogram = torch.zeros(1, topsets.BINS, dtype=torch.int64)
        ops.count_magnitudes(
            base, [model], histogram, shift=topsets.SHIFT, offsets=[topsets.FIRST], clamp=True, place=Place()
        )
        assert np.array_equal(histogram[0].numpy(), np.bincount(bins, minlength=topsets.BINS))
        for low in {-1, 0, topsets.INFINITE, 2**63 - 2, *map(int, keys[:40]), *(int(key) - 1 for key in keys[:40])}:
            high = min(low + (1 << 50), 2**63 - 1)
            collected, indices = (
                torch.zeros(1, len(keys), dtype=torch.int64),
                torch.zeros(1, len(keys), dtype=torch.int64),
            )
            found, equal = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
            ops.collect_magnitudes(
                base, [model], [(0, low, high)], collected, indices, found, equal, block=len(keys), place=Place()
            )
            within = np.flatnonzero((keys > low) & (keys < high))
            assert int(equal) == (keys == low).sum()
            assert indices[0, : int(found)].tolist() == within.tolist()
            assert collected[0, : int(found)].tolist() == keys[within].tolist()


def test_every_op_passes_opcheck() -> None:
    window = [torch.randn(5, 7).to(dtype) for dtype in (F32, BF16, F16)]
    base, models = window[0], window[1:]
    none: tuple[Any, ...] = ([], [], [])
    keeps: tuple[Any, ...] = ([1, -2], [1 << 30, 3, 0, 0, 0, 0], [1.0, 0.2, math.inf, 2.0, -1.0, 0.7])

    def whole(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.int64)

    odds, counts = torch.full((2, 35), 0.5, dtype=torch.float64), whole(2)
    rows = torch.ones(2, 7, dtype=torch.float64)
    check, registered = torch.library.opcheck, torch.ops.mergecore
    ends = torch.zeros(2, 5, 64, dtype=torch.int32)
    for drops in (none, keeps):
        check(registered.count_bracketed.default, (base, models, whole(2, 64), ends, 42, [1 << 20, 0], 8, 0, 9, *drops))
        check(
            registered.count_magnitudes.default,
            (base, models, whole(2, 64), 42, [1 << 20, 0], True, 0, None, 0, 9, *drops),
        )
        collected = (whole(1, 6), whole(1, 6), whole(1))
        check(
            registered.collect_magnitudes.default,
            (base, models, [1], [0], [1 << 62], *collected, whole(1, 5), 8, 0, None, 0, 9, *drops),
        )
        sums = torch.zeros(2, 3, 5, dtype=torch.float64)
        check(registered.kept_sums.default, (base, models, sums, 8, 1, None, 0, 9, *drops, *keeps, odds))
        check(registered.magnitudes.default, (base, models, torch.empty_like(odds), 0, 9, *drops))
        check(
            registered.elect.default,
            (
                torch.empty(5, 7), base, models, [1.0, 2.0], [0.5, 0.4], 1.0, 1, 2, True, 2, rows, 0, 14, *drops,
                *keeps, [0.4, 0.5], [0.05, 0.0], True, counts,
            ),
        )  # fmt: skip
        check(registered.keep_deltas.default, (base, models, odds.clone(), 3, rows, 0, 9, *drops, *keeps, None, False))
        check(registered.count_shared.default, (base, models, [1.0, 0.0], whole(2, 2), 0, 9, *drops))
        check(registered.row_divergences.default, (base, models, rows.clone(), 0, 14, *drops))
