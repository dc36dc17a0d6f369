"""Selections of deltas in NumPy, from their definitions, and tensors in memory that selections are made of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mergecore import topsets
from mergecore.ops import Drop
from mergecore.topsets import Part
from tests import oracle

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# The definitions, in NumPy ------------------------------------------------------------------------


def share(fraction: float, count: int) -> int:
    """round-half-up(fraction * count) of the decimal text."""
    return math.floor(Fraction(str(fraction)) * count + Fraction(1, 2))


def top(magnitudes: oracle.Floats, count: int) -> oracle.Bools:
    """The `count` largest entries; equal ones in index order."""
    flat = magnitudes.reshape(-1)
    mask = np.zeros(flat.size, bool)
    mask[np.lexsort((np.arange(flat.size), -flat))[:count]] = True
    return mask.reshape(magnitudes.shape)


def trimmed(delta: oracle.Floats, density: float, gamma: float = 0.0) -> oracle.Bools:
    """The `density` share of the largest after the `gamma` share of outliers, or all."""
    if density >= 1:
        return np.ones(delta.shape, bool)
    if density <= 0:
        return np.zeros(delta.shape, bool)
    kept = max(1, share(density, delta.size))
    outliers = min(share(gamma, delta.size), delta.size - kept)
    return top(np.abs(delta), outliers + kept) & ~top(np.abs(delta), outliers)


def elected(
    base: oracle.Floats,
    values: Sequence[oracle.Longs],
    weights: Sequence[float],
    *,
    scale: float = 1.0,
    elect: str = "weighted",
    normalize: bool = True,
) -> oracle.Exact:
    """base + scale * the (mean or) sum of the values whose sign is that of the weighted or plain sum."""
    terms: list[Any] = [np.longdouble(w) * v for w, v in zip(weights, values, strict=True)]
    mixed: Any
    divisor: Any
    size: Any
    if elect == "none":
        mixed, divisor = sum(terms), np.longdouble(math.fsum(weights))
        agreeing = np.abs(np.stack(terms)).sum(axis=0)
    else:
        sided: list[Any] = terms if elect == "weighted" else list(values)
        total: Any = sum(sided)
        size = sum(np.abs(side) for side in sided)
        sign = np.where(total < -np.ldexp(size, -40), -1, 1)
        agree = [side * sign > 0 for side in sided]
        mixed = sum(np.where(a, term, 0) for a, term in zip(agree, terms, strict=True))
        agreeing = np.abs(np.stack(terms)).sum(axis=0)
        divisor = sum(np.where(a, np.longdouble(w), 0) for a, w in zip(agree, weights, strict=True))
        size = sum(np.where(a, np.abs(np.longdouble(w)), 0) for a, w in zip(agree, weights, strict=True))
        divisor = np.where(np.abs(divisor) <= np.ldexp(size, -40), 0, divisor)
    if normalize:
        divisor = np.where(divisor == 0, np.longdouble(1), divisor)
        mixed, agreeing = mixed / divisor, agreeing / np.abs(divisor)
    start = base.astype(np.longdouble)
    return oracle.Exact(start + np.longdouble(scale) * mixed, np.abs(start) + abs(scale) * agreeing)


def deltas_of(base: Tensor, models: Sequence[Tensor]) -> list[oracle.Floats]:
    return [oracle.floats(model) - oracle.floats(base) for model in models]


def spread(deltas: Sequence[oracle.Floats]) -> oracle.Floats:
    """Standard deviation over models, exactly 0 where all are equal, to 40 bits."""
    stacked = np.stack(deltas).astype(np.longdouble)
    found = stacked.std(axis=0)
    found = np.where(np.ptp(stacked, axis=0) == 0, np.longdouble(0), found)
    _, exponent = np.frexp(found)
    return np.ldexp(np.rint(np.ldexp(found, 40 - exponent)), exponent - 40).astype(np.float64)


def assert_right(found: Tensor, exact: oracle.Exact, name: str) -> None:
    wrong = exact.wrong(found)
    assert not wrong.any(), f"{name}: {wrong.sum()} of {wrong.size} entries are not the exact result rounded"


# Tensors in memory --------------------------------------------------------------------------------


@dataclass
class InMemory:
    """A tensor as choose() reads it, in windows that are cut anywhere."""

    base: Tensor
    models: Sequence[Tensor]
    cuts: tuple[int, ...] = ()
    block: int = 8
    reads: int = 0
    skipped: int = 0
    device = torch.device("cpu")

    @property
    def entries(self) -> int:
        return self.base.numel()

    def part(self, first: int, last: int) -> Part:
        flat = [tensor.reshape(-1, 1)[first:last] for tensor in (self.base, *self.models)]
        return Part(first, flat[0], flat[1:])

    def planned(self) -> Iterator[Part]:
        self.reads += 1
        yield from self.further()

    def skip(self) -> None:
        self.skipped += 1

    def further(self) -> Iterator[Part]:
        places = [0, *sorted({cut for cut in self.cuts if 0 < cut < self.entries}), self.entries]
        for first, last in itertools.pairwise(places):
            yield self.part(first, last)

    def spots(self) -> Iterator[Part]:
        length = min(self.block, self.entries)
        for n in range(4):
            yield self.only(n * (self.entries - length) // 3, length)

    def only(self, first_entry: int, entries: int) -> Part:
        return self.part(first_entry, first_entry + entries)

    def nonfinite(self) -> None:
        raise AssertionError("the inputs are finite")


@contextmanager
def room_for(entries: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topsets, "ROOM", entries)
        yield


def mask_of(drop: Drop, magnitudes: oracle.Floats) -> oracle.Bools:
    """What a Drop without randomness keeps, entry by entry."""
    flat, index = magnitudes.reshape(-1), np.arange(magnitudes.size)
    small = (flat < drop.least) | ((flat == drop.least) & (index >= drop.least_before))
    large = (flat > drop.most) | ((flat == drop.most) & (index < drop.most_before))
    return (~small & ~large).reshape(magnitudes.shape)


SHAPES = {
    "model.embed_tokens.weight": (40, 24),
    "model.layers.0.input_layernorm.weight": (24,),
    "model.layers.0.mlp.up_proj.weight": (70, 24),
    "model.layers.1.mlp.experts.gate_up_proj": (3, 20, 24),
    "model.logit_scale": (),
}


def checkpoints(count: int, seed: int, *dtypes: torch.dtype) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A base and models, of which every second has many zero deltas."""
    random = torch.Generator().manual_seed(seed)
    base = {name: (torch.randn(shape, generator=random) * 0.02).to(dtypes[0]) for name, shape in SHAPES.items()}
    models: list[dict[str, Tensor]] = []
    for n in range(count):
        model = {}
        for name, start in base.items():
            delta = torch.randn(start.shape, generator=random) * (3e-3, 1e-3)[n % 2]
            if n % 2:
                delta = delta * (torch.rand(start.shape, generator=random) < 0.4)
            model[name] = (start.float() + delta).to(dtypes[(n + 1) % len(dtypes)])
        models.append(model)
    return base, models
