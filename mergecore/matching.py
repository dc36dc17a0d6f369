"""Which tensor of each model belongs to which output tensor, and whether they fit together.

Only names, shapes and dtypes are compared: what is done to the tensors is planning's affair.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mergecore.architecture import (
    Architecture,
    embedding_of,
    head_of,
    is_before_layers,
    is_bias,
    is_buffer,
    is_embedding,
    is_head,
    is_shared_again,
    is_tied,
    layer_of,
    layer_stacks,
    place_in,
    renaming,
    tower_of,
)
from mergecore.embeddings import Embeddings
from mergecore.inputs import Input
from mergecore.output.layout import ITEM_BYTES
from mergecore.sections import Member, Section, Slot, input_error
from mergecore.sources import Source
from mergecore.spec import MergeSpec
from mergecore.spec.problems import Keys

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
WHOLE_NUMBERS = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}
"""Stored dtypes that are merged, with their bytes, and those that are copied."""
MAX_LISTED = 8


class Matching:
    """The output's slots, and which tensor of each member belongs to them; CheckpointError where they do not fit.

    `reference` gives the names outside of the layers and the config: the base or the first model, or the first model
    that has a tower (for images, say) which that one lacks.
    """

    def __init__(self, spec: MergeSpec, sections: Sequence[Section], embeddings: Embeddings) -> None:
        self.spec, self.sections, self.embeddings = spec, sections, embeddings
        self.warnings = list(embeddings.warnings)
        self._towers: dict[Input, set[str]] = {}
        self._laid_out: dict[tuple[Input, str], Source | None] = {}
        self.members = [member for section in sections for member in section.everyone()]
        self.models = embeddings.models
        self.keys: dict[Input, Keys] = {section.reference: section.part.base_keys for section in sections}
        for section in sections:
            for member in section.members:
                if member.source is not None:
                    known = member.model is section.reference and section.part.base_model is not None
                    self.keys[member.model] = (
                        section.part.base_keys if known else section.part.sources[member.source].keys
                    )
        self.reference = self._most_complete()
        self.renamings = {model: renaming(self.reference.tensors, model.tensors) for model in self.models}
        self.embedding = embedding_of(self.reference.tensors)
        self.tied = all(is_tied(model.config, model.tensors) for model in self.models)
        names = self._names()
        self.head = head_of(names)
        if self.tied and self.head in names:
            names.remove(self.head)
            self.warnings.append(f"{self.head} is tied to the embedding; the output stores it once")
        self.slots = list(self._slots(names))
        self.names = [slot.name for slot in self.slots]
        self._first = {slot.name: self._first_of(slot) for slot in self.slots}
        self.constants = {slot.name for slot in self.slots if is_buffer(slot.name, self.any_tensor(slot).shape)}
        self.merged = {slot.name for slot in self.slots if slot.name not in self.constants and self._has_floats(slot)}
        self._check()
        placed = self.merged | self.constants
        copied = [name for name in self.names if name not in placed]
        if copied:
            self.warnings.append(
                f"{_count(copied)} of whole numbers copied from {self.reference.path}: {listed(copied)}"
            )

    # Lookups

    def tensor(self, member: Member, slot: Slot) -> Source | None:
        """The member's tensor for a slot; a tied head is the embedding; None: zeros, or nothing (`takes_part`)."""
        return self._find(member.model, slot.name_in(member))

    def stored_name(self, member: Member, slot: Slot) -> str | None:
        """What the member itself calls its tensor for a slot; None where its rows follow another vocabulary."""
        name = slot.name_in(member)
        if self.embeddings.vocabulary is not None and self.embeddings.is_vocabulary(name, self.embedding):
            return None
        return self._stored_name(member.model, name)

    def any_tensor(self, slot: Slot) -> Source:
        """The first one that is there: of the section's pattern, of its members, of the reference."""
        return self._first[slot.name]

    def _first_of(self, slot: Slot) -> Source:
        section = slot.section
        for member in (Member(section.reference, None), *section.everyone(), Member(self.reference, None)):
            if slot.layer is not None and member.first_layer is None:
                continue  # a slice's layers are those of its members
            found = self.tensor(member, slot)
            if found is not None:
                return found
        raise AssertionError(f"no model has {slot.name}")

    def takes_part(self, member: Member, slot: Slot) -> bool:
        """Whether the member has this part of the model at all: a text model lacks the tower of a larger one."""
        tower = tower_of(slot.name)
        return tower is None or self._has_tower(member.model, tower)

    def _find(self, model: Input, name: str) -> Source | None:
        """The model's tensor for an output name, in the output's vocabulary."""
        if self.embeddings.vocabulary is None or not self.embeddings.is_vocabulary(name, self.embedding):
            return self._stored(model, name)
        if (model, name) not in self._laid_out:
            stored = [self._stored(each, name) for each in self.models]
            self._laid_out[model, name] = self.embeddings.laid_out(model, name, stored)
        return self._laid_out[model, name]

    def _stored(self, model: Input, name: str) -> Source | None:
        stored = self._stored_name(model, name)
        return None if stored is None else model.tensors[stored]

    def _stored_name(self, model: Input, name: str) -> str | None:
        if name in model.tensors:
            return name
        found = self.renamings.get(model)
        if found is not None:
            theirs, ours = found
            renamed = theirs + name.removeprefix(ours)
            if name.startswith(ours) and renamed in model.tensors:
                return renamed
        return embedding_of(model.tensors) if name == self.head else None

    def _our_name(self, model: Input, name: str) -> str:
        """What the output calls the tensor that the model calls `name`."""
        found = self.renamings[model]
        if name in self.reference.tensors or found is None or not name.startswith(found[0]):
            return name
        return found[1] + name.removeprefix(found[0])

    def _has_tower(self, model: Input, tower: str) -> bool:
        if model not in self._towers:
            self._towers[model] = set(filter(None, map(tower_of, model.tensors)))
        return tower in self._towers[model]

    def _has_floats(self, slot: Slot) -> bool:
        infos = (self.tensor(member, slot) for member in (Member(self.reference, None), *slot.section.everyone()))
        return any(info.dtype in FLOATS for info in infos if info is not None)

    # The output's names

    def _most_complete(self) -> Input:
        first = self.sections[0].reference
        towers = set(filter(None, map(tower_of, first.tensors)))
        for model in self.models:
            more = set(filter(None, map(tower_of, model.tensors))) - towers
            if more and layer_stacks(model.tensors):
                self.warnings.append(
                    f"{first.path} has no {listed(sorted(more))}; the output is made like {model.path}, which has"
                )
                return model
        return first

    def _names(self) -> list[str]:
        """All names, as far as they may be absent from some models; with slices, of whole models."""
        names = [name for name in self.reference.tensors if not is_shared_again(name, self.reference.tensors)]
        known = set(names)
        for model in self.models:
            stored = [name for name in model.tensors if not is_shared_again(name, model.tensors)]
            extra = [name for name in stored if self._our_name(model, name) not in known]
            for name in [name for name in extra if is_buffer(name, model.tensors[name].shape)]:
                extra.remove(name)
                self.warnings.append(
                    f"{model.path}: {name} is a constant that {self.reference.path} does not store; left out"
                )
            sliced = any(section.layers is not None for section in self.sections)
            extra = [name for name in extra if not (sliced and layer_of(name))]
            unknown = [name for name in extra if not is_head(name) and not is_bias(name)]
            if unknown:
                raise self._error(
                    model,
                    f"has {_count(unknown)} that {self.reference.path} does not have: {listed(unknown)}; "
                    "the models must be of one architecture",
                )
            added = [self._our_name(model, name) for name in extra]
            names += added
            known.update(added)
        return names

    def _slots(self, names: list[str]) -> Iterator[Slot]:
        """The output tensors; each module's layers are where the reference has them."""
        for module, sections in self._by_module().items():
            own = [name for name in names if module is None or self._module_of(name) == module]
            if not own:
                raise self.spec.error(
                    f"{self.reference.path} has no tensors below {module!r}; it has {listed(self._modules())}",
                    "modules",
                    str(module),
                )
            if sections[0].layers is None:
                architecture = Architecture.of({}, own, {})
                yield from (Slot(name, sections[0], None, architecture.place(name)) for name in own)
            else:
                yield from self._sliced(own, sections)
        if self.spec.modules is not None:
            left = [name for name in names if self._module_of(name) not in self.spec.modules]
            if left:
                raise self.spec.error(
                    f"no module takes {_count(left)} of {self.reference.path}: {listed(left)}; "
                    f"expected modules {listed(self._modules())}",
                    "modules",
                )

    def _by_module(self) -> dict[str | None, list[Section]]:
        found: dict[str | None, list[Section]] = {}
        for section in self.sections:
            found.setdefault(section.part.module, []).append(section)
        return found

    def _module_of(self, name: str) -> str:
        """The module that a tensor belongs to, by mergekit's names or by the name of a component."""
        modules = self.spec.modules or {}
        parts = name.split(".")
        named = [module for module in modules if module in parts]
        if named:
            return named[0]
        tower = tower_of(name)
        if tower is None:
            kind = "text_decoder" if "text_decoder" in modules else "default"
        else:
            kind = "multi_modal_projector" if "proj" in tower or "connector" in tower else "vision_tower"
        return next((module for module in (kind, parts[0]) if module in modules), kind if tower else parts[0])

    def _modules(self) -> list[str]:
        return sorted({self._module_of(name) for name in self.reference.tensors})

    def _sliced(self, names: list[str], sections: list[Section]) -> Iterator[Slot]:
        stacks = layer_stacks(names)
        if len(stacks) != 1:
            raise self.spec.error(
                f"{self.reference.path} has {len(stacks)} stacks of layers ({listed(sorted(stacks))}); slices need "
                "one: describe each component under 'modules'",
                *sections[0].part.keys,
            )
        (stack,) = stacks
        for name in names:
            if layer_of(name) is None:
                yield Slot(name, sections[0] if is_before_layers(name) else sections[-1], None, 0.0)
        number = 0
        for section in sections:
            assert section.layers is not None
            for layer in range(section.layers):
                for rest in self._layer(section, stack, layer):
                    yield Slot(f"{stack}.{number}.{rest}", section, layer, place_in(layer, section.layers))
                number += 1

    def _layer(self, section: Section, stack: str, layer: int) -> list[str]:
        """What a layer of a slice has, after its number; every member's layer is there."""
        rests: dict[str, None] = {}
        for member in section.everyone():
            assert member.first_layer is not None
            wanted = member.first_layer + layer
            found = [
                place[2]
                for place in (layer_of(self._our_name(member.model, name)) for name in member.model.tensors)
                if place is not None and place[:2] == (stack, wanted)
            ]
            if not found:
                count = max((place[1] + 1 for place in map(layer_of, member.model.tensors) if place), default=0)
                raise self._error(member.model, f"has no layer {wanted}: it has {count}, counted from 0")
            rests |= dict.fromkeys(rest for rest in found if not rests or is_bias(rest))
        return list(rests)

    # Whether they fit

    def _check(self) -> None:
        problems: dict[Input, _Problems] = {model: _Problems() for model in self.models}
        for slot in self.slots:
            expected = self.any_tensor(slot).shape
            members = list(slot.section.everyone())
            if slot.layer is None and all(member.model is not slot.section.reference for member in members):
                members.insert(0, Member(slot.section.reference, None))
            for member in members:
                self._check_tensor(member, slot, expected, problems[member.model])
        self.zeros = {model: tuple(found.zeros) for model, found in problems.items()}
        for model, found in problems.items():
            if found.missing:
                raise self._error(
                    model,
                    f"lacks {_count(found.missing)} that the other models have: {listed(found.missing)}; "
                    "the models must be of one architecture",
                )
            if found.differing:
                raise self._error(model, _differing(found.differing, self.reference))
            if found.unsupported:
                raise self._error(
                    model,
                    f"is quantised or of a dtype that cannot be merged: {listed(found.unsupported)}; "
                    "inputs can be F64, F32, F16, BF16 or scaled F8: convert the model first",
                )
            for count, what in ((found.zeros, "read as zeros"), (found.absent, "taken from the models that have them")):
                if count:
                    kind = "bias tensor" if what == "read as zeros" else "tensor"
                    self.warnings.append(f"{model.path} lacks {_count(count, kind)}, {what}: {listed(count)}")

    def _check_tensor(self, member: Member, slot: Slot, expected: tuple[int, ...], found: _Problems) -> None:
        info, name = self.tensor(member, slot), slot.name
        if info is None:
            if not self.takes_part(member, slot):
                found.absent.append(name)
            elif is_bias(name):
                found.zeros.append(name)
            elif name not in self.constants:
                found.missing.append(name)
            return
        if info.shape != expected:
            found.differing.append((name, info.shape, expected))
        usable = ITEM_BYTES if name in self.constants else FLOATS if name in self.merged else WHOLE_NUMBERS
        if info.dtype not in usable or (usable is WHOLE_NUMBERS and "quantization_config" in member.model.config):
            found.unsupported.append(f"{name} ({info.dtype})")

    def _error(self, model: Input, message: str) -> Exception:
        return input_error(self.spec, self.keys.get(model, ("models",)), f"{model.path} {message}")


class _Problems:
    """What does not fit of one model, by kind."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.zeros: list[str] = []
        self.absent: list[str] = []
        self.unsupported: list[str] = []
        self.differing: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []


def _differing(found: list[tuple[str, tuple[int, ...], tuple[int, ...]]], reference: Input) -> str:
    shapes = [f"{name} {list(shape)} instead of {list(expected)}" for name, shape, expected in found]
    vocabulary = all((is_embedding(name, a) or is_head(name)) and a[1:] == b[1:] for name, a, b in found)
    hint = (
        "the vocabularies differ: set tokenizer_source (union, base or a model)"
        if vocabulary
        else "the models must be of one size"
    )
    return f"differs in shape from {reference.path} in {_count(found)}: {listed(shapes)}; {hint}"


def _count(items: Sequence[Any], what: str = "tensor") -> str:
    return f"{len(items)} {what}" + ("s" if len(items) != 1 else "")


def listed(names: Iterable[str]) -> str:
    """The first names, and how many more."""
    found = list(names)
    more = len(found) - MAX_LISTED
    return ", ".join(found[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
