"""dare_* and della*: what both programs keep has the share, the mean and the variance that the methods promise.

Random numbers differ, so sums over all entries of a model are compared with their expectation, within 4 standard
deviations. Deltas are taken from a base of zeros: the result is what was kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mergecore
from tests.models import load_tensors, write_model
from tests.peer.support import CONFIG, Mergekit, Tensors, both, config

DENSITY, EPSILON = 0.7, 0.2
METHODS = ("dare_linear", "dare_ties", "della", "della_linear")


@pytest.fixture(scope="module")
def ranked(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """base: zeros. near: every row holds the numbers from 1 to its length, in any order, with any signs."""
    folder = tmp_path_factory.mktemp("ranked")
    random = torch.Generator().manual_seed(11)
    base = {name: torch.zeros_like(v) for name, v in load_tensors(models["base"]).items()}
    near = {
        name: (torch.rand(v.shape, generator=random).argsort(-1) + 1.0)
        * (torch.randint(0, 2, v.shape, generator=random) * 2 - 1)
        for name, v in base.items()
    }
    return {name: write_model(folder / name, what, CONFIG) for name, what in (("base", base), ("near", near))}


def probabilities(method: str, deltas: Tensors) -> np.ndarray:
    """To be kept, of every entry of the model."""
    if method.startswith("dare"):
        return np.full(sum(v.numel() for v in deltas.values()), DENSITY)
    ranks = ((v.abs() - 1) / (v.shape[-1] - 1) for v in deltas.values())
    return np.concatenate([(DENSITY - EPSILON + 2 * EPSILON * rank).double().numpy().ravel() for rank in ranks])


def flat(tensors: Tensors, like: Tensors) -> np.ndarray:
    return np.concatenate([tensors[name].double().numpy().ravel() for name in like])


def sigmas(found: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> float:
    """How many standard deviations the sum of independent entries is away from its mean."""
    return float(abs(found.sum() - mean.sum()) / np.sqrt(variance.sum()))


def asked(method: str, **keys: Any) -> dict[str, Any]:
    if method.startswith("della"):
        keys |= {"epsilon": EPSILON}
    return config(method, "near", base="base", weights=(1,), density=DENSITY, **keys) | {"seed": 5}


@pytest.mark.parametrize("method", METHODS)
def test_share_mean_and_variance_are_as_promised(
    method: str, mergekit: Mergekit, ranked: dict[str, Path], tmp_path: Path
) -> None:
    deltas = load_tensors(ranked["near"])
    found = both(mergekit, asked(method, rescale=False), ranked, tmp_path, "--random-seed", "3")
    p, d = probabilities(method, deltas), flat(deltas, deltas)
    least = np.abs(d) <= np.median(np.abs(d))
    for kept in (flat(tensors, deltas) for tensors in found):
        assert set(np.unique(kept / d)) == {0.0, 1.0}
        for some in (np.ones_like(least), least, ~least):
            share = (kept != 0)[some]
            assert sigmas(share, p[some], (p * (1 - p))[some]) < 4
        assert sigmas(kept, p * d, p * (1 - p) * d**2) < 4
        assert sigmas(kept**2, p * d**2, p * (1 - p) * d**4) < 4


@pytest.mark.parametrize("method", METHODS)
def test_what_is_kept_is_rescaled(method: str, mergekit: Mergekit, ranked: dict[str, Path], tmp_path: Path) -> None:
    """By its probability here, which makes every entry right in the mean; mergekit restores the sum of |d| of each
    tensor, as `rescale_norm: l1` does."""
    deltas = load_tensors(ranked["near"])
    theirs, ours = both(mergekit, asked(method), ranked, tmp_path, "--random-seed", "3")
    p, d = probabilities(method, deltas), flat(deltas, deltas)
    kept = flat(ours, deltas)
    np.testing.assert_allclose(kept[kept != 0], (d / p)[kept != 0], rtol=1e-6)
    assert sigmas(kept, d, (1 - p) / p * d**2) < 4
    spec = mergecore.load_spec(
        {
            **asked(method, rescale_norm="l1"),
            "base_model": str(ranked["base"]),
            "models": [{"model": str(ranked["near"]), "parameters": {"weight": 1}}],
        }
    )
    mergecore.merge(spec, tmp_path / "l1", device="cpu")
    for tensors in (theirs, load_tensors(tmp_path / "l1")):
        for name, delta in deltas.items():
            restored = tensors[name].double().abs().sum() / delta.double().abs().sum()
            assert float(restored) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_models_are_dropped_independently(
    method: str, mergekit: Mergekit, ranked: dict[str, Path], tmp_path: Path
) -> None:
    """Deltas of 1 and 4: the result tells which of them are in it."""
    base = load_tensors(ranked["base"])
    given = ranked | {
        name: write_model(tmp_path / name, {key: torch.full_like(v, step) for key, v in base.items()}, CONFIG)
        for name, step in (("near", 1.0), ("far", 4.0))
    }
    spec = config(method, "near", "far", base="base", weights=(1, 1), density=DENSITY, rescale=False)
    for tensors in both(mergekit, spec, given, tmp_path, "--random-seed", "4"):
        kept = flat(tensors, base)
        assert set(np.unique(kept)) == {0.0, 1.0, 4.0, 5.0}
        q = np.full(kept.size, DENSITY**2)
        assert sigmas(kept == 5, q, q * (1 - q)) < 4
