"""Methods that keep some deltas and elect signs, held against NumPy oracles of their definitions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import mergecore
from mergecore import merging, selecting, topsets
from mergecore.errors import NonFiniteError, SpecError
from mergecore.ops import Drop
from mergecore.planning import MergePlan
from tests import oracle
from tests.selections import BF16, F16, F32, assert_right, checkpoints, deltas_of, elected, share, spread, top, trimmed
from tests.test_methods import merge

DETERMINISTIC: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ties": ({"merge_method": "ties", "parameters": {"density": 0.3, "lambda": 0.8}}, {"scale": 0.8}),
    "ties, unweighted": (
        {"merge_method": "ties", "parameters": {"density": 0.3, "elect": "unweighted"}},
        {"elect": "unweighted"},
    ),
    "ties, sum": ({"merge_method": "ties", "parameters": {"density": 0.3, "normalize": False}}, {"normalize": False}),
    "breadcrumbs": (
        {"merge_method": "breadcrumbs", "parameters": {"density": 0.3, "gamma": 0.05}},
        {"elect": "none", "normalize": False},
    ),
    "breadcrumbs_ties": (
        {"merge_method": "breadcrumbs_ties", "parameters": {"density": 0.3, "gamma": 0.05}},
        {"normalize": False},
    ),
    "magnitude in front": (
        {
            "merge_method": "task_arithmetic",
            "parameters": {"lambda": 0.5},
            "sparsify": {"method": "magnitude", "density": 0.3},
        },
        {"elect": "none", "normalize": False, "scale": 0.5},
    ),
}


@pytest.mark.parametrize("case", DETERMINISTIC)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_trimming_methods_are_their_definition(case: str, count: int) -> None:
    spec, how = DETERMINISTIC[case]
    base, models = checkpoints(count, 5, BF16, F16, F32, BF16)
    weights = [0.5, 0.3, 1.0, 0.25, 2.0][:count]
    found = merge(base, models, each=[{"weight": weight} for weight in weights], dtype="float32", **spec)
    gamma = spec.get("parameters", {}).get("gamma", 0.0)
    for name, start in base.items():
        deltas = deltas_of(start, [model[name] for model in models])
        values = [np.where(trimmed(delta, 0.3, gamma), delta, 0).astype(np.longdouble) for delta in deltas]
        assert_right(found[name], elected(oracle.floats(start), values, weights, **how), name)


@pytest.mark.parametrize("rescale", ["l1", "probability", None])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_is_its_definition(method: str, rescale: str | None) -> None:
    base, models = checkpoints(3, 6, BF16, BF16)
    more = {"rescale": False} if rescale is None else {"rescale_norm": rescale}
    each = [{"density": density} for density in (0.9, 0.25, 1.0)]
    found = merge(base, models, each=each, merge_method=method, seed=9, dtype="float32", parameters=more)
    for name, start in base.items():
        values = []
        for n, (delta, density) in enumerate(
            zip(deltas_of(start, [model[name] for model in models]), (0.9, 0.25, 1.0), strict=True)
        ):
            drop = Drop.of(float(1 - Fraction(str(density))), True, seed=9, tensor=name, model=n, purpose="kept")
            numbers = np.array(oracle.random_numbers(drop.key, range(delta.size)), dtype=np.uint64)
            kept = np.where(numbers.reshape(delta.shape) >= drop.threshold, delta, 0).astype(np.longdouble)
            factor: Any = 1.0
            if rescale == "probability":
                factor = np.longdouble(1) / np.longdouble(str(density))
            elif rescale == "l1" and np.abs(kept).sum() > 0:
                factor = np.abs(delta.astype(np.longdouble)).sum() / np.abs(kept).sum()
            values.append(factor * kept)
        elect = "none" if method == "dare_linear" else "weighted"
        exact = elected(oracle.floats(start), values, [1.0] * 3, elect=elect, normalize=False)
        assert_right(found[name], exact, name)


def test_sce_is_its_definition() -> None:
    base, models = checkpoints(3, 7, F32, F32)
    for topk in (1.0, 0.2):
        found = merge(base, models, merge_method="sce", parameters={"select_topk": topk})
        for name, start in base.items():
            deltas = deltas_of(start, [model[name] for model in models])
            varies = spread(deltas)
            mask = np.ones(varies.shape, bool)
            if topk < 1:
                mask = top(varies, max(1, share(topk, int(np.count_nonzero(varies)))))
            values = [np.where(mask, delta, 0).astype(np.longdouble) for delta in deltas]
            squares = [float((value * value).mean()) for value in values]
            weights = [square / sum(squares) if sum(squares) else 1 / 3 for square in squares]
            assert_right(found[name], elected(oracle.floats(start), values, weights, elect="unweighted"), name)


def test_models_that_are_equal_have_no_varied_entries() -> None:
    base, models = checkpoints(1, 8, F32, F32)
    kept = merge(base, models * 3, merge_method="sce", parameters={"select_topk": 0.5})
    for name, tensor in base.items():
        assert torch.equal(kept[name], tensor)


# Properties ---------------------------------------------------------------------------------------

METHODS = ("ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "sce")
SOME: Mapping[str, Mapping[str, Any]] = {
    **{method: {"density": 0.4} for method in METHODS},
    "sce": {"select_topk": 0.4},
}


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("method", METHODS)
def test_copies_of_the_base_give_the_base_bit_for_bit(method: str, dtype: torch.dtype) -> None:
    base, _ = checkpoints(1, 1, dtype, dtype)
    base["model.layers.0.input_layernorm.weight"][:3] = torch.tensor([-0.0, 0.0, -1.0])
    found = merge(base, [base] * 3, merge_method=method, parameters=SOME[method])
    for name, tensor in base.items():
        assert torch.equal(oracle.bits(found[name]), oracle.bits(tensor)), name


@pytest.mark.parametrize("method", ["dare_linear", "breadcrumbs", "della_linear"])
def test_density_1_is_task_arithmetic_bit_for_bit(method: str) -> None:
    base, models = checkpoints(3, 2, BF16, F32, BF16)
    each = [{"weight": weight} for weight in (0.3, 0.7, -0.1)]
    more: dict[str, Any] = {"dtype": "float32", "each": each, "parameters": {"lambda": 0.9}}
    dense = merge(base, models, merge_method="task_arithmetic", **more)
    found = merge(base, models, merge_method=method, **more)
    for name in base:
        assert torch.equal(found[name], dense[name]), name


@pytest.mark.parametrize("method", ["ties", "dare_ties", "breadcrumbs_ties", "della"])
def test_density_1_only_elects(method: str) -> None:
    base, models = checkpoints(3, 2, BF16, F32, BF16)
    found = merge(base, models, merge_method=method, dtype="float32", parameters={"normalize": True})
    for name, start in base.items():
        values = [d.astype(np.longdouble) for d in deltas_of(start, [model[name] for model in models])]
        assert_right(found[name], elected(oracle.floats(start), values, [1.0] * 3), name)


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties", "sce"])
def test_the_order_of_models_changes_no_bit(method: str) -> None:
    base, models = checkpoints(3, 4, BF16, BF16)
    first = merge(base, models, merge_method=method, parameters=SOME[method], dtype="bfloat16")
    for order in ((1, 2, 0), (2, 1, 0)):
        other = merge(base, [models[n] for n in order], merge_method=method, parameters=SOME[method], dtype="bfloat16")
        for name in base:
            assert torch.equal(first[name], other[name]), name


@pytest.mark.parametrize("density", [0.1, 0.123, 0.5])
def test_exactly_the_promised_share_is_kept(density: float) -> None:
    base, models = checkpoints(1, 3, F32, F32)
    found = merge(base, models, merge_method="ties", parameters={"density": density})
    for name, start in base.items():
        assert int((found[name] != start).sum()) == max(1, share(density, start.numel())), name


def test_a_gamma_that_rounds_to_nothing_drops_no_outlier() -> None:
    base, models = checkpoints(1, 3, F32, F32)
    found = merge(base, models, merge_method="breadcrumbs", parameters={"density": 0.5, "gamma": 1e-6})
    ties = merge(base, models, merge_method="ties", parameters={"density": 0.5})
    for name in base:
        assert torch.equal(found[name], ties[name]), name


@pytest.mark.parametrize(
    "sparsify", [None, {"method": "dare", "drop_rate": 0.2}, {"method": "breadcrumbs", "density": 0.5}]
)
@pytest.mark.parametrize("method", [*METHODS, "widen", "linear"])
def test_windows_change_no_byte(method: str, sparsify: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(11)
    base = {"a.weight": torch.randn(130, 90, generator=random).to(BF16), "b": torch.randn(9001, generator=random)}
    models = [
        {name: (t.float() + 0.01 * torch.randn(t.shape, generator=random)).to(t.dtype) for name, t in base.items()}
        for _ in range(2)
    ]
    spec: dict[str, Any] = {"merge_method": method, "parameters": dict(SOME.get(method, {}))}
    if "density" in spec["parameters"]:
        spec["parameters"]["rescale"] = True
        if "dare" in method or "della" in method:
            spec["parameters"]["rescale_norm"] = "l1"
    if sparsify is not None:
        spec["sparsify"] = sparsify
    whole = merge(base, models, **spec)

    def small_windows(*arguments: Any, **options: Any) -> MergePlan:
        planned = mergecore.plan(*arguments, **options)
        jobs = [replace(job, window_rows=min(job.rows, job.block_rows), keep=False) for job in planned.jobs]
        return replace(planned, jobs=tuple(jobs))

    monkeypatch.setattr(merging, "plan", small_windows)
    monkeypatch.setattr(topsets, "ROOM", 8)
    monkeypatch.setattr(selecting, "RANK_BYTES", 1 << 16)
    cut = merge(base, models, **spec, run={"threads": 2})
    for name in base:
        assert torch.equal(oracle.bits(whole[name]), oracle.bits(cut[name])), name


DELLA = {"method": "della", "density": 0.4}


@pytest.mark.parametrize(
    "spec",
    [
        {"merge_method": "dare_linear", "parameters": {"density": 0.4}},
        {"merge_method": "della_linear", "parameters": {"density": 0.4}},
        {"merge_method": "task_arithmetic", "sparsify": DELLA},
    ],
    ids=["dare", "della", "della in front"],
)
def test_random_methods_keep_share_and_mean(spec: dict[str, Any]) -> None:
    """Within 4 sigma: the kept share, the mean of kept and rescaled deltas, and their mean square."""
    n, density = 200_000, 0.4
    base = {"w": torch.zeros(400, 500)}
    random = torch.Generator().manual_seed(1)
    model = {"w": 1.0 + torch.stack([torch.randperm(500, generator=random) for _ in range(400)]) / 500}
    kept = merge(base, [model], **spec, seed=3)["w"].double()
    delta = model["w"].double()
    odds = torch.full_like(delta, density)
    if spec["merge_method"] != "dare_linear":
        odds = density - 0.15 + 0.3 * delta.argsort(dim=1).argsort(dim=1) / 499
    sigma = (odds * (1 - odds)).sum().sqrt()
    assert abs((kept != 0).sum() - density * n) < 4 * sigma
    variance = (delta**2 * (1 / odds - 1)).sum()
    assert abs(kept.sum() - delta.sum()) < 4 * variance.sqrt()
    squares = delta**2 / odds
    assert abs((kept**2).sum() - squares.sum()) < 4 * (squares**2 * (1 / odds - 1)).sum().sqrt()
    hits = torch.where(kept != 0, kept * odds / delta, torch.ones_like(kept))
    assert torch.allclose(hits, torch.ones_like(hits), atol=1e-5)


@pytest.mark.parametrize("memory", [40 << 20, 1 << 30])
@pytest.mark.parametrize(
    "method", ["widen", "linear", "slerp", "karcher", "model_stock", "ties", "sce", "della", "consensus_ta", "tsv"]
)
def test_della_in_front_of_a_method_is_the_method_on_thinned_models(method: str, memory: int) -> None:
    base, models = checkpoints(1 if method == "slerp" else 2, 5, F32, BF16)
    spec: dict[str, Any] = {"sparsify": {**DELLA, "rescale": False}, "seed": 4, "dtype": "float32"}
    alone = [[{"weight": float(n == m)} for m in range(len(models))] for n in range(len(models))]
    thinned = [merge(base, models, merge_method="task_arithmetic", each=each, **spec) for each in alone]
    assert any(bool((thinned[0][name] != models[0][name]).any()) for name in base)
    parameters = {"slerp": {"t": 0.3}, "ties": {"density": 0.5}, "della": {"density": 0.7}}.get(method, {})
    found = merge(base, models, merge_method=method, parameters=parameters, run={"memory": memory}, **spec)
    expected = merge(base, thinned, merge_method=method, parameters=parameters, seed=4, dtype="float32")
    for name in base:
        assert torch.equal(found[name], expected[name]), name


def test_models_draw_numbers_of_their_own() -> None:
    base = {"w": torch.zeros(100, 100)}
    model = {"w": torch.ones(100, 100)}
    both = merge(base, [model, model], merge_method="dare_linear", parameters={"density": 0.5})["w"]
    assert {0.0, 2.0, 4.0} == set(both.unique().tolist())
    again = merge(base, [model, model], merge_method="dare_linear", parameters={"density": 0.5})["w"]
    assert torch.equal(both, again)


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"merge_method": "ties", "parameters": {"density": 1.5}}, "density is 1.5; it must be from 0 to 1"),
        ({"merge_method": "della", "parameters": {"density": 0.1}}, "density 0.1 +- epsilon 0.15 must lie"),
        ({"merge_method": "sce", "parameters": {"select_topk": -1}}, "select_topk is -1"),
    ],
)
def test_shares_outside_of_0_to_1_are_refused(spec: dict[str, Any], message: str) -> None:
    base, models = checkpoints(1, 3, F32, F32)
    with pytest.raises(SpecError) as refusal:
        merge(base, models, **spec)
    assert message in str(refusal.value)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_inputs_that_are_not_finite_are_named(method: str, value: float) -> None:
    base, models = checkpoints(2, 3, F32, F32)
    models[1]["model.embed_tokens.weight"][3, 4] = value
    spec: dict[str, Any] = {"merge_method": method, "parameters": SOME[method]}
    with pytest.raises(NonFiniteError, match=r"model\.embed_tokens\.weight holds NaN or Inf"):
        merge(base, models, **spec)
    merge(base, models, on_nonfinite="warn", **spec)
