"""A sweep: a spec with `sweep` -> the plan of every point, and all of them merged into one folder.

What a sweep says is in spec/sweep.py, what its points share in batches.py, where they grow in output/together.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import xxhash

from mergecore import sweep_report as report
from mergecore.batches import Batch, batched, bytes_of
from mergecore.budget import together_bytes
from mergecore.errors import CheckpointError, SpecError
from mergecore.inputs import Inputs, Resolve
from mergecore.jobs import TensorJob
from mergecore.output.together import SweepFolder
from mergecore.planning import MergePlan, plan_all
from mergecore.progress import MergeResult, Progress
from mergecore.references import local_folder
from mergecore.spec import MergeSpec, filled
from mergecore.spec.sweep import Value, names_of

Show = Callable[[Progress], None]
RunTogether = Callable[[Sequence[tuple[MergePlan, Path]], Show | None], list[MergeResult]]
"""Merges several plans of the same inputs at once."""


@dataclass(frozen=True)
class Point:
    """One merge of a sweep: the name of its folder, what it has of its own by dotted path, and its plan."""

    name: str
    values: Mapping[str, Value]
    plan: MergePlan


@dataclass(frozen=True)
class SweepPlan:
    """A sweep, decided to the last byte; bytes and memory are those of all points together."""

    spec: MergeSpec
    points: tuple[Point, ...]

    @cached_property
    def jobs(self) -> tuple[TensorJob, ...]:
        """Those of every point."""
        return tuple(job for point in self.points for job in point.plan.jobs)

    @cached_property
    def batches(self) -> list[Batch]:
        """Which jobs share their reads. SpecError where the memory does not suffice for all outputs."""
        return batched([point.plan.jobs for point in self.points], self.spec)

    @cached_property
    def bytes_to_read(self) -> int:
        """Of the sweep, without earlier merges."""
        return bytes_of([point.plan.jobs for point in self.points], self.spec)

    @property
    def bytes_to_write(self) -> int:
        """Of the sweep, without earlier merges."""
        return sum(point.plan.bytes_to_write for point in self.points)

    @property
    def held_bytes(self) -> int:
        """Memory held at most, beside the process itself: windows, statistics, results that wait for the disk."""
        windows = max((batch.held_bytes for batch in self.batches), default=0)
        return together_bytes(windows, self.spec.run)

    @property
    def earlier(self) -> tuple[tuple[Path, MergePlan], ...]:
        """The merges of the same spec whose results the points read."""
        return self.points[0].plan.earlier

    @property
    def warnings(self) -> tuple[str, ...]:
        """Those of all points, each once."""
        return tuple(dict.fromkeys(text for point in self.points for text in point.plan.warnings))

    @property
    def method(self) -> str:
        """Of the spec; points may have others."""
        return self.spec.merge_method

    def identity(self) -> str:
        """Equal exactly when the points are, with their names and their tensors (hex, 128 bits)."""
        what = [[point.name, point.plan.identity()] for point in self.points]
        return xxhash.xxh3_128_hexdigest(json.dumps(what).encode())


def plan_sweep(spec: MergeSpec, *, resolve: Resolve | None = None, stages: Path = Path(".stages")) -> SweepPlan:
    """Plans every point of a spec with `sweep`, on inputs that are opened once. Raises what planning.plan raises, with
    the name of the point that is at fault."""
    assert spec.sweep is not None
    inputs = Inputs(resolve or partial(local_folder, directory=spec.directory), spec.directory)
    grid = spec.sweep.grid()
    points = [
        Point(name, values, _planned(spec, name, values, inputs, stages))
        for name, values in zip(names_of(grid), grid, strict=True)
    ]
    planned = SweepPlan(spec, tuple(points))
    _ = planned.batches  # what the memory does not suffice for shows now
    return planned


def _planned(spec: MergeSpec, name: str, values: Mapping[str, Value], inputs: Inputs, stages: Path) -> MergePlan:
    try:
        planned = plan_all(filled(spec, values), inputs, stages)
        if planned.data:
            message = (
                f"{planned.method.name} is fitted on samples, which no points share; merge it in a spec of its own"
            )
            raise spec.error(message, "sweep")
    except (SpecError, CheckpointError) as error:
        raise type(error)(f"{error} (point {name} of the sweep)") from error
    return planned


def merge_points(sweep: SweepPlan, out: Path, run: RunTogether, *, resume: bool, progress: Show | None) -> MergeResult:
    """Merges all points into folders of the new folder `out`, which appears when all of them are complete."""
    with SweepFolder(out, sweep.identity(), resume=resume) as folder:
        left = [point for point in sweep.points if not folder.is_done(point.name, point.plan.identity())]
        if not folder.resumed:
            folder.check_room(sweep.bytes_to_write)
        # Models are published when all are complete: where some are left, nothing is read again.
        results = run([(point.plan, folder.path(point.name)) for point in left], progress) if left else []
        result = MergeResult(
            output=out,
            method=sweep.method,
            tensors=len(sweep.jobs),
            bytes_read=max((each.bytes_read for each in results), default=0),
            bytes_written=sweep.bytes_to_write,
            seconds=max((each.seconds for each in results), default=0.0),
            peak_rss=max((each.peak_rss for each in results), default=0),
            resumed=folder.resumed,
            warnings=tuple(dict.fromkeys(text for each in results for text in each.warnings)),
        )
        folder.publish([point.name for point in sweep.points], report.manifest(sweep, result), report.card(sweep))
    return result
