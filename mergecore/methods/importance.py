"""Methods that keep deltas by what they are worth, not by their size alone: Arcee Fusion and PCB-Merging."""

from __future__ import annotations

from mergecore.methods.base import Election, Keep, Method, Parameter, TensorView
from mergecore.methods.linear import WEIGHT
from mergecore.methods.selection import LAMBDA, share_of
from mergecore.ops import Elect, Measure


def _salient(view: TensorView) -> tuple[Keep, ...]:
    return (Keep(measure=Measure.ROWS, fence=True),)


def _sum(view: TensorView) -> Election:
    return Election((1.0,))


ARCEE_FUSION = Method(
    name="arcee_fusion",
    summary="keeps deltas whose importance, |d| times the divergence of their row, lies beyond median + 1.5 (Q3 - Q1)",
    reference="Arcee AI 2024, Arcee Fusion (mergekit)",
    coefficients=_sum,
    most=1,
    keeps=_salient,
)


def _competing(view: TensorView) -> tuple[Keep, ...]:
    density = share_of("density", view.parameters["density"])
    return (Keep(density=density, measure=Measure.COMPETITION),) * view.models


def _balanced(view: TensorView) -> Election:
    return Election(view.parameters["weight"], view.parameters["lambda"], Elect.COMPETING)


PCB = Method(
    name="pcb",
    summary="averages the deltas that score best within their model and against the others', weighted by score",
    reference="Du et al. 2024, Parameter competition balancing for model merging",
    coefficients=_balanced,
    parameters=(
        WEIGHT,
        LAMBDA,
        Parameter("density", 0.1, "share of a model's deltas that is kept"),
    ),
    keeps=_competing,
)

IMPORTANCE = (ARCEE_FUSION, PCB)
