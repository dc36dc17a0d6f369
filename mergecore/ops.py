"""The kernels as torch ops (`torch.ops.mergecore.*`): loading, fakes and typed Python signatures.

Every op writes into tensors that the caller made. Windows are contiguous (rows, columns) views of
float32, float16, bfloat16 or float64, mixed freely, results of the first three (of a blend, of any);
statistics, scores and coefficients are float64. CPU and CUDA tensors give equal bits; docs/design.md, section 5,
tells the arithmetic. Ops are called by their one overload, `default`: to look for the one that fits costs as much as a
small window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

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
    """Which deltas of one model are kept: at random, by magnitude, or both.

    DARE (Yu et al. 2024, eq. 3): entry e is kept iff its Philox number >= threshold. `key` is 64 bits;
    `threshold` is round(drop_rate * 2**32); kept deltas are multiplied by `scale`.
    By magnitude: |d| below `least` or above `most` is dropped; |d| == least is kept iff e < least_before,
    |d| == most is dropped iff e < most_before. So the top k of any deltas, ties in index order, are a Drop.
    """

    key: int
    threshold: int
    scale: float
    least: float = -1.0
    least_before: int = 0
    most: float = math.inf
    most_before: int = 0

    @classmethod
    def of(cls, drop_rate: float, rescale: bool, *, seed: int, tensor: str, model: int, purpose: str = "") -> Drop:
        """The drop of `model` (its position in the spec) on `tensor`; the same on every machine.

        `purpose` keeps apart what is drawn twice for one model.
        """
        key = xxhash.xxh3_64_intdigest(f"{seed}\0{tensor}\0{model}{purpose}".encode())
        return cls(key, round(drop_rate * 2**32), 1.0 / (1.0 - drop_rate) if rescale else 1.0)


def _drop_arguments(drops: Sequence[Drop]) -> tuple[list[int], list[int], list[float]]:
    signed = [drop.key - 2**64 if drop.key >= 2**63 else drop.key for drop in drops]
    whole = [number for drop in drops for number in (drop.threshold, drop.least_before, drop.most_before)]
    return signed, whole, [number for drop in drops for number in (drop.scale, drop.least, drop.most)]


GRAM_BLOCK = 4096
"""Entries of a whole tensor that `gram` sums by themselves: its windows are cut between them."""


def moment_count(models: int) -> int:
    """Rows of a moments tensor: a.a, then d.d of each model, then d.a of each."""
    return 1 + 2 * models


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

    `sums` and `pending` are float64 (1 + 2 * models, columns), zero before a tensor's first window;
    windows come in order, cut anywhere. After the last one `sums + pending` are the moments.
    `first_row` is the window's place in its matrix, `first_entry` the matrix's place in the tensor.
    """
    torch.ops.mergecore.column_moments.default(
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

    `sums` is float64 (1 + 2 * models, rows of the matrix); the window's rows are filled in.
    """
    torch.ops.mergecore.row_moments.default(base, list(models), sums, first_row, first_entry, *_drop_arguments(drops))


def column_gradient(
    gradient: Tensor,
    base: Tensor | None,
    models: Sequence[Tensor],
    sums: Tensor,
    pending: Tensor,
    *,
    first_row: int = 0,
) -> None:
    """Adds a window to a loss's gradient by one coefficient per model and stored column.

    For W = base + sum_n c_n * (model_n - base), or sum_n c_n * model_n without a base (DAM, section 3.2):
    dL/dc_n is the sum over rows of dL/dW * (model_n - base). `gradient` is the window of dL/dW, of any dtype that
    windows have; `sums` and `pending` as in `column_moments`, float64 (models, columns).
    """
    torch.ops.mergecore.column_gradient.default(gradient, base, list(models), sums, pending, first_row)


def row_gradient(
    gradient: Tensor, base: Tensor | None, models: Sequence[Tensor], sums: Tensor, *, first_row: int = 0
) -> None:
    """Writes the same gradient by one coefficient per model and stored row: `sums` is float64 (models, rows of the
    matrix); the window's rows are filled in."""
    torch.ops.mergecore.row_gradient.default(gradient, base, list(models), sums, first_row)


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
    torch.ops.mergecore.gram.default(sums, base, list(models), first_row, first_entry, *_drop_arguments(drops))


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
    torch.ops.mergecore.row_gram.default(sums, base, list(models), first_row, first_entry, *_drop_arguments(drops))


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
    torch.ops.mergecore.column_gram.default(
        sums, pending, base, list(models), first_row, first_entry, *_drop_arguments(drops)
    )


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
    columns) or (models, rows of the matrix) as `axis` says. A float64 `out` is not rounded. Adds to `counts`
    (int64, 2): results that are NaN or Inf, and finite results that overflow out's dtype.
    """
    torch.ops.mergecore.blend.default(
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
    torch.ops.mergecore.rank.default(values, ranks, average)
    return ranks


def calibrated_softmax(scores: Tensor, thresholds: Tensor, *, divisor: float, s: float) -> Tensor:
    """WIDEN eq. 4-6 on float64 (models, n): `s` where a score exceeds its model's threshold, elsewhere
    the softmax over models of scores / divisor. A threshold of +inf calibrates nothing."""
    out = torch.empty_like(scores)
    torch.ops.mergecore.calibrated_softmax.default(scores, thresholds, divisor, s, out)
    return out


class Measure(IntEnum):
    """What order statistics and masks compare.

    Each model's |d|; the models' standard deviation per entry; |d| times a number of the model's row; or
    PCB's score of a delta, from the least and the range of the model's |d|.
    """

    OWN = 0
    SPREAD = 1
    ROWS = 2
    COMPETITION = 3


class Elect(IntEnum):
    """How the kept deltas v_n of an entry, with weights w_n, become one number.

    NONE: their weighted sum. WEIGHTED, UNWEIGHTED: of those with the sign of the weighted or the plain sum
    (TIES). LARGEST: the largest w_n v_n, the first of equal ones. SHARED: where several exceed their limit
    their plain mean, where one does its w_n v_n (RAM). LIMITED: the weighted sum, each held within +- its
    limit. COMPETING: the weighted sum, divided by the sum of the scores that Measure.COMPETITION multiplied with.
    """

    NONE = 0
    WEIGHTED = 1
    UNWEIGHTED = 2
    LARGEST = 3
    SHARED = 4
    LIMITED = 5
    COMPETING = 6


@dataclass(frozen=True)
class Place:
    """Where a window lies in its tensor, what was dropped from the deltas before, and what is compared.

    `scales` are float64 (models, rows of the tensor) for Measure.ROWS, and (models, 2) for
    Measure.COMPETITION: the least |d| of the model, and how much larger its largest is.
    """

    first_entry: int = 0
    drops: Sequence[Drop] = ()
    measure: Measure = Measure.OWN
    scales: Tensor | None = None

    @property
    def where(self) -> tuple[int, int, list[int], list[int], list[float]]:
        """The arguments of ops that compare nothing."""
        return (0, self.first_entry, *_drop_arguments(self.drops))

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments of the others."""
        return (int(self.measure), self.scales, *self.where)


def count_magnitudes(
    base: Tensor | None,
    models: Sequence[Tensor],
    histogram: Tensor,
    *,
    shift: int,
    offsets: Sequence[int],
    clamp: bool,
    place: Place,
) -> None:
    """Adds a window's magnitudes to `histogram`, int64 (models, bins), or (1, bins) of Measure.SPREAD.

    A magnitude's key is its float64 bits; bin b of model n counts keys with key >> shift == offsets[n] + b.
    Keys beyond the bins count in the outer ones with `clamp`, where zeros and what is not finite have the
    first and the last bin for themselves; else nowhere.
    """
    torch.ops.mergecore.count_magnitudes.default(
        base, list(models), histogram, shift, list(offsets), clamp, *place.arguments
    )


def count_bracketed(
    base: Tensor | None,
    models: Sequence[Tensor],
    histogram: Tensor,
    ends: Tensor,
    *,
    shift: int,
    offsets: Sequence[int],
    part: int,
    place: Place,
) -> None:
    """Adds a window's |d| to `histogram`, int64 (models, bins), as `count_magnitudes` does with `clamp`; on a CPU.

    `ends`, int32 (models, parts of the window, bins), is added how many keys of each part of `part` entries are the
    lower end of their bin, zeros among them; of the outer bins, where keys beyond are counted, nothing.
    """
    torch.ops.mergecore.count_bracketed.default(
        base, list(models), histogram, ends, shift, list(offsets), part, *place.where
    )


def collect_magnitudes(
    base: Tensor | None,
    models: Sequence[Tensor],
    ranges: Sequence[tuple[int, int, int]],
    keys: Tensor,
    indices: Tensor,
    found: Tensor,
    equal: Tensor,
    *,
    block: int,
    place: Place,
) -> None:
    """Collects a window's entries whose key lies within each range (model, low, high), both ends excluded.

    `keys` and `indices` (in the tensor) are int64 (ranges, capacity), filled in any order from place
    `found` (int64, ranges) on, which counts also what had no room. `equal`, int64 (ranges, blocks of
    the window), is added the number of keys equal to `low` in each block of `block` entries.
    """
    which, lows, highs = (list(numbers) for numbers in zip(*ranges, strict=True))
    torch.ops.mergecore.collect_magnitudes.default(
        base, list(models), which, lows, highs, keys, indices, found, equal, block, *place.arguments
    )


def kept_sums(
    base: Tensor | None,
    models: Sequence[Tensor],
    *,
    block: int,
    keeps: Sequence[Drop],
    place: Place,
    odds: Tensor | None = None,
) -> Tensor:
    """Sums over each block of a window, float64 (models, 3, blocks): of |d|, of |kept d|, of kept d squared.

    Nothing is rescaled. `odds`, float64 (models, entries): keep-probabilities in the place of `keeps`' thresholds.
    """
    blocks = -(-models[0].numel() // block)
    sums = torch.zeros(len(models), 3, blocks, dtype=torch.float64, device=models[0].device)
    torch.ops.mergecore.kept_sums.default(
        base, list(models), sums, block, *place.arguments, *_drop_arguments(keeps), odds
    )
    return sums


def row_odds(
    base: Tensor | None, models: Sequence[Tensor], lowest: Sequence[float], steps: Sequence[float], place: Place
) -> Tensor:
    """Keep-probabilities by rank of |d| within the rows of a window, float64 (models, rows, columns).

    lowest[n] + (rank - 1) * steps[n], the smallest |d| of a row having rank 1; equal ones have their mean rank
    (DELLA, Deep et al. 2024).
    """
    odds = torch.empty(len(models), *models[0].shape, dtype=torch.float64, device=models[0].device)
    torch.ops.mergecore.row_odds.default(base, list(models), list(lowest), list(steps), odds, *place.where)
    return odds


def magnitudes(base: Tensor | None, models: Sequence[Tensor], place: Place) -> Tensor:
    """|d| of every entry of a window, float64 (models, rows, columns)."""
    out = torch.empty(len(models), *models[0].shape, dtype=torch.float64, device=models[0].device)
    torch.ops.mergecore.magnitudes.default(base, list(models), out, *place.where)
    return out


def keep_deltas(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    keeps: Sequence[Drop],
    place: Place,
    odds: Tensor | None = None,
    divide_by_odds: bool = False,
) -> Tensor:
    """base + kept d, rescaled, of every entry of a window: float64 (models, rows, columns), windows for any op.

    `odds` as in `kept_sums`, other arguments as in `elect`. Where nothing of a delta is kept the entry is the base's,
    exactly.
    """
    out = torch.empty(len(models), *models[0].shape, dtype=torch.float64, device=models[0].device)
    torch.ops.mergecore.keep_deltas.default(
        base, list(models), out, *place.arguments, *_drop_arguments(keeps), odds, divide_by_odds
    )
    return out


def count_shared(base: Tensor, models: Sequence[Tensor], limits: Sequence[float], counts: Tensor, place: Place) -> None:
    """Adds to `counts`, int64 (models, 2), how many deltas beyond their limit are beyond it in other models
    too, and how many in none."""
    torch.ops.mergecore.count_shared.default(base, list(models), list(limits), counts, *place.where)


def row_divergences(base: Tensor, models: Sequence[Tensor], out: Tensor, place: Place) -> None:
    """Writes KL(softmax(row of the model) || softmax(row of the base)) of a window's rows.

    `out` is float64 (models, rows of the tensor); windows are whole rows. No difference of large numbers is
    taken: rows that are nearly equal keep their divergence.
    """
    torch.ops.mergecore.row_divergences.default(base, list(models), out, *place.where)


def elect(
    out: Tensor,
    base: Tensor,
    models: Sequence[Tensor],
    weights: Sequence[float],
    counts: Tensor,
    *,
    scale: float,
    elect: Elect,
    normalize: bool,
    keeps: Sequence[Drop],
    place: Place,
    limits: Sequence[float] = (),
    consensus: int = 0,
    lowest: Sequence[float] = (),
    steps: Sequence[float] = (),
    divide_by_odds: bool = False,
) -> None:
    """out = cast(base + scale * mixed), one rounding.

    `mixed` is what `elect` makes of the kept deltas; with an election by sign (a sum of 0 elects +) and
    `normalize` divided by the sum of the weights that agree. With `consensus` (not 0) it is 0 where fewer
    models hold on to it: |d_n| > limits[n] * |mixed - d_n|, for the deltas before `keeps` (Wang et al. 2024).
    `keeps` choose among the deltas that `place.drops` left. With `lowest` and `steps` those of `row_odds` are
    keep-probabilities in the place of their thresholds, and of their scales with `divide_by_odds`; the window is
    whole rows then.
    Adds to `counts` (int64, 2): results that are NaN or Inf, and finite results that overflow.
    """
    torch.ops.mergecore.elect.default(
        out, base, list(models), list(weights), list(limits), scale, int(elect), consensus, normalize,
        *place.arguments, *_drop_arguments(keeps), list(lowest), list(steps), divide_by_odds, counts,
    )  # fmt: skip


def _register_fakes() -> None:
    # Every op only writes into its arguments: there is nothing to infer.
    grams = ("gram", "row_gram", "column_gram")
    moments = ("column_moments", "row_moments", "column_gradient", "row_gradient")
    results = ("blend", "rank", "row_odds", "calibrated_softmax")
    counts = ("count_magnitudes", "count_bracketed", "collect_magnitudes", "count_shared")
    selection = ("kept_sums", "magnitudes", "keep_deltas", "elect", "row_divergences")
    for name in (*grams, *moments, *results, *counts, *selection):
        torch.library.register_fake(f"mergecore::{name}", lambda *args: None)


_register_fakes()
