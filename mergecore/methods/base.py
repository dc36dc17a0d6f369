"""What a merge method is: a small frozen value, and the statistics that it may ask for.

A method holds its mathematics and nothing else: no I/O, no devices, no loops over tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from mergecore.ops import Drop, Elect, Measure

Scalar = bool | int | float | str


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method, as users write it under `parameters`.

    `per_model` ones may also stand under a model; a `default` of None means that it must be given.
    """

    name: str
    default: Scalar | None
    meaning: str
    per_model: bool = False
    choices: tuple[str, ...] = ()
    optional: bool = False
    """Without a default, but not required: the method sees None and decides."""

    @property
    def type(self) -> type:
        return float if self.default is None else type(self.default)

    def accepts(self, value: Any) -> bool:
        """Whether one scalar of a setting is of the right type, finite, and among the choices."""
        if self.type is bool:
            return isinstance(value, bool)
        if self.type is str:
            return isinstance(value, str) and (not self.choices or value in self.choices)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return math.isfinite(value) and (self.type is float or float(value).is_integer())

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        if self.choices:
            return " or ".join(self.choices)
        return {bool: "true or false", str: "a text", int: "a whole number", float: "a number"}[self.type]


def scope(default: str) -> Parameter:
    """The parameter that says over what a statistic is taken; planning reads it."""
    return Parameter(
        "scope",
        default,
        "compare within each tensor, or over all tensors of the model together",
        choices=("tensor", "model"),
    )


class Statistics(Enum):
    """What a method wants to know of a tensor before it can say its coefficients."""

    NONE = "none"
    COLUMNS = "columns"
    GRAM = "Gram matrix"
    ROW_GRAM = "Gram matrix per row"
    COLUMN_GRAM = "Gram matrix per column"
    SQUARES = "squares"
    """Mean squares of the kept deltas."""
    SHARED = "shared"
    """How many deltas beyond the parameter `epsilon` a model shares with others, and how many it has alone."""
    DELTAS = "deltas"
    """The deltas of a matrix, whole."""
    SUM = "sum of the deltas"
    """The sum of w_n d_n of a matrix, whole; w is the parameter `weight`."""
    FITTED = "a fit on samples of text"
    """Coefficients that are fitted before the first tensor is written (mergecore/features)."""

    @property
    def is_read(self) -> bool:
        """Whether it takes a read of the tensor."""
        return self not in (Statistics.NONE, Statistics.FITTED)

    @property
    def is_whole(self) -> bool:
        """Whether a matrix is held in memory."""
        return self in (Statistics.DELTAS, Statistics.SUM)

    @property
    def is_gram(self) -> bool:
        return self in (Statistics.GRAM, Statistics.ROW_GRAM, Statistics.COLUMN_GRAM)


class Gathered(Enum):
    """Statistics of a model's runs on samples of text, from the files that `mergecore stats` writes."""

    INPUTS = "gram"
    """Of a linear layer the Gram matrix of its inputs, (inputs, inputs): known before the tensor is read."""
    FISHER = "fisher"
    """The Fisher information of every entry, of the tensor's shape: read along with it."""

    def of(self, name: str) -> str:
        """What the file calls the statistics of a tensor."""
        return f"{self.value}.{name}"


@dataclass(frozen=True)
class Keep:
    """Which deltas of one model are kept, of one tensor.

    By magnitude: the `outliers` share of the largest is dropped, of the others the `density` share of
    the largest is kept; both are shares of all entries, Measure.SPREAD counts only those that differ. Or,
    with `fence`, what is at least the median plus 1.5 times the distance of the quartiles. At random: each
    entry is dropped with probability `drop_rate`, which falls by rank of |d| within a row from + `epsilon`
    to - `epsilon`.
    """

    density: float = 1.0
    outliers: float = 0.0
    measure: Measure = Measure.OWN
    """What is compared, the same for all models."""
    fence: bool = False
    drop_rate: float = 0.0
    epsilon: float = 0.0
    rescale: Literal["none", "probability", "l1"] = "none"
    """Divide what is kept by its probability, or bring the sum of |d| back to what it was."""

    @property
    def by_magnitude(self) -> bool:
        return self.density < 1 or self.outliers > 0 or self.fence or self.measure is Measure.COMPETITION

    @property
    def drops(self) -> bool:
        """Whether anything is dropped at all."""
        return self.by_magnitude or self.drop_rate > 0

    @property
    def by_row(self) -> bool:
        """Whether the ranks within rows decide."""
        return 0 < self.drop_rate < 1 and self.epsilon > 0

    @property
    def whole_rows(self) -> bool:
        """Whether windows must not cut a row (along the last axis)."""
        return self.by_row or self.measure is Measure.ROWS

    @property
    def rescale_by_sums(self) -> bool:
        return self.rescale == "l1" and self.drops

    def dropping(self, key: int) -> Drop:
        """The random part."""
        if self.drop_rate >= 1:
            return Drop(key, 0, 1.0, least=math.inf)
        threshold = round(self.drop_rate * 2**32)
        rescaled = self.rescale == "probability" and threshold > 0
        return Drop(key, threshold, 1.0 / (1.0 - self.drop_rate) if rescaled else 1.0)


# This share of d.d is the rounding noise of 1 - cos's numerator, with a margin for many rows.
NOISE = 2.0**-40
# Above this share of a.a + d.d what x.x = a.a + 2 d.a + d.d loses to cancellation counts for nothing beside that noise.
VANISHING = 2.0**-8


@dataclass(frozen=True)
class Moments:
    """Per-column moments of base a and models x = a + d, float64: aa (columns), the others (models, columns)."""

    aa: Tensor
    dd: Tensor
    da: Tensor
    xx: Tensor

    @classmethod
    def of(cls, sums: Tensor) -> Moments:
        """From the kernels' (1 + 2 * models, columns)."""
        models = sums.shape[0] // 2
        aa, dd, da = sums[0], sums[1 : 1 + models], sums[1 + models :]
        return cls(aa, dd, da, (aa + 2.0 * da + dd).clamp_(min=0.0))

    @property
    def vanishing(self) -> Tensor:
        """bool (models,): whether columns of x are so short beside a and d that their x.x has to be summed itself."""
        return (self.xx < VANISHING * (self.aa + self.dd)).any(dim=1)

    def magnitude_divergence(self) -> Tensor:
        """| |x| - |a| | per column, (models, columns) (WIDEN eq. 2, first line)."""
        return self._magnitude_change.abs()

    def direction_divergence(self) -> Tensor:
        """1 - cos(x, a) per column, (models, columns) (WIDEN eq. 2, second line), without cancellation.

        Columns that are zero in both count 0, in one of them 1; so does one that is 2^-41 of the other
        or less, whose direction float64 sums do not tell.
        """
        change, (x, a) = self._magnitude_change, self._norms
        # d.d - (|x| - |a|)^2 = 2 |x| |a| (1 - cos) lies in [0, most]: at the ends, parallel and opposite
        # columns, it is exact up to the noise of d.d.
        numerator = self.dd - change * change
        product = x * a
        most, noise = 4.0 * product, NOISE * self.dd
        divergence = numerator / (2.0 * product)
        divergence = torch.where(numerator <= noise, torch.zeros_like(divergence), divergence)
        divergence = torch.where(most - numerator <= noise, torch.full_like(divergence, 2.0), divergence)
        differs = (self.dd > 0).to(divergence.dtype)
        return torch.where(most > 2.0 * noise, divergence, differs)

    @cached_property
    def _norms(self) -> tuple[Tensor, Tensor]:
        return self.xx.sqrt(), self.aa.sqrt()

    @cached_property
    def _magnitude_change(self) -> Tensor:
        # |x| - |a| = d.(x + a) / (|x| + |a|), and d.(x + a) = 2 d.a + d.d up to the noise of |d| (|d| + |a|).
        x, a = self._norms
        total = x + a
        return torch.where(total > 0, (2.0 * self.da + self.dd) / total, torch.zeros_like(total))


@dataclass(frozen=True)
class Gram:
    """All dot products of base a and deltas d_n: float64 (vectors, vectors, n), vector 0 is a.

    n is 1 for a whole tensor, else its stored rows or columns. Where no base is read, a is the first
    model and the deltas of the others are counted from it (`anchored`), so that models that are nearly
    equal are compared by their difference.
    """

    products: Tensor
    anchored: bool = False

    @classmethod
    def of(cls, sums: Tensor, anchored: bool) -> Gram:
        """From the kernels' (pairs, n), i <= j in order."""
        vectors = math.isqrt(2 * sums.shape[0])
        products = torch.empty(vectors, vectors, sums.shape[1], dtype=torch.float64)
        i, j = torch.triu_indices(vectors, vectors)
        # One product that is not finite leaves no angle of its tensor (row, column) known.
        known = torch.isfinite(sums).all(dim=0)
        products[i, j] = products[j, i] = torch.where(known, sums, math.nan).cpu()
        return cls(products, anchored)


@dataclass(frozen=True)
class TensorView:
    """What a method sees of one tensor (or of one expert of a fused one)."""

    models: int
    is_vector: bool
    parameters: Mapping[str, Any]
    """Each parameter's value here: a scalar, or a tuple with one scalar per model."""
    moments: Moments | None = None
    gram: Gram | None = None
    squares: tuple[float, ...] | None = None
    """Mean square of each model's kept deltas."""
    shared: tuple[tuple[int, int], ...] | None = None
    """Per model how many deltas beyond `epsilon` others have too, and how many it has alone."""
    place: float = 0.0
    """Where the tensor's layer stands: 0 is the first, 1 the last; 0 outside the layers."""
    is_linear: bool = False
    """Whether it is a linear layer or a convolution: neither a vector nor an embedding nor the head."""
    fitted: Coefficients | None = None
    """Statistics.FITTED."""
    is_gathered: bool = False
    """Whether there are statistics for it that the method takes from files (Method.gathered)."""
    is_transposed: bool = False
    """Whether an input feature of a linear layer is a stored row (Conv1D), not a stored column."""
    input_grams: tuple[Tensor, ...] = ()
    """Gathered.INPUTS of every model, (inputs, inputs), as stored: float32 or float64."""
    deltas: Tensor | None = None
    """Statistics.DELTAS or SUM of one matrix, float64 (models, rows, columns) or (1, rows, columns). Without a base
    they are counted from the first model."""


@dataclass(frozen=True)
class Election:
    """out = a + scale * what `elect` makes of the kept deltas v_n of an entry: their sum with `weights`, or other.

    With an election by sign `normalize` divides by the sum of the weights that agree. `limits` are those of
    Elect.SHARED and Elect.LIMITED, or of a `consensus`: then what fewer than so many models hold on to is 0,
    |d_n| > limits[n] * |result - d_n|.
    """

    weights: tuple[float, ...]
    scale: float = 1.0
    elect: Elect = Elect.NONE
    normalize: bool = False
    limits: tuple[float, ...] = ()
    consensus: int = 0

    @property
    def finite(self) -> bool:
        return all(math.isfinite(self.scale * weight) for weight in self.weights)


@dataclass(frozen=True)
class Coefficients:
    """out = base * a + sum_n values[n] * d_n; `values` is float64 (models, 1), or (models, n) with one per
    stored column or row, whichever the statistics are of or `axis` says. Without a base out = sum_n values[n] * W_n."""

    values: Tensor
    base: float = 1.0
    axis: Literal["rows", "columns"] | None = None

    @property
    def finite(self) -> bool:
        return bool(self.values.isfinite().all())


@dataclass(frozen=True)
class Dense:
    """out = a + delta: `delta` is float64 (rows, columns) of one matrix. Without a base a is the first model."""

    delta: Tensor
    warning: str = ""
    """What there is to say about how it was found."""

    @property
    def finite(self) -> bool:
        return bool(self.delta.isfinite().all())


@dataclass(frozen=True)
class Rowwise:
    """out = combine(W, F), of some rows at a time: W are those rows of every model, F what Gathered.FISHER has of them
    (empty without it); the result is float64, of their shape. No base is read."""

    combine: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
    warning: str = ""
    """What there is to say about how it was found."""
    finite: bool = True


def per_model(values: Sequence[float]) -> Tensor:
    """Scalars per model as a (models, 1) tensor of coefficients."""
    return torch.tensor([[value] for value in values], dtype=torch.float64)


@dataclass(frozen=True)
class Method:
    """A merge method: its name, parameters, the statistics it needs, and its coefficients.

    `deltas` methods move away from a base, which the spec must name unless `base_optional`; others average
    the models themselves, and a base that carries a weight (where the method has none: any base) takes part
    like a model. `statistics` may depend on the parameters of a tensor, and on whether it is a vector.
    """

    name: str
    summary: str
    reference: str
    coefficients: Callable[[TensorView], Coefficients | Election | Dense | Rowwise]
    parameters: tuple[Parameter, ...] = ()
    statistics: Statistics | Callable[[TensorView], Statistics] = Statistics.NONE
    gathered: Gathered | None = None
    """What the statistics file of every model must have; such a method knows no base."""
    deltas: bool = True
    base_optional: bool = False
    least: int = 1
    """Models at least, the base not counted where deltas are taken from it; `most`: at most."""
    most: int | None = None
    check: Callable[[TensorView], None] | None = None
    """Raises ValueError for parameters that do not go together; called before anything is read."""
    ignored: tuple[str, ...] = field(default=())
    """Names that mergekit configs carry for this method and that change nothing here."""
    keeps: Callable[[TensorView], tuple[Keep, ...]] | None = None
    """Of methods whose coefficients are an Election: which deltas of each model are kept."""

    def needs(self, view: TensorView) -> Statistics:
        """The statistics of one tensor."""
        return self.statistics if isinstance(self.statistics, Statistics) else self.statistics(view)

    def parameter(self, name: str) -> Parameter | None:
        return next((parameter for parameter in self.parameters if parameter.name == name), None)
