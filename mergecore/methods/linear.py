"""Methods whose coefficients are given, not computed: the weighted average, task arithmetic, one model as it is."""

from __future__ import annotations

import math

from mergecore.methods.base import Coefficients, Method, Parameter, TensorView, per_model

WEIGHT = Parameter("weight", 1.0, "weight of a model", per_model=True)


def _linear(view: TensorView) -> Coefficients:
    weights = view.parameters["weight"]
    total = math.fsum(weights)
    if not view.parameters["normalize"]:
        return Coefficients(per_model(weights), base=total)
    if abs(total) < 1e-8:
        raise ValueError(f"the weights add up to {total:g}; they cannot be normalised (set normalize: false)")
    return Coefficients(per_model([weight / total for weight in weights]), base=1.0)


LINEAR = Method(
    name="linear",
    summary="weighted average of the models: sum w_n W_n, divided by sum w_n",
    reference="Wortsman et al. 2022, Model soups",
    coefficients=_linear,
    parameters=(WEIGHT, Parameter("normalize", True, "divide by the sum of the weights")),
    deltas=False,
)


def _task_arithmetic(view: TensorView) -> Coefficients:
    weights = view.parameters["weight"]
    scale = view.parameters["lambda"]
    if view.parameters["normalize"]:
        total = math.fsum(weights)
        scale = scale / total if abs(total) >= 1e-8 else scale
    return Coefficients(per_model([scale * weight for weight in weights]))


TASK_ARITHMETIC = Method(
    name="task_arithmetic",
    summary="base plus the scaled sum of the deltas: W0 + lambda sum w_n d_n",
    reference="Ilharco et al. 2023, Editing models with task arithmetic",
    coefficients=_task_arithmetic,
    parameters=(
        WEIGHT,
        Parameter("lambda", 1.0, "scale of the summed deltas"),
        Parameter("normalize", False, "divide by the sum of the weights"),
    ),
    ignored=("int8_mask", "density", "rescale"),
)


def _passthrough(view: TensorView) -> Coefficients:
    return Coefficients(per_model(view.parameters["scale"]))


PASSTHROUGH = Method(
    name="passthrough",
    summary="one model as it is, or scaled: scale W",
    reference="none: copies, and what frankenmerges are made of",
    coefficients=_passthrough,
    parameters=(Parameter("scale", 1.0, "factor of a tensor", per_model=True),),
    deltas=False,
    most=1,
)
