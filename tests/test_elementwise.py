"""Methods that weigh each delta against the others of its entry, its row or its tensor, held against their definitions.

nearswap, RAM, MagMax and the consensus of TALL masks; Arcee Fusion and PCB-Merging.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal, localcontext
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mergecore
from mergecore import merging, ops, selecting, topsets
from mergecore.errors import NonFiniteError, SpecError
from mergecore.methods.base import Keep
from mergecore.ops import Drop, Measure, Place
from mergecore.planning import MergePlan
from mergecore.selecting import thinned
from mergecore.topsets import Part
from tests import oracle
from tests.selections import assert_right, checkpoints, deltas_of, elected, share, top, trimmed
from tests.test_methods import merge

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
few = settings(max_examples=25, deadline=None)
Longs = list[oracle.Longs]

# The definitions, in NumPy ------------------------------------------------------------------------


def exact(base: Tensor, mixed: Any, terms: Sequence[Any]) -> oracle.Exact:
    """base + mixed, and the size of what was added up for it."""
    start = oracle.floats(base).astype(np.longdouble)
    return oracle.Exact(start + mixed, np.abs(start) + sum(np.abs(term) for term in terms))


def longs(base: Tensor, models: Sequence[Tensor]) -> Longs:
    return [delta.astype(np.longdouble) for delta in deltas_of(base, models)]


def shared(deltas: Longs, epsilon: float) -> tuple[Any, Any]:
    """Which deltas contribute, and how many do at each entry."""
    beyond = np.stack([np.abs(delta) > epsilon for delta in deltas])
    return beyond, beyond.sum(axis=0)


def ram(deltas: Longs, epsilon: float, factors: Sequence[Any]) -> Any:
    beyond, count = shared(deltas, epsilon)
    alone = sum(np.where(b, f * d, 0) for b, f, d in zip(beyond, factors, deltas, strict=True))
    total = sum(np.where(b, d, 0) for b, d in zip(beyond, deltas, strict=True))
    return np.where(count > 1, total / np.maximum(count, 1), alone)


def overlap_factors(deltas: Longs, epsilon: float, r: float, alpha: float) -> list[Any]:
    beyond, count = shared(deltas, epsilon)
    rho = [(b & (count > 1)).sum() / max((b & (count == 1)).sum(), 1) for b in beyond]
    return [1 + np.longdouble(r) * min(np.longdouble(x), np.longdouble(alpha)) for x in rho]


def magmax(deltas: Longs, weights: Sequence[float]) -> Any:
    terms = np.stack([np.longdouble(w) * d for w, d in zip(weights, deltas, strict=True)])
    return np.take_along_axis(terms, np.abs(terms).argmax(axis=0)[None], axis=0)[0]


def consensus(deltas: Longs, total: Any, limits: Sequence[float], k: int) -> Any:
    held = sum(np.abs(d) > np.longdouble(limit) * np.abs(total - d) for d, limit in zip(deltas, limits, strict=True))
    return np.where(held >= k, total, 0)


def divergence(model: Sequence[float], base: Sequence[float]) -> Decimal:
    """KL(softmax(model) || softmax(base)) with 80 digits."""
    with localcontext() as context:
        context.prec = 80
        x, a = [Decimal(value) for value in model], [Decimal(value) for value in base]
        p, q = [value.exp() for value in x], [value.exp() for value in a]
        shift = (sum(p, Decimal(0)) / sum(q, Decimal(0))).ln()
        return sum((power * (one - two - shift) for power, one, two in zip(p, x, a, strict=True)), Decimal(0)) / sum(p)


def salient(base: Tensor, model: Tensor) -> tuple[oracle.Floats, float]:
    """Each entry's importance, and the threshold of the tensor."""
    rows = base.reshape(1, -1) if base.dim() < 2 else base.reshape(-1, base.shape[-1])
    pairs = zip(model.reshape(rows.shape).double().tolist(), rows.double().tolist(), strict=True)
    kl = np.array([float(divergence(*pair)) for pair in pairs])
    delta = np.abs(deltas_of(rows, [model.reshape(rows.shape)])[0])
    importance = (delta * kl[:, None]).reshape(base.shape)
    low, middle, high = np.quantile(importance, [0.25, 0.5, 0.75])
    return importance, float(middle + 1.5 * (high - low))


def to_40_bits(values: Any) -> Any:
    _, exponent = np.frexp(values)
    return np.ldexp(np.rint(np.ldexp(values, 40 - exponent)), exponent - 40)


def pcb(deltas: Longs, density: float) -> Any:
    """The weighted mean of the kept deltas."""
    total, weights = sum(deltas), []
    for delta in deltas:
        size = np.abs(delta)
        span = size.max() - size.min()
        y = (size - size.min()) / span if span > 0 else np.zeros_like(size)
        score = to_40_bits(np.maximum(np.exp(len(deltas) * y * y) * np.tanh(delta * total), 0))
        kept = top(score, max(1, share(density, size.size)) if density < 1 else size.size)
        least = score[kept].min() if density < 1 else np.longdouble(0)
        rise = score.max() - least
        weights.append(np.where(kept, (score - least) / rise if rise > 0 else 1, 0))
    divisor = sum(weights)
    mixed = sum(w * d for w, d in zip(weights, deltas, strict=True))
    return np.where(divisor > 0, mixed / np.where(divisor > 0, divisor, 1), mixed)


# Whole merges -------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.0, 1e-7, 1e-4, 1.0])
def test_nearswap_moves_by_t_at_most(t: float) -> None:
    base, (model,) = checkpoints(1, 1, BF16, F32)
    found = merge(base, [model], merge_method="nearswap", parameters={"t": t}, dtype="float32")
    for name, start in base.items():
        (delta,) = longs(start, [model[name]])
        assert_right(found[name], exact(start, np.clip(delta, -t, t), [delta]), name)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("method", ["ram", "ramplus_tl"])
def test_ram_is_its_definition(method: str, count: int) -> None:
    base, models = checkpoints(count, 2, BF16, F16, F32, BF16)
    found = merge(base, models, merge_method=method, parameters={"epsilon": 5e-4}, dtype="float32")
    for name, start in base.items():
        deltas = longs(start, [model[name] for model in models])
        factors: list[Any] = [1] * count
        if method == "ramplus_tl":
            factors = overlap_factors(deltas, 5e-4, 0.1, 0.2)
        assert_right(found[name], exact(start, ram(deltas, 5e-4, factors), deltas), name)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_magmax_is_its_definition(count: int) -> None:
    base, models = checkpoints(count, 3, BF16, F16, F32, BF16)
    weights = [1.0, 0.5, -2.0, 0.25, 1.0][:count]
    each = [{"weight": weight} for weight in weights]
    found = merge(base, models, each=each, merge_method="magmax", parameters={"lambda": 0.8}, dtype="float32")
    for name, start in base.items():
        deltas = longs(start, [model[name] for model in models])
        assert_right(found[name], exact(start, np.longdouble(0.8) * magmax(deltas, weights), deltas), name)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("method", ["consensus_ta", "consensus_ties"])
def test_consensus_is_its_definition(method: str, k: int) -> None:
    base, models = checkpoints(3, 4, BF16, F16, F32, BF16)
    limits = (0.4, 0.25, 1.3)
    parameters: dict[str, Any] = {"k": k, "lambda": 0.7}
    if method == "consensus_ties":
        parameters["density"] = 0.5
    each = [{"weight": 0.75, "lambda_t": limit} for limit in limits]
    found = merge(base, models, each=each, merge_method=method, parameters=parameters, dtype="float32")
    for name, start in base.items():
        deltas = longs(start, [model[name] for model in models])
        total: Any = sum(np.longdouble(0.75) * delta for delta in deltas)
        if method == "consensus_ties":
            raw = deltas_of(start, [model[name] for model in models])
            values = [np.where(trimmed(d, 0.5), d, 0).astype(np.longdouble) for d in raw]
            total = elected(np.zeros(start.shape), values, [0.75] * 3).values
        mixed = np.longdouble(0.7) * consensus(deltas, total, limits, k)
        assert_right(found[name], exact(start, mixed, deltas), name)


def test_a_tie_does_not_hold_on() -> None:
    """|d| = |sum - d| for each of two equal models, whatever rounding their sum suffered."""
    base = {"w": torch.zeros(1, 4)}
    one, three = {"w": torch.tensor([[0.1, 0.2, 0.3, -0.7]])}, {"w": torch.tensor([[0.1, 0.2, 0.3, 0.7]])}
    spec: dict[str, Any] = {"merge_method": "consensus_ta", "each": [{"weight": 1.0}, {"weight": 1.0}]}
    kept = merge(base, [one, one], parameters={"lambda_t": 0.99}, **spec)["w"]
    assert torch.equal(kept, 2 * one["w"])
    assert not merge(base, [one, one], parameters={"lambda_t": 1.0}, **spec)["w"].any()
    assert merge(base, [one, three], parameters={"lambda_t": 0.4}, **spec)["w"].tolist()[0][3] == 0.0


def test_arcee_fusion_is_its_definition() -> None:
    base, (model,) = checkpoints(1, 5, BF16, F32)
    base["two"] = torch.randn(2, 3).to(BF16)
    model["two"] = base["two"].float() + torch.tensor([[0.1, 0.0, 0.0], [0.0, 0.0, 2.0]])
    found = merge(base, [model], merge_method="arcee_fusion", dtype="float32")
    for name, start in base.items():
        importance, threshold = salient(start, model[name])
        (delta,) = longs(start, [model[name]])
        assert not np.any(np.abs(importance - threshold) < 1e-12 * threshold)
        kept = importance >= threshold
        assert_right(found[name], exact(start, np.where(kept, delta, 0), [delta]), name)
    assert found["two"][1, 2] != base["two"][1, 2]


@pytest.mark.parametrize("density", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_pcb_is_its_definition(count: int, density: float) -> None:
    base, models = checkpoints(count, 6, F32, F32)
    parameters = {"density": density, "lambda": 0.5}
    found = merge(base, models, dtype="float32", merge_method="pcb", parameters=parameters)
    for name, start in base.items():
        deltas = longs(start, [model[name] for model in models])
        mixed = np.longdouble(0.5) * pcb(deltas, density)
        moved = oracle.floats(found[name]) - oracle.floats(start)
        size = np.abs(np.stack(deltas)).max(axis=0) if start.numel() else 0
        # A score's 40 bits, and float32's rounding of base + delta.
        noise = 1e-6 * size + 2.0**-23 * np.abs(oracle.floats(start))
        assert np.all(np.abs(moved - mixed) <= noise), name


# Properties ---------------------------------------------------------------------------------------

ONE: Mapping[str, Mapping[str, Any]] = {"nearswap": {"t": 1e-4}, "arcee_fusion": {}}
MANY: Mapping[str, Mapping[str, Any]] = {
    "ram": {"epsilon": 1e-4},
    "ramplus_tl": {"epsilon": 1e-4},
    "magmax": {},
    "consensus_ta": {},
    "consensus_ties": {"density": 0.5},
    "pcb": {"density": 0.3},
}


@pytest.mark.parametrize("method", [*ONE, *MANY])
def test_copies_of_the_base_give_the_base_bit_for_bit(method: str) -> None:
    for dtype in (BF16, F16, F32):
        base, _ = checkpoints(1, 1, dtype, dtype)
        base["model.layers.0.input_layernorm.weight"][:3] = torch.tensor([-0.0, 0.0, -1.0])
        parameters = {**ONE, **MANY}[method]
        found = merge(base, [base] * (1 if method in ONE else 3), merge_method=method, parameters=parameters)
        for name, tensor in base.items():
            assert torch.equal(oracle.bits(found[name]), oracle.bits(tensor)), name


@pytest.mark.parametrize("method", MANY)
def test_the_order_of_models_changes_no_bit(method: str) -> None:
    base, models = checkpoints(3, 4, BF16, BF16)
    if method == "magmax":  # of deltas of equal size the first is taken
        models = [
            {name: (tensor.float() * (1 + n / 999)).to(F32) for name, tensor in m.items()} for n, m in enumerate(models)
        ]
    spec: dict[str, Any] = {"merge_method": method, "parameters": MANY[method], "dtype": "bfloat16"}
    first = merge(base, models, **spec)
    for order in ((1, 2, 0), (2, 1, 0)):
        other = merge(base, [models[n] for n in order], **spec)
        for name in base:
            assert torch.equal(first[name], other[name]), name


@pytest.mark.parametrize("sparsify", [None, {"method": "dare", "drop_rate": 0.2}])
@pytest.mark.parametrize("method", [*ONE, *MANY])
def test_windows_change_no_byte(method: str, sparsify: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(11)
    base = {"a.weight": torch.randn(130, 90, generator=random).to(BF16), "b": torch.randn(9001, generator=random)}
    models = [
        {name: (t.float() + 0.01 * torch.randn(t.shape, generator=random)).to(t.dtype) for name, t in base.items()}
        for _ in range(1 if method in ONE else 2)
    ]
    spec: dict[str, Any] = {"merge_method": method, "parameters": {**ONE, **MANY}[method]}
    if sparsify is not None:
        spec["sparsify"] = sparsify
    whole = merge(base, models, **spec)

    def small_windows(*arguments: Any, **options: Any) -> MergePlan:
        planned = mergecore.plan(*arguments, **options)
        jobs = [
            replace(job, window_rows=min(job.rows, job.block_rows if job.block_rows > 1 else 777), keep=False)
            for job in planned.jobs
        ]
        return replace(planned, jobs=tuple(jobs))

    monkeypatch.setattr(merging, "plan", small_windows)
    monkeypatch.setattr(topsets, "ROOM", 8)
    cut = merge(base, models, **spec, run={"threads": 2})
    for name in base:
        assert torch.equal(oracle.bits(whole[name]), oracle.bits(cut[name])), name


@pytest.mark.parametrize("method", [*ONE, *MANY])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_inputs_that_are_not_finite_are_named(method: str, value: float) -> None:
    base, models = checkpoints(1 if method in ONE else 2, 3, F32, F32)
    models[-1]["model.embed_tokens.weight"][3, 4] = value
    spec: dict[str, Any] = {"merge_method": method, "parameters": {**ONE, **MANY}[method]}
    if method == "nearswap" and math.isinf(value):
        merge(base, models, **spec)  # the base moves by t, whatever the model holds
        return
    with pytest.raises(NonFiniteError, match=r"model\.embed_tokens\.weight holds NaN or Inf"):
        merge(base, models, **spec)
    merge(base, models, on_nonfinite="warn", **spec)


# Kernels ------------------------------------------------------------------------------------------


@few
@given(
    st.integers(1, 40), st.sampled_from([1e-9, 1e-6, 1e-3, 0.1, 3.0]), st.sampled_from([0.02, 1.0, 5.0]),
    st.integers(0, 2**32),
)  # fmt: skip
def test_a_row_s_divergence_is_exact_however_close_the_rows_are(
    columns: int, difference: float, scale: float, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    base = torch.randn(3, columns, generator=random, dtype=torch.float64) * scale
    models = [base + torch.randn(3, columns, generator=random, dtype=torch.float64) * difference, base.clone()]
    out = torch.full((2, 5), -1.0, dtype=torch.float64)
    ops.row_divergences(base[:1], [model[:1] for model in models], out, Place(first_entry=2 * columns))
    ops.row_divergences(base[1:], [model[1:] for model in models], out, Place(first_entry=3 * columns))
    assert torch.equal(out[:, :2], torch.full((2, 2), -1.0, dtype=torch.float64))
    assert not out[1, 2:].any()
    for row in range(3):
        right = divergence(models[0][row].tolist(), base[row].tolist())
        assert float(out[0, 2 + row]) == pytest.approx(float(right), rel=1e-12, abs=1e-70)


@few
@given(st.integers(0, 2**32), st.booleans(), st.sampled_from([F32, BF16, torch.float64]))
def test_kept_deltas_are_windows_for_any_kernel(seed: int, with_odds: bool, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(seed)
    base = torch.randn(6, 50, generator=random).to(dtype)
    models = [(base.float() + torch.randn(6, 50, generator=random) * 0.1).to(dtype) for _ in range(2)]
    keeps = [Drop(seed + n, 1 << 31, 2.0, least=0.05, least_before=90) for n in range(2)]
    options: dict[str, Any] = {"keeps": keeps, "place": Place(first_entry=300), "divide_by_odds": with_odds}
    lowest, steps = ([0.1, 0.4], [0.015, 0.01]) if with_odds else ([], [])
    odds = ops.row_odds(base, models, lowest, steps, options["place"]) if with_odds else None
    found = ops.keep_deltas(base, models, odds=odds, **options)
    # The blend of what it wrote is the sum that `elect` makes.
    counts = torch.zeros(2, dtype=torch.int64)
    summed, blended = torch.empty(2, 6, 50).unbind()
    ops.elect(
        summed, base, models, [1.0, 0.5], counts, scale=1.0, elect=ops.Elect.NONE, normalize=False, lowest=lowest,
        steps=steps, **options,
    )  # fmt: skip
    weights = torch.tensor([[1.0], [0.5]], dtype=torch.float64)
    ops.blend(blended, base, list(found), weights, counts)
    assert torch.equal(summed, blended)
    untouched = found == base.double()
    assert untouched.any()
    assert not untouched.all()


@pytest.mark.parametrize("rescale", ["none", "probability"])
def test_della_in_front_of_a_sum_is_della_linear(rescale: Literal["none", "probability"]) -> None:
    base = {"w": torch.randn(60, 50)}
    models = [{"w": base["w"] + 0.1 * torch.randn(60, 50)} for _ in range(2)]
    keeps = [Keep(drop_rate=0.5, epsilon=0.1, rescale=rescale)] * 2
    drops = [
        keep.dropping(Drop.of(0.0, False, seed=7, tensor="w", model=n, purpose="kept").key)
        for n, keep in enumerate(keeps)
    ]
    part = Part(0, base["w"], [model["w"] for model in models])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selecting, "RANK_BYTES", 1 << 15)  # several pieces
        kept = thinned(keeps, [drop.key for drop in drops], part, 50)
    blended, counts = torch.empty(60, 50), torch.zeros(2, dtype=torch.int64)
    ops.blend(blended, part.base, kept, torch.ones(2, 1, dtype=torch.float64), counts)
    parameters = {"density": 0.5, "epsilon": 0.1, "rescale": rescale == "probability"}
    wanted = merge(base, models, merge_method="della_linear", parameters=parameters, seed=7, dtype="float32")
    assert torch.equal(blended, wanted["w"])


def test_what_is_whole_stays_as_it_was() -> None:
    base, model = torch.randn(4, 9), torch.randn(4, 9).to(BF16)
    assert torch.equal(ops.keep_deltas(base, [model], keeps=[], place=Place())[0], model.double())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, out: ops.row_divergences(w, [w], out, Place(first_entry=1)), "windows must start with a row"),
        (lambda w, out: ops.row_divergences(w, [w], out[:, :3], Place()), "out must be"),
        (
            lambda w, out: ops.count_shared(w, [w], [], torch.zeros(2, dtype=torch.int64), Place()),
            "one limit per model",
        ),
        (lambda w, out: ops.magnitudes(w, [w[:2]], Place()), "of the same shape"),
        (
            lambda w, out: ops.elect(
                w.double(),
                w,
                [w],
                [1.0],
                torch.zeros(2, dtype=torch.int64),
                scale=1.0,
                elect=ops.Elect.NONE,
                normalize=False,
                keeps=[],
                place=Place(),
            ),
            "out must be float32, float16 or bfloat16",
        ),
        (
            lambda w, out: ops.keep_deltas(w, [w], keeps=[], place=Place(measure=Measure.ROWS)),
            "rows and competition need scales",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call: Callable[[Tensor, Tensor], Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(torch.zeros(4, 6), torch.zeros(1, 4, dtype=torch.float64))


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"merge_method": "nearswap"}, "nearswap needs t"),
        ({"merge_method": "nearswap", "parameters": {"t": -1}}, "t is -1; it must not be negative"),
        ({"merge_method": "ram", "parameters": {"epsilon": -1e-3}}, "epsilon is -0.001; it must not be negative"),
        ({"merge_method": "ramplus_tl", "parameters": {"epsilon": -1}}, "epsilon is -1; it must not be negative"),
        ({"merge_method": "pcb", "parameters": {"density": 2}}, "density is 2; it must be from 0 to 1"),
        ({"merge_method": "consensus_ta"}, "consensus_ta merges at least 2 model(s) beside the base; found 1"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(spec: dict[str, Any], message: str) -> None:
    base, models = checkpoints(1, 3, F32, F32)
    with pytest.raises(SpecError) as refusal:
        merge(base, models, **spec)
    assert message in str(refusal.value)


def test_a_consensus_of_more_than_all_models_is_refused() -> None:
    base, models = checkpoints(2, 3, F32, F32)
    with pytest.raises(SpecError, match="k is 3; it must be from 1 to the number of models, 2"):
        merge(base, models, merge_method="consensus_ties", parameters={"k": 3})
