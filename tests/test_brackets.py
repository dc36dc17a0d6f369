"""Thresholds that a sample brackets: few bins are counted, top sets stay exact, a sample that misleads costs a read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergecore import ops, topsets
from mergecore.brackets import Sample
from mergecore.methods.base import Keep
from mergecore.ops import Drop, Place
from mergecore.selecting import choose
from mergecore.topsets import FIRST, INFINITE, SHIFT
from tests import oracle
from tests.kernel_inputs import threads
from tests.selections import InMemory, deltas_of, mask_of, trimmed

BF16, F32 = torch.bfloat16, torch.float32


@contextmanager
def counted(pieces: int = 8, length: int = 16, parts: int = 1024) -> Iterator[list[int]]:
    """How many bins each read counts; samples are small."""
    bins: list[int] = []

    def counting(count: Any) -> Any:
        def counted(base: Any, models: Any, histogram: Tensor, *ends: Any, **where: Any) -> None:
            if where["place"].first_entry == 0:
                bins.append(histogram.shape[1])
            count(base, models, histogram, *ends, **where)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topsets, "PIECES", pieces)
        patch.setattr(topsets, "PIECE", length)
        patch.setattr(topsets, "PARTS", parts)
        patch.setattr(topsets, "SEARCHED", 100)
        for name in ("count_magnitudes", "count_bracketed"):
            patch.setattr(ops, name, counting(getattr(ops, name)))
        yield bins


def assert_exact(made: InMemory, keeps: list[Keep], before: Sequence[Drop] = ()) -> None:
    drops = choose(keeps, made, Place(drops=before), range(len(keeps)))
    deltas = deltas_of(made.base, made.models)
    for n, drop in enumerate(before):
        numbers = np.array(oracle.random_numbers(drop.key, range(made.entries)), dtype=np.uint64)
        deltas[n] = np.where(numbers.reshape(deltas[n].shape) >= drop.threshold, drop.scale * deltas[n], 0.0)
    for keep, drop, delta in zip(keeps, drops, deltas, strict=True):
        assert np.array_equal(mask_of(drop, np.abs(delta)), trimmed(delta, keep.density, keep.outliers))


def made_of(deltas: Tensor, dtype: torch.dtype = F32, cuts: tuple[int, ...] = ()) -> InMemory:
    base = torch.zeros_like(deltas, dtype=dtype)
    return InMemory(base, [deltas.to(dtype)], cuts, block=64)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    entries=st.sampled_from([129, 1000, 5000]),
    kind=st.sampled_from(["even", "rising", "rows", "grid", "zeros", "spikes", "constant"]),
    dtype=st.sampled_from([BF16, F32, torch.float64]),
    density=st.sampled_from([1e-4, 0.01, 0.3, 0.5, 0.9, 0.9999]),
    gamma=st.sampled_from([0.0, 0.01, 0.3]),
    cuts=st.lists(st.integers(0, 5000), max_size=2),
    parts=st.sampled_from([1, 3, 1024]),
    dropping=st.booleans(),
    workers=st.integers(1, 3),
)
def test_top_sets_are_exact_whatever_the_sample_says(
    seed: int,
    entries: int,
    kind: str,
    dtype: torch.dtype,
    density: float,
    gamma: float,
    cuts: list[int],
    parts: int,
    dropping: bool,
    workers: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    deltas = torch.randn(2, entries, generator=random, dtype=torch.float64) * 1e-3
    places = torch.arange(entries)
    if kind == "rising":
        deltas *= 2.0 ** (places / entries * 30 - 20)
    elif kind == "rows":
        deltas *= 2.0 ** torch.randint(-3, 3, (entries // 64 + 1,), generator=random).repeat_interleave(64)[:entries]
    elif kind == "grid":
        deltas = torch.randint(-3, 4, deltas.shape, generator=random) / 64.0
    elif kind == "zeros":
        deltas *= places % 97 == 0
    elif kind == "spikes":  # where no sample is taken
        deltas *= torch.where(places % 128 == 1, 1e6, 1.0)
    elif kind == "constant":
        deltas = torch.full_like(deltas, 0.25)
    base = (torch.randn(entries, generator=random) * 0.02 if kind != "grid" else torch.zeros(entries)).to(dtype)
    models = [(base.double() + delta).to(dtype) for delta in deltas]
    keeps = [Keep(density=density, outliers=gamma), Keep(density=1 - density)]
    drops = [Drop.of(0.3, True, seed=seed, tensor="t", model=n) for n in range(2)] if dropping else []
    with counted(parts=parts), threads(workers):
        assert_exact(InMemory(base, models, tuple(cuts), block=64), keeps, drops)


@pytest.mark.parametrize("cuts", [(), (1000, 30000)], ids=["one window", "several"])
def test_an_even_tensor_is_counted_once_in_few_bins(cuts: tuple[int, ...]) -> None:
    made = made_of(torch.randn(1 << 16, generator=torch.Generator().manual_seed(1)), cuts=cuts)
    made.block = 1024
    with counted(64, 64) as bins:
        assert_exact(made, [Keep(density=0.5)])
    assert len(bins) == 1
    assert bins[0] < 2000
    assert made.reads == 2


@pytest.mark.parametrize(("dtype", "reads"), [(BF16, 1), (torch.float16, 1), (F32, 2)], ids=["bf16", "f16", "f32"])
@pytest.mark.parametrize("cuts", [(), (1 << 14, 40_000)], ids=["one window", "several"])
@pytest.mark.parametrize("parts", [1, 5, 1024])
def test_deltas_on_a_coarse_grid_are_read_once(
    dtype: torch.dtype, reads: int, cuts: tuple[int, ...], parts: int
) -> None:
    """The threshold is the lower end of its bin; ties that are kept end in any part of any window."""
    random = torch.Generator().manual_seed(4)
    base = 1.0 + torch.rand(1 << 16, generator=random)
    models = [base + 0.05 * torch.randn(1 << 16, generator=random) for _ in range(2)]
    for density in (0.1, 0.3, 0.5, 0.6, 0.8):
        made = InMemory(base.to(dtype), [model.to(dtype) for model in models], cuts, block=1024)
        with counted(64, 64, parts):
            assert_exact(made, [Keep(density=density), Keep(density=density, outliers=0.1)])
        assert (made.reads, made.skipped) == (reads, 2 - reads)


def test_what_lies_above_the_lower_end_of_its_bin_is_collected() -> None:
    """Of one model only: the other one needs no second read."""
    deltas = torch.full((2, 1 << 13), 0.25, dtype=torch.float64)
    deltas[:, torch.arange(1 << 13) % 5 < 3] *= 1 + 2.0**-13
    base = torch.zeros(1 << 13, dtype=torch.float64)
    made = InMemory(base, list(deltas), block=64)
    ranges: list[Any] = []
    collect = ops.collect_magnitudes

    def collecting(base: Any, models: Any, asked: Any, *arguments: Any, **where: Any) -> None:
        ranges.extend(each for each in asked if each[2] - each[1] > 2)  # no search for ties
        collect(base, models, asked, *arguments, **where)

    with pytest.MonkeyPatch.context() as patch, counted():
        patch.setattr(ops, "collect_magnitudes", collecting)
        assert_exact(made, [Keep(density=0.5), Keep(density=0.7)])
    assert {which for which, _, _ in ranges} == {0}
    assert (made.reads, made.skipped) == (2, 0)


def test_more_queries_than_an_op_takes_models_are_counted_in_all_bins() -> None:
    random = torch.Generator().manual_seed(6)
    made = InMemory(torch.zeros(300), [torch.randn(300, generator=random).to(BF16) for _ in range(33)])
    with counted() as bins:
        assert_exact(made, [Keep(density=0.5, outliers=0.1)] * 33)
    assert bins == [topsets.BINS]


def test_windows_too_short_for_parts_are_counted_in_all_bins() -> None:
    made = made_of(torch.randn(5000, generator=torch.Generator().manual_seed(5)), BF16, (1,))
    with pytest.MonkeyPatch.context() as patch, counted() as bins:
        patch.setattr(topsets, "COUNTERS", 1 << 13)
        assert_exact(made, [Keep(density=0.5)])
    assert bins == [topsets.BINS]


def test_a_sample_that_misleads_costs_one_read_of_all_bins() -> None:
    deltas = torch.full((8000,), 1000.0)
    step = (8000 - 64) // 15
    for piece in range(16):  # all that lies between the pieces is a thousand times as large
        deltas[piece * step : piece * step + 64] = 1.0
    made = made_of(deltas * (1 + torch.rand(8000, generator=torch.Generator().manual_seed(2))))
    with counted(16, 64) as bins:
        assert_exact(made, [Keep(density=0.5)])
    assert [count == topsets.BINS for count in bins] == [False, True]


def test_a_tensor_whose_parts_differ_is_counted_in_all_bins_at_once() -> None:
    made = made_of(torch.randn(5000) * torch.where(torch.arange(5000) < 2500, 1e-6, 1.0))
    with counted() as bins:
        assert_exact(made, [Keep(density=0.5)])
    assert bins == [topsets.BINS]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    share=st.sampled_from([0.01, 0.2, 0.5, 0.99]),
    scales=st.sampled_from([0.0, 0.1, 0.3]),
)
def test_a_bracket_holds_the_threshold_where_rows_differ(seed: int, share: float, scales: float) -> None:
    random = np.random.default_rng(seed)
    rows = np.abs(random.normal(size=(1024, 128)) * np.exp(scales * random.normal(size=(1024, 1))))
    sample = Sample(np.ascontiguousarray(rows[::16]), rows.size)
    count = max(1, round(share * rows.size))
    threshold = np.sort(rows, axis=None)[-count]
    bracket = sample.bracket(count)
    assert bracket is not None
    assert bracket[0] <= threshold <= bracket[1]
    inside = ((rows >= bracket[0]) & (rows <= bracket[1])).mean()
    assert inside < 0.1 + 0.5 * scales


def test_a_sample_with_infinities_brackets_nothing_beside_them() -> None:
    values = np.ones((8, 16))
    values[:, 0] = np.nan
    assert Sample(values, 1000).bracket(10) is None


# The kernel ---------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    entries=st.sampled_from([1, 63, 64, 65, 511, 512, 513, 3000, 70_000]),
    kind=st.sampled_from(["near", "grid", "apart", "tiny", "zeros", "wild", "huge"]),
    dtypes=st.sampled_from([(BF16, BF16), (BF16, F32), (F32, torch.float16), (torch.float64, BF16)]),
    bins=st.sampled_from([5, 6, 40, 1024, 8192]),
    shift=st.sampled_from([30, 40, 42, 45, 52]),
    part=st.sampled_from([1, 64, 100, 512, 4096, 40_000]),
    same=st.booleans(),
    dropping=st.booleans(),
    workers=st.integers(1, 3),
)
def test_few_bins_and_their_lower_ends_are_counted_as_defined(
    seed: int,
    entries: int,
    kind: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    bins: int,
    shift: int,
    part: int,
    same: bool,
    dropping: bool,
    workers: int,
) -> None:
    part = max(part, entries * bins >> 20)  # as many counters as a tensor has
    dropping = dropping and entries < 10_000
    random = torch.Generator().manual_seed(seed)
    base = torch.randn(entries, 1, generator=random) * 0.02
    model = base + torch.randn(entries, 1, generator=random) * 1e-3
    if kind == "grid":  # lower ends of bins, and zeros
        model = base + torch.randint(-3, 4, base.shape, generator=random) * 2.0**-6
        base, model = torch.zeros_like(base), model - base
    elif kind == "apart":  # no float32 holds the difference
        model = base * 2.0 ** torch.randint(-40, 40, base.shape, generator=random)
    elif kind == "tiny":
        base, model = base * 2.0**-110, model * 2.0**-110
    elif kind == "zeros":
        hidden = torch.rand(base.shape, generator=random)
        base, model = base * (hidden < 0.5), model * (hidden > 0.3)
    elif kind == "wild":
        model[::7] = torch.tensor([float("inf"), float("nan"), 3e38, -0.0])[
            torch.randint(0, 4, model[::7].shape, generator=random)
        ]
    elif kind == "huge":  # whose difference is beyond float32
        base[::5], model[::5] = 3e38, -3e38
    base, model = base.to(dtypes[0]), model.to(dtypes[1])
    models = [model, model] if same else [model, base]
    drops = [Drop.of(0.5, False, seed=seed, tensor="t", model=n) for n in (0, 0 if same else 1)] if dropping else []
    deltas = []
    for n, each in enumerate(models):
        with np.errstate(invalid="ignore"):
            delta = (oracle.floats(each) - oracle.floats(base)).reshape(-1)
            if drops:
                numbers = np.array(oracle.random_numbers(drops[n].key, range(9, 9 + entries)), dtype=np.uint64)
                delta = delta * (numbers >= drops[n].threshold)
        deltas.append(np.abs(delta))
    finite = deltas[0][np.isfinite(deltas[0]) & (deltas[0] != 0)]
    middle = int(np.float64(np.median(finite) if finite.size else 1.0).view(np.int64)) >> shift
    offsets = [middle - bins // 2, middle - 3]
    parts = -(-entries // part)
    histogram = torch.zeros(2, bins, dtype=torch.int64)
    ends = torch.zeros(2, parts, bins, dtype=torch.int32)
    with threads(workers):
        ops.count_bracketed(
            base, models, histogram, ends, shift=shift, offsets=offsets, part=part,
            place=Place(first_entry=9, drops=drops),
        )  # fmt: skip
    for counts, at_ends, offset, sizes in zip(histogram, ends, offsets, deltas, strict=True):
        keys = sizes.view(np.int64)
        numbers = np.clip((keys >> shift) - offset, 1, bins - 2)
        numbers = np.where(keys == 0, 0, np.where(keys >= INFINITE, bins - 1, numbers))
        assert np.array_equal(counts.numpy(), np.bincount(numbers, minlength=bins))
        is_end = (keys == 0) | ((keys == (numbers + offset) << shift) & (numbers > 1) & (numbers < bins - 2))
        expected = np.zeros((parts, bins), np.int64)
        np.add.at(expected, (np.arange(entries)[is_end] // part, numbers[is_end]), 1)
        assert np.array_equal(at_ends.numpy(), expected)


def test_bins_far_from_all_numbers_hold_nothing() -> None:
    base, model = torch.zeros(100, 1, dtype=BF16), torch.ones(100, 1, dtype=BF16)
    for offset, place in ((FIRST, 4), (FIRST + 340 * 1024, 1), (-(1 << 27), 4)):
        found, ends = torch.zeros(1, 6, dtype=torch.int64), torch.zeros(1, 1, 6, dtype=torch.int32)
        ops.count_bracketed(base, [model], found, ends, shift=SHIFT, offsets=[offset], part=100, place=Place())
        assert found.tolist() == [[100 if n == place else 0 for n in range(6)]]
        assert not ends.any()
