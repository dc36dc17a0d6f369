"""How long a planned merge takes at least on this machine: its own kernels, timed on a window in memory.

A lower bound: inputs that are not in the page cache and slow disks come on top. Reads no tensor.
"""

from __future__ import annotations

import time

import torch

from mergecore import ops
from mergecore.methods.base import Statistics
from mergecore.planning import MergePlan

ROWS, COLUMNS = 512, 2048
MEASURE_SECONDS = 0.1
SIDE = 384  # of the matrix that is decomposed


def seconds(plan: MergePlan) -> float:
    """Seconds of computing that `plan` needs on the CPU with the threads it asks for."""
    before = torch.get_num_threads()
    torch.set_num_threads(plan.spec.run.threads or before)
    try:
        entries = sum(job.matrices * job.rows * job.columns for job in plan.jobs if job.parameters is not None)
        return entries * _seconds_per_entry(plan) + _decomposing(plan)
    finally:
        torch.set_num_threads(before)


def _seconds_per_entry(plan: MergePlan) -> float:
    models = [torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16) for _ in plan.models]
    base = torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16) if plan.base is not None else None
    out = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16)
    coefficients = torch.ones(len(models), 1, dtype=torch.float64)
    counts = torch.zeros(2, dtype=torch.int64)
    sums = torch.zeros(ops.moment_count(len(models)), COLUMNS, dtype=torch.float64)
    pending = torch.zeros_like(sums)
    products = torch.zeros(ops.gram_count(len(models)), 1, dtype=torch.float64)
    grams = any(job.statistics.is_gram for job in plan.jobs)
    runs = -1
    started = time.perf_counter()
    while runs < 1 or time.perf_counter() - started < MEASURE_SECONDS:
        if runs == 0:  # the first run only warmed up
            started = time.perf_counter()
        if plan.method.statistics is Statistics.COLUMNS:
            ops.column_moments(base, models, sums, pending)
        if grams:
            ops.gram(products, base, models)
        ops.blend(out, base, models, coefficients, counts)
        runs += 1
    return (time.perf_counter() - started) / runs / (ROWS * COLUMNS)


def _decomposing(plan: MergePlan) -> float:
    """Seconds of the singular value decompositions, from that of a small square matrix."""
    whole = [job for job in plan.jobs if job.statistics.is_whole]
    if not whole:
        return 0.0
    matrix = torch.arange(SIDE * SIDE, dtype=torch.float64).sin().view(SIDE, SIDE)
    started = time.perf_counter()
    torch.linalg.svd(matrix, full_matrices=False)
    each = (time.perf_counter() - started) / SIDE**3
    return each * sum(
        job.matrices
        * job.rows
        * job.columns
        * min(job.rows, job.columns)
        * (len(job.models) if job.statistics is Statistics.DELTAS else 1)
        for job in whole
    )
