"""mergekit's nearswap, ram and arcee_fusion configs give mergekit's tensors; docs/peers.md names what differs.

Runs only where MERGEKIT_PYTHON names the interpreter of an environment with mergekit 0.1.5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.peer import test_mergekit_geometry as peer
from tests.peer.test_mergekit_geometry import both, config, distance

pytestmark = peer.pytestmark
models = peer.models

THREE = ("near", "nearer", "nearest")
EQUAL = {
    "nearswap": config("nearswap", "near", base="base", t=5e-3),
    "ram": config("ram", *THREE, base="base", epsilon=1.6e-2),
    "ramplus_tl": config("ramplus_tl", *THREE, base="base", epsilon=1.6e-2, r=0.3, alpha=4.0),
}


@pytest.mark.parametrize("name", EQUAL)
def test_configs_give_the_same_tensors(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    theirs, ours = both(EQUAL[name], models, tmp_path)
    assert distance(theirs, ours) <= 1e-6


def test_arcee_fusion_keeps_the_same_entries_but_at_the_threshold(models: dict[str, Path], tmp_path: Path) -> None:
    """mergekit cuts the quartiles' places off, and its divergences carry float32's noise."""
    spec: dict[str, Any] = config("arcee_fusion", "far", base="base")
    theirs, ours = both(spec, models, tmp_path)
    for name, tensor in theirs.items():
        differ = ((tensor - ours[name]).abs() > 1e-6).float().mean()
        assert float(differ) <= 0.02, name
