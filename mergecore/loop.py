"""The one loop: windows -> statistics -> coefficients -> blend -> writer, tensor after tensor, on one device.

Knows nothing of what a method computes, and holds no tensor: windows come from a stream in the order
that the plan fixes, results go to planned offsets. What is done to a window is in blends.py; what several
loops of one merge share is in engine.py.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergecore import blends, ops, statistics, survey
from mergecore._stream import WindowStream
from mergecore.batches import Batch, Survey, drops_key, kept_key, statistics_key
from mergecore.blends import Blend
from mergecore.device import Device, HostWindow, is_out_of_memory
from mergecore.errors import MergecoreError
from mergecore.jobs import TensorJob
from mergecore.methods.base import Coefficients, Dense, Election, Rowwise, TensorView
from mergecore.placement import Placement
from mergecore.reads import READ_AHEAD, TensorReads, Window, Windows, open_stream, windows_of
from mergecore.selecting import compared, thinned
from mergecore.sources import DTYPES, Source
from mergecore.topsets import Part

if TYPE_CHECKING:
    from mergecore.engine import Merge

log = logging.getLogger(__name__)

ALONE = 1 << 16
"""Entries of a matrix that one thread computes sooner than several."""


class Loop:
    """One of the loops of a merge, each with a device and a stream of windows of its own: it takes batches from the
    merge until none is left. Loops run in threads of their own, and a tensor in one of them."""

    def __init__(self, merge: Merge, number: int, device: Device) -> None:
        self.merge, self.number, self.device = merge, number, device
        self.spec, self.outputs = merge.spec, merge.outputs
        self.placement = Placement(device)
        self.surveys: list[Survey] = []
        self.batches: deque[Batch] = deque()
        """Batches that were claimed: the one at work, and those that are read ahead."""
        self.to_order: deque[Batch] = deque()
        """Those of them whose windows were not asked for."""
        self.aside: WindowStream
        """For a few entries here and there, beside the windows."""
        self.resident: dict[tuple[int, int], Part] = {}
        """Windows of the tensor at work that stay on the device, by matrix and first row."""
        self.counted = 0, 0, 0
        """Bytes read, written and passed over of what is at work."""

    def survey(self, surveys: Sequence[Survey]) -> None:
        """Reads what must be known of the whole model before the first blend."""
        self.surveys = list(surveys)
        self._until_done(self._survey_all)

    def run(self) -> None:
        """Takes batches to the writers until none is left."""
        self._until_done(self._run_all)

    def _until_done(self, work: Callable[[Windows, WindowStream], None]) -> None:
        while not self._succeeds(work):
            self._retreat()

    def _succeeds(self, work: Callable[[Windows, WindowStream], None]) -> bool:
        """Goes on from where the loop is; False if the device's memory did not suffice."""
        self.to_order = deque(self.batches)
        try:
            with self.stream(READ_AHEAD) as stream, self.stream(0) as self.aside:
                work(Windows(self._order(), stream, self.pieces, self.merge.is_stopping), stream)
                self.device.flush()
        except RuntimeError as error:
            if not is_out_of_memory(error) or not self.placement.can_retreat(self._at_work()):
                raise
            log.warning("%s", str(error).splitlines()[0])
            return False
        return True

    def _survey_all(self, windows: Windows, stream: WindowStream) -> None:
        while self.surveys:
            self._survey(self.surveys[0], windows, stream)
            del self.surveys[0]

    def _run_all(self, windows: Windows, stream: WindowStream) -> None:
        while self.batches or self._claim():
            self._run_batch(self.batches[0], windows, stream)
            self.batches.popleft()

    def _claim(self) -> bool:
        """Takes the batches of another tensor from the merge; False if there is none."""
        claimed = [self._narrowed(batch) for batch in self.merge.claim()]
        self.batches.extend(claimed)
        self.to_order.extend(claimed)
        return bool(claimed)

    def _narrowed(self, batch: Batch) -> Batch:
        form = self.placement.narrowed(batch.form)
        return batch if form is batch.form else replace(batch, form=form)

    def _at_work(self) -> list[TensorJob]:
        """What is read or computed now: one tensor, or those that are surveyed together."""
        return list(self.surveys[0].jobs) if self.surveys else [batch.form for batch in list(self.batches)[:1]]

    def _retreat(self) -> None:
        """What was begun starts again, in smaller windows or on the CPU. Neither changes a byte of the result."""
        self.device.flush()  # the tensor before it
        if not self.surveys:
            for number, job in self.batches[0].jobs:
                self.outputs[number].writer.restart(job.name, self.number)
        self.resident.clear()
        self.merge.count(*(-nbytes for nbytes in self.counted))
        self.placement.retreat(self._at_work())
        self.surveys = [replace(each, jobs=tuple(map(self.placement.narrowed, each.jobs))) for each in self.surveys]
        self.batches = deque(map(self._narrowed, self.batches))

    def _survey(self, surveyed: Survey, windows: Windows, stream: WindowStream) -> None:
        self.counted = 0, 0, 0
        tensors = [(job, TensorReads(self, job, windows)) for job in surveyed.jobs]
        found = survey.survey(tensors, self.spec.seed)
        stream.check()
        self.aside.check()
        self.merge.found |= {(number, name): each for number in surveyed.numbers for name, each in found.items()}

    def _run_batch(self, batch: Batch, windows: Windows, stream: WindowStream) -> None:
        self.counted = 0, 0, 0
        if (device := self.placement.of(batch.form)) is not self.device:
            self.device.flush()
            self.device = device
        if batch.form.parameters is None:
            self._copy(batch, windows)
            stream.check()
            self._finish(batch)
            return
        # What is not finite is counted beside the results and comes after them, so that the next tensor need not wait.
        found = device.numbers(len(batch.jobs), 2)
        counts = device.output(found).zero_()
        self._merge(batch, counts, TensorReads(self, batch.form, windows))
        self.aside.check()
        self.resident.clear()
        device.deliver(counts, found, partial(self._check_results, batch, found, stream))

    def _check_results(self, batch: Batch, found: HostWindow, stream: WindowStream) -> None:
        stream.check()
        for (number, job), (nonfinite, overflow) in zip(batch.jobs, found.tensor().tolist(), strict=True):
            self.merge.check_finite(job, nonfinite, overflow, [number])
        self._finish(batch)

    def _finish(self, batch: Batch) -> None:
        for number, job in batch.jobs:
            self.outputs[number].writer.finish(job.name)
        self.merge.finished(len(batch.jobs))

    def _copy(self, batch: Batch, windows: Windows) -> None:
        for first_row, rows in batch.form.windows():
            _, (data,) = next(windows)
            for number, job in batch.jobs:
                writer = self.outputs[number].writer
                offset = first_row * (data.nbytes // rows)
                buffer = writer.acquire(job.name, offset, data.nbytes, self.number)
                buffer[:] = data
                writer.write(job.name, offset, buffer)
            self.count(data.nbytes, data.nbytes * len(batch.jobs))

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
        if (number, job.name) in self.merge.found:
            return list(self.merge.found[number, job.name].drops)
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
        if (number, job.name) in self.merge.found:
            kept = list(self.merge.found[number, job.name].kept)
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
        surveyed = self.merge.found.get((number, job.name))
        if surveyed is not None and surveyed.gram is not None:
            found: dict[str, Any] = {"gram": surveyed.gram}
        elif self.merge.fitted:
            found = {"fitted": self.merge.fitted.get(job.name)}
        else:
            found = _once(known, statistics_key(job), lambda: statistics.of_matrix(job, matrix, reads, drops))
        form = self._solve(job.view(**found), job)
        if isinstance(form, Dense | Rowwise):
            if form.warning:
                self.merge.warn(job, f"{job.name}: {form.warning}", [number])
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
                buffer = writer.acquire(job.name, offset, nbytes, self.number)
                target = HostWindow(buffer, dtype, rows, job.columns)
                result = self.device.output(target)
                compute(result, part)
                self.device.deliver(result, target, partial(writer.write, job.name, offset, buffer))
                written += nbytes
            self.count(self.nbytes(window), written)

    def _use_threads(self, job: TensorJob) -> None:
        """As many as are free, but one for a small matrix: waking others costs more than they save. What LAPACK makes
        of a matrix may depend on its threads, whose number stays as it is."""
        solves = job.statistics.is_whole or job.input_grams
        threads = 1 if job.rows * job.columns <= ALONE and not solves else self.merge.threads_each
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)

    def _upload(self, window: Window, views: list[memoryview]) -> Part:
        self._use_threads(window.job)
        place = window.matrix, window.first_row
        if window.is_there:
            return self.resident[place]
        part = self._fresh(window, views)
        if window.stays:
            self.resident[place] = part
        return part

    def _fresh(self, window: Window, views: list[memoryview]) -> Part:
        job, rest = window.job, iter(views)
        first, count = window.entries
        hosts = []
        for source in job.inputs:
            data = None if source is None else source.window(first, count, rest)
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
        before: TensorJob | None = None
        for surveyed in list(self.surveys):
            for job in survey.order(surveyed.jobs):
                yield from windows_of(job, range(job.matrices), again=job is before)
                before = job
        while not self.surveys and (self.to_order or self._claim()):
            batch = self.to_order.popleft()
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
        return open_stream(self.merge.file_numbers, self.spec.run.read, depth, self.placement.device.readers)

    def nbytes(self, window: Window) -> int:
        """Bytes of weights in a window, as they lie in the files."""
        first, count = window.entries
        return sum(nbytes for source in window.job.sources for _, _, nbytes in source.pieces(first, count))

    def pieces(self, window: Window) -> list[tuple[int, int, int]]:
        """What is mapped for a window."""
        first, count = window.entries
        return [piece for source in window.job.sources for piece in self.mapped(source, first, count)]

    def mapped(self, source: Source, first: int, count: int) -> list[tuple[int, int, int]]:
        """What is mapped for these entries of a source, with the files' numbers."""
        numbers = self.merge.file_numbers
        return [(numbers[file], offset, nbytes) for file, offset, nbytes in source.pieces(first, count)]

    def count(self, read: int, written: int, passed: int = 0) -> None:
        """Bytes of windows that were read, of results, and of windows that were planned to be read and need not be."""
        before = self.counted
        self.counted = before[0] + read, before[1] + written, before[2] + passed
        self.merge.count(read, written, passed)


def _once(known: dict[Hashable, Any], key: Hashable, find: Callable[[], Any]) -> Any:
    """What is known under a key, found now if it is not known yet."""
    if key not in known:
        known[key] = find()
    return known[key]
