"""What the windows of a tensor tell before it is blended: moments, Gram matrices, and which deltas are kept.

Passes over reads that are given, one after the other; sums are float64 (docs/design.md, section 5). How
deltas are chosen is in selecting.py, what follows from the sums in methods/.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from mergecore import ops
from mergecore.jobs import PIECE, TensorJob
from mergecore.methods.base import Gram, Keep, Moments, Statistics
from mergecore.selecting import choose, kept_sums
from mergecore.topsets import Part, Reads


class MatrixReads(Reads, Protocol):
    """Reads of a tensor that is several matrices (the experts of a fused one)."""

    def matrix(self, number: int) -> Iterator[Part]:
        """Windows of one matrix, in order: one of the reads that were planned."""

    def matrix_again(self, number: int) -> Iterator[Part]:
        """The same, for a read that was not planned."""

    def input_grams(self) -> tuple[Tensor, ...]:
        """Those of every model, whole, as stored."""


def chosen(
    job: TensorJob, keeps: Sequence[Keep], reads: Reads, place: ops.Place, seed: int, purpose: str = ""
) -> list[ops.Drop]:
    """What `keeps` keep of each model's deltas. `purpose` keeps apart what is drawn twice for one model."""
    return choose(keeps, reads, place, random_keys(job, len(keeps), seed, purpose))


def random_keys(job: TensorJob, models: int, seed: int, purpose: str = "") -> list[int]:
    """The models' keys for random numbers."""
    return [ops.Drop.of(0.0, False, seed=seed, tensor=job.name, model=n, purpose=purpose).key for n in range(models)]


def mean_squares(job: TensorJob, kept: Sequence[ops.Drop], reads: Reads, place: ops.Place) -> tuple[float, ...]:
    """Mean square of each model's kept deltas over all entries."""
    everything = job.keeps or (Keep(),) * len(job.models)
    return tuple(square / max(1, reads.entries) for _, _, square in kept_sums(everything, kept, reads, place))


def shared_counts(job: TensorJob, reads: Reads, place: ops.Place) -> tuple[tuple[int, int], ...]:
    """Per model how many deltas beyond `epsilon` others have too, and how many it has alone."""
    assert job.parameters is not None
    limits = (job.parameters["epsilon"],) * len(job.models)
    counts = torch.zeros(len(limits), 2, dtype=torch.int64, device=reads.device)
    for part in reads.planned():
        assert part.base is not None
        ops.count_shared(part.base, part.models, limits, counts, replace(place, first_entry=part.first_entry))
    return tuple((shared, alone) for shared, alone in counts.tolist())


def of_kept(job: TensorJob, kept: Sequence[ops.Drop], reads: Reads, place: ops.Place) -> dict[str, Any]:
    """The statistics of TensorView that a method that ends in an Election asks for, of a whole tensor."""
    if job.statistics is Statistics.SQUARES:
        return {"squares": mean_squares(job, kept, reads, place)}
    if job.statistics is Statistics.SHARED:
        return {"shared": shared_counts(job, reads, place)}
    return {}


def of_matrix(job: TensorJob, matrix: int, reads: MatrixReads, drops: Sequence[ops.Drop]) -> dict[str, Any]:
    """The statistics of TensorView that other methods ask for, of one matrix of a tensor."""
    if job.statistics is Statistics.COLUMNS:
        return {"moments": _moments(job, matrix, reads, drops)}
    if job.statistics.is_gram:
        return {"gram": _gram(job, matrix, reads, drops)}
    if job.statistics.is_whole:
        return {"deltas": _deltas(job, matrix, reads, drops), "input_grams": reads.input_grams()}
    return {"input_grams": reads.input_grams()}


def _moments(job: TensorJob, matrix: int, reads: MatrixReads, drops: Sequence[ops.Drop]) -> Moments:
    def windows() -> Iterator[Summed]:
        for part in reads.matrix(matrix):
            yield part.base, part.models, _place(job, matrix, part, drops)

    sums = _sums(job, len(job.models), windows(), reads.device)
    moments = Moments.of(sums)
    is_finite, *vanishing = torch.cat((sums.isfinite().all().view(1), moments.vanishing)).tolist()
    if not is_finite:
        reads.nonfinite()
    if any(vanishing):
        short = [n for n, each in enumerate(vanishing) if each]
        moments.xx[short] = _squares(job, matrix, short, reads, drops)
    return moments


def _squares(
    job: TensorJob, matrix: int, models: Sequence[int], reads: MatrixReads, drops: Sequence[ops.Drop]
) -> Tensor:
    """x.x of the columns of these models, (models, columns), from another read of the matrix."""

    def windows() -> Iterator[Summed]:
        for part in reads.matrix_again(matrix):
            for piece in pieces(part) if drops else (part,):
                place = _place(job, matrix, piece, drops)
                entries = [_dropped(piece, n, place) if drops else piece.models[n] for n in models]
                yield None, entries, place | {"drops": ()}

    return _sums(job, len(models), windows(), reads.device)[1 : 1 + len(models)]


def _dropped(part: Part, model: int, place: dict[str, Any]) -> Tensor:
    """A model's entries with what is left of its deltas, float64."""
    assert part.base is not None
    out = torch.empty(part.base.shape, dtype=torch.float64, device=part.base.device)
    one = torch.ones(1, 1, dtype=torch.float64, device=out.device)
    counts = torch.zeros(2, dtype=torch.int64, device=out.device)
    own = place | {"drops": place["drops"][model : model + 1]}
    ops.blend(out, part.base, part.models[model : model + 1], one, counts, **own)
    return out


Summed = tuple[Tensor | None, Sequence[Tensor], dict[str, Any]]
"""Base, models and place of a window."""


def _sums(job: TensorJob, models: int, windows: Iterator[Summed], device: torch.device) -> Tensor:
    """Moments of windows in order, as the kernels leave them."""
    by_rows = job.orientation == "rows"
    shape = (ops.moment_count(models), job.rows if by_rows else job.columns)
    sums = torch.zeros(shape, dtype=torch.float64, device=device)
    pending = sums if by_rows else torch.zeros_like(sums)
    for base, tensors, place in windows:
        if by_rows:
            ops.row_moments(base, tensors, sums, **place)
        else:
            ops.column_moments(base, tensors, sums, pending, **place)
    return sums if by_rows else sums + pending


def _gram(job: TensorJob, matrix: int, reads: MatrixReads, drops: Sequence[ops.Drop]) -> Gram:
    count = len(job.models)
    anchored = not job.has_base and count > 1
    length = {Statistics.GRAM: 1, Statistics.ROW_GRAM: job.rows, Statistics.COLUMN_GRAM: job.columns}
    shape = (ops.gram_count(count - 1 if anchored else count), length[job.statistics])
    sums = torch.zeros(shape, dtype=torch.float64, device=reads.device)
    pending = torch.zeros_like(sums) if job.statistics is Statistics.COLUMN_GRAM else sums
    for part in reads.matrix(matrix):
        base, models = (part.models[0], part.models[1:]) if anchored else (part.base, part.models)
        place = _place(job, matrix, part, drops)
        if job.statistics is Statistics.GRAM:
            ops.gram(sums, base, models, **place)
        elif job.statistics is Statistics.ROW_GRAM:
            ops.row_gram(sums, base, models, **place)
        else:
            ops.column_gram(sums, pending, base, models, **place)
    sums = sums + pending if pending is not sums else sums
    if not bool(torch.isfinite(sums).all()):
        reads.nonfinite()
    return Gram.of(sums, anchored)


def _deltas(job: TensorJob, matrix: int, reads: MatrixReads, drops: Sequence[ops.Drop]) -> Tensor:
    """What is left of each delta of a matrix, float64 (models, rows, columns), or with SUM their weighted sum."""
    weights = job.parameters["weight"] if job.parameters is not None and job.statistics is Statistics.SUM else None
    count = len(job.models) if weights is None else 1
    deltas = torch.zeros(count, job.rows, job.columns, dtype=torch.float64, device=reads.device)
    for part in (piece for window in reads.matrix(matrix) for piece in pieces(window)):
        base = part.models[0] if part.base is None else part.base
        row = part.first_entry // job.columns - matrix * job.rows
        last = row + base.shape[0]
        for n, model in enumerate(part.models):
            delta = model.double() - base.double()
            if drops:
                assert part.base is not None
                place = ops.Place(part.first_entry, drops[n : n + 1])
                delta = torch.copysign(ops.magnitudes(part.base, [model], place)[0], delta)
            if weights is None:
                deltas[n, row:last] = delta
            else:
                deltas[0, row:last] += weights[n] * delta
    if not bool(torch.isfinite(deltas).all()):
        reads.nonfinite()
    return deltas


def pieces(part: Part) -> Iterator[Part]:
    """A window in pieces small enough to be held in float64 a few times."""
    rows, columns = part.models[0].shape
    step = max(1, PIECE // columns)
    for first in range(0, rows, step):
        base = None if part.base is None else part.base[first : first + step]
        models, beside = ([each[first : first + step] for each in all] for all in (part.models, part.beside))
        yield Part(part.first_entry + first * columns, base, models, beside)


def _place(job: TensorJob, matrix: int, part: Part, drops: Sequence[ops.Drop]) -> dict[str, Any]:
    """Where a window lies in its matrix, and the matrix in the tensor."""
    first_entry = matrix * job.rows * job.columns
    first_row = (part.first_entry - first_entry) // job.columns
    return {"first_row": first_row, "first_entry": first_entry, "drops": drops}
