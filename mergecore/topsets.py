"""Top sets by magnitude, exact, by streamed reads of a tensor in bounded memory.

Not for what is kept of them (selecting.py). Knows nothing of files and devices: reads are given.

A top set is found by radix selection over the bits of the magnitude. The first read counts them by
exponent and ten bits of mantissa, which tells the bin of each threshold; the second collects the entries
of that bin with their indices, except those at its lower end, which are counted in blocks.
Deltas of bfloat16 and mostly those of float16 lie on grids so coarse that nearly all of a bin is at
its lower end; of float32, a bin holds less than a thousandth of the entries. Where a bin still has
more entries than there is room for, further reads narrow it by 14 bits each.
Of a tensor that is no larger than a sample all magnitudes are held, and tell the thresholds at once.
On a CPU the first read counts few of these bins, about where a sample has the threshold (brackets.py), and
in parts of the tensor what is at their lower ends. Where that tells the threshold, there is no second read.
"""

from __future__ import annotations

import bisect
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergecore import ops
from mergecore.brackets import Sample
from mergecore.ops import Measure, Place

ROOM = 1 << 20  # entries that all ranges of a tensor collect at most

SHIFT = 42  # key bits below a bin of the first read: ten bits of mantissa are left
BINADE = 1 << 10  # bins of one exponent
FIRST, LAST = 863 * BINADE, 1208 * BINADE  # bins of 2^-160 to 2^185: beyond every float32 difference, rescaled
BINS = LAST - FIRST
INFINITE = 0x7FF << 52  # the key of infinity; NaN has larger ones
DIGIT = 14  # bits by which a further read narrows a bin

MOST_BINS = 1 << 13  # of a bracket
FINE, FEW_BINS = 40, 1 << 11  # the same with twelve bits of mantissa, where they are fewer: more is at their lower ends
MOST_BRACKETS = 64  # counted together: kMaxModels in csrc/kernels.h
PIECES, PIECE = 64, 256  # of a window that is sampled, and entries of each
COUNTERS = 1 << 20  # of lower ends in all parts of a tensor, at most
PARTS = 1 << 10  # of a tensor, about
SEARCHED = 1 << 20  # entries among which ties are looked for at a time


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

    def skip(self) -> None:
        """Passes over one of the reads that were planned."""

    def further(self) -> Iterator[Part]:
        """The same as `planned`, for a read that was not planned."""

    def spots(self) -> Iterator[Part]:
        """Whole rows spread over the tensor, for a sample: pieces of equal size, few of many, or none."""

    def only(self, first_entry: int, entries: int) -> Part:
        """A few entries, whole rows of one matrix."""

    def nonfinite(self) -> None:
        """Some magnitudes are NaN or Inf; may raise."""


@dataclass(frozen=True, order=True)
class Query:
    """The top `count` of one set of magnitudes."""

    which: int
    count: int


@dataclass(frozen=True)
class Selected:
    """A top set: its smallest magnitude, and the index before which entries of that magnitude belong to it."""

    least: float
    before: int


@dataclass(frozen=True)
class _Bin:
    """Keys from `low` on and below `high`; `rank` (from 1, falling magnitude) is that of the threshold in it."""

    low: int
    high: int
    rank: int
    entries: int
    number: int = 0
    """Among the bins that were counted first."""


@dataclass(frozen=True)
class _FewBins:
    """Where the threshold of each query may be, with a bin on either side for what lies beyond."""

    offsets: Mapping[Query, int]
    shift: int
    bins: int
    part: int
    """Entries of the parts in which their lower ends are counted."""


@dataclass(frozen=True)
class _Equal:
    """How many entries have one magnitude, as one read counted them piece by piece of its windows."""

    length: int
    """Entries of a piece; the last one of a window may have fewer."""
    windows: Sequence[tuple[int, int, Tensor]]
    """Their first entry, their entries, and the counts of their pieces."""
    last: Part | None
    """The last window, if it is still there."""


def top_sets(
    queries: Sequence[Query], sets: int, reads: Reads, place: Place, histogram: Tensor | None = None
) -> dict[Query, Selected]:
    """The top set of each query among `sets` of magnitudes: two planned reads, of which the second may be skipped.

    `histogram`: what `counted` told with the first of them; needed where magnitudes are not compared as they are.
    """
    if histogram is None:
        bins, found = _located(queries, sets, reads, place)
    else:
        bins, found = _binned(queries, histogram), {}
    if bins:
        found |= _collected(bins, reads, place, planned=True)
    else:
        reads.skip()
    for query, within in bins.items():
        while query not in found:
            within = _narrowed(query, within, reads, place)
            found |= _collected({query: within}, reads, place, planned=False)
    return found


def counted(sets: int, reads: Reads, place: Place) -> Tensor:
    """A planned read's histogram of all bins, int64 (sets, BINS); zeros have the first bin."""
    return _counted(sets, reads.planned(), reads, place)


def _counted(sets: int, parts: Iterable[Part], reads: Reads, place: Place) -> Tensor:
    histogram = torch.zeros(sets, BINS, dtype=torch.int64, device=reads.device)
    for part in parts:
        ops.count_magnitudes(
            part.base, part.models, histogram, shift=SHIFT, offsets=[FIRST] * sets, clamp=True,
            place=replace(place, first_entry=part.first_entry),
        )  # fmt: skip
    if int(histogram[:, -1].sum()):
        reads.nonfinite()
    return histogram


def _binned(queries: Sequence[Query], histogram: Tensor) -> dict[Query, _Bin]:
    """The bin of each query in a histogram of all bins."""
    return {query: _bin_of(histogram[query.which], FIRST, query.count, SHIFT) for query in queries}


def _located(
    queries: Sequence[Query], sets: int, reads: Reads, place: Place
) -> tuple[dict[Query, _Bin], dict[Query, Selected]]:
    """The top sets that counting tells, and the bins of the others, of magnitudes that are compared as they are: one
    read, or two where a sample misled."""
    parts = reads.planned()
    head = next(parts, None)
    few = None
    if head is not None and reads.device.type == "cpu":
        if head.models[0].numel() == reads.entries <= PIECES * PIECE:
            sizes = _sizes(head.base, head.models, place, head.first_entry).reshape(len(head.models), -1)
            if np.isfinite(sizes).all():
                deque(parts, 0)  # there are no more
                return {}, {query: _selected(sizes[query.which], query.count) for query in queries}
        else:
            few = _few_bins(queries, head, reads, place)
    parts = chain([head] if head is not None else [], parts)
    if few is not None:
        told = _bracketed(few, parts, reads, place)
        if told is not None:
            return told
        parts = reads.further()
    return _binned(queries, _counted(sets, parts, reads, place)), {}


def _selected(sizes: NDArray[np.float64], count: int) -> Selected:
    """A top set of magnitudes that are all there."""
    place = sizes.size - count
    least = np.partition(sizes, place)[place]
    ties = np.flatnonzero(sizes == least)
    kept = count - np.count_nonzero(sizes > least)
    return Selected(float(least), int(ties[kept - 1]) + 1)


def _few_bins(queries: Sequence[Query], head: Part, reads: Reads, place: Place) -> _FewBins | None:
    """The bins where a sample has the queries' thresholds; None where they are not few."""
    samples = list(_sampled(head, reads, place)) if 0 < len(queries) <= MOST_BRACKETS else []
    brackets = [samples[query.which].bracket(query.count) for query in queries if samples]
    keys = [(_key(bracket[0]), _key(bracket[1])) for bracket in brackets if bracket is not None]
    if not samples or len(keys) < len(queries):
        return None
    for shift, most in ((FINE, FEW_BINS), (SHIFT, MOST_BINS)):
        bins = max((high >> shift) - (low >> shift) for low, high in keys) + 5
        part = _part_length(len(queries) * bins, head, reads)
        if bins <= most and part:
            offsets = {query: (low >> shift) - 2 for query, (low, _) in zip(queries, keys, strict=True)}
            return _FewBins(offsets, shift, bins, part)
    return None


def _sampled(head: Part, reads: Reads, place: Place) -> Iterator[Sample]:
    """Of each model, from the first window if that is the whole tensor."""
    entries = reads.entries
    if head.models[0].numel() < entries:
        pieces = [_sizes(part.base, part.models, place, part.first_entry) for part in reads.spots()]
        yield from (Sample(np.stack(own), entries) for own in zip(*pieces, strict=True))
        return

    def pieces_of(whole: Tensor) -> Tensor:
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


def _part_length(bins: int, head: Part, reads: Reads) -> int:
    """Entries of the parts in which the lower ends of `bins` are counted; 0 where windows alone are too many parts.

    Windows that end with a matrix are shorter: they may be twice as many as the first one tells. Each ends with a part.
    """
    most = COUNTERS // bins
    if 4 * reads.entries > most * head.models[0].numel():
        return 0
    return -(-reads.entries // (min(PARTS, most // 2) * reads.block)) * reads.block


def _bracketed(
    few: _FewBins, parts: Iterable[Part], reads: Reads, place: Place
) -> tuple[dict[Query, _Bin], dict[Query, Selected]] | None:
    """`_located` from a read that counts few bins; None where a threshold is not among them."""
    queries = list(few.offsets)
    histogram = torch.zeros(len(queries), few.bins, dtype=torch.int64)
    drops = [place.drops[query.which] for query in queries] if place.drops else []
    windows: list[tuple[int, int, Tensor]] = []
    for part in parts:
        entries = part.models[0].numel()
        ends = torch.zeros(len(queries), -(-entries // few.part), few.bins, dtype=torch.int32)
        ops.count_bracketed(
            part.base, [part.models[query.which] for query in queries], histogram, ends, shift=few.shift,
            offsets=list(few.offsets.values()), part=few.part,
            place=replace(place, first_entry=part.first_entry, drops=drops),
        )  # fmt: skip
        windows.append((part.first_entry, entries, ends))
    if int(histogram[:, -1].sum()):
        reads.nonfinite()
    left = {
        query: _bin_of(counts, first, query.count, few.shift)
        for (query, first), counts in zip(few.offsets.items(), histogram, strict=True)
    }
    if any(within.number in (1, few.bins - 2) for within in left.values()):
        return None
    found = {}
    for n, (query, within) in enumerate(list(left.items())):
        equal = _Equal(few.part, [(first, count, ends[n, :, within.number]) for first, count, ends in windows], part)
        larger = within.entries - sum(int(counts.sum()) for _, _, counts in equal.windows)
        if within.rank > larger:
            found[query] = _tied(query, within.low, within.rank - larger, equal, reads, place)
            del left[query]
    return left, found


def _bin_of(counts: Tensor, offset: int, rank: int, shift: int) -> _Bin:
    """The bin that holds the entry of `rank` (from 1, the largest first) among those from `offset` on, clamped."""
    number, rank, entries = _number_of(counts, rank)
    last = len(counts) - 1
    # Zeros and what is not finite have bins of their own, the ones beside them hold all other keys beyond.
    low = {0: 0, 1: 1, last: INFINITE}.get(number, (offset + number) << shift)
    high = {0: 1, last - 1: INFINITE, last: 2**63 - 1}.get(number, (offset + number + 1) << shift)
    return _Bin(low, high, rank, entries, number)


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


def _collected(bins: Mapping[Query, _Bin], reads: Reads, place: Place, *, planned: bool) -> dict[Query, Selected]:
    """The top sets from one read, but for those whose bin has more entries than there is room for."""
    room = min(max(1, ROOM // len(bins)), max(within.entries for within in bins.values()))
    ranges = [(query.which, within.low, within.high) for query, within in bins.items()]
    keys = torch.empty(len(ranges), room, dtype=torch.int64, device=reads.device)
    indices = torch.empty_like(keys)
    found = torch.zeros(len(ranges), dtype=torch.int64, device=reads.device)
    windows: list[tuple[int, int, Tensor]] = []
    for part in reads.planned() if planned else reads.further():
        entries = part.models[0].numel()
        ends = torch.zeros(len(ranges), -(-entries // reads.block), dtype=torch.int64, device=reads.device)
        here = replace(place, first_entry=part.first_entry)
        ops.collect_magnitudes(
            part.base, part.models, ranges, keys, indices, found, ends, block=reads.block, place=here
        )
        windows.append((part.first_entry, entries, ends))
    out = {}
    for n, (query, within) in enumerate(bins.items()):
        larger = int(found[n])
        if within.rank > larger:
            counts = [(first, count, ends[n]) for first, count, ends in windows]
            equal = _Equal(reads.block, counts, part if planned else None)
            out[query] = _tied(query, within.low, within.rank - larger, equal, reads, place)
        elif larger <= room:
            out[query] = _ranked(keys[n, :larger], indices[n, :larger], within.rank)
    return out


def _ranked(keys: Tensor, indices: Tensor, rank: int) -> Selected:
    key = int(keys.sort(descending=True).values[rank - 1])
    larger = int((keys > key).sum())
    ties = indices[keys == key].sort().values
    return Selected(_magnitude(key), int(ties[rank - larger - 1]) + 1)


def _tied(query: Query, key: int, kept: int, equal: _Equal, reads: Reads, place: Place) -> Selected:
    """The top set that ends with the `kept`-th of the entries whose key is `key`."""
    ends = list(accumulate(len(counts) for _, _, counts in equal.windows))
    together = torch.cat([counts for _, _, counts in equal.windows])
    piece = int(torch.searchsorted(together.cumsum(0), kept))
    number = bisect.bisect_right(ends, piece)
    first, entries, counts = equal.windows[number]
    begin = (piece - (ends[number] - len(counts))) * equal.length
    end = min(begin + equal.length, entries)
    kept -= int(together[:piece].sum())
    step = -(-SEARCHED // reads.block) * reads.block
    for inside in range(begin, end, step):
        length = min(step, end - inside)
        if equal.last is not None and number == len(ends) - 1:
            held = _piece(equal.last, inside, length)
        else:
            held = reads.only(first + inside, length)
        ties = _ties(query, key, held, place)
        if kept <= len(ties):
            break
        kept -= len(ties)
    return Selected(_magnitude(key), int(ties[kept - 1]) + 1)


def _piece(part: Part, first: int, entries: int) -> Part:
    """Whole rows of a window."""
    columns = part.models[0].shape[1]
    rows = slice(first // columns, (first + entries) // columns)
    base = None if part.base is None else part.base[rows]
    return Part(part.first_entry + first, base, [model[rows] for model in part.models])


def _ties(query: Query, key: int, part: Part, place: Place) -> Tensor:
    """The indices of the entries whose key is `key`, rising."""
    entries = part.models[0].numel()
    keys = torch.empty(1, entries, dtype=torch.int64, device=part.models[0].device)
    indices = torch.empty_like(keys)
    found = torch.zeros(1, dtype=torch.int64, device=keys.device)
    ops.collect_magnitudes(
        part.base, part.models, [(query.which, key - 1, key + 1)], keys, indices, found, torch.zeros_like(found),
        block=entries, place=replace(place, first_entry=part.first_entry),
    )  # fmt: skip
    return indices[0, : int(found[0])].sort().values


def _narrowed(query: Query, within: _Bin, reads: Reads, place: Place) -> _Bin:
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
