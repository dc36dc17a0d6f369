"""Elections among bf16 are decided in float32 where that is exact: every result has the float64 election's bits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergecore import ops
from mergecore.ops import Drop, Elect, Place
from tests import oracle

BF16 = torch.bfloat16
HOWS = [Elect.NONE, Elect.WEIGHTED, Elect.UNWEIGHTED]
SHAPES = [(1, 1), (3, 64), (5, 63), (1, 700), (9, 200), (2, 1100)]  # blocks of 64 within chunks of 512, and rests


def elected(
    base: Tensor,
    models: list[Tensor],
    weights: Sequence[float],
    *,
    how: Elect,
    normalize: bool = True,
    scale: float = 1.0,
    keeps: Sequence[Drop] = (),
    first: int = 0,
) -> Tensor:
    """The election, after it was held against the one of the same numbers as float32, which is computed in float64."""
    found, wanted = (torch.empty(base.shape, dtype=BF16) for _ in range(2))
    counts = torch.zeros(2, 2, dtype=torch.int64)
    for dtype, out, counted in ((BF16, found, counts[0]), (torch.float32, wanted, counts[1])):
        ops.elect(
            out, base.to(dtype), [model.to(dtype) for model in models], weights, counted, scale=scale, elect=how,
            normalize=normalize, keeps=keeps, place=Place(first),
        )  # fmt: skip
    differ = (oracle.bits(found) != oracle.bits(wanted)).nonzero()
    assert len(differ) == 0, [(found[at], wanted[at], base[at], [m[at] for m in models]) for at in map(tuple, differ)][
        :3
    ]
    assert torch.equal(*counts)
    return found


def numbers(shape: tuple[int, int], size: float, binades: int, random: torch.Generator) -> Tensor:
    """Of any 8 bits, and as much smaller than `size` as `binades` says."""
    binade = torch.randint(0, binades + 1, shape, generator=random)
    signed = 1 - 2 * torch.randint(0, 2, shape, generator=random)
    few = 128 + torch.randint(0, 128, shape, generator=random)
    return (size * signed * few.double() * torch.exp2(-7.0 - binade.double())).to(BF16)


def with_specials(tensors: list[Tensor], values: Sequence[float], random: torch.Generator) -> None:
    for tensor in tensors:
        for value in values:
            tensor[torch.rand(tensor.shape, generator=random) < 0.02] = value


WEIGHTS = st.sampled_from(
    [0.5, 1.0, 0.25, 0.75, 3.0, 0.0, -1.0, -0.5, 2.0**-16, 2.0**-17, 1.0 + 2.0**-20, 0.3, 2.0**14]
)


@settings(max_examples=250, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=st.sampled_from(SHAPES),
    weights=st.lists(WEIGHTS, min_size=1, max_size=5) | st.lists(st.just(1.0), min_size=1, max_size=4),
    how=st.sampled_from(HOWS),
    normalize=st.booleans(),
    scale=st.sampled_from([1.0, 0.5, 4.0, -1.0, 3.0, 0.0, 0.7]),
    kept=st.sampled_from([1.0, 2.0, 1.25, 10 / 9]),
    binades=st.integers(0, 20),
    size=st.sampled_from([2.0**-126, 2.0**-90, 2.0**-70, 1.0, 2.0**60, 2.0**103, 2.0**127]),
    zeros=st.booleans(),
)
@example(0, (9, 200), [1.0, -1.0], Elect.UNWEIGHTED, True, 1.0, 1.0, 4, 1.0, True)
@example(0, (9, 200), [1.0, 1.0, 1.0], Elect.WEIGHTED, True, 1.0, 1.0, 12, 1.0, False)
def test_weights_of_few_bits_and_others(
    seed: int,
    shape: tuple[int, int],
    weights: list[float],
    how: Elect,
    normalize: bool,
    scale: float,
    kept: float,
    binades: int,
    size: float,
    zeros: bool,
) -> None:
    """Numbers of an entry lie `binades` apart at most: where float32 is exact, and where it nearly is."""
    random = torch.Generator().manual_seed(seed)
    base = numbers(shape, size, binades, random)
    models = [numbers(shape, size, binades, random) for _ in weights]
    if zeros:
        with_specials([base, *models], [0.0, -0.0], random)
        models[-1][0] = base[0]
    keeps = [] if kept == 1.0 else [Drop(0, 0, kept)] * len(weights)
    elected(base, models, weights, how=how, normalize=normalize, scale=scale, keeps=keeps)


@settings(max_examples=250, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    divisor=st.integers(3, 130),
    numerators=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    how=st.sampled_from(HOWS),
    normalize=st.booleans(),
    scale=st.sampled_from([1.0, 1.0, 0.5, 0.3, -1.0]),
    kept=st.sampled_from([1.0, 1.0, 2.0, 10 / 9, 10 / 3]),
    size=st.sampled_from([2.0**-133, 2.0**-120, 1.0, 2.0**100]),
    steps=st.sampled_from([1, 9, 200]),
    far=st.booleans(),
    off=st.sampled_from([0, 0, 5, 200, 2**12]),
)
@example(0, 10, [3, 4], Elect.WEIGHTED, True, 1.0, 1.0, 1.0, 9, False, 0)
@example(0, 10, [3, 4], Elect.NONE, True, 1.0, 10 / 3, 1.0, 9, True, 0)
def test_fractions_which_make_ties_that_binary_digits_do_not(
    seed: int,
    divisor: int,
    numerators: list[int],
    how: Elect,
    normalize: bool,
    scale: float,
    kept: float,
    size: float,
    steps: int,
    far: bool,
    off: int,
) -> None:
    """Weights such as 0.3 or 2/3, or a few units in the last place off, of numbers on a coarse grid; some cancel."""
    random = torch.Generator().manual_seed(seed)
    shape = (3, 200)
    base = (size * torch.randint(-255, 256, shape, generator=random).double()).to(BF16)
    grid = size * torch.exp2(torch.randint(0, 4, shape, generator=random).double())
    models = []
    for _ in numerators:
        delta = grid * torch.randint(-steps, steps + 1, shape, generator=random).double()
        models.append((delta if far else base + delta).to(BF16))
    weights = [numerator / divisor for numerator in numerators]
    weights[0] *= 1 + off * 2.0**-52
    keeps = [] if kept == 1.0 else [Drop(0, 0, kept)] * len(weights)
    elected(base, models, weights, how=how, normalize=normalize, scale=scale, keeps=keeps)


def exactly(base: Sequence[float], models: list[list[float]], weights: list[float], how: Elect) -> list[Fraction]:
    """What is added to the base, divided by the weights that agree, as fractions."""
    results = []
    for place, a in enumerate(base):
        deltas = [Fraction(model[place]) - Fraction(a) for model in models]
        votes = [d * (Fraction(w) if how is Elect.WEIGHTED else 1) for d, w in zip(deltas, weights, strict=True)]
        sign = -1 if sum(votes) < 0 else 1
        agreeing = [(d, Fraction(w)) for d, w, v in zip(deltas, weights, votes, strict=True) if v * sign > 0]
        divisor = sum(w for _, w in agreeing)
        results.append(sum((d * w for d, w in agreeing), Fraction(0)) / (divisor or 1))
    return results


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    weights=st.lists(st.sampled_from([0.25, 0.5, 0.75, 1.0, 3.0]), min_size=1, max_size=4),
    how=st.sampled_from([Elect.WEIGHTED, Elect.UNWEIGHTED]),
    binades=st.integers(0, 14),
)
def test_results_are_the_exact_ones_rounded_once(seed: int, weights: list[float], how: Elect, binades: int) -> None:
    random = torch.Generator().manual_seed(seed)
    base = numbers((2, 128), 1.0, binades, random)
    models = [numbers((2, 128), 1.0, binades, random) for _ in weights]
    out = elected(base, models, weights, how=how)
    start = base.double().flatten().tolist()
    added = exactly(start, [model.double().flatten().tolist() for model in models], weights, how)
    for a, more, result in zip(start, added, out.double().flatten().tolist(), strict=True):
        assert result == oracle.nearest(Fraction(a) + more, BF16, first=40)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=st.sampled_from(SHAPES),
    count=st.integers(1, 4),
    how=st.sampled_from(HOWS),
    first=st.integers(0, 10**6),
    limits=st.lists(
        st.sampled_from([-1.0, 0.0, 2.0**-7, 1.0 / 3, 0.5, 1e-300, 1e300, math.inf]), min_size=2, max_size=2
    ),
    places=st.tuples(*[st.sampled_from([-1, 0, 63, 64, 300, 700, 10**9])] * 2),
)
def test_limits_of_magnitudes_and_their_ties(
    seed: int,
    shape: tuple[int, int],
    count: int,
    how: Elect,
    first: int,
    limits: list[float],
    places: tuple[int, int],
) -> None:
    """Deltas are multiples of 1/128 up to 1: ties with a limit are frequent, and kept or dropped by their place."""
    random = torch.Generator().manual_seed(seed)
    base = torch.randint(-64, 65, shape, generator=random).div(128).to(BF16)
    models = [torch.randint(-64, 65, shape, generator=random).div(128).to(BF16) for _ in range(count)]
    before = [max(0, first + place) if place >= 0 else 0 for place in places]
    keep = Drop(0, 0, 1.0, min(limits), before[0], max(limits), before[1])
    least = dataclasses.replace(keep, most=math.inf, most_before=0)
    elected(base, models, [1.0] * count, how=how, keeps=[keep, least, keep, least][:count], first=first)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=st.sampled_from(SHAPES),
    count=st.integers(1, 4),
    how=st.sampled_from(HOWS),
    first=st.integers(0, 10**6),
    thresholds=st.lists(st.sampled_from([0, 1, 1 << 30, 1 << 31, (1 << 32) - 1, 1 << 32]), min_size=4, max_size=4),
    scale=st.sampled_from([1.0, 2.0, 10 / 7]),
    least=st.sampled_from([-1.0, 1e-3]),
    special=st.booleans(),
)
def test_deltas_dropped_at_random(
    seed: int,
    shape: tuple[int, int],
    count: int,
    how: Elect,
    first: int,
    thresholds: list[int],
    scale: float,
    least: float,
    special: bool,
) -> None:
    random = torch.Generator().manual_seed(seed)
    base = (0.02 * torch.randn(shape, generator=random)).to(BF16)
    models = [(base + 0.004 * torch.randn(shape, generator=random)).to(BF16) for _ in range(count)]
    if special:
        with_specials([base, *models], [-0.0, 0.0], random)
        with_specials([models[-1][:1]], [math.nan, math.inf], random)  # seen although dropped
    keeps = [Drop(seed + m, thresholds[m], scale, least) for m in range(count)]
    elected(base, models, [0.5] * count, how=how, keeps=keeps, first=first)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 5),
    how=st.sampled_from(HOWS),
    normalize=st.booleans(),
    weight=st.sampled_from([1.0, 0.5]),
    value=st.sampled_from([math.nan, math.inf, -math.inf, 3.3e38, 2.0**105, 2.0**-100, 1e-40]),
    share=st.sampled_from([0.001, 0.2]),
)
def test_numbers_that_float32_is_not_for(
    seed: int, count: int, how: Elect, normalize: bool, weight: float, value: float, share: float
) -> None:
    random = torch.Generator().manual_seed(seed)
    base = (0.02 * torch.randn(40, 333, generator=random)).to(BF16)
    models = [(base + 0.004 * torch.randn(base.shape, generator=random)).to(BF16) for _ in range(count)]
    for tensor in (base, *models):
        tensor[torch.rand(base.shape, generator=random) < share] = value
    elected(base, models, [weight] * count, how=how, normalize=normalize)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    how=st.sampled_from(HOWS),
    weights=st.sampled_from([[1.0, 1.0], [1.0, -1.0], [0.5, 0.5], [-0.5, -0.5], [0.0, 1.0], [0.0, 0.0]]),
    normalize=st.booleans(),
    scale=st.sampled_from([1.0, -2.0]),
)
def test_deltas_and_weights_that_cancel(
    seed: int, how: Elect, weights: list[float], normalize: bool, scale: float
) -> None:
    """d1 = d0, -d0 or 0, and bases of 0 of both signs."""
    random = torch.Generator().manual_seed(seed)
    base = torch.randint(-64, 65, (4, 300), generator=random).div(128).to(BF16)
    with_specials([base], [0.0, -0.0], random)
    delta = torch.randint(-32, 33, base.shape, generator=random).div(128).to(BF16)
    turned = delta * torch.randint(-1, 2, base.shape, generator=random).to(BF16)
    models = [base + delta, base + turned]
    for model in models:
        same = torch.rand(base.shape, generator=random) < 0.3
        model[same] = base[same]
    elected(base, models, weights, how=how, normalize=normalize, scale=scale)


@pytest.mark.parametrize("binade", range(4, 31))
@pytest.mark.parametrize("how", HOWS[1:])
def test_a_mean_that_is_a_tie_but_for_what_float32_cannot_hold(binade: int, how: Elect) -> None:
    """(4 + 2^-6) / 4 is a tie; what small numbers leave of each other makes it none."""
    small = 2.0**-binade
    values = [-2 * small, 4.0, 2.0**-6, small * (1 + 2.0**-7), -small]
    base, *models = (torch.full((1, 64), value, dtype=BF16) for value in values)
    assert (elected(base, models, [1.0] * 4, how=how) == 1 + 2.0**-7).all()


@pytest.mark.parametrize("binade", range(4, 25))
@pytest.mark.parametrize(("first", "sign", "wanted"), [(1.0, 1, 179 / 32), (1 + 2.0**-5, -1, 181 / 32)])
@pytest.mark.parametrize("how", HOWS[:2])
def test_a_sum_that_is_a_tie_but_for_what_float32_cannot_hold(
    binade: int, first: float, sign: int, wanted: float, how: Elect
) -> None:
    """The same with S X nearly reached: 3 x - 2.5 a is a tie."""
    small = sign * 2.0**-binade
    values = [-(1 + 2.0**-5), first, small * (1 + 2.0**-7), -small]
    base, *models = (torch.full((1, 64), value, dtype=BF16) for value in values)
    assert (elected(base, models, [3.0, 0.25, 0.25], how=how, normalize=False) == wanted).all()


@pytest.mark.parametrize("how", HOWS)
def test_ties_go_to_even(how: Elect) -> None:
    base = torch.full((4, 512), 1.0, dtype=BF16)
    base[:, ::2] += 2**-7
    models = [base + 2**-7, base + 2**-6]  # their mean is half a step between two numbers
    out = elected(base, models, [0.5, 0.5], how=how)
    assert (oracle.bits(out) % 2 == 0).all()


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_base_without_deltas_keeps_its_bits(how: Elect, count: int) -> None:
    base = torch.full((4, 512), -0.0, dtype=BF16)
    base[:, ::3] = 0.5
    out = elected(base, [base + 0.0] * count, [1.0] * count, how=how)
    assert torch.equal(oracle.bits(out), oracle.bits(base))
