"""What must be known of the whole model before its first tensor is blended: sums, and top sets over all tensors.

One streamed read of the tensors that are compared together, or a few, in the order of the plan. What it
finds takes the place of what a tensor's own statistics would find, so that methods do not know the difference.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, repeat

import torch

from mergecore import ops, statistics
from mergecore.jobs import MODEL_BLOCKS, TensorJob
from mergecore.methods.base import Gram, Keep
from mergecore.selecting import choose, kept_sums
from mergecore.topsets import Part, Reads


@dataclass(frozen=True)
class Found:
    """What a survey tells about one tensor."""

    drops: Sequence[ops.Drop] = ()
    """What is dropped in front of the method."""
    kept: Sequence[ops.Drop] = ()
    """What the method keeps."""
    gram: Gram | None = None
    """The model's Gram matrix."""


Surveyed = tuple[TensorJob, statistics.MatrixReads]


def order(jobs: Sequence[TensorJob]) -> Iterator[TensorJob]:
    """The jobs as `survey` reads them: one after the other, or all of them once and then all again."""
    if jobs and jobs[0].keeps:
        for _ in range(jobs[0].surveyed_reads):
            yield from jobs
    else:
        for job in jobs:
            yield from repeat(job, job.surveyed_reads)


def survey(tensors: Sequence[Surveyed], seed: int) -> dict[str, Found]:
    """What tensors of scope `model` tell together, by name; takes all of their reads but the blend."""
    if not tensors:
        return {}
    return _top_sets(tensors) if tensors[0][0].keeps else _gram(tensors, seed)


def _gram(tensors: Sequence[Surveyed], seed: int) -> dict[str, Found]:
    """The sum of the tensors' Gram matrices, of the deltas that are left of each.

    Tensors with NaN or Inf do not count, if the reads let them pass.
    """
    drops, sums = {}, []
    for job, reads in tensors:
        drops[job.name] = statistics.chosen(job, job.sparsify, reads, ops.Place(), seed) if job.sparsify else []
        sums.append(statistics.of_matrix(job, 0, reads, drops[job.name])["gram"].products)
    finite = [products for products in sums if bool(products.isfinite().all())]
    together = torch.zeros_like(sums[0])
    for entry in range(together.numel()):
        # fsum is exact: the same whatever the order.
        together.view(-1)[entry] = math.fsum(float(products.view(-1)[entry]) for products in finite)
    gram = Gram(together, anchored=False)
    return {name: Found(drops=dropped, gram=gram) for name, dropped in drops.items()}


def _top_sets(tensors: Sequence[Surveyed]) -> dict[str, Found]:
    """The largest deltas of the whole model; equal ones in the order of the tensors, then of their entries."""
    job, _ = tensors[0]
    chained = Chained([reads for _, reads in tensors])
    place = ops.Place()
    # Deltas are compared as they are: no random numbers, so keys do not matter.
    limits = choose([replace(keep, rescale="none") for keep in job.keeps], chained, place, [0] * len(job.keeps))
    kept = [
        [_within(drop, first, reads.entries) for drop in limits]
        for first, (_, reads) in zip(chained.firsts, tensors, strict=True)
    ]
    scales = _scales(job.keeps, tensors, kept, place)
    return {
        job.name: Found(kept=[replace(drop, scale=scale) for drop, scale in zip(own, scales, strict=True)])
        for (job, _), own in zip(tensors, kept, strict=True)
    }


def _scales(
    keeps: Sequence[Keep], tensors: Sequence[Surveyed], kept: Sequence[Sequence[ops.Drop]], place: ops.Place
) -> list[float]:
    """Per model what brings the sum of |d| over all tensors back to what it was, where it is rescaled so."""
    if not any(keep.rescale_by_sums for keep in keeps):
        return [1.0] * len(keeps)
    sums = [kept_sums(keeps, own, reads, place) for (_, reads), own in zip(tensors, kept, strict=True)]
    scales = []
    for n, keep in enumerate(keeps):
        before, after = (math.fsum(tensor[n][which] for tensor in sums) for which in (0, 1))
        scales.append(before / after if keep.rescale_by_sums and after > 0 else 1.0)
    return scales


def _within(drop: ops.Drop, first: int, entries: int) -> ops.Drop:
    """A mask of the whole model on the tensor whose entries start at `first`."""
    least, most = (min(max(limit - first, 0), entries) for limit in (drop.least_before, drop.most_before))
    return replace(drop, least_before=least, most_before=most)


class Chained:
    """Several tensors, read as one: their entries one after the other (topsets.Reads)."""

    def __init__(self, parts: Sequence[Reads]) -> None:
        self.parts = parts
        *self.firsts, self.entries = accumulate((reads.entries for reads in parts), initial=0)
        block = max(reads.block for reads in parts)
        self.block = block * max(1, -(-self.entries // (block * MODEL_BLOCKS)))
        self.device = parts[0].device

    def planned(self) -> Iterator[Part]:
        for first, reads in zip(self.firsts, self.parts, strict=True):
            yield from _moved(reads.planned(), first)

    def skip(self) -> None:
        for reads in self.parts:
            reads.skip()

    def further(self) -> Iterator[Part]:
        for first, reads in zip(self.firsts, self.parts, strict=True):
            yield from _moved(reads.further(), first)

    def spots(self) -> Iterator[Part]:
        return iter(())  # tensors differ too much

    def only(self, first_entry: int, entries: int) -> Part:
        number = bisect.bisect_right(self.firsts, first_entry) - 1
        first = self.firsts[number]
        return replace(self.parts[number].only(first_entry - first, entries), first_entry=first_entry)

    def nonfinite(self) -> None:
        for reads in self.parts:
            if not all(_is_finite(part) for part in reads.further()):
                reads.nonfinite()


def _moved(parts: Iterator[Part], by: int) -> Iterator[Part]:
    for part in parts:
        yield replace(part, first_entry=part.first_entry + by)


def _is_finite(part: Part) -> bool:
    tensors = part.models if part.base is None else (part.base, *part.models)
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
