"""Methods of angles and norms: slerp, nuslerp, multislerp, karcher, model_stock. All follow from a Gram matrix.

A merged tensor is a combination of the inputs, so every vector here is its coordinates in the base a
and the deltas d_n, and every length and angle comes from their dot products. Vectors that are nearly
equal differ little in their coordinates too: angles between them are those of differences, and nothing
cancels. A vector of zeros has no direction: it stands at a right angle to all others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergecore.methods.base import (
    NOISE,
    Coefficients,
    Gram,
    Method,
    Parameter,
    Statistics,
    TensorView,
    per_model,
)
from mergecore.methods.linear import WEIGHT


class Span:
    """Vectors as coordinates in a, d_1, ..., (vectors, n) float64, for the n tensors (or rows, columns) at once."""

    def __init__(self, gram: Gram) -> None:
        self.products = gram.products
        self.anchored = gram.anchored

    def points(self, models: int, *, absolute: bool) -> list[Tensor]:
        """The models: a + d_n if `absolute` or if there is no base, else d_n."""
        unit = torch.eye(self.products.shape[0], dtype=torch.float64).unsqueeze(-1)
        if models == 1 and self.products.shape[0] == 1:
            return [unit[0]]
        if self.anchored:
            return [unit[0], *(unit[0] + delta for delta in unit[1:])]
        return [unit[0] + delta if absolute else delta for delta in unit[1:]]

    def dot(self, v: Tensor, w: Tensor) -> Tensor:
        """v . w, (n,)."""
        terms = v.unsqueeze(1) * w * self.products
        # One after the other: the order of torch's own sum depends on the shape.
        return sum(terms.flatten(0, 1), torch.zeros(terms.shape[2], dtype=torch.float64))

    def norm(self, v: Tensor) -> Tensor:
        return self.dot(v, v).clamp(min=0.0).sqrt()

    def unit(self, v: Tensor) -> Tensor:
        """v / |v|; zeros stay zeros."""
        norm = self.norm(v)
        return torch.where(norm == 0, torch.zeros_like(v), v / norm)

    def angle(self, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """The angle between v and w, and whether they are opposite up to float64's noise."""
        v, w = self.unit(v), self.unit(w)
        apart, together = self.norm(v - w), self.norm(v + w)
        zero = (self.norm(v) == 0) | (self.norm(w) == 0)
        angle = torch.where(zero, math.pi / 2, 2.0 * torch.atan2(apart, together))
        return angle, ~zero & (together * together <= 4.0 * NOISE)


def _arc(angle: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """sin((1-t) angle) / sin(angle) and sin(t angle) / sin(angle), in the limit at 0."""
    sine = torch.sin(angle)
    return (
        torch.where(angle == 0, 1.0 - t, torch.sin((1.0 - t) * angle) / sine),
        torch.where(angle == 0, t, torch.sin(t * angle) / sine),
    )


def _gram(view: TensorView) -> Gram:
    assert view.gram is not None
    return view.gram


# Two models ---------------------------------------------------------------------------------------

PARALLEL = 0.9995  # |cos| above which slerp is linear


def _slerp(view: TensorView) -> Coefficients:
    span, t = Span(_gram(view)), view.parameters["t"]
    (model,) = span.points(1, absolute=True)
    base = torch.zeros_like(model)
    base[0] = 1.0
    angle, _ = span.angle(base, model)
    of_base, of_model = _arc(angle, t)
    linear = torch.cos(angle).abs() > PARALLEL
    of_base = torch.where(linear, 1.0 - t, of_base)
    of_model = torch.where(linear, t, of_model)
    return Coefficients(of_model.unsqueeze(0), base=float(of_base + of_model))


SLERP = Method(
    name="slerp",
    summary="from the base (t = 0) to one model (t = 1) along their arc; a straight line where |cos| > 0.9995",
    reference="Shoemake 1985, Animating rotation with quaternion curves",
    coefficients=_slerp,
    parameters=(Parameter("t", None, "how far from the base to the model, 0 to 1"),),
    statistics=Statistics.GRAM,
    most=1,
)


def _nuslerp_statistics(view: TensorView) -> Statistics:
    if view.is_vector or view.parameters["nuslerp_flatten"]:
        return Statistics.GRAM
    return Statistics.COLUMN_GRAM if view.parameters["nuslerp_row_wise"] else Statistics.ROW_GRAM


def _nuslerp(view: TensorView) -> Coefficients:
    first, second = view.parameters["weight"]
    total = first + second
    t = 0.5 if abs(total) < 1e-6 else second / total
    span = Span(_gram(view))
    angle, opposite = span.angle(*span.points(2, absolute=False))
    one, two = _arc(angle, t)
    return Coefficients(torch.stack([torch.where(opposite, 1.0 - t, one), torch.where(opposite, t, two)]))


NUSLERP = Method(
    name="nuslerp",
    summary="two models, or their deltas if there is a base, along the arc between them; t = w_2 / (w_1 + w_2)",
    reference="mergekit, NuSLERP",
    coefficients=_nuslerp,
    parameters=(
        WEIGHT,
        Parameter("nuslerp_flatten", True, "one angle per tensor; false: one per stored row"),
        Parameter("nuslerp_row_wise", False, "without nuslerp_flatten: one angle per stored column"),
    ),
    statistics=_nuslerp_statistics,
    base_optional=True,
    least=2,
    most=2,
)


# Means of any number ------------------------------------------------------------------------------


def _scaled(points: Sequence[Tensor], values: Sequence[float]) -> Tensor:
    """sum values[n] * points[n]."""
    total = torch.zeros_like(points[0])
    for value, point in zip(values, points, strict=True):
        total = total + value * point
    return total


def _finite(view: TensorView) -> bool:
    return bool(torch.isfinite(_gram(view).products).all())


def _unknown(view: TensorView) -> Coefficients:
    """Inputs that are not finite have no angles: the result is NaN."""
    return Coefficients(per_model([math.nan] * view.models), base=math.nan)


def _check_multislerp(view: TensorView) -> None:
    total = math.fsum(view.parameters["weight"])
    if view.parameters["normalize_weights"] and view.models > 1 and abs(total) < 1e-8:
        raise ValueError(f"the weights add up to {total:g}; they cannot be normalised (set normalize_weights: false)")


def _multislerp(view: TensorView) -> Coefficients:
    if not _finite(view):
        return _unknown(view)
    if view.models == 1:
        return Coefficients(per_model([1.0]))
    weights, eps = view.parameters["weight"], view.parameters["eps"]
    if view.parameters["normalize_weights"]:
        total = math.fsum(weights)
        weights = [weight / total for weight in weights]
    span = Span(_gram(view))
    points = span.points(view.models, absolute=False)
    norms = [float(span.norm(point)) for point in points]
    shares = [weight / (norm + eps) if norm + eps > 0 else 0.0 for weight, norm in zip(weights, norms, strict=True)]
    mean = float(span.norm(_scaled(points, shares)))
    # The tangents at the mean's direction add up to nothing, by the definition of a mean: there is no step
    # to take on the sphere. Where the directions cancel there is none, and the mean is the plain one.
    longest = math.fsum(abs(share) * norm for share, norm in zip(shares, norms, strict=True))
    if mean < eps or mean * mean <= NOISE * longest * longest:
        return Coefficients(per_model(weights))
    scale = math.fsum(weight * norm for weight, norm in zip(weights, norms, strict=True)) / mean
    return Coefficients(per_model([scale * share for share in shares]))


MULTISLERP = Method(
    name="multislerp",
    summary="weighted mean of the unit vectors, at the weighted mean length; of deltas if there is a base",
    reference="Goddard 2024, Multi-SLERP",
    coefficients=_multislerp,
    parameters=(
        WEIGHT,
        Parameter("normalize_weights", True, "divide the weights by their sum"),
        Parameter("eps", 1e-8, "added to each length; a mean direction shorter than this counts as none"),
    ),
    statistics=Statistics.GRAM,
    base_optional=True,
    check=_check_multislerp,
)


def _karcher(view: TensorView) -> Coefficients:
    if not _finite(view):
        return _unknown(view)
    count = view.models
    span, tol = Span(_gram(view)), view.parameters["tol"]
    points = span.points(count, absolute=True)
    norms = [float(span.norm(point)) for point in points]
    used = [n for n, norm in enumerate(norms) if norm > 0]
    if count == 1 or not used:
        return _absolute([1.0 / count] * count)
    units = [points[n] / norms[n] for n in used]
    mean = _karcher_mean(span, units, view.parameters["max_iter"], tol)
    scale = math.fsum(norms) / count
    values = [0.0] * count
    for n, share in zip(used, mean, strict=True):
        values[n] = scale * share / norms[n]
    return _absolute(values)


def _absolute(values: Sequence[float]) -> Coefficients:
    """sum values[n] * W_n, whether there is a base (then W_n = a + d_n) or not."""
    return Coefficients(per_model(values), base=math.fsum(values))


def _karcher_mean(span: Span, units: Sequence[Tensor], max_iter: int, tol: float) -> list[float]:
    """The point of the sphere with the least mean squared angle to the unit vectors, as shares of them."""
    equal = [1.0 / len(units)] * len(units)
    first = [float(n == 0) for n in range(len(units))]
    length = float(span.norm(_scaled(units, equal)))
    mean = first if length < tol or length * length <= NOISE else [share / length for share in equal]
    for _ in range(max_iter):
        here = _scaled(units, mean)
        tangent = [0.0] * len(units)
        for n, unit in enumerate(units):
            apart, together = float(span.norm(unit - here)), float(span.norm(unit + here))
            angle = 2.0 * math.atan2(apart, together)
            if angle < tol or together * together <= 4.0 * NOISE:  # arrived; or opposite: every direction leads there
                continue
            # unit - cos(angle) * mean has the length sin(angle)
            step = angle / math.sin(angle) / len(units)
            cosine = 1.0 - apart * apart / 2.0
            tangent = [value - step * cosine * share for value, share in zip(tangent, mean, strict=True)]
            tangent[n] += step
        length = float(span.norm(_scaled(units, tangent)))
        if length < tol:
            break
        along, aside = math.cos(length), math.sin(length) / length
        mean = [along * share + aside * value for share, value in zip(mean, tangent, strict=True)]
        length = float(span.norm(_scaled(units, mean)))
        mean = [share / length for share in mean]
    return mean


KARCHER = Method(
    name="karcher",
    summary="the mean of the models' directions on the sphere (least squared angles), at their mean length",
    reference="Karcher 1977, Riemannian center of mass and mollifier smoothing",
    coefficients=_karcher,
    parameters=(
        Parameter("max_iter", 10, "steps at most"),
        Parameter("tol", 1e-5, "stop when a step is shorter than this angle (radians)"),
    ),
    statistics=Statistics.GRAM,
    deltas=False,
)


def _model_stock_statistics(view: TensorView) -> Statistics:
    by_row = view.parameters["filter_wise"] and not view.is_vector
    return Statistics.ROW_GRAM if by_row else Statistics.GRAM


def _model_stock(view: TensorView) -> Coefficients:
    count, products = view.models, _gram(view).products[1:, 1:]
    norms = [products[n, n].sqrt() for n in range(count)]
    total = torch.zeros_like(norms[0])
    for i in range(count):
        for j in range(i + 1, count):
            both = norms[i] * norms[j]
            total = total + torch.where(both == 0, torch.zeros_like(both), products[i, j] / both).clamp(-1.0, 1.0)
    cosine = total / (count * (count - 1) / 2)
    # N c / (1 + (N-1) c) runs from 0 (c = 0) to 1 (c = 1); below c = 0 it turns to its pole at -1/(N-1).
    positive = cosine.clamp(min=0.0)
    t = count * positive / (1.0 + (count - 1) * positive)
    return Coefficients((t.clamp(max=1.0) / count).repeat(count, 1))


MODEL_STOCK = Method(
    name="model_stock",
    summary="t mean(W_n) + (1-t) W0 with t = N c / (1 + (N-1) c) from the deltas' mean cosine c, 0 to 1",
    reference="Jang et al. 2024, Model stock: all we need is just a few fine-tuned models",
    coefficients=_model_stock,
    parameters=(Parameter("filter_wise", False, "one t per stored row (output unit) instead of per tensor"),),
    statistics=_model_stock_statistics,
    least=2,
)
