"""Merges a spec into a model directory: plan, device, output, and the loop; or several merges that need each other.

How one merge runs is in engine.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from mergecore.device import open_device
from mergecore.engine import Merge
from mergecore.inputs import Resolve
from mergecore.output.stages import Stages, stages_folder
from mergecore.output.writer import OutputWriter
from mergecore.planning import MergePlan, plan, with_run
from mergecore.progress import MergeResult, Progress
from mergecore.relation import unrelated
from mergecore.spec import MergeSpec, load_spec

log = logging.getLogger(__name__)

Show = Callable[[Progress], None]
Run = Callable[[MergePlan, Path, Show | None], MergeResult]


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

    `device` (cpu, cuda, cuda:N, auto), `memory` (bytes) and `threads` override the spec's `run`;
    `progress` is called after every window; when `should_stop` returns True the merge ends with
    Interrupted, its finished tensors are kept, and `resume=True` continues. `resolve` maps models
    of the spec (path or name, revision) to where they lie. On any other error nothing is left at or beside `out`.
    Errors: mergecore.errors.
    """
    spec = spec if isinstance(spec, MergeSpec) else load_spec(spec)
    spec = with_run(spec, device=device, memory=memory, threads=threads)
    out = Path(out)
    planned = plan(spec, resolve=resolve, stages=stages_folder(out))
    for warning in (*(text for _, earlier in planned.earlier for text in earlier.warnings), *planned.warnings):
        log.warning(warning)
    # Before the writer: a device that is missing must not cost the work that `resume` would continue.
    computing = open_device(spec.run.device)

    def run(planned: MergePlan, out: Path, show: Show | None) -> MergeResult:
        strangers = unrelated(planned)
        for warning in strangers:
            log.warning(warning)
        planned = replace(planned, warnings=(*planned.warnings, *strangers))
        with OutputWriter(out, planned.layout, planned.identity(), resume=resume) as writer:
            fit = None
            if planned.data:
                from mergecore.features.fitting import fitted  # and with it transformers

                fit = fitted(planned, writer.scratch, computing.torch_device, show, should_stop)
            return Merge(planned, out, writer, computing, show, should_stop, fit).run()

    with _threads(spec.run.threads):
        if not planned.earlier:
            return run(planned, out, progress)
        with Stages(out, resume=resume) as stages:
            return _run_all(planned, out, stages, run, progress)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Computes with this many threads; 0: as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run_all(planned: MergePlan, out: Path, stages: Stages, run: Run, progress: Show | None) -> MergeResult:
    """The merges that `planned` needs, then itself; progress and the result count all of them."""
    merges = [*planned.earlier, (out, planned)]
    total = Progress(
        tensors_done=0,
        tensors_total=sum(len(merge.jobs) for _, merge in merges),
        bytes_read=0,
        bytes_read_total=sum(merge.bytes_to_read for _, merge in merges),
        bytes_written=0,
        bytes_written_total=sum(merge.bytes_to_write for _, merge in merges),
        seconds=0.0,
    )
    done = MergeResult(out, planned.method.name, 0, 0, 0, 0.0, 0, False, ())
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
    return replace(done, output=out, method=planned.method.name)
