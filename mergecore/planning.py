"""MergeSpec + checkpoints -> MergePlan: what is done to each tensor, where its bytes go, what is held in memory.

Everything that can be wrong with a merge is found here, before the first tensor is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xxhash
from pydantic import ValidationError

from mergecore import __version__
from mergecore.accounting import Account, accounts
from mergecore.architecture import Architecture, is_tied
from mergecore.budget import held, together_bytes, windowed
from mergecore.checkpoint import TensorInfo
from mergecore.embeddings import Embeddings
from mergecore.errors import CheckpointError, SpecError
from mergecore.gathered import Statistics as GatheredStatistics
from mergecore.history import Evolved
from mergecore.inputs import Input, Inputs, Resolve
from mergecore.jobs import TensorJob, job_of
from mergecore.matching import Matching, listed
from mergecore.methods import METHODS
from mergecore.methods.base import Method, Statistics
from mergecore.output.config import output_config
from mergecore.output.layout import OutputLayout, plan_layout
from mergecore.parameters import check_parameters
from mergecore.references import local_folder
from mergecore.scoring import check_score
from mergecore.sections import Section, models_of, open_sections
from mergecore.sources import Source, Stored, files_of
from mergecore.spec import Evolve, MergeSpec, Run, filled, keys_of
from mergecore.spec.problems import near
from mergecore.vocabulary import Vocabulary

PLACES = (0.0, 1.0, 0.381966)
"""Where in their ranges parameters of a search are planned: at the bounds, and at one that is no whole number."""


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
    data: tuple[Path, ...] = ()
    """Of a method that is fitted on samples: where those of each model are drawn from."""
    statistics: tuple[Input, ...] = ()
    """Of a method that takes statistics from files: those files."""
    earlier: tuple[tuple[Path, MergePlan], ...] = ()
    """The merges of the same spec whose results this one reads, and where those lie meanwhile; in order."""
    evolved: Evolved | None = None
    """The search that found the spec's parameters, if there was one."""

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
        return list(dict.fromkeys(file for job in self.jobs for source in job.everything for file in files_of(source)))

    @property
    def inputs(self) -> list[Input]:
        """Everything that is opened: models, then statistics."""
        return [*(account.model for account in self.accounts), *self.statistics]

    @property
    def held_bytes(self) -> int:
        """Memory held at most, beside the process itself: windows, statistics, results that wait for the disk."""
        windows = max(map(held, self.jobs), default=0)
        return together_bytes(windows, self.spec.run)

    def identity(self) -> str:
        """Equal exactly when the output's tensors are equal: spec, inputs and version (hex, 128 bits)."""
        rows = None if self.vocabulary is None else self.vocabulary.digest()
        what: list[Any] = [self.spec.identity(), [model.fingerprint() for model in self.inputs], rows, __version__]
        if self.data:
            states = [path.stat() for path in self.data]
            what.append(
                [(str(path), found.st_size, found.st_mtime_ns) for path, found in zip(self.data, states, strict=True)]
            )
        return xxhash.xxh3_128_hexdigest(json.dumps(what, sort_keys=True).encode())


def plan(spec: MergeSpec, *, resolve: Resolve | None = None, stages: Path = Path(".stages")) -> MergePlan:
    """Plans a merge. `resolve` turns a model's path or name, and its revision, in the spec into where it lies.

    The results of earlier merges of the same spec shall lie below `stages`. A spec that searches is planned at the
    bounds and within; the plan is that of one candidate. Of a sweep it is that of the first point (sweeping.py has
    all). Raises SpecError (method, parameters) and CheckpointError (inputs that are missing or do not fit).
    """
    resolve = resolve or partial(local_folder, directory=spec.directory)
    inputs = Inputs(resolve, spec.directory)
    if spec.sweep is not None:
        return plan_all(filled(spec, spec.sweep.grid()[0]), inputs, stages)
    if spec.evolve is None:
        return plan_all(spec, inputs, stages)
    check_score(spec, resolve)
    return [_plan_candidate(spec, spec.evolve, place, inputs, stages) for place in PLACES][-1]


def _plan_candidate(spec: MergeSpec, evolve: Evolve, place: float, inputs: Inputs, stages: Path) -> MergePlan:
    """The merge with every parameter at this place of its range; an error names the parameter that is at fault."""
    values = {path: low + place * (high - low) for path, (low, high) in evolve.parameters.items()}
    keys = {path: keys_of(spec, path) for path in values}
    try:
        return plan_all(filled(spec, values), inputs, stages)
    except SpecError as error:
        about = error.problem.keys if error.problem is not None else ()
        faulty = [path for path in values if len(about) > 1 and about == keys[path][: len(about)]]
        if error.problem is None or len(faulty) != 1:
            raise
        message = f"at {values[faulty[0]]:g}: {error.problem.message}"
        raise spec.error(message, "evolve", "parameters", faulty[0]) from error


def plan_all(spec: MergeSpec, inputs: Inputs, stages: Path) -> MergePlan:
    """A merge without a search or a sweep, after those that it needs."""
    earlier = []
    for needed in spec.earlier:
        assert needed.name is not None
        if needed.evolve is not None:
            raise needed.error("only the last merge of a file can search for parameters", "evolve")
        if needed.sweep is not None:
            raise needed.error("only the last merge of a file can be a sweep", "sweep")
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
    gathered = GatheredStatistics(spec, method, sections, inputs, matching)
    jobs = [windowed(job_of(slot, matching, architecture, spec, method, gathered), spec) for slot in matching.slots]
    for job in jobs:
        _check_coefficients(job, spec)
    _check_scope(jobs, spec)
    _check_fit(jobs, spec)
    data = _data(spec, sections, inputs) if method.statistics is Statistics.FITTED else ()
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
        warnings=(*matching.warnings, *gathered.told(), *unused),
        accounts=inventory,
        config=config if embeddings.vocabulary is None else embeddings.vocabulary.configured(config),
        data=data,
        statistics=gathered.inputs,
        earlier=tuple(earlier),
    )


def with_run(spec: MergeSpec, **settings: Any) -> MergeSpec:
    """`spec` with some of its `run` replaced (None: as it is), checked as in a spec; raises SpecError."""
    given = {name: value for name, value in settings.items() if value is not None}
    if not given:
        return spec
    try:
        run = Run.model_validate({**spec.run.model_dump(exclude_unset=True), **given})
    except ValidationError as error:
        raise SpecError("; ".join(f"{problem['loc'][0]}: {problem['msg']}" for problem in error.errors())) from None
    return spec.model_copy(update={"run": run})


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
    if spec.sparsify is not None and method.gathered is not None:
        raise spec.error(f"{method.name} has statistics of the models as they are: remove sparsify", "sparsify")
    return method


def _check_coefficients(job: TensorJob, spec: MergeSpec) -> None:
    """Coefficients that need no statistics are computed once now, so that what is wrong shows before reading."""
    if job.parameters is not None:
        try:
            if job.method.check is not None:
                job.method.check(job.view())
            if job.statistics is not Statistics.NONE or job.input_grams:
                return
            coefficients = job.method.coefficients(job.view())
        except ValueError as error:
            raise spec.error(f"{job.name}: {error}", "parameters") from None
        if not coefficients.finite:
            raise spec.error(f"{job.name}: the weights are too large, their products overflow", "parameters")


def _data(spec: MergeSpec, sections: Sequence[Section], inputs: Inputs) -> tuple[Path, ...]:
    """Where the samples of each model are drawn from."""
    if len(sections) > 1 or sections[0].layers is not None:
        raise spec.error(f"{spec.merge_method} runs whole models: write models, not slices or modules", "merge_method")
    if spec.sparsify is not None:
        raise spec.error(f"{spec.merge_method} is fitted on the models as they are: remove sparsify", "sparsify")
    found = []
    for member in sections[0].members:
        if member.source is None:
            continue  # a base that is not listed
        source = sections[0].part.sources[member.source]
        if source.data is None:
            raise spec.error(
                f"{spec.merge_method} is fitted on samples: {member.model.name} needs data, a JSONL or text file",
                *source.keys[:-1],
            )
        keys = (*source.keys[:-1], "data")
        try:
            path = inputs.resolve(source.data, None)
        except CheckpointError as error:
            raise spec.error(str(error), *keys) from None
        if not path.is_file():
            raise spec.error(f"{path} is not a file; expected JSONL or text", *keys)
        found.append(path)
    return tuple(found)


def _check_fit(jobs: Sequence[TensorJob], spec: MergeSpec) -> None:
    """What says how a fit goes is one for the whole model."""
    fitted = [job for job in jobs if job.merges and job.statistics is Statistics.FITTED]
    for job in fitted[1:]:
        one, other = fitted[0].parameters, job.parameters
        assert one is not None
        assert other is not None
        for parameter in job.method.parameters:
            if not parameter.per_model and one[parameter.name] != other[parameter.name]:
                raise spec.error(
                    f"{parameter.name} of {job.method.name} is one for the whole model, but {fitted[0].name} and "
                    f"{job.name} differ in theirs; write a single value",
                    "parameters",
                    parameter.name,
                )


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
