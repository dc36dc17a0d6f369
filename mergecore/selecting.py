"""Which deltas of a tensor are kept: exact top sets by magnitude, random masks, and their rescaling.

From what a method wants (`Keep`) to what the kernels test per entry (`Drop`), by streamed reads of the
tensor in bounded memory. Knows nothing of files and devices: reads are given.

A top set is found by radix selection over the bits of the magnitude. The first read counts them by
exponent and ten bits of mantissa, which tells the bin of each threshold (on a CPU few of these bins, about
where a sample has it: brackets.py); the second collects the entries of that bin with their indices,
except those at its lower end, which are counted in blocks.
Deltas of bfloat16 and mostly those of float16 lie on grids so coarse that nearly all of a bin is at
its lower end; of float32, a bin holds less than a thousandth of the entries. Where a bin still has
more entries than there is room for, further reads narrow it by 14 bits each.
"""

from __future__ import annotations

import bisect
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate, chain
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergecore import ops
from mergecore.brackets import Sample
from mergecore.methods.base import Keep
from mergecore.ops import Drop, Measure, Place

BLOCK = ops.GRAM_BLOCK  # entries, at least, of which ties are counted and sums are taken together
ROOM = 1 << 20  # entries that all ranges of a tensor collect at most
RANK_BYTES = 16 << 20  # of probabilities, and on a GPU of what sorts for them, at a time

SHIFT = 42  # key bits below a bin of the first read: ten bits of mantissa are left
BINADE = 1 << 10  # bins of one exponent
FIRST, LAST = 863 * BINADE, 1208 * BINADE  # bins of 2^-160 to 2^185: beyond every float32 difference, rescaled
BINS = LAST - FIRST
INFINITE = 0x7FF << 52  # the key of infinity; NaN has larger ones
DIGIT = 14  # bits by which a further read narrows a bin
MOST_BINS = 1 << 13  # of a bracket
PIECES, PIECE = 64, 256  # of a window that is sampled, and entries of each

Selected = tuple[float, int]
"""A top set: its smallest magnitude, and the index before which entries of that magnitude belong to it."""


@dataclass(frozen=True)
class Part:
    """A window as the kernels take it, and the index in the tensor of its first entry."""

    first_entry: int
    base: Tensor | None
    models: Sequence[Tensor]
    beside: Sequence[Tensor] = ()
    """What is read along with each model (TensorJob.beside)."""


class Reads(Protocol):
    """The entries of one tensor, to be read again and again."""

    @property
    def entries(self) -> int: ...

    @property
    def block(self) -> int:
        """Entries of which ties are counted and sums are taken together."""

    @property
    def device(self) -> torch.device: ...

    def planned(self) -> Iterator[Part]:
        """Windows of whole blocks (but for the last), in order: one of the reads that were planned. The last window is
        valid until the next one is asked for."""

    def further(self) -> Iterator[Part]:
        """The same, for a read that was not planned."""

    def spots(self) -> Iterator[Part]:
        """Whole rows spread over the tensor, for a sample: pieces of equal size, few of many, or none."""

    def only(self, first_entry: int, entries: int) -> Part:
        """A few entries, whole rows of one matrix."""

    def nonfinite(self) -> None:
        """Some magnitudes are NaN or Inf; may raise."""


READS = {Measure.OWN: 0, Measure.SPREAD: 0, Measure.ROWS: 1, Measure.COMPETITION: 2}
"""What a measure needs to know of a tensor before: the divergence of every row, or the least and largest |d|."""


def planned_reads(keeps: Sequence[Keep]) -> int:
    """How often `compared` and `choose` read a tensor."""
    before = READS[keeps[0].measure] if keeps else 0
    return before + 2 * any(keep.by_magnitude for keep in keeps) + any(keep.rescale_by_sums for keep in keeps)


def held_bytes(keeps: Sequence[Keep], entries: int, columns: int) -> int:
    """What `choose` holds at most, with what a tensor of `columns` entries per row needs for its ranks."""
    sets, queries = _sets(keeps), _query_count(keeps)
    blocks = -(-entries // BLOCK)
    held = 0
    if queries:
        held = 8 * (2 * sets * BINS + queries * blocks) + 32 * min(ROOM, entries * queries)
    if any(keep.rescale_by_sums for keep in keeps):
        held = max(held, 48 * len(keeps) * blocks)
    if any(keep.by_row for keep in keeps):
        held += RANK_BYTES + 48 * len(keeps) * columns
    if keeps and keeps[0].measure is Measure.ROWS:
        held += 8 * len(keeps) * (entries // max(1, columns))
    return held


def _sets(keeps: Sequence[Keep]) -> int:
    return 1 if keeps and keeps[0].measure is Measure.SPREAD else len(keeps)


def _query_count(keeps: Sequence[Keep]) -> int:
    most = {Measure.COMPETITION: 2, Measure.ROWS: 6}
    return sum(most.get(keep.measure, (keep.density < 1) + (keep.outliers > 0)) for keep in keeps[: _sets(keeps)])


def share(fraction: float, count: int) -> int:
    """round-half-up(fraction * count), of the fraction as it is written."""
    return math.floor(Fraction(repr(float(fraction))) * count + Fraction(1, 2))


@dataclass(frozen=True)
class _Query:
    """The top `count` of one set of magnitudes."""

    which: int
    count: int


@dataclass(frozen=True)
class _Bin:
    """Keys from `low` on and below `high`; `rank` (from 1, falling magnitude) is that of the threshold in it."""

    low: int
    high: int
    rank: int
    entries: int
    is_outer: bool = False
    """Whether it holds what lies beyond the bins that were counted."""


def compared(keeps: Sequence[Keep], reads: Reads, place: Place) -> Place:
    """`place` with what `keeps` compare, read where it has to be known before."""
    measure = keeps[0].measure if keeps else Measure.OWN
    if measure is Measure.ROWS:
        return replace(place, measure=measure, scales=_divergences(len(keeps), reads, place))
    if measure is Measure.COMPETITION:
        return replace(place, measure=measure, scales=_extremes(len(keeps), reads, place))
    return replace(place, measure=measure)


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
    queries = [_Query(n, count) for n in range(models) for count in sorted({1, reads.entries}) if reads.entries]
    found = _select(queries, _located(queries, models, reads, place), reads, place)
    pairs = [(found[n, reads.entries][0], found[n, 1][0]) if queries else (0.0, 0.0) for n in range(models)]
    return torch.tensor(
        [(least, largest - least) for least, largest in pairs], dtype=torch.float64, device=reads.device
    )


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
    histogram = _counted(sets, reads.planned(), reads, place) if place.measure is not Measure.OWN else None
    zeros = [0] * sets if histogram is None else histogram[:, 0].tolist()
    tops = [_top_counts(keep, entries, none) for keep, none in zip(keeps[:sets], zeros, strict=True)]
    wanted = {_Query(n, count) for n, counts in enumerate(tops) for count in counts if 0 < count < entries}
    for n, keep in enumerate(keeps[:sets]):
        if entries and keep.fence:
            wanted |= {_Query(n, rank) for quarter in (1, 2, 3) for rank in _quarter_ranks(quarter, entries)}
        if entries and keep.measure is Measure.COMPETITION:
            wanted.add(_Query(n, 1))
    queries = sorted(wanted, key=lambda query: (query.which, query.count))
    if histogram is None:
        bins = _located(queries, sets, reads, place)
    else:
        bins = [_bin_of(histogram[query.which], FIRST, query.count) for query in queries]
    found = _select(queries, bins, reads, place)
    out = []
    for n, (keep, drop) in enumerate(zip(keeps, drops, strict=True)):
        which = min(n, sets - 1)
        outliers, kept = tops[which]
        if keep.fence and entries:
            drop = replace(drop, least=_fence(which, entries, found), least_before=entries)
        elif kept <= outliers:
            drop = replace(drop, least=math.inf)
        elif kept < entries:
            drop = replace(drop, least=found[which, kept][0], least_before=found[which, kept][1])
        elif keep.measure is Measure.COMPETITION:
            drop = replace(drop, least=0.0, least_before=entries)
        if 0 < outliers < kept:
            drop = replace(drop, most=found[which, outliers][0], most_before=found[which, outliers][1])
        elif keep.measure is Measure.COMPETITION and entries:
            drop = replace(drop, most=found[which, 1][0])
        out.append(drop)
    return out


def _counted(sets: int, parts: Iterable[Part], reads: Reads, place: Place) -> Tensor:
    """A read's histogram of all bins, int64 (sets, BINS)."""
    histogram = torch.zeros(sets, BINS, dtype=torch.int64, device=reads.device)
    _count(histogram, [FIRST] * sets, parts, reads, place)
    return histogram


def _count(histogram: Tensor, offsets: Sequence[int], parts: Iterable[Part], reads: Reads, place: Place) -> None:
    for part in parts:
        here = replace(place, first_entry=part.first_entry)
        ops.count_magnitudes(part.base, part.models, histogram, shift=SHIFT, offsets=offsets, clamp=True, place=here)
    if int(histogram[:, -1].sum()):
        reads.nonfinite()


def _located(queries: Sequence[_Query], models: int, reads: Reads, place: Place) -> list[_Bin]:
    """The bin of each query, of magnitudes that are compared as they are: one read, or two where a sample misled."""
    parts = reads.planned()
    head = next(parts, None)
    parts = chain([head] if head is not None else [], parts)
    brackets = _brackets(queries, head, reads, place) if head is not None and reads.device.type == "cpu" else []
    if not brackets:
        histogram = _counted(models, parts, reads, place)
        return [_bin_of(histogram[query.which], FIRST, query.count) for query in queries]
    # A set for each query: its model among few bins, with one on either side for what lies beyond.
    offsets = [low - 2 for low, _ in brackets]
    few = torch.zeros(len(queries), max(high - low for low, high in brackets) + 5, dtype=torch.int64)
    drops = [place.drops[query.which] for query in queries] if place.drops else []
    asked = (replace(part, models=[part.models[query.which] for query in queries]) for part in parts)
    _count(few, offsets, asked, reads, replace(place, drops=drops))
    bins = [_bin_of(row, first, query.count) for row, first, query in zip(few, offsets, queries, strict=True)]
    if any(found.is_outer for found in bins):
        histogram = _counted(models, reads.further(), reads, place)
        bins = [_bin_of(histogram[query.which], FIRST, query.count) for query in queries]
    return bins


def _brackets(queries: Sequence[_Query], head: Part, reads: Reads, place: Place) -> list[tuple[int, int]]:
    """The first and the last bin where each query's may be; empty where they are not few."""
    found = []
    samples = list(_sampled(head, reads, place))
    for query in queries if samples else ():
        bracket = samples[query.which].bracket(query.count)
        low, high = (_key(end) >> SHIFT for end in bracket or (0.0, 0.0))
        if bracket is None or high - low > MOST_BINS - 5:
            return []
        found.append((low, high))
    return found


def _sampled(head: Part, reads: Reads, place: Place) -> Iterator[Sample]:
    """Of each model, from the first window if that is the whole tensor."""
    entries = reads.entries
    if head.models[0].numel() < entries:
        pieces = [_sizes(part.base, part.models, place, part.first_entry) for part in reads.spots()]
        yield from (Sample(np.stack(own), entries) for own in zip(*pieces, strict=True))
        return

    def pieces_of(whole: Tensor) -> Tensor:
        if entries <= PIECES * PIECE:
            return whole.view(1, -1)
        step = (entries - PIECE) // (PIECES - 1)
        return whole.view(-1).as_strided((PIECES, PIECE), (step, 1)).contiguous()

    base = None if head.base is None else pieces_of(head.base)
    # Which entry a random number drops does not matter to what is left of many.
    sizes = _sizes(base, [pieces_of(model) for model in head.models], place, 0)
    yield from (Sample(own, entries) for own in sizes)


def _sizes(base: Tensor | None, models: Sequence[Tensor], place: Place, first_entry: int) -> NDArray[np.float64]:
    return ops.magnitudes(base, models, replace(place, first_entry=first_entry)).numpy()


def _key(magnitude: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", magnitude))[0])


def _quarter_ranks(quarter: int, entries: int) -> tuple[int, int]:
    """The ranks, by falling magnitude, of the entries on both sides of a quartile (or of the median)."""
    below, rest = divmod(quarter * (entries - 1), 4)
    return entries - below, entries - below - (rest > 0)


def _fence(which: int, entries: int, found: Mapping[tuple[int, int], Selected]) -> float:
    """Median + 1.5 (Q3 - Q1), each between two entries by its place (linear interpolation)."""

    def quantile(quarter: int) -> float:
        low, high = (found[which, rank][0] for rank in _quarter_ranks(quarter, entries))
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


def _select(queries: Sequence[_Query], bins: list[_Bin], reads: Reads, place: Place) -> dict[tuple[int, int], Selected]:
    """The top set of each query, whose bin is known."""
    # Where nothing is asked, the planned read still has to be taken.
    found = _collected(queries, bins, reads, place, planned=True)
    for n, query in enumerate(queries):
        while found[n] is None:
            bins[n] = _narrowed(query, bins[n], reads, place)
            found[n] = _collected([query], [bins[n]], reads, place, planned=False)[0]
    return {
        (query.which, query.count): selected
        for query, selected in zip(queries, found, strict=True)
        if selected is not None
    }


def _bin_of(counts: Tensor, offset: int, rank: int) -> _Bin:
    """The bin that holds the entry of `rank` (from 1, the largest first) among those from `offset` on, clamped."""
    number, rank, entries = _number_of(counts, rank)
    last = len(counts) - 1
    # Zeros and what is not finite have bins of their own, the ones beside them hold all other keys beyond.
    low = {0: 0, 1: 1, last: INFINITE}.get(number, (offset + number) << SHIFT)
    high = {0: 1, last - 1: INFINITE, last: 2**63 - 1}.get(number, (offset + number + 1) << SHIFT)
    return _Bin(low, high, rank, entries, is_outer=number in (1, last - 1))


def _number_of(counts: Tensor, rank: int) -> tuple[int, int, int]:
    """The bin that holds the entry of `rank` (from 1, the highest bins first), its rank there, the bin's entries."""
    first = 0
    if counts.numel() % BINADE == 0:
        # The sums of a long histogram, then only the part that matters: few passes over all bins.
        binade, rank, _ = _place_of(counts.view(-1, BINADE).sum(1), rank)
        first = binade * BINADE
        counts = counts[first : first + BINADE]
    number, rank, entries = _place_of(counts, rank)
    return first + number, rank, entries


def _place_of(counts: Tensor, rank: int) -> tuple[int, int, int]:
    above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, rank))
    number = counts.numel() - 1 - place
    entries = int(counts[number])
    return number, rank - (int(above[place]) - entries), entries


def _collected(
    queries: Sequence[_Query], bins: Sequence[_Bin], reads: Reads, place: Place, *, planned: bool
) -> list[Selected | None]:
    """Each query's top set from one read; None where its bin has more entries than there is room for."""
    parts = reads.planned() if planned else reads.further()
    if not queries:
        for _ in parts:
            pass
        return []
    room = min(max(1, ROOM // len(queries)), max(each.entries for each in bins))
    ranges = [(query.which, each.low, each.high) for query, each in zip(queries, bins, strict=True)]
    keys = torch.empty(len(ranges), room, dtype=torch.int64, device=reads.device)
    indices = torch.empty_like(keys)
    found = torch.zeros(len(ranges), dtype=torch.int64, device=reads.device)
    counted: list[Tensor] = []
    windows: list[tuple[int, int]] = []
    for part in parts:
        blocks = -(-part.models[0].numel() // reads.block)
        windows.append((part.first_entry, part.models[0].numel()))
        equal = torch.zeros(len(ranges), blocks, dtype=torch.int64, device=reads.device)
        here = replace(place, first_entry=part.first_entry)
        ops.collect_magnitudes(
            part.base, part.models, ranges, keys, indices, found, equal, block=reads.block, place=here
        )
        counted.append(equal)
    equals = torch.cat(counted, dim=1)
    ends = list(accumulate(each.shape[1] for each in counted))
    out: list[Selected | None] = []
    for n, (query, each) in enumerate(zip(queries, bins, strict=True)):
        within = int(found[n])
        if each.rank > within:
            kept = each.rank - within
            block = int(torch.searchsorted(equals[n].cumsum(0), kept))
            window = bisect.bisect_right(ends, block)
            first, entries = windows[window]
            inside = (block - (ends[window] - counted[window].shape[1])) * reads.block
            length = min(reads.block, entries - inside)
            if planned and window == len(windows) - 1:
                held = _piece(part, inside, length)
            else:
                held = reads.only(first + inside, length)
            before = _tie_limit(query, each.low, kept - int(equals[n, :block].sum()), held, place)
            out.append((_magnitude(each.low), before))
        elif within > room:
            out.append(None)
        else:
            out.append(_ranked(keys[n, :within], indices[n, :within], each.rank))
    return out


def _ranked(keys: Tensor, indices: Tensor, rank: int) -> Selected:
    key = int(keys.sort(descending=True).values[rank - 1])
    larger = int((keys > key).sum())
    ties = indices[keys == key].sort().values
    return _magnitude(key), int(ties[rank - larger - 1]) + 1


def _piece(part: Part, first: int, entries: int) -> Part:
    """Whole rows of a window."""
    columns = part.models[0].shape[1]
    rows = slice(first // columns, (first + entries) // columns)
    base = None if part.base is None else part.base[rows]
    return Part(part.first_entry + first, base, [model[rows] for model in part.models])


def _tie_limit(query: _Query, key: int, kept: int, block: Part, place: Place) -> int:
    """The index after the `kept`-th entry of a block whose key is `key`."""
    entries = block.models[0].numel()
    keys = torch.empty(1, entries, dtype=torch.int64, device=block.models[0].device)
    indices = torch.empty_like(keys)
    found = torch.zeros(1, dtype=torch.int64, device=keys.device)
    ops.collect_magnitudes(
        block.base, block.models, [(query.which, key - 1, key + 1)], keys, indices, found, torch.zeros_like(found),
        block=entries, place=replace(place, first_entry=block.first_entry),
    )  # fmt: skip
    return int(indices[0, : int(found[0])].sort().values[kept - 1]) + 1


def _narrowed(query: _Query, within: _Bin, reads: Reads, place: Place) -> _Bin:
    """The part of a bin that holds the threshold, by a read of its own."""
    shift = max(0, (within.high - within.low - 1).bit_length() - DIGIT)
    offset = within.low >> shift
    bins = ((within.high - 1) >> shift) - offset + 1
    # Where a model is compared by itself, the others need not be looked at.
    own = place.measure in (Measure.OWN, Measure.ROWS)
    mine = slice(query.which, query.which + 1) if own else slice(None)
    scales = None if place.scales is None else place.scales[mine]
    place = replace(place, drops=place.drops[mine], scales=scales)
    histogram = torch.zeros(0, bins, dtype=torch.int64, device=reads.device)
    for part in reads.further():
        models = part.models[mine]
        if not len(histogram):
            sets = 1 if place.measure is Measure.SPREAD else len(models)
            histogram = torch.zeros(sets, bins, dtype=torch.int64, device=reads.device)
        here = replace(place, first_entry=part.first_entry)
        ops.count_magnitudes(
            part.base, models, histogram, shift=shift, offsets=[offset] * len(histogram), clamp=False, place=here
        )
    number, rank, entries = _number_of(histogram[0 if own else query.which], within.rank)
    low, high = (offset + number) << shift, (offset + number + 1) << shift
    return _Bin(max(low, within.low), min(high, within.high), rank, entries)


def _magnitude(key: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", key))[0])
