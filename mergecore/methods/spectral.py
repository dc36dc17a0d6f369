"""Methods that merge the singular vectors of the deltas: one decomposition, or a few, per linear layer.

They return the merged delta itself, a matrix, and not coefficients: the result does not lie in the span of
the deltas. Vectors, embeddings and the head get the mean of the deltas.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mergecore.methods.base import Coefficients, Dense, Method, Parameter, Statistics, TensorView, per_model
from mergecore.methods.linear import WEIGHT

# Below this share of the largest entry, one of a decomposed matrix is rounding noise: unchanged rows stay so.
NOISE = 2.0**-40
# Below this share of the largest singular value, singular vectors of several models are one direction: they agree
# in half of the digits of float64, and what they differ in would be blown up to a direction of its own.
SAME = 2.0**-26


def _decomposed(matrix: Tensor, noise: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and V^T (float64) without what is 0 up to rounding, whose singular vectors could be anything.

    `noise` is the share of the largest singular value below which one counts as 0.
    """
    try:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ValueError(f"its singular value decomposition failed: {error}") from error
    largest = float(s[0]) if s.numel() else 0.0
    noise = noise or max(matrix.shape) * torch.finfo(s.dtype).eps
    rank = int((s > largest * noise).sum())
    return u[:, :rank], s[:rank], vt[:rank]


def _top(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` largest singular triplets; copies, where slices would hold all of U and V."""
    u, s, vt = _decomposed(matrix)
    return u[:, :count].clone(), s[:count], vt[:count].clone()


def _nearest_orthogonal(matrix: Tensor) -> Tensor:
    """The solution of the orthogonal Procrustes problem: of all matrices whose singular values are 1 the nearest."""
    u, _, vt = _decomposed(matrix, SAME)
    return u @ vt


def _dense(delta: Tensor, scale: float) -> Dense:
    """`delta` times `scale`, without noise; in place, for a matrix may be large."""
    sizes = delta.mul_(scale).abs()
    return Dense(delta.masked_fill_(sizes <= NOISE * sizes.amax(), 0.0))


def _mean(view: TensorView) -> Coefficients:
    scale = view.parameters["lambda"] / view.models
    return Coefficients(per_model([scale * weight for weight in view.parameters["weight"]]))


def _tsv(view: TensorView) -> Coefficients | Dense:
    """TSV-Merge: the top 1/N of each model's singular triplets, decorrelated, then put together."""
    deltas = view.deltas
    if deltas is None:
        return _mean(view)
    if not bool(deltas.isfinite().all()):
        return Dense(torch.full_like(deltas[0], math.nan))
    count = max(1, min(deltas.shape[1:]) // view.models)
    weighted = zip(view.parameters["weight"], deltas, strict=True)
    us, ss, vts = zip(*(_top(weight * delta, count) for weight, delta in weighted), strict=True)
    u, vt = _nearest_orthogonal(torch.cat(us, dim=1)), _nearest_orthogonal(torch.cat(vts))
    return _dense((u * torch.cat(ss)) @ vt, view.parameters["lambda"])


def _iso_c(view: TensorView) -> Coefficients | Dense:
    """Iso-C: the sum of the deltas with all singular values replaced by their mean."""
    if view.deltas is None:
        return _mean(view)
    (total,) = view.deltas
    if not bool(total.isfinite().all()):
        return Dense(torch.full_like(total, math.nan))
    u, s, vt = _decomposed(total)
    mean = math.fsum(s.tolist()) / min(total.shape)
    return _dense(u @ vt, mean * view.parameters["lambda"])


LAMBDA = Parameter("lambda", 1.0, "scale of the merged deltas")

TSV = Method(
    name="tsv",
    summary="linear layers from the largest singular triplets of each delta, made orthogonal to one another",
    reference="Gargiulo et al. 2025, Task singular vectors: reducing task interference in model merging (TSV-M)",
    coefficients=_tsv,
    parameters=(WEIGHT, LAMBDA),
    # One model keeps all of its triplets, which are orthogonal already.
    statistics=lambda view: Statistics.DELTAS if view.is_linear and view.models > 1 else Statistics.NONE,
)

ISO_C = Method(
    name="iso_c",
    summary="linear layers from the sum of the deltas with equal singular values",
    reference="Marczak et al. 2025, No task left behind: isotropic model merging (Iso-C)",
    coefficients=_iso_c,
    parameters=(WEIGHT, LAMBDA),
    statistics=lambda view: Statistics.SUM if view.is_linear else Statistics.NONE,
)

SPECTRAL = (TSV, ISO_C)
