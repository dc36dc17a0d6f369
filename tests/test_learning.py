"""Learned coefficients: streamed gradients are those of whole models, runs resume to the same bytes, losses fall."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call

import mergecore
from mergecore.errors import Interrupted, SpecError
from mergecore.features import adamerging, dam
from mergecore.features.fitting import Fitting, opened
from mergecore.features.learning import Mixed, Schedule, entropy
from mergecore.ops import Axis
from tests.running import checkpoints, texts, twin

F64 = torch.float64


def spec_of(folders: list[Path], data: list[Path], method: str, **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": str(folders[0]),
        "models": [{"model": str(m), "data": str(file)} for m, file in zip(folders[1:], data, strict=True)],
        "parameters": parameters,
        "calibration": {"samples": 3, "length": 12, "dtype": "float64"},
        "dtype": "float32",
    }


def fitting_of(folders: list[Path], data: list[Path], method: str, scratch: Path, **parameters: Any) -> Any:
    planned = mergecore.plan(mergecore.load_spec(spec_of(folders, data, method, **parameters)))
    return opened(planned, scratch, torch.device("cpu"), lambda done, total, what: None)


# --- gradients -----------------------------------------------------------------------------------------------------


def whole_model(fitting: Fitting, folder: Path, kind: str, mixed: Mixed) -> Any:
    """logits(tokens) of transformers' own model with all tensors made at once, differentiable."""
    model = twin(folder, kind)
    skeleton = fitting.network.skeleton
    tensors: dict[str, Tensor] = {}
    for name, mixture in mixed.mixtures.items():
        shape = mixture.models[0].shapes[name]
        parts = [m.rows(name, 0, shape[0]) for m in mixture.models]
        base = None if mixture.base is None else mixture.base.rows(name, 0, shape[0])
        scale = mixture.coefficients
        if mixture.axis is Axis.ROWS:
            scale = scale.unsqueeze(-1)
        if len(shape) == 3:
            scale = scale.unsqueeze(1)
        if len(shape) == 1 and mixture.axis is Axis.TENSOR:
            scale = scale.view(-1, 1)
        zero = torch.zeros(()) if base is None else base
        tensors[name] = zero + sum(c.view(c.shape) * (p - zero) for c, p in zip(scale, parts, strict=True))
    converted = skeleton._converted(tensors)
    tied = {"lm_head.weight": converted.get(skeleton._embedding_name)} if fitting.network.tied else {}
    parameters = {**{k: v for k, v in tied.items() if v is not None}, **converted}
    return lambda tokens: functional_call(model, parameters, (tokens.unsqueeze(0),), {"use_cache": False}).logits


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        ("llama", {"embeddings": "merge", "norms": "merge"}),
        ("qwen2, tied", {"embeddings": "merge"}),
        ("qwen2", {}),
        ("gpt2", {"norms": "merge"}),
        ("mixtral", {}),
    ],
)
@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_gradients_of_columns_are_those_of_the_whole_model(
    kind: str, parameters: dict[str, Any], loss: str, tmp_path: Path
) -> None:
    from mergecore.features.backward import value_and_gradient

    folders = checkpoints(tmp_path, kind, 3)
    with fitting_of(folders, list(texts(tmp_path)), "dam", tmp_path, loss=loss, **parameters) as fitting:
        mixtures, leaves = dam._mixtures(fitting, 2)
        mixed = Mixed(fitting.network, mixtures, F64)
        samples = [sample for task in fitting.samples for sample in task][:4]
        known = dam.Targets(fitting, 1)

        def value(number: int, logits: Tensor) -> Tensor:
            return dam.distance(loss, logits[0], *known[number])

        found = value_and_gradient(fitting.network, mixed, [sample.tokens for sample in samples], value)
        ours = {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}
        for leaf in leaves.values():
            leaf.grad = None
        whole = whole_model(fitting, folders[0], kind, mixed)
        losses = [value(number, whole(sample.tokens)) for number, sample in enumerate(samples)]
        torch.stack(losses).sum().backward()
    assert found == pytest.approx([float(one.detach()) for one in losses], rel=1e-9)
    assert set(ours) == {name for name, leaf in leaves.items() if leaf.grad is not None} == set(leaves)
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        scale = float(leaf.grad.abs().max())
        torch.testing.assert_close(ours[name], leaf.grad, rtol=0, atol=1e-8 * scale + 1e-18, msg=name)


@pytest.mark.parametrize("level", ["task", "layer", "tensor"])
def test_gradients_of_layers_are_those_of_the_whole_model(level: str, tmp_path: Path) -> None:
    from mergecore.features.backward import value_and_gradient
    from mergecore.features.learning import Mixture, leaf

    folders = checkpoints(tmp_path, "qwen2, tied", 3)
    with fitting_of(folders, list(texts(tmp_path)), "adamerging", tmp_path, level=level) as fitting:
        groups = {name: adamerging._group(fitting, name, level) for name in fitting.models[0].shapes}
        leaves = {group: leaf(2, 1, 0.3, torch.device("cpu")) for group in groups.values()}
        mixtures = {name: Mixture(fitting.models, leaves[g], base=fitting.base) for name, g in groups.items()}
        mixed = Mixed(fitting.network, mixtures, F64)
        tokens = [sample.tokens for sample in fitting.samples[0]]
        value_and_gradient(fitting.network, mixed, tokens, lambda number, logits: entropy(logits))
        ours = {name: one.grad.clone() for name, one in leaves.items() if one.grad is not None}
        for one in leaves.values():
            one.grad = None
        whole = whole_model(fitting, folders[0], "qwen2", mixed)
        torch.stack([entropy(whole(each)) for each in tokens]).sum().backward()
    wanted = {"task": {"model"}, "layer": {"layers.0", "layers.1", "embedding", "outside"}, "tensor": set(groups)}
    assert set(ours) == set(leaves) == wanted[level]
    for name, one in leaves.items():
        assert one.grad is not None
        torch.testing.assert_close(ours[name], one.grad, rtol=1e-8, atol=1e-12, msg=name)


# --- losses --------------------------------------------------------------------------------------------------------

logits = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).normal(size=(2, 5, 7)) * 3)


@given(logits)
def test_losses_are_their_formulas(values: Any) -> None:
    merged, model = values
    p, q = (np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True) for x in (merged, model))
    expected = {
        "kl": (p * np.log(p / q)).sum(axis=-1).mean(),
        "forward_kl": (q * np.log(q / p)).sum(axis=-1).mean(),
        "mse": ((merged - model) ** 2).mean(),
    }
    for kind, value in expected.items():
        found = dam.distance(kind, torch.from_numpy(merged), torch.from_numpy(model))
        assert float(found) == pytest.approx(value, rel=1e-9, abs=1e-12)
    found = entropy(torch.from_numpy(merged)[None])
    assert float(found) == pytest.approx(-(p * np.log(p)).sum(axis=-1).mean(), rel=1e-9)


@given(logits, st.integers(1, 6))
def test_some_logits_count_the_rest_as_one_token(values: Any, top: int) -> None:
    merged, model = (torch.from_numpy(x) for x in values)
    logs, places = torch.log_softmax(model, dim=-1).topk(top, dim=-1)
    known = dam.with_rest(model, places)
    q = torch.cat([logs.exp(), 1 - logs.exp().sum(-1, keepdim=True)], -1)
    own = torch.softmax(merged, -1).gather(-1, places)
    p = torch.cat([own, 1 - own.sum(-1, keepdim=True)], -1)
    assert float(dam.distance("kl", merged, known, places)) == pytest.approx(
        float((p * (p / q).log()).sum(-1).mean()), rel=1e-6, abs=1e-9
    )


@given(st.integers(0, 2**32 - 1))
def test_penalties_are_their_formulas(seed: int) -> None:
    random = np.random.default_rng(seed)
    layers = [random.normal(size=(3, 4)), random.normal(size=(3, 6))]
    found = dam.regularisation([torch.from_numpy(c) for c in layers], cosine=0.5, l1=0.25, l2=2.0)
    expected = 0.0
    for c in layers:
        for i in range(3):
            for j in range(i):
                expected += 0.5 * c[i] @ c[j] / np.linalg.norm(c[i]) / np.linalg.norm(c[j])
        expected += 0.25 * np.abs(c).sum() + 2.0 * (c**2).sum()
    assert float(found) == pytest.approx(expected, rel=1e-9)


# --- merges --------------------------------------------------------------------------------------------------------


def merged(tmp_path: Path, spec: dict[str, Any]) -> Path:
    out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
    mergecore.merge(mergecore.load_spec(spec), out)
    return out


def manifest(out: Path) -> Any:
    return json.loads((out / "mergecore_manifest.json").read_text())


def test_coefficients_that_stay_give_the_average_bit_for_bit(tmp_path: Path) -> None:
    folders, data = checkpoints(tmp_path, "llama", 4), [*texts(tmp_path), texts(tmp_path)[0]]
    dam_spec = spec_of(folders, data, "dam", epochs=0, embeddings="merge", norms="merge")
    average = {"merge_method": "linear", "models": dam_spec["models"], "dtype": "float32"}
    ours, theirs = (load_file(merged(tmp_path, spec) / "model.safetensors") for spec in (dam_spec, average))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    still = load_file(merged(tmp_path, dam_spec | {"parameters": {"learning_rate": 0.0}}) / "model.safetensors")
    base = load_file(folders[0] / "model.safetensors")
    for name, tensor in still.items():
        kept = "embed" in name or "norm" in name
        assert torch.equal(tensor, base[name].float() if kept else theirs[name]), name


@pytest.mark.parametrize(
    ("method", "parameters", "part"),
    [
        ("dam", {"learning_rate": 2e-2}, 0.95),
        ("dam", {"learning_rate": 2e-2, "loss": "forward_kl", "lambda_cosine": 1e-3, "batch": 3}, 0.95),
        # Untrained models predict nearly evenly: entropies begin close to the largest there is, log 257.
        ("dam", {"learning_rate": 2e-2, "loss": "entropy"}, 0.99),
        ("adamerging", {"learning_rate": 5e-2}, 0.995),
    ],
)
def test_the_loss_falls_and_transformers_loads_the_result(
    method: str, parameters: dict[str, Any], part: float, tmp_path: Path
) -> None:
    folders, data = checkpoints(tmp_path, "qwen2", 3), list(texts(tmp_path))
    out = merged(tmp_path, spec_of(folders, data, method, epochs=12, **parameters))
    curve = manifest(out)["fit"]["loss"]
    steps = 12 * math.ceil(6 / parameters.get("batch", 1))
    assert len(curve) == steps
    assert np.mean(curve[-steps // 4 :]) < part * np.mean(curve[: steps // 4])
    transformers.AutoModelForCausalLM.from_pretrained(out)


def test_the_learned_model_is_the_one_that_is_written(tmp_path: Path) -> None:
    """The first loss of a second run that starts where the first one ended would be that of the written model."""
    folders, data = checkpoints(tmp_path, "gpt2", 3), list(texts(tmp_path))
    spec = spec_of(folders, data, "dam", epochs=2, norms="merge", embeddings="merge", learning_rate=0.02)
    out = merged(tmp_path, spec)
    with fitting_of(folders, data, "dam", tmp_path) as fitting:
        known = dam.Targets(fitting, 1)
        samples = [sample for task in fitting.samples for sample in task]
        written, start = twin(out, "gpt2"), twin(folders[0], "gpt2")

        def loss(model: Any) -> float:
            found = [
                dam.distance("kl", model(sample.tokens.unsqueeze(0)).logits[0], *known[n])
                for n, sample in enumerate(samples)
            ]
            return float(torch.stack(found).mean())

        after, before = loss(written), loss(start)
    assert after < before
    assert after < min(manifest(out)["fit"]["loss"][:6])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"loss": "huber"}, "expected kl or forward_kl or mse or entropy"),
        ({"batch": 0}, "batch must be 1 or more"),
        ({"learning_rate": -1.0}, "must not be negative"),
        ({"epochs": 1.5}, "expected a whole number"),
    ],
)
def test_parameters_that_make_no_sense_are_named(parameters: dict[str, Any], message: str, tmp_path: Path) -> None:
    folders = checkpoints(tmp_path, "llama", 3)
    with pytest.raises(SpecError, match=message):
        mergecore.plan(mergecore.load_spec(spec_of(folders, list(texts(tmp_path)), "dam", **parameters)))


@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 7), st.integers(0, 5))
def test_every_sample_is_taken_once_an_epoch(samples: int, epochs: int, batch: int, seed: int) -> None:
    batches = Schedule(0.1, epochs, batch, seed).batches(samples)
    taken = [number for each in batches for number in each]
    assert sorted(taken) == sorted(list(range(samples)) * epochs)
    assert all(1 <= len(each) <= batch for each in batches)


# --- interruptions -------------------------------------------------------------------------------------------------


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    folders, data = checkpoints(tmp_path, "qwen2, tied", 3), list(texts(tmp_path))
    path.write_text(yaml.safe_dump(spec_of(folders, data, "dam", epochs=8, learning_rate=0.02, top_k=20)))
    return path


def same(one: Path, other: Path) -> None:
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert manifest(one)["fit"] == manifest(other)["fit"]


def test_a_run_that_was_stopped_goes_on_from_the_step_that_was_kept(spec: Path, tmp_path: Path) -> None:
    mergecore.merge(spec, tmp_path / "undisturbed")
    for stop in (9, 14, 25, 40):
        steps: list[int] = []
        with pytest.raises(Interrupted):
            mergecore.merge(
                spec,
                tmp_path / "out",
                resume=True,
                progress=lambda now, steps=steps: steps.append(now.steps_done),  # type: ignore[misc]
                should_stop=lambda steps=steps, stop=stop: bool(steps) and steps[-1] >= stop,  # type: ignore[misc]
            )
        assert steps[-1] == stop
    mergecore.merge(spec, tmp_path / "out", resume=True)
    same(tmp_path / "out", tmp_path / "undisturbed")


def test_a_run_that_was_killed_resumes_to_the_same_bytes(spec: Path, tmp_path: Path) -> None:
    mergecore.merge(spec, tmp_path / "undisturbed")
    command = [sys.executable, "-m", "mergecore.cli", "merge", str(spec), str(tmp_path / "out"), "--resume"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    kept = tmp_path / ".out.partial" / "scratch" / "learned.safetensors"
    while process.poll() is None and not kept.exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finished = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stderr
    same(tmp_path / "out", tmp_path / "undisturbed")
