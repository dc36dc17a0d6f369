"""Which models make up which layers of the output: the parts of a spec with their models opened.

Tensor by tensor, that is a list of slots: an output name, its section and its layer there. What each model has for
a slot is matching.py's affair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mergecore.architecture import with_layer
from mergecore.errors import CheckpointError
from mergecore.inputs import Input, Inputs
from mergecore.methods.base import Method
from mergecore.spec import MergeSpec, Part
from mergecore.spec.problems import Keys

MAX_MODELS = 64  # of one merge: kMaxModels in csrc/kernels.h


@dataclass(frozen=True)
class Member:
    """A model in a section. `source` is its number there (None: a base that is not listed), `first_layer` the layer
    of its own that the section begins with (None: all layers, each where it is)."""

    model: Input
    source: int | None
    first_layer: int | None = None


@dataclass(frozen=True, eq=False)
class Section:
    """A part of the output: what is merged, and the base that deltas are taken from (None: there is none)."""

    part: Part
    members: tuple[Member, ...]
    base: Member | None
    reference: Input
    """The base, read or not, or the first model where there is none: whose config and names the output has."""
    layers: int | None
    """Of the output; None for as many as the models have."""

    def everyone(self) -> Iterator[Member]:
        """The base first."""
        if self.base is not None:
            yield self.base
        yield from self.members


@dataclass(frozen=True)
class Slot:
    """One output tensor: its name, its section, which layer of the section (None outside of slices), and how far
    down the layers that is, 0 (first) to 1 (last)."""

    name: str
    section: Section
    layer: int | None
    place: float

    def name_in(self, member: Member) -> str:
        """What the tensor would be called in a member that names its tensors like the output."""
        if self.layer is None or member.first_layer is None:
            return self.name
        return with_layer(self.name, member.first_layer + self.layer)


def models_of(sections: Sequence[Section]) -> list[Input]:
    """Every model once: references first."""
    members = (member.model for section in sections for member in section.everyone())
    return list(dict.fromkeys((*(section.reference for section in sections), *members)))


def input_error(spec: MergeSpec, keys: Keys, message: str) -> CheckpointError:
    """The error of an input, with the place in the spec that names it."""
    return CheckpointError(str(spec.error(message, *keys)))


def open_sections(spec: MergeSpec, method: Method, inputs: Inputs) -> list[Section]:
    """The sections of the output in order, with mergekit's rules for the base. Raises SpecError, CheckpointError."""

    def opened(reference: str, keys: Keys) -> Input:
        try:
            return inputs.open(reference)
        except CheckpointError as error:
            raise input_error(spec, keys, str(error)) from error

    sections = []
    for part in spec.parts():
        base = None if part.base_model is None else opened(part.base_model, part.base_keys)
        models = [opened(source.model, source.keys) for source in part.sources]
        sections.append(_section(spec, method, part, base, models))
    return sections


def _section(spec: MergeSpec, method: Method, part: Part, base: Input | None, models: Sequence[Input]) -> Section:
    listed = [
        Member(model, number, None if source.layers is None else source.layers[0])
        for number, (model, source) in enumerate(zip(models, part.sources, strict=True))
    ]
    sliced = part.sources[0].layers is not None
    layers = part.sources[0].layers
    count = None if layers is None else layers[1] - layers[0]
    own = next((member for member in listed if member.model is base), None)
    if base is not None and own is None and not sliced:
        own = Member(base, None)
    if base is not None and own is None and (method.deltas or spec.sparsify is not None):
        message = f"the base {part.base_model} must be among the sources, with the layers that it gives"
        raise spec.error(message, *part.keys)
    # The base has no delta; and where models are averaged, a base that is not listed takes part exactly if a
    # weight is set for all. (A slice may merge layers of the base with other layers of it.)
    members = [
        member
        for member in listed
        if not (method.deltas and own and member.model is base and member.first_layer == own.first_layer)
    ]
    weighted = method.parameter("weight") is None or any("weight" in settings for _, settings in part.levels)
    room = method.most is None or len(members) < method.most
    if not method.deltas and own is not None and own.source is None and weighted and room:
        members.append(own)
    if not members:
        raise spec.error("every model listed is the base itself: there is nothing to merge", *part.keys)
    if len(members) > MAX_MODELS:
        raise spec.error(f"found {len(members)} models, expected at most {MAX_MODELS}; merge in two steps", *part.keys)
    reads_base = own if method.deltas or spec.sparsify is not None else None
    _check_count(spec, method, part, len(members), own is not None)
    return Section(part, tuple(members), reads_base, base or models[0], count)


def _check_count(spec: MergeSpec, method: Method, part: Part, found: int, has_base: bool) -> None:
    if method.least <= found and (method.most is None or found <= method.most):
        return
    number = f"{method.least}" if method.least == method.most else f"at least {method.least}"
    beside = " beside the base" if method.deltas and has_base else ""
    raise spec.error(f"{method.name} merges {number} model(s){beside}; found {found}", *part.keys)
