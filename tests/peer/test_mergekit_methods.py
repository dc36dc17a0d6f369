"""Every deterministic method of mergekit gives mergekit's tensors (float32, within 1e-6 of a tensor's largest entry).

Densities here keep the same number of entries in both programs; docs/peers.md names what differs, and
test_mergekit_differences.py shows it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from mergecore.methods import METHODS
from tests.peer.support import Mergekit, both, config, distance

GRADIENT = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.5]},
    {"value": 0.5},
]
TWO, THREE = ("near", "nearest"), ("near", "nearer", "nearest")
WEIGHTS = (0.3, 0.9, 0.5)
EQUAL = {
    "linear": config("linear", *THREE, weights=WEIGHTS),
    "linear, not normalised": config("linear", *THREE, weights=WEIGHTS, normalize=False),
    "linear, gradients": config("linear", *THREE, weights=(1, 1, 1), weight=GRADIENT),
    "task_arithmetic": config("task_arithmetic", *THREE, base="base", weights=WEIGHTS),
    "task_arithmetic, lambda": config(
        "task_arithmetic", *THREE, base="base", weights=WEIGHTS, normalize=True, **{"lambda": 0.7}
    ),
    "passthrough": config("passthrough", "near"),
    "passthrough, scaled": config("passthrough", "near", scale=GRADIENT),
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
    "multislerp": config("multislerp", "far", "other", "near", weights=WEIGHTS),
    "multislerp, base": config("multislerp", *THREE, base="base", weights=WEIGHTS),
    "multislerp, not normalised": config("multislerp", *THREE, weights=WEIGHTS, normalize_weights=False),
    "karcher": config("karcher", "far", "other", "near"),
    "karcher, base": config("karcher", "far", "other", base="base", max_iter=3),
    "karcher, near": config("karcher", *THREE, tol=1e-4),
    "model_stock": config("model_stock", *THREE, base="base"),
    "model_stock, rows": config("model_stock", *THREE, base="base", filter_wise=True),
    "ties": config("ties", *THREE, base="base", weights=WEIGHTS, density=0.5),
    "ties, dense": config("ties", *THREE, base="base", weights=WEIGHTS),
    "ties, not normalised": config(
        "ties", *THREE, base="base", weights=WEIGHTS, density=0.25, normalize=False, **{"lambda": 1.3}
    ),
    "ties, rescaled": config(
        "ties", *THREE, base="base", weights=WEIGHTS, density=0.5, rescale=True, int8_mask=True
    ),
    "breadcrumbs": config("breadcrumbs", *THREE, base="base", weights=WEIGHTS, density=0.75, gamma=0.125),
    "breadcrumbs, no outliers": config("breadcrumbs", *THREE, base="base", weights=WEIGHTS, density=0.5, gamma=0.0),
    "breadcrumbs, little left": config("breadcrumbs", *THREE, base="base", weights=WEIGHTS, density=0.9375, gamma=0.25),
    "breadcrumbs_ties": config(
        "breadcrumbs_ties", *THREE, base="base", weights=WEIGHTS, density=0.75, gamma=0.125, normalize=True
    ),
    "dare_linear, dense": config("dare_linear", *THREE, base="base", weights=WEIGHTS, density=1.0),
    "dare_ties, dense": config("dare_ties", *THREE, base="base", weights=WEIGHTS, density=1.0),
    "della, dense": config("della", *THREE, base="base", weights=WEIGHTS, density=1.0),
    "della_linear, dense": config("della_linear", *THREE, base="base", weights=WEIGHTS, density=1.0),
    "sce": config("sce", *THREE, base="base"),
    "sce, selected": config("sce", *THREE, base="base", select_topk=0.25),
    "nearswap": config("nearswap", "near", base="base", t=5e-3),
    "nearswap, gradient": config("nearswap", "base", "near", base="base", t=[0.0, 1e-2]),
    "ram": config("ram", *THREE, base="base", epsilon=1.6e-2),
    "ramplus_tl": config("ramplus_tl", *THREE, base="base", epsilon=1.6e-2, r=0.3, alpha=4.0),
}  # fmt: skip
ELSEWHERE = {"arcee_fusion": "its threshold is cut off or sampled: test_mergekit_differences.py"}
"""Methods whose results differ by their definition."""


@pytest.mark.parametrize("name", EQUAL)
def test_configs_give_the_same_tensors(name: str, mergekit: Mergekit, models: dict[str, Path], tmp_path: Path) -> None:
    theirs, ours = both(mergekit, EQUAL[name], models, tmp_path)
    assert distance(theirs, ours) <= 1e-6


def test_no_method_of_mergekit_is_left_out(mergekit: Mergekit) -> None:
    """Nor any of a method's parameters: each is ours too, or is known to change nothing."""
    methods = mergekit.ask("describe")["methods"]
    assert set(methods) == {spec["merge_method"] for spec in EQUAL.values()} | ELSEWHERE.keys()
    for name, parameters in methods.items():
        method = METHODS[name]
        assert set(parameters) <= {parameter.name for parameter in method.parameters} | set(method.ignored), name
