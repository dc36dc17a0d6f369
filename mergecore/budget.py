"""What is held in memory for a tensor, and windows that fit a merge's budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mergecore.jobs import MODEL_BLOCKS, WINDOW_BYTES, TensorJob
from mergecore.matching import FLOATS
from mergecore.methods.base import Statistics
from mergecore.ops import gram_count, moment_count
from mergecore.output.layout import ITEM_BYTES
from mergecore.selecting import BLOCK, held_bytes
from mergecore.sources import Stored, scratch_bytes
from mergecore.spec import MergeSpec, Run

LOOPS = 2  # of a merge on a CPU, side by side
LEAST_BESIDE = 4 << 20  # bytes of inputs of a window; smaller ones cost more than mapping the tensor again
MOST_WAITING = 64 << 20  # bytes of results; more does not keep a disk busier


def _row_bytes(job: TensorJob) -> tuple[int, int]:
    """Bytes of one row of all inputs, and of the output. What is derived while it streams is made in float64."""
    inputs = sum(FLOATS[each.dtype] if isinstance(each, Stored) else 3 * FLOATS["F64"] for each in job.sources)
    inputs += 2 * FLOATS["F64"] * len(job.thinned)
    return job.columns * inputs, job.columns * FLOATS.get(job.dtype, 1)


def _statistics_bytes(job: TensorJob) -> int:
    models = len(job.models)
    entries = MODEL_BLOCKS * BLOCK if job.scope == "model" else job.matrices * job.rows * job.columns
    choosing = max(held_bytes(keeps, entries, job.columns) for keeps in (job.sparsify, job.keeps))
    choosing += held_bytes(job.thinned, entries, job.columns)
    length = job.columns if job.orientation == "columns" or len(job.shape) < 2 else job.rows
    if job.statistics is Statistics.SQUARES:
        return max(choosing, 48 * models * (entries // BLOCK + 1))
    if job.statistics is Statistics.COLUMNS:
        # Moments twice (totals and the pending tile), then divergences, ranks and scores on the way.
        return choosing + 8 * length * (2 * moment_count(models) + 9 * models)
    if job.input_grams:
        deltas = 8 * (models + 1) * job.rows * job.columns if job.statistics.is_whole else 0
        return deltas + _solving_bytes(job)
    if job.statistics.is_whole:
        return choosing + _decomposition_bytes(job)
    if job.statistics.is_gram:
        # Totals, the pending tile, and both triangles; then points and coefficients.
        return choosing + 8 * length * (4 * gram_count(models) + 8 * models)
    return choosing


def _decomposition_bytes(job: TensorJob) -> int:
    """What is held of one matrix that is decomposed: the deltas or their sum, factors, copies, LAPACK's workspace.

    Measured (peak resident bytes), for matrices from square to 1 : 8.
    """
    whole, squares = (len(job.models) + 7, 7) if job.statistics is Statistics.DELTAS else (1 + 4, 3)
    return 8 * (whole * job.rows * job.columns + squares * min(job.rows, job.columns) ** 2)


def _solving_bytes(job: TensorJob) -> int:
    """What is held to solve for the shares of models: Gram matrices, their sum, its factor, what is solved for."""
    inputs = job.input_grams[0].shape[0]
    return sum(gram.nbytes for gram in job.input_grams) + 8 * (2 * len(job.models) + 8) * inputs**2


def _beside_bytes(job: TensorJob) -> int:
    """What is held beside the windows."""
    return _statistics_bytes(job) + max(map(scratch_bytes, job.sources), default=0)


def _retained_bytes(job: TensorJob) -> int:
    """What is held of a job until the blend pass: its statistics and coefficients."""
    by_column = job.statistics in (Statistics.COLUMNS, Statistics.ROW_GRAM, Statistics.COLUMN_GRAM)
    length = (job.columns if job.orientation == "columns" else job.rows) if by_column else 1
    return 8 * length * (1 + 4 * len(job.models))


def held(job: TensorJob, others: Sequence[TensorJob] = ()) -> int:
    """Bytes held at most while a job runs, and with it `others` that read the same windows."""
    jobs = (job, *others)
    if job.parameters is None:
        return (2 + 2 * len(jobs)) * job.window_rows * ITEM_BYTES[job.dtype]
    inputs, output = (job.window_rows * size for size in _together(jobs))
    kept = job.input_bytes // job.matrices if job.keep else 0
    return max(kept, inputs) + inputs + 2 * output + _beside_all(jobs)


def _together(jobs: Sequence[TensorJob]) -> tuple[int, int]:
    """Bytes of one row of all inputs, and of the outputs of all jobs."""
    return _row_bytes(jobs[0])[0], sum(_row_bytes(job)[1] for job in jobs)


def _beside_all(jobs: Sequence[TensorJob]) -> int:
    """What is held beside the windows: statistics are taken one after the other, their results stay."""
    return max(map(_beside_bytes, jobs)) + sum(map(_retained_bytes, jobs[1:]))


def windowed(
    job: TensorJob,
    spec: MergeSpec,
    others: Sequence[TensorJob] = (),
    *,
    again: bool = False,
    memory: int | None = None,
) -> TensorJob:
    """Two windows of inputs (one in use, one read ahead) and two of each output fit the memory beside the statistics.

    `others` make their outputs of the same windows; `again`: the inputs are read another time. `memory` (bytes) takes
    the place of what the spec allows. Raises SpecError where it does not suffice.
    """
    jobs = (job, *others)
    models, memory = len(job.models), spec.run.memory if memory is None else memory
    if job.parameters is None:
        most = memory // ((2 + 2 * len(jobs)) * ITEM_BYTES[job.dtype])
        return _in_windows(job, max(1, min(job.window_rows // len(jobs), most)), keep=job.keep)
    inputs, output = _together(jobs)
    room = memory - _beside_all(jobs)
    step = max(1, min(job.block_rows, job.rows))
    of_block = 8 * gram_count(models) if any(each.statistics is Statistics.GRAM for each in jobs) else 0
    smallest = 2 * (inputs + output) * step + of_block
    if room < smallest:
        needed = memory - room + smallest
        outputs = f", and {len(jobs)} outputs" if others else ""
        raise spec.error(
            f"{job.name} {list(job.shape)} needs {needed / 2**20:.1f} MiB for its statistics and one row of "
            f"{models} models{outputs}, more than the memory allowed ({memory / 2**20:.1f} MiB); raise run.memory or "
            "--memory",
            "run",
            "memory",
        )
    rows = min(job.rows, step * max(1, min(room, 2 * WINDOW_BYTES) // smallest))
    if again or (job.passes > 1 and job.scope == "tensor"):
        # Windows that leave room for all of the tensor to stay mapped, unless they were very small.
        beside = (room - job.input_bytes // job.matrices) // (inputs + 2 * output) // step * step
        if beside >= rows or beside * inputs >= LEAST_BESIDE:
            return _in_windows(job, max(1, min(rows, beside)), keep=True)
    return _in_windows(job, max(1, rows), keep=False)


def _in_windows(job: TensorJob, rows: int, *, keep: bool) -> TensorJob:
    """The same job where nothing changes: most tensors fit as they are."""
    same = (rows, keep) == (job.window_rows, job.keep)
    return job if same else replace(job, window_rows=rows, keep=keep)


def together_bytes(held: int, run: Run) -> int:
    """What a merge holds at most, beside the process itself, if its largest tensor takes `held` bytes: that of loops
    side by side, and results that wait for the disk."""
    loops = max(LOOPS, run.device.count("+") + 1)
    together = max(held, min(loops * held, run.memory))
    return together + waiting_bytes(together, run.memory)


def waiting_bytes(held: int, memory: int) -> int:
    """Bytes of results that may wait for the disk, beside two windows of them, in what is left of a merge's memory: so
    the disk has something to write while only statistics are gathered."""
    return max(0, min(memory - held, MOST_WAITING))


def result_bytes(job: TensorJob, window_rows: int | None = None) -> int:
    """Bytes of the output of one window, of its own or of so many rows."""
    rows = min(window_rows or job.window_rows, job.rows)
    return rows * (ITEM_BYTES[job.dtype] if job.parameters is None else _row_bytes(job)[1])


def device_bytes(job: TensorJob) -> int:
    """Bytes of all inputs of a tensor as they lie on a device."""
    return _row_bytes(job)[0] * job.rows * job.matrices


def window_bytes(job: TensorJob) -> int:
    """Bytes of the inputs and the output of one window."""
    return job.window_rows * sum(_row_bytes(job))


def narrowed(job: TensorJob, nbytes: int) -> TensorJob:
    """The job in windows of at most `nbytes`, as far as its rows and blocks allow it."""
    if job.parameters is None:
        return job
    step = max(1, min(job.block_rows, job.rows))
    rows = max(1, nbytes // max(1, sum(_row_bytes(job)) * step)) * step
    return job if rows >= job.window_rows else replace(job, window_rows=rows)
