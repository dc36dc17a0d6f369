"""The CPU kernels give equal bits whatever instruction set they are compiled for.

The installed library picks one of several clones of each loop by the processor. Here the same sources are
compiled for one instruction set at a time, without clones, and held against it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergecore import ops
from tests import oracle
from tests.conftest import require_tool

SOURCES = Path(__file__).parent.parent / "csrc" / "cpu"
FLAGS = ["-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Werror"]
VARIANTS = {
    "x86-64 unoptimised": (["-O0", "-march=x86-64"], set()),
    "x86-64": (["-O3", "-march=x86-64"], set()),
    "x86-64-v3": (["-O3", "-march=x86-64-v3"], {"avx2", "fma", "bmi2"}),
    "x86-64-v4": (
        ["-O3", "-march=x86-64-v4", "-mprefer-vector-width=512"],
        {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    ),
}
# All kernels as one C program: structures go by pointer, everything else as it is.
PROGRAM = """
#define MERGECORE_CLONES
#include "../tiles.h"
#include "blend.cpp"
#include "chunk.cpp"
#include "gradient.cpp"
#include "moments.cpp"
#include "narrow.cpp"
#include "quick.cpp"
#include "quick_elect.cpp"
#include "quick_run.cpp"
#include "random.cpp"
#include "scores.cpp"
#include "select.cpp"
#include "elect.cpp"
#include "magnitudes.cpp"
using namespace mergecore;
extern "C" {
void column_moments(const Inputs* in, double* sums, double* pending) {
  TileSums tiles(in->window, moment_count(in->count), sums, pending, 1);
  tiles.run([&](const Tile& tile, double* to) { cpu::column_moments(*in, tile, to); });
}
void row_moments(const Inputs* in, double* sums, int64_t rows) { cpu::row_moments(*in, sums, rows, 0, rows); }
void column_gradient(const Inputs* in, const Matrix* gradient, double* sums, double* pending) {
  TileSums tiles(in->window, in->count, sums, pending, 1);
  tiles.run([&](const Tile& tile, double* to) { cpu::column_gradient(*in, *gradient, tile, to); });
}
void row_gradient(const Inputs* in, const Matrix* gradient, double* sums, int64_t rows) {
  cpu::row_gradient(*in, *gradient, sums, rows, 0, rows);
}
void blend(const Blend* b, int64_t entries, int64_t* counts) { cpu::blend(*b, 0, entries, counts[0], counts[1]); }
void elect(const Inputs* in, const double* numbers, const Drop* keeps, int measure, int how, int consensus,
           double scale, void* out, int64_t entries, int64_t* counts) {
  Kept kept{*in, static_cast<Measure>(measure), numbers, 2, keeps, nullptr, false};
  Election election{kept, static_cast<Elect>(how), true, scale, numbers, numbers, consensus, out, Dtype::bf16};
  cpu::elect(election, 0, entries, counts[0], counts[1]);
}
void count(const Inputs* in, const int64_t* offsets, int64_t bins, int64_t* histogram, int64_t entries) {
  const Kept kept{*in, Measure::own, nullptr, 0, nullptr, nullptr, false};
  cpu::count_magnitudes(kept, 42, offsets, true, bins, histogram, 0, entries);
}
void count_bracketed(const Inputs* in, const int64_t* offsets, int64_t bins, int64_t* histogram, int32_t* ends,
                     int64_t part, int64_t entries) {
  cpu::count_bracketed(*in, 42, offsets, bins, histogram, ends, part, 0, entries);
}
void divergences(const Inputs* in, double* out, int64_t rows) { cpu::row_divergences(*in, out, rows, 0, rows); }
void rank(const double* values, double* ranks, int64_t count, bool average) {
  cpu::rank(values, ranks, count, average);
}
void calibrated_softmax(const double* scores, const double* thresholds, double divisor, double s, double* out,
                        int models, int64_t count) {
  cpu::calibrated_softmax(scores, thresholds, divisor, s, out, models, count, 0, count);
}
}
"""


class Matrix(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("dtype", ctypes.c_int32))

    @classmethod
    def of(cls, tensor: Tensor | None) -> Matrix:
        if tensor is None:
            return cls(None, 0)
        return cls(tensor.data_ptr(), [torch.float32, torch.float16, torch.bfloat16, torch.float64].index(tensor.dtype))


class Drop(ctypes.Structure):
    _fields_ = (
        ("key", ctypes.c_uint64),
        ("threshold", ctypes.c_uint64),
        ("scale", ctypes.c_double),
        ("least", ctypes.c_double),
        ("least_before", ctypes.c_int64),
        ("most", ctypes.c_double),
        ("most_before", ctypes.c_int64),
    )


class Window(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("rows", "columns", "first_row", "first_entry"))


class Inputs(ctypes.Structure):
    _fields_ = (
        ("window", Window),
        ("base", Matrix),
        ("models", ctypes.POINTER(Matrix)),
        ("drops", ctypes.POINTER(Drop)),
        ("count", ctypes.c_int),
    )

    @classmethod
    def of(cls, base: Tensor | None, models: Sequence[Tensor], drops: Sequence[ops.Drop]) -> Inputs:
        matrices = (Matrix * len(models))(*map(Matrix.of, models))
        dropping = (Drop * len(drops))(*(Drop(*dataclasses.astuple(drop)) for drop in drops))
        window = Window(*models[0].shape, 0, 5)
        return cls(window, Matrix.of(base), matrices, dropping if drops else None, len(models))


class Blend(ctypes.Structure):
    _fields_ = (
        ("inputs", Inputs),
        ("axis", ctypes.c_int32),
        ("coefficients", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("base_coefficient", ctypes.c_double),
        ("out", ctypes.c_void_p),
        ("out_dtype", ctypes.c_int32),
    )


def features() -> set[str]:
    """What this processor can do, in the kernel's words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())


@pytest.fixture(scope="module", params=VARIANTS)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    flags, needed = VARIANTS[request.param]
    if platform.machine() != "x86_64":
        pytest.skip("the instruction sets are those of x86-64")
    compiler = require_tool("g++", package="g++")
    if missing := needed - features():
        pytest.skip(f"this processor has no {', '.join(sorted(missing))}")
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "kernels.cpp").write_text(PROGRAM)
    library = folder / "kernels.so"
    command = [compiler, *FLAGS, *flags, "-shared", "-fPIC", "-I", str(SOURCES), "-o", str(library)]
    subprocess.run([*command, str(folder / "kernels.cpp")], check=True)
    return ctypes.CDLL(str(library))


DROPS = (ops.Drop(2**64 - 5, 1 << 31, 2.0), ops.Drop(1, 0, 1.0, 1e-4, 900, 0.5), ops.Drop(9, 1 << 29, 8 / 7))
CASES: dict[str, tuple[torch.dtype | None, tuple[torch.dtype, ...], bool]] = {
    "bf16": (torch.bfloat16, (torch.bfloat16,) * 3, False),
    "mixed": (torch.float32, (torch.float16, torch.bfloat16, torch.float32), False),
    "double": (torch.bfloat16, (torch.float64, torch.float16, torch.float64), False),
    "dropping": (torch.float16, (torch.float32, torch.float16, torch.bfloat16), True),
    "no base": (None, (torch.float16, torch.float32, torch.bfloat16), False),
}
ROWS, COLUMNS = 131, 777


def made(case: str) -> tuple[Tensor | None, list[Tensor], tuple[ops.Drop, ...]]:
    """Entries of many magnitudes, subnormals and infinities among them."""
    base_dtype, dtypes, dropping = CASES[case]
    random = torch.Generator().manual_seed(len(case))
    magnitudes = torch.exp2(torch.randint(-20, 3, (ROWS, COLUMNS), generator=random))
    start = torch.randn(ROWS, COLUMNS, generator=random) * magnitudes
    start[7] *= 2.0**-15
    models = [
        (start + torch.randn(ROWS, COLUMNS, generator=random) * 0.01 * magnitudes).to(dtype).contiguous()
        for dtype in dtypes
    ]
    models[0][:, 500] = 6e4
    models[1][100, 3] = torch.inf
    base = None if base_dtype is None else start.to(base_dtype).contiguous()
    return base, models, DROPS if dropping else ()


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def same(one: Tensor, two: Tensor) -> bool:
    return torch.equal(oracle.bits(one), oracle.bits(two))


@pytest.mark.parametrize("case", CASES)
def test_moments(compiled: ctypes.CDLL, case: str) -> None:
    base, models, drops = made(case)
    inputs = Inputs.of(base, models, drops)
    found, wanted = torch.zeros(2, 2, ops.moment_count(len(models)), COLUMNS, dtype=torch.float64).unbind()
    compiled.column_moments(ctypes.byref(inputs), pointer(found[0]), pointer(found[1]))
    ops.column_moments(base, models, wanted[0], wanted[1], first_entry=5, drops=drops)
    assert same(found, wanted)
    found, wanted = torch.zeros(2, ops.moment_count(len(models)), ROWS, dtype=torch.float64).unbind()
    compiled.row_moments(ctypes.byref(inputs), pointer(found), ctypes.c_int64(ROWS))
    ops.row_moments(base, models, wanted, first_entry=5, drops=drops)
    assert same(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_gradients(compiled: ctypes.CDLL, case: str, dtype: torch.dtype) -> None:
    base, models, _ = made(case)
    inputs = Inputs.of(base, models, ())
    gradient = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2)).to(dtype)
    outer = Matrix.of(gradient)
    found, wanted = torch.zeros(2, 2, 3, COLUMNS, dtype=torch.float64).unbind()
    by_pointer = (ctypes.byref(inputs), ctypes.byref(outer))
    compiled.column_gradient(*by_pointer, pointer(found[0]), pointer(found[1]))
    ops.column_gradient(gradient, base, models, wanted[0], wanted[1])
    assert same(found, wanted)
    found, wanted = torch.zeros(2, 3, ROWS, dtype=torch.float64).unbind()
    compiled.row_gradient(*by_pointer, pointer(found), ctypes.c_int64(ROWS))
    ops.row_gradient(gradient, base, models, wanted)
    assert same(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("axis", ops.Axis)
@pytest.mark.parametrize("case", CASES)
def test_blend(compiled: ctypes.CDLL, case: str, axis: ops.Axis, dtype: torch.dtype) -> None:
    base, models, drops = made(case)
    coefficients = torch.randn(3, COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, wanted = torch.empty(2, ROWS, COLUMNS, dtype=dtype).unbind()
    found_counts, wanted_counts = torch.zeros(2, 2, dtype=torch.int64).unbind()
    blend = Blend(
        Inputs.of(base, models, drops),
        axis,
        pointer(coefficients),
        COLUMNS,
        0.75,
        pointer(found),
        Matrix.of(found).dtype,
    )
    compiled.blend(ctypes.byref(blend), ctypes.c_int64(ROWS * COLUMNS), pointer(found_counts))
    ops.blend(
        wanted, base, models, coefficients, wanted_counts, base_coefficient=0.75, axis=axis, first_entry=5, drops=drops
    )
    assert same(found, wanted)
    assert found_counts.tolist() == wanted_counts.tolist()
    assert wanted_counts[0] > 0  # the rare path was taken too


@pytest.mark.parametrize("how", ops.Elect)
@pytest.mark.parametrize(
    ("case", "few"),  # bits of numbers: those that float32 elections are tried with
    [("bf16", True), ("bf16", False), ("mixed", False), ("dropping", False), ("double", False)],
)
def test_elections(compiled: ctypes.CDLL, case: str, few: bool, how: ops.Elect) -> None:
    base, models, drops = made(case)
    assert base is not None
    numbers = torch.tensor([[0.01, 0.5], [0.02, 0.7], [0.0, 1.0]], dtype=torch.float64)
    if few:
        numbers = torch.tensor([[0.25, 0.5], [0.5, 0.75], [0.25, 1.0]], dtype=torch.float64)
    scale = 0.5 if few else 0.7
    keeps = [ops.Drop(n, 1 << 29, 1.25, least=0.001 * n, least_before=5000, most=2.0) for n in range(3)]
    limits = numbers.flatten()[:3].tolist()
    for measure in (ops.Measure.OWN, ops.Measure.SPREAD, ops.Measure.COMPETITION):
        found, wanted = torch.empty(2, ROWS, COLUMNS, dtype=torch.bfloat16).unbind()
        found_counts, wanted_counts = torch.zeros(2, 2, dtype=torch.int64).unbind()
        consensus = 2 if how in (ops.Elect.NONE, ops.Elect.WEIGHTED) else 0
        given = (Drop * 3)(*(Drop(*dataclasses.astuple(keep)) for keep in keeps))
        compiled.elect(
            ctypes.byref(Inputs.of(base, models, drops)), pointer(numbers), given, measure, how, consensus,
            ctypes.c_double(scale), pointer(found), ctypes.c_int64(ROWS * COLUMNS), pointer(found_counts),
        )  # fmt: skip
        limited = how in (ops.Elect.SHARED, ops.Elect.LIMITED) or consensus
        ops.elect(
            wanted, base, models, limits, wanted_counts, scale=scale, elect=how, normalize=True, keeps=keeps,
            place=ops.Place(5, drops, measure, numbers if measure is ops.Measure.COMPETITION else None),
            limits=limits if limited else (), consensus=consensus,
        )  # fmt: skip
        assert same(found, wanted)
        assert found_counts.tolist() == wanted_counts.tolist()


@pytest.mark.parametrize("case", ["bf16", "mixed", "double"])
def test_divergences(compiled: ctypes.CDLL, case: str) -> None:
    base, models, _ = made(case)
    assert base is not None
    models[0][:, 500] = 2.0
    found, wanted = torch.empty(2, 3, ROWS, dtype=torch.float64).unbind()
    inputs = Inputs.of(base, models, ())
    inputs.window.first_entry = 0
    compiled.divergences(ctypes.byref(inputs), pointer(found), ctypes.c_int64(ROWS))
    ops.row_divergences(base, models, wanted, ops.Place())
    assert same(found, wanted)


def test_scores(compiled: ctypes.CDLL) -> None:
    random = torch.Generator().manual_seed(3)
    values = torch.randn(3, 10_001, dtype=torch.float64, generator=random).round(decimals=3)
    values[0, 5], values[1, 6], values[2, 7] = torch.nan, -torch.inf, -0.0
    for share in (False, True):
        found = torch.empty_like(values)
        for n in range(3):
            compiled.rank(pointer(values[n]), pointer(found[n]), ctypes.c_int64(10_001), ctypes.c_bool(share))
        assert same(found, ops.rank(values, average=share))
    thresholds = torch.tensor([0.5, 0.0, torch.inf], dtype=torch.float64)
    scores = torch.rand(3, 10_001, dtype=torch.float64, generator=random) * 30
    found = torch.empty_like(scores)
    arguments: tuple[Any, ...] = (ctypes.c_double(3.0), ctypes.c_double(0.7), pointer(found), 3, ctypes.c_int64(10_001))
    compiled.calibrated_softmax(pointer(scores), pointer(thresholds), *arguments)
    assert same(found, ops.calibrated_softmax(scores, thresholds, divisor=3.0, s=0.7))


@pytest.mark.parametrize("bins", [7, 1000, 1 << 14])
@pytest.mark.parametrize("case", ["bf16", "mixed"])
def test_counts_of_magnitudes(compiled: ctypes.CDLL, case: str, bins: int) -> None:
    base, models, _ = made(case)
    assert base is not None
    # About 2^-3.
    offsets = [((1020 << 10) - bins // 2) + n for n in range(len(models))]
    found = torch.zeros(len(models), bins, dtype=torch.int64)
    expected = torch.zeros_like(found)
    place = ops.Place(first_entry=5)
    ops.count_magnitudes(base, models, expected, shift=42, offsets=offsets, clamp=True, place=place)
    inputs, numbers = Inputs.of(base, models, ()), (ctypes.c_int64 * len(offsets))(*offsets)
    compiled.count(ctypes.byref(inputs), numbers, ctypes.c_int64(bins), pointer(found), ctypes.c_int64(base.numel()))
    assert int(found.sum()) == len(models) * base.numel()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("bins", [7, 1000])
@pytest.mark.parametrize("case", ["bf16", "mixed", "dropping"])
def test_counts_of_brackets(compiled: ctypes.CDLL, case: str, bins: int) -> None:
    base, models, drops = made(case)
    assert base is not None
    offsets = [((1015 << 10) - bins // 2) + n for n in range(len(models))]
    histograms = torch.zeros(2, len(models), bins, dtype=torch.int64)
    part = 10_000
    ends = torch.zeros(2, len(models), -(-base.numel() // part), bins, dtype=torch.int32)
    ops.count_bracketed(
        base, models, histograms[0], ends[0], shift=42, offsets=offsets, part=part,
        place=ops.Place(first_entry=5, drops=drops),
    )  # fmt: skip
    inputs, numbers = Inputs.of(base, models, drops), (ctypes.c_int64 * len(offsets))(*offsets)
    compiled.count_bracketed(
        ctypes.byref(inputs), numbers, ctypes.c_int64(bins), pointer(histograms[1]), pointer(ends[1]),
        ctypes.c_int64(part), ctypes.c_int64(base.numel()),
    )  # fmt: skip
    assert int(histograms[1].sum()) == len(models) * base.numel()
    assert torch.equal(*histograms)
    assert torch.equal(*ends)
    assert ends.any() or case == "mixed"
