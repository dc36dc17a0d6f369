"""What the merge methods compute, written from the papers in exact arithmetic: the tests' oracle.

Nothing here is taken from, or calls, the code under test. Sums of products are exact integers; norms,
cosines and scores are decimals with `DIGITS` digits, so that no comparison depends on rounding; results
are 64-bit-mantissa long doubles. It is slow and holds everything in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from torch import Tensor

Floats = np.ndarray[Any, np.dtype[np.float64]]
Longs = np.ndarray[Any, np.dtype[np.longdouble]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]

DIGITS = 200
_EXACT = Context(prec=DIGITS, Emin=-(10**9), Emax=10**9, rounding=ROUND_HALF_EVEN)
_EQUAL = Context(prec=80)  # two values that agree to so many digits are equal
HAS_LONG_DOUBLE = np.finfo(np.longdouble).nmant >= 63


# Numbers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A binary floating point format: significant bits, exponent of the smallest normal number, largest number."""

    significant: int
    least: int
    largest: float


FORMATS = {
    torch.float32: Format(24, -126, (2 - 2.0**-23) * 2.0**127),
    torch.float16: Format(11, -14, 65504.0),
    torch.bfloat16: Format(8, -126, (2 - 2.0**-7) * 2.0**127),
}
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bits as integers, so that -0.0 differs from 0.0 and NaN equals itself."""
    return tensor.contiguous().view(BITS.get(tensor.dtype, torch.int64))


def floats(tensor: Tensor) -> Floats:
    """Any float tensor as float64, exactly."""
    return tensor.detach().to(torch.float64).numpy()


def _round_to_grid(value: Fraction, significant: int, least: int) -> Fraction:
    """The nearest number of `significant` bits, below 2**least not finer than there (subnormals); ties to even."""
    if value == 0:
        return value
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    if abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, least) - significant + 1)
    return round(value / unit) * unit  # Fraction rounds half to even


def nearest(value: Fraction, dtype: torch.dtype, *, first: int | None = None) -> float:
    """`value` correctly rounded to `dtype`, to nearest even; beyond the largest number infinity.

    `first`: round to so many significant bits before (the merge's one rounding does, with 40 of them).
    """
    form = FORMATS[dtype]
    if first is not None:
        value = _round_to_grid(value, first, form.least)
    value = _round_to_grid(value, form.significant, form.least)
    return float(value) if abs(value) <= form.largest else math.copysign(math.inf, value)


def rounded(values: Longs, dtype: torch.dtype) -> Floats:
    """The same for many long doubles at once."""
    form = FORMATS[dtype]
    _, exponent = np.frexp(values)
    unit = np.maximum(exponent - 1, form.least) - form.significant + 1
    near = np.ldexp(np.rint(np.ldexp(values, -unit)), unit)
    return np.where(np.abs(near) > form.largest, np.copysign(np.inf, near), near).astype(np.float64)


@dataclass(frozen=True)
class Exact:
    """A merge's exact result: the entries, and the sum of the absolute values of what was added up for each."""

    values: Longs
    scale: Longs

    def wrong(self, result: Tensor) -> Bools:
        """Where `result` is not the correct rounding although the exact value is no nearer than 2**-38 of itself
        (or of the smallest normal number, or than float64's noise of the sum) to the middle of two numbers."""
        normal = np.ldexp(np.longdouble(1), FORMATS[result.dtype].least)
        doubt = np.ldexp(np.maximum(np.abs(self.values), normal), -38) + np.ldexp(self.scale, -50)
        found = floats(result)
        low, high = rounded(self.values - doubt, result.dtype), rounded(self.values + doubt, result.dtype)
        return ~((low <= found) & (found <= high))

    def ulps(self, result: Tensor) -> Floats:
        """Distance of `result` from the correct rounding, in units of that number's last place."""
        form = FORMATS[result.dtype]
        right = rounded(self.values, result.dtype)
        _, exponent = np.frexp(right)
        unit = np.maximum(exponent - 1, form.least) - form.significant + 1
        return np.ldexp(np.abs(floats(result) - right), -unit)


# Exact sums of products ---------------------------------------------------------------------------

_LIMB = 15


def _limbs(values: Floats) -> tuple[int, list[np.ndarray[Any, np.dtype[np.int64]]]]:
    """Numbers of at most 24 significant bits as integers in base 2**15: values = sum limbs[i] * 2**(unit + 15 i)."""
    _, exponents = np.frexp(values[values != 0])
    if exponents.size == 0:
        return 0, [np.zeros(values.shape, np.int64)]
    unit = int(exponents.min()) - 24
    count = -(-(int(exponents.max()) - unit) // _LIMB)
    whole = [np.floor(np.ldexp(np.abs(values), -(unit + _LIMB * i))) for i in range(count)]
    return unit, [(np.sign(values) * np.fmod(part, 2.0**_LIMB)).astype(np.int64) for part in whole]


def column_dots(a: Floats, b: Floats) -> list[Fraction]:
    """a[:, j] . b[:, j] for every column j, exactly; entries of at most 24 significant bits."""
    unit_a, limbs_a = _limbs(a)
    unit_b, limbs_b = _limbs(b)
    totals = [0] * a.shape[1]
    for i, x in enumerate(limbs_a):
        for j, y in enumerate(limbs_b):
            for column, dot in enumerate(np.einsum("ij,ij->j", x, y).tolist()):
                totals[column] += dot << (_LIMB * (i + j))
    return [total * Fraction(2) ** (unit_a + unit_b) for total in totals]


def _decimal(value: Fraction) -> Decimal:
    return _EXACT.divide(Decimal(value.numerator), Decimal(value.denominator))


# DARE (Yu et al. 2024, eq. 3) ---------------------------------------------------------------------


def philox4x32(counter: Sequence[int], key: Sequence[int], rounds: int = 10) -> list[int]:
    """Philox4x32 (Salmon et al. 2011, section 3.3): four 32-bit numbers from four words of counter, two of key."""
    c, k, mask = list(counter), list(key), 0xFFFFFFFF
    for _ in range(rounds):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c


def random_numbers(key: int, entries: Iterable[int]) -> list[int]:
    """The 32-bit number of each entry: word `entry % 4` of Philox at counter `entry // 4`."""
    found: dict[int, list[int]] = {}
    out = []
    for entry in entries:
        block, word = divmod(entry, 4)
        if block not in found:
            found[block] = philox4x32([block & 0xFFFFFFFF, block >> 32, 0, 0], [key & 0xFFFFFFFF, key >> 32])
        out.append(found[block][word])
    return out


@dataclass(frozen=True)
class Dare:
    """Dropping deltas with probability `rate` (its decimal text), kept ones divided by 1 - rate if `rescale`."""

    rate: str
    rescale: bool = True
    seed: int = 0

    @property
    def scale(self) -> Fraction:
        return 1 / (1 - Fraction(self.rate)) if self.rescale else Fraction(1)

    def kept(self, shape: tuple[int, ...], tensor: str, model: int) -> Bools:
        """Which entries of a tensor keep their delta."""
        key = xxhash.xxh3_64_intdigest(f"{self.seed}\0{tensor}\0{model}".encode())
        numbers = np.array(random_numbers(key, range(math.prod(shape))), dtype=np.uint64)
        return (numbers >= round(Fraction(self.rate) * 2**32)).reshape(shape)


# WIDEN (Yu et al. 2024b) --------------------------------------------------------------------------


@dataclass(frozen=True)
class Widen:
    """WIDEN's parameters; numbers as a person writes them (`t="1.15"` is 1.15, not a binary fraction near it)."""

    t: str = "1.0"
    s: str = "1.0"
    vector_scoring: Literal["divergence", "rank"] = "divergence"
    tie: Literal["stable", "average"] = "stable"
    disentangle: bool = True
    rank: bool = True
    calibrate: bool = True


@dataclass(frozen=True)
class Importance:
    """Eq. 3-6 for one kind of divergence, each (models, columns): scores (ranks from 1, or divergences), which
    are essential (eq. 5), and the calibrated scores (eq. 6)."""

    scores: list[list[Decimal]]
    essential: list[list[bool]]
    values: list[list[Decimal]]


def ranks(values: Sequence[Decimal], tie: str) -> list[Decimal]:
    """Places 1..k in ascending order; equal values in index order, or all at their mean place."""
    equal = [_EQUAL.plus(value) for value in values]
    order = sorted(range(len(equal)), key=lambda j: (equal[j], j))
    out = [Decimal(0)] * len(equal)
    first = 0
    while first < len(order):
        last = first + 1
        while tie == "average" and last < len(order) and equal[order[last]] == equal[order[first]]:
            last += 1
        for place in range(first, last):
            out[order[place]] = (Decimal(first) + last + 1) / 2 if tie == "average" else Decimal(place + 1)
        first = last
    return out


def calibrated(scores: list[list[Decimal]], divisor: int, settings: Widen) -> Importance:
    """Eq. 4-6: softmax over the models of scores / divisor, s where a score exceeds t times its model's mean."""
    t, s = Decimal(settings.t), Decimal(settings.s)
    with localcontext(_EXACT):
        means = [sum(row, Decimal(0)) / len(row) for row in scores]
        essential = [
            [settings.calibrate and score > t * mean for score in row] for row, mean in zip(scores, means, strict=True)
        ]
    with localcontext(_EXACT) as context:
        context.prec = 30
        values: list[list[Decimal]] = [[] for _ in scores]
        for j, column in enumerate(zip(*scores, strict=True)):
            top = max(column)
            powers = [((score - top) / divisor).exp() for score in column]
            for n, power in enumerate(powers):
                values[n].append(s if essential[n][j] else power / sum(powers))
    return Importance(scores, essential, values)


def min_max(values: Sequence[Decimal]) -> list[Decimal]:
    """Section 4.4, w/o RANK: scaled to [0, 1] within a model; equal values give 0."""
    with localcontext(_EXACT):
        least, span = min(values), max(values) - min(values)
        return [(value - least) / span if span > 0 else Decimal(0) for value in values]


def divergences(
    base: Floats, models: Sequence[Floats], kept: Sequence[Bools] | None = None, scale: Fraction = Fraction(1)
) -> tuple[list[list[Decimal]], list[list[Decimal]]]:
    """Eq. 2 per column: | |W_n| - |W_0| | and 1 - cos(W_n, W_0). Two zero columns have cosine 1, one zero column 0.

    With `kept` and `scale`, W_n is W_0 + scale * kept * (model - W_0).
    """
    aa = column_dots(base, base)
    magnitudes, directions = [], []
    for n, model in enumerate(models):
        mask = kept[n] if kept is not None else np.ones(base.shape, bool)
        a, x = np.where(mask, base, 0.0), np.where(mask, model, 0.0)
        kept_aa, kept_ax, kept_xx = column_dots(a, a), column_dots(a, x), column_dots(x, x)
        magnitude, direction = [], []
        for j, square in enumerate(aa):
            along = scale * (kept_ax[j] - kept_aa[j])
            ax = square + along
            xx = square + 2 * along + scale**2 * (kept_xx[j] - 2 * kept_ax[j] + kept_aa[j])
            magnitude.append(_magnitude_change(square, xx))
            direction.append(_direction_change(square, ax, xx))
        magnitudes.append(magnitude)
        directions.append(direction)
    return magnitudes, directions


def _magnitude_change(aa: Fraction, xx: Fraction) -> Decimal:
    with localcontext(_EXACT):
        return abs(_decimal(xx).sqrt() - _decimal(aa).sqrt())


def _direction_change(aa: Fraction, ax: Fraction, xx: Fraction) -> Decimal:
    if aa == 0 or xx == 0:
        return Decimal(int(aa != xx))
    if aa * xx == ax * ax:
        return Decimal(0 if ax > 0 else 2)
    with localcontext(_EXACT):
        return 1 - _decimal(ax) / (_decimal(aa).sqrt() * _decimal(xx).sqrt())


def importances(
    base: Floats,
    models: Sequence[Floats],
    settings: Widen,
    *,
    vector: bool = False,
    kept: Sequence[Bools] | None = None,
    scale: Fraction = Fraction(1),
) -> list[Importance]:
    """Eq. 2-6: the importance of magnitudes and of directions for a matrix (out, in); one kind for a vector (1, n)
    (Remark 1) and without disentanglement (section 4.4)."""
    columns = base.shape[1]
    if vector:
        mask = kept or [np.ones(base.shape, bool)] * len(models)
        change = [
            [_decimal(abs(scale * (Fraction(x) - Fraction(a)) * int(k))) for x, a, k in zip(*row, strict=True)]
            for row in (
                (model[0].tolist(), base[0].tolist(), m[0].tolist()) for model, m in zip(models, mask, strict=True)
            )
        ]
        if settings.vector_scoring == "divergence":
            return [calibrated(change, 1, settings)]
        return [calibrated([ranks(row, settings.tie) for row in change], columns, settings)]
    magnitudes, directions = divergences(base, models, kept, scale)
    kinds = [magnitudes, directions] if settings.disentangle else [directions]
    if settings.rank:
        return [calibrated([ranks(row, settings.tie) for row in kind], columns, settings) for kind in kinds]
    return [calibrated([min_max(row) for row in kind], 1, settings) for kind in kinds]


# Merging ------------------------------------------------------------------------------------------


def _sum(start: Longs, coefficients: Sequence[Any], terms: Sequence[Longs]) -> Exact:
    values, scale = start, np.abs(start)
    for coefficient, term in zip(coefficients, terms, strict=True):
        values = values + coefficient * term
        scale = scale + np.abs(coefficient) * (np.abs(term) + np.abs(start))
    # Coefficients that add up to 3/2 often make exact ties: the long doubles' own noise, 2**-62 of the scale, goes.
    _, exponent = np.frexp(scale)
    return Exact(np.ldexp(np.rint(np.ldexp(values, 56 - exponent)), exponent - 56), scale)


def _long(value: Fraction | Decimal) -> np.longdouble:
    number = _decimal(value) if isinstance(value, Fraction) else value
    return np.longdouble(str(number))


Layout = Literal["columns", "rows", "experts", "vector"]


def widen(
    base: Tensor,
    models: Sequence[Tensor],
    settings: Widen,
    layout: Layout,
    *,
    weights: Sequence[str] | None = None,
    dare: Dare | None = None,
    name: str = "",
) -> Exact:
    """Eq. 1-7 on one tensor, exactly.

    `layout`: "columns" (out, in, ...): a column is an input feature; "rows": a stored row is one (tokens,
    Conv1D); "experts" (E, out, in): each expert a matrix of its own; "vector": entries (Remark 1).
    """
    shape = tuple(base.shape)
    kept = [dare.kept(shape, name, n) for n in range(len(models))] if dare is not None else None
    if layout == "experts":
        parts = [
            _widen_matrix(
                floats(base[e]),
                [floats(model[e]) for model in models],
                settings,
                vector=False,
                weights=weights,
                kept=None if kept is None else [mask[e] for mask in kept],
                scale=dare.scale if dare else Fraction(1),
            )
            for e in range(shape[0])
        ]
        return Exact(np.stack([part.values for part in parts]), np.stack([part.scale for part in parts]))

    def as_matrix(array: Any) -> Any:
        if layout == "vector":
            return array.reshape(1, -1)
        matrix = array.reshape(shape[0], -1)
        return matrix.T if layout == "rows" else matrix

    merged = _widen_matrix(
        as_matrix(floats(base)),
        [as_matrix(floats(model)) for model in models],
        settings,
        vector=layout == "vector",
        weights=weights,
        kept=None if kept is None else [as_matrix(mask) for mask in kept],
        scale=dare.scale if dare else Fraction(1),
    )
    back: Callable[[Longs], Longs] = lambda m: (m.T if layout == "rows" else m).reshape(shape)  # noqa: E731
    return Exact(back(merged.values), back(merged.scale))


def _widen_matrix(
    base: Floats,
    models: Sequence[Floats],
    settings: Widen,
    *,
    vector: bool,
    weights: Sequence[str] | None,
    kept: Sequence[Bools] | None,
    scale: Fraction,
) -> Exact:
    kinds = importances(base, models, settings, vector=vector, kept=kept, scale=scale)
    return weighted(base, models, kinds, weights=weights, kept=kept, scale=scale)


def weighted(
    base: Floats,
    models: Sequence[Floats],
    kinds: Sequence[Importance],
    *,
    weights: Sequence[str] | None = None,
    kept: Sequence[Bools] | None = None,
    scale: Fraction = Fraction(1),
) -> Exact:
    """Eq. 7 for a matrix (out, in): the base plus every delta times the mean of its column's importances."""
    weights = weights or ["1"] * len(models)
    with localcontext(_EXACT):
        coefficients = [
            np.array([_long(Decimal(weight) * sum(column) / len(kinds)) for column in zip(*rows, strict=True)])
            for weight, rows in zip(weights, zip(*(kind.values for kind in kinds), strict=True), strict=True)
        ]
    return _sum(base.astype(np.longdouble), coefficients, _deltas(base, models, kept, scale))


def _deltas(base: Floats, models: Sequence[Floats], kept: Sequence[Bools] | None, scale: Fraction) -> list[Longs]:
    kept = kept or [np.ones(base.shape, bool)] * len(models)
    start = base.astype(np.longdouble)
    return [
        _long(scale) * np.where(mask, model.astype(np.longdouble) - start, np.longdouble(0))
        for model, mask in zip(models, kept, strict=True)
    ]


def linear(
    models: Sequence[Tensor],
    weights: Sequence[str],
    *,
    normalize: bool = True,
    base: Tensor | None = None,
    dare: Dare | None = None,
    name: str = "",
) -> Exact:
    """sum w_n W_n, divided by sum w_n if `normalize`; with `dare` each W_n is the base and its thinned-out delta."""
    total = sum(map(Fraction, weights)) if normalize else Fraction(1)
    coefficients = [_long(Fraction(w) / total) for w in weights]
    whole = [floats(model).astype(np.longdouble) for model in models]
    if dare is not None and base is not None:
        kept = [dare.kept(tuple(base.shape), name, n) for n in range(len(models))]
        start = floats(base)
        whole = [start + delta for delta in _deltas(start, [floats(model) for model in models], kept, dare.scale)]
    return _sum(np.zeros_like(whole[0]), coefficients, whole)


def task_arithmetic(
    base: Tensor,
    models: Sequence[Tensor],
    scale: str,
    weights: Sequence[str],
    *,
    normalize: bool = False,
    dare: Dare | None = None,
    name: str = "",
) -> Exact:
    """W_0 + scale * sum w_n (W_n - W_0), the weights divided by their sum if `normalize`."""
    total = sum(map(Fraction, weights)) if normalize else Fraction(1)
    coefficients = [_long(Fraction(scale) * Fraction(w) / total) for w in weights]
    start = floats(base)
    kept = [dare.kept(tuple(base.shape), name, n) for n in range(len(models))] if dare is not None else None
    deltas = _deltas(start, [floats(model) for model in models], kept, dare.scale if dare else Fraction(1))
    return _sum(start.astype(np.longdouble), coefficients, deltas)
