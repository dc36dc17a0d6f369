"""Gram matrices of the base and any number of deltas: of whole tensors, rows and columns."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergecore import ops

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@st.composite
def matrices(draw: st.DrawFn) -> list[Tensor]:
    """The base and up to eight models, of quarters so small that float64 sums of products are exact."""
    shape = draw(st.sampled_from([(1, 1), (3, 31), (33, 32), (40, 100), (300, 64), (2, 2100), (65, 130)]))
    models = draw(st.integers(1, 8))
    one = draw(st.sampled_from(DTYPES))
    dtypes = draw(st.lists(st.sampled_from(DTYPES), min_size=models + 1, max_size=models + 1) | st.just([one] * 9))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return [
        (torch.randint(-12, 13, shape, generator=random) / 4).to(dtype)
        for dtype, _ in zip(dtypes, range(models + 1), strict=False)
    ]


@given(made=matrices(), based=st.booleans(), height=st.integers(1, 300))
@settings(deadline=None, max_examples=60)
def test_every_pair_has_its_product(made: list[Tensor], based: bool, height: int) -> None:
    base, models = made[0] if based else None, made[1:]
    start = made[0].double() if based else torch.zeros(made[0].shape, dtype=torch.float64)
    vectors = [start, *(model.double() - start for model in models)]
    products = [one * other for n, one in enumerate(vectors) for other in vectors[n:]]
    pairs, (rows, columns) = ops.gram_count(len(models)), start.shape
    assert len(products) == pairs

    whole, by_row, by_column, pending = (
        torch.zeros(pairs, n, dtype=torch.float64) for n in (1, rows, columns, columns)
    )
    ops.gram(whole, base, models)
    for first in range(0, rows, height):
        part = [model[first : first + height] for model in models]
        window = None if base is None else base[first : first + height]
        ops.row_gram(by_row, window, part, first_row=first)
        ops.column_gram(by_column, pending, window, part, first_row=first)
    for n, product in enumerate(products):
        assert whole[n].sum() == product.sum()
        assert torch.equal(by_row[n], product.sum(1))
        assert torch.equal(by_column[n] + pending[n], product.sum(0))
