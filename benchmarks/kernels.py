"""The kernels alone against the memory's own speed, in one run.

    python -m benchmarks.kernels [--models 2] [--threads 2] [--device cpu] [--json [FILE]]

Floors: reading (sum of a buffer far larger than the caches) and copying. Bandwidths count the bytes
that must move: every input once, and the output once. Rounds alternate; the table shows each one's best.
On a CPU inputs begin 8 bytes beyond a cache line, as they may in files.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.reporting import add_json, tell
from mergecore import ops

ROWS, COLUMNS = 16_384, 4096  # 128 MiB a tensor in bf16
ROUNDS = 7
LAUNCHES = 10


def measure(models: int, device: torch.device) -> dict[str, float]:
    """GB/s of floors and kernels on `models` bf16 models and a base; the best of several rounds."""
    generator = torch.Generator(device).manual_seed(0)
    base = (0.02 * torch.randn(ROWS, COLUMNS, generator=generator, device=device)).bfloat16()
    shifts = 0.003 * torch.randn(models, COLUMNS, generator=generator, device=device)
    tensors = [(base + shift).bfloat16() for shift in shifts]
    if device.type == "cpu":  # on a GPU windows are copies, which begin with a line
        base, *tensors = map(_as_mapped, (base, *tensors))
    out = torch.empty_like(base)
    per_column = torch.rand(models, COLUMNS, dtype=torch.float64, device=device)
    per_tensor = per_column[:, :1].contiguous()
    half, decimal = (torch.full_like(per_tensor, weight) for weight in (0.5, 0.3))  # exact ties are common
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    sums = torch.zeros(ops.moment_count(models), COLUMNS, dtype=torch.float64, device=device)
    pending = torch.zeros_like(sums)
    row_sums = torch.zeros(ops.moment_count(models), ROWS, dtype=torch.float64, device=device)
    drops = [ops.Drop.of(0.5, True, seed=0, tensor="t", model=n) for n in range(models)]
    gradient = torch.randn(ROWS, COLUMNS, generator=generator, device=device)  # float32: twice the bytes
    by_column, open_tile = torch.zeros(2, models, COLUMNS, dtype=torch.float64, device=device).unbind()
    by_row = torch.zeros(models, ROWS, dtype=torch.float64, device=device)
    scaled = torch.empty_like(gradient)
    words = base.view(torch.int64)
    size = base.numel() * 2
    runs: dict[str, tuple[Callable[[], object], int]] = {
        "read (floor)": (lambda: torch.sum(words), size),
        "copy (floor)": (lambda: out.copy_(base), 2 * size),
        "column moments": (lambda: ops.column_moments(base, tensors, sums, pending), (models + 1) * size),
        "row moments": (lambda: ops.row_moments(base, tensors, row_sums), (models + 1) * size),
        "blend, per tensor": (lambda: ops.blend(out, base, tensors, per_tensor, counts), (models + 2) * size),
        "blend, weight 0.5": (lambda: ops.blend(out, base, tensors, half, counts), (models + 2) * size),
        "blend, weight 0.3": (lambda: ops.blend(out, base, tensors, decimal, counts), (models + 2) * size),
        "blend, per column": (
            lambda: ops.blend(out, base, tensors, per_column, counts, axis=ops.Axis.COLUMNS),
            (models + 2) * size,
        ),
        "scaled sum, float32": (
            lambda: ops.blend(scaled, None, tensors, per_column, counts, axis=ops.Axis.COLUMNS),
            (models + 2) * size,
        ),
        "gradient by column": (
            lambda: ops.column_gradient(gradient, None, tensors, by_column, open_tile),
            (models + 2) * size,
        ),
        "gradient by row": (lambda: ops.row_gradient(gradient, None, tensors, by_row), (models + 2) * size),
        "blend, DARE": (lambda: ops.blend(out, base, tensors, per_tensor, counts, drops=drops), (models + 2) * size),
    }
    clock = _seconds if device.type == "cpu" else _gpu_seconds
    best = dict.fromkeys(runs, 0.0)
    for _ in range(ROUNDS):
        for name, (run, nbytes) in runs.items():
            best[name] = max(best[name], nbytes / clock(run) / 1e9)
    return best


def _as_mapped(tensor: Tensor) -> Tensor:
    """The same at 8 bytes beyond a cache line: in files tensors begin at multiples of 8."""
    room = torch.empty(tensor.numel() + 4, dtype=tensor.dtype)
    return room[4:].view_as(tensor).copy_(tensor)


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _gpu_seconds(run: Callable[[], object]) -> float:
    """Of one of several launches in a row, by the GPU's own events: launching is not part of it."""
    started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    run()
    started.record()
    for _ in range(LAUNCHES):
        run()
    ended.record()
    ended.synchronize()
    return started.elapsed_time(ended) / 1000 / LAUNCHES


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    add_json(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = measure(options.models, torch.device(options.device))
    table = Table(f"kernel ({options.models} models, {options.threads} threads)", "GB/s", "share of copying")
    for name, speed in results.items():
        table.add_row(name, f"{speed:.1f}", f"{speed / results['copy (floor)']:.0%}")
    about = {"models": options.models, "threads": options.threads, "device": options.device}
    tell(options, about | {"GB/s": results}, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
