"""What several merges do to one tensor together: jobs that see the same inputs the same way, as one batch.

A merge that runs alone has batches of one job. Which points a sweep has is sweeping.py's affair, running a batch
loop.py's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

from mergecore.budget import held, result_bytes, windowed
from mergecore.jobs import TensorJob
from mergecore.methods.base import Statistics
from mergecore.selecting import planned_reads
from mergecore.sources import same
from mergecore.spec import MergeSpec

Numbered = tuple[int, TensorJob]
"""A job and the number of its merge."""


@dataclass(frozen=True)
class Batch:
    """Jobs of one tensor that share windows, statistics with equal keys, and the blend pass."""

    form: TensorJob
    """How all of them see the inputs; its windows are those of all."""
    jobs: tuple[Numbered, ...]
    is_last: bool = True
    """Whether no other batch reads the tensor after it."""

    @cached_property
    def reads_before(self) -> int:
        """Reads of the whole tensor before its first matrix is looked at: what is kept, and sums over what is kept."""
        jobs = [job for _, job in self.jobs if job.scope == "tensor"]
        sparsified = {drops_key(job): planned_reads(job.sparsify) for job in jobs}
        kept = {kept_key(job): planned_reads(job.keeps) for job in jobs}
        sums = {statistics_key(job) for job in jobs if job.elects and job.statistics.is_read}
        return sum(sparsified.values()) + sum(kept.values()) + len(sums)

    @cached_property
    def reads_of_matrix(self) -> int:
        """Reads of each matrix before its blend."""
        jobs = [job for _, job in self.jobs if job.scope == "tensor" and not job.elects]
        return len({statistics_key(job) for job in jobs if job.statistics.is_read})

    @property
    def reads(self) -> int:
        """How often the inputs are read, with the blend pass."""
        return self.reads_before + self.reads_of_matrix + 1

    @property
    def bytes_to_read(self) -> int:
        """Bytes of windows, every read counted."""
        return self.form.input_bytes * self.reads + sum(gram.nbytes for gram in self.form.input_grams)

    @cached_property
    def held_bytes(self) -> int:
        """Memory held at most, beside the process itself."""
        return held(self.form, [job for _, job in self.jobs[1:]])

    def result_bytes(self, number: int) -> int:
        """Bytes of a merge's output of one window, at most."""
        rows = self.form.window_rows
        return max((result_bytes(job, rows) for n, job in self.jobs if n == number), default=0)


@dataclass(frozen=True)
class Survey:
    """Tensors that are read together before the first blend (scope: model), and the merges that need what they tell."""

    jobs: tuple[TensorJob, ...]
    numbers: tuple[int, ...]

    @property
    def bytes_to_read(self) -> int:
        """Bytes of windows, every read counted."""
        return sum(job.input_bytes * job.surveyed_reads for job in self.jobs)


def drops_key(job: TensorJob) -> Hashable:
    """Equal where the same is dropped in front of the method, of the same inputs and with the same seed."""
    return job.sparsify


def kept_key(job: TensorJob) -> Hashable:
    """Equal where the same deltas are kept at last."""
    return job.sparsify, job.keeps


def statistics_key(job: TensorJob) -> Hashable:
    """Equal where the same statistics are asked for, of the same windows."""
    epsilon = job.parameters["epsilon"] if job.parameters and job.statistics is Statistics.SHARED else None
    return job.statistics, kept_key(job), job.orientation, epsilon


def bytes_of(merges: Sequence[Sequence[TensorJob]], spec: MergeSpec) -> int:
    """Bytes of windows that these merges read together, every read counted."""
    surveys = sum(survey.bytes_to_read for survey in surveys_of(merges, range(len(merges))))
    return surveys + sum(batch.bytes_to_read for batch in batched(merges, spec))


def batched(
    merges: Sequence[Sequence[TensorJob]],
    spec: MergeSpec,
    finished: Sequence[Collection[str]] = (),
    memory: int | None = None,
) -> list[Batch]:
    """The jobs of `merges` as batches, tensor after tensor; without those whose names the same merge has `finished`.

    The merges differ in methods and parameters only: inputs, seed and memory are those of `spec`, or a part of its
    memory, `memory` (bytes). Raises SpecError where that does not suffice.
    """
    by_name: dict[str, list[Numbered]] = {}
    for number, jobs in enumerate(merges):
        for job in jobs:
            if not finished or job.name not in finished[number]:
                by_name.setdefault(job.name, []).append((number, job))
    return [batch for jobs in by_name.values() for batch in _of_tensor(jobs, spec, memory)]


def interleaved(batches: Sequence[Batch], lane_of: Callable[[str], int]) -> list[Batch]:
    """The batches in such an order that all lanes of a writer have tensors to write: each next one is of the lane that
    got the fewest bytes so far. Tensors of one lane keep their order, and the batches of a tensor stay together."""
    lanes: dict[int, deque[list[Batch]]] = {}
    for name, of_tensor in groupby(batches, lambda batch: batch.form.name):
        lanes.setdefault(lane_of(name), deque()).append(list(of_tensor))
    given = dict.fromkeys(sorted(lanes), 0)
    order: list[Batch] = []
    while given:
        lane = min(given, key=given.__getitem__)
        tensor = lanes[lane].popleft()
        order += tensor
        given[lane] += tensor[0].form.input_bytes
        if not lanes[lane]:
            del given[lane]
    return order


def surveys_of(merges: Sequence[Sequence[TensorJob]], numbers: Iterable[int]) -> list[Survey]:
    """What these merges have to know of the whole model first; those that ask for the same share it."""
    surveys: list[Survey] = []
    for number in numbers:
        jobs = tuple(job for job in merges[number] if job.scope == "model")
        for n, survey in enumerate(surveys):
            if len(survey.jobs) == len(jobs) and all(map(_asks_the_same, survey.jobs, jobs)):
                surveys[n] = replace(survey, numbers=(*survey.numbers, number))
                break
        else:
            if jobs:
                surveys.append(Survey(jobs, (number,)))
    return surveys


def _of_tensor(jobs: Sequence[Numbered], spec: MergeSpec, memory: int | None) -> list[Batch]:
    if len(jobs) == 1:
        planned = jobs[0][1]
        return [Batch(planned if memory is None else windowed(planned, spec, memory=memory), tuple(jobs))]
    groups: list[list[Numbered]] = []
    # Those that any windows suit come last, and join the first who have their inputs.
    for number, job in sorted(jobs, key=lambda numbered: _suits_any_form(numbered[1])):
        for group in groups:
            form = group[0][1]
            if _shares(form, job):
                group.append((number, _in_form(job, form)))
                break
        else:
            groups.append([(number, job)])
    batches = []
    for n, group in enumerate(groups):
        is_last = n == len(groups) - 1
        first, *others = (job for _, job in group)
        reads = Batch(first, tuple(group)).reads
        form = windowed(first, spec, others, again=reads > 1 or not is_last, memory=memory)
        batches.append(Batch(form, tuple(group), is_last))
    return batches


def _shares(form: TensorJob, job: TensorJob) -> bool:
    """Whether a job can be done on the windows of another one."""
    if form.statistics.is_whole or job.statistics.is_whole or form.input_grams or job.input_grams:
        return False  # matrices are held: one after the other
    if (form.parameters is None) != (job.parameters is None) or form.thinned != job.thinned:
        return False
    seen = (form.matrices, form.rows, form.columns, form.block_rows)
    if seen != (job.matrices, job.rows, job.columns, job.block_rows) and not _suits_any_form(job):
        return False
    return form.has_base == job.has_base and same(form.inputs, job.inputs)


def _suits_any_form(job: TensorJob) -> bool:
    """Whether its entries do not know of each other, so that windows may be cut anywhere."""
    return (
        job.parameters is not None
        and job.statistics is Statistics.NONE
        and not (job.thinned or job.beside or job.input_grams)
        and not any(keep.whole_rows or planned_reads((keep,)) for keep in (*job.sparsify, *job.keeps))
    )


def _in_form(job: TensorJob, form: TensorJob) -> TensorJob:
    return replace(job, matrices=form.matrices, rows=form.rows, columns=form.columns, block_rows=form.block_rows)


def _asks_the_same(one: TensorJob, other: TensorJob) -> bool:
    return (
        one.name == other.name
        and statistics_key(one) == statistics_key(other)
        and one.has_base == other.has_base
        and one.thinned == other.thinned
        and same(one.inputs, other.inputs)
    )
