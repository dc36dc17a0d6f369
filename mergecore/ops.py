"""The kernels as torch ops (`torch.ops.mergecore.*`): loading, fakes and typed Python signatures.

Every op writes into tensors that the caller made. Windows are contiguous (rows, columns) views of
float32, float16 or bfloat16, mixed freely; statistics, scores and coefficients are float64. CPU and
CUDA tensors give equal bits. The arithmetic is described in docs/design.md, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from mergecore.errors import MergecoreError


def _load_library() -> None:
    folder = Path(__file__).parent
    libraries = sorted(folder.glob("_kernels*.so"))
    if not libraries:
        raise MergecoreError(
            f"the kernels are not built: no _kernels*.so in {folder}; run `make setup` or `pip install .`"
        )
    torch.ops.load_library(str(libraries[0]))


_load_library()


class Axis(IntEnum):
    """What a column of coefficients belongs to: the whole tensor, a stored column, or a stored row."""

    TENSOR = 0
    COLUMNS = 1
    ROWS = 2


@dataclass(frozen=True)
class Drop:
    """DARE for one model (Yu et al. 2024, eq. 3): entry e is kept iff its Philox number >= threshold.

    `key` is 64 bits; `threshold` is round(drop_rate * 2**32); kept deltas are multiplied by `scale`.
    """

    key: int
    threshold: int
    scale: float

    @classmethod
    def of(cls, drop_rate: float, rescale: bool, *, seed: int, tensor: str, model: int) -> Drop:
        """The drop of `model` (its position in the spec) on `tensor`; the same on every machine."""
        key = xxhash.xxh3_64_intdigest(f"{seed}\0{tensor}\0{model}".encode())
        return cls(key, round(drop_rate * 2**32), 1.0 / (1.0 - drop_rate) if rescale else 1.0)


def _drop_arguments(drops: Sequence[Drop]) -> tuple[list[int], list[int], list[float]]:
    signed = [drop.key - 2**64 if drop.key >= 2**63 else drop.key for drop in drops]
    return signed, [drop.threshold for drop in drops], [drop.scale for drop in drops]


GRAM_BLOCK = 4096
"""Entries of a whole tensor that `gram` sums by themselves: its windows are cut between them."""


def moment_count(models: int) -> int:
    """Rows of a moments tensor: a.a, then d.d, d.(x + a) and x.x of each model."""
    return 1 + 3 * models


def column_moments(
    base: Tensor | None,
    models: Sequence[Tensor],
    sums: Tensor,
    pending: Tensor,
    *,
    first_row: int = 0,
    first_entry: int = 0,
    drops: Sequence[Drop] = (),
) -> None:
    """Adds a window to the moments of each column (columns run across rows; WIDEN eq. 1-2).

    `sums` and `pending` are float64 (1 + 3 * models, columns), zero before a tensor's first window;
    windows come in order, cut anywhere. After the last one `sums + pending` are the moments.
    `first_row` is the window's place in its matrix, `first_entry` the matrix's place in the tensor.
    """
    torch.ops.mergecore.column_moments(
        base, list(models), sums, pending, first_row, first_entry, *_drop_arguments(drops)
    )


def row_moments(
    base: Tensor | None,
    models: Sequence[Tensor],
    sums: Tensor,
    *,
    first_row: int = 0,
    first_entry: int = 0,
    drops: Sequence[Drop] = (),
) -> None:
    """Writes the same moments for columns that lie along the stored rows (token embeddings).

    `sums` is float64 (1 + 3 * models, rows of the matrix); the window's rows are filled in.
    """
    torch.ops.mergecore.row_moments(base, list(models), sums, first_row, first_entry, *_drop_arguments(drops))


def gram_count(models: int) -> int:
    """Rows of a Gram tensor: the products of all pairs of the base and the deltas, (0, 0), (0, 1), ... (1, 1), ..."""
    return (models + 1) * (models + 2) // 2


def gram(
    sums: Tensor,
    base: Tensor | None,
    models: Sequence[Tensor],
    *,
    first_row: int = 0,
    first_entry: int = 0,
    drops: Sequence[Drop] = (),
) -> None:
    """Adds a window of a whole tensor to the dot products of base and deltas.

    `sums` is float64 (gram_count(models), 1), zero before a tensor's first window; windows come in order
    and start at multiples of GRAM_BLOCK entries.
    """
    torch.ops.mergecore.gram(sums, base, list(models), first_row, first_entry, *_drop_arguments(drops))


def row_gram(
    sums: Tensor,
    base: Tensor | None,
    models: Sequence[Tensor],
    *,
    first_row: int = 0,
    first_entry: int = 0,
    drops: Sequence[Drop] = (),
) -> None:
    """Writes the same products of each stored row: `sums` is float64 (gram_count(models), rows of the matrix)."""
    torch.ops.mergecore.row_gram(sums, base, list(models), first_row, first_entry, *_drop_arguments(drops))


def column_gram(
    sums: Tensor,
    pending: Tensor,
    base: Tensor | None,
    models: Sequence[Tensor],
    *,
    first_row: int = 0,
    first_entry: int = 0,
    drops: Sequence[Drop] = (),
) -> None:
    """Adds a window to the same products of each stored column; `sums` and `pending` as in `column_moments`,
    float64 (gram_count(models), columns)."""
    torch.ops.mergecore.column_gram(sums, pending, base, list(models), first_row, first_entry, *_drop_arguments(drops))


def blend(
    out: Tensor,
    base: Tensor | None,
    models: Sequence[Tensor],
    coefficients: Tensor,
    counts: Tensor,
    *,
    base_coefficient: float = 1.0,
    axis: Axis = Axis.TENSOR,
    first_row: int = 0,
    first_entry: int = 0,
    drops: Sequence[Drop] = (),
) -> None:
    """out = cast(base_coefficient * base + sum_n c_n * keep_n * (model_n - base)), one rounding.

    Without a base: out = cast(sum_n c_n * model_n). `coefficients` is float64 (models, 1), (models,
    columns) or (models, rows of the matrix) as `axis` says. Adds to `counts` (int64, 2): results that
    are NaN or Inf, and finite results that overflow out's dtype.
    """
    torch.ops.mergecore.blend(
        out,
        base,
        list(models),
        coefficients,
        base_coefficient,
        int(axis),
        first_row,
        first_entry,
        *_drop_arguments(drops),
        counts,
    )


def rank(values: Tensor, *, average: bool = False) -> Tensor:
    """Ascending ranks 1..n within each row of `values`, float64 (models, n) (WIDEN eq. 3).

    Equal values rank in index order, or all get their mean rank with `average`.
    """
    ranks = torch.empty_like(values)
    torch.ops.mergecore.rank(values, ranks, average)
    return ranks


def calibrated_softmax(scores: Tensor, thresholds: Tensor, *, divisor: float, s: float) -> Tensor:
    """WIDEN eq. 4-6 on float64 (models, n): `s` where a score exceeds its model's threshold, elsewhere
    the softmax over models of scores / divisor. A threshold of +inf calibrates nothing."""
    out = torch.empty_like(scores)
    torch.ops.mergecore.calibrated_softmax(scores, thresholds, divisor, s, out)
    return out


def _register_fakes() -> None:
    # Every op only writes into its arguments: there is nothing to infer.
    grams = ("gram", "row_gram", "column_gram")
    for name in (*grams, "column_moments", "row_moments", "blend", "rank", "calibrated_softmax"):
        torch.library.register_fake(f"mergecore::{name}", lambda *args: None)


_register_fakes()
