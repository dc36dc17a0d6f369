"""The one loop: windows -> statistics -> coefficients -> blend -> writer, tensor after tensor.

Knows nothing of what a method computes, and holds no tensor: windows come from a stream in the order
that the plan fixes, results go to planned offsets. What is done to a window is in blends.py.
"""

from __future__ import annotations

import logging
import re
import resource
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergecore import blends, ops, statistics, survey
from mergecore._stream import ReadFault, WindowStream
from mergecore.batches import (
    Batch,
    Survey,
    batched,
    bytes_of,
    drops_key,
    interleaved,
    kept_key,
    statistics_key,
    surveys_of,
)
from mergecore.blends import Blend
from mergecore.device import Device, HostWindow, is_out_of_memory
from mergecore.errors import InputFault, Interrupted, MergecoreError, NonFiniteError
from mergecore.jobs import TensorJob
from mergecore.methods.base import Coefficients, Dense, Election, Rowwise, TensorView
from mergecore.output import manifest
from mergecore.output.writer import OutputWriter
from mergecore.placement import Placement
from mergecore.planning import MergePlan
from mergecore.progress import MergeResult, Progress
from mergecore.reads import (
    READ_AHEAD,
    TensorReads,
    Window,
    Windows,
    count_nonfinite,
    open_stream,
    windows_of,
)
from mergecore.selecting import compared, thinned
from mergecore.sources import DTYPES, Source, files_of
from mergecore.survey import Found
from mergecore.topsets import Part

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fit:
    """What was fitted on samples before the merge: coefficients of every merged tensor by its name, and what there is
    to tell of it (JSON values)."""

    coefficients: Mapping[str, Coefficients]
    report: Mapping[str, Any]
    step: str = ""
    steps: int = 0


@dataclass
class Output:
    """One of the models that a merge writes."""

    plan: MergePlan
    out: Path
    writer: OutputWriter
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.warnings = list(self.plan.warnings)


class Merge:
    """One running merge, or several of the same inputs: `run` takes them from their plans to the published outputs.

    Several differ in methods and parameters only. What they have in common is done once: reads, and statistics of equal
    keys (batches.py). A `fit` is that of a merge that runs alone.
    """

    def __init__(
        self,
        outputs: Sequence[Output],
        device: Device,
        progress: Callable[[Progress], None] | None,
        should_stop: Callable[[], bool] | None,
        fit: Fit | None = None,
    ) -> None:
        self.outputs = outputs
        self.spec = outputs[0].plan.spec
        self.placement = Placement(device)
        self.device = device
        self.fit = fit
        self.fitted = fit.coefficients if fit is not None else {}
        self.report, self.should_stop = progress, should_stop
        plans = [output.plan for output in outputs]
        jobs = [plan.jobs for plan in plans]
        finished = [output.writer.finished for output in outputs]
        self.batches = interleaved(batched(jobs, self.spec, finished), outputs[0].writer.lane_of)
        open_scopes = sorted({n for batch in self.batches for n, job in batch.jobs if job.scope == "model"})
        self.surveys = surveys_of(jobs, open_scopes)
        self.found: dict[tuple[int, str], Found] = {}
        self.resident: dict[tuple[int, int], Part] = {}
        """Windows of the tensor at work that stay on the device, by matrix and first row."""
        self.tensors = sum(map(len, jobs))
        self.done = sum(map(len, finished))
        self.read = 0
        self.total = bytes_of(jobs, self.spec)
        self.read_before = self.total - sum(each.bytes_to_read for each in self.surveys)
        self.read_before -= sum(batch.bytes_to_read for batch in self.batches)
        slots = [(slot.nbytes, name in done) for plan, done in zip(plans, finished, strict=True)
                 for name, slot in plan.layout.slots.items()]  # fmt: skip
        self.written = sum(nbytes for nbytes, is_done in slots if is_done)
        self.to_write = sum(nbytes for nbytes, _ in slots)
        self.file_numbers = {
            path: number for number, path in enumerate(dict.fromkeys(path for plan in plans for path in plan.files))
        }
        self.started = time.monotonic()

    def run(self) -> list[MergeResult]:
        """The results in the order of the outputs; bytes read, time and memory are those of all together."""
        if any(output.writer.resumed for output in self.outputs):
            log.info("resuming: %d of %d tensors are done", self.done, self.tensors)
        try:
            try:
                while not self._run_batches():
                    self._retreat()
            except Interrupted:
                self.device.flush()  # what is computed is kept
                raise
        except ReadFault as fault:
            raise InputFault(str(fault)) from fault
        for checkpoint in dict.fromkeys(each for output in self.outputs for each in output.plan.inputs):
            checkpoint.check_unchanged()
        for output in self.outputs:
            output.writer.sync()
        results = []
        for output in self.outputs:
            result = MergeResult(
                output=output.out,
                method=output.plan.method.name,
                tensors=len(output.plan.jobs),
                bytes_read=self.read,
                bytes_written=output.plan.layout.nbytes,
                seconds=time.monotonic() - self.started,
                peak_rss=_peak_rss(),
                resumed=output.writer.resumed,
                warnings=(*output.warnings, *self.placement.warnings()),
            )
            manifest.add_files(output.writer, output.plan, result, self.fit.report if self.fit is not None else None)
            output.writer.publish()
            results.append(result)
        return results

    def _run_batches(self) -> bool:
        """Takes the merge from where it is to its last tensor; False if the device's memory did not suffice."""
        try:
            with self.stream(READ_AHEAD) as stream:
                windows = Windows(self._order(), stream, self.pieces, self.should_stop)
                while self.surveys:
                    self._survey(self.surveys[0], windows, stream)
                    del self.surveys[0]
                while self.batches:
                    self._run_batch(self.batches[0], windows, stream)
                    del self.batches[0]
                self.device.flush()
        except RuntimeError as error:
            if not is_out_of_memory(error) or not self.placement.can_retreat(self._at_work()):
                raise
            log.warning("%s", str(error).splitlines()[0])
            return False
        return True

    def _at_work(self) -> list[TensorJob]:
        """What is read or computed now: one tensor, or those that are surveyed together."""
        return list(self.surveys[0].jobs) if self.surveys else [batch.form for batch in self.batches[:1]]

    def _retreat(self) -> None:
        """What was begun starts again, in smaller windows or on the CPU. Neither changes a byte of the result."""
        self.device.flush()  # the tensor before it
        if not self.surveys:
            for number, job in self.batches[0].jobs:
                self.outputs[number].writer.restart(job.name)
        self.resident.clear()
        self.read, self.read_before, self.written = self.mark
        self.placement.retreat(self._at_work())
        narrowed = self.placement.narrowed
        self.surveys = [replace(each, jobs=tuple(map(narrowed, each.jobs))) for each in self.surveys]
        self.batches = [replace(batch, form=narrowed(batch.form)) for batch in self.batches]

    def _survey(self, surveyed: Survey, windows: Windows, stream: WindowStream) -> None:
        self.mark = self.read, self.read_before, self.written
        tensors = [(job, TensorReads(self, job, windows)) for job in surveyed.jobs]
        found = survey.survey(tensors, self.spec.seed)
        stream.check()
        self.found |= {(number, name): each for number in surveyed.numbers for name, each in found.items()}

    def _run_batch(self, batch: Batch, windows: Windows, stream: WindowStream) -> None:
        self.mark = self.read, self.read_before, self.written
        if (device := self.placement.of(batch.form)) is not self.device:
            self.device.flush()
            self.device = device
        if batch.form.parameters is None:
            self._copy(batch, windows)
            self._finish(batch, stream)
            return
        # What is not finite is counted beside the results and comes after them, so that the next tensor need not wait.
        rows = len(batch.jobs)
        found = HostWindow(memoryview(device.new_buffer(16 * rows))[: 16 * rows], torch.int64, rows, 2)
        counts = device.output(found).zero_()
        self._merge(batch, counts, TensorReads(self, batch.form, windows))
        self.resident.clear()
        device.deliver(counts, found, partial(self._check_results, batch, found, stream))

    def _check_results(self, batch: Batch, found: HostWindow, stream: WindowStream) -> None:
        stream.check()
        for (number, job), (nonfinite, overflow) in zip(batch.jobs, found.tensor().tolist(), strict=True):
            self._check_finite(job, nonfinite, overflow, [number])
        self._finish(batch, stream)

    def _finish(self, batch: Batch, stream: WindowStream) -> None:
        stream.check()
        for number, job in batch.jobs:
            self.outputs[number].writer.finish(job.name)
        self.done += len(batch.jobs)
        self._progress()

    def _copy(self, batch: Batch, windows: Windows) -> None:
        for first_row, rows in batch.form.windows():
            _, (data,) = next(windows)
            for number, job in batch.jobs:
                writer = self.outputs[number].writer
                offset = first_row * (data.nbytes // rows)
                buffer = writer.acquire(job.name, offset, data.nbytes)
                buffer[:] = data
                writer.write(job.name, offset, buffer)
            self._count(data.nbytes, data.nbytes * len(batch.jobs))

    def _merge(self, batch: Batch, counts: Tensor, reads: TensorReads) -> None:
        """Statistics, coefficients and the blend pass of a tensor; `counts` (jobs, 2) takes what is not finite."""
        known: dict[Hashable, Any] = {}
        drops = [self._drops(number, job, reads, known) for number, job in batch.jobs]
        elections = {
            n: self._elect(number, job, drops[n], counts[n], reads, known)
            for n, (number, job) in enumerate(batch.jobs)
            if job.elects
        }
        for matrix in range(batch.form.matrices):
            of_matrix: dict[Hashable, Any] = {}
            computed = [
                elections[n] if job.elects else self._solved(number, job, matrix, drops[n], counts[n], reads, of_matrix)
                for n, (number, job) in enumerate(batch.jobs)
            ]
            of_matrix.clear()
            self._write(batch, matrix, computed, reads)

    def _drops(self, number: int, job: TensorJob, reads: TensorReads, known: dict[Hashable, Any]) -> Sequence[ops.Drop]:
        """What is dropped in front of the method."""
        if (number, job.name) in self.found:
            return list(self.found[number, job.name].drops)
        if not job.sparsify:
            return []
        seed = self.spec.seed
        return _once(
            known, ("drops", drops_key(job)), lambda: statistics.chosen(job, job.sparsify, reads, ops.Place(), seed)
        )

    def _elect(
        self,
        number: int,
        job: TensorJob,
        drops: Sequence[ops.Drop],
        counts: Tensor,
        reads: TensorReads,
        known: dict[Hashable, Any],
    ) -> Blend:
        """The blend of methods that keep some of the deltas; what they keep is chosen first."""
        keeps, key, seed = job.keeps, kept_key(job), self.spec.seed
        place = _once(known, ("place", key), lambda: compared(keeps, reads, ops.Place(drops=drops)))
        if (number, job.name) in self.found:
            kept = list(self.found[number, job.name].kept)
        elif keeps:
            kept = _once(known, ("kept", key), lambda: statistics.chosen(job, keeps, reads, place, seed, "kept"))
        else:
            kept = []
        found = _once(known, statistics_key(job), lambda: statistics.of_kept(job, kept, reads, place))
        election = self._solve(job.view(**found), job)
        assert isinstance(election, Election)
        return blends.of_election(job, election, kept, place, reads.block, counts)

    def _solved(
        self,
        number: int,
        job: TensorJob,
        matrix: int,
        drops: Sequence[ops.Drop],
        counts: Tensor,
        reads: TensorReads,
        known: dict[Hashable, Any],
    ) -> Blend:
        """The blend of other methods, of one matrix."""
        surveyed = self.found.get((number, job.name))
        if surveyed is not None and surveyed.gram is not None:
            found: dict[str, Any] = {"gram": surveyed.gram}
        elif self.fitted:
            found = {"fitted": self.fitted.get(job.name)}
        else:
            found = _once(known, statistics_key(job), lambda: statistics.of_matrix(job, matrix, reads, drops))
        form = self._solve(job.view(**found), job)
        if isinstance(form, Dense | Rowwise):
            if form.warning:
                self._warn(f"{job.name}: {form.warning}", [number])
            return blends.of_values(job, matrix, form, counts)
        assert isinstance(form, Coefficients)
        return blends.of_coefficients(job, matrix, form, drops, counts)

    def _solve(self, view: TensorView, job: TensorJob) -> Coefficients | Election | Dense | Rowwise:
        try:
            return job.method.coefficients(view)
        except ValueError as error:
            raise MergecoreError(f"{job.name}: {error}") from error

    def _write(self, batch: Batch, matrix: int, computed: Sequence[Blend], reads: TensorReads) -> None:
        """The blend pass over a matrix: each window becomes a window of every output."""
        for _, rows in batch.form.windows():
            window, views = next(reads.windows)
            part = self._upload(window, views)
            self.resident.pop((window.matrix, window.first_row), None)
            written = 0
            for (number, job), compute in zip(batch.jobs, computed, strict=True):
                writer, dtype = self.outputs[number].writer, DTYPES[job.dtype]
                nbytes = rows * job.columns * dtype.itemsize
                offset = part.first_entry * dtype.itemsize
                buffer = writer.acquire(job.name, offset, nbytes)
                target = HostWindow(buffer, dtype, rows, job.columns)
                result = self.device.output(target)
                compute(result, part)
                self.device.deliver(result, target, partial(writer.write, job.name, offset, buffer))
                written += nbytes
            self._count(self.nbytes(window), written)

    def _upload(self, window: Window, views: list[memoryview]) -> Part:
        place = window.matrix, window.first_row
        if window.is_there:
            return self.resident[place]
        part = self._fresh(window, views)
        if window.stays:
            self.resident[place] = part
        return part

    def _fresh(self, window: Window, views: list[memoryview]) -> Part:
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
            keys = statistics.random_keys(job, len(job.models), self.spec.seed)
            part = replace(part, models=thinned(job.thinned, keys, part, job.shape[-1] if job.shape else 1))
        return part

    def _order(self) -> Iterator[Window]:
        """Every window of every job, in the order of the loop."""
        batches = list(self.batches)  # which gets shorter while this is ahead of it
        before: TensorJob | None = None
        for surveyed in list(self.surveys):
            for job in survey.order(surveyed.jobs):
                yield from windows_of(job, range(job.matrices), again=job is before)
                before = job
        for batch in batches:
            form, stays = batch.form, batch.reads > 1 and self.placement.stays(batch.form)
            for read in range(batch.reads_before):
                again = read > 0
                yield from windows_of(form, range(form.matrices), stays=stays, is_there=stays and again, again=again)
            for matrix in range(form.matrices):
                for read in range(batch.reads_of_matrix):
                    again = batch.reads_before + read > 0
                    yield from windows_of(form, (matrix,), stays=stays, is_there=stays and again, again=again)
                again = batch.reads > 1
                yield from windows_of(form, (matrix,), is_last=batch.is_last, is_there=stays, again=again)

    def stream(self, depth: int) -> WindowStream:
        """Windows of the files, read `depth` ahead."""
        return open_stream(self.file_numbers, self.spec.run.read, depth, self.placement.device.readers)

    def nbytes(self, window: Window) -> int:
        """Bytes of weights in a window, as they lie in the files."""
        return sum(nbytes for _, _, nbytes in self.pieces(window))

    def pieces(self, window: Window) -> list[tuple[int, int, int]]:
        """What is mapped for a window."""
        return [piece for source in window.job.sources() for piece in self.mapped(source, *window.entries)]

    def mapped(self, source: Source, first: int, count: int) -> list[tuple[int, int, int]]:
        """What is mapped for these entries of a source, with the files' numbers."""
        return [(self.file_numbers[file], offset, nbytes) for file, offset, nbytes in source.pieces(first, count)]

    def _count(self, read: int, written: int) -> None:
        self.read += read
        self.written += written
        self._progress()

    def passed(self, nbytes: int) -> None:
        """Bytes that were planned to be read, and need not be."""
        self.read_before += nbytes
        self._progress()

    def _progress(self) -> None:
        if self.report is None:
            return
        self.report(
            Progress(
                tensors_done=self.done,
                tensors_total=self.tensors,
                bytes_read=self.read_before + self.read,
                bytes_read_total=self.total,
                bytes_written=self.written,
                bytes_written_total=self.to_write,
                seconds=time.monotonic() - self.started,
                step=self.fit.step if self.fit is not None else "",
                steps_done=self.fit.steps if self.fit is not None else 0,
                steps_total=self.fit.steps if self.fit is not None else 0,
            )
        )

    def nonfinite(self, job: TensorJob) -> None:
        """Some entries of the inputs of a tensor are NaN or Inf."""
        self._check_finite(job, 1, 0, range(len(self.outputs)))

    def _check_finite(self, job: TensorJob, nonfinite: int, overflow: int, numbers: Sequence[int]) -> None:
        """Names what is not finite: the inputs at fault, or the dtype that is too narrow."""
        if not nonfinite and not overflow:
            return
        if nonfinite:
            found = [f"{files_of(source)[0]} ({count_nonfinite(source)} entries)" for source in job.everything()]
            found = [text for text in found if "(0 entries)" not in text]
            message = f"{job.name} holds NaN or Inf in " + ", ".join(found or ["the coefficients"])
            advice = "mend the model, or set on_nonfinite: warn to let it through"
        else:
            message = f"{job.name}: {overflow} results overflow {str(DTYPES[job.dtype]).removeprefix('torch.')}"
            advice = "set out_dtype to bfloat16 or float32, or on_nonfinite: warn to write infinities"
        if self.spec.on_nonfinite == "error":
            raise NonFiniteError(f"{message}; {advice}")
        self._warn(message, numbers)

    def _warn(self, message: str, numbers: Sequence[int]) -> None:
        """A warning about some of the outputs, told once."""
        if all(message not in output.warnings for output in self.outputs):
            log.warning(message)
        for number in numbers:
            if message not in self.outputs[number].warnings:
                self.outputs[number].warnings.append(message)


def _once(known: dict[Hashable, Any], key: Hashable, find: Callable[[], Any]) -> Any:
    """What is known under a key, found now if it is not known yet."""
    if key not in known:
        known[key] = find()
    return known[key]


def _peak_rss() -> int:
    """Peak resident bytes of this program: what it ran before exec, or its parent, is not counted."""
    with suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if found is not None:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
