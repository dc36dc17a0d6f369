"""On a GPU every op gives the bits that it gives on the CPU: same arithmetic, same order, for any window."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergecore import load_spec, merge, merging, ops
from mergecore.device import CudaDevice
from mergecore.features.columns import scaled_sum
from mergecore.ops import Axis, Drop, Elect, Measure, Place
from tests.models import llama, spec_dict, tensor_bytes, write_trio

GPU = torch.device("cuda")
HALF = (torch.bfloat16, torch.float16)
DTYPES = (*HALF, torch.float32)
WINDOWS = (*DTYPES, torch.float64)


def why_not() -> str:
    """Why these tests cannot run here; empty if they can."""
    if not torch.cuda.is_available():
        return "no GPU is visible to torch"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("mergecore::blend", "CUDA"):
        return "the kernels were built without CUDA"
    return ""


pytestmark = pytest.mark.skipif(why_not() != "", reason=f"needs a GPU: {why_not()}")


def assert_same_bits(cpu: Tensor, gpu: Tensor) -> None:
    """Equal bits; NaNs are equal to each other, whatever their payloads."""
    gpu = gpu.cpu()
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[cpu.element_size()]
    same = cpu.view(integers) == gpu.view(integers)
    if cpu.is_floating_point():
        same |= cpu.isnan() & gpu.isnan()
    assert bool(same.all()), f"{int((~same).sum())} of {same.numel()} differ"


def on_gpu(tensor: Tensor, offset: int = 0) -> Tensor:
    """A contiguous copy that starts `offset` elements beyond an aligned address."""
    buffer = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device=GPU)
    view = buffer[offset:].view(tensor.shape)
    view.copy_(tensor)
    return view


@dataclass(frozen=True)
class Matrices:
    """A base and models on the CPU and their copies on the GPU, at a place in a tensor."""

    base: Tensor | None
    models: list[Tensor]
    gpu_base: Tensor | None
    gpu_models: list[Tensor]
    first_row: int
    first_entry: int
    drops: list[Drop]

    @property
    def rows(self) -> int:
        return self.models[0].shape[0]

    @property
    def columns(self) -> int:
        return self.models[0].shape[1]

    @property
    def place(self) -> dict[str, int]:
        return {"first_row": self.first_row, "first_entry": self.first_entry}

    def windows(self, height: int) -> Iterator[tuple[slice, Tensor | None, list[Tensor], dict[str, int]]]:
        """Windows of `height` rows on the GPU: rows, base, models, place."""
        for begin in range(0, self.rows, height):
            rows = slice(begin, min(begin + height, self.rows))
            place = {"first_row": self.first_row + begin, "first_entry": self.first_entry}
            base = None if self.gpu_base is None else self.gpu_base[rows]
            yield rows, base, [model[rows] for model in self.gpu_models], place


def matrices(
    rows: int,
    columns: int,
    dtypes: tuple[torch.dtype, ...],
    *,
    base: bool = True,
    drop_rates: tuple[float, ...] = (),
    first_row: int = 0,
    first_entry: int = 0,
    offset: int = 0,
    seed: int = 0,
    special: bool = False,
) -> Matrices:
    """Random matrices, the base first in `dtypes`; `special` mixes in zeros, infinities and NaNs."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(dtype: torch.dtype) -> Tensor:
        values = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        if special:
            values[torch.rand(values.shape, generator=generator) < 0.05] = -0.0
            for number in (0.0, 1e-40, 3e38, float("inf"), float("nan")):
                values[torch.rand(values.shape, generator=generator) < 0.003] = number
        return values.to(dtype)

    on_cpu = [matrix(dtype) for dtype in dtypes]
    gpu = [on_gpu(tensor, offset) for tensor in on_cpu]
    drops = [Drop.of(rate, True, seed=seed, tensor="t", model=m) for m, rate in enumerate(drop_rates)]
    return Matrices(
        on_cpu[0] if base else None, on_cpu[1:], gpu[0] if base else None, gpu[1:], first_row, first_entry, drops
    )


def check_column_moments(m: Matrices, height: int) -> None:
    shape = (ops.moment_count(len(m.models)), m.columns)
    sums, pending = torch.randn(2, *shape, dtype=torch.float64)
    gpu_sums, gpu_pending = sums.to(GPU), pending.to(GPU)
    ops.column_moments(m.base, m.models, sums, pending, drops=m.drops, **m.place)
    for _, base, models, place in m.windows(height):
        ops.column_moments(base, models, gpu_sums, gpu_pending, drops=m.drops, **place)
    assert_same_bits(sums, gpu_sums)
    assert_same_bits(pending, gpu_pending)


def check_row_moments(m: Matrices, height: int) -> None:
    sums = torch.randn(ops.moment_count(len(m.models)), m.first_row + m.rows + 2, dtype=torch.float64)
    gpu_sums = sums.to(GPU)
    ops.row_moments(m.base, m.models, sums, drops=m.drops, **m.place)
    for _, base, models, place in m.windows(height):
        ops.row_moments(base, models, gpu_sums, drops=m.drops, **place)
    assert_same_bits(sums, gpu_sums)


def check_gradients(m: Matrices, height: int, dtype: torch.dtype) -> None:
    """By columns and by rows, of a gradient of `dtype`."""
    gradient = torch.randn(m.rows, m.columns, dtype=torch.float64).to(dtype)
    gpu_gradient = gradient.to(GPU)
    sums, pending = torch.randn(2, len(m.models), m.columns, dtype=torch.float64).unbind()
    by_row = torch.randn(len(m.models), m.first_row + m.rows + 2, dtype=torch.float64)
    gpu_sums, gpu_pending, gpu_by_row = sums.to(GPU), pending.to(GPU), by_row.to(GPU)
    ops.column_gradient(gradient, m.base, m.models, sums, pending, first_row=m.first_row)
    ops.row_gradient(gradient, m.base, m.models, by_row, first_row=m.first_row)
    for rows, base, models, place in m.windows(height):
        first_row = place["first_row"]
        ops.column_gradient(gpu_gradient[rows], base, models, gpu_sums, gpu_pending, first_row=first_row)
        ops.row_gradient(gpu_gradient[rows], base, models, gpu_by_row, first_row=first_row)
    assert_same_bits(sums, gpu_sums)
    assert_same_bits(pending, gpu_pending)
    assert_same_bits(by_row, gpu_by_row)


def check_scaled_sum(m: Matrices, axis: Axis, dtype: torch.dtype) -> None:
    """W, and the gradient of a loss by the coefficients."""
    width = {Axis.TENSOR: 1, Axis.COLUMNS: m.columns, Axis.ROWS: m.rows}[axis]
    coefficients = torch.randn(len(m.models), width, dtype=torch.float64, requires_grad=True)
    gpu_coefficients = coefficients.detach().to(GPU).requires_grad_()
    gradient = torch.randn(m.rows, m.columns).to(dtype)
    weight = scaled_sum(coefficients, m.models, m.base, dtype=dtype, axis=axis)
    gpu_weight = scaled_sum(gpu_coefficients, m.gpu_models, m.gpu_base, dtype=dtype, axis=axis)
    assert_same_bits(weight.detach(), gpu_weight.detach())
    weight.backward(gradient)
    gpu_weight.backward(gradient.to(GPU))
    assert coefficients.grad is not None
    assert gpu_coefficients.grad is not None
    assert_same_bits(coefficients.grad, gpu_coefficients.grad)


def check_grams(m: Matrices, height: int) -> None:
    """Of the whole window as one tensor, of rows and of columns."""
    pairs = ops.gram_count(len(m.models))
    sums = torch.randn(pairs, 1, dtype=torch.float64)
    gpu_sums = sums.to(GPU)
    ops.gram(sums, m.base, m.models, first_entry=m.first_entry, drops=m.drops)
    ops.gram(gpu_sums, m.gpu_base, m.gpu_models, first_entry=m.first_entry, drops=m.drops)
    assert_same_bits(sums, gpu_sums)
    by_row = torch.randn(pairs, m.first_row + m.rows + 2, dtype=torch.float64)
    by_column, pending = torch.randn(2, pairs, m.columns, dtype=torch.float64).unbind()
    gpu_by_row, gpu_by_column, gpu_pending = by_row.to(GPU), by_column.to(GPU), pending.to(GPU)
    ops.row_gram(by_row, m.base, m.models, drops=m.drops, **m.place)
    ops.column_gram(by_column, pending, m.base, m.models, drops=m.drops, **m.place)
    for _, base, models, place in m.windows(height):
        ops.row_gram(gpu_by_row, base, models, drops=m.drops, **place)
        ops.column_gram(gpu_by_column, gpu_pending, base, models, drops=m.drops, **place)
    assert_same_bits(by_row, gpu_by_row)
    assert_same_bits(by_column, gpu_by_column)
    assert_same_bits(pending, gpu_pending)


def check_blend(m: Matrices, height: int, axis: Axis, out_dtype: torch.dtype, base_coefficient: float = 1.0) -> None:
    width = {Axis.TENSOR: 1, Axis.COLUMNS: m.columns, Axis.ROWS: m.first_row + m.rows}[axis]
    coefficients = torch.randn(len(m.models), width, dtype=torch.float64)
    coefficients[torch.rand(coefficients.shape) < 0.2] = 0.0
    out, counts = torch.empty(m.rows, m.columns, dtype=out_dtype), torch.tensor([3, 5])
    gpu_out, gpu_counts, gpu_coefficients = out.to(GPU), counts.to(GPU), coefficients.to(GPU)
    ops.blend(
        out,
        m.base,
        m.models,
        coefficients,
        counts,
        base_coefficient=base_coefficient,
        axis=axis,
        drops=m.drops,
        **m.place,
    )
    for rows, base, models, place in m.windows(height):
        ops.blend(
            gpu_out[rows],
            base,
            models,
            gpu_coefficients,
            gpu_counts,
            base_coefficient=base_coefficient,
            axis=axis,
            drops=m.drops,
            **place,
        )
    assert_same_bits(out, gpu_out)
    assert counts.tolist() == gpu_counts.tolist()


# Same dtypes take kernels of their own; columns that are no multiple of 8, or windows that are not
# aligned, take single loads.
KINDS = [*((dtype, dtype, dtype) for dtype in WINDOWS), DTYPES, (torch.float32, *HALF, torch.bfloat16), WINDOWS]
SHAPES = [(1, 1), (3, 7), (64, 64), (130, 1000), (257, 4096), (200, 5121)]


@pytest.mark.parametrize("dtypes", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("drops", [False, True], ids=["whole", "dropped"])
class TestEveryKernel:
    def matrices(self, shape: tuple[int, int], dtypes: tuple[torch.dtype, ...], drops: bool) -> Matrices:
        rates = (0.0, *[0.3] * (len(dtypes) - 2)) if drops else ()
        return matrices(*shape, dtypes, drop_rates=rates, first_row=37, first_entry=3 * shape[0] * shape[1])

    def test_column_moments(self, shape: tuple[int, int], dtypes: tuple[torch.dtype, ...], drops: bool) -> None:
        check_column_moments(self.matrices(shape, dtypes, drops), height=100)

    def test_row_moments(self, shape: tuple[int, int], dtypes: tuple[torch.dtype, ...], drops: bool) -> None:
        check_row_moments(self.matrices(shape, dtypes, drops), height=100)

    def test_gradients(self, shape: tuple[int, int], dtypes: tuple[torch.dtype, ...], drops: bool) -> None:
        if drops:
            pytest.skip("gradients are of whole models")
        for dtype in WINDOWS:
            check_gradients(self.matrices(shape, dtypes, drops), 100, dtype)
        for axis in Axis:
            check_scaled_sum(self.matrices(shape, dtypes, drops), axis, torch.float32)

    def test_grams(self, shape: tuple[int, int], dtypes: tuple[torch.dtype, ...], drops: bool) -> None:
        check_grams(self.matrices(shape, dtypes, drops), height=100)

    @pytest.mark.parametrize("axis", list(Axis))
    @pytest.mark.parametrize("out_dtype", WINDOWS, ids=str)
    def test_blend(
        self, shape: tuple[int, int], dtypes: tuple[torch.dtype, ...], drops: bool, axis: Axis, out_dtype: torch.dtype
    ) -> None:
        check_blend(self.matrices(shape, dtypes, drops), 100, axis, out_dtype)


@st.composite
def any_matrices(draw: st.DrawFn) -> Matrices:
    models = draw(st.integers(1, 5))
    base = draw(st.booleans())
    dtype = st.sampled_from(WINDOWS)
    same = draw(st.booleans())
    kinds = (draw(dtype),) * (models + 1) if same else tuple(draw(dtype) for _ in range(models + 1))
    rates = st.lists(st.sampled_from([0.0, 0.1, 0.9]), min_size=models, max_size=models)
    return matrices(
        draw(st.integers(1, 300)),
        draw(st.one_of(st.integers(1, 700), st.integers(1, 90).map(lambda n: 8 * n))),
        kinds,
        base=base,
        drop_rates=tuple(draw(rates)) if base and draw(st.booleans()) else (),
        first_row=draw(st.integers(0, 200)),
        first_entry=draw(st.sampled_from([0, 1, 4, 4096, 2**33 + 3])),
        offset=draw(st.sampled_from([0, 0, 0, 1, 4, 8])),
        seed=draw(st.integers(0, 2**32)),
        special=draw(st.booleans()),
    )


@given(m=any_matrices(), height=st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_moments_of_any_windows(m: Matrices, height: int) -> None:
    check_column_moments(m, height)
    check_row_moments(m, height)


@given(m=any_matrices(), height=st.integers(1, 300), dtype=st.sampled_from(WINDOWS), axis=st.sampled_from(list(Axis)))
@settings(max_examples=60, deadline=None)
def test_gradients_of_any_windows(m: Matrices, height: int, dtype: torch.dtype, axis: Axis) -> None:
    check_gradients(m, height, dtype)
    check_scaled_sum(m, axis, dtype)


@given(m=any_matrices(), height=st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_grams_of_any_windows(m: Matrices, height: int) -> None:
    check_grams(m, height)


@given(
    m=any_matrices(),
    height=st.integers(1, 300),
    axis=st.sampled_from(list(Axis)),
    out_dtype=st.sampled_from(WINDOWS),
    base_coefficient=st.sampled_from([1.0, 0.0, -0.5, 1e38]),
)
@settings(max_examples=100, deadline=None)
def test_blend_of_any_windows(
    m: Matrices, height: int, axis: Axis, out_dtype: torch.dtype, base_coefficient: float
) -> None:
    check_blend(m, height, axis, out_dtype, base_coefficient)


def place_of(m: Matrices, measure: Measure) -> Place:
    """The whole window as the first rows of its tensor, with some scales where the measure takes them."""
    width = {Measure.ROWS: m.rows, Measure.COMPETITION: 2}.get(measure)
    scales = None if width is None else torch.rand(len(m.models), width, dtype=torch.float64)
    return Place(0, m.drops, measure, scales)


def check_selection(m: Matrices, measure: Measure, out_dtype: torch.dtype) -> None:
    """Everything that chooses among deltas; windows of the GPU start where the others do."""
    assert m.base is not None
    assert m.gpu_base is not None
    place = place_of(m, measure)
    gpu_place = replace(place, scales=None if place.scales is None else place.scales.to(GPU))
    count, entries, block = len(m.models), m.rows * m.columns, 4096
    sets = 1 if measure is Measure.SPREAD else count
    gpu = (m.gpu_base, m.gpu_models)

    bins = torch.zeros(sets, 1 << 11, dtype=torch.int64)
    gpu_bins = bins.to(GPU)
    for base, models, histogram, here in ((m.base, m.models, bins, place), (*gpu, gpu_bins, gpu_place)):
        ops.count_magnitudes(base, models, histogram, shift=52, offsets=[0] * sets, clamp=True, place=here)
    assert_same_bits(bins, gpu_bins)

    ranges = [(n, 1020 << 52, 1024 << 52) for n in range(sets)]
    collected = []
    for base, models, here, device in ((m.base, m.models, place, "cpu"), (*gpu, gpu_place, GPU)):
        keys = torch.zeros(sets, entries, dtype=torch.int64, device=device)
        indices, found = torch.zeros_like(keys), torch.zeros(sets, dtype=torch.int64, device=device)
        equal = torch.zeros(sets, -(-entries // block), dtype=torch.int64, device=device)
        ops.collect_magnitudes(base, models, ranges, keys, indices, found, equal, block=block, place=here)
        collected.append((found, equal, indices.sort(dim=1).values, keys.sort(dim=1).values))  # found in any order
    for one, two in zip(*collected, strict=True):
        assert_same_bits(one, two)

    keeps = [Drop(n, 1 << 30, 4 / 3, least=0.2, least_before=entries // 2, most=2.0) for n in range(count)]
    odds = torch.rand(count, entries, dtype=torch.float64) * 0.9 + 0.05
    for chosen in (None, odds):
        gpu_chosen = None if chosen is None else chosen.to(GPU)
        on_cpu: dict[str, Any] = {"keeps": keeps, "place": place}
        on_device: dict[str, Any] = {"keeps": keeps, "place": gpu_place}
        assert_same_bits(
            ops.kept_sums(m.base, m.models, block=block, odds=chosen, **on_cpu),
            ops.kept_sums(*gpu, block=block, odds=gpu_chosen, **on_device),
        )
        assert_same_bits(
            ops.keep_deltas(m.base, m.models, odds=chosen, divide_by_odds=chosen is not None, **on_cpu),
            ops.keep_deltas(*gpu, odds=gpu_chosen, divide_by_odds=chosen is not None, **on_device),
        )
    weights, limits = [0.5 - 0.3 * n for n in range(count)], [0.1 + 0.2 * n for n in range(count)]
    for elect in Elect:
        limited = elect in (Elect.SHARED, Elect.LIMITED)
        for consensus in (0, 1) if count == 1 else (0, 2):
            out, counts = torch.empty(m.rows, m.columns, dtype=out_dtype), torch.tensor([3, 5])
            gpu_out, gpu_counts = out.to(GPU), counts.to(GPU)
            options: dict[str, Any] = {"scale": 0.7, "elect": elect, "normalize": True, "keeps": keeps}
            options |= {"consensus": consensus, "limits": limits if limited or consensus else ()}
            if elect == Elect.WEIGHTED and not consensus:
                options |= {"lowest": [0.25] * count, "steps": [0.5 / m.columns] * count, "divide_by_odds": True}
            ops.elect(out, m.base, m.models, weights, counts, place=place, **options)
            ops.elect(gpu_out, *gpu, weights, gpu_counts, place=gpu_place, **options)
            assert_same_bits(out, gpu_out)
            assert counts.tolist() == gpu_counts.tolist()


def check_of_deltas(m: Matrices) -> None:
    """Magnitudes, counts of shared deltas, and the rows' divergences."""
    assert m.base is not None
    assert m.gpu_base is not None
    place, limits = Place(0, m.drops), [0.1 + 0.2 * n for n in range(len(m.models))]
    assert_same_bits(ops.magnitudes(m.base, m.models, place), ops.magnitudes(m.gpu_base, m.gpu_models, place))
    line = [0.25] * len(m.models), [0.5 / m.columns] * len(m.models)
    assert_same_bits(ops.row_odds(m.base, m.models, *line, place), ops.row_odds(m.gpu_base, m.gpu_models, *line, place))
    counts = torch.ones(len(m.models), 2, dtype=torch.int64)
    gpu_counts = counts.to(GPU)
    ops.count_shared(m.base, m.models, limits, counts, place)
    ops.count_shared(m.gpu_base, m.gpu_models, limits, gpu_counts, place)
    assert_same_bits(counts, gpu_counts)
    out = torch.randn(len(m.models), m.rows + 3, dtype=torch.float64)
    gpu_out = out.to(GPU)
    ops.row_divergences(m.base, m.models, out, replace(place, first_entry=2 * m.columns))
    ops.row_divergences(m.gpu_base, m.gpu_models, gpu_out, replace(place, first_entry=2 * m.columns))
    assert_same_bits(out, gpu_out)


@pytest.mark.parametrize("dtypes", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@pytest.mark.parametrize("drops", [False, True], ids=["whole", "dropped"])
def test_selection(shape: tuple[int, int], dtypes: tuple[torch.dtype, ...], drops: bool) -> None:
    rates = (0.0, *[0.3] * (len(dtypes) - 2)) if drops else ()
    m = matrices(*shape, dtypes, drop_rates=rates)
    for measure, out_dtype in zip(Measure, (*DTYPES, torch.bfloat16), strict=True):
        check_selection(m, measure, out_dtype)
    check_of_deltas(m)


@given(m=any_matrices(), measure=st.sampled_from(list(Measure)), out_dtype=st.sampled_from(DTYPES))
@settings(max_examples=60, deadline=None)
def test_selection_of_any_windows(m: Matrices, measure: Measure, out_dtype: torch.dtype) -> None:
    if m.base is None:
        m = replace(m, base=m.models[0], gpu_base=m.gpu_models[0])
    check_selection(m, measure, out_dtype)
    check_of_deltas(m)


def test_the_greatest_number_of_models() -> None:
    m = matrices(5, 264, (torch.bfloat16,) * 65, drop_rates=(0.5,) * 64, first_row=62)
    check_column_moments(m, height=2)
    check_row_moments(m, height=2)
    check_gradients(m, height=2, dtype=torch.float32)
    check_grams(m, height=2)
    check_blend(m, 2, Axis.COLUMNS, torch.bfloat16)
    check_selection(m, Measure.COMPETITION, torch.bfloat16)


def test_a_large_window() -> None:
    m = matrices(6000, 5120, (torch.bfloat16,) * 3, first_row=1000)
    check_column_moments(m, height=4097)
    check_row_moments(m, height=4097)
    check_gradients(m, height=4097, dtype=torch.float32)
    check_grams(m, height=4097)
    check_blend(m, 4097, Axis.COLUMNS, torch.bfloat16)


def check_rank(values: Tensor) -> None:
    for average in (False, True):
        assert_same_bits(ops.rank(values, average=average), ops.rank(values.to(GPU), average=average))


@pytest.mark.parametrize("count", [0, 1, 2, 255, 256, 5120, 152064])
@pytest.mark.parametrize("kinds", [1, 3, 1000, None], ids=lambda kinds: f"{kinds or 'all different'}")
def test_rank(count: int, kinds: int | None) -> None:
    values = torch.randn(3, count, dtype=torch.float64)
    if kinds is not None:
        values = torch.randn(kinds, dtype=torch.float64)[torch.randint(kinds, (3, count))]
    check_rank(values)


@given(st.lists(st.floats(width=64), min_size=1, max_size=200))
@settings(max_examples=100, deadline=None)
def test_rank_of_many_models(values: list[float]) -> None:
    """As the rows of a matrix are ranked: all at once."""
    check_rank(torch.tensor([values, values[::-1]] * 150, dtype=torch.float64))


@given(st.lists(st.floats(width=64), min_size=1, max_size=200))
@settings(max_examples=100, deadline=None)
def test_rank_of_any_numbers(values: list[float]) -> None:
    check_rank(torch.tensor([values, values[::-1]], dtype=torch.float64))


@given(
    st.integers(1, 6), st.integers(0, 3000), st.integers(0, 2**32), st.sampled_from([1e-3, 1.0, 1e3]), st.floats(-2, 2)
)
@settings(max_examples=60, deadline=None)
def test_calibrated_softmax(models: int, count: int, seed: int, spread: float, s: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(models, count, dtype=torch.float64, generator=generator) * spread
    thresholds = torch.randn(models, dtype=torch.float64, generator=generator) * spread
    thresholds[0] = float("inf")
    cpu = ops.calibrated_softmax(scores, thresholds, divisor=0.37, s=s)
    assert_same_bits(cpu, ops.calibrated_softmax(scores.to(GPU), thresholds.to(GPU), divisor=0.37, s=s))


def test_the_ops_run_on_the_current_stream_without_waiting() -> None:
    """A CUDA graph records the ops: nothing in them waits for the device or allocates past torch's pool."""
    m = matrices(200, 512, (torch.bfloat16,) * 3)
    shape = (ops.moment_count(2), m.columns)
    sums, pending = torch.zeros(2, *shape, dtype=torch.float64, device=GPU)
    out = torch.empty_like(m.gpu_models[0])
    coefficients = torch.ones(2, 1, dtype=torch.float64, device=GPU)
    counts = torch.zeros(2, dtype=torch.int64, device=GPU)
    ranks = torch.empty_like(sums)

    def work() -> None:
        ops.column_moments(m.gpu_base, m.gpu_models, sums, pending)
        torch.ops.mergecore.rank(sums, ranks, True)
        ops.blend(out, m.gpu_base, m.gpu_models, coefficients, counts)

    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        work()  # loads the kernels
    stream.synchronize()
    expected = [tensor.clone() for tensor in (sums, pending, ranks, out)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    for tensor in (sums, pending, ranks, out):
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for tensor, before in zip((sums, pending, ranks, out), expected, strict=True):
        assert_same_bits(before.cpu(), tensor)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_ops_run_on_the_tensors_device() -> None:
    values = torch.randn(2, 999, dtype=torch.float64)
    assert_same_bits(ops.rank(values), ops.rank(values.to("cuda:1")))


def test_a_merge_for_which_the_gpu_has_too_little_memory_goes_on_with_less_and_has_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trio = write_trio(tmp_path / "models", llama(layers=1, hidden=512, vocabulary=20_000))
    spec = spec_dict("ties", *trio, parameters={"density": 0.3, "weight": 1.0})
    merge(load_spec(spec), tmp_path / "cpu", device="cpu")
    torch.cuda.empty_cache()
    for room in (48 << 20, 1 << 20):  # for smaller windows, and for none
        device = CudaDevice(torch.device("cuda", 0), torch.cuda.memory_reserved(GPU) + room)
        monkeypatch.setattr(merging, "open_devices", lambda name, memory, device=device: [device])
        result = merge(load_spec(spec), tmp_path / f"gpu {room}", device="cuda")
        assert any("ran out of memory" in warning for warning in result.warnings)
        assert tensor_bytes(result.output) == tensor_bytes(tmp_path / "cpu")


def test_a_merge_keeps_to_the_memory_that_it_is_given_and_frees_the_rest_for_others(tmp_path: Path) -> None:
    trio = write_trio(tmp_path / "models", llama(layers=1, hidden=512, vocabulary=20_000))
    allowed = 256 << 20
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(GPU)
    merge(load_spec(spec_dict("widen", *trio, run={"device_memory": allowed})), tmp_path / "out", device="cuda")
    assert torch.cuda.max_memory_reserved(GPU) <= allowed
    torch.empty(2 * allowed, dtype=torch.uint8, device=GPU)
