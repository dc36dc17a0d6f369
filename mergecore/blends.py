"""The last step of a merge on one window, as a function from the window to the result: coefficients, values, elections.

Not for solving (methods/), and not for reading and writing windows (loop.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mergecore import ops, statistics
from mergecore.jobs import TensorJob
from mergecore.methods.base import Coefficients, Dense, Election, Rowwise
from mergecore.selecting import odds_by_rank, row_pieces
from mergecore.topsets import Part

Blend = Callable[[Tensor, Part], None]
"""Fills the result, (rows, columns) of the output's dtype, from a window."""


def of_coefficients(
    job: TensorJob, matrix: int, coefficients: Coefficients, drops: Sequence[ops.Drop], counts: Tensor
) -> Blend:
    """The blend of one matrix of a tensor by coefficients; `counts` (2) takes results that are not finite."""
    values = coefficients.values.to(counts.device).contiguous()
    axis = ops.Axis.TENSOR
    if values.shape[1] > 1:
        axis = ops.Axis.ROWS if (coefficients.axis or job.orientation) == "rows" else ops.Axis.COLUMNS
    entry = matrix * job.rows * job.columns

    def compute(result: Tensor, part: Part) -> None:
        ops.blend(
            result,
            part.base,
            part.models,
            values,
            counts,
            base_coefficient=coefficients.base,
            axis=axis,
            first_row=(part.first_entry - entry) // job.columns,
            first_entry=entry,
            drops=drops,
        )

    return compute


def of_values(job: TensorJob, matrix: int, form: Dense | Rowwise, counts: Tensor) -> Blend:
    """The blend of values that are computed already, float64: as the one model beside the base, or beside the first
    model where there is none."""
    one = torch.ones(1, 1, dtype=torch.float64, device=counts.device)
    first = matrix * job.rows

    def compute(result: Tensor, part: Part) -> None:
        done = 0
        for piece in statistics.pieces(part):
            base = piece.models[0] if piece.base is None else piece.base
            rows = base.shape[0]
            row = piece.first_entry // job.columns - first
            if isinstance(form, Dense):
                moved = base.double() + form.delta[row : row + rows]
            else:
                moved = form.combine(piece.models, piece.beside)
            ops.blend(result[done : done + rows], base, [moved], one, counts)
            done += rows

    return compute


def of_election(
    job: TensorJob, election: Election, kept: Sequence[ops.Drop], place: ops.Place, block: int, counts: Tensor
) -> Blend:
    """The blend of methods that keep some of the deltas; `block`: entries of which ranks are taken together."""
    keeps = job.keeps
    divide_by_odds = any(keep.rescale == "probability" for keep in keeps)
    lowest, steps = odds_by_rank(keeps, job.columns)

    def compute(result: Tensor, part: Part) -> None:
        done = 0
        # A CPU's kernel ranks one row after the other and holds no more.
        pieces = [part] if part.models[0].device.type == "cpu" else row_pieces(keeps, part, block)
        for piece in pieces:
            here = replace(place, first_entry=piece.first_entry)
            rows = piece.models[0].shape[0]
            assert piece.base is not None
            ops.elect(
                result[done : done + rows],
                piece.base,
                piece.models,
                election.weights,
                counts,
                scale=election.scale,
                elect=election.elect,
                normalize=election.normalize,
                limits=election.limits,
                consensus=election.consensus,
                keeps=kept,
                place=here,
                lowest=lowest,
                steps=steps,
                divide_by_odds=divide_by_odds,
            )
            done += rows

    return compute
