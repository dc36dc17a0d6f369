"""A method's parameters at each tensor, out of the spec: checked, with the method's defaults.

Values come from spec.parameter; what they mean is the method's affair.
"""

from __future__ import annotations

from typing import Any

from mergecore.architecture import Architecture
from mergecore.methods.base import Method, Parameter
from mergecore.spec import MergeSpec
from mergecore.spec.problems import near


class Parameters:
    """The method's parameters for each tensor, checked: mergekit's precedence, then the defaults."""

    def __init__(
        self, spec: MergeSpec, method: Method, architecture: Architecture, indices: tuple[int | None, ...]
    ) -> None:
        self.spec, self.method, self.architecture, self.indices = spec, method, architecture, indices
        known = {parameter.name: parameter for parameter in method.parameters}
        for keys, settings in [
            (("parameters",), spec.parameters),
            *((("models", i, "parameters"), entry.parameters) for i, entry in enumerate(spec.models)),
        ]:
            for name in settings:
                if name in method.ignored:
                    continue
                if name not in known:
                    raise spec.error(f"{method.name} has no such parameter{near(name, known)}", *keys, name)
                if keys[0] == "models" and not known[name].per_model:
                    raise spec.error(
                        "this parameter belongs to the whole merge: write it under 'parameters'", *keys, name
                    )

    def of(self, name: str) -> dict[str, Any]:
        place = self.architecture.place(name)
        return {
            parameter.name: tuple(self._value(parameter, name, place, index) for index in self.indices)
            if parameter.per_model
            else self._value(parameter, name, place, None)
            for parameter in self.method.parameters
        }

    def _value(self, parameter: Parameter, name: str, place: float, index: int | None) -> Any:
        keys: tuple[str | int, ...] = ("parameters", parameter.name)
        if index is not None and parameter.name in self.spec.models[index].parameters:
            keys = ("models", index, *keys)

        def validate(value: Any) -> Any:
            value = value if parameter.type is str else _number(value)
            if not parameter.accepts(value):
                raise self.spec.error(f"found {value!r}, expected {parameter.expected}", *keys)
            return parameter.type(value)

        value = self.spec.parameter(parameter.name, name, place, index, validate=validate)
        if value is None and parameter.default is None and not parameter.optional:
            raise self.spec.error(f"{self.method.name} needs {parameter.name} for {name}", *keys)
        return parameter.default if value is None else value


def _number(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
