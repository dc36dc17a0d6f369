"""Windows read ahead, and a tensor as its statistics read it: planned reads in the order of the loop, others apart.

The order is loop.py's; what statistics do with the windows is in statistics.py, selecting.py and topsets.py.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mergecore._stream import WindowStream
from mergecore.confined import open_input
from mergecore.errors import InputFault, Interrupted
from mergecore.jobs import TensorJob
from mergecore.sources import DTYPES, Source
from mergecore.topsets import Part

if TYPE_CHECKING:
    from mergecore.loop import Loop

READ_AHEAD = 1  # windows
ASKED_AHEAD = 64 << 20  # bytes that the disk is asked for, at least: it goes on while a tensor is read again
MOST_AHEAD = 512  # windows
WHOLE_ENTRIES = 1 << 22  # read at once of what is held whole
SPOTS, SPOT = 16, 1024  # of a sample, and entries of each


class Window(NamedTuple):
    """One step of the loop: rows of one matrix of a tensor."""

    job: TensorJob
    matrix: int
    first_row: int
    rows: int
    is_last: bool = False
    """Whether nothing reads it again."""
    stays: bool = False
    """Whether it stays on the device for the reads after this one."""
    is_there: bool = False
    """Whether it stayed there."""
    again: bool = False
    """Whether the tensor was read just before."""

    @property
    def entries(self) -> tuple[int, int]:
        """The first entry in the tensor, and how many."""
        return (self.matrix * self.job.rows + self.first_row) * self.job.columns, self.rows * self.job.columns


def windows_of(
    job: TensorJob,
    matrices: Iterable[int],
    *,
    is_last: bool = False,
    stays: bool = False,
    is_there: bool = False,
    again: bool = False,
) -> Iterator[Window]:
    """One read of these matrices."""
    for matrix in matrices:
        for first_row, rows in job.windows():
            yield Window(job, matrix, first_row, rows, is_last, stays, is_there, again)


class Windows:
    """Windows of an order with their bytes, which are submitted just far enough ahead. Raises InputFault where a file
    is gone or too short, Interrupted between two windows."""

    def __init__(
        self,
        order: Iterator[Window],
        stream: WindowStream,
        pieces: Callable[[Window], list[tuple[int, int, int]]],
        should_stop: Callable[[], bool] | None,
    ) -> None:
        self._order, self._stream, self._pieces, self._should_stop = order, stream, pieces, should_stop
        self._ahead: deque[tuple[Window, int]] = deque()  # with the bytes that each brings from the disk
        self._to_read = self._asked = 0

    def __next__(self) -> tuple[Window, list[memoryview]]:
        window = self._following()
        return window, [] if window.is_there else self._stream.next()

    def skip(self) -> Window:
        """Passes over the next window: if nothing began to read it, nothing will."""
        window = self._following()
        if not window.is_there:
            self._stream.skip()
        return window

    def _following(self) -> Window:
        self._submit()
        if not self._ahead:
            raise StopIteration
        if self._should_stop is not None and self._should_stop():
            raise Interrupted("stopped on request; the finished tensors are kept, --resume continues")
        window, fresh = self._ahead.popleft()
        self._to_read -= not window.is_there
        self._asked -= fresh
        return window

    def _submit(self) -> None:
        if self._to_read > READ_AHEAD + 1 and len(self._ahead) > MOST_AHEAD // 2:
            return  # of small windows many are submitted at once: each time wakes a thread
        while self._to_read <= READ_AHEAD + 1 or (self._asked < ASKED_AHEAD and len(self._ahead) < MOST_AHEAD):
            window = next(self._order, None)
            if window is None:
                return
            fresh = 0
            if not window.is_there:
                mapped = self._pieces(window)
                fresh = 0 if window.again else sum(nbytes for _, _, nbytes in mapped)
                try:
                    self._stream.submit(mapped, keep=window.job.keep and not (window.is_last or window.stays))
                except (OSError, ValueError) as error:  # gone, or shorter than its header said
                    raise InputFault(f"{window.job.name} cannot be read: {error}") from error
            self._ahead.append((window, fresh))
            self._to_read += not window.is_there
            self._asked += fresh


class TensorReads:
    """A job's tensor as its statistics read it: planned reads from its loop's windows, others from a stream apart."""

    def __init__(self, loop: Loop, job: TensorJob, windows: Windows) -> None:
        self.loop, self.job, self.windows = loop, job, windows
        self.entries = job.matrices * job.rows * job.columns
        self.block = job.block_rows * job.columns
        self.device = loop.placement.of(job).torch_device

    def nonfinite(self) -> None:
        self.loop.merge.nonfinite(self.job)

    def planned(self) -> Iterator[Part]:
        for matrix in range(self.job.matrices):
            yield from self.matrix(matrix)

    def matrix(self, number: int) -> Iterator[Part]:
        for _ in self.job.windows():
            window, views = next(self.windows)
            yield self._part(window, views)
            self.loop.count(self.loop.nbytes(window), 0)

    def matrix_again(self, number: int) -> Iterator[Part]:
        yield from self._again((number,))

    def skip(self) -> None:
        for _ in range(self.job.matrices):
            for _ in self.job.windows():
                self.loop.count(0, 0, passed=self.loop.nbytes(self.windows.skip()))

    def further(self) -> Iterator[Part]:
        yield from self._again(range(self.job.matrices))

    def _again(self, matrices: Iterable[int]) -> Iterator[Part]:
        with self.loop.stream(0) as stream:
            yield from self._apart(windows_of(self.job, matrices), stream, counted=True)

    def only(self, first_entry: int, entries: int) -> Part:
        matrix, row = divmod(first_entry // self.job.columns, max(1, self.job.rows))
        return next(self._apart([Window(self.job, matrix, row, entries // self.job.columns)], self.loop.aside))

    def spots(self) -> Iterator[Part]:
        yield from self._apart(self._spots(), self.loop.aside)

    def _spots(self) -> Iterator[Window]:
        job, rows = self.job, max(1, SPOT // max(1, self.job.columns))
        if job.rows < rows:
            return
        for n in range(SPOTS):
            matrix, row = divmod(n * (job.matrices * job.rows - 1) // (SPOTS - 1), job.rows)
            yield Window(job, matrix, min(row, job.rows - rows), rows)

    def _apart(self, windows: Iterable[Window], stream: WindowStream, *, counted: bool = False) -> Iterator[Part]:
        """Windows beside the planned ones. A few entries are not `counted` as read: how many depends on the windows."""
        for window in windows:
            there = self.loop.resident.get((window.matrix, window.first_row))
            if there is not None and there.models[0].shape[0] == window.rows:
                yield there
                continue
            stream.submit(self.loop.pieces(window), keep=False)
            views = stream.next()
            yield self._part(window, views)
            stream.check()
            if counted:
                self.loop.count(sum(map(len, views)), 0)

    def _part(self, window: Window, views: list[memoryview]) -> Part:
        return self.loop._upload(window, views)

    def input_grams(self) -> tuple[Tensor, ...]:
        if not self.job.input_grams:
            return ()
        with self.loop.stream(0) as stream:
            grams = tuple(self._whole(source, stream) for source in self.job.input_grams)
        if not all(bool(gram.isfinite().all()) for gram in grams):
            self.nonfinite()
        return grams

    def _whole(self, source: Source, stream: WindowStream) -> Tensor:
        """A source apart from the windows, on the device."""
        size = math.prod(source.shape)
        whole = torch.empty(size, dtype=DTYPES[source.dtype], device=self.device)
        for first in range(0, size, WHOLE_ENTRIES):
            count = min(WHOLE_ENTRIES, size - first)
            stream.submit(self.loop.mapped(source, first, count), keep=False)
            views = stream.next()
            whole[first : first + count] = source.window(first, count, iter(views)).to(self.device)
            stream.check()
            self.loop.count(sum(map(len, views)), 0)
        return whole.view(source.shape)


def open_stream(files: Iterable[Path], mode: str, depth: int, threads: int) -> WindowStream:
    """Windows of these files, by their numbers."""
    return WindowStream([str(path) for path in files], mode, depth, threads=threads, opener=open_input)


def count_nonfinite(source: Source) -> int:
    """NaN and Inf entries of an input: a second look, only when something is wrong."""
    count, step, entries = 0, 4 << 20, math.prod(source.shape)
    for first in range(0, entries, step):
        views = []
        for file, offset, nbytes in source.pieces(first, min(step, entries - first)):
            with os.fdopen(open_input(file), "rb") as opened:
                opened.seek(offset)
                views.append(memoryview(bytearray(opened.read(nbytes))))
        count += int((~torch.isfinite(source.window(first, min(step, entries - first), iter(views)))).sum())
    return count
