"""Weights as a differentiable function of merging coefficients; how coefficients are learned is said elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mergecore import ops
from mergecore.ops import Axis


def scaled_sum(
    coefficients: Tensor,
    models: Sequence[Tensor],
    base: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    axis: Axis = Axis.COLUMNS,
) -> Tensor:
    """W = sum_n c_n * model_n (DAM, Gauthier-Caron et al. 2024, section 3.2), or with a base
    base + sum_n c_n * (model_n - base) (AdaMerging, Yang et al. 2024), differentiable by the coefficients.

    `models` and `base` are contiguous (rows, columns) of float32, float16, bfloat16 or float64, mixed freely; they
    get no gradient. `coefficients` is float64 (models, 1), (models, columns) or (models, rows) as `axis` says:
    COLUMNS where a layer's inputs are stored columns (linear layers), ROWS where they are stored rows. W is
    (rows, columns) of `dtype`, one of the same four, rounded once. The backward pass reads models and base again, so
    they must stay as they are; it sums in float64 in a fixed order. Raises ValueError for coefficients of another
    shape, and RuntimeError for other tensors that do not fit and in a second derivative.
    """
    if not models or models[0].dim() != 2:
        raise ValueError("a scaled sum needs one or more matrices; view a vector as a matrix of one row")
    wanted = (len(models), _width(axis, *models[0].shape))
    if coefficients.shape != wanted:
        raise ValueError(f"coefficients are {tuple(coefficients.shape)}, but must be {wanted} ({axis.name.lower()})")
    result: Tensor = torch.ops.mergecore.scaled_sum(coefficients, list(models), base, dtype, int(axis))
    return result


def _width(axis: Axis, rows: int, columns: int) -> int:
    return {Axis.TENSOR: 1, Axis.COLUMNS: columns, Axis.ROWS: rows}[axis]


@torch.library.custom_op("mergecore::scaled_sum", mutates_args=())
def _scaled_sum(
    coefficients: Tensor, models: Sequence[Tensor], base: Tensor | None, dtype: torch.dtype, axis: int
) -> Tensor:
    out = models[0].new_empty(models[0].shape, dtype=dtype)
    counts = torch.zeros(2, dtype=torch.int64, device=out.device)  # not looked at: the loss shows what is not finite
    ops.blend(out, base, models, coefficients.contiguous(), counts, axis=Axis(axis))
    return out


@_scaled_sum.register_fake
def _(coefficients: Tensor, models: Sequence[Tensor], base: Tensor | None, dtype: torch.dtype, axis: int) -> Tensor:
    return models[0].new_empty(models[0].shape, dtype=dtype)


# An op of its own, without a derivative: a second derivative is refused and not wrong.
@torch.library.custom_op("mergecore::scaled_sum_gradient", mutates_args=())
def _gradient(gradient: Tensor, models: Sequence[Tensor], base: Tensor | None, axis: int) -> Tensor:
    gradient = gradient.contiguous()
    if axis == Axis.ROWS:
        sums = gradient.new_empty(len(models), gradient.shape[0], dtype=torch.float64)
        ops.row_gradient(gradient, base, models, sums)
        return sums
    sums, pending = gradient.new_zeros(2, len(models), gradient.shape[1], dtype=torch.float64).unbind()
    ops.column_gradient(gradient, base, models, sums, pending)
    sums = sums + pending
    if axis == Axis.COLUMNS:
        return sums
    whole = sums.new_empty(1, len(models))  # the columns' sums along their rows, in the kernels' order
    ops.row_gradient(torch.ones_like(sums), None, [sums], whole)
    return whole.view(-1, 1)


@_gradient.register_fake
def _(gradient: Tensor, models: Sequence[Tensor], base: Tensor | None, axis: int) -> Tensor:
    return gradient.new_empty(len(models), _width(Axis(axis), *gradient.shape), dtype=torch.float64)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, models, base, _, axis = inputs
    ctx.save_for_backward(*models, *([] if base is None else [base]))
    ctx.count, ctx.axis = len(models), axis


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | list[None] | None, ...]:
    models, base = list(ctx.saved_tensors[: ctx.count]), next(iter(ctx.saved_tensors[ctx.count :]), None)
    by_coefficient = torch.ops.mergecore.scaled_sum_gradient(gradient, models, base, ctx.axis)
    return by_coefficient, [None] * ctx.count, None, None, None


_scaled_sum.register_autograd(_backward, setup_context=_keep)
