"""What is compared over the whole model: one share of all deltas, and the lengths of the models' moves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergecore.errors import NonFiniteError, SpecError
from mergecore.methods.base import Keep
from mergecore.survey import Chained, survey
from tests import oracle
from tests.selections import (
    BF16,
    F16,
    F32,
    InMemory,
    checkpoints,
    deltas_of,
    elected,
    mask_of,
    room_for,
    share,
    top,
    trimmed,
)  # fmt: skip
from tests.test_methods import assert_right, merge

few = settings(max_examples=40, deadline=None)


def in_stored_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names as their data lies in the file."""
    data = safetensors.torch.save(dict(tensors))
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return sorted(header, key=lambda name: header[name]["data_offsets"])


def of_model(
    base: Mapping[str, Tensor], model: Mapping[str, Tensor], density: float, gamma: float = 0.0
) -> dict[str, oracle.Bools]:
    """What a share of the whole model keeps of each tensor: all deltas are one long vector."""
    names = in_stored_order(base)
    deltas = [deltas_of(base[name], [model[name]])[0] for name in names]
    mask = trimmed(np.concatenate([delta.reshape(-1) for delta in deltas]), density, gamma)
    ends = np.cumsum([delta.size for delta in deltas])[:-1]
    parts = np.split(mask, ends)
    return {name: part.reshape(delta.shape) for name, part, delta in zip(names, parts, deltas, strict=True)}


# Top sets of several tensors ----------------------------------------------------------------------


@st.composite
def several_tensors(draw: st.DrawFn) -> list[InMemory]:
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    count = draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["any", "grid", "zeros"]))
    found = []
    for entries in draw(st.lists(st.sampled_from([0, 1, 2, 7, 64, 65, 300]), min_size=1, max_size=5)):
        base = torch.zeros(entries) if kind == "zeros" else torch.randn(entries, generator=random)
        models = []
        for _ in range(count):
            delta = torch.randn(entries, generator=random)
            if kind != "any":
                delta = torch.randint(-2, 3, (entries,), generator=random) / 64
            models.append(base + delta)
        cuts = tuple(draw(st.lists(st.integers(0, entries), max_size=2)))
        found.append(InMemory(base, models, cuts, block=8))
    return found


@few
@given(
    several_tensors(), st.sampled_from([0.0, 1e-6, 0.1, 0.25, 0.5, 0.999]), st.sampled_from([0.0, 0.01, 0.3]),
    st.sampled_from([1, 3, 1 << 20]),
)  # fmt: skip
def test_the_top_set_of_several_tensors_is_that_of_all_their_entries(
    tensors: list[InMemory], density: float, gamma: float, room: int
) -> None:
    keeps = (Keep(density=density, outliers=gamma),) * len(tensors[0].models)
    jobs: list[Any] = [SimpleNamespace(name=str(number), keeps=keeps) for number in range(len(tensors))]
    with room_for(room):
        found = survey(list(zip(jobs, tensors, strict=True)), seed=1)  # type: ignore[arg-type]
    assert all(tensor.reads + tensor.skipped == 2 for tensor in tensors)
    for n in range(len(keeps)):
        magnitudes = [np.abs(deltas_of(tensor.base, [tensor.models[n]])[0]) for tensor in tensors]
        masks = [mask_of(found[job.name].kept[n], m) for job, m in zip(jobs, magnitudes, strict=True)]
        together = np.concatenate(magnitudes)
        kept = max(1, share(density, together.size)) if density and together.size else 0
        outliers = min(share(gamma, together.size), together.size - kept) if kept else 0
        expected = top(together, outliers + kept) & ~top(together, outliers)
        assert (np.concatenate(masks) == expected).all()


def test_ties_of_a_large_model_are_counted_in_few_blocks() -> None:
    reads = [SimpleNamespace(entries=entries, block=4096, device=None) for entries in (7 * 10**9, 0, 5, 7 * 10**9)]
    chained = Chained(reads)
    assert chained.entries == 14 * 10**9 + 5
    assert chained.firsts == [0, 7 * 10**9, 7 * 10**9, 7 * 10**9 + 5]
    assert chained.block % 4096 == 0
    assert chained.entries / chained.block <= 1 << 16


# Whole merges -------------------------------------------------------------------------------------

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ties": ({"density": 0.3, "lambda": 0.8}, {"scale": 0.8}),
    "breadcrumbs": ({"density": 0.3, "gamma": 0.05}, {"elect": "none", "normalize": False}),
    "breadcrumbs_ties": ({"density": 0.3, "gamma": 0.05}, {"normalize": False}),
}


@pytest.mark.parametrize("method", CASES)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("rescale", [False, True])
def test_trimming_the_whole_model_is_its_definition(method: str, count: int, rescale: bool) -> None:
    parameters, how = CASES[method]
    base, models = checkpoints(count, 5, BF16, F16, F32, BF16)
    weights = [0.5, 0.3, 1.0][:count]
    found = merge(
        base,
        models,
        each=[{"weight": weight} for weight in weights],
        dtype="float32",
        merge_method=method,
        parameters={**parameters, "scope": "model", "rescale": rescale},
    )
    masks = [of_model(base, model, 0.3, parameters.get("gamma", 0.0)) for model in models]
    factors: list[Any] = [np.longdouble(1)] * count
    if rescale:
        for n, model in enumerate(models):
            deltas = {name: np.abs(deltas_of(base[name], [model[name]])[0].astype(np.longdouble)) for name in base}
            kept: Any = sum(delta[masks[n][name]].sum() for name, delta in deltas.items())
            factors[n] = sum(delta.sum() for delta in deltas.values()) / kept
    for name, start in base.items():
        deltas_here = deltas_of(start, [model[name] for model in models])
        values = [
            factor * np.where(mask[name], delta, 0).astype(np.longdouble)
            for factor, mask, delta in zip(factors, masks, deltas_here, strict=True)
        ]
        assert_right(found[name], elected(oracle.floats(start), values, weights, **how), name)


@pytest.mark.parametrize("density", [0.1, 0.123, 0.5])
def test_exactly_the_promised_share_of_the_model_is_kept(density: float) -> None:
    base, models = checkpoints(1, 3, F32, F32)
    parameters = {"density": density, "scope": "model"}
    found = merge(base, models, merge_method="ties", parameters=parameters)
    changed = {name: int((found[name] != start).sum()) for name, start in base.items()}
    total = sum(start.numel() for start in base.values())
    assert sum(changed.values()) == share(density, total)
    assert any(changed[name] != share(density, start.numel()) for name, start in base.items())


def test_tensors_may_be_compared_by_themselves_while_others_are_compared_together() -> None:
    base, models = checkpoints(1, 4, F32, F32)
    alone = "model.embed_tokens.weight"
    scope = [{"filter": "embed_tokens", "value": "tensor"}, {"value": "model"}]
    found = merge(base, models, merge_method="ties", parameters={"density": 0.2, "scope": scope})
    rest = {name: start for name, start in base.items() if name != alone}
    masks = of_model(rest, models[0], 0.2)
    masks[alone] = trimmed(deltas_of(base[alone], [models[0][alone]])[0], 0.2)
    for name, start in base.items():
        assert torch.equal(found[name] != start, torch.from_numpy(masks[name])), name


def squared_lengths(base: Mapping[str, Tensor], models: Sequence[Mapping[str, Tensor]], name: str) -> list[Any]:
    deltas = deltas_of(base[name], [model[name] for model in models])
    return [(delta.astype(np.longdouble) ** 2).sum() for delta in deltas]


@pytest.mark.parametrize("scope", ["model", "tensor", None])
@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_metagpt_weighs_models_by_their_squared_lengths(scope: str | None, count: int) -> None:
    base, models = checkpoints(count, 6, BF16, F16, F32, BF16)
    parameters: dict[str, Any] = {"lambda": 0.8} | ({} if scope is None else {"scope": scope})
    found = merge(base, models, merge_method="metagpt", dtype="float32", parameters=parameters)
    lengths = {name: squared_lengths(base, models, name) for name in base}
    whole: list[Any] = [sum(lengths[name][n] for name in base) for n in range(count)]
    for name, start in base.items():
        here = lengths[name] if scope == "tensor" else whole
        values = [delta.astype(np.longdouble) for delta in deltas_of(start, [model[name] for model in models])]
        exact: Any = oracle.floats(start).astype(np.longdouble)
        size = np.abs(exact)
        for square, value in zip(here, values, strict=True):
            share_of = np.longdouble("0.8") * square / sum(here)
            exact = exact + share_of * value
            size = size + np.abs(share_of * value)
        assert_right(found[name], oracle.Exact(exact, size), name)


def test_metagpt_of_one_model_is_that_model() -> None:
    base, models = checkpoints(1, 7, BF16, F32)
    found = merge(base, models, merge_method="metagpt", dtype="float32")
    for name in base:
        assert torch.equal(found[name], models[0][name].float()), name


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("method", ["metagpt", "ties", "breadcrumbs"])
def test_copies_of_the_base_give_the_base_bit_for_bit(method: str, scope: str) -> None:
    base, _ = checkpoints(1, 1, BF16, BF16)
    base["model.layers.0.input_layernorm.weight"][:3] = torch.tensor([-0.0, 0.0, -1.0])
    parameters = {"scope": scope} | ({} if method == "metagpt" else {"density": 0.4})
    found = merge(base, [base] * 3, merge_method=method, parameters=parameters)
    for name, tensor in base.items():
        assert torch.equal(oracle.bits(found[name]), oracle.bits(tensor)), name


@pytest.mark.parametrize("method", ["metagpt", "ties", "breadcrumbs_ties"])
def test_the_order_of_models_changes_no_bit(method: str) -> None:
    base, models = checkpoints(3, 4, BF16, BF16)
    parameters = {"scope": "model"} | ({} if method == "metagpt" else {"density": 0.4})
    first = merge(base, models, merge_method=method, parameters=parameters)
    for order in ((1, 2, 0), (2, 1, 0)):
        other = merge(base, [models[n] for n in order], merge_method=method, parameters=parameters)
        for name in base:
            assert torch.equal(first[name], other[name]), name


def test_metagpt_counts_what_is_left_of_the_deltas() -> None:
    base, models = checkpoints(2, 8, F32, F32)
    sparsify = {"method": "magnitude", "density": 0.25}
    found = merge(base, models, merge_method="metagpt", sparsify=sparsify)
    thin = [
        {
            name: torch.from_numpy(np.where(trimmed(deltas_of(start, [model[name]])[0], 0.25), model[name], start))
            for name, start in base.items()
        }
        for model in models
    ]
    dense = merge(base, thin, merge_method="metagpt")
    for name in base:
        assert torch.equal(found[name], dense[name]), name


# What is refused ----------------------------------------------------------------------------------


def test_one_share_holds_for_the_whole_model() -> None:
    base, models = checkpoints(1, 3, F32, F32)
    density = [{"filter": "norm", "value": 0.5}, {"value": 0.25}]
    with pytest.raises(SpecError, match=r"scope: model keeps one share of the whole model, but .* differ in theirs"):
        merge(base, models, merge_method="ties", parameters={"density": density, "scope": "model"})


def test_a_model_that_is_trimmed_as_a_whole_is_not_sparsified_before() -> None:
    base, models = checkpoints(1, 3, F32, F32)
    with pytest.raises(SpecError, match="remove sparsify, or set scope: tensor"):
        merge(
            base,
            models,
            merge_method="ties",
            parameters={"density": 0.5, "scope": "model"},
            sparsify={"method": "dare", "drop_rate": 0.5},
        )


@pytest.mark.parametrize("method", ["metagpt", "ties"])
def test_the_tensor_that_is_not_finite_is_named(method: str) -> None:
    base, models = checkpoints(2, 3, F32, F32)
    models[1]["model.embed_tokens.weight"][3, 4] = math.nan
    parameters = {"scope": "model"} | ({} if method == "metagpt" else {"density": 0.4})
    with pytest.raises(NonFiniteError, match=r"model\.embed_tokens\.weight holds NaN or Inf in .*\(1 entries\)"):
        merge(base, models, merge_method=method, parameters=parameters)
