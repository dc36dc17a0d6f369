"""mergekit configs run unchanged and give mergekit's tensors (float32, within 1e-6); docs/peers.md names what differs.

Runs only where MERGEKIT_PYTHON names the interpreter of an environment with mergekit 0.1.5.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import mergecore
from tests.models import LLAMA, llama, load_tensors, write_model

PYTHON = os.environ.get("MERGEKIT_PYTHON")
pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="mergekit is not here: set MERGEKIT_PYTHON to an interpreter with mergekit 0.1.5"
)

CONFIG = LLAMA | {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 80,
    "torch_dtype": "float32",
}
Tensors = dict[str, Tensor]


def moved(base: Tensors, scale: float, seed: int) -> Tensors:
    random = torch.Generator().manual_seed(seed)
    return {name: v + scale * torch.randn(v.shape, generator=random) for name, v in base.items()}


@pytest.fixture(scope="module")
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


def both(config: dict[str, Any], models: dict[str, Path], folder: Path) -> tuple[Tensors, Tensors]:
    """What mergekit and mergecore make of one file."""
    text = yaml.safe_dump(config)
    for name in sorted(models, key=len, reverse=True):
        text = text.replace(f"@{name}", str(models[name]))
    file = folder / "config.yml"
    file.write_text(text)
    command = [str(PYTHON), "-m", "mergekit.scripts.run_yaml", str(file), str(folder / "theirs"), "--no-copy-tokenizer"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    mergecore.merge(file, folder / "ours", device="cpu")
    return load_tensors(folder / "theirs"), load_tensors(folder / "ours")


def distance(theirs: Tensors, ours: Tensors) -> float:
    """The largest difference of an entry, relative to its tensor's largest."""
    assert set(theirs) == set(ours)
    assert all(ours[name].dtype == torch.float32 for name in ours)
    return max(float((theirs[name] - ours[name]).abs().max() / theirs[name].abs().max()) for name in theirs)


def config(method: str, *names: str, base: str | None = None, weights: tuple[float, ...] = (), **keys: Any) -> Any:
    entries: list[dict[str, Any]] = [{"model": f"@{name}"} for name in names]
    for entry, weight in zip(entries, weights, strict=False):
        entry["parameters"] = {"weight": weight}
    found: dict[str, Any] = {"merge_method": method, "models": entries, "dtype": "float32"}
    if base is not None:
        found["base_model"] = f"@{base}"
    return found | ({"parameters": keys} if keys else {})


GRADIENT = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.5]},
    {"value": 0.5},
]
TWO, THREE = ("near", "nearest"), ("near", "nearer", "nearest")
EQUAL = {
    "slerp": config("slerp", "base", "far", base="base", t=0.3),
    "slerp, near": config("slerp", "base", "near", base="base", t=0.3),
    "slerp, second is the base": config("slerp", "other", "far", base="far", t=GRADIENT),
    "nuslerp": config("nuslerp", "far", "other", weights=(0.3, 0.9)),
    "nuslerp, base": config("nuslerp", *TWO, base="base", weights=(0.3, 0.9)),
    "nuslerp, rows": config("nuslerp", "far", "other", weights=(0.3, 0.9), nuslerp_flatten=False),
    "nuslerp, rows, base": config("nuslerp", *TWO, base="base", weights=(1, 2), nuslerp_flatten=False),
    "nuslerp, columns": config(
        "nuslerp", "far", "other", weights=(0.3, 0.9), nuslerp_flatten=False, nuslerp_row_wise=True
    ),
    "nuslerp, columns, base": config(
        "nuslerp", *TWO, base="base", weights=(1, 2), nuslerp_flatten=False, nuslerp_row_wise=True
    ),
    "multislerp": config("multislerp", "far", "other", "near", weights=(0.3, 0.9, 0.5)),
    "multislerp, base": config("multislerp", *THREE, base="base", weights=(0.3, 0.9, 0.5)),
    "multislerp, not normalised": config("multislerp", *THREE, weights=(0.3, 0.9, 0.5), normalize_weights=False),
    "karcher": config("karcher", "far", "other", "near"),
    "karcher, base": config("karcher", "far", "other", base="base", max_iter=3),
    "karcher, near": config("karcher", *THREE, tol=1e-4),
    "model_stock": config("model_stock", *THREE, base="base"),
    "model_stock, rows": config("model_stock", *THREE, base="base", filter_wise=True),
}


@pytest.mark.parametrize("name", EQUAL)
def test_configs_give_the_same_tensors(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    theirs, ours = both(EQUAL[name], models, tmp_path)
    assert distance(theirs, ours) <= 1e-6


# Differences, as docs/peers.md names them ----------------------------------------------------------


def test_small_deltas_keep_their_cosine_in_model_stock(models: dict[str, Path], tmp_path: Path) -> None:
    """Two equal deltas have the cosine 1, so their mean is right, whatever their length; mergekit's cosine
    shrinks with lengths whose product is below 1e-6."""
    base = load_tensors(models["base"])
    small = {name: v + 2.0**-20 * v.abs().max() for name, v in base.items()}
    given = models | {name: write_model(tmp_path / name, small, CONFIG) for name in ("near", "nearer")}
    theirs, ours = both(config("model_stock", "near", "nearer", base="base"), given, tmp_path)
    for name, right in small.items():
        assert torch.allclose(ours[name], right, rtol=1e-7, atol=0)
    name = "model.norm.weight"
    assert float((theirs[name] - base[name]).abs().max()) < 0.1 * float((small[name] - base[name]).abs().max())


def test_a_tensor_that_no_model_changed_stays_in_multislerp(models: dict[str, Path], tmp_path: Path) -> None:
    """mergekit stops: the weighted sum of the deltas is zero."""
    frozen = "model.norm.weight"
    base = load_tensors(models["base"])
    given = dict(models)
    for name in THREE:
        tensors = load_tensors(models[name]) | {frozen: base[frozen]}
        given[name] = write_model(tmp_path / name, tensors, CONFIG)
    with pytest.raises(AssertionError, match="The weighted sum of the input tensors is zero"):
        both(config("multislerp", *THREE, base="base", weights=(1, 1, 1)), given, tmp_path)
    mergecore.merge(tmp_path / "config.yml", tmp_path / "ours", device="cpu")
    assert torch.equal(load_tensors(tmp_path / "ours")[frozen], base[frozen])


@pytest.mark.parametrize("method", ["nuslerp", "multislerp", "karcher"])
def test_bfloat16_is_rounded_once(method: str, models: dict[str, Path], tmp_path: Path) -> None:
    """mergekit works in bfloat16 throughout."""
    given = {}
    for name in ("far", "other"):
        tensors = {key: v.bfloat16() for key, v in load_tensors(models[name]).items()}
        given[name] = write_model(tmp_path / name, tensors, CONFIG | {"torch_dtype": "bfloat16"})
    weights = () if method == "karcher" else (0.3, 0.9)
    asked = config(method, "far", "other", weights=weights) | {"dtype": "bfloat16"}
    theirs, ours = both(asked, given, tmp_path)
    exact = yaml.safe_load((tmp_path / "config.yml").read_text()) | {"dtype": "float32"}
    mergecore.merge(mergecore.load_spec(exact), tmp_path / "exact", device="cpu")
    for name, right in load_tensors(tmp_path / "exact").items():
        assert ours[name].dtype == theirs[name].dtype == torch.bfloat16
        assert torch.equal(ours[name], right.bfloat16())
    wrong = [float((theirs[name] != ours[name]).float().mean()) for name in ours]
    assert max(wrong) > 0.1
