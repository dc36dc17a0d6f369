"""Merges a spec into a model directory: plan, device, output, and the loop; or several merges that need each other.

How one merge runs is in engine.py, what a sweep is in sweeping.py, how parameters are searched for in evolve.py.
"""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from mergecore.batches import Batch, batched, bytes_of
from mergecore.budget import result_bytes, waiting_bytes
from mergecore.device import Device, open_devices
from mergecore.engine import Merge, Output
from mergecore.errors import SpecError
from mergecore.history import Evolved
from mergecore.inputs import Resolve
from mergecore.output.buffers import ring_bytes
from mergecore.output.stages import Stages, stages_folder
from mergecore.output.writer import OutputWriter
from mergecore.planning import MergePlan, plan, with_run
from mergecore.progress import MergeResult, Progress
from mergecore.relation import unrelated
from mergecore.spec import MergeSpec, load_spec
from mergecore.sweeping import SweepPlan, merge_points, plan_sweep

log = logging.getLogger(__name__)

Show = Callable[[Progress], None]
Planned = MergePlan | SweepPlan
Run = Callable[[Planned, Path, Show | None], MergeResult]

DIRTY, LEAST_DIRTY = 256 << 20, 16 << 20
"""Bytes in the page cache that are not on disk yet: of all outputs together, and of one at least."""
STREAMS, OTHER_FILES = 3, 200
"""Of a loop, each of which may have all inputs open; files that a program has open beside them and the shards."""
MOST_MAPPED = 4000
"""Of the 4,096 files that may be mapped at once (kSlots in csrc/stream/memory.h)."""
LEAST_EACH = 4 << 20
"""Bytes of a tensor's inputs, on average, from which on loops share a CPU: with smaller ones they wait for Python."""
MOST_LANES, CORES_PER_LANE = 4, 4
"""Shards that are written at once, and cores for each of them: writing and checksums may keep two of them busy."""


def merge(
    spec: MergeSpec | str | Path,
    out: str | Path,
    *,
    device: str | None = None,
    memory: int | None = None,
    threads: int | None = None,
    resume: bool = False,
    progress: Show | None = None,
    should_stop: Callable[[], bool] | None = None,
    resolve: Resolve | None = None,
) -> MergeResult:
    """Merges `spec` into the model directory `out`, which must not exist yet (an empty folder may).
    With `evolve` in the spec its parameters are searched for first; with `sweep` it becomes a folder of models.

    `device` (cpu, cuda, cuda:N, cuda:N+M, auto), `memory` (bytes) and `threads` override the spec's `run`;
    `progress` is called after every window, by one thread at a time but not always the same; `should_stop` is asked by
    several. When `should_stop` returns True the merge ends with
    Interrupted, its finished tensors are kept, and `resume=True` continues. `resolve` maps models
    of the spec (path or name, revision) to where they lie. On any other error nothing is left at or beside `out`.
    Errors: mergecore.errors.
    """
    spec = spec if isinstance(spec, MergeSpec) else load_spec(spec)
    spec = with_run(spec, device=device, memory=memory, threads=threads)

    def run(
        spec: MergeSpec, out: Path, *, resume: bool, progress: Show | None, evolved: Evolved | None = None
    ) -> MergeResult:
        planned = replace(plan(spec, resolve=resolve, stages=stages_folder(out)), evolved=evolved)
        return _merge(planned, out, resume, progress, should_stop, told)

    def run_together(merges: Sequence[tuple[MergeSpec, Path]], progress: Show | None) -> int:
        plans = [(plan(spec, resolve=resolve, stages=stages_folder(out)), out) for spec, out in merges]
        with _opened(open_devices(spec.run.device, spec.run.device_memory)) as devices:
            _together(plans, devices, True, progress, should_stop, told)
        return bytes_of([planned.jobs for planned, _ in plans], spec)

    told: set[str] = set()
    with _threads(spec.run.threads):
        if spec.sweep is not None:
            sweep = plan_sweep(spec, resolve=resolve, stages=stages_folder(Path(out)))
            return _merge(sweep, Path(out), resume, progress, should_stop, told)
        if spec.evolve is None:
            return run(spec, Path(out), resume=resume, progress=progress)
        from mergecore.evolve import evolve

        return evolve(
            spec,
            Path(out),
            run,
            run_together,
            resume=resume,
            resolve=resolve,
            progress=progress,
            should_stop=should_stop,
        )


def _merge(
    planned: Planned,
    out: Path,
    resume: bool,
    progress: Show | None,
    should_stop: Callable[[], bool] | None,
    told: set[str],
) -> MergeResult:
    """A planned merge or sweep, after the merges that it needs; warnings that were `told` before are not told again."""
    _warn([*(text for _, earlier in planned.earlier for text in earlier.warnings), *planned.warnings], told)
    # Before the writer: a device that is missing must not cost the work that `resume` would continue.
    opened = open_devices(planned.spec.run.device, planned.spec.run.device_memory)

    def together(merges: Sequence[tuple[MergePlan, Path]], show: Show | None) -> list[MergeResult]:
        return _together(merges, devices, resume, show, should_stop, told)

    def run(planned: Planned, out: Path, show: Show | None) -> MergeResult:
        if isinstance(planned, SweepPlan):
            return merge_points(planned, out, together, resume=resume, progress=show)
        return together([(planned, out)], show)[0]

    with _opened(opened) as devices:
        if not planned.earlier:
            return run(planned, out, progress)
        with Stages(out, resume=resume) as stages:
            return _run_all(planned, out, stages, run, progress)


def _together(
    merges: Sequence[tuple[MergePlan, Path]],
    devices: Sequence[Device],
    resume: bool,
    progress: Show | None,
    should_stop: Callable[[], bool] | None,
    told: set[str],
) -> list[MergeResult]:
    """One merge, or several of the same inputs at once: each to a folder of its own."""
    run = merges[0][0].spec.run
    devices, share, batches = _loops([planned for planned, _ in merges], devices)
    held = len(devices) * max((batch.held_bytes for batch in batches), default=0)
    waiting = waiting_bytes(held, run.memory) // len(merges) // len(devices)
    with ExitStack() as writers:
        outputs = []
        for number, (planned, path) in enumerate(merges):
            strangers = unrelated(planned)
            _warn([*planned.warnings, *strangers], told)
            planned = replace(planned, warnings=(*planned.warnings, *strangers))
            # Of batches of fewer points, too, where some are finished: their windows are larger.
            results = [batch.result_bytes(number) for batch in batches]
            largest = max([*map(result_bytes, planned.jobs), *results], default=0)
            writer = OutputWriter(
                path,
                planned.layout,
                planned.identity(),
                resume=resume,
                direct=run.write == "direct",
                dirty_limit=max(LEAST_DIRTY, DIRTY // len(merges)),
                buffer_bytes=waiting + ring_bytes(2 + max(device.pending for device in devices), largest),
                lanes=_lanes(run.threads, len(merges)),
                rings=[device.new_buffer for device in devices],
            )
            outputs.append(Output(planned, path, writers.enter_context(writer)))
        fit = None
        if outputs[0].plan.data:
            from mergecore.features.fitting import fitted  # and with it transformers

            one = outputs[0]
            fit = fitted(one.plan, one.writer.scratch, devices[0].torch_device, progress, should_stop)
        return Merge(outputs, devices, share, progress, should_stop, fit).run()


def _loops(plans: Sequence[MergePlan], devices: Sequence[Device]) -> tuple[Sequence[Device], int | None, list[Batch]]:
    """The devices of the loops that run side by side, how many bytes each of them may hold (None: as planned), and
    what they do."""
    jobs, spec = [planned.jobs for planned in plans], plans[0].spec
    alone = batched(jobs, spec)
    # What LAPACK makes of a matrix may depend on its threads, which must not depend on what other loops do on the CPU.
    solves = any(job.statistics.is_whole or job.input_grams for planned in jobs for job in planned)
    each = sum(batch.form.input_bytes for batch in alone) // max(1, len(alone))
    threads = 1 if solves or each < LEAST_EACH else torch.get_num_threads()
    side_by_side: list[Device] = [device for device in devices for _ in range(min(device.loops, threads))]
    files = len(side_by_side) * STREAMS * len({path for planned in plans for path in planned.files})
    shards = 2 * sum(len(planned.layout.shards) for planned in plans)
    if len(side_by_side) > 1 and files <= MOST_MAPPED and _may_open(files + shards):
        share = spec.run.memory // len(side_by_side)
        with suppress(SpecError):  # statistics, or a row of all models, need more
            return side_by_side, share, batched(jobs, spec, memory=share)
    return devices[:1], None, alone


def _may_open(files: int) -> bool:
    """Whether so many files more may be open at once; if need be, and as far as it may, this program allows itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = files + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return True
    if hard != resource.RLIM_INFINITY and hard < needed:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return True


@contextmanager
def _opened(devices: Sequence[Device]) -> Iterator[Sequence[Device]]:
    with ExitStack() as stack:
        for device in devices:
            stack.enter_context(device)
        yield devices


def _lanes(threads: int, outputs: int) -> int:
    """Shards of each output that are written at once."""
    return max(1, min(MOST_LANES, (threads or len(os.sched_getaffinity(0))) // CORES_PER_LANE // outputs))


def _warn(warnings: Iterable[str], told: set[str]) -> None:
    for warning in warnings:
        if warning not in told:
            log.warning(warning)
            told.add(warning)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Computes with this many threads; 0: as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run_all(planned: Planned, out: Path, stages: Stages, run: Run, progress: Show | None) -> MergeResult:
    """The merges that `planned` needs, then itself; progress and the result count all of them."""
    merges: list[tuple[Path, Planned]] = [*planned.earlier, (out, planned)]
    total = Progress.start([merge for _, merge in merges])
    done = MergeResult(out, planned.spec.merge_method, 0, 0, 0, 0.0, 0, False, ())
    left = [merge for path, merge in merges if path == out or not stages.is_done(path.name, merge.identity())]
    stages.check_room(sum(merge.bytes_to_write for merge in left))
    for path, merge in merges:
        if all(merge is not each for each in left):
            found = replace(done, tensors=len(merge.jobs), bytes_read=merge.bytes_to_read, seconds=0.0, resumed=True)
            done = replace(found, bytes_written=merge.bytes_to_write, warnings=merge.warnings).after(done)
        else:

            def show(now: Progress, before: MergeResult = done) -> None:
                assert progress is not None
                progress(now.after(before, total))

            done = run(merge, path, show if progress is not None else None).after(done)
    return replace(done, output=out, method=planned.spec.merge_method)
