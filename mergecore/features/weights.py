"""The tensors of one model of a merge, read whole or in part from its mapped files; and sums of several models'.

In the output's names and vocabulary, with adapters and float8 scales applied: what the merge itself reads. Not for
which module takes a tensor (skeleton.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from mergecore._stream import ReadFault, WindowStream
from mergecore.confined import open_input
from mergecore.errors import InputFault
from mergecore.planning import MergePlan
from mergecore.sources import DTYPES, Source, files_of


class Weights(Protocol):
    """Named tensors in one dtype on one device; rows are those of the tensor's first dimension."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """(count, ...): rows first to first + count."""


def whole(weights: Weights, name: str) -> Tensor:
    """A whole tensor."""
    shape = weights.shapes[name]
    return weights.rows(name, 0, shape[0]) if shape else weights.rows(name, 0, 1).reshape(())


def some_rows(weights: Weights, name: str, numbers: Tensor) -> Tensor:
    """(m, ...): the rows of these numbers, int64 (m,), ascending."""
    wanted = numbers.tolist()
    runs = [i for i in range(len(wanted)) if i == 0 or wanted[i] != wanted[i - 1] + 1]
    ends = [*runs[1:], len(wanted)]
    return torch.cat([weights.rows(name, wanted[i], end - i) for i, end in zip(runs, ends, strict=True)])


class Reader:
    """Reads windows of sources from files that are opened once. InputFault for a file that cannot be read."""

    def __init__(self, sources: Sequence[Source], mode: str) -> None:
        self._numbers = {file: n for n, file in enumerate(dict.fromkeys(f for s in sources for f in files_of(s)))}
        self._open = ExitStack()
        self._stream = self._open.enter_context(
            WindowStream([str(file) for file in self._numbers], mode, 0, opener=open_input)
        )
        self.bytes_read = 0

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def window(self, source: Source, first: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Entries [first, first + count) of a source, converted; a copy."""
        pieces = [(self._numbers[file], at, nbytes) for file, at, nbytes in source.pieces(first, count)]
        try:
            self._stream.submit(pieces)
            views = self._stream.next()
            window = source.window(first, count, iter(views)).to(device=device, dtype=dtype, copy=True)
            self._stream.check()
        except (ReadFault, OSError, ValueError) as error:
            raise InputFault(f"a tensor cannot be read: {error}") from error
        self.bytes_read += sum(map(len, views))
        return window


@dataclass(frozen=True)
class Stored:
    """One model's tensors; None stands for zeros (a bias that it lacks)."""

    reader: Reader
    sources: Mapping[str, Source | None]
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    device: torch.device

    def rows(self, name: str, first: int, count: int) -> Tensor:
        return self._rows(name, first, count, self.dtype)

    def as_stored(self, name: str, first: int, count: int) -> Tensor:
        """Rows in the dtype that they are read in."""
        source = self.sources[name]
        return self._rows(name, first, count, torch.bfloat16 if source is None else DTYPES[source.dtype])

    def _rows(self, name: str, first: int, count: int, dtype: torch.dtype) -> Tensor:
        shape, source = self.shapes[name], self.sources[name]
        if source is None:
            return torch.zeros(count, *shape[1:], dtype=dtype, device=self.device)
        width = prod(shape[1:])
        window = self.reader.window(source, first * width, count * width, dtype, self.device)
        return window.view(count, *shape[1:])


@dataclass(frozen=True)
class Combined:
    """base + sum_n c_n (model_n - base), with a number per model that may differ from tensor to tensor."""

    base: Weights
    models: Sequence[Weights]
    coefficients: Callable[[str], Sequence[float]]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.base.shapes

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        return self.base.device

    def rows(self, name: str, first: int, count: int) -> Tensor:
        base = self.base.rows(name, first, count)
        result = base.to(torch.float64, copy=True)
        for coefficient, model in zip(self.coefficients(name), self.models, strict=True):
            if coefficient:
                result += coefficient * (model.rows(name, first, count).double() - base.double())
        return result.to(self.dtype)


def members(
    plan: MergePlan, reader: Reader, dtype: torch.dtype, device: torch.device
) -> tuple[Stored | None, list[Stored]]:
    """The base of a plan (None: it reads none) and its models, as far as all of them have a tensor."""
    count = len(plan.sections[0].members)
    jobs = [job for job in plan.jobs if job.merges and len(job.models) == count]
    shapes = {job.name: job.shape for job in jobs}
    models = [Stored(reader, {job.name: job.models[n] for job in jobs}, shapes, dtype, device) for n in range(count)]
    has_base = bool(jobs) and all(job.has_base for job in jobs)
    base = Stored(reader, {job.name: job.base for job in jobs}, shapes, dtype, device) if has_base else None
    return base, models


def sources_of(plan: MergePlan) -> list[Source]:
    """Everything that `members` may read."""
    return [source for job in plan.jobs for source in job.sources]
