"""Windows of a base and of models as kernels take them: of odd shapes, of mixed dtypes, with and without drops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from mergecore import ops
from tests import oracle

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (F32, F16, BF16)
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


cuts = st.lists(st.integers(1, 300), max_size=4)


def chain(one: oracle.Floats, two: oracle.Floats) -> float:
    """The products added up in order, each product and sum rounded together (a fused multiply-add)."""
    total = 0.0
    for x, y in zip(one.tolist(), two.tolist(), strict=True):
        total = float(Fraction(x) * Fraction(y) + Fraction(total))
    return total


def in_tiles(one: oracle.Floats, two: oracle.Floats) -> float:
    """A column's sum of products as it is documented: tiles of 256 rows, each from zero, added in order."""
    return sum((chain(one[i : i + 256], two[i : i + 256]) for i in range(0, len(one), 256)), start=0.0)


def in_lanes(one: oracle.Floats, two: oracle.Floats) -> float:
    """A row's sum of products as it is documented: 64 lanes, which are halved until one is left."""
    lanes = [chain(one[lane::64], two[lane::64]) for lane in range(64)]
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [lanes[i] + lanes[i + half] for i in range(half)]
    return lanes[0]


def at_odd_address(tensor: Tensor) -> Tensor:
    """The same numbers at an address that no load of several bytes is aligned to."""
    memory = bytearray(tensor.numel() * tensor.element_size() + 1)
    moved = torch.frombuffer(memory, dtype=tensor.dtype, offset=1).view(tensor.shape)
    assert moved.data_ptr() % 2 == 1
    return moved.copy_(tensor)
