"""WIDEN: weight disentanglement, ranking, and a softmax with score calibration (Yu et al. 2024b, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from mergecore import ops
from mergecore.methods.base import Coefficients, Method, Parameter, Statistics, TensorView, per_model
from mergecore.methods.linear import WEIGHT


def _importances(kinds: Sequence[Tensor], view: TensorView, ranked: bool) -> list[Tensor]:
    """Steps 3 and 4 on each kind of divergence, (models, columns): scores, softmax, calibration (eq. 3-6)."""
    parameters, t = view.parameters, view.parameters["t"]
    models, columns = kinds[0].shape
    if ranked:
        # Whole ranks instead of rank / columns keep the comparison with t times the mean exact; and t is
        # taken as it is written: 1.15 * 100 is 115, where float64 has 114.99999999999999. No rank
        # exceeds 2 means, every rank a negative number.
        scores = [ops.rank(kind, average=parameters["tie"] == "average") for kind in kinds]
        divisor = float(columns)
        multiple = Fraction(repr(max(-1.0, min(t, 2.0))))
        limits = [[float(multiple * (columns + 1) / 2)] * models] * len(kinds)
    else:
        scores, divisor = list(kinds), 1.0
        # fsum is exact: the same mean whatever the order.
        limits = [[t * (math.fsum(row) / columns) for row in kind.tolist()] for kind in kinds]
    if not parameters["calibrate"]:
        limits = [[math.inf] * models] * len(kinds)
    thresholds = torch.tensor(limits, dtype=torch.float64, device=kinds[0].device)
    return [
        ops.calibrated_softmax(each, threshold, divisor=divisor, s=parameters["s"])
        for each, threshold in zip(scores, thresholds, strict=True)
    ]


def _min_max(divergence: Tensor) -> Tensor:
    """Each model's divergences scaled to [0, 1] (section 4.4, w/o RANK); all equal gives 0."""
    least = divergence.amin(dim=1, keepdim=True)
    span = divergence.amax(dim=1, keepdim=True) - least
    return torch.where(span > 0, (divergence - least) / span, torch.zeros_like(divergence))


def _widen(view: TensorView) -> Coefficients:
    moments, parameters = view.moments, view.parameters
    assert moments is not None
    if view.is_vector:
        # Remark 1: a vector is magnitudes only; |d| per element, sqrt(d * d) is exactly |d|.
        (importance,) = _importances([moments.dd.sqrt()], view, ranked=parameters["vector_scoring"] == "rank")
    else:
        kinds = [moments.direction_divergence()]
        if parameters["disentangle"]:
            kinds.append(moments.magnitude_divergence())
        ranked = parameters["rank"]
        scored = _importances(kinds if ranked else [_min_max(kind) for kind in kinds], view, ranked)
        importance = sum(scored[1:], scored[0]) / len(scored)
    weights = per_model(parameters["weight"]).to(importance.device)
    return Coefficients(weights * importance)


WIDEN = Method(
    name="widen",
    summary="W0 + sum 0.5 (M_n + D_n) d_n, importances ranked per column: fine-tuned and further pre-trained models",
    reference="Yu et al. 2024, Extend model merging from fine-tuned to pre-trained LLMs via weight disentanglement",
    coefficients=_widen,
    parameters=(
        Parameter("t", 1.0, "multiple of the mean score above which a column is essential"),
        Parameter("s", 1.0, "importance given to essential columns"),
        Parameter(
            "vector_scoring",
            "divergence",
            "score norms and biases by |delta| or by its rank",
            choices=("divergence", "rank"),
        ),
        Parameter(
            "tie", "stable", "rank equal divergences in index order or by their mean", choices=("stable", "average")
        ),
        Parameter("disentangle", True, "false: one score from the cosine of the raw weights (w/o WD)"),
        Parameter("rank", True, "false: min-max normalisation instead of ranks (w/o RANK)"),
        Parameter("calibrate", True, "false: plain softmax (w/o SC)"),
        WEIGHT,
    ),
    statistics=Statistics.COLUMNS,
)
