"""mergekit, once per run of the tests, and small models for both programs.

Needs an environment with mergekit 0.1.5; MERGEKIT_PYTHON names its interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.models import llama, write_model
from tests.peer.support import CONFIG, PYTHON, Mergekit, moved


@pytest.fixture(scope="session")
def mergekit() -> Iterator[Mergekit]:
    if PYTHON is None:
        pytest.skip("mergekit is not here: set MERGEKIT_PYTHON to an interpreter with mergekit 0.1.5")
    peer = Mergekit(PYTHON)
    yield peer
    peer.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """base; near, nearer and nearest, whose deltas share a part as fine-tunings do; far and other."""
    folder = tmp_path_factory.mktemp("models")
    base = llama(layers=2, dtype=torch.float32)
    common = moved(base, 1e-2, 5)
    tensors = {
        "base": base,
        "near": moved(common, 1e-2, 6),
        "nearer": moved(common, 8e-3, 7),
        "nearest": moved(common, 5e-3, 8),
        "far": moved(base, 5e-2, 9),
        "other": moved(base, 8e-2, 10),
    }
    return {name: write_model(folder / name, what, CONFIG) for name, what in tensors.items()}
