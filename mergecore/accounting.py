"""What becomes of every stored tensor of every input: merged, copied, part of another one, or left out and why.

Counted by the bytes that the jobs of a plan read, not by names, so nothing that is planned can be forgotten here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecore.architecture import is_buffer, is_head, is_shared_again
from mergecore.checkpoint import TensorInfo
from mergecore.inputs import Input
from mergecore.matching import WHOLE_NUMBERS
from mergecore.sections import Section
from mergecore.sources import Adapted, Source, Stored

if TYPE_CHECKING:
    from mergecore.jobs import TensorJob

MERGED, COPIED, FOLDED = "merged", "copied", "folded"
"""Where a stored tensor goes: into a merge, into the output as it is, or into a tensor of its model that is merged
or copied (scales of float8, factors of an adapter)."""
UNUSED = "not used"


@dataclass(frozen=True)
class Account:
    """The stored tensors of one input by what becomes of them; every one is listed once."""

    model: Input
    shapes: Mapping[str, tuple[int, ...]]
    """Of what is stored, by name."""
    kinds: Mapping[str, tuple[str, ...]]
    """Names by what becomes of them: `merged`, `copied`, `folded`, or why they are left out."""
    zeros: tuple[str, ...]
    """Output tensors that this input lacks and that are read as zeros."""

    @property
    def unused(self) -> tuple[str, ...]:
        """What ends up in nothing although nothing says so: for a warning."""
        return self.kinds.get(UNUSED, ())

    def as_dict(self) -> dict[str, Any]:
        """Numbers of tensors and parameters (entries), as plain JSON values."""

        def total(names: Iterable[str]) -> dict[str, int]:
            listed = list(names)
            return {"tensors": len(listed), "parameters": sum(prod(self.shapes[name]) for name in listed)}

        used = {kind: total(self.kinds.get(kind, ())) for kind in (MERGED, COPIED, FOLDED)}
        left_out = {kind: total(names) for kind, names in self.kinds.items() if kind not in used}
        return {"stored": total(self.shapes), **used, "left_out": left_out, "zeros": {"tensors": len(self.zeros)}}


def accounts(
    models: Sequence[Input],
    sections: Sequence[Section],
    jobs: Sequence[TensorJob],
    zeros: Mapping[Input, Sequence[str]],
) -> tuple[Account, ...]:
    """An account of every model; `zeros` are the output tensors that each lacks and that count as zeros."""
    files = _Files(models)
    read: dict[str, set[_Tensor]] = {MERGED: set(), COPIED: set()}
    for job in jobs:
        for source in job.sources:
            read[MERGED if job.merges else COPIED] |= files.behind(source)
    members = {member.model for section in sections for member in section.everyone()}
    parts = _parts(sections)
    tied = not any(is_head(job.name) for job in jobs)
    found = []
    for number, model in enumerate(models):
        kinds: dict[str, list[str]] = {}
        for name, info in files.stored[number].items():
            kind = next((kind for kind in (MERGED, COPIED) if (number, name) in read[kind]), None)
            if kind is None:
                kind = _why(info, model, parts, tied=tied) if model in members else "names and config only"
            elif name not in model.tensors:
                kind = FOLDED
            kinds.setdefault(kind, []).append(name)
        shapes = {name: info.shape for name, info in files.stored[number].items()}
        listed = {kind: tuple(names) for kind, names in kinds.items()}
        found.append(Account(model, shapes, listed, tuple(zeros.get(model, ()))))
    return tuple(found)


def _parts(sections: Sequence[Section]) -> str | None:
    """What the output is described by, if not by whole models."""
    if any(section.layers is not None for section in sections):
        return "slice"
    return "module" if sections[0].part.module is not None else None


def _why(info: TensorInfo, model: Input, parts: str | None, *, tied: bool) -> str:
    """Why a stored tensor is not read."""
    if info.name not in model.tensors:
        return "scales and adapters"
    if 0 in info.shape:
        return "empty"
    if is_buffer(info.name, info.shape):
        return "constants"
    if info.dtype in WHOLE_NUMBERS:
        return "whole numbers"
    if (tied and is_head(info.name)) or is_shared_again(info.name, model.tensors):
        return "tied"
    return UNUSED if parts is None else f"not in a {parts}"


_Tensor = tuple[int, str]
"""(number of the model, name)."""


class _Files:
    """Which stored tensors lie where."""

    def __init__(self, models: Sequence[Input]) -> None:
        self.stored = [_stored(model) for model in models]
        self._places: dict[Path, list[tuple[int, int, _Tensor]]] = {}
        for number, tensors in enumerate(self.stored):
            for name, info in tensors.items():
                if info.nbytes:
                    place = info.offset, info.offset + info.nbytes, (number, name)
                    self._places.setdefault(info.file, []).append(place)
        for places in self._places.values():
            places.sort()

    def behind(self, source: Source) -> set[_Tensor]:
        """The stored tensors that a source is read from, whoever lists their file."""
        found = set()
        for file, offset, nbytes in source.pieces(0, prod(source.shape)):
            places = self._places.get(file, [])
            last = bisect_left(places, offset + nbytes, key=itemgetter(0))
            while last and places[last - 1][1] > offset:
                last -= 1
                found.add(places[last][2])
        return found


def _stored(model: Input) -> dict[str, TensorInfo]:
    """What lies on disk of a model and its adapter, or will lie there after an earlier merge."""
    found = {name: info for file in model.files for name, info in file.tensors.items()}
    if model.identity is not None:
        for name, source in model.tensors.items():
            weight = source.weight if isinstance(source, Adapted) else source
            if isinstance(weight, Stored):
                found[name] = weight.info
    return found
