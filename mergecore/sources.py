"""What an output tensor is computed from: a stored tensor, or one derived from several while it streams.

A source names the bytes that a window of it needs and makes the window of them once they are mapped; it
reads no file itself. Derived sources compute in float64, every entry in the same way however the tensor is
cut into windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, product
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mergecore.checkpoint import TensorInfo

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
"""Stored dtypes, as safetensors names them, that windows can show."""
FLOATS = {"F64", "F32", "F16", "BF16"}
"""Those that can be computed with as they are."""

Piece = tuple[Path, int, int]
"""(file, offset in it, bytes)."""


class Source(Protocol):
    """A tensor that can be read in windows of its flattened entries."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str:
        """What windows hold, as safetensors names it."""

    @property
    def nbytes(self) -> int:
        """Bytes read from disk for the whole tensor, read in one window."""

    def pieces(self, first: int, count: int) -> list[Piece]:
        """What to map for entries [first, first + count) of the flattened tensor; no piece is empty."""

    def window(self, first: int, count: int, views: Iterator[memoryview]) -> Tensor:
        """Those entries as a flat tensor of `dtype`, from the bytes of `pieces(first, count)`, the next of `views`.

        It may lie in the memory of the views: valid, and read-only, as long as they are.
        """


def files_of(source: Source) -> list[Path]:
    """The files that a source is read from."""
    return list(dict.fromkeys(file for file, _, _ in source.pieces(0, prod(source.shape))))


def same(one: object, other: object) -> bool:
    """Whether two sources, or parts of them, are made of the same bytes in the same way."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)  # type: ignore[arg-type]
    if isinstance(one, tuple):
        assert isinstance(other, tuple)
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Stored | _Derived):
        mine, its = vars(one), vars(other)
        return mine.keys() == its.keys() and all(same(value, its[key]) for key, value in mine.items())
    return one == other


class Stored:
    """A tensor as it lies in a file; windows lie in the mapped memory, nothing is copied."""

    def __init__(self, info: TensorInfo) -> None:
        self.info = info
        self.shape, self.dtype, self.nbytes = info.shape, info.dtype, info.nbytes

    def pieces(self, first: int, count: int) -> list[Piece]:
        size = DTYPES[self.dtype].itemsize
        return [(self.info.file, self.info.offset + first * size, count * size)] if count else []

    def window(self, first: int, count: int, views: Iterator[memoryview]) -> Tensor:
        dtype = DTYPES[self.dtype]
        return torch.frombuffer(next(views), dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)


Read = tuple[Source, int, int]
"""Entries [first, first + count) of a source: (source, first, count)."""


class _Derived:
    """A source whose windows are made of windows of other sources."""

    shape: tuple[int, ...]
    dtype = "F64"

    def _reads(self, first: int, count: int) -> list[Read]:
        """What a window needs of the other sources."""
        raise NotImplementedError

    def _make(self, first: int, count: int, parts: list[Tensor]) -> Tensor:
        """The window from the windows of `_reads`, in their order."""
        raise NotImplementedError

    def pieces(self, first: int, count: int) -> list[Piece]:
        reads = self._reads(first, count)
        return [piece for source, start, size in reads for piece in source.pieces(start, size)]

    def window(self, first: int, count: int, views: Iterator[memoryview]) -> Tensor:
        parts = [source.window(start, size, views) for source, start, size in self._reads(first, count)]
        return self._make(first, count, parts)


class _Rows:
    """The rows that a window touches: whole ones around entries [first, first + count)."""

    def __init__(self, columns: int, first: int, count: int) -> None:
        self.first = first // columns
        self.count = -(-(first + count) // columns) - self.first
        self.columns = columns
        self.entries = slice(first - self.first * columns, first - self.first * columns + count)

    def around(self, window: Tensor) -> Tensor:
        """The window as float64 (count, columns), with zeros in the parts of its rows that it does not hold."""
        whole = torch.zeros(self.count * self.columns, dtype=torch.float64)
        whole[self.entries] = window.to(torch.float64)
        return whole.view(self.count, self.columns)


class Scaled(_Derived):
    """A narrow float tensor times its scales: entry * scale, in float64.

    `scale` (..., scale rows, scale columns) has the weight's leading dimensions; each scale belongs to a block of
    `block` = (rows, columns) of the weight (..., rows, columns), the last blocks of a matrix may be cut short.
    """

    def __init__(self, weight: Source, scale: Source | None = None, block: tuple[int, int] = (1, 1)) -> None:
        self.weight, self.scale, self.shape, self.block = weight, scale, weight.shape, block
        self.nbytes = weight.nbytes + (scale.nbytes if scale is not None else 0)
        if scale is not None:
            self.rows, self.columns = self.shape[-2:]
            self.scale_rows = -(-self.rows // block[0])
            self.scale_columns = -(-self.columns // block[1])
            expected = prod(self.shape[:-2]) * self.scale_rows * self.scale_columns
            if prod(scale.shape) != expected:
                raise ValueError(f"{list(scale.shape)} scales for {list(self.shape)} in blocks of {list(block)}")

    def _scale_rows_of(self, first: int, count: int) -> np.ndarray:
        """For every row that the window touches, the row of scales that belongs to it."""
        rows = _Rows(self.columns, first, count)
        row = np.arange(rows.first, rows.first + rows.count)
        return row // self.rows * self.scale_rows + row % self.rows // self.block[0]

    def _reads(self, first: int, count: int) -> list[Read]:
        if self.scale is None or count == 0:
            return [(self.weight, first, count)]
        used = self._scale_rows_of(first, count)
        start, end = int(used[0]), int(used[-1]) + 1
        width = self.scale_columns
        return [(self.weight, first, count), (self.scale, start * width, (end - start) * width)]

    def _make(self, first: int, count: int, parts: list[Tensor]) -> Tensor:
        if len(parts) == 1:
            return parts[0].to(torch.float64)
        rows = _Rows(self.columns, first, count)
        used = self._scale_rows_of(first, count)
        scales = parts[1].to(torch.float64).view(-1, self.scale_columns)[torch.from_numpy(used - used[0])]
        scaled = rows.around(parts[0]).mul_(scales.repeat_interleave(self.block[1], 1)[:, : self.columns])
        return scaled.view(-1)[rows.entries]


class Adapted(_Derived):
    """A weight with a low-rank update: W + scaling * B A, or W + scaling * (B A)^T if `transposed`; float64.

    `a` is (rank, in), `b` is (out, rank); W is (out, in), or (in, out) if `transposed` (Conv1D, embeddings).
    (Hu et al., "LoRA", 2021, equation 3; scaling is their alpha / r.)
    """

    def __init__(self, weight: Source, a: Source, b: Source, scaling: float, *, transposed: bool = False) -> None:
        self.weight, self.a, self.b, self.scaling, self.transposed = weight, a, b, scaling, transposed
        self.shape, self.rank = weight.shape, a.shape[0]
        self.nbytes = weight.nbytes + a.nbytes + b.nbytes
        expected = (b.shape[0], a.shape[1])
        if b.shape[1] != self.rank or self.shape != (expected[::-1] if transposed else expected):
            raise ValueError(f"A {list(a.shape)} and B {list(b.shape)} for a weight {list(self.shape)}")

    def _reads(self, first: int, count: int) -> list[Read]:
        if count == 0:
            return []
        rows = _Rows(self.shape[1], first, count)
        if self.transposed:  # row i of (B A)^T needs column i of A
            left = [(self.a, k * self.shape[0] + rows.first, rows.count) for k in range(self.rank)]
            return [(self.weight, first, count), (self.b, 0, prod(self.b.shape)), *left]
        left = [(self.b, rows.first * self.rank, rows.count * self.rank)]
        return [(self.weight, first, count), (self.a, 0, prod(self.a.shape)), *left]

    def _make(self, first: int, count: int, parts: list[Tensor]) -> Tensor:
        if count == 0:
            return torch.empty(0, dtype=torch.float64)
        rows = _Rows(self.shape[1], first, count)
        right = parts[1].to(torch.float64)
        if self.transposed:
            left, right = torch.stack([part.to(torch.float64) for part in parts[2:]]), right.view(-1, self.rank).T
        else:
            left, right = parts[2].to(torch.float64).view(-1, self.rank).T, right.view(self.rank, -1)
        # A matrix product of a library adds in an order that depends on the sizes, and so on the window. Of parts of so
        # few bits every sum over the rank is exact, whatever the order (Ozaki et al., "Error-free transformations of
        # matrix multiplication", 2012).
        bits = (53 - (self.rank - 1).bit_length()) // 2
        rights = _parts(right, bits)
        result = parts[0].to(torch.float64, copy=True)
        step = max(1, _BLOCK // rows.columns)
        for row in range(0, rows.count, step):
            lefts = _parts(left[:, row : row + step], bits)
            update = torch.zeros(min(step, rows.count - row), rows.columns, dtype=torch.float64)
            for one, other in product(lefts, rights):
                update += one.T @ other
            update = update.mul_(self.scaling).view(-1)
            begin = row * rows.columns - rows.entries.start  # where in the window the block begins
            skipped = max(0, -begin)
            target = result[begin + skipped : begin + update.numel()]
            target += update[skipped : skipped + target.numel()]
        return result


_BLOCK = 1 << 20
"""Entries of a low-rank update that are computed at once."""


def _parts(factor: Tensor, bits: int) -> list[Tensor]:
    """Parts that sum to `factor` exactly: in each, a column's entries are multiples, of at most `bits` bits, of one
    power of two. Infinite and NaN entries are left as they are."""
    rest = factor.numpy()
    if not np.isfinite(rest).all():
        return [factor]
    parts = []
    while rest.any():
        unit = np.frexp(np.abs(rest).max(axis=0))[1] - bits
        part = np.ldexp(np.rint(np.ldexp(rest, -unit)), unit)
        rest = rest - part
        parts.append(torch.from_numpy(part))
    return parts


class RowMap(_Derived):
    """Rows of other sources in a new order: `shape` (rows, ...), a vector's rows are its entries.

    `table` (rows, 2), int64, says for every row (which of `sources`, which row of it); (-1, 0) stands for zeros.
    `means` has the rows that are instead the mean of several: row -> ((source, row), ...).
    Windows keep the sources' dtype if they share one and nothing is averaged, else they are F64.
    ValueError for a table that names rows which the sources do not have.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        sources: tuple[Source, ...],
        table: np.ndarray,
        means: Mapping[int, Sequence[tuple[int, int]]] | None = None,
    ) -> None:
        self.shape, self.sources, self.table, self.means = shape, sources, table.copy(), dict(means or {})
        self.width = prod(shape[1:])
        if self.table.shape != (shape[0], 2) or not all(0 <= row < shape[0] for row in self.means):
            raise ValueError(
                f"{list(self.table.shape)} entries and means of {len(self.means)} rows for {shape[0]} rows"
            )
        self.table[list(self.means)] = _ZEROS, 0
        averaged = [pair for pairs in self.means.values() for pair in pairs]
        copied = self.table[self.table[:, 0] != _ZEROS]
        used = np.concatenate([copied, np.array(averaged, np.int64).reshape(-1, 2)])
        if any(source.shape[1:] != shape[1:] for source in sources):
            raise ValueError(f"rows of {[list(source.shape) for source in sources]} for a tensor {list(shape)}")
        lengths = np.array([source.shape[0] for source in sources], np.int64)
        known = (used[:, 0] >= 0) & (used[:, 0] < len(sources))
        if not known.all() or (used[:, 1] < 0).any() or (used[:, 1] >= lengths[used[:, 0]]).any():
            raise ValueError("the table names a source or a row that there is not")
        if any(not pairs for pairs in self.means.values()):
            raise ValueError("a mean of no rows")
        self.table[list(self.means), 0] = _MEAN
        dtypes = {source.dtype for source in sources}
        self.dtype = dtypes.pop() if len(dtypes) == 1 and not self.means else "F64"
        rows_used = np.bincount(used[:, 0], minlength=len(sources))
        self.nbytes = sum(
            source.nbytes * int(rows) // source.shape[0]
            for source, rows in zip(sources, rows_used, strict=True)
            if rows
        )

    def _runs(self, first: int, count: int) -> Iterable[tuple[int, int, int]]:
        """(first entry, entries, row of the table) of the parts of a window whose rows lie one after the other."""
        if count == 0:
            return
        rows = _Rows(self.width, first, count)
        source, row = self.table[rows.first : rows.first + rows.count].T
        joined = (source[1:] == source[:-1]) & ((row[1:] == row[:-1] + 1) | (source[1:] == _ZEROS))
        joined &= source[1:] != _MEAN
        starts = rows.first + np.concatenate([[0], np.flatnonzero(~joined) + 1])
        ends = np.concatenate([starts[1:], [rows.first + rows.count]])
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            begin = max(start * self.width, first)
            yield begin, min(end * self.width, first + count) - begin, start

    def _run_reads(self, first: int, count: int, start: int) -> list[Read]:
        source, row = self.table[start].tolist()
        if source == _ZEROS:
            return []
        offset = first - start * self.width
        origins = self.means[start] if source == _MEAN else [(source, row)]
        return [(self.sources[source], row * self.width + offset, count) for source, row in origins]

    def _reads(self, first: int, count: int) -> list[Read]:
        return [read for run in self._runs(first, count) for read in self._run_reads(*run)]

    def _make(self, first: int, count: int, parts: list[Tensor]) -> Tensor:
        dtype = DTYPES[self.dtype]
        if len(parts) == 1 and parts[0].numel() == count and parts[0].dtype == dtype:
            return parts[0]
        result = torch.zeros(count, dtype=dtype)
        rest = iter(parts)
        for begin, size, start in self._runs(first, count):
            target = result[begin - first : begin - first + size]
            origins = list(islice(rest, len(self._run_reads(begin, size, start))))
            if origins:
                target.copy_(origins[0])
            for part in origins[1:]:
                target += part
            if len(origins) > 1:
                target /= len(origins)
        return result


class Filled(_Derived):
    """All rows of another source, then rows up to `rows` that are the mean of all of those; float64.

    (Hewitt, "Initializing new word embeddings for pretrained language models", 2021.) A window that reaches the new
    rows reads the whole source.
    """

    _STEP = 1 << 20  # entries

    def __init__(self, source: Source, rows: int) -> None:
        self.source, self.shape = source, (rows, *source.shape[1:])
        self.entries, self.width = prod(source.shape), prod(source.shape[1:])
        self.nbytes = source.nbytes + (source.nbytes if rows > source.shape[0] else 0)
        if rows < source.shape[0] or not self.entries:
            raise ValueError(f"{rows} rows cannot begin with the rows of {list(source.shape)}")

    def _reads(self, first: int, count: int) -> list[Read]:
        within = max(0, min(self.entries - first, count))
        reads: list[Read] = [(self.source, first, within)] if within else []
        if within < count:
            step = -(-self._STEP // self.width) * self.width
            reads += [(self.source, at, min(step, self.entries - at)) for at in range(0, self.entries, step)]
        return reads

    def _make(self, first: int, count: int, parts: list[Tensor]) -> Tensor:
        result = torch.empty(count, dtype=torch.float64)
        within = max(0, min(self.entries - first, count))
        if within:
            result[:within] = parts.pop(0)
        if within < count:
            total = torch.zeros(self.width, dtype=torch.float64)
            for part in parts:
                total += part.to(torch.float64).view(-1, self.width).sum(dim=0)
            at = torch.arange(first + within, first + count) % self.width
            result[within:] = (total / self.source.shape[0])[at]
        return result


def scratch_bytes(source: Source) -> int:
    """Bytes that a source needs beside its windows, whatever their size."""
    if isinstance(source, Adapted):
        return scratch_bytes(source.weight) + 8 * (3 * _BLOCK + 6 * source.rank * max(source.shape))
    if isinstance(source, RowMap):
        return max(map(scratch_bytes, source.sources))
    if isinstance(source, Filled):
        return scratch_bytes(source.source) + 8 * source.width + 8 * Filled._STEP
    return 0


def stored_dtype(source: Source) -> str | None:
    """The dtype that a tensor had before what is done to it while it streams; None where that was too narrow."""
    if isinstance(source, Adapted):
        return stored_dtype(source.weight)
    if isinstance(source, RowMap):
        return stored_dtype(source.sources[0])
    if isinstance(source, Filled):
        return stored_dtype(source.source)
    return None if isinstance(source, Scaled) else source.dtype


_ZEROS, _MEAN = -1, -2
"""Marks in the first column of a row map's table."""
