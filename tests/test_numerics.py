"""How exact merges are: divergences of ordinary and odd columns; ranks, decisions and entries of whole WIDEN merges."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, localcontext
from fractions import Fraction
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks import accuracy
from mergecore import ops, statistics
from mergecore.methods.base import Moments, Statistics
from mergecore.topsets import Part
from tests import oracle

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass
class MatrixReads:
    """A matrix as the pass over its moments reads it, in windows that are cut anywhere."""

    tensors: Sequence[Tensor]
    cuts: Sequence[int] = ()
    reads: list[str] = field(default_factory=list)
    device = torch.device("cpu")

    def matrix(self, number: int) -> Iterator[Part]:
        self.reads.append("planned")
        rows, columns = self.tensors[0].shape
        for first, last in itertools.pairwise([0, *sorted({cut for cut in self.cuts if 0 < cut < rows}), rows]):
            base, *models = (tensor[first:last].contiguous() for tensor in self.tensors)
            yield Part(number * rows * columns + first * columns, base, models)

    def matrix_again(self, number: int) -> Iterator[Part]:
        yield from self.matrix(number)
        self.reads[-1] = "further"

    def nonfinite(self) -> None:
        raise AssertionError("the inputs are finite")


def read(reads: MatrixReads, drops: Sequence[ops.Drop] = (), orientation: str = "columns") -> Moments:
    rows, columns = reads.tensors[0].shape
    models = reads.tensors[1:]
    about = {"models": models, "orientation": orientation, "rows": rows, "columns": columns}
    job = cast(Any, SimpleNamespace(statistics=Statistics.COLUMNS, **about))
    found: Moments = statistics.of_matrix(job, 0, cast(Any, reads), drops)["moments"]
    return found


def moments(base: Tensor, models: Sequence[Tensor]) -> Moments:
    return read(MatrixReads([base, *models]))


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def assert_ranked_right(base: Tensor, models: Sequence[Tensor]) -> None:
    """Both divergences rank as in exact arithmetic, ties included."""
    magnitudes, directions = oracle.divergences(oracle.floats(base), [oracle.floats(model) for model in models])
    found = moments(base, models)
    for divergence, exact in ((found.magnitude_divergence(), magnitudes), (found.direction_divergence(), directions)):
        wanted = [[float(place) for place in oracle.ranks(row, "stable")] for row in exact]
        assert ops.rank(divergence).tolist() == wanted


# Divergences --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("delta_std", [1e-6, 3e-5, 3e-4, 4e-3, 2e-2])
@pytest.mark.parametrize("rows", [2, 16, 300])
def test_ordinary_columns_rank_as_in_exact_arithmetic(rows: int, delta_std: float, dtype: torch.dtype) -> None:
    base = normal(1, rows, 250, scale=0.02).to(dtype)
    models = [(base.float() + normal(seed, rows, 250, scale=delta_std)).to(dtype) for seed in (2, 3)]
    assert_ranked_right(base, models)


@pytest.mark.parametrize("rows", [64, 1000])
def test_no_ordinary_delta_counts_as_parallel(rows: int) -> None:
    for delta_std in (1e-6, 3e-5, 3e-4, 4e-3):
        base = normal(4, rows, 500, scale=0.02)
        found = moments(base, [base + normal(5, rows, 500, scale=delta_std)])
        numerator = found.dd - found.magnitude_divergence() ** 2
        assert bool((numerator > 1000 * 2.0**-40 * found.dd).all())


@pytest.mark.parametrize("rows", [1, 2, 65, 20_000])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_parallel_and_opposite_columns_have_divergence_0_and_2(dtype: torch.dtype, rows: int) -> None:
    """Equal divergences rank in index order: rounding noise must not tell them apart."""
    factors = torch.tensor([1.5, -1.0, 3.0, -0.25, 1.0, -7.0, 129 / 128, 1e-3]).repeat(25 if rows < 1000 else 2)
    base, factors = normal(6, rows, len(factors), scale=0.02).to(BF16), factors.to(BF16)
    base = base.to(dtype)
    model = base.float() * factors  # exact
    found = moments(base, [model]).direction_divergence()[0]
    assert found.tolist() == [0.0 if factor > 0 else 2.0 for factor in factors.tolist()]
    assert_ranked_right(base, [model])


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_the_columns_of_a_single_row_are_parallel_or_opposite(dtype: torch.dtype) -> None:
    """A score head has one row; its entries may differ by any factor and change their signs."""
    base = normal(7, 1, 2000, scale=0.02).to(dtype)
    models = [normal(seed, 1, 2000, scale=0.02).to(dtype) for seed in (8, 9)]
    base[0, :5], models[0][0, 3:9] = 0.0, 0.0
    found = moments(base, models).direction_divergence()
    for row, model in zip(found, models, strict=True):
        product = base[0].double() * model[0].double()
        wanted = torch.where(product == 0, (base[0] != model[0]).double(), 1 - product.sign())
        assert row.tolist() == wanted.tolist()
    assert_ranked_right(base, models)


def test_zero_columns_have_divergence_0_beside_zeros_and_1_beside_others() -> None:
    base, model = normal(10, 5, 3), normal(11, 5, 3)
    base[:, :2], model[:, 1:] = 0.0, 0.0
    found = moments(base, [model])
    assert found.direction_divergence().tolist() == [[1.0, 0.0, 1.0]]
    assert found.magnitude_divergence()[0, 1] == 0.0
    assert bool(found.magnitude_divergence().isfinite().all())


@pytest.mark.parametrize("exponent", [10, 20, 30, 38, 44, 100])
@pytest.mark.parametrize("base_vanishes", [True, False])
def test_a_vanishing_column_is_judged_as_well_as_float64_can_and_then_as_zero(
    exponent: int, base_vanishes: bool
) -> None:
    """Dead columns decay to almost nothing: their direction gets lost bit by bit, and counts as none in the end."""
    base, model = normal(12, 64, 100, scale=0.02), normal(13, 64, 100, scale=0.02)
    tiny = base if base_vanishes else model
    tiny *= 2.0**-exponent
    found = moments(base, [model]).direction_divergence()[0]
    if exponent > 42:
        assert found.tolist() == [1.0] * 100
        return
    _, (exact,) = oracle.divergences(oracle.floats(base), [oracle.floats(model)])
    for value, right in zip(found.tolist(), exact, strict=True):
        assert abs(value - float(right)) <= 2.0 ** (exponent - 48)


def test_equal_columns_are_ties() -> None:
    """Also where one is the other times a power of two."""
    base, model = normal(14, 100, 40), normal(15, 100, 40)
    for scale in (1.0, 4.0, 2.0**-20):
        both = [torch.cat([tensor, tensor * scale], 1) for tensor in (base, model)]
        directions = moments(both[0], [both[1]]).direction_divergence()[0]
        assert torch.equal(directions[:40], directions[40:])


@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 3, 70]),
    seed=st.integers(0, 2**32),
    spread=st.integers(0, 30),
    nearly=st.sampled_from([None, 1.0, 2.0, -1.0, -3.0]),
    noise=st.integers(-40, 0),
)
def test_divergences_of_odd_columns_are_as_exact_as_their_deltas_allow(
    rows: int, seed: int, spread: int, nearly: float | None, noise: int
) -> None:
    """Entries of many magnitudes, columns nearly parallel or opposite: errors are 2**-40 of d.d at most."""
    random = torch.Generator().manual_seed(seed)
    base, other = (
        torch.randn(rows, 30, generator=random) * torch.exp2(torch.randint(-spread, 1, (rows, 30), generator=random))
        for _ in range(2)
    )
    assert_as_exact_as_deltas_allow(base, other if nearly is None else base * nearly + other * 2.0**noise)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 3, 70]),
    seed=st.integers(0, 2**32),
    near=st.sampled_from(["base", "opposite", "flipped", "zero", "zero base"]),
    exponent=st.integers(-45, -1),
)
def test_divergences_of_columns_near_the_base_its_opposite_or_zero_are_as_exact(
    rows: int, seed: int, near: str, exponent: int
) -> None:
    """Where |x| - |a|, x or a is small beside the terms that are added up. `flipped`: a with some signs changed."""
    random = torch.Generator().manual_seed(seed)
    base, other = torch.randn(2, rows, 30, generator=random).unbind()
    signs = torch.randint(0, 2, (rows, 30), generator=random) * 2.0 - 1.0
    noise = other * 2.0**exponent
    if near == "zero base":
        assert_as_exact_as_deltas_allow(noise, base)
    else:
        start = {"base": base, "opposite": -base, "flipped": base * signs, "zero": torch.zeros_like(base)}[near]
        assert_as_exact_as_deltas_allow(base, start + noise)


def assert_as_exact_as_deltas_allow(base: Tensor, model: Tensor) -> None:
    """Of up to 70 rows: in lengths to 2^-48 of |d|; in directions to 2^-47 of d.d / (2 |x| |a|), where what is within
    2^-40 of that from parallel or opposite may count as such."""
    found = moments(base, [model])
    (magnitudes,), (directions,) = oracle.divergences(oracle.floats(base), [oracle.floats(model)])
    a, x = oracle.floats(base), oracle.floats(model)
    aa, ax, xx = oracle.column_dots(a, a), oracle.column_dots(a, x), oracle.column_dots(x, x)
    for j in range(base.shape[1]):
        dd = aa[j] - 2 * ax[j] + xx[j]
        with localcontext() as context:
            context.prec = 60
            length, product = root(dd), root(aa[j]) * root(xx[j])
            assert abs(Decimal(found.magnitude_divergence()[0, j].item()) - magnitudes[j]) <= length / 2**48
            error = abs(Decimal(found.direction_divergence()[0, j].item()) - directions[j])
            if 4 * product > length**2 / 2**38:
                assert error <= length**2 / (2 * product) / 2**40 * Decimal("1.001")
                if min(directions[j], 2 - directions[j]) > max(length**2 / product / 2**40, Decimal("1e-3")):
                    assert error <= length**2 / (2 * product) / 2**47 + Decimal(2) ** -50


@pytest.mark.parametrize("orientation", ["columns", "rows"])
@pytest.mark.parametrize("dropped", [False, True])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), exponent=st.integers(3, 30), cuts=st.lists(st.integers(1, 600), max_size=4))
def test_short_columns_are_summed_themselves(
    orientation: str, dropped: bool, seed: int, exponent: int, cuts: list[int]
) -> None:
    """Columns of one model are `exponent` binades shorter than the base's, after what is dropped of the deltas; the
    first column is not."""
    random = torch.Generator().manual_seed(seed)
    base, short, other = torch.randn(3, 600, 3, generator=random).to(BF16).unbind()
    base[::7] *= 2.0**-exponent
    short[:, 1:] *= 2.0**-exponent
    drops = [ops.Drop(0, 0, 1.0), ops.Drop(0, 0, 1.0, least=0.11)] if dropped else []
    tensors = [base, other, short]
    if orientation == "rows":
        tensors, cuts = [tensor.T.contiguous() for tensor in tensors], [cut % 3 for cut in cuts]
    reads = MatrixReads(tensors, cuts)
    found = read(reads, drops, orientation)
    whole = read(MatrixReads(tensors), drops, orientation)
    assert torch.equal(oracle.bits(found.xx), oracle.bits(whole.xx))
    a, *models = map(oracle.floats, (base, other, short))
    least = (0.0, 0.11 if dropped else 0.0)
    kept = [np.abs(model - a) > least[n] for n, model in enumerate(models)]
    for n, model in enumerate(models):
        x = np.where(kept[n], model, a)
        for value, exact in zip(found.xx[n].tolist(), oracle.column_dots(x, x), strict=True):
            assert abs(Fraction(value) - exact) <= exact / 2**42
    assert reads.reads == (["planned", "further"] if bool(whole.vanishing.any()) else ["planned"])
    assert exponent < 6 or len(reads.reads) == 2


def test_ordinary_columns_are_read_once() -> None:
    base = normal(16, 64, 100, scale=0.02)
    for model in (base, -base, base + normal(17, 64, 100, scale=0.02), normal(18, 64, 100, scale=0.02), 4 * base):
        reads = MatrixReads([base, model])
        read(reads)
        assert reads.reads == ["planned"]


def root(value: Fraction) -> Decimal:
    return (Decimal(value.numerator) / Decimal(value.denominator)).sqrt()


# Whole merges -------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta_std", accuracy.DELTA_STDS)
def test_every_rank_decision_and_entry_of_widen_is_right(delta_std: float) -> None:
    """bf16, further pre-trained and fine-tuned models: what benchmarks/accuracy.py prints."""
    scores = accuracy.measure(delta_std, hidden=128, layers=2, vocabulary=1024)
    ours = scores["mergecore"]
    assert ours.ranks > 10_000
    assert ours.decisions > ours.ranks
    assert ours.wrong_ranks == 0
    assert ours.wrong_decisions == 0
    assert ours.entries > 400_000
    assert ours.wrong_entries < ours.entries / 100_000
    assert ours.largest_ulps <= 1
    assert scores["float32"].wrong_ranks > 0  # the measure sees what whole-tensor float32 gets wrong
    assert scores["float32"].wrong_entries > 0
