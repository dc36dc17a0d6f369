"""Statistics files of `mergecore stats`: opened, and held against the models that they were gathered from.

Which tensor of them belongs to which tensor of a merge. Not for gathering (features/gather.py) nor for what methods
make of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergecore.checkpoint import open_checkpoint
from mergecore.confined import open_input
from mergecore.errors import CheckpointError
from mergecore.inputs import Input, Inputs
from mergecore.matching import Matching, listed
from mergecore.methods.base import Gathered, Method
from mergecore.output.verify import MANIFEST_NAME
from mergecore.sections import Member, Section, Slot, input_error
from mergecore.sources import Source, Stored
from mergecore.spec import MergeSpec
from mergecore.spec.problems import Keys

DTYPES = {"F32", "F64"}
LONGEST_MANIFEST = 256 << 20


class Statistics:
    """The statistics of every member of a merge, if its method takes some from files."""

    def __init__(
        self, spec: MergeSpec, method: Method, sections: Sequence[Section], inputs: Inputs, matching: Matching
    ) -> None:
        """Opens and checks the files. SpecError for a model without one; CheckpointError for one that is missing or
        malformed, or belongs to another model."""
        self.kind, self._spec, self._matching = method.gathered, spec, matching
        self.warnings: list[str] = []
        self._averaged: list[str] = []
        self._of: dict[Member, tuple[Input, Keys]] = {}
        if self.kind is None:
            return
        opened: dict[Path, Input] = {}
        for section in sections:
            for member in section.members:
                path, keys = self._named(section, member, inputs)
                if path not in opened:
                    try:
                        opened[path] = _open(path, self.kind)
                        self.warnings += _check_model(path, member.model)
                    except CheckpointError as error:
                        raise input_error(spec, keys, str(error)) from None
                self._of[member] = opened[path], keys

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The files, each once."""
        return tuple(dict.fromkeys(found for found, _ in self._of.values()))

    def of(self, slot: Slot, members: Sequence[Member], shape: tuple[int, ...], *, transposed: bool) -> list[Source]:
        """Those of a tensor, one of each member; empty where none has any. CheckpointError where they do not fit."""
        if self.kind is None or not members:
            return []
        found = {member: self._find(member, slot) for member in members}
        missing = [member for member, source in found.items() if source is None]
        if len(missing) == len(members):
            self._averaged.append(slot.name)
            return []
        if missing:
            path, keys = self._file(missing[0])
            raise input_error(self._spec, keys, f"{path} lacks {self.kind.of(slot.name)}, which other models have")
        expected = shape
        if self.kind is Gathered.INPUTS:
            inputs = shape[0 if transposed else -1] if len(shape) == 2 else 0
            expected = (inputs, inputs)
        sources = [source for source in found.values() if source is not None]
        for member, source in zip(members, sources, strict=True):
            if source.shape != expected or source.dtype not in DTYPES:
                path, keys = self._file(member)
                raise input_error(
                    self._spec,
                    keys,
                    f"{path}: {self.kind.of(slot.name)} is {source.dtype} {list(source.shape)}, "
                    f"expected F32 or F64 {list(expected)}",
                )
        return sources

    def told(self) -> list[str]:
        """What there is to say when all tensors have been asked for."""
        if self.kind is not Gathered.FISHER or not self._averaged:
            return self.warnings
        return [*self.warnings, f"averaged, for the statistics do not have them: {listed(self._averaged)}"]

    def _named(self, section: Section, member: Member, inputs: Inputs) -> tuple[Path, Keys]:
        """Where the statistics of a member lie, and where the spec says so."""
        source = section.part.sources[member.source] if member.source is not None else None
        if source is None:
            raise self._spec.error(
                f"{self._spec.merge_method} takes the base as one of the models: list it under models, with its "
                "statistics, or leave it out",
                *section.part.base_keys,
            )
        keys = (*source.keys[:-1], "statistics")
        if source.statistics is None:
            raise self._spec.error(
                f"{self._spec.merge_method} needs the statistics of {member.model.name}: gather them with "
                "`mergecore stats` and write the folder under 'statistics'",
                *keys[:-1],
            )
        try:
            return inputs.resolve(source.statistics, None), keys
        except CheckpointError as error:
            raise input_error(self._spec, keys, str(error)) from None

    def _find(self, member: Member, slot: Slot) -> Source | None:
        name = self._matching.stored_name(member, slot)
        assert self.kind is not None
        return None if name is None else self._of[member][0].tensors.get(self.kind.of(name))

    def _file(self, member: Member) -> tuple[Path, Keys]:
        statistics, keys = self._of[member]
        return statistics.path, keys


def _open(path: Path, kind: Gathered) -> Input:
    checkpoint = open_checkpoint(path)
    tensors: dict[str, Source] = {name: Stored(info) for name, info in checkpoint.tensors.items()}
    if not any(name.startswith(kind.of("")) for name in tensors):
        option = "regmean" if kind is Gathered.INPUTS else "fisher"
        raise CheckpointError(
            f"{path} has no tensors {kind.of('*')}; gather them with `mergecore stats --kind {option}`"
        )
    return Input(str(path), path, {}, tensors, (checkpoint,))


def _check_model(path: Path, model: Input) -> list[str]:
    """Whether the statistics were gathered from this model; a warning if its files are only as large as they were."""
    manifest = path / MANIFEST_NAME
    try:
        with os.fdopen(open_input(manifest), "rb") as file:
            of = json.loads(file.read(LONGEST_MANIFEST))["statistics"]["model"]
        name, then = of["path"], _without_dates(of)
    except OSError as error:
        raise CheckpointError(
            f"{manifest} cannot be read ({error.strerror}); expected a folder that `mergecore stats` made"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{manifest} is damaged ({type(error).__name__}: {error})") from None
    now = model.fingerprint()
    if then != _without_dates(now):
        raise CheckpointError(
            f"{path} was gathered from {name}, whose files are not those of {model.path}; gather it from that model"
        )
    if {key: of.get(key) for key in now} != now:
        return [
            f"{path} was gathered when the files of {model.path} had other dates; "
            "gather it again if the weights changed"
        ]
    return []


def _without_dates(fingerprint: dict[str, Any]) -> Any:
    """What stays when a model is copied."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items() if key not in ("mtime_ns", "path")}
        return [plain(each) for each in value] if isinstance(value, list) else value

    return plain(fingerprint)
