"""Sizes in bytes as people write them. Imports nothing of ours, so that the daemon can read them too."""

from __future__ import annotations

import re
from decimal import Decimal

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}b": 1000**n for n, prefix in enumerate("kmgt", 1)}
_UNITS |= {f"{prefix}ib": 1024**n for n, prefix in enumerate("kmgt", 1)}
SIZE_PATTERN = r"^\s*([0-9]{1,19}(?:\.[0-9]{1,19})?)\s*([KkMmGgTt]?[Ii]?[Bb])?\s*$"
SIZE_EXAMPLES = "a size such as 512MiB, 1GiB or 5GB"


def parse_size(size: str | int) -> int:
    """Bytes of '512MiB', '1GiB' (powers of 1024), '5GB', '1.5 GB' (powers of 1000) or a plain number of bytes.

    Raises ValueError for anything else, for 0, and from 2**63 on.
    """
    found = None
    if isinstance(size, int) and not isinstance(size, bool):
        found = size
    elif isinstance(size, str) and (match := re.match(SIZE_PATTERN, size)):
        number, unit = match.groups(default="")
        if unit.lower() in _UNITS and ("." not in number or unit):
            found = int(Decimal(number) * _UNITS[unit.lower()])
    if found is None or not 0 < found < 2**63:
        raise ValueError(f"expected {SIZE_EXAMPLES}")
    return found


def told_size(nbytes: int) -> str:
    """Bytes for people."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 10**7 else f"{nbytes / 1e6:.2f} MB"
