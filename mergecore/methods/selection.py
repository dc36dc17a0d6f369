"""Methods that keep some of the deltas: trimmed by magnitude or dropped at random, then summed or elected by sign.

TIES, DARE, Model Breadcrumbs, DELLA and SCE, with mergekit's names and defaults.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal

from mergecore.methods.base import Election, Keep, Method, Parameter, Statistics, TensorView, scope
from mergecore.methods.linear import WEIGHT
from mergecore.ops import Elect, Measure

DENSITY = Parameter("density", 1.0, "share of a model's deltas that is kept", per_model=True)
GAMMA = Parameter("gamma", 0.01, "share of the largest deltas that is dropped", per_model=True)
EPSILON = Parameter("epsilon", 0.15, "keep-probabilities lie within density +- epsilon", per_model=True)
SCOPE = scope("tensor")
LAMBDA = Parameter("lambda", 1.0, "scale of the merged deltas")
RESCALE_NORM = Parameter(
    "rescale_norm",
    "probability",
    "rescale by the probability to be kept, or so that the sum of |delta| stays (mergekit)",
    choices=("probability", "l1"),
)
ELECT = Parameter(
    "elect",
    "weighted",
    "elect signs by the weighted or the plain sum of the deltas",
    choices=("weighted", "unweighted"),
)
IGNORED = ("int8_mask",)


def _normalize(default: bool) -> Parameter:
    return Parameter("normalize", default, "divide by the sum of the weights that take part")


def _rescale(default: bool) -> Parameter:
    return Parameter("rescale", default, "scale up what is kept")


def share_of(name: str, value: float) -> float:
    """A share as it was given; raises ValueError if it is none."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value:g}; it must be from 0 to 1")
    return value


def complement(density: float) -> float:
    """1 - density of the number as it is written: 0.1 for 0.9."""
    return float(1 - Fraction(repr(density)))


def _trimmed(view: TensorView) -> tuple[Keep, ...]:
    """The largest deltas of each model, without the `gamma` share of outliers where there is such a parameter."""
    gammas = view.parameters.get("gamma", (0.0,) * view.models)
    rescale: Literal["none", "l1"] = "l1" if view.parameters["rescale"] else "none"
    keeps = []
    for density, gamma in zip(view.parameters["density"], gammas, strict=True):
        # A density of 1 is the dense method, outliers included.
        outliers = share_of("gamma", gamma) if density < 1 else 0.0
        keeps.append(Keep(density=share_of("density", density), outliers=outliers, rescale=rescale))
    return tuple(keeps)


def _at_random(view: TensorView) -> tuple[Keep, ...]:
    rescale: Any = view.parameters["rescale_norm"] if view.parameters["rescale"] else "none"
    return tuple(
        Keep(drop_rate=complement(share_of("density", density)), rescale=rescale)
        for density in view.parameters["density"]
    )


def _by_rank(view: TensorView) -> tuple[Keep, ...]:
    keeps = []
    for keep, density, epsilon in zip(
        _at_random(view), view.parameters["density"], view.parameters["epsilon"], strict=True
    ):
        if 0 < density < 1 and not (0 <= epsilon < density and density + epsilon < 1):
            raise ValueError(f"density {density:g} +- epsilon {epsilon:g} must lie between 0 and 1")
        keeps.append(replace(keep, epsilon=epsilon))
    return tuple(keeps)


def _summed(view: TensorView) -> Election:
    """W0 + lambda sum w_n v_n, divided by sum w_n with `normalize`."""
    weights, scale = view.parameters["weight"], view.parameters["lambda"]
    if view.parameters["normalize"]:
        total = math.fsum(weights)
        scale = scale / total if abs(total) >= 1e-8 else scale
    return Election(weights, scale)


def _elected(view: TensorView) -> Election:
    """The deltas of the elected sign, or their weighted mean with `normalize`."""
    elect = Elect.WEIGHTED if view.parameters["elect"] == "weighted" else Elect.UNWEIGHTED
    return Election(view.parameters["weight"], view.parameters["lambda"], elect, view.parameters["normalize"])


def _method(
    name: str,
    summary: str,
    reference: str,
    keeps: Callable[[TensorView], tuple[Keep, ...]],
    *,
    elects: bool,
    normalize: bool,
    rescale: bool,
    extra: tuple[Parameter, ...] = (),
) -> Method:
    parameters = (WEIGHT, DENSITY, *extra, LAMBDA, _normalize(normalize), _rescale(rescale))
    return Method(
        name=name,
        summary=summary,
        reference=reference,
        coefficients=_elected if elects else _summed,
        parameters=(*parameters, ELECT) if elects else parameters,
        ignored=IGNORED,
        keeps=keeps,
    )


_TIES = "Yadav et al. 2023, TIES-Merging: resolving interference when merging models"
_DARE = "Yu et al. 2024, Language models are super Mario"
_BREADCRUMBS = "Davari and Belilovsky 2024, Model Breadcrumbs"
_DELLA = "Deep et al. 2024, DELLA-Merging"

TIES = _method(
    "ties",
    "trims each model to its largest deltas, elects a sign per entry, takes the mean of those that agree",
    _TIES,
    _trimmed,
    elects=True,
    normalize=True,
    rescale=False,
    extra=(SCOPE,),
)
BREADCRUMBS = _method(
    "breadcrumbs",
    "sum of the deltas without the largest and the smallest of each model",
    _BREADCRUMBS,
    _trimmed,
    elects=False,
    normalize=False,
    rescale=False,
    extra=(GAMMA, SCOPE),
)
BREADCRUMBS_TIES = _method(
    "breadcrumbs_ties",
    "breadcrumbs with TIES' sign election",
    _BREADCRUMBS,
    _trimmed,
    elects=True,
    normalize=False,
    rescale=False,
    extra=(GAMMA, SCOPE),
)
DARE_LINEAR = _method(
    "dare_linear",
    "sum of the deltas after dropping entries at random and rescaling the others",
    _DARE,
    _at_random,
    elects=False,
    normalize=False,
    rescale=True,
    extra=(RESCALE_NORM,),
)
DARE_TIES = _method(
    "dare_ties",
    "dare_linear with TIES' sign election",
    _DARE,
    _at_random,
    elects=True,
    normalize=False,
    rescale=True,
    extra=(RESCALE_NORM,),
)
DELLA = _method(
    "della",
    "drops entries at random, small ones of a row more often, then elects signs as TIES",
    _DELLA,
    _by_rank,
    elects=True,
    normalize=True,
    rescale=True,
    extra=(EPSILON, RESCALE_NORM),
)
DELLA_LINEAR = _method(
    "della_linear",
    "della without sign election: the sum of the deltas",
    _DELLA,
    _by_rank,
    elects=False,
    normalize=False,
    rescale=True,
    extra=(EPSILON, RESCALE_NORM),
)


def _most_varied(view: TensorView) -> tuple[Keep, ...]:
    """The entries where the models differ most, the same of all models."""
    share = share_of("select_topk", view.parameters["select_topk"])
    return (Keep(density=share, measure=Measure.SPREAD),) * view.models


def _by_square(view: TensorView) -> Election:
    """Weights in proportion to the mean squares of the selected deltas, signs elected by their sum."""
    assert view.squares is not None
    total = math.fsum(view.squares)
    weights = [square / total for square in view.squares] if total > 0 else [1.0 / view.models] * view.models
    return Election(tuple(weights), elect=Elect.UNWEIGHTED, normalize=True)


SCE = Method(
    name="sce",
    summary="selects the entries of most variance, weighs models by their mean square, erases minority signs",
    reference="Wan et al. 2024, FuseChat: knowledge fusion of chat models",
    coefficients=_by_square,
    parameters=(Parameter("select_topk", 1.0, "share of the entries where the models differ that is selected"),),
    statistics=Statistics.SQUARES,
    ignored=IGNORED,
    keeps=_most_varied,
)

SELECTION = (TIES, DARE_LINEAR, DARE_TIES, BREADCRUMBS, BREADCRUMBS_TIES, DELLA, DELLA_LINEAR, SCE)
