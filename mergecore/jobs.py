"""What is done to one tensor: which models take part, how it is seen as matrices, what is kept, what is read.

From a slot to a TensorJob. How large its windows are is budget.py's affair; the whole merge is planning.py's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mergecore.architecture import Architecture, Orientation, is_linear
from mergecore.gathered import Statistics as GatheredStatistics
from mergecore.matching import Matching
from mergecore.methods.base import Coefficients, Gathered, Keep, Method, Statistics, TensorView, per_model
from mergecore.methods.selection import complement
from mergecore.parameters import parameters_of
from mergecore.sections import Member, Slot, input_error
from mergecore.selecting import BLOCK, planned_reads
from mergecore.sources import Source, stored_dtype
from mergecore.spec import MergeSpec, Sparsify

STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
MODEL_BLOCKS = 1 << 16  # in which ties are counted where the whole model is compared
PIECE = 1 << 18  # entries that are computed at once in float64
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
    method: Method = field(repr=False)
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
    is_transposed: bool = False
    beside: tuple[Source, ...] = ()
    """Gathered.FISHER of every model: read along with the models, window by window."""
    input_grams: tuple[Source, ...] = ()
    """Gathered.INPUTS of every model: read whole before the tensor."""

    @cached_property
    def inputs(self) -> tuple[Source | None, ...]:
        """The tensors whose windows are read: the base first, if the method uses one."""
        return ((self.base,) if self.has_base else ()) + self.models + self.beside

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """The inputs that are read in windows."""
        return tuple(source for source in self.inputs if source is not None)

    @property
    def everything(self) -> tuple[Source, ...]:
        """All that is read."""
        return self.sources + self.input_grams

    @property
    def merges(self) -> bool:
        """Whether a method computes it; otherwise it is taken from one model as it is."""
        return self.parameters is not None and self.method is not CARRY

    @property
    def elects(self) -> bool:
        """Whether the method ends in an Election."""
        return self.parameters is not None and self.method.keeps is not None

    @cached_property
    def input_bytes(self) -> int:
        return sum(source.nbytes for source in self.sources)

    @cached_property
    def choosing_reads(self) -> int:
        """How often everything is read to tell which deltas are kept."""
        return planned_reads(self.sparsify) + planned_reads(self.keeps)

    @cached_property
    def surveyed_reads(self) -> int:
        """How many of the passes are taken before the first tensor is blended."""
        return self.passes - 1 if self.scope == "model" else 0

    @cached_property
    def passes(self) -> int:
        """How often the inputs are read: for what is kept, for statistics, and for the blend or the copy."""
        return self.choosing_reads + int(self.statistics.is_read) + 1

    @cached_property
    def bytes_to_read(self) -> int:
        """Bytes of windows read, every pass counted (all but the first usually come from memory)."""
        return self.input_bytes * self.passes + sum(gram.nbytes for gram in self.input_grams)

    def view(self, **statistics: Any) -> TensorView:
        """This tensor as its method sees it, with the statistics of TensorView that are given."""
        assert self.parameters is not None
        return TensorView(
            models=len(self.models),
            is_vector=len(self.shape) < 2,
            parameters=self.parameters,
            place=self.place,
            is_linear=self.is_linear,
            is_gathered=bool(self.beside or self.input_grams),
            is_transposed=self.is_transposed,
            **statistics,
        )

    def windows(self) -> Iterator[tuple[int, int]]:
        """(first row, rows) of each window of one matrix, in order."""
        for first in range(0, self.rows, self.window_rows):
            yield first, min(self.window_rows, self.rows - first)


def job_of(
    slot: Slot,
    matching: Matching,
    architecture: Architecture,
    spec: MergeSpec,
    method: Method,
    gathered: GatheredStatistics,
) -> TensorJob:
    """The job of a slot, in one window. Raises SpecError for parameters, CheckpointError for a base that is missing."""
    name, some = slot.name, matching.any_tensor(slot)
    if name not in matching.merged:
        return _copy(name, matching.tensor(Member(matching.reference, None), slot) or some)
    method, base, members = _taking_part(slot, matching, method)
    models = tuple(matching.tensor(member, slot) for member in members)
    dtype = _out_dtype(spec, some, matching.reference.config)
    resolved = parameters_of(spec, method, slot, members)
    linear = is_linear(name, some.shape)
    transposed = architecture.is_transposed(name, some.shape)
    found: tuple[Source, ...] = ()
    if method.gathered is not None:
        found = tuple(gathered.of(slot, members, some.shape, transposed=transposed))
    beside, input_grams = ((), found) if method.gathered is Gathered.INPUTS else (found, ())
    view = TensorView(
        len(models),
        len(some.shape) < 2,
        resolved,
        place=slot.place,
        is_linear=linear,
        is_gathered=bool(found),
        is_transposed=transposed,
    )
    sparsify, keeps = _keeps(name, view, spec, method) if base is not None else ((), ())
    by_row = any(keep.by_row for keep in sparsify)
    matrices, rows, columns = architecture.matrices(name, some.shape)
    statistics = method.needs(view)
    if input_grams:
        pass  # rows are needed whole
    elif statistics in (Statistics.NONE, Statistics.GRAM, Statistics.SQUARES, Statistics.SHARED):
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
    return TensorJob(
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
        block_rows=-(-BLOCK // columns) if in_blocks else max(1, PIECE // columns) if input_grams else 1,
        scope=resolved.get("scope", "tensor")
        if planned_reads(keeps) or statistics is not Statistics.NONE
        else "tensor",
        place=slot.place,
        is_linear=linear,
        is_transposed=transposed,
        beside=beside,
        input_grams=input_grams,
    )


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
