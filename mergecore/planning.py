"""MergeSpec + checkpoints -> MergePlan: what is done to each tensor, where its bytes go, what is held in memory.

Everything that can be wrong with a merge is found here, before the first tensor is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash
from pydantic import ValidationError

from mergecore import __version__
from mergecore.architecture import HEAD, Architecture, Orientation, is_tied
from mergecore.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from mergecore.errors import CheckpointError, SpecError
from mergecore.matching import FLOATS, Matching, input_error
from mergecore.methods import METHODS
from mergecore.methods.base import Gram, Keep, Method, Moments, Statistics, TensorView
from mergecore.ops import gram_count
from mergecore.output.layout import OutputLayout, plan_layout
from mergecore.parameters import Parameters
from mergecore.selecting import BLOCK, held_bytes, planned_reads
from mergecore.spec import MergeSpec, Run, Sparsify
from mergecore.spec.problems import near

STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
WINDOW_BYTES = 64 << 20  # inputs and output of one window; larger ones only cost memory
MAX_MODELS = 64  # of one merge: kMaxModels in csrc/kernels.h


@dataclass(frozen=True)
class TensorJob:
    """One output tensor: the inputs, how it is seen as matrices, its parameters and its windows.

    `base` and entries of `models` are None for a bias that this input lacks: zeros. A job without
    `parameters` copies the reference's bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    base: TensorInfo | None
    models: tuple[TensorInfo | None, ...]
    has_base: bool
    matrices: int
    rows: int
    columns: int
    orientation: Orientation
    parameters: Mapping[str, Any] | None
    window_rows: int
    keep: bool
    """Whether the inputs stay mapped between the statistics pass and the blend pass."""
    statistics: Statistics = Statistics.NONE
    sparsify: tuple[Keep, ...] = ()
    """What is kept of each model's deltas in front of the method; empty where everything is."""
    keeps: tuple[Keep, ...] = ()
    """What the method keeps of what is left; empty where it keeps everything."""
    block_rows: int = 1
    """Windows are cut at multiples of it."""

    @property
    def inputs(self) -> tuple[TensorInfo | None, ...]:
        """The tensors that are read: the base first, if the method uses one."""
        return (self.base, *self.models) if self.has_base else self.models

    @property
    def input_bytes(self) -> int:
        return sum(info.nbytes for info in self.inputs if info is not None)

    @property
    def choosing_reads(self) -> int:
        """How often everything is read to tell which deltas are kept."""
        return planned_reads(self.sparsify) + planned_reads(self.keeps)

    @property
    def passes(self) -> int:
        """How often the inputs are read: for what is kept, for statistics, and for the blend or the copy."""
        return self.choosing_reads + int(self.statistics is not Statistics.NONE) + 1

    @property
    def bytes_to_read(self) -> int:
        """Bytes of windows read, every pass counted (all but the first usually come from memory)."""
        return self.input_bytes * self.passes

    def view(
        self,
        moments: Moments | None = None,
        gram: Gram | None = None,
        squares: tuple[float, ...] | None = None,
        shared: tuple[tuple[int, int], ...] | None = None,
    ) -> TensorView:
        """This tensor as its method sees it."""
        assert self.parameters is not None
        return TensorView(len(self.models), len(self.shape) < 2, self.parameters, moments, gram, squares, shared)

    def windows(self) -> Iterator[tuple[int, int]]:
        """(first row, rows) of each window of one matrix, in order."""
        for first in range(0, self.rows, self.window_rows):
            yield first, min(self.window_rows, self.rows - first)


@dataclass(frozen=True)
class MergePlan:
    """A merge, decided to the last byte: jobs in the order they are read, and the output's layout."""

    spec: MergeSpec
    method: Method
    reference: Checkpoint
    """The base, or the first model where there is none: names, config and tokenizer come from it."""
    tokenizer: Checkpoint
    models: tuple[Checkpoint, ...]
    base: Checkpoint | None
    jobs: tuple[TensorJob, ...]
    layout: OutputLayout
    warnings: tuple[str, ...]
    untied_head: bool
    """The output has a head of its own although the reference's config ties it."""

    @property
    def passes(self) -> int:
        """Passes over the inputs, of the tensors that take most."""
        return max((job.passes for job in self.jobs), default=1)

    @property
    def bytes_to_read(self) -> int:
        return sum(job.bytes_to_read for job in self.jobs)

    @property
    def bytes_to_write(self) -> int:
        return self.layout.nbytes

    @property
    def files(self) -> list[Path]:
        """The weight files that are read."""
        return list(dict.fromkeys(info.file for job in self.jobs for info in job.inputs if info is not None))

    @property
    def inputs(self) -> list[Checkpoint]:
        return list({checkpoint.path: checkpoint for checkpoint in (self.reference, *self.models)}.values())

    @property
    def held_bytes(self) -> int:
        """Memory held at most, beside the process itself: windows, output buffers, statistics."""
        return max((_held(job, len(self.models)) for job in self.jobs), default=0)

    def identity(self) -> str:
        """Equal exactly when the output's tensors are equal: spec, inputs and version (hex, 128 bits)."""
        what = [self.spec.identity(), [model.fingerprint() for model in self.inputs], __version__]
        return xxhash.xxh3_128_hexdigest(json.dumps(what, sort_keys=True).encode())


def plan(spec: MergeSpec, *, resolve: Callable[[str], Path] | None = None) -> MergePlan:
    """Plans a merge. `resolve` turns a model's name in the spec into its path (default: spec.resolve).

    Raises SpecError (method, parameters) and CheckpointError (inputs that are missing or do not fit).
    """
    resolve = resolve or spec.resolve
    method = _method(spec)
    opened: dict[str, Checkpoint] = {}

    def open_once(name: str, *keys: str | int) -> Checkpoint:
        path = resolve(name)
        real = os.path.realpath(path)  # the base is the base by whatever name it is listed
        try:
            return opened.setdefault(real, opened.get(real) or open_checkpoint(path))
        except CheckpointError as error:
            raise input_error(spec, keys, str(error)) from error

    base = open_once(spec.base_model, "base_model") if spec.base_model is not None else None
    listed = [open_once(entry.model, "models", i, "model") for i, entry in enumerate(spec.models)]
    # mergekit's rules: the base has no delta; and where models are averaged, a base that is not listed
    # takes part exactly if a weight is set for all.
    members: list[tuple[Checkpoint, int | None]] = [
        (model, i) for i, model in enumerate(listed) if not (method.deltas and base is model)
    ]
    weighted = method.parameter("weight") is None or "weight" in spec.parameters
    if not method.deltas and base is not None and base not in listed and weighted:
        members.append((base, None))
    if not members:
        raise spec.error("every model listed is the base itself: there is nothing to merge", "models")
    if len(members) > MAX_MODELS:
        raise spec.error(f"found {len(members)} models, expected at most {MAX_MODELS}; merge in two steps", "models")
    _check_count(spec, method, len(members))
    reference = base or listed[0]
    source = spec.tokenizer_source
    tokenizer = reference if source in (None, "base") else open_once(str(source), "tokenizer_source")

    models = tuple(model for model, _ in members)
    reads_base = base if method.deltas or spec.sparsify is not None else None
    matching = Matching(spec, reference, members)
    architecture = Architecture.of(reference.config, matching.names, spec.orientation)
    parameters = Parameters(spec, method, architecture, tuple(index for _, index in members))
    jobs = [_job(name, matching, parameters, architecture, spec, method, reads_base) for name in matching.names]
    for job in jobs:
        _check_coefficients(job, method, spec)
    layout = plan_layout([(job.name, job.dtype, job.shape) for job in jobs], spec.run.shard_size)
    return MergePlan(
        spec=spec,
        method=method,
        reference=reference,
        tokenizer=tokenizer,
        models=models,
        base=reads_base,
        jobs=tuple(jobs),
        layout=layout,
        warnings=tuple(matching.warnings),
        untied_head=HEAD in matching.names and is_tied(reference.config, reference.tensors),
    )


def with_run(spec: MergeSpec, **settings: Any) -> MergeSpec:
    """`spec` with some of its `run` replaced (None: as it is), checked as in a spec; raises SpecError."""
    given = {name: value for name, value in settings.items() if value is not None}
    try:
        run = Run.model_validate({**spec.run.model_dump(), **given})
    except ValidationError as error:
        raise SpecError("; ".join(f"{problem['loc'][0]}: {problem['msg']}" for problem in error.errors())) from None
    return spec.model_copy(update={"run": run})


def _check_coefficients(job: TensorJob, method: Method, spec: MergeSpec) -> None:
    """Coefficients that need no statistics are computed once now, so that what is wrong shows before reading."""
    if job.parameters is not None:
        try:
            if method.check is not None:
                method.check(job.view())
            if job.statistics is not Statistics.NONE:
                return
            coefficients = method.coefficients(job.view())
        except ValueError as error:
            raise spec.error(f"{job.name}: {error}", "parameters") from None
        if not coefficients.finite:
            raise spec.error(f"{job.name}: the weights are too large, their products overflow", "parameters")


def _keeps(name: str, view: TensorView, spec: MergeSpec, method: Method) -> tuple[tuple[Keep, ...], tuple[Keep, ...]]:
    """What is kept in front of the method, and by it."""
    before = (_sparsified(spec.sparsify),) * view.models if spec.sparsify is not None else ()
    try:
        chosen = method.keeps(view) if method.keeps is not None else ()
    except ValueError as error:
        raise spec.error(f"{name}: {error}", "parameters") from None
    drops_before, drops = (any(keep.drops for keep in keeps) for keeps in (before, chosen))
    return before if drops_before else (), chosen if drops else ()


def _sparsified(sparsify: Sparsify) -> Keep:
    if sparsify.method == "dare":
        assert sparsify.drop_rate is not None
        return Keep(drop_rate=sparsify.drop_rate, rescale="probability" if sparsify.rescale else "none")
    assert sparsify.density is not None
    outliers = 0.0
    if sparsify.method == "breadcrumbs" and sparsify.density < 1:
        outliers = 0.01 if sparsify.gamma is None else sparsify.gamma
    return Keep(density=sparsify.density, outliers=outliers)


def _method(spec: MergeSpec) -> Method:
    method = METHODS.get(spec.merge_method)
    if method is None:
        raise spec.error(
            f"unknown method {spec.merge_method!r}{near(spec.merge_method, METHODS)}; `mergecore methods` lists them",
            "merge_method",
        )
    if method.deltas and not method.base_optional and spec.base_model is None:
        raise spec.error(f"{method.name} moves away from a base: base_model is missing", "merge_method")
    if spec.sparsify is not None and spec.base_model is None:
        raise spec.error("dropping deltas needs a base: base_model is missing", "sparsify")
    return method


def _check_count(spec: MergeSpec, method: Method, found: int) -> None:
    if method.least <= found and (method.most is None or found <= method.most):
        return
    number = f"{method.least}" if method.least == method.most else f"at least {method.least}"
    beside = " beside the base" if method.deltas and spec.base_model is not None else ""
    raise spec.error(f"{method.name} merges {number} model(s){beside}; found {found}", "models")


def _job(
    name: str,
    matching: Matching,
    parameters: Parameters,
    architecture: Architecture,
    spec: MergeSpec,
    method: Method,
    base: Checkpoint | None,
) -> TensorJob:
    some = matching.any_tensor(name)
    models = tuple(matching.tensor(model, name) for model in matching.models)
    reference = matching.tensor(matching.reference, name)
    if name not in matching.merged:
        source = reference or some
        return TensorJob(
            name=name,
            shape=source.shape,
            dtype=source.dtype,
            base=None,
            models=(source,),
            has_base=False,
            matrices=1,
            rows=source.nbytes,
            columns=1,
            orientation="columns",
            parameters=None,
            window_rows=max(1, min(source.nbytes, WINDOW_BYTES // 4)),
            keep=False,
        )
    wanted = spec.out_dtype or spec.dtype
    dtype = STORED[wanted] if wanted is not None else (reference or some).dtype
    resolved = parameters.of(name)
    view = TensorView(len(models), len(some.shape) < 2, resolved)
    sparsify, keeps = _keeps(name, view, spec, method)
    matrices, rows, columns = architecture.matrices(name, some.shape)
    statistics = method.needs(view)
    if statistics in (Statistics.NONE, Statistics.GRAM, Statistics.SQUARES, Statistics.SHARED):
        # Entries do not know of each other: a window may be cut anywhere, or between blocks.
        matrices, rows, columns = 1, matrices * rows * columns, 1
        if any(keep.whole_rows for keep in keeps) and rows:
            columns = some.shape[-1] if some.shape else 1
            rows //= columns
    elif 0 in some.shape:
        matrices, rows, columns = 1, 0, 1
    orientation = architecture.orientation(name, some.shape)
    if statistics.is_gram:
        orientation = "rows" if statistics is Statistics.ROW_GRAM else "columns"
    in_blocks = planned_reads(sparsify) or planned_reads(keeps) or statistics in (Statistics.GRAM, Statistics.SQUARES)
    job = TensorJob(
        name=name,
        shape=some.shape,
        dtype=dtype,
        base=matching.tensor(base, name) if base is not None else None,
        models=models,
        has_base=base is not None,
        matrices=matrices,
        rows=rows,
        columns=columns,
        orientation=orientation,
        parameters=resolved,
        window_rows=max(1, rows),
        keep=False,
        statistics=statistics,
        sparsify=sparsify,
        keeps=keeps,
        block_rows=-(-BLOCK // columns) if in_blocks else 1,
    )
    return _windowed(job, spec)


def _row_bytes(job: TensorJob) -> tuple[int, int]:
    """Bytes of one row of all inputs, and of the output."""
    inputs = sum(FLOATS[info.dtype] for info in job.inputs if info is not None)
    return job.columns * inputs, job.columns * FLOATS.get(job.dtype, 1)


def _statistics_bytes(job: TensorJob, models: int) -> int:
    entries = job.matrices * job.rows * job.columns
    choosing = max(held_bytes(keeps, entries, job.columns) for keeps in (job.sparsify, job.keeps))
    length = job.columns if job.orientation == "columns" or len(job.shape) < 2 else job.rows
    if job.statistics is Statistics.SQUARES:
        return max(choosing, 48 * models * (entries // BLOCK + 1))
    if job.statistics is Statistics.COLUMNS:
        # Moments twice (totals and the pending tile), then divergences, ranks and scores on the way.
        return choosing + 8 * length * (2 * (1 + 3 * models) + 8 * models)
    if job.statistics.is_gram:
        # Totals, the pending tile, and both triangles; then points and coefficients.
        return choosing + 8 * length * (4 * gram_count(models) + 8 * models)
    return choosing


def _held(job: TensorJob, models: int) -> int:
    if job.parameters is None:
        return 4 * job.window_rows
    inputs, output = (job.window_rows * size for size in _row_bytes(job))
    kept = job.input_bytes // job.matrices if job.keep else 0
    return max(kept, inputs) + inputs + 2 * output + _statistics_bytes(job, models)


def _windowed(job: TensorJob, spec: MergeSpec) -> TensorJob:
    """Two windows of inputs (one in use, one read ahead) and two of output fit the memory beside the statistics."""
    models, memory = len(job.models), spec.run.memory
    inputs, output = _row_bytes(job)
    room = memory - _statistics_bytes(job, models)
    step = max(1, min(job.block_rows, job.rows))
    of_block = 8 * gram_count(models) if job.statistics is Statistics.GRAM else 0
    smallest = 2 * (inputs + output) * step + of_block
    if room < smallest:
        needed = memory - room + smallest
        raise spec.error(
            f"{job.name} {list(job.shape)} needs {needed / 2**20:.1f} MiB for its statistics and one row of "
            f"{models} models, more than the memory allowed ({memory / 2**20:.1f} MiB); raise run.memory or --memory",
            "run",
            "memory",
        )
    rows = min(job.rows, step * max(1, min(room, 2 * WINDOW_BYTES) // smallest))
    windowed = replace(job, window_rows=max(1, rows))
    kept = replace(windowed, keep=job.passes > 1)
    return kept if kept.keep and _held(kept, models) <= memory else windowed
