"""How the problems of a spec are worded: what was found, at which key, and which word was probably meant.

Not for finding them: yaml_lines.py, settings.py, fields.py and spec.py do that.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

Keys = tuple[str | int, ...]
"""The way to a value: ("models", 1, "parameters", "weight")."""


class Problem(NamedTuple):
    """One thing that is wrong. `line` counts from 1; None if there is no text, or no place in it."""

    keys: Keys
    message: str
    line: int | None = None

    def worded(self, name: str | None) -> str:
        """`NAME:LINE: key.path: message`, without the parts that are unknown."""
        place = "" if name is None else f"{name}: " if self.line is None else f"{name}:{self.line}: "
        return place + (f"{dotted(self.keys)}: " if self.keys else "") + self.message


class _Unread:
    """Stands where a value could not be read; its problem is already known and no second one is to be told."""

    def __repr__(self) -> str:
        return "UNREAD"


UNREAD = _Unread()


def dotted(keys: Keys) -> str:
    """models[1].parameters.weight; keys that are no plain words are quoted: orientation['*.wte.weight']."""
    text = ""
    for key in keys:
        if isinstance(key, int):
            text += f"[{key}]"
        elif re.fullmatch(r"[A-Za-z0-9_-]+", key):
            text += f".{key}" if text else key
        else:
            text += f"[{_quoted(key)}]"
    return text


def show(value: Any) -> str:
    """A found value as a reader knows it from the spec, at most about 60 characters."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a number with more than 30 digits"
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, list | tuple):
        return "an empty list" if not value else "a list"
    if isinstance(value, dict):
        return "an empty mapping" if not value else "a mapping"
    return f"an object of type {type(value).__name__}"


def near(word: Any, known: Iterable[str]) -> str:
    """`; did you mean 'xyz'?` where one of the known words is close to the given one, else nothing."""
    if not isinstance(word, str) or len(word) > 200:
        return ""
    by_lower = {name.lower(): name for name in known}
    matches = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean '{by_lower[matches[0]]}'?" if matches else ""


def either(words: Iterable[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
