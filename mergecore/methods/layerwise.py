"""Methods whose coefficients follow from where a tensor stands in the model, or from how far the models moved.

LiNeS scales deltas by the depth of their layer, MetaGPT by the squared length of each model's deltas.
"""

from __future__ import annotations

import math

import torch

from mergecore.methods.base import Coefficients, Method, Parameter, Statistics, TensorView, per_model, scope
from mergecore.methods.linear import WEIGHT


def _lines(view: TensorView) -> Coefficients:
    """lambda(l) = alpha + beta l / (L - 1), l the layer from 0; outside the layers alpha, as in the authors' code."""
    alpha, beta = view.parameters["alpha"], view.parameters["beta"]
    alpha = 1.0 / view.models if alpha is None else alpha
    beta = 1.0 - alpha if beta is None else beta
    scale = alpha + beta * view.place
    return Coefficients(per_model([scale * weight for weight in view.parameters["weight"]]))


LINES = Method(
    name="lines",
    summary="base plus the summed deltas, scaled from alpha in the first layer to alpha + beta in the last",
    reference="Wang et al. 2024, LiNeS: post-training layer scaling prevents forgetting and enhances model merging",
    coefficients=_lines,
    parameters=(
        WEIGHT,
        Parameter("alpha", None, "scale in the first layer and outside of all; 1 / models if absent", optional=True),
        Parameter("beta", None, "what the last layer's scale is more; 1 - alpha if absent", optional=True),
    ),
)


def _metagpt(view: TensorView) -> Coefficients:
    """lambda_n = |d_n|^2 / sum_k |d_k|^2."""
    assert view.gram is not None
    squares = view.gram.products.diagonal(dim1=0, dim2=1)[0, 1:]
    total = math.fsum(squares.tolist())
    shares = squares / total if total > 0 else torch.full_like(squares, 1.0 / view.models)
    return Coefficients(view.parameters["lambda"] * shares.unsqueeze(1))


METAGPT = Method(
    name="metagpt",
    summary="base plus the deltas, each scaled by its share of the sum of squared lengths",
    reference="Zhou et al. 2024, MetaGPT: merging large language models using model exclusive task arithmetic",
    coefficients=_metagpt,
    parameters=(Parameter("lambda", 1.0, "scale of the merged deltas"), scope("model")),
    statistics=Statistics.GRAM,
)

LAYERWISE = (LINES, METAGPT)
