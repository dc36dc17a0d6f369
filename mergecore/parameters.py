"""A method's parameters at each tensor, out of the spec: checked, with the method's defaults.

Values come from the parts of the spec; what they mean is the method's affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergecore.methods.base import Method, Parameter
from mergecore.sections import Member, Section, Slot
from mergecore.spec import MergeSpec, Part
from mergecore.spec.problems import Keys, near


def check_parameters(spec: MergeSpec, method: Method, sections: Sequence[Section]) -> None:
    """SpecError for a parameter that the method does not have, or not under a model."""
    known = {parameter.name: parameter for parameter in method.parameters}
    for section in sections:
        part = section.part
        for number in (None, *range(len(part.sources))):
            for keys, settings in part.settings(number):
                of_model = number is not None and keys == (*part.sources[number].keys[:-1], "parameters")
                for name in settings:
                    if name in method.ignored:
                        continue
                    if name not in known:
                        raise spec.error(f"{method.name} has no such parameter{near(name, known)}", *keys, name)
                    if of_model and not known[name].per_model:
                        raise spec.error(
                            "this parameter belongs to the whole merge: write it under 'parameters'", *keys, name
                        )


def parameters_of(spec: MergeSpec, method: Method, slot: Slot, members: Sequence[Member]) -> dict[str, Any]:
    """The parameters of one tensor: a value, or one per member; mergekit's precedence, then the defaults."""
    part, sources = slot.section.part, [member.source for member in members]
    return {
        parameter.name: tuple(_value(spec, method, parameter, slot, part, source) for source in sources)
        if parameter.per_model
        else _value(spec, method, parameter, slot, part, None)
        for parameter in method.parameters
    }


def _value(spec: MergeSpec, method: Method, parameter: Parameter, slot: Slot, part: Part, source: int | None) -> Any:
    def validate(value: Any, keys: Keys) -> Any:
        value = value if parameter.type is str else _number(value)
        if not parameter.accepts(value):
            raise spec.error(f"found {value!r}, expected {parameter.expected}", *keys)
        return parameter.type(value)

    value = part.parameter(parameter.name, slot.name, slot.place, source, validate=validate)
    if value is None and parameter.default is None and not parameter.optional:
        raise spec.error(f"{method.name} needs {parameter.name} for {slot.name}", "parameters", parameter.name)
    return parameter.default if value is None else value


def _number(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
