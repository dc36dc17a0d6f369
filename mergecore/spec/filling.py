"""A spec with values put in where its `evolve` or `sweep` says: what a candidate or a point is merged by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from mergecore.errors import SpecError
from mergecore.spec.problems import Keys, near, show
from mergecore.spec.reading import validated
from mergecore.spec.settings import number_or_same
from mergecore.spec.spec import MergeSpec
from mergecore.spec.sweep import METHOD, Value


def filled(spec: MergeSpec, values: Mapping[str, Value]) -> MergeSpec:
    """`spec` without its `evolve` and `sweep` and with these values, by dotted path. Raises SpecError.

    Its errors name file and lines of `spec`; its text is its own.
    """
    what = _plain(spec)
    for path, value in values.items():
        if path == METHOD:
            what[METHOD] = value
        else:
            holder, keys = _place(spec, what, path)
            holder[keys[-1]] = value
    return validated(what, spec, yaml.safe_dump(what, sort_keys=False, allow_unicode=True))


def written(spec: MergeSpec, path: str) -> float | None:
    """The number that the spec has at a dotted path; None if there is none yet. SpecError for a path to nowhere."""
    holder, keys = _place(spec, _plain(spec), path)
    present = isinstance(holder, list) or keys[-1] in holder
    return float(number_or_same(holder[keys[-1]])) if present else None


def keys_of(spec: MergeSpec, path: str) -> Keys:
    """A dotted path as keys, with numbers where it names entries of lists. SpecError for a path to nowhere."""
    return _place(spec, _plain(spec), path)[1]


def _plain(spec: MergeSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json", exclude_unset=True, exclude={"evolve", "sweep"})


def _place(spec: MergeSpec, what: dict[str, Any], path: str) -> tuple[Any, Keys]:
    """The mapping or list that holds a value, and all keys to the value; an absent `parameters` is made. A search asks
    for numbers."""

    def wrong(message: str) -> SpecError:
        if spec.sweep is None:
            return spec.error(message, "evolve", "parameters", path)
        if path in (spec.sweep.parameters or {}):
            return spec.error(message, "sweep", "parameters", path)
        return spec.error(f"{path}: {message}", "sweep", "points")

    parts = path.split(".")
    if "parameters" not in parts[:-1] and parts[0] != "sparsify":
        raise wrong("not the place of a method parameter: expected one below a 'parameters', or below 'sparsify'")
    holder: Any = what
    keys: list[str | int] = []
    for i, part in enumerate(parts):
        last, around = i == len(parts) - 1, ".".join(parts[:i]) or "the spec"
        if isinstance(holder, list):
            if part not in map(str, range(len(holder))):
                raise wrong(f"{around} is a list: found {part!r}, expected a number from 0 to {len(holder) - 1}")
            keys.append(int(part))
        elif not isinstance(holder, dict):
            raise wrong(f"{around} is {show(holder)}, which has nothing below it")
        elif part in holder or (last and part):
            keys.append(part)
        elif part == "parameters":
            holder[part] = {}
            keys.append(part)
        else:
            raise wrong(f"{around} has no {part!r}{near(part, holder)}")
        if last:
            break
        holder = holder[keys[-1]]
    here: Any = keys[-1]
    found = holder[here] if isinstance(holder, list) else holder.get(here, 0.0)
    if spec.evolve is None:
        return holder, tuple(keys)
    if isinstance(found, bool) or not isinstance(number_or_same(found), int | float):
        raise wrong(f"found {show(found)} there, expected a number")
    return holder, tuple(keys)
