"""How inputs are changed: bytes anywhere, and JSON (a file's, or the header of a weight file) node by node."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, 1e308, -0.0, float("nan"), float("inf"), "", "x", "\0",
    "\ud800", "../x", "/etc/passwd", "..", ".", "model.safetensors", "\x1b[31m", "\n", "(a+)+$", "[", "x" * 5000,
    [], {}, [[]], {"": {}}, [0] * 1000,
    "F32", "F8_E4M3", [2**62, 4], [-1], [1e3], "<unk>", {"content": "two"}, {"content": 1},
]  # fmt: skip


def mutated(data: bytes, chance: random.Random) -> bytes:
    """One to four changes, in the structure where there is one."""
    for _ in range(chance.randint(1, 4)):
        data = _in_structure(data, chance) if chance.random() < 0.7 else _in_bytes(data, chance)
    return data


def _in_structure(data: bytes, chance: random.Random) -> bytes:
    length = struct.unpack("<Q", data[:8])[0] if len(data) > 8 else 0
    try:
        if 0 < length <= len(data) - 8:  # safetensors
            header = _dumped(_with_a_node_changed(json.loads(data[8 : 8 + length]), chance))
            return struct.pack("<Q", len(header)) + header + data[8 + length :]
        return _dumped(_with_a_node_changed(json.loads(data), chance))
    except (ValueError, RecursionError):
        return _in_bytes(data, chance)


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _with_a_node_changed(value: Any, chance: random.Random) -> Any:
    """Goes down at random; there a node is replaced, removed, doubled or renamed."""
    if isinstance(value, dict | list) and value and chance.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = chance.choice(keys)
        act = chance.random()
        if act < 0.1:
            del value[key]
        elif act < 0.2 and isinstance(value, dict):
            value[str(chance.choice([*keys, *HOSTILE]))] = value[key]
        elif act < 0.2 and isinstance(value, list):
            value.append(value[key])
        else:
            value[key] = _with_a_node_changed(value[key], chance)
        return value
    if isinstance(value, int) and not isinstance(value, bool) and chance.random() < 0.5:
        return value + chance.choice([-1, 1, 8, -8, 2**32, -(2**63)])
    return json.loads(json.dumps(chance.choice(HOSTILE)))


def _in_bytes(data: bytes, chance: random.Random) -> bytes:
    at, length = chance.randrange(len(data) + 1), chance.randint(1, 16)
    act = chance.randrange(5)
    if act == 0:
        return data[:at] + data[at + length :]
    if act == 1:
        return data[:at] + chance.randbytes(length) + data[at:]
    if act == 2:
        return data[:at] + chance.randbytes(length) + data[at + length :]
    if act == 3:
        return data[:at] + data[at : at + length] * chance.choice([2, 3, 1000]) + data[at + length :]
    return data[:at] + str(chance.choice(HOSTILE)).encode("utf-8", "surrogatepass") + data[at:]
