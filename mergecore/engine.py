"""The one loop: windows -> statistics -> coefficients -> blend -> writer, tensor after tensor.

Knows nothing of what a method computes, and holds no tensor: windows come from a stream in the order
that the plan fixes, results go to planned offsets.
"""

from __future__ import annotations

import logging
import math
import os
import re
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergecore import ops, statistics, survey
from mergecore._stream import ReadFault, WindowStream
from mergecore.confined import open_input
from mergecore.device import Device, HostWindow, is_out_of_memory
from mergecore.errors import InputFault, Interrupted, MergecoreError, NonFiniteError
from mergecore.jobs import TensorJob
from mergecore.methods.base import Coefficients, Dense, Election, Rowwise, TensorView
from mergecore.output import manifest
from mergecore.output.writer import OutputWriter
from mergecore.placement import Placement
from mergecore.planning import MergePlan
from mergecore.progress import MergeResult, Progress
from mergecore.selecting import Part, compared, row_odds, row_pieces, thinned
from mergecore.sources import DTYPES, Source, files_of
from mergecore.survey import Found

log = logging.getLogger(__name__)

READ_AHEAD = 1  # windows
WHOLE_ENTRIES = 1 << 22  # read at once of what is held whole


@dataclass(frozen=True)
class _Window:
    """One step of the loop: rows of one matrix of a job, in the statistics pass or the blend pass."""

    job: TensorJob
    matrix: int
    first_row: int
    rows: int
    blends: bool
    stays: bool = False  # on the device, for the passes after this one
    is_there: bool = False  # from an earlier pass

    @property
    def entries(self) -> tuple[int, int]:
        """The first entry in the tensor, and how many."""
        return (self.matrix * self.job.rows + self.first_row) * self.job.columns, self.rows * self.job.columns


_Windows = Iterator[tuple[_Window, list[memoryview]]]
_Place = tuple[int, int]  # matrix, first row


@dataclass(frozen=True)
class Fit:
    """What was fitted on samples before the merge: coefficients of every merged tensor by its name, and what there is
    to tell of it (JSON values)."""

    coefficients: Mapping[str, Coefficients]
    report: Mapping[str, Any]
    step: str = ""
    steps: int = 0


class Merge:
    """One running merge: `run` takes it from the plan to the published output."""

    def __init__(
        self,
        planned: MergePlan,
        out: Path,
        writer: OutputWriter,
        device: Device,
        progress: Callable[[Progress], None] | None,
        should_stop: Callable[[], bool] | None,
        fit: Fit | None = None,
    ) -> None:
        self.plan, self.out, self.writer = planned, out, writer
        self.placement = Placement(device)
        self.fit = fit
        self.fitted = fit.coefficients if fit is not None else {}
        self.report, self.should_stop = progress, should_stop
        self.warnings = list(planned.warnings)
        self.jobs = [job for job in planned.jobs if job.name not in writer.finished]
        skipped = [job for job in planned.jobs if job.name in writer.finished]
        self.done = len(skipped)
        self.read = 0
        open_scopes = any(job.scope == "model" for job in self.jobs)
        self.surveyed = [job for job in planned.jobs if job.scope == "model" and open_scopes]
        self.found: dict[str, Found] = {}
        self.resident: dict[_Place, Part] = {}
        again = sum(job.input_bytes * job.surveyed_reads for job in skipped) if self.surveyed else 0
        self.read_before = sum(job.bytes_to_read for job in skipped) - again
        self.written = sum(planned.layout.slots[job.name].nbytes for job in skipped)
        self.to_read = planned.bytes_to_read
        self.to_write = sum(slot.nbytes for slot in planned.layout.slots.values())
        self.file_numbers = {path: number for number, path in enumerate(planned.files)}
        self.started = time.monotonic()

    def run(self) -> MergeResult:
        if self.writer.resumed:
            log.info("resuming: %d of %d tensors are done", self.done, len(self.plan.jobs))
        try:
            while not self._run_jobs():
                self._retreat()
        except ReadFault as fault:
            raise InputFault(str(fault)) from fault
        for checkpoint in self.plan.inputs:
            checkpoint.check_unchanged()
        self.writer.sync()
        seconds = time.monotonic() - self.started
        result = MergeResult(
            output=self.out,
            method=self.plan.method.name,
            tensors=len(self.plan.jobs),
            bytes_read=self.read,
            bytes_written=self.plan.layout.nbytes,
            seconds=seconds,
            peak_rss=_peak_rss(),
            resumed=self.writer.resumed,
            warnings=(*self.warnings, *self.placement.warnings()),
        )
        manifest.add_files(self.writer, self.plan, result, self.fit.report if self.fit is not None else None)
        self.writer.publish()
        return result

    def _run_jobs(self) -> bool:
        """Takes the merge from where it is to its last tensor; False if the device's memory did not suffice."""
        try:
            with self.stream(READ_AHEAD) as stream:
                windows = self._windows(stream)
                if self.surveyed:
                    self._survey(windows, stream)
                while self.jobs:
                    self._run_job(self.jobs[0], windows, stream)
                    del self.jobs[0]
        except RuntimeError as error:
            if not is_out_of_memory(error) or not self.placement.can_retreat(self._at_work()):
                raise
            log.warning("%s", str(error).splitlines()[0])
            return False
        return True

    def _at_work(self) -> list[TensorJob]:
        """What is read or computed now: one tensor, or those that are surveyed together."""
        return self.surveyed or self.jobs[:1]

    def _retreat(self) -> None:
        """What was begun starts again, in smaller windows or on the CPU. Neither changes a byte of the result."""
        if not self.surveyed:
            self.writer.restart(self.jobs[0].name)
        self.resident.clear()
        self.read, self.written = self.mark
        self.placement.retreat(self._at_work())
        self.surveyed, self.jobs = (list(map(self.placement.narrowed, jobs)) for jobs in (self.surveyed, self.jobs))

    def _survey(self, windows: _Windows, stream: WindowStream) -> None:
        self.mark = self.read, self.written
        tensors = [(job, _Reads(self, job, windows)) for job in self.surveyed]
        self.found = survey.survey(tensors, self.plan.spec.seed)
        stream.check()
        self.surveyed = []

    def _run_job(self, job: TensorJob, windows: _Windows, stream: WindowStream) -> None:
        self.mark = self.read, self.written
        self.device = self.placement.of(job)
        if job.parameters is None:
            self._copy(job, windows)
        else:
            counts = torch.zeros(2, dtype=torch.int64, device=self.device.torch_device)
            reads = _Reads(self, job, windows)
            found, seed = self.found.get(job.name), self.plan.spec.seed
            if found is not None:
                drops = list(found.drops)
            else:
                drops = statistics.chosen(job, job.sparsify, reads, ops.Place(), seed) if job.sparsify else []
            if job.method.keeps is not None:
                self._elect(job, drops, counts, reads)
            else:
                for matrix in range(job.matrices):
                    gram = found.gram if found is not None else None
                    known = {"gram": gram} if gram else {"fitted": self.fitted.get(job.name)} if self.fitted else {}
                    view = job.view(**known) if known else statistics.of_matrix(job, matrix, reads, drops)
                    coefficients = self._solve(view, job)
                    if isinstance(coefficients, Dense | Rowwise):
                        if coefficients.warning:
                            self._warn(f"{job.name}: {coefficients.warning}")
                        self._put(job, matrix, coefficients, counts, reads)
                    else:
                        assert isinstance(coefficients, Coefficients)
                        self._blend(job, matrix, coefficients, drops, counts, reads)
            self.device.flush()
            stream.check()
            self._check_finite(job, *counts.tolist())
        stream.check()
        self.resident.clear()
        self.writer.finish(job.name)
        self.done += 1
        self._progress()

    def _copy(self, job: TensorJob, windows: _Windows) -> None:
        for first_row, rows in job.windows():
            _, (data,) = next(windows)
            buffer = self.writer.acquire(data.nbytes)
            buffer[:] = data
            self.writer.write(job.name, first_row * (data.nbytes // rows), buffer)
            self._count(data.nbytes, data.nbytes)

    def _solve(self, view: TensorView, job: TensorJob) -> Coefficients | Election | Dense | Rowwise:
        try:
            return job.method.coefficients(view)
        except ValueError as error:
            raise MergecoreError(f"{job.name}: {error}") from error

    def _blend(
        self,
        job: TensorJob,
        matrix: int,
        coefficients: Coefficients,
        drops: list[ops.Drop],
        counts: Tensor,
        reads: _Reads,
    ) -> None:
        values = coefficients.values.to(self.device.torch_device).contiguous()
        axis = ops.Axis.TENSOR
        if values.shape[1] > 1:
            axis = ops.Axis.ROWS if (coefficients.axis or job.orientation) == "rows" else ops.Axis.COLUMNS
        entry = matrix * job.rows * job.columns

        def compute(result: Tensor, part: Part) -> None:
            ops.blend(
                result,
                part.base,
                part.models,
                values,
                counts,
                base_coefficient=coefficients.base,
                axis=axis,
                first_row=(part.first_entry - entry) // job.columns,
                first_entry=entry,
                drops=drops,
            )

        self._write(job, matrix, compute, reads)

    def _put(self, job: TensorJob, matrix: int, form: Dense | Rowwise, counts: Tensor, reads: _Reads) -> None:
        """The blend of values that are computed already, float64: as the one model beside the base, or beside the first
        model where there is none."""
        one = torch.ones(1, 1, dtype=torch.float64, device=self.device.torch_device)
        first = matrix * job.rows

        def compute(result: Tensor, part: Part) -> None:
            done = 0
            for piece in statistics.pieces(part):
                base = piece.models[0] if piece.base is None else piece.base
                rows = base.shape[0]
                row = piece.first_entry // job.columns - first
                if isinstance(form, Dense):
                    moved = base.double() + form.delta[row : row + rows]
                else:
                    moved = form.combine(piece.models, piece.beside)
                ops.blend(result[done : done + rows], base, [moved], one, counts)
                done += rows

        self._write(job, matrix, compute, reads)

    def _elect(self, job: TensorJob, drops: list[ops.Drop], counts: Tensor, reads: _Reads) -> None:
        """The blend of methods that keep some of the deltas; what they keep is chosen first."""
        keeps = job.keeps
        place = compared(keeps, reads, ops.Place(drops=drops))
        if job.name in self.found:
            kept = list(self.found[job.name].kept)
        else:
            kept = statistics.chosen(job, keeps, reads, place, self.plan.spec.seed, "kept") if keeps else []
        election = self._solve(statistics.of_kept(job, kept, reads, place), job)
        assert isinstance(election, Election)
        divide_by_odds = any(keep.rescale == "probability" for keep in keeps)

        def compute(result: Tensor, part: Part) -> None:
            done = 0
            for piece in row_pieces(keeps, part, reads.block):
                here = replace(place, first_entry=piece.first_entry)
                rows = piece.models[0].shape[0]
                assert piece.base is not None
                ops.elect(
                    result[done : done + rows],
                    piece.base,
                    piece.models,
                    election.weights,
                    counts,
                    scale=election.scale,
                    elect=election.elect,
                    normalize=election.normalize,
                    limits=election.limits,
                    consensus=election.consensus,
                    keeps=kept,
                    place=here,
                    odds=row_odds(keeps, piece, here),
                    divide_by_odds=divide_by_odds,
                )
                done += rows

        self._write(job, 0, compute, reads)

    def _write(self, job: TensorJob, matrix: int, compute: Callable[[Tensor, Part], None], reads: _Reads) -> None:
        """The blend pass over a matrix: `compute` fills the result of each window."""
        dtype = DTYPES[job.dtype]
        for _, rows in job.windows():
            window, views = next(reads.windows)
            part = self._upload(window, views)
            nbytes = rows * job.columns * dtype.itemsize
            buffer = self.writer.acquire(nbytes)
            target = HostWindow(buffer, dtype, rows, job.columns)
            result = self.device.output(target)
            compute(result, part)
            offset = part.first_entry * dtype.itemsize
            self.device.deliver(result, target, partial(self.writer.write, job.name, offset, buffer))
            self._count(self._nbytes(window), nbytes)

    def _upload(self, window: _Window, views: list[memoryview]) -> Part:
        place = window.matrix, window.first_row
        if window.is_there:
            return self.resident.pop(place) if window.blends else self.resident[place]
        part = self._fresh(window, views)
        if window.stays:
            self.resident[place] = part
        return part

    def _fresh(self, window: _Window, views: list[memoryview]) -> Part:
        job, rest = window.job, views
        first, count = window.entries
        hosts = []
        for source in job.inputs:
            data = None
            if source is not None:
                pieces = len(source.pieces(first, count))
                data, rest = source.window(first, count, rest[:pieces]), rest[pieces:]
            dtype = torch.bfloat16 if source is None else DTYPES[source.dtype]
            hosts.append(HostWindow(data, dtype, window.rows, job.columns))
        tensors = self.placement.of(job).upload(hosts)
        base = tensors.pop(0) if job.has_base else None
        part = Part(first, base, tensors[: len(job.models)], tensors[len(job.models) :])
        if job.thinned:
            keys = statistics.random_keys(job, len(job.models), self.plan.spec.seed)
            part = replace(part, models=thinned(job.thinned, keys, part, job.shape[-1] if job.shape else 1))
        return part

    def _windows(self, stream: WindowStream) -> _Windows:
        """Every window of every job with its bytes, in the order of the loop; submitted just far enough ahead."""
        order = self._order()
        ahead: list[_Window] = []
        while True:
            while sum(not each.is_there for each in ahead) <= READ_AHEAD + 1:
                window = next(order, None)
                if window is None:
                    break
                ahead.append(window)
                if window.is_there:
                    continue
                try:
                    stream.submit(self._pieces(window), keep=window.job.keep and not (window.blends or window.stays))
                except (OSError, ValueError) as error:  # gone, or shorter than its header said
                    raise InputFault(f"{window.job.name} cannot be read: {error}") from error
            if not ahead:
                return
            if self.should_stop is not None and self.should_stop():
                raise Interrupted("stopped on request; the finished tensors are kept, --resume continues")
            window = ahead.pop(0)
            yield window, [] if window.is_there else stream.next()

    def _order(self) -> Iterator[_Window]:
        jobs = list(self.jobs)  # which gets shorter while this is ahead of it
        for job in survey.order(self.surveyed):
            yield from self._matrix_windows(job, range(job.matrices))
        for job in jobs:
            stays = self.placement.stays(job)
            chosen = max(job.surveyed_reads, job.choosing_reads)
            for read in range(job.surveyed_reads, chosen):
                again = stays and read > job.surveyed_reads
                yield from self._matrix_windows(job, range(job.matrices), stays=stays, is_there=again)
            for matrix in range(job.matrices):
                for read in range(chosen + 1, job.passes + 1):
                    again = stays and (chosen > job.surveyed_reads or read > chosen + 1)
                    last = read == job.passes
                    yield from self._matrix_windows(job, (matrix,), blends=last, stays=stays, is_there=again)

    @staticmethod
    def _matrix_windows(
        job: TensorJob, matrices: Iterable[int], *, blends: bool = False, stays: bool = False, is_there: bool = False
    ) -> Iterator[_Window]:
        for matrix in matrices:
            for first_row, rows in job.windows():
                yield _Window(job, matrix, first_row, rows, blends, stays and not blends, is_there)

    def stream(self, depth: int) -> WindowStream:
        """Windows of the plan's files, read `depth` ahead."""
        files = [str(path) for path in self.plan.files]
        readers = self.placement.device.readers
        return WindowStream(files, self.plan.spec.run.read, depth, threads=readers, opener=open_input)

    def _nbytes(self, window: _Window) -> int:
        """Bytes of weights in a window, as they lie in the files."""
        return sum(nbytes for _, _, nbytes in self._pieces(window))

    def _pieces(self, window: _Window) -> list[tuple[int, int, int]]:
        return [piece for source in window.job.sources() for piece in self._mapped(source, *window.entries)]

    def _mapped(self, source: Source, first: int, count: int) -> list[tuple[int, int, int]]:
        return [(self.file_numbers[file], offset, nbytes) for file, offset, nbytes in source.pieces(first, count)]

    def _count(self, read: int, written: int) -> None:
        self.read += read
        self.written += written
        self._progress()

    def _progress(self) -> None:
        if self.report is None:
            return
        self.report(
            Progress(
                tensors_done=self.done,
                tensors_total=len(self.plan.jobs),
                bytes_read=self.read_before + self.read,
                bytes_read_total=self.to_read,
                bytes_written=self.written,
                bytes_written_total=self.to_write,
                seconds=time.monotonic() - self.started,
                step=self.fit.step if self.fit is not None else "",
                steps_done=self.fit.steps if self.fit is not None else 0,
                steps_total=self.fit.steps if self.fit is not None else 0,
            )
        )

    def _check_finite(self, job: TensorJob, nonfinite: int, overflow: int) -> None:
        """Names what is not finite: the inputs at fault, or the dtype that is too narrow."""
        if not nonfinite and not overflow:
            return
        if nonfinite:
            found = [f"{files_of(source)[0]} ({_count_nonfinite(source)} entries)" for source in job.everything()]
            found = [text for text in found if "(0 entries)" not in text]
            message = f"{job.name} holds NaN or Inf in " + ", ".join(found or ["the coefficients"])
            advice = "mend the model, or set on_nonfinite: warn to let it through"
        else:
            message = f"{job.name}: {overflow} results overflow {str(DTYPES[job.dtype]).removeprefix('torch.')}"
            advice = "set out_dtype to bfloat16 or float32, or on_nonfinite: warn to write infinities"
        if self.plan.spec.on_nonfinite == "error":
            raise NonFiniteError(f"{message}; {advice}")
        self._warn(message)

    def _warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)
            log.warning(message)


class _Reads:
    """A job's tensor as its statistics read it: planned reads from the merge's windows, others from a stream apart."""

    def __init__(self, merge: Merge, job: TensorJob, windows: _Windows) -> None:
        self.merge, self.job, self.windows = merge, job, windows
        self.entries = job.matrices * job.rows * job.columns
        self.block = job.block_rows * job.columns
        self.device = merge.placement.of(job).torch_device

    def nonfinite(self) -> None:
        self.merge._check_finite(self.job, 1, 0)

    def planned(self) -> Iterator[Part]:
        for matrix in range(self.job.matrices):
            yield from self.matrix(matrix)

    def matrix(self, number: int) -> Iterator[Part]:
        for _ in self.job.windows():
            window, views = next(self.windows)
            yield self._part(window, views)
            self.merge._count(self.merge._nbytes(window), 0)

    def further(self) -> Iterator[Part]:
        yield from self._apart(self.merge._matrix_windows(self.job, range(self.job.matrices)))

    def only(self, first_entry: int, entries: int) -> Part:
        matrix, row = divmod(first_entry // self.job.columns, max(1, self.job.rows))
        return next(self._apart([_Window(self.job, matrix, row, entries // self.job.columns, False)]))

    def _apart(self, windows: Iterable[_Window]) -> Iterator[Part]:
        with self.merge.stream(0) as stream:
            for window in windows:
                part = self.merge.resident.get((window.matrix, window.first_row))
                if part is not None and part.models[0].shape[0] == window.rows:
                    yield part
                    continue
                stream.submit(self.merge._pieces(window), keep=False)
                views = stream.next()
                yield self._part(window, views)
                stream.check()
                self.merge.read += sum(map(len, views))

    def _part(self, window: _Window, views: list[memoryview]) -> Part:
        return self.merge._upload(window, views)

    def input_grams(self) -> tuple[Tensor, ...]:
        with self.merge.stream(0) as stream:
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
            stream.submit(self.merge._mapped(source, first, count), keep=False)
            views = stream.next()
            whole[first : first + count] = source.window(first, count, views).to(self.device)
            stream.check()
            self.merge._count(sum(map(len, views)), 0)
        return whole.view(source.shape)


def _peak_rss() -> int:
    """Peak resident bytes of this program: what it ran before exec, or its parent, is not counted."""
    with suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if found is not None:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _count_nonfinite(source: Source) -> int:
    """NaN and Inf entries of an input: a second look, only when something is wrong."""
    count, step, entries = 0, 4 << 20, math.prod(source.shape)
    for first in range(0, entries, step):
        views = []
        for file, offset, nbytes in source.pieces(first, min(step, entries - first)):
            with os.fdopen(open_input(file), "rb") as opened:
                opened.seek(offset)
                views.append(memoryview(bytearray(opened.read(nbytes))))
        count += int((~torch.isfinite(source.window(first, min(step, entries - first), views))).sum())
    return count
