"""The merge methods, through whole merges of small checkpoints, held against exact arithmetic (tests/oracle.py)."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import mergecore
from mergecore.errors import SpecError
from tests import oracle
from tests.models import write_model

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (F32, F16, BF16)
Tensors = dict[str, Tensor]

QWEN: dict[str, tuple[tuple[int, ...], oracle.Layout]] = {
    "model.embed_tokens.weight": ((40, 24), "rows"),
    "model.layers.0.self_attn.q_proj.weight": ((24, 24), "columns"),
    "model.layers.0.self_attn.q_proj.bias": ((24,), "vector"),
    "model.layers.0.mlp.down_proj.weight": ((24, 70), "columns"),
    "model.layers.1.input_layernorm.weight": ((24,), "vector"),
    "model.layers.1.mlp.up_proj.weight": ((70, 24), "columns"),
    "model.layers.1.mlp.experts.gate_up_proj": ((3, 20, 24), "experts"),
    "visual.patch_embed.proj.weight": ((8, 3, 4, 4), "columns"),
    "model.logit_scale": ((), "vector"),
    "score.weight": ((1, 24), "columns"),
    "lm_head.weight": ((40, 24), "columns"),
}
GPT2: dict[str, tuple[tuple[int, ...], oracle.Layout]] = {
    "transformer.wte.weight": ((30, 16), "rows"),
    "transformer.wpe.weight": ((12, 16), "rows"),
    "transformer.h.0.attn.c_attn.weight": ((16, 48), "rows"),
    "transformer.h.0.attn.c_attn.bias": ((48,), "vector"),
    "transformer.h.0.mlp.c_proj.weight": ((64, 16), "rows"),
    "transformer.ln_f.weight": ((16,), "vector"),
}
CONFIGS = {"qwen2": QWEN, "gpt2": GPT2}
METHODS = ("widen", "linear", "task_arithmetic")


def merge(base: Tensors | None, models: Sequence[Tensors], *, model_type: str = "qwen2", **spec: Any) -> Tensors:
    """The merged tensors. `spec` is the rest of the spec; `each`: parameters per model."""
    each: Sequence[Mapping[str, Any]] = spec.pop("each", [{}] * len(models))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = {"model_type": model_type, "tie_word_embeddings": False}
        entries = [
            {"model": str(write_model(folder / f"model{n}", tensors, config)), "parameters": dict(each[n])}
            for n, tensors in enumerate(models)
        ]
        if base is not None:
            spec["base_model"] = str(write_model(folder / "base", base, config))
        mergecore.merge(mergecore.load_spec({"models": entries, **spec}), folder / "out", device="cpu")
        return load_file(folder / "out" / "model.safetensors")


def checkpoints(
    shapes: Mapping[str, tuple[tuple[int, ...], oracle.Layout]], count: int, seed: int, dtypes: Sequence[torch.dtype]
) -> tuple[Tensors, list[Tensors]]:
    """A base, and models that differ from it by little or by much; some columns and rows are zero or unchanged."""
    random = torch.Generator().manual_seed(seed)
    base: Tensors = {}
    models: list[Tensors] = [{} for _ in range(count)]
    for name, (shape, layout) in shapes.items():
        start = torch.randn(shape, generator=random) * 0.02 + (1.0 if layout == "vector" else 0.0)
        if len(shape) > 1:
            start[..., 1] = 0.0
            start[2 % shape[0]] = 0.0
        base[name] = start.to(dtypes[0])
        for n, model in enumerate(models):
            change = torch.randn(shape, generator=random) * (4e-3, 3e-4, 3e-5)[n % 3]
            if len(shape) > 1:
                change[..., 3] = 0.0
                change[..., 1] = change[..., 1] * (n % 2)
                change[4 % shape[0]] = 0.0
            model[name] = (base[name].float() + change).to(dtypes[1 + n % (len(dtypes) - 1)])
    return base, models


def assert_right(found: Tensor, exact: oracle.Exact, name: str) -> None:
    wrong = exact.wrong(found)
    assert not wrong.any(), f"{name}: {wrong.sum()} of {wrong.size} entries are not the exact result rounded"


def of(models: Sequence[Tensors], name: str) -> list[Tensor]:
    return [model[name] for model in models]


def assert_same_bits(one: Tensor, two: Tensor, inputs: Sequence[Tensor], name: str) -> None:
    """Equal bits, but for entries that cancel: what is left, 2**-44 of the inputs or less, is float64's noise."""
    size = torch.stack([tensor.double().abs() for tensor in inputs]).sum(0) * 2.0**-44
    noise = (one.double().abs() <= size) & (two.double().abs() <= size)
    differ = (oracle.bits(one) != oracle.bits(two)) & ~noise
    assert not differ.any(), f"{name}: {int(differ.sum())} of {differ.numel()} entries differ"


# Against exact arithmetic -------------------------------------------------------------------------

WIDENS = {
    "defaults": {},
    "t below 1": {"t": 0.5},
    "t above 1": {"t": 1.15, "s": 0.7},
    "t beyond every score": {"t": 2.0},
    "t negative": {"t": -0.1, "s": 0.3},
    "vectors ranked": {"vector_scoring": "rank"},
    "ties averaged": {"tie": "average", "t": 0.8},
    "without disentangling": {"disentangle": False},
    "without ranking": {"rank": False},
    "without calibration": {"calibrate": False},
    "without any of them": {"disentangle": False, "rank": False, "calibrate": False, "vector_scoring": "rank"},
}


def widen_settings(parameters: Mapping[str, Any]) -> oracle.Widen:
    """Numbers as they are written."""
    as_text: dict[str, Any] = {key: str(value) if key in "ts" else value for key, value in parameters.items()}
    return oracle.Widen(**as_text)


@pytest.mark.parametrize("parameters", WIDENS.values(), ids=list(WIDENS))
def test_widen_is_the_papers_result_correctly_rounded(parameters: dict[str, Any]) -> None:
    base, models = checkpoints(QWEN, 3, 1, [BF16, BF16, F16, F32])
    found = merge(base, models, merge_method="widen", parameters=parameters)
    for name, (shape, layout) in QWEN.items():
        assert found[name].shape == shape
        assert found[name].dtype == BF16
        exact = oracle.widen(base[name], of(models, name), widen_settings(parameters), layout)
        assert_right(found[name], exact, name)


@pytest.mark.parametrize("dtypes", [(F32, F32), (F16, BF16), (BF16, F32)])
@pytest.mark.parametrize("out", ["float32", "float16", "bfloat16"])
def test_widen_reads_and_writes_any_dtype(dtypes: tuple[torch.dtype, ...], out: str) -> None:
    base, models = checkpoints(GPT2, 2, 2, dtypes)
    found = merge(base, models, model_type="gpt2", merge_method="widen", out_dtype=out)
    for name, (_, layout) in GPT2.items():
        assert found[name].dtype == getattr(torch, out)
        assert_right(found[name], oracle.widen(base[name], of(models, name), oracle.Widen(), layout), name)


def test_columns_that_a_model_has_lost_are_scored_by_what_is_left_of_them() -> None:
    """Their length is not to be had from a.a + 2 d.a + d.d."""
    base, models = checkpoints(QWEN, 2, 7, [BF16, BF16])
    for name, (shape, _) in QWEN.items():
        if len(shape) > 1:
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(8)) * 2.0**-30
            lost = torch.zeros(shape, dtype=torch.bool)
            lost[..., ::2], lost[..., ::3, :] = True, True
            models[1][name] = torch.where(lost, noise.to(BF16), models[1][name])
    found = merge(base, models, merge_method="widen")
    for name, (_, layout) in QWEN.items():
        assert_right(found[name], oracle.widen(base[name], of(models, name), oracle.Widen(), layout), name)


def test_a_models_weight_scales_its_importance() -> None:
    base, models = checkpoints(QWEN, 2, 3, [BF16, BF16])
    found = merge(base, models, merge_method="widen", each=[{"weight": 0.6}, {"weight": -1.7}])
    for name, (_, layout) in QWEN.items():
        exact = oracle.widen(base[name], of(models, name), oracle.Widen(), layout, weights=["0.6", "-1.7"])
        assert_right(found[name], exact, name)


def test_parameters_may_change_with_the_layer_and_the_name() -> None:
    base, models = checkpoints(QWEN, 2, 4, [BF16, BF16])
    found = merge(
        base,
        models,
        merge_method="widen",
        parameters={"t": [-1.0, 3.0], "s": [{"filter": "mlp", "value": 0.25}, {"value": 0.5}]},
    )
    for name, (_, layout) in QWEN.items():
        t = "3.0" if ".layers.1." in name else "-1.0"  # tensors outside the layers stand at the first
        s = "0.25" if "mlp" in name else "0.5"
        exact = oracle.widen(base[name], of(models, name), oracle.Widen(t=t, s=s), layout)
        assert_right(found[name], exact, name)


def test_the_spec_may_say_how_a_tensor_is_scored() -> None:
    base, models = checkpoints(QWEN, 2, 5, [BF16, BF16])
    turned = {"*.q_proj.*": "rows", "model.embed_tokens.weight": "columns"}
    found = merge(base, models, merge_method="widen", orientation=turned)
    layouts: dict[str, oracle.Layout] = {name: layout for name, (_, layout) in QWEN.items()}
    layouts |= {"model.layers.0.self_attn.q_proj.weight": "rows", "model.embed_tokens.weight": "columns"}
    for name, layout in layouts.items():
        assert_right(found[name], oracle.widen(base[name], of(models, name), oracle.Widen(), layout), name)


@pytest.mark.parametrize(("normalize", "weights"), [(True, ("0.3", "1.1", "-0.2")), (False, ("0.3", "0.4", "0.1"))])
def test_linear_is_the_weighted_average(normalize: bool, weights: Sequence[str]) -> None:
    _, models = checkpoints(QWEN, 3, 6, [BF16, BF16, F16, F32])
    each = [{"weight": float(weight)} for weight in weights]
    found = merge(None, models, merge_method="linear", each=each, parameters={"normalize": normalize})
    for name in QWEN:
        assert found[name].dtype == models[0][name].dtype
        assert_right(found[name], oracle.linear(of(models, name), weights, normalize=normalize), name)


@pytest.mark.parametrize("normalize", [True, False])
def test_task_arithmetic_adds_scaled_deltas(normalize: bool) -> None:
    base, models = checkpoints(QWEN, 3, 7, [BF16, F16, F32, BF16])
    weights = ("0.3", "1.1", "-0.2")
    found = merge(
        base,
        models,
        merge_method="task_arithmetic",
        each=[{"weight": float(weight)} for weight in weights],
        parameters={"lambda": 0.7, "normalize": normalize},
    )
    for name in QWEN:
        exact = oracle.task_arithmetic(base[name], of(models, name), "0.7", weights, normalize=normalize)
        assert_right(found[name], exact, name)


LAYERS: dict[str, tuple[tuple[int, ...], oracle.Layout]] = {
    "model.embed_tokens.weight": ((20, 12), "rows"),
    **{f"model.layers.{layer}.mlp.up_proj.weight": ((30, 12), "columns") for layer in range(4)},
    "model.norm.weight": ((12,), "vector"),
    "lm_head.weight": ((20, 12), "columns"),
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    ("parameters", "alpha", "beta"),
    [
        ({}, None, None),
        ({"alpha": 0.25}, "0.25", None),
        ({"beta": 0.5}, None, "0.5"),
        ({"alpha": 0.1, "beta": 0.7}, "0.1", "0.7"),
    ],
)
def test_lines_scales_deltas_by_depth(
    count: int, parameters: dict[str, float], alpha: str | None, beta: str | None
) -> None:
    """By 1 / models in the first layer and outside the layers, by 1 in the last, if nothing else is said."""
    base, models = checkpoints(LAYERS, count, 15, [BF16, BF16, F32])
    weights = ["0.5", "1", "0.3"][:count]
    each = [{"weight": float(weight)} for weight in weights]
    found = merge(base, models, merge_method="lines", each=each, dtype="float32", parameters=parameters)
    first = Fraction(alpha) if alpha is not None else Fraction(1, count)
    more = Fraction(beta) if beta is not None else 1 - first
    for name in LAYERS:
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        scale = first + more * layer / 3
        assert_right(found[name], oracle.task_arithmetic(base[name], of(models, name), str(scale), weights), name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_passthrough_copies_one_model(dtype: torch.dtype) -> None:
    model = special(dtype)
    base, _ = checkpoints({name: (tuple(tensor.shape), "columns") for name, tensor in model.items()}, 0, 1, [dtype])
    for start in (None, base):
        found = merge(start, [model], merge_method="passthrough")
        for name, tensor in model.items():
            assert torch.equal(oracle.bits(found[name]), oracle.bits(tensor)), name


def test_passthrough_scales_what_it_is_told_to() -> None:
    _, models = checkpoints(QWEN, 1, 16, [BF16, F32])
    scale = [{"filter": "up_proj", "value": 0.3}, {"value": 1.0}]
    found = merge(None, models, merge_method="passthrough", each=[{"scale": scale}], out_dtype="bfloat16")
    for name in QWEN:
        weight = "0.3" if "up_proj" in name else "1"
        assert_right(found[name], oracle.linear(of(models, name), [weight], normalize=False), name)


def test_passthrough_takes_one_model() -> None:
    _, models = checkpoints(GPT2, 2, 17, [F32, F32])
    with pytest.raises(SpecError, match=r"passthrough merges 1 model\(s\); found 2"):
        merge(None, models, merge_method="passthrough")


@pytest.mark.parametrize("rescale", [True, False])
def test_dare_thins_the_deltas_in_front_of_every_method(rescale: bool) -> None:
    base, models = checkpoints(QWEN, 2, 8, [BF16, BF16, F32])
    dare = oracle.Dare("0.3", rescale=rescale, seed=5)
    sparsify = {"method": "dare", "drop_rate": 0.3, "rescale": rescale}
    weights = ["0.5", "0.25"]
    each = [{"weight": float(weight)} for weight in weights]
    found = {
        method: merge(base, models, merge_method=method, each=each, sparsify=sparsify, seed=5) for method in METHODS
    }
    for name, (_, layout) in QWEN.items():
        inputs = (base[name], of(models, name))
        exact = oracle.widen(*inputs, oracle.Widen(), layout, weights=weights, dare=dare, name=name)
        assert_right(found["widen"][name], exact, name)
        exact = oracle.task_arithmetic(*inputs, "1", weights, dare=dare, name=name)
        assert_right(found["task_arithmetic"][name], exact, name)
        exact = oracle.linear(inputs[1], weights, base=inputs[0], dare=dare, name=name)
        assert_right(found["linear"][name], exact, name)


def test_linear_without_normalising_scales_the_base_too_when_deltas_are_dropped() -> None:
    base, models = checkpoints(GPT2, 2, 9, [F32, F32])
    found = merge(
        base,
        models,
        model_type="gpt2",
        merge_method="linear",
        parameters={"weight": 0.75, "normalize": False},
        sparsify={"method": "dare", "drop_rate": 0.5},
        each=[{"weight": 0.75}, {"weight": 0.75}],
    )
    # The base carries the weight that is set for all, and so takes part like a model: it has no delta.
    dare, weights = oracle.Dare("0.5"), ["0.75"] * 3
    for name in GPT2:
        three = [*of(models, name), base[name]]
        exact = oracle.linear(three, weights, normalize=False, base=base[name], dare=dare, name=name)
        assert_right(found[name], exact, name)


# Properties ---------------------------------------------------------------------------------------

SPECS: dict[str, dict[str, Any]] = {
    "widen": {"merge_method": "widen"},
    "widen, s = 3": {"merge_method": "widen", "parameters": {"t": 0.3, "s": 3.0}},
    "widen, no ranks": {"merge_method": "widen", "parameters": {"rank": False}},
    "widen, cosine only": {"merge_method": "widen", "parameters": {"disentangle": False, "tie": "average"}},
    "linear": {"merge_method": "linear"},
    "task arithmetic": {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.3}},
    "lines": {"merge_method": "lines"},
}
NOTHING: dict[str, Any] = {}
DARE: dict[str, Any] = {"sparsify": {"method": "dare", "drop_rate": 0.4}}


def special(dtype: torch.dtype) -> Tensors:
    """Every kind of number: zeros of both signs, subnormals, the largest ones; ordinary ones."""
    if dtype is F32:
        numbers = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, 3.4e38, -3.4e38, 1.0]).repeat(8)
    else:
        numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        numbers = numbers[numbers.isfinite()][::509][:64]
    matrix = torch.stack([numbers, numbers.flip(0), torch.zeros_like(numbers), -torch.zeros_like(numbers)])
    return {
        "model.embed_tokens.weight": matrix,
        "model.layers.0.mlp.up_proj.weight": matrix,
        "model.layers.0.mlp.experts.gate_up_proj": torch.stack([matrix, -matrix]),
        "model.norm.weight": numbers,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
@pytest.mark.parametrize("count", [1, 3])
def test_copies_of_the_base_give_the_base_bit_for_bit(spec: dict[str, Any], dtype: torch.dtype, count: int) -> None:
    base = special(dtype)
    for more in (NOTHING, DARE):
        found = merge(base, [base] * count, **spec, **more)
        for name, tensor in base.items():
            assert torch.equal(oracle.bits(found[name]), oracle.bits(tensor)), name


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_the_order_of_models_changes_no_bit(spec: dict[str, Any]) -> None:
    base, models = checkpoints(QWEN, 3, 10, [BF16, BF16, F16, F32])
    results = [merge(base, list(order), dtype="bfloat16", **spec) for order in itertools.permutations(models)]
    for name in QWEN:
        for other in results[1:]:
            assert_same_bits(results[0][name], other[name], [base[name], *of(models, name)], name)


few = settings(max_examples=8, deadline=None)
parameters = {
    "seed": st.integers(0, 2**32),
    "dtypes": st.lists(st.sampled_from(DTYPES), min_size=2, max_size=4),
    "out": st.sampled_from(["float32", "float16", "bfloat16"]),
}


@few
@given(count=st.sampled_from([2, 3, 5, 7]), **parameters)
def test_widen_with_negative_t_and_s_one_nth_is_the_average_bit_for_bit(
    count: int, seed: int, dtypes: list[torch.dtype], out: str
) -> None:
    """Remark 2 of the paper."""
    base, models = checkpoints(QWEN, count, seed, dtypes)
    widen = merge(base, models, merge_method="widen", parameters={"t": -1.0, "s": 1 / count}, out_dtype=out)
    linear = merge(None, models, merge_method="linear", out_dtype=out)
    for name in QWEN:
        assert_same_bits(widen[name], linear[name], [base[name], *of(models, name)], name)


@few
@given(scale=st.sampled_from([0.1, 0.3, 0.5, 1.0, 1.7]), **parameters)
def test_widen_with_negative_t_is_task_arithmetic_bit_for_bit(
    scale: float, seed: int, dtypes: list[torch.dtype], out: str
) -> None:
    """Remark 2 of the paper; with models weighted and deltas dropped too."""
    base, models = checkpoints(QWEN, 3, seed, dtypes)
    each = [{"weight": weight} for weight in (1.0, 0.3, -0.5)]
    for more in (NOTHING, DARE):
        common = {"each": each, "out_dtype": out, **more}
        widen = merge(base, models, merge_method="widen", parameters={"t": -0.5, "s": scale}, **common)
        arithmetic = merge(base, models, merge_method="task_arithmetic", parameters={"lambda": scale}, **common)
        for name in QWEN:
            assert torch.equal(oracle.bits(widen[name]), oracle.bits(arithmetic[name])), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_model_with_all_its_columns_essential_is_that_model(dtype: torch.dtype) -> None:
    base, models = checkpoints(QWEN, 1, 11, [BF16, dtype])
    out = str(dtype).removeprefix("torch.")
    for spec in ({"merge_method": "widen", "parameters": {"t": -1.0}}, {"merge_method": "task_arithmetic"}):
        found = merge(base, models, out_dtype=out, **spec)
        for name in QWEN:
            assert torch.equal(found[name], models[0][name]), name


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_columns_of_zeros_give_no_nan(spec: dict[str, Any]) -> None:
    """Zero in the base, in a model, in both, and everywhere."""
    name = "model.layers.0.mlp.up_proj.weight"
    base, model = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(12)).unbind()
    base[:, :2], model[:, 1:3] = 0.0, 0.0
    for one, two in ((base, model), (model, base), (torch.zeros(5, 6), model), (base, torch.zeros(5, 6))):
        found = merge({name: one}, [{name: two}, {name: one}], **spec)[name]
        assert bool(found.isfinite().all())
        if spec["merge_method"] == "widen" and "parameters" not in spec:
            assert_right(found, oracle.widen(one, [two, one], oracle.Widen(), "columns"), name)


def test_t_is_meant_as_it_is_written() -> None:
    """1.15 times the mean rank of 199 columns, 100, is 115: rank 115 does not exceed it, although 1.15 * 100 < 115."""
    assert 1.15 * 100 < 115
    name = "model.layers.0.mlp.up_proj.weight"
    base = torch.ones(2, 199)
    model = base.clone()
    model[0] += torch.arange(199) / 1024
    for t in ("1.15", "0.29", "0.7", "1.1"):
        found = merge({name: base}, [{name: model}] * 2, merge_method="widen", parameters={"t": float(t)})[name]
        assert_right(found, oracle.widen(base, [model] * 2, oracle.Widen(t=t), "columns"), name)


@pytest.mark.parametrize("t", [1e308, -1e308, 1e-300])
def test_any_finite_t_is_taken(t: float) -> None:
    base, models = checkpoints(GPT2, 2, 13, [F32, F32])
    found = merge(base, models, model_type="gpt2", merge_method="widen", parameters={"t": t})
    wanted = oracle.Widen(t=str(min(max(t, -1.0), 2.0)))
    for name, (_, layout) in GPT2.items():
        if layout != "vector":
            assert_right(found[name], oracle.widen(base[name], of(models, name), wanted, layout), name)
        assert bool(found[name].isfinite().all())


def test_weights_that_cancel_cannot_be_normalised() -> None:
    _, models = checkpoints(GPT2, 2, 14, [F32, F32])
    with pytest.raises(SpecError, match=r"the weights add up to 0; they cannot be normalised \(set normalize: false\)"):
        merge(None, models, model_type="gpt2", merge_method="linear", each=[{"weight": 1.0}, {"weight": -1.0}])
