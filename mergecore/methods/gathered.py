"""Methods that weigh models by statistics of their runs on samples of text: RegMean and Fisher merging.

The statistics are gathered beforehand (mergecore/features/gather.py). Tensors without any are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergecore.methods.base import (
    Coefficients,
    Dense,
    Gathered,
    Method,
    Parameter,
    Rowwise,
    Statistics,
    TensorView,
    per_model,
)
from mergecore.methods.linear import WEIGHT


def _regmean(view: TensorView) -> Coefficients | Dense | Rowwise:
    """W = sum_n W_n A_n with A_n = G_n (sum_k G_k)^-1, for a weight (out, in); computed as
    W_1 + sum_n (W_n - W_1) A_n, for the A_n add up to the identity."""
    if not view.is_gathered:
        return Coefficients(per_model([1.0 / view.models] * view.models))
    shares, warning = _shares(view.input_grams, view.parameters["alpha"])
    if view.is_transposed:
        if view.deltas is None:  # of a single model
            return Coefficients(per_model([1.0]))
        delta = torch.zeros_like(view.deltas[0])
        for share, moved in zip(shares, view.deltas[1:], strict=True):
            delta += share.T @ moved
        return Dense(delta, warning)

    def combine(models: Sequence[Tensor], _: Sequence[Tensor]) -> Tensor:
        first = models[0].double()
        result = first.clone()
        for share, model in zip(shares, models[1:], strict=True):
            result += (model.double() - first) @ share
        return result

    return Rowwise(combine, warning)


def _shares(grams: Sequence[Tensor], alpha: float) -> tuple[list[Tensor], str]:
    """A_n of all models but the first, float64, and what there is to say about it.

    Of directions that no model's inputs have, every model has an equal share.
    """
    count, inputs = len(grams), grams[0].shape[0]
    total = torch.zeros(inputs, inputs, dtype=torch.float64, device=grams[0].device)
    for gram in grams:
        total += _shrunk(gram, alpha)
    if not bool(total.isfinite().all()):
        return [torch.full_like(total, math.nan)] * (count - 1), ""
    if bool((total.diagonal() < 0).any()):
        raise ValueError("a Gram matrix of inputs has a negative number on its diagonal; gather it again")
    unseen = total.diagonal() == 0
    total.diagonal()[unseen] = count
    scale = total.diagonal().rsqrt()
    total.mul_(scale).mul_(scale.unsqueeze(1))  # a unit diagonal: inputs may be of very different sizes
    # Below this, what is left of an input beside the others is rounding: of the stored sums, or of what is done here.
    stored = max(torch.finfo(gram.dtype).eps for gram in grams)
    noise = max(stored * math.sqrt(inputs), 16 * torch.finfo(torch.float64).eps * inputs)
    factor, failed = torch.linalg.cholesky_ex(total)
    solved = int(failed) == 0 and float(factor.diagonal().min()) ** 2 > noise

    def share(gram: Tensor) -> Tensor:
        """A_n of one model, as far as inputs reach."""
        gram = _shrunk(gram, alpha)
        gram.diagonal()[unseen] = 1.0
        gram.mul_(scale.unsqueeze(1))
        found = torch.cholesky_solve(gram, factor) if solved else factor @ gram
        return found.mul_(scale.unsqueeze(1)).T

    if solved:
        return [share(gram) for gram in grams[1:]], ""
    factor, rank = _pseudo_inverse(total, noise)
    del total
    shares = [share(gram) for gram in grams]
    rest = torch.eye(inputs, dtype=torch.float64, device=factor.device)
    for found in shares:
        rest -= found
    rest /= count
    for found in shares[1:]:
        found += rest
    return shares[1:], (
        f"the inputs of all models together have only {rank} of {inputs} directions; in the others the models are "
        "averaged: gather statistics on more text, or set alpha below 1"
    )


def _shrunk(gram: Tensor, alpha: float) -> Tensor:
    """Off-diagonal entries times alpha (the paper's reduction of non-diagonal items), float64; a copy."""
    shrunk = gram.to(torch.float64, copy=True).mul_(alpha)
    shrunk.diagonal().copy_(gram.diagonal())
    return shrunk


def _pseudo_inverse(matrix: Tensor, noise: float) -> tuple[Tensor, int]:
    """Of a symmetric matrix, and its rank: eigenvalues of up to `noise` count as 0."""
    values, vectors = torch.linalg.eigh(matrix)
    rank = int((values > noise).sum())  # values ascend
    vectors = vectors[:, values.numel() - rank :]
    return (vectors / values[values.numel() - rank :]) @ vectors.T, rank


def _check_alpha(view: TensorView) -> None:
    if not 0 <= view.parameters["alpha"] <= 1:
        raise ValueError(f"alpha is {view.parameters['alpha']:g}; expected a number from 0 to 1")


REGMEAN = Method(
    name="regmean",
    summary="linear layers nearest to each model on its own inputs X_n: sum W_n G_n (sum G_k)^-1, G_n = X_n^T X_n",
    reference="Jin et al. 2023, Dataless knowledge fusion by merging weights of language models",
    coefficients=_regmean,
    parameters=(Parameter("alpha", 0.9, "factor of the entries of G_n beside its diagonal"),),
    statistics=lambda view: (
        Statistics.DELTAS if view.is_gathered and view.is_transposed and view.models > 1 else Statistics.NONE
    ),
    gathered=Gathered.INPUTS,
    deltas=False,
    check=_check_alpha,
)


def _fisher(view: TensorView) -> Coefficients | Rowwise:
    """W = sum_n w_n F_n W_n / sum_n w_n F_n; where no model has any F, by the weights alone."""
    weights, floor = view.parameters["weight"], view.parameters["epsilon"]
    shares = [weight / math.fsum(weights) for weight in weights]
    if not view.is_gathered:
        return Coefficients(per_model(shares))

    def combine(models: Sequence[Tensor], fisher: Sequence[Tensor]) -> Tensor:
        first = models[0].double()
        moved, total = torch.zeros_like(first), torch.zeros_like(first)
        for weight, model, information in zip(weights, models, fisher, strict=True):
            share = information.double().clamp_(min=floor).mul_(weight)
            total += share
            moved += share.mul_(model.double() - first)
        unknown = total == 0
        moved /= total.masked_fill_(unknown, 1.0)
        if bool(unknown.any()):
            mean = torch.zeros_like(first)
            for share, model in zip(shares, models, strict=True):
                mean += share * (model.double() - first)
            moved = torch.where(unknown, mean, moved)
        return moved.add_(first)

    return Rowwise(combine)


def _check_weights(view: TensorView) -> None:
    weights = view.parameters["weight"]
    if min(weights) < 0 or math.fsum(weights) == 0:
        raise ValueError(f"found weights {', '.join(f'{w:g}' for w in weights)}; expected none below 0, and one above")
    if view.parameters["epsilon"] < 0:
        raise ValueError(f"epsilon is {view.parameters['epsilon']:g}; expected 0 or more")


FISHER = Method(
    name="fisher",
    summary="each entry averaged by its Fisher information in each model: sum w_n F_n W_n / sum w_n F_n",
    reference="Matena and Raffel 2022, Merging models with Fisher-weighted averaging",
    coefficients=_fisher,
    parameters=(WEIGHT, Parameter("epsilon", 1e-6, "the least that F_n counts")),
    gathered=Gathered.FISHER,
    deltas=False,
    check=_check_weights,
)

GATHERED = (REGMEAN, FISHER)
