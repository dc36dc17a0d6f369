"""Which deltas of a tensor are kept: exact top sets by magnitude, random masks, and their rescaling.

From what a method wants (`Keep`) to what the kernels test per entry (`Drop`), by streamed reads of the
tensor in bounded memory. Knows nothing of files and devices: reads are given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from mergecore import ops
from mergecore.methods.base import Keep
from mergecore.ops import Drop, Measure, Place
from mergecore.topsets import BINS, ROOM, Part, Query, Reads, Selected, counted, top_sets

BLOCK = ops.GRAM_BLOCK  # entries, at least, of which ties are counted and sums are taken together
RANK_BYTES = 16 << 20  # of probabilities, and on a GPU of what sorts for them, at a time

READS = {Measure.OWN: 0, Measure.SPREAD: 0, Measure.ROWS: 1, Measure.COMPETITION: 2}
"""What a measure needs to know of a tensor before: the divergence of every row, or the least and largest |d|."""


def planned_reads(keeps: Sequence[Keep]) -> int:
    """How often `compared` and `choose` read a tensor at most."""
    if not keeps:
        return 0
    before = READS[keeps[0].measure]
    return before + 2 * any(keep.by_magnitude for keep in keeps) + any(keep.rescale_by_sums for keep in keeps)


def held_bytes(keeps: Sequence[Keep], entries: int, columns: int) -> int:
    """What `choose` holds at most, with what a tensor of `columns` entries per row needs for its ranks."""
    if not keeps:
        return 0
    sets, queries = _sets(keeps), _query_count(keeps)
    blocks = -(-entries // BLOCK)
    held = 0
    if queries:
        # The counters of brackets (topsets.COUNTERS) take less than two histograms of all bins.
        held = 8 * (2 * sets * BINS + queries * blocks) + 32 * min(ROOM, entries * queries)
    if any(keep.rescale_by_sums for keep in keeps):
        held = max(held, 48 * len(keeps) * blocks)
    if any(keep.by_row for keep in keeps):
        held += RANK_BYTES + 48 * len(keeps) * columns
    if keeps[0].measure is Measure.ROWS:
        held += 8 * len(keeps) * (entries // max(1, columns))
    return held


def _sets(keeps: Sequence[Keep]) -> int:
    return 1 if keeps and keeps[0].measure is Measure.SPREAD else len(keeps)


def _query_count(keeps: Sequence[Keep]) -> int:
    most = {Measure.COMPETITION: 2, Measure.ROWS: 6}
    return sum(most.get(keep.measure, (keep.density < 1) + (keep.outliers > 0)) for keep in keeps[: _sets(keeps)])


def share(fraction: float, count: int) -> int:
    """round-half-up(fraction * count), of the fraction as it is written."""
    if fraction == 0:  # as most outliers are
        return 0
    return math.floor(Fraction(repr(float(fraction))) * count + Fraction(1, 2))


def compared(keeps: Sequence[Keep], reads: Reads, place: Place) -> Place:
    """`place` with what `keeps` compare, read where it has to be known before."""
    measure = keeps[0].measure if keeps else Measure.OWN
    if measure is Measure.ROWS:
        return replace(place, measure=measure, scales=_divergences(len(keeps), reads, place))
    if measure is Measure.COMPETITION:
        return replace(place, measure=measure, scales=_extremes(len(keeps), reads, place))
    return place if place.measure is measure else replace(place, measure=measure)


def _divergences(models: int, reads: Reads, place: Place) -> Tensor:
    """The divergence of every row of each model from the base's, float64 (models, rows)."""
    out = torch.empty(0)
    for part in reads.planned():
        if not out.numel():
            rows = reads.entries // part.models[0].shape[1]
            out = torch.empty(models, rows, dtype=torch.float64, device=reads.device)
        assert part.base is not None
        ops.row_divergences(part.base, part.models, out, replace(place, first_entry=part.first_entry))
    return out


def _extremes(models: int, reads: Reads, place: Place) -> Tensor:
    """The least |d| of each model, and how much larger the largest is, float64 (models, 2)."""
    queries = [Query(n, count) for n in range(models) for count in sorted({1, reads.entries}) if reads.entries]
    found = top_sets(queries, models, reads, place)
    ends = [[found[Query(n, count)].least if queries else 0.0 for count in (reads.entries, 1)] for n in range(models)]
    return torch.tensor([(least, largest - least) for least, largest in ends], dtype=torch.float64, device=reads.device)


def choose(keeps: Sequence[Keep], reads: Reads, place: Place, keys: Sequence[int]) -> list[Drop]:
    """The masks of `keeps` (one per model), among the deltas that `place.drops` leave; `place` as `compared`.

    `keys` are the models' keys for random numbers. Reads the tensor `planned_reads(keeps)` times.
    NaN and Inf count as the largest magnitudes, if `reads.nonfinite` lets them pass.
    """
    random = [keep.dropping(key) for keep, key in zip(keeps, keys, strict=True)]
    if any(keep.by_magnitude for keep in keeps):
        random = _limited(random, keeps, reads, place)
    if any(keep.rescale_by_sums for keep in keeps):
        sums = kept_sums(keeps, random, reads, place)
        random = [
            replace(drop, scale=before / after if after > 0 else 1.0) if keep.rescale_by_sums else drop
            for keep, drop, (before, after, _) in zip(keeps, random, sums, strict=True)
        ]
    return random


def kept_sums(
    keeps: Sequence[Keep], drops: Sequence[Drop], reads: Reads, place: Place
) -> list[tuple[float, float, float]]:
    """Per model the sums of |d|, of |kept d| and of kept d squared: one read. Sums over blocks are added exactly."""
    blocks: list[Tensor] = []
    for part in reads.planned():
        for piece in row_pieces(keeps, part, reads.block):
            here = replace(place, first_entry=piece.first_entry)
            odds = row_odds(keeps, piece, here)
            sums = ops.kept_sums(piece.base, piece.models, block=reads.block, keeps=drops, place=here, odds=odds)
            blocks.append(sums.cpu())
    together = torch.cat(blocks, dim=2) if blocks else torch.zeros(len(keeps), 3, 0)
    return [(math.fsum(a), math.fsum(b), math.fsum(c)) for a, b, c in together.tolist()]


def row_pieces(keeps: Sequence[Keep], part: Part, block: int) -> Iterator[Part]:
    """The window itself, or pieces of whole rows and blocks small enough to rank."""
    rows, columns = part.models[0].shape
    if not any(keep.by_row for keep in keeps):
        yield part
        return
    whole = max(1, block // columns)
    step = max(1, RANK_BYTES // (40 * len(keeps) * columns * whole)) * whole
    for first in range(0, rows, step):
        base = None if part.base is None else part.base[first : first + step]
        models = [model[first : first + step] for model in part.models]
        yield Part(part.first_entry + first * columns, base, models)


def odds_by_rank(keeps: Sequence[Keep], columns: int) -> tuple[list[float], list[float]]:
    """Of each model the keep-probability of the smallest |d| of a row, and by how much it rises with each rank, from
    density - epsilon to density + epsilon (DELLA); nothing where none is kept by rank."""
    if not any(keep.by_row for keep in keeps):
        return [], []
    epsilons = [keep.epsilon if columns > 1 else 0.0 for keep in keeps]
    lowest = [(1.0 - keep.drop_rate) - epsilon for keep, epsilon in zip(keeps, epsilons, strict=True)]
    return lowest, [2.0 * epsilon / max(1, columns - 1) for epsilon in epsilons]


def row_odds(keeps: Sequence[Keep], part: Part, place: Place) -> Tensor | None:
    """Keep-probabilities by rank of magnitude within a row, float64 (models, rows, columns); equal magnitudes have
    equal ones."""
    lowest, steps = odds_by_rank(keeps, part.models[0].shape[1])
    return ops.row_odds(part.base, part.models, lowest, steps, place) if lowest else None


def thinned(keeps: Sequence[Keep], keys: Sequence[int], part: Part, columns: int) -> list[Tensor]:
    """The models' windows with only the deltas that are kept by rank within rows of `columns` entries: base + kept
    delta, float64, so that any method can follow. The window is whole rows; `keys` as in `choose`."""
    shape = part.models[0].shape
    flat = Part(
        part.first_entry,
        None if part.base is None else part.base.view(-1, columns),
        [model.view(-1, columns) for model in part.models],
    )
    drops = [keep.dropping(key) for keep, key in zip(keeps, keys, strict=True)]
    divided = any(keep.rescale == "probability" for keep in keeps)
    kept = []
    for piece in row_pieces(keeps, flat, columns):
        assert piece.base is not None
        place = Place(first_entry=piece.first_entry)
        odds = row_odds(keeps, piece, place)
        kept.append(
            ops.keep_deltas(piece.base, piece.models, keeps=drops, place=place, odds=odds, divide_by_odds=divided)
        )
    return list(torch.cat(kept, dim=1).view(len(keeps), *shape))


def _limited(drops: list[Drop], keeps: Sequence[Keep], reads: Reads, place: Place) -> list[Drop]:
    """`drops` with the limits of the models' top sets."""
    sets, entries = _sets(keeps), reads.entries
    histogram = counted(sets, reads, place) if place.measure is not Measure.OWN else None
    zeros = [0] * sets if histogram is None else histogram[:, 0].tolist()
    tops = [_top_counts(keep, entries, none) for keep, none in zip(keeps[:sets], zeros, strict=True)]
    wanted = {Query(n, count) for n, counts in enumerate(tops) for count in counts if 0 < count < entries}
    for n, keep in enumerate(keeps[:sets]):
        if entries and keep.fence:
            wanted |= {Query(n, rank) for quarter in (1, 2, 3) for rank in _quarter_ranks(quarter, entries)}
        if entries and keep.measure is Measure.COMPETITION:
            wanted.add(Query(n, 1))
    found = top_sets(sorted(wanted), sets, reads, place, histogram)
    out = []
    for n, (keep, drop) in enumerate(zip(keeps, drops, strict=True)):
        which = min(n, sets - 1)
        outliers, kept = tops[which]
        if keep.fence and entries:
            drop = replace(drop, least=_fence(which, entries, found), least_before=entries)
        elif kept <= outliers:
            drop = replace(drop, least=math.inf)
        elif kept < entries:
            least = found[Query(which, kept)]
            drop = replace(drop, least=least.least, least_before=least.before)
        elif keep.measure is Measure.COMPETITION:
            drop = replace(drop, least=0.0, least_before=entries)
        if 0 < outliers < kept:
            most = found[Query(which, outliers)]
            drop = replace(drop, most=most.least, most_before=most.before)
        elif keep.measure is Measure.COMPETITION and entries:
            drop = replace(drop, most=found[Query(which, 1)].least)
        out.append(drop)
    return out


def _quarter_ranks(quarter: int, entries: int) -> tuple[int, int]:
    """The ranks, by falling magnitude, of the entries on both sides of a quartile (or of the median)."""
    below, rest = divmod(quarter * (entries - 1), 4)
    return entries - below, entries - below - (rest > 0)


def _fence(which: int, entries: int, found: Mapping[Query, Selected]) -> float:
    """Median + 1.5 (Q3 - Q1), each between two entries by its place (linear interpolation)."""

    def quantile(quarter: int) -> float:
        low, high = (found[Query(which, rank)].least for rank in _quarter_ranks(quarter, entries))
        return low + quarter * (entries - 1) % 4 / 4 * (high - low)

    return quantile(2) + 1.5 * (quantile(3) - quantile(1))


def _top_counts(keep: Keep, entries: int, zeros: int) -> tuple[int, int]:
    """How many of the largest entries are outliers, and how many are outliers or kept."""
    if keep.measure is Measure.SPREAD:
        entries -= zeros
    if keep.density <= 0 or entries == 0:
        return 0, 0
    kept = max(1, share(keep.density, entries))
    outliers = min(share(keep.outliers, entries), entries - kept)
    return outliers, outliers + kept
