"""Selection methods: exact top sets, random masks, sign election, held against NumPy oracles of their definitions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mergecore
from mergecore import merging, ops, selecting, topsets
from mergecore.errors import NonFiniteError, SpecError
from mergecore.methods.base import Keep
from mergecore.ops import Drop, Elect, Measure, Place
from mergecore.planning import MergePlan
from mergecore.selecting import choose
from mergecore.topsets import Part
from tests import oracle
from tests.kernel_inputs import threads
from tests.test_methods import merge

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
few = settings(max_examples=40, deadline=None)

# The definitions, in NumPy ------------------------------------------------------------------------


def share(fraction: float, count: int) -> int:
    """round-half-up(fraction * count) of the decimal text."""
    return math.floor(Fraction(str(fraction)) * count + Fraction(1, 2))


def top(magnitudes: oracle.Floats, count: int) -> oracle.Bools:
    """The `count` largest entries; equal ones in index order."""
    flat = magnitudes.reshape(-1)
    mask = np.zeros(flat.size, bool)
    mask[np.lexsort((np.arange(flat.size), -flat))[:count]] = True
    return mask.reshape(magnitudes.shape)


def trimmed(delta: oracle.Floats, density: float, gamma: float = 0.0) -> oracle.Bools:
    """The `density` share of the largest after the `gamma` share of outliers, or all."""
    if density >= 1:
        return np.ones(delta.shape, bool)
    if density <= 0:
        return np.zeros(delta.shape, bool)
    kept = max(1, share(density, delta.size))
    outliers = min(share(gamma, delta.size), delta.size - kept)
    return top(np.abs(delta), outliers + kept) & ~top(np.abs(delta), outliers)


def elected(
    base: oracle.Floats,
    values: Sequence[oracle.Longs],
    weights: Sequence[float],
    *,
    scale: float = 1.0,
    elect: str = "weighted",
    normalize: bool = True,
) -> oracle.Exact:
    """base + scale * the (mean or) sum of the values whose sign is that of the weighted or plain sum."""
    terms: list[Any] = [np.longdouble(w) * v for w, v in zip(weights, values, strict=True)]
    mixed: Any
    divisor: Any
    size: Any
    if elect == "none":
        mixed, divisor = sum(terms), np.longdouble(math.fsum(weights))
        agreeing = np.abs(np.stack(terms)).sum(axis=0)
    else:
        sided: list[Any] = terms if elect == "weighted" else list(values)
        total: Any = sum(sided)
        size = sum(np.abs(side) for side in sided)
        sign = np.where(total < -np.ldexp(size, -40), -1, 1)
        agree = [side * sign > 0 for side in sided]
        mixed = sum(np.where(a, term, 0) for a, term in zip(agree, terms, strict=True))
        agreeing = np.abs(np.stack(terms)).sum(axis=0)
        divisor = sum(np.where(a, np.longdouble(w), 0) for a, w in zip(agree, weights, strict=True))
        size = sum(np.where(a, np.abs(np.longdouble(w)), 0) for a, w in zip(agree, weights, strict=True))
        divisor = np.where(np.abs(divisor) <= np.ldexp(size, -40), 0, divisor)
    if normalize:
        divisor = np.where(divisor == 0, np.longdouble(1), divisor)
        mixed, agreeing = mixed / divisor, agreeing / np.abs(divisor)
    start = base.astype(np.longdouble)
    return oracle.Exact(start + np.longdouble(scale) * mixed, np.abs(start) + abs(scale) * agreeing)


def deltas_of(base: Tensor, models: Sequence[Tensor]) -> list[oracle.Floats]:
    return [oracle.floats(model) - oracle.floats(base) for model in models]


def spread(deltas: Sequence[oracle.Floats]) -> oracle.Floats:
    """Standard deviation over models, exactly 0 where all are equal, to 40 bits."""
    stacked = np.stack(deltas).astype(np.longdouble)
    found = stacked.std(axis=0)
    found = np.where(np.ptp(stacked, axis=0) == 0, np.longdouble(0), found)
    _, exponent = np.frexp(found)
    return np.ldexp(np.rint(np.ldexp(found, 40 - exponent)), exponent - 40).astype(np.float64)


def assert_right(found: Tensor, exact: oracle.Exact, name: str) -> None:
    wrong = exact.wrong(found)
    assert not wrong.any(), f"{name}: {wrong.sum()} of {wrong.size} entries are not the exact result rounded"


# Tensors in memory --------------------------------------------------------------------------------


@dataclass
class InMemory:
    """A tensor as choose() reads it, in windows that are cut anywhere."""

    base: Tensor
    models: Sequence[Tensor]
    cuts: tuple[int, ...] = ()
    block: int = 8
    reads: int = 0
    skipped: int = 0
    device = torch.device("cpu")

    @property
    def entries(self) -> int:
        return self.base.numel()

    def part(self, first: int, last: int) -> Part:
        flat = [tensor.reshape(-1, 1)[first:last] for tensor in (self.base, *self.models)]
        return Part(first, flat[0], flat[1:])

    def planned(self) -> Iterator[Part]:
        self.reads += 1
        yield from self.further()

    def skip(self) -> None:
        self.skipped += 1

    def further(self) -> Iterator[Part]:
        places = [0, *sorted({cut for cut in self.cuts if 0 < cut < self.entries}), self.entries]
        for first, last in itertools.pairwise(places):
            yield self.part(first, last)

    def spots(self) -> Iterator[Part]:
        length = min(self.block, self.entries)
        for n in range(4):
            yield self.only(n * (self.entries - length) // 3, length)

    def only(self, first_entry: int, entries: int) -> Part:
        return self.part(first_entry, first_entry + entries)

    def nonfinite(self) -> None:
        raise AssertionError("the inputs are finite")


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


@contextmanager
def room_for(entries: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topsets, "ROOM", entries)
        yield


def mask_of(drop: Drop, magnitudes: oracle.Floats) -> oracle.Bools:
    """What a Drop without randomness keeps, entry by entry."""
    flat, index = magnitudes.reshape(-1), np.arange(magnitudes.size)
    small = (flat < drop.least) | ((flat == drop.least) & (index >= drop.least_before))
    large = (flat > drop.most) | ((flat == drop.most) & (index < drop.most_before))
    return (~small & ~large).reshape(magnitudes.shape)


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


# Methods ------------------------------------------------------------------------------------------

SHAPES = {
    "model.embed_tokens.weight": (40, 24),
    "model.layers.0.input_layernorm.weight": (24,),
    "model.layers.0.mlp.up_proj.weight": (70, 24),
    "model.layers.1.mlp.experts.gate_up_proj": (3, 20, 24),
    "model.logit_scale": (),
}


def checkpoints(count: int, seed: int, *dtypes: torch.dtype) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A base and models, of which every second has many zero deltas."""
    random = torch.Generator().manual_seed(seed)
    base = {name: (torch.randn(shape, generator=random) * 0.02).to(dtypes[0]) for name, shape in SHAPES.items()}
    models: list[dict[str, Tensor]] = []
    for n in range(count):
        model = {}
        for name, start in base.items():
            delta = torch.randn(start.shape, generator=random) * (3e-3, 1e-3)[n % 2]
            if n % 2:
                delta = delta * (torch.rand(start.shape, generator=random) < 0.4)
            model[name] = (start.float() + delta).to(dtypes[(n + 1) % len(dtypes)])
        models.append(model)
    return base, models


DETERMINISTIC: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ties": ({"merge_method": "ties", "parameters": {"density": 0.3, "lambda": 0.8}}, {"scale": 0.8}),
    "ties, unweighted": (
        {"merge_method": "ties", "parameters": {"density": 0.3, "elect": "unweighted"}},
        {"elect": "unweighted"},
    ),
    "ties, sum": ({"merge_method": "ties", "parameters": {"density": 0.3, "normalize": False}}, {"normalize": False}),
    "breadcrumbs": (
        {"merge_method": "breadcrumbs", "parameters": {"density": 0.3, "gamma": 0.05}},
        {"elect": "none", "normalize": False},
    ),
    "breadcrumbs_ties": (
        {"merge_method": "breadcrumbs_ties", "parameters": {"density": 0.3, "gamma": 0.05}},
        {"normalize": False},
    ),
    "magnitude in front": (
        {
            "merge_method": "task_arithmetic",
            "parameters": {"lambda": 0.5},
            "sparsify": {"method": "magnitude", "density": 0.3},
        },
        {"elect": "none", "normalize": False, "scale": 0.5},
    ),
}


@pytest.mark.parametrize("case", DETERMINISTIC)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_trimming_methods_are_their_definition(case: str, count: int) -> None:
    spec, how = DETERMINISTIC[case]
    base, models = checkpoints(count, 5, BF16, F16, F32, BF16)
    weights = [0.5, 0.3, 1.0, 0.25, 2.0][:count]
    found = merge(base, models, each=[{"weight": weight} for weight in weights], dtype="float32", **spec)
    gamma = spec.get("parameters", {}).get("gamma", 0.0)
    for name, start in base.items():
        deltas = deltas_of(start, [model[name] for model in models])
        values = [np.where(trimmed(delta, 0.3, gamma), delta, 0).astype(np.longdouble) for delta in deltas]
        assert_right(found[name], elected(oracle.floats(start), values, weights, **how), name)


@pytest.mark.parametrize("rescale", ["l1", "probability", None])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_is_its_definition(method: str, rescale: str | None) -> None:
    base, models = checkpoints(3, 6, BF16, BF16)
    more = {"rescale": False} if rescale is None else {"rescale_norm": rescale}
    each = [{"density": density} for density in (0.9, 0.25, 1.0)]
    found = merge(base, models, each=each, merge_method=method, seed=9, dtype="float32", parameters=more)
    for name, start in base.items():
        values = []
        for n, (delta, density) in enumerate(
            zip(deltas_of(start, [model[name] for model in models]), (0.9, 0.25, 1.0), strict=True)
        ):
            drop = Drop.of(float(1 - Fraction(str(density))), True, seed=9, tensor=name, model=n, purpose="kept")
            numbers = np.array(oracle.random_numbers(drop.key, range(delta.size)), dtype=np.uint64)
            kept = np.where(numbers.reshape(delta.shape) >= drop.threshold, delta, 0).astype(np.longdouble)
            factor: Any = 1.0
            if rescale == "probability":
                factor = np.longdouble(1) / np.longdouble(str(density))
            elif rescale == "l1" and np.abs(kept).sum() > 0:
                factor = np.abs(delta.astype(np.longdouble)).sum() / np.abs(kept).sum()
            values.append(factor * kept)
        elect = "none" if method == "dare_linear" else "weighted"
        exact = elected(oracle.floats(start), values, [1.0] * 3, elect=elect, normalize=False)
        assert_right(found[name], exact, name)


def test_sce_is_its_definition() -> None:
    base, models = checkpoints(3, 7, F32, F32)
    for topk in (1.0, 0.2):
        found = merge(base, models, merge_method="sce", parameters={"select_topk": topk})
        for name, start in base.items():
            deltas = deltas_of(start, [model[name] for model in models])
            varies = spread(deltas)
            mask = np.ones(varies.shape, bool)
            if topk < 1:
                mask = top(varies, max(1, share(topk, int(np.count_nonzero(varies)))))
            values = [np.where(mask, delta, 0).astype(np.longdouble) for delta in deltas]
            squares = [float((value * value).mean()) for value in values]
            weights = [square / sum(squares) if sum(squares) else 1 / 3 for square in squares]
            assert_right(found[name], elected(oracle.floats(start), values, weights, elect="unweighted"), name)


def test_models_that_are_equal_have_no_varied_entries() -> None:
    base, models = checkpoints(1, 8, F32, F32)
    kept = merge(base, models * 3, merge_method="sce", parameters={"select_topk": 0.5})
    for name, tensor in base.items():
        assert torch.equal(kept[name], tensor)


# Properties ---------------------------------------------------------------------------------------

METHODS = ("ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "sce")
SOME: Mapping[str, Mapping[str, Any]] = {
    **{method: {"density": 0.4} for method in METHODS},
    "sce": {"select_topk": 0.4},
}


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("method", METHODS)
def test_copies_of_the_base_give_the_base_bit_for_bit(method: str, dtype: torch.dtype) -> None:
    base, _ = checkpoints(1, 1, dtype, dtype)
    base["model.layers.0.input_layernorm.weight"][:3] = torch.tensor([-0.0, 0.0, -1.0])
    found = merge(base, [base] * 3, merge_method=method, parameters=SOME[method])
    for name, tensor in base.items():
        assert torch.equal(oracle.bits(found[name]), oracle.bits(tensor)), name


@pytest.mark.parametrize("method", ["dare_linear", "breadcrumbs", "della_linear"])
def test_density_1_is_task_arithmetic_bit_for_bit(method: str) -> None:
    base, models = checkpoints(3, 2, BF16, F32, BF16)
    each = [{"weight": weight} for weight in (0.3, 0.7, -0.1)]
    more: dict[str, Any] = {"dtype": "float32", "each": each, "parameters": {"lambda": 0.9}}
    dense = merge(base, models, merge_method="task_arithmetic", **more)
    found = merge(base, models, merge_method=method, **more)
    for name in base:
        assert torch.equal(found[name], dense[name]), name


@pytest.mark.parametrize("method", ["ties", "dare_ties", "breadcrumbs_ties", "della"])
def test_density_1_only_elects(method: str) -> None:
    base, models = checkpoints(3, 2, BF16, F32, BF16)
    found = merge(base, models, merge_method=method, dtype="float32", parameters={"normalize": True})
    for name, start in base.items():
        values = [d.astype(np.longdouble) for d in deltas_of(start, [model[name] for model in models])]
        assert_right(found[name], elected(oracle.floats(start), values, [1.0] * 3), name)


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties", "sce"])
def test_the_order_of_models_changes_no_bit(method: str) -> None:
    base, models = checkpoints(3, 4, BF16, BF16)
    first = merge(base, models, merge_method=method, parameters=SOME[method], dtype="bfloat16")
    for order in ((1, 2, 0), (2, 1, 0)):
        other = merge(base, [models[n] for n in order], merge_method=method, parameters=SOME[method], dtype="bfloat16")
        for name in base:
            assert torch.equal(first[name], other[name]), name


@pytest.mark.parametrize("density", [0.1, 0.123, 0.5])
def test_exactly_the_promised_share_is_kept(density: float) -> None:
    base, models = checkpoints(1, 3, F32, F32)
    found = merge(base, models, merge_method="ties", parameters={"density": density})
    for name, start in base.items():
        assert int((found[name] != start).sum()) == max(1, share(density, start.numel())), name


def test_a_gamma_that_rounds_to_nothing_drops_no_outlier() -> None:
    base, models = checkpoints(1, 3, F32, F32)
    found = merge(base, models, merge_method="breadcrumbs", parameters={"density": 0.5, "gamma": 1e-6})
    ties = merge(base, models, merge_method="ties", parameters={"density": 0.5})
    for name in base:
        assert torch.equal(found[name], ties[name]), name


@pytest.mark.parametrize(
    "sparsify", [None, {"method": "dare", "drop_rate": 0.2}, {"method": "breadcrumbs", "density": 0.5}]
)
@pytest.mark.parametrize("method", [*METHODS, "widen", "linear"])
def test_windows_change_no_byte(method: str, sparsify: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(11)
    base = {"a.weight": torch.randn(130, 90, generator=random).to(BF16), "b": torch.randn(9001, generator=random)}
    models = [
        {name: (t.float() + 0.01 * torch.randn(t.shape, generator=random)).to(t.dtype) for name, t in base.items()}
        for _ in range(2)
    ]
    spec: dict[str, Any] = {"merge_method": method, "parameters": dict(SOME.get(method, {}))}
    if "density" in spec["parameters"]:
        spec["parameters"]["rescale"] = True
        if "dare" in method or "della" in method:
            spec["parameters"]["rescale_norm"] = "l1"
    if sparsify is not None:
        spec["sparsify"] = sparsify
    whole = merge(base, models, **spec)

    def small_windows(*arguments: Any, **options: Any) -> MergePlan:
        planned = mergecore.plan(*arguments, **options)
        jobs = [replace(job, window_rows=min(job.rows, job.block_rows), keep=False) for job in planned.jobs]
        return replace(planned, jobs=tuple(jobs))

    monkeypatch.setattr(merging, "plan", small_windows)
    monkeypatch.setattr(topsets, "ROOM", 8)
    monkeypatch.setattr(selecting, "RANK_BYTES", 1 << 16)
    cut = merge(base, models, **spec, run={"threads": 2})
    for name in base:
        assert torch.equal(oracle.bits(whole[name]), oracle.bits(cut[name])), name


DELLA = {"method": "della", "density": 0.4}


@pytest.mark.parametrize(
    "spec",
    [
        {"merge_method": "dare_linear", "parameters": {"density": 0.4}},
        {"merge_method": "della_linear", "parameters": {"density": 0.4}},
        {"merge_method": "task_arithmetic", "sparsify": DELLA},
    ],
    ids=["dare", "della", "della in front"],
)
def test_random_methods_keep_share_and_mean(spec: dict[str, Any]) -> None:
    """Within 4 sigma: the kept share, the mean of kept and rescaled deltas, and their mean square."""
    n, density = 200_000, 0.4
    base = {"w": torch.zeros(400, 500)}
    random = torch.Generator().manual_seed(1)
    model = {"w": 1.0 + torch.stack([torch.randperm(500, generator=random) for _ in range(400)]) / 500}
    kept = merge(base, [model], **spec, seed=3)["w"].double()
    delta = model["w"].double()
    odds = torch.full_like(delta, density)
    if spec["merge_method"] != "dare_linear":
        odds = density - 0.15 + 0.3 * delta.argsort(dim=1).argsort(dim=1) / 499
    sigma = (odds * (1 - odds)).sum().sqrt()
    assert abs((kept != 0).sum() - density * n) < 4 * sigma
    variance = (delta**2 * (1 / odds - 1)).sum()
    assert abs(kept.sum() - delta.sum()) < 4 * variance.sqrt()
    squares = delta**2 / odds
    assert abs((kept**2).sum() - squares.sum()) < 4 * (squares**2 * (1 / odds - 1)).sum().sqrt()
    hits = torch.where(kept != 0, kept * odds / delta, torch.ones_like(kept))
    assert torch.allclose(hits, torch.ones_like(hits), atol=1e-5)


@pytest.mark.parametrize("memory", [40 << 20, 1 << 30])
@pytest.mark.parametrize(
    "method", ["widen", "linear", "slerp", "karcher", "model_stock", "ties", "sce", "della", "consensus_ta", "tsv"]
)
def test_della_in_front_of_a_method_is_the_method_on_thinned_models(method: str, memory: int) -> None:
    base, models = checkpoints(1 if method == "slerp" else 2, 5, F32, BF16)
    spec: dict[str, Any] = {"sparsify": {**DELLA, "rescale": False}, "seed": 4, "dtype": "float32"}
    alone = [[{"weight": float(n == m)} for m in range(len(models))] for n in range(len(models))]
    thinned = [merge(base, models, merge_method="task_arithmetic", each=each, **spec) for each in alone]
    assert any(bool((thinned[0][name] != models[0][name]).any()) for name in base)
    parameters = {"slerp": {"t": 0.3}, "ties": {"density": 0.5}, "della": {"density": 0.7}}.get(method, {})
    found = merge(base, models, merge_method=method, parameters=parameters, run={"memory": memory}, **spec)
    expected = merge(base, thinned, merge_method=method, parameters=parameters, seed=4, dtype="float32")
    for name in base:
        assert torch.equal(found[name], expected[name]), name


def test_models_draw_numbers_of_their_own() -> None:
    base = {"w": torch.zeros(100, 100)}
    model = {"w": torch.ones(100, 100)}
    both = merge(base, [model, model], merge_method="dare_linear", parameters={"density": 0.5})["w"]
    assert {0.0, 2.0, 4.0} == set(both.unique().tolist())
    again = merge(base, [model, model], merge_method="dare_linear", parameters={"density": 0.5})["w"]
    assert torch.equal(both, again)


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"merge_method": "ties", "parameters": {"density": 1.5}}, "density is 1.5; it must be from 0 to 1"),
        ({"merge_method": "della", "parameters": {"density": 0.1}}, "density 0.1 +- epsilon 0.15 must lie"),
        ({"merge_method": "sce", "parameters": {"select_topk": -1}}, "select_topk is -1"),
    ],
)
def test_shares_outside_of_0_to_1_are_refused(spec: dict[str, Any], message: str) -> None:
    base, models = checkpoints(1, 3, F32, F32)
    with pytest.raises(SpecError) as refusal:
        merge(base, models, **spec)
    assert message in str(refusal.value)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_inputs_that_are_not_finite_are_named(method: str, value: float) -> None:
    base, models = checkpoints(2, 3, F32, F32)
    models[1]["model.embed_tokens.weight"][3, 4] = value
    spec: dict[str, Any] = {"merge_method": method, "parameters": SOME[method]}
    with pytest.raises(NonFiniteError, match=r"model\.embed_tokens\.weight holds NaN or Inf"):
        merge(base, models, **spec)
    merge(base, models, on_nonfinite="warn", **spec)
