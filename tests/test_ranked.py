"""Elections among deltas kept by rank: float32 where its bounds decide, always with the float64 election's bits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergecore import ops
from mergecore.ops import Drop, Elect, Place
from tests import oracle

BF16 = torch.bfloat16
KEEPS = [Drop(5 + n, 1 << 31, 2.0) for n in range(5)]


def elected(
    base: Tensor,
    models: list[Tensor],
    weights: list[float],
    lines: list[tuple[float, float]],
    *,
    how: Elect,
    normalize: bool,
    divide: bool,
    scale: float = 1.0,
    first: int = 0,
) -> Tensor:
    """The election, after it was held against the one of the same numbers as float32, which is computed in float64
    from the exact rank of each entry."""
    found, wanted = (torch.empty(base.shape, dtype=BF16) for _ in range(2))
    counts = torch.zeros(2, 2, dtype=torch.int64)
    lowest, steps = zip(*lines, strict=True)
    for dtype, out, counted in ((BF16, found, counts[0]), (torch.float32, wanted, counts[1])):
        ops.elect(
            out, base.to(dtype), [model.to(dtype) for model in models], weights, counted, scale=scale, elect=how,
            normalize=normalize, keeps=KEEPS[: len(models)], place=Place(first), lowest=lowest, steps=steps,
            divide_by_odds=divide,
        )  # fmt: skip
    assert torch.equal(oracle.bits(found), oracle.bits(wanted))
    assert torch.equal(*counts)
    return found


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=st.sampled_from([(1, 1), (4, 3), (2, 64), (3, 511), (2, 513), (2, 1300), (1, 5504)]),
    count=st.integers(1, 5),
    how=st.sampled_from([Elect.NONE, Elect.WEIGHTED, Elect.UNWEIGHTED]),
    normalize=st.booleans(),
    divide=st.booleans(),
    weights=st.lists(st.sampled_from([0.5, 1.0, 0.3, 0.7, 3.0, 0.0, -0.4, 1e-7, 1e7]), min_size=5, max_size=5),
    scale=st.sampled_from([1.0, 0.3, -2.0]),
    odds=st.sampled_from([(0.35, 0.65), (0.5, 0.5), (0.002, 0.9), (0.05, 1.0), (0.0, 0.3), (1.0, 1.0)]),
    spread=st.sampled_from([3e-4, 4e-3, 0.5]),
    first=st.integers(0, 10**6),
)
def test_float32_decides_only_what_float64_would(
    seed: int,
    shape: tuple[int, int],
    count: int,
    how: Elect,
    normalize: bool,
    divide: bool,
    weights: list[float],
    scale: float,
    odds: tuple[float, float],
    spread: float,
    first: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    base = (0.02 * torch.randn(shape, generator=random)).to(BF16)
    models = [(base + spread * torch.randn(shape, generator=random)).to(BF16) for _ in range(count)]
    base[torch.rand(shape, generator=random) < 0.02] = -0.0
    models[0][torch.rand(shape, generator=random) < 0.1] = 0.0
    line = (odds[0], (odds[1] - odds[0]) / max(1, shape[1] - 1))
    elected(
        base, models, weights[:count], [line] * count, how=how, normalize=normalize, divide=divide and odds[0] > 0,
        scale=scale, first=first * shape[1],
    )  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38, 1e-38, 1e-30])
@pytest.mark.parametrize("divide", [True, False])
def test_rows_that_float32_is_not_for(value: float, divide: bool) -> None:
    """Only that row is left to float64, and what is not finite is counted."""
    random = torch.Generator().manual_seed(1)
    base = (0.02 * torch.randn(5, 700, generator=random)).to(BF16)
    models = [(base + 1e-3 * torch.randn(5, 700, generator=random)).to(BF16) for _ in range(2)]
    models[1][2, 600] = value
    elected(base, models, [0.5, 0.5], [(0.4, 1e-4)] * 2, how=Elect.WEIGHTED, normalize=True, divide=divide)


def test_votes_that_cancel_elect_plus() -> None:
    """Odds of one keep all; equal magnitudes of either sign have a sum of zero, which no bound tells from noise."""
    base = torch.full((3, 600), 1.0, dtype=BF16)
    models = [torch.full_like(base, 1.5), torch.full_like(base, 0.5)]
    out = elected(base, models, [1.0, 1.0], [(1.0, 0.0)] * 2, how=Elect.WEIGHTED, normalize=True, divide=True)
    assert (out == 1.5).all()


def test_no_entries() -> None:
    nothing = torch.zeros(3, 0, dtype=BF16)
    ops.elect(
        nothing, nothing, [nothing], [1.0], torch.zeros(2, dtype=torch.int64), scale=1.0, elect=Elect.NONE,
        normalize=False, keeps=KEEPS[:1], place=Place(), lowest=[0.5], steps=[0.0],
    )  # fmt: skip
