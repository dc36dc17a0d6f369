"""MergeSpec + checkpoints -> MergePlan: what is done to each tensor, where its bytes go, what is held in memory.

Everything that can be wrong with a merge is found here, before the first tensor is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import xxhash
from pydantic import ValidationError

from mergecore import __version__
from mergecore.accounting import Account, accounts
from mergecore.architecture import Architecture, Orientation, is_linear, is_tied
from mergecore.checkpoint import TensorInfo
from mergecore.embeddings import Embeddings
from mergecore.errors import SpecError
from mergecore.inputs import Input, Inputs, Resolve
from mergecore.matching import FLOATS, Matching, listed
from mergecore.methods import METHODS
from mergecore.methods.base import Coefficients, Keep, Method, Statistics, TensorView, per_model
from mergecore.methods.selection import complement
from mergecore.ops import gram_count
from mergecore.output.config import output_config
from mergecore.output.layout import ITEM_BYTES, OutputLayout, plan_layout
from mergecore.parameters import check_parameters, parameters_of
from mergecore.references import local_folder
from mergecore.sections import Member, Section, Slot, input_error, models_of, open_sections
from mergecore.selecting import BLOCK, held_bytes, planned_reads
from mergecore.sources import Source, Stored, files_of, scratch_bytes, stored_dtype
from mergecore.spec import MergeSpec, Run, Sparsify
from mergecore.spec.problems import near
from mergecore.vocabulary import Vocabulary

STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
MODEL_BLOCKS = 1 << 16  # in which ties are counted where the whole model is compared
WINDOW_BYTES = 64 << 20  # inputs and output of one window; larger ones only cost memory
CARRY = Method(
    name="carry",
    summary="the tensor itself",
    reference="",
    coefficients=lambda view: Coefficients(per_model([1.0])),
    deltas=False,
)
"""Of tensors that one model alone has."""


@dataclass(frozen=True)
class TensorJob:
    """One output tensor: the inputs, how it is seen as matrices, its parameters and its windows.

    `base` and entries of `models` are None for a bias that this input lacks: zeros. A job without
    `parameters` copies the reference's bytes.
    """

    name: str
    method: Method
    shape: tuple[int, ...]
    dtype: str
    base: Source | None
    models: tuple[Source | None, ...]
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
    thinned: tuple[Keep, ...] = ()
    """What is kept by rank within rows, in the place of `sparsify`: windows hold what is left."""
    block_rows: int = 1
    """Windows are cut at multiples of it."""
    scope: str = "tensor"
    """`model`: all tensors of this scope are read together before the first blend, but for their own blends."""
    place: float = 0.0
    """Where its layer stands in the model, from 0 to 1."""
    is_linear: bool = False

    @property
    def inputs(self) -> tuple[Source | None, ...]:
        """The tensors that are read: the base first, if the method uses one."""
        return (self.base, *self.models) if self.has_base else self.models

    def sources(self) -> Iterator[Source]:
        """The inputs that are read."""
        yield from (source for source in self.inputs if source is not None)

    @property
    def merges(self) -> bool:
        """Whether a method computes it; otherwise it is taken from one model as it is."""
        return self.parameters is not None and self.method is not CARRY

    @property
    def input_bytes(self) -> int:
        return sum(source.nbytes for source in self.sources())

    @property
    def choosing_reads(self) -> int:
        """How often everything is read to tell which deltas are kept."""
        return planned_reads(self.sparsify) + planned_reads(self.keeps)

    @property
    def surveyed_reads(self) -> int:
        """How many of the passes are taken before the first tensor is blended."""
        return self.passes - 1 if self.scope == "model" else 0

    @property
    def passes(self) -> int:
        """How often the inputs are read: for what is kept, for statistics, and for the blend or the copy."""
        return self.choosing_reads + int(self.statistics is not Statistics.NONE) + 1

    @property
    def bytes_to_read(self) -> int:
        """Bytes of windows read, every pass counted (all but the first usually come from memory)."""
        return self.input_bytes * self.passes

    def view(self, **statistics: Any) -> TensorView:
        """This tensor as its method sees it, with the statistics of TensorView that are given."""
        assert self.parameters is not None
        return TensorView(
            models=len(self.models),
            is_vector=len(self.shape) < 2,
            parameters=self.parameters,
            place=self.place,
            is_linear=self.is_linear,
            **statistics,
        )

    def windows(self) -> Iterator[tuple[int, int]]:
        """(first row, rows) of each window of one matrix, in order."""
        for first in range(0, self.rows, self.window_rows):
            yield first, min(self.window_rows, self.rows - first)


@dataclass(frozen=True)
class MergePlan:
    """A merge, decided to the last byte: jobs in the order they are read, and the output's layout."""

    spec: MergeSpec
    method: Method
    reference: Input
    """The base, or the first model where there is none: names, config and tokenizer come from it."""
    tokenizer: Mapping[str, bytes | Path]
    """The output's tokenizer files, by name."""
    vocabulary: Vocabulary | None
    sections: tuple[Section, ...]
    models: tuple[Input, ...]
    base: Input | None
    jobs: tuple[TensorJob, ...]
    layout: OutputLayout
    warnings: tuple[str, ...]
    accounts: tuple[Account, ...]
    """What becomes of the tensors of every input."""
    config: Mapping[str, Any]
    """The output's config.json; empty if the reference has none."""
    earlier: tuple[tuple[Path, MergePlan], ...] = ()
    """The merges of the same spec whose results this one reads, and where those lie meanwhile; in order."""

    @property
    def passes(self) -> int:
        """Passes over the inputs, of the tensors that take most."""
        return max((job.passes for job in self.jobs), default=1)

    @property
    def bytes_to_read(self) -> int:
        """Of this merge, without earlier ones."""
        return sum(job.bytes_to_read for job in self.jobs)

    @property
    def bytes_to_write(self) -> int:
        """Of this merge, without earlier ones."""
        return self.layout.nbytes

    @property
    def files(self) -> list[Path]:
        """The files that are read."""
        return list(dict.fromkeys(file for job in self.jobs for source in job.sources() for file in files_of(source)))

    @property
    def inputs(self) -> list[Input]:
        return [account.model for account in self.accounts]

    @property
    def held_bytes(self) -> int:
        """Memory held at most, beside the process itself: windows, output buffers, statistics."""
        return max(map(_held, self.jobs), default=0)

    def identity(self) -> str:
        """Equal exactly when the output's tensors are equal: spec, inputs and version (hex, 128 bits)."""
        rows = None if self.vocabulary is None else self.vocabulary.digest()
        what = [self.spec.identity(), [model.fingerprint() for model in self.inputs], rows, __version__]
        return xxhash.xxh3_128_hexdigest(json.dumps(what, sort_keys=True).encode())


def plan(spec: MergeSpec, *, resolve: Resolve | None = None, stages: Path = Path(".stages")) -> MergePlan:
    """Plans a merge. `resolve` turns a model's path or name, and its revision, in the spec into where it lies.

    The results of earlier merges of the same spec shall lie below `stages`. Raises SpecError (method, parameters)
    and CheckpointError (inputs that are missing or do not fit).
    """
    inputs = Inputs(resolve or partial(local_folder, directory=spec.directory), spec.directory)
    earlier = []
    for needed in spec.earlier:
        assert needed.name is not None
        path = stages / needed.name
        planned = _plan(needed, inputs, [])
        inputs.add(needed.name, _result(planned, path))
        earlier.append((path, planned))
    return _plan(spec, inputs, earlier)


def _result(planned: MergePlan, path: Path) -> Input:
    """What a merge will have made at `path`, as the input of another one."""
    tensors: dict[str, Source] = {}
    for job in planned.jobs:
        slot = planned.layout.slots[job.name]
        file = path / planned.layout.shards[slot.shard].filename
        tensors[job.name] = Stored(TensorInfo(job.name, job.dtype, job.shape, file, slot.offset, slot.nbytes))
    if planned.vocabulary is None:  # the tokenizer's files are there already
        folders = [file.parent for file in planned.tokenizer.values() if isinstance(file, Path)]
        tokenizer = folders[0] if folders else None
    else:
        tokenizer = path
    return Input(path.name, path, dict(planned.config), tensors, identity=planned.identity(), tokenizer=tokenizer)


def _plan(spec: MergeSpec, inputs: Inputs, earlier: Sequence[tuple[Path, MergePlan]]) -> MergePlan:
    method = _method(spec)
    sections = open_sections(spec, method, inputs)
    check_parameters(spec, method, sections)
    first = sections[0]
    base = first.reference if first.part.base_model is not None else None
    embeddings = Embeddings(spec, models_of(sections), base, inputs)
    matching = Matching(spec, sections, embeddings)
    reference = matching.reference
    shapes = {slot.name: matching.any_tensor(slot).shape for slot in matching.slots}
    architecture = Architecture.of(reference.config, matching.names, spec.orientation, shapes)
    jobs = [_job(slot, matching, architecture, spec, method) for slot in matching.slots]
    for job in jobs:
        _check_coefficients(job, spec)
    _check_scope(jobs, spec)
    layout = plan_layout([(job.name, job.dtype, job.shape) for job in jobs], spec.run.shard_size)
    untied_head = matching.head in matching.names and is_tied(reference.config, reference.tensors)
    config = output_config(reference.config, spec, sections, untied_head=untied_head)
    inventory = accounts(matching.models, sections, jobs, matching.zeros)
    unused = [
        f"{account.model.path}: {len(account.unused)} tensors end up in nothing: {listed(account.unused)}"
        for account in inventory
        if account.unused
    ]
    models = tuple(dict.fromkeys(member.model for section in sections for member in section.members))
    based = [section.base.model for section in sections if section.base is not None]
    return MergePlan(
        spec=spec,
        method=method,
        reference=reference,
        tokenizer=embeddings.files,
        vocabulary=embeddings.vocabulary,
        sections=tuple(sections),
        models=models,
        base=based[0] if based else None,
        jobs=tuple(jobs),
        layout=layout,
        warnings=(*matching.warnings, *unused),
        accounts=inventory,
        config=config if embeddings.vocabulary is None else embeddings.vocabulary.configured(config),
        earlier=tuple(earlier),
    )


def with_run(spec: MergeSpec, **settings: Any) -> MergeSpec:
    """`spec` with some of its `run` replaced (None: as it is), checked as in a spec; raises SpecError."""
    given = {name: value for name, value in settings.items() if value is not None}
    try:
        run = Run.model_validate({**spec.run.model_dump(), **given})
    except ValidationError as error:
        raise SpecError("; ".join(f"{problem['loc'][0]}: {problem['msg']}" for problem in error.errors())) from None
    return spec.model_copy(update={"run": run})


def _check_coefficients(job: TensorJob, spec: MergeSpec) -> None:
    """Coefficients that need no statistics are computed once now, so that what is wrong shows before reading."""
    if job.parameters is not None:
        try:
            if job.method.check is not None:
                job.method.check(job.view())
            if job.statistics is not Statistics.NONE:
                return
            coefficients = job.method.coefficients(job.view())
        except ValueError as error:
            raise spec.error(f"{job.name}: {error}", "parameters") from None
        if not coefficients.finite:
            raise spec.error(f"{job.name}: the weights are too large, their products overflow", "parameters")


def _check_scope(jobs: Sequence[TensorJob], spec: MergeSpec) -> None:
    """What is kept of a whole model is one share, of the deltas as they are."""
    together = [job for job in jobs if job.scope == "model" and job.keeps]
    if together and spec.sparsify is not None:
        raise spec.error("scope: model compares deltas as they are: remove sparsify, or set scope: tensor", "sparsify")
    other = next((job for job in together if job.keeps != together[0].keeps), None)
    if other is not None:
        raise spec.error(
            f"scope: model keeps one share of the whole model, but {together[0].name} and {other.name} differ in "
            "theirs; give every tensor the same, or set scope: tensor",
            "parameters",
        )


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
        return Keep(drop_rate=sparsify.drop_rate, rescale="none" if sparsify.rescale is False else "probability")
    assert sparsify.density is not None
    if sparsify.method == "della":
        drops = sparsify.density < 1
        return Keep(
            drop_rate=complement(sparsify.density),
            epsilon=0.0 if not drops else 0.15 if sparsify.epsilon is None else sparsify.epsilon,
            rescale="none" if sparsify.rescale is False or not drops else "probability",
        )
    outliers = 0.0
    if sparsify.method == "breadcrumbs" and sparsify.density < 1:
        outliers = 0.01 if sparsify.gamma is None else sparsify.gamma
    return Keep(density=sparsify.density, outliers=outliers, rescale="l1" if sparsify.rescale else "none")


def _method(spec: MergeSpec) -> Method:
    method = METHODS.get(spec.merge_method)
    if method is None:
        raise spec.error(
            f"unknown method {spec.merge_method!r}{near(spec.merge_method, METHODS)}; `mergecore methods` lists them",
            "merge_method",
        )
    bases = [part.base_model for part in spec.parts()]
    if method.deltas and not method.base_optional and None in bases:
        raise spec.error(f"{method.name} moves away from a base: base_model is missing", "merge_method")
    if spec.sparsify is not None and None in bases:
        raise spec.error("dropping deltas needs a base: base_model is missing", "sparsify")
    return method


def _job(slot: Slot, matching: Matching, architecture: Architecture, spec: MergeSpec, method: Method) -> TensorJob:
    name, some = slot.name, matching.any_tensor(slot)
    if name not in matching.merged:
        return _copy(name, matching.tensor(Member(matching.reference, None), slot) or some)
    method, base, members = _taking_part(slot, matching, method)
    models = tuple(matching.tensor(member, slot) for member in members)
    dtype = _out_dtype(spec, some, matching.reference.config)
    resolved = parameters_of(spec, method, slot, members)
    linear = is_linear(name, some.shape)
    view = TensorView(len(models), len(some.shape) < 2, resolved, place=slot.place, is_linear=linear)
    sparsify, keeps = _keeps(name, view, spec, method) if base is not None else ((), ())
    by_row = any(keep.by_row for keep in sparsify)
    matrices, rows, columns = architecture.matrices(name, some.shape)
    statistics = method.needs(view)
    if statistics in (Statistics.NONE, Statistics.GRAM, Statistics.SQUARES, Statistics.SHARED):
        # Entries do not know of each other: a window may be cut anywhere, or between blocks.
        matrices, rows, columns = 1, matrices * rows * columns, 1
        if rows and (by_row or any(keep.whole_rows for keep in keeps)):
            columns = some.shape[-1] if some.shape else 1
            rows //= columns
    elif 0 in some.shape:
        matrices, rows, columns = 1, 0, 1
    orientation = architecture.orientation(name, some.shape)
    if statistics.is_gram:
        orientation = "rows" if statistics is Statistics.ROW_GRAM else "columns"
    in_blocks = (
        (not by_row and planned_reads(sparsify))
        or planned_reads(keeps)
        or statistics in (Statistics.GRAM, Statistics.SQUARES)
    )
    job = TensorJob(
        name=name,
        method=method,
        shape=some.shape,
        dtype=dtype,
        base=matching.tensor(base, slot) if base is not None else None,
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
        sparsify=() if by_row else sparsify,
        keeps=keeps,
        thinned=sparsify if by_row else (),
        block_rows=-(-BLOCK // columns) if in_blocks else 1,
        scope=resolved.get("scope", "tensor")
        if planned_reads(keeps) or statistics is not Statistics.NONE
        else "tensor",
        place=slot.place,
        is_linear=linear,
    )
    return _windowed(job, spec)


def _out_dtype(spec: MergeSpec, source: Source, config: Mapping[str, Any]) -> str:
    """What the spec asks for; else as the input is stored; else, if that is float8, what its config computes in."""
    configured = str(config.get("dtype", config.get("torch_dtype")))
    wanted = spec.out_dtype or spec.dtype
    if wanted is None and stored_dtype(source) in STORED.values():
        return str(stored_dtype(source))
    return STORED.get(wanted or configured, "F32")


def _copy(name: str, source: Source) -> TensorJob:
    """A tensor of whole numbers, as it is."""
    entries = math.prod(source.shape)
    item = source.nbytes // max(1, entries)
    return TensorJob(
        name=name,
        method=CARRY,
        shape=source.shape,
        dtype=source.dtype,
        base=None,
        models=(source,),
        has_base=False,
        matrices=1,
        rows=entries,
        columns=1,
        orientation="columns",
        parameters=None,
        window_rows=max(1, min(entries, WINDOW_BYTES // 4 // max(1, item))),
        keep=False,
    )


def _taking_part(slot: Slot, matching: Matching, method: Method) -> tuple[Method, Member | None, list[Member]]:
    """The method, the base and the members of one tensor. Towers that few models have are merged by those, or are
    taken from the one that has them."""
    section = slot.section
    there = [member for member in section.everyone() if matching.takes_part(member, slot)]
    base = section.base if section.base in there else None
    members = [member for member in section.members if member in there]
    if len(members) == len(section.members) and base is section.base:
        return method, base, members
    if not there:
        return CARRY, None, [Member(matching.reference, None)]
    if section.base is not None and base is None and len(members) > 1:
        raise input_error(
            matching.spec,
            section.part.base_keys,
            f"{section.base.model.path} lacks {slot.name}, which {len(members)} models have: there is no base to "
            "take their differences from; list only one of them, or name a base that has it",
        )
    if len(members) < method.least or (section.base is not None and base is None):
        return CARRY, None, [base] if base is not None else members[:1]
    return method, base, members


def _row_bytes(job: TensorJob) -> tuple[int, int]:
    """Bytes of one row of all inputs, and of the output. What is derived while it streams is made in float64."""
    inputs = sum(FLOATS[each.dtype] if isinstance(each, Stored) else 3 * FLOATS["F64"] for each in job.sources())
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
        return choosing + 8 * length * (2 * (1 + 3 * models) + 8 * models)
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


def _beside_bytes(job: TensorJob) -> int:
    """What is held beside the windows."""
    return _statistics_bytes(job) + max(map(scratch_bytes, job.sources()), default=0)


def _held(job: TensorJob) -> int:
    if job.parameters is None:
        return 4 * job.window_rows * ITEM_BYTES[job.dtype]
    inputs, output = (job.window_rows * size for size in _row_bytes(job))
    kept = job.input_bytes // job.matrices if job.keep else 0
    return max(kept, inputs) + inputs + 2 * output + _beside_bytes(job)


def _windowed(job: TensorJob, spec: MergeSpec) -> TensorJob:
    """Two windows of inputs (one in use, one read ahead) and two of output fit the memory beside the statistics."""
    models, memory = len(job.models), spec.run.memory
    inputs, output = _row_bytes(job)
    room = memory - _beside_bytes(job)
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
    kept = replace(windowed, keep=job.passes > 1 and job.scope == "tensor")
    return kept if kept.keep and _held(kept) <= memory else windowed
