"""Moments, gradients and Gram matrices of large windows, bit by bit.

Sums are in the order that the design tells, whatever way the loops take. Numbers have few bits, so that products are
exact; sums of them are not, so the order of the additions shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergecore import ops
from tests import oracle

TILE, LANES = 256, 64
SHAPES = [
    (1, 1),
    (9, 63),
    (16, 64),
    (15, 96),
    (40, 1024),
    (37, 1100),
    (300, 2048),
    (700, 2100),
    (20, 4160),
    (3, 40_000),
]
DTYPES = [
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float64, torch.bfloat16),
    (torch.bfloat16,) * 6,
]
Numbers = NDArray[np.float64]


def matrices(shape: tuple[int, int], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    random = np.random.default_rng(sum(shape) + len(dtypes))
    numbers = (random.integers(-127, 128, shape) * 2.0 ** random.integers(-16, 3, shape) for _ in dtypes)
    return [torch.from_numpy(number).to(dtype) for number, dtype in zip(numbers, dtypes, strict=True)]


def terms(made: Sequence[Tensor]) -> list[Numbers]:
    base, *models = (matrix.double().numpy() for matrix in made)
    deltas = [model - base for model in models]
    return [base * base, *(delta * delta for delta in deltas), *(delta * base for delta in deltas)]


def test_the_order_of_additions_shows() -> None:
    base, model = matrices((700, 2100), (torch.bfloat16, torch.bfloat16))
    for term in terms([base, model])[1:3]:
        assert (down_the_columns(term) != term.sum(0)).any()
        assert (along_the_rows(term) != term.sum(1)).any()


def down_the_columns(term: Numbers) -> Numbers:
    total = np.zeros(term.shape[1])
    for first in range(0, len(term), TILE):
        tile = np.zeros(term.shape[1])
        for row in term[first : first + TILE]:
            tile += row
        total += tile
    return total


def along_the_rows(term: Numbers) -> Numbers:
    lanes = np.zeros((len(term), LANES))
    for first in range(0, term.shape[1], LANES):
        piece = term[:, first : first + LANES]
        lanes[:, : piece.shape[1]] += piece
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: "-".join(str(dtype)[6:] for dtype in dtypes))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments_are_added_in_the_order_of_the_design(shape: tuple[int, int], dtypes: Sequence[torch.dtype]) -> None:
    rows, columns = shape
    base, *models = made = matrices(shape, dtypes)
    by_column, open_tile = torch.zeros(2, ops.moment_count(len(models)), columns, dtype=torch.float64).unbind()
    by_row = torch.zeros(ops.moment_count(len(models)), rows, dtype=torch.float64)
    ops.column_moments(base, models, by_column, open_tile)
    ops.row_moments(base, models, by_row)
    for number, term in enumerate(terms(made)):
        assert torch.equal(
            oracle.bits((by_column + open_tile)[number]), oracle.bits(torch.from_numpy(down_the_columns(term)))
        )
        assert torch.equal(oracle.bits(by_row[number]), oracle.bits(torch.from_numpy(along_the_rows(term))))


@pytest.mark.parametrize("shape", [(300, 2048), (37, 1100), (3, 40_000)], ids=str)
@pytest.mark.parametrize("models", [1, 2, 3])
def test_gradients_are_added_in_the_order_of_the_design(shape: tuple[int, int], models: int) -> None:
    rows, columns = shape
    gradient, base, *others = matrices(shape, (torch.float32,) + (torch.bfloat16,) * (1 + models))
    by_column, open_tile = torch.zeros(2, models, columns, dtype=torch.float64).unbind()
    by_row = torch.zeros(models, rows, dtype=torch.float64)
    ops.column_gradient(gradient, base, others, by_column, open_tile)
    ops.row_gradient(gradient, base, others, by_row)
    for number, model in enumerate(others):
        term = gradient.double().numpy() * (model.double() - base.double()).numpy()
        assert torch.equal((by_column + open_tile)[number], torch.from_numpy(down_the_columns(term)))
        assert torch.equal(by_row[number], torch.from_numpy(along_the_rows(term)))


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: "-".join(str(dtype)[6:] for dtype in dtypes))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gram_matrices_are_added_in_the_order_of_the_design(
    shape: tuple[int, int], dtypes: Sequence[torch.dtype]
) -> None:
    rows, columns = shape
    base, *models = matrices(shape, dtypes)
    by_column, open_tile = torch.zeros(2, ops.gram_count(len(models)), columns, dtype=torch.float64).unbind()
    by_row = torch.zeros(ops.gram_count(len(models)), rows, dtype=torch.float64)
    ops.column_gram(by_column, open_tile, base, models)
    ops.row_gram(by_row, base, models)
    vectors = [base.double().numpy(), *((model.double() - base.double()).numpy() for model in models)]
    for number, (one, other) in enumerate(combinations_with_replacement(vectors, 2)):
        term = one * other
        assert torch.equal((by_column + open_tile)[number], torch.from_numpy(down_the_columns(term)))
        assert torch.equal(by_row[number], torch.from_numpy(along_the_rows(term)))
