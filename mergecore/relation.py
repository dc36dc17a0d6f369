"""Whether the models of a merge are related at all: weights that were trained apart have a cosine near 0.

A few kilobytes of a few large matrices are read, before anything is merged. Not for measuring how far a model moved.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from mergecore.confined import open_input
from mergecore.inputs import Input
from mergecore.jobs import TensorJob
from mergecore.planning import MergePlan
from mergecore.sources import Source

MATRICES, SEGMENTS, ENTRIES = 8, 2, 2048
"""How many matrices are sampled, at how many places, how many entries at each."""
READ_BYTES = 4 << 20
"""Read at most, of all models together."""
RELATED = 0.05
"""The least median cosine of related models."""
LEAST_ENTRIES = 10_000
"""Of a pair, to judge it: the cosine of so many unrelated entries has a standard deviation of 0.01."""


@dataclass
class _Pair:
    """What the samples of two models say."""

    cosines: list[float] = field(default_factory=list)
    entries: int = 0

    @property
    def is_unrelated(self) -> bool:
        return self.entries >= LEAST_ENTRIES and median(self.cosines) < RELATED


def unrelated(plan: MergePlan) -> list[str]:
    """A warning for every model that is no closer to its base (without one: to the first model) than chance.

    Only linear layers are compared: embeddings, norms and biases of strangers can be alike. Models that are too small
    to tell, and matrices of zeros or with NaN, say nothing; nor do files that cannot be read, which the merge tells.
    """
    models = (member.model for section in plan.sections for member in section.everyone())
    owners = {id(source): model for model in models for source in model.tensors.values()}
    pairs: dict[tuple[Input, Input], _Pair] = {}
    with _Samples() as samples:
        for job in _sampled(plan.jobs):
            known = [source for source in (job.base, *job.models) if source is not None and id(source) in owners]
            for source in known[1:]:
                anchor, model = owners[id(known[0])], owners[id(source)]
                a, b = samples.of(known[0]), samples.of(source)
                if anchor is not model and a is not None and b is not None:
                    pair = pairs.setdefault((anchor, model), _Pair())
                    pair.cosines.append(float(a @ b))
                    pair.entries += a.numel()
    return [
        f"{model.path} is no closer to {anchor.path} than chance: the median cosine of {len(pair.cosines)} matrices is "
        f"{median(pair.cosines):.3f} (a fine-tune has nearly 1); models that were not trained from one start do not "
        "merge into anything useful: check the base and the models"
        for (anchor, model), pair in pairs.items()
        if pair.is_unrelated
    ]


def _sampled(jobs: Sequence[TensorJob]) -> list[TensorJob]:
    """Some of the large matrices, from the whole depth of the model."""
    linear = [job for job in jobs if job.is_linear and job.parameters is not None]
    largest = max((prod(job.shape) for job in linear), default=0)
    large = [job for job in linear if 4 * prod(job.shape) >= largest]
    count = min(MATRICES, len(large))
    return [large[(2 * i + 1) * len(large) // (2 * count)] for i in range(count)]


class _Samples:
    """Unit vectors of some entries of sources, read until `READ_BYTES` are spent."""

    def __init__(self) -> None:
        self._files = ExitStack()
        self._open: dict[Path, int] = {}
        self._known: dict[int, Tensor | None] = {}
        self._left = READ_BYTES

    def __enter__(self) -> _Samples:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def of(self, source: Source) -> Tensor | None:
        """float64, of the same entries for every source of a shape; None without direction, or if it is not read."""
        if id(source) not in self._known:
            self._known[id(source)] = None
            with suppress(OSError):
                self._known[id(source)] = self._read(source)
        return self._known[id(source)]

    def _read(self, source: Source) -> Tensor | None:
        entries = prod(source.shape)
        size = min(ENTRIES, entries // SEGMENTS)
        firsts = [i * entries // SEGMENTS for i in range(SEGMENTS)]
        needed = [source.pieces(first, size) for first in firsts]
        cost = sum(nbytes for pieces in needed for _, _, nbytes in pieces)
        if cost > self._left:
            return None
        self._left -= cost
        parts = []
        for first, pieces in zip(firsts, needed, strict=True):
            views = [memoryview(bytearray(os.pread(self._fd(path), nbytes, at))) for path, at, nbytes in pieces]
            if [len(view) for view in views] != [nbytes for _, _, nbytes in pieces]:
                return None
            parts.append(source.window(first, size, iter(views)).to(torch.float64))
        vector = torch.cat(parts)
        length = float(vector.norm())
        return vector / length if 0 < length < torch.inf else None

    def _fd(self, path: Path) -> int:
        if path not in self._open:
            self._open[path] = open_input(path)
            self._files.callback(os.close, self._open[path])
        return self._open[path]
