"""SLTA against the paper: whole models in float64, numerical minimisation, and what must hold for any models."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.optimize import minimize
from torch import Tensor

import mergecore
from benchmarks.demo_models import QUICK, QUICK_RECIPES, Text, train_models
from mergecore.errors import Interrupted, SpecError
from mergecore.features import passes
from mergecore.features.samples import read_samples, tokenizer_in
from mergecore.features.slta import Products
from tests.running import checkpoints, texts, twin

COUNT, LENGTH = 4, 24


def spec_of(folders: list[Path], data: list[Path], level: str, **more: Any) -> dict[str, Any]:
    models = [{"model": str(model), "data": str(file)} for model, file in zip(folders[1:], data, strict=True)]
    return {
        "merge_method": "slta",
        "base_model": str(folders[0]),
        "models": models,
        "parameters": {"level": level, **more},
        "calibration": {"samples": COUNT, "length": LENGTH, "dtype": "float64"},
        "dtype": "float32",
    }


def merged(tmp_path: Path, spec: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The output's tensors, and what the manifest tells of the fit."""
    out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
    mergecore.merge(mergecore.load_spec(spec), out)
    manifest = json.loads((out / "mergecore_manifest.json").read_text())
    return load_file(out / "model.safetensors"), manifest["fit"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A Qwen2 trio that was trained: a base, and two models that went on from it on other texts."""
    rows = {
        "documentation": [f"Section {i}: the function number {i} returns {i * i}.\n\n" for i in range(900)],
        "questions": [f"### Instruction:\nWhat is {i} + {i}?\n### Response:\n{2 * i}\n\n" for i in range(900)],
        "source code": [f"def f{i}(x):\n    return x * {i}\n\n" for i in range(900)],
    }
    written = {name: Text("".join(lines), "") for name, lines in rows.items()}
    models = train_models(tmp_path_factory.mktemp("trio"), QUICK, QUICK_RECIPES, written, lambda line: None)
    return [models["base"], models["ft"], models["pt"]]


# What a paper's reader would write for Qwen2: whole models, each submodule called with each model's own modules.


def features_of(folders: list[Path], kind: str, data: list[Path], level: str) -> dict[str, list[list[list[Tensor]]]]:
    """module -> task -> sample -> [f(x; theta_0), f(x; theta_1), ...] on the base's features, float64."""
    models = [twin(folder, kind) for folder in folders]
    tokenizer = tokenizer_in(folders[0], {})
    found: dict[str, list[list[list[Tensor]]]] = {}
    for task, path in enumerate(data):
        for sample in read_samples(path, tokenizer, count=COUNT, length=LENGTH, seed=task):
            for module, features in _of_sample(models, sample.tokens.unsqueeze(0), level).items():
                found.setdefault(module, [[] for _ in data])[task].append(features)
    return found


@torch.no_grad()
def _of_sample(models: list[Any], tokens: Tensor, level: str) -> dict[str, list[Tensor]]:
    base = models[0]
    if level == "model":
        return {"model": [model.model(tokens).last_hidden_state for model in models]}
    positions = torch.arange(tokens.shape[1]).unsqueeze(0)
    hidden = base.model.embed_tokens(tokens)
    rotary = base.model.rotary_emb(hidden, positions)
    size = tokens.shape[1]
    mask = torch.full((size, size), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    found = {}
    for i, layer in enumerate(base.model.layers):

        def attention(model: Any, x: Tensor, i: int = i) -> Tensor:
            own = model.model.layers[i]
            return own.self_attn(own.input_layernorm(x), position_embeddings=rotary, attention_mask=mask)[0]

        def mlp(model: Any, x: Tensor, i: int = i) -> Tensor:
            own = model.model.layers[i]
            return own.mlp(own.post_attention_layernorm(x))

        def whole(model: Any, x: Tensor, i: int = i) -> Tensor:
            between = x + attention(model, x, i)
            return between + mlp(model, between, i)

        def head(model: Any, x: Tensor, h: int, i: int = i) -> Tensor:
            taken: list[Tensor] = []
            projection = model.model.layers[i].self_attn.o_proj
            handle = projection.register_forward_pre_hook(lambda module, given: taken.append(given[0]))
            attention(model, x, i)
            handle.remove()
            width = projection.in_features // model.config.num_attention_heads
            part = slice(h * width, (h + 1) * width)
            return taken[0][..., part] @ projection.weight[:, part].T

        between = hidden + attention(base, hidden)
        if level == "layer":
            found[f"layers.{i}.layer"] = [whole(model, hidden) for model in models]
        elif level == "attn_mlp":
            found[f"layers.{i}.attn"] = [attention(model, hidden) for model in models]
        else:
            for h in range(base.config.num_attention_heads):
                found[f"layers.{i}.head.{h}"] = [head(model, hidden, h) for model in models]
        if level != "layer":
            found[f"layers.{i}.mlp"] = [mlp(model, between) for model in models]
        hidden = whole(base, hidden)
        del layer
    return found


def alphas_of(features: list[list[list[Tensor]]], *, balance: bool) -> np.ndarray[Any, Any]:
    """Eq. 12-14, or 33-34, term by term."""
    count = len(features)
    b = np.zeros((count, count, count))
    for a, samples in enumerate(features):
        for base, *others in samples:
            deltas = [(other - base).numpy().ravel() for other in others]
            mean = sum(delta @ delta for delta in deltas) / count if balance else 1.0
            for i in range(count):
                for j in range(count):
                    b[a, i, j] += (deltas[i] @ deltas[j]) / mean / len(samples)
    left = np.array([[sum(b[t, j, k] for t in range(count)) for k in range(count)] for j in range(count)])
    right = np.array([sum(b[t, j, t] for t in range(count)) for j in range(count)])
    return np.linalg.solve(left, right)


@pytest.mark.parametrize("level", ["layer", "attn_mlp", "head_mlp", "model"])
@pytest.mark.parametrize("balance", [True, False])
def test_alphas_are_those_of_whole_models_in_float64(
    level: str, balance: bool, trained: list[Path], tmp_path: Path
) -> None:
    data = list(texts(tmp_path))
    _, fit = merged(tmp_path, spec_of(trained, data, level, balance=balance))
    expected = features_of(trained, "qwen2", data, level)
    assert set(fit["modules"]) == set(expected)
    for module, features in expected.items():
        found = fit["modules"][module]
        assert found["solver"] == "exact"
        np.testing.assert_allclose(found["alphas"], alphas_of(features, balance=balance), atol=1e-6, err_msg=module)


def test_tensors_move_by_the_alphas_of_their_submodule(trained: list[Path], tmp_path: Path) -> None:
    data = list(texts(tmp_path))
    found, fit = merged(tmp_path, spec_of(trained, data, "attn_mlp"))
    base, *models = [load_file(folder / "model.safetensors") for folder in trained]
    for name, tensor in found.items():
        parts = name.split(".")
        alphas = [0.5, 0.5]  # outside: the average
        if parts[1] == "layers":
            attention = parts[3] in ("self_attn", "input_layernorm")
            alphas = fit["modules"][f"layers.{parts[2]}.{'attn' if attention else 'mlp'}"]["alphas"]
        deltas = [model[name].double() - base[name].double() for model in models]
        expected = base[name].double() + sum(a * delta for a, delta in zip(alphas, deltas, strict=True))
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-9, msg=name)


def test_heads_move_their_rows_and_columns(trained: list[Path], tmp_path: Path) -> None:
    data = list(texts(tmp_path))
    found, fit = merged(tmp_path, spec_of(trained, data, "head_mlp"))
    base, *models = [load_file(folder / "model.safetensors") for folder in trained]
    config = json.loads((trained[0] / "config.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    alphas = np.array([fit["modules"][f"layers.1.head.{h}"]["alphas"] for h in range(heads)])  # (heads, models)
    of_group = alphas.reshape(groups, -1, 2).mean(axis=1)
    for projection, per_unit in (("q", alphas), ("k", of_group), ("v", of_group), ("o", alphas)):
        name = f"model.layers.1.self_attn.{projection}_proj.weight"
        expected = base[name].double().numpy().copy()
        axis = 1 if projection == "o" else 0
        each = expected.shape[axis] // len(per_unit)
        scale = np.repeat(per_unit, each, axis=0)  # (units, models)
        for n, model in enumerate(models):
            delta = (model[name].double() - base[name].double()).numpy()
            expected += delta * (scale[:, n][None, :] if axis else scale[:, n][:, None])
        np.testing.assert_allclose(found[name].double().numpy(), expected, rtol=1e-6, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "phi3", "gemma2", "mixtral"])
def test_any_architecture_has_attention_and_mlp(kind: str, tmp_path: Path) -> None:
    folders = checkpoints(tmp_path, kind, 3)
    found, fit = merged(tmp_path, spec_of(folders, list(texts(tmp_path)), "attn_mlp"))
    assert set(fit["modules"]) == {f"layers.{i}.{part}" for i in range(2) for part in ("attn", "mlp")}
    assert all(np.isfinite(one["alphas"]).all() for one in fit["modules"].values())
    assert set(found) == set(load_file(folders[0] / "model.safetensors"))


# The closed form on modules that are linear: there it is exact.


@given(st.integers(1, 4), st.integers(0, 2**32 - 1), st.booleans())
def test_the_closed_form_minimises_the_objective_on_linear_modules(count: int, seed: int, balance: bool) -> None:
    random = np.random.default_rng(seed)
    deltas = random.normal(size=(count, 5, 6))  # W_t - W_0: f(x; W) = W x
    samples = [random.normal(size=(3, 6)) * (1 + 3 * task) for task in range(count)]
    products = Products(count, balance=balance)
    for task, inputs in enumerate(samples):
        for x in inputs:
            products.add(task, [torch.from_numpy(delta @ x) for delta in deltas])
    found = products.solve().alphas.numpy()

    def objective(alphas: Any) -> float:
        """Eq. 10, or 33: the merged module's features against each task's own model's."""
        total = 0.0
        for task, inputs in enumerate(samples):
            for x in inputs:
                each = [delta @ x for delta in deltas]
                gap = sum(a * one for a, one in zip(alphas, each, strict=True)) - each[task]
                scale = sum(one @ one for one in each) / count if balance else 1.0
                total += (gap @ gap) / scale / len(inputs)
        return float(total)

    best = minimize(objective, np.full(count, 1 / count), method="BFGS", options={"gtol": 1e-10})
    np.testing.assert_allclose(found, best.x, atol=1e-5)
    assert objective(found) <= best.fun + 1e-9


def test_differences_that_do_not_meet_are_halved() -> None:
    products = Products(2, balance=True)
    for task in range(2):
        for _ in range(3):
            x = torch.randn(4, dtype=torch.float64)
            products.add(task, [torch.cat([x, torch.zeros(4)]), torch.cat([torch.zeros(4), x])])
    # On either task a model's own features ask for 1 and the other model's for 0: the optimum lies between.
    assert products.solve().alphas.tolist() == pytest.approx([0.5, 0.5])


def test_models_that_are_equal_are_told_apart_by_nothing(tmp_path: Path) -> None:
    folders = checkpoints(tmp_path, "llama", 2)
    plain, records = texts(tmp_path)
    found, fit = merged(tmp_path, spec_of([folders[0], folders[1], folders[1]], [plain, records], "attn_mlp"))
    for one in fit["modules"].values():
        assert one["solver"] == "least squares"
        assert one["alphas"] == pytest.approx([0.5, 0.5], abs=1e-9)  # of all that fit as well, the shortest
    model = load_file(folders[1] / "model.safetensors")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, model[name].float(), rtol=1e-6, atol=1e-6)


def test_copies_of_the_base_give_the_base(tmp_path: Path) -> None:
    (folder,) = checkpoints(tmp_path, "llama", 1)
    plain, records = texts(tmp_path)
    found, fit = merged(tmp_path, spec_of([folder] * 1 + _copies(folder, 2), [plain, records], "layer"))
    base = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, base[name].float()) for name, tensor in found.items())
    assert all(one["alphas"] == [0.0, 0.0] for one in fit["modules"].values())


def _copies(folder: Path, count: int) -> list[Path]:
    import shutil

    return [Path(shutil.copytree(folder, folder.with_name(f"copy{i}"))) for i in range(count)]


def test_one_model_is_kept_as_it_is(tmp_path: Path) -> None:
    folders = checkpoints(tmp_path, "llama", 2)
    plain, _ = texts(tmp_path)
    found, fit = merged(tmp_path, spec_of(folders, [plain], "head_mlp"))
    assert all(one["alphas"] == pytest.approx([1.0], abs=1e-12) for one in fit["modules"].values())
    model = load_file(folders[1] / "model.safetensors")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, model[name].float(), rtol=1e-6, atol=1e-6)


def test_the_order_of_models_does_not_matter(tmp_path: Path) -> None:
    base, *models = checkpoints(tmp_path, "llama", 3)
    data = list(texts(tmp_path))
    one, _ = merged(tmp_path, spec_of([base, *models], [data[0], data[0]], "layer"))
    other, _ = merged(tmp_path, spec_of([base, *models[::-1]], [data[0], data[0]], "layer"))
    # Other samples are drawn for each place in the list: alphas differ, but by little.
    assert all((one[name] - other[name]).abs().max() < 0.05 for name in one)


def test_outside_of_the_modules_the_weights_are_the_user_s(tmp_path: Path) -> None:
    folders = checkpoints(tmp_path, "llama", 3)
    spec = spec_of(folders, list(texts(tmp_path)), "layer", weight=0.0)
    found, _ = merged(tmp_path, spec)
    base = load_file(folders[0] / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(found[name], base[name].float())


# What is wrong is said before anything is read; what is interrupted goes on.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: spec["models"][1].pop("data"), r"models\[1\].*needs data, a JSONL or text file"),
        (lambda spec: spec["models"][0].update(data="missing.jsonl"), r"models\[0\]\.data.*missing\.jsonl"),
        (lambda spec: spec.update(sparsify={"method": "dare", "drop_rate": 0.5}), "remove sparsify"),
        (lambda spec: spec.pop("base_model"), "base_model is missing"),
        (lambda spec: spec["parameters"].update(level="word"), "expected layer or attn_mlp or head_mlp or model"),
        (lambda spec: spec["calibration"].update(samples=0), "a whole number from 1"),
        (lambda spec: spec["calibration"].update(sample=3), "unknown key.*samples"),
    ],
)
def test_what_a_spec_lacks_is_named(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    folders = checkpoints(tmp_path, "llama", 3)
    spec = spec_of(folders, list(texts(tmp_path)), "layer")
    change(spec)
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    with pytest.raises(SpecError, match=message):
        mergecore.plan(mergecore.load_spec(path))


def test_a_fit_that_was_stopped_goes_on_from_its_last_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = mergecore.load_spec(spec_of(checkpoints(tmp_path, "qwen2", 3), list(texts(tmp_path)), "attn_mlp"))
    mergecore.merge(spec, tmp_path / "undisturbed")
    steps: list[tuple[int, int]] = []
    with pytest.raises(Interrupted):
        mergecore.merge(
            spec,
            tmp_path / "out",
            progress=lambda now: steps.append((now.steps_done, now.steps_total)),
            should_stop=lambda: True,
        )
    assert steps == []  # it stops before it says so
    fitted_again: list[str] = []
    solve = Products.solve
    monkeypatch.setattr(Products, "solve", lambda self: fitted_again.append("") or solve(self))  # type: ignore[func-returns-value]
    mergecore.merge(spec, tmp_path / "out", resume=True)
    assert len(fitted_again) == 2  # attention and MLP of the second layer alone
    same(tmp_path / "out", tmp_path / "undisturbed")
    assert not (tmp_path / ".out.partial").exists()


def same(one: Path, other: Path) -> None:
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_a_killed_merge_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(yaml.safe_dump(spec_of(checkpoints(tmp_path, "qwen2", 3), list(texts(tmp_path)), "attn_mlp")))
    mergecore.merge(spec, tmp_path / "undisturbed")
    command = [sys.executable, "-m", "mergecore.cli", "merge", str(spec), str(tmp_path / "out"), "--resume"]
    killed = 0
    while not (tmp_path / "out").exists():
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        kept = tmp_path / ".out.partial" / "scratch" / ("slta.json", "fit.json")[min(killed, 1)]
        while killed < 2 and process.poll() is None and not kept.exists():
            time.sleep(0.001)
        if killed < 2:
            process.send_signal(signal.SIGKILL)
            killed += 1
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors
    same(tmp_path / "out", tmp_path / "undisturbed")


def test_states_that_exceed_the_memory_lie_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(checkpoints(tmp_path, "llama", 3), list(texts(tmp_path)), "attn_mlp")
    mergecore.merge(mergecore.load_spec(spec), tmp_path / "in-memory")
    used: list[Any] = []
    states = passes.States
    monkeypatch.setattr(states, "nbytes", staticmethod(lambda *_: 1 << 40))
    init = states.__init__

    def noted(self: Any, lengths: Any, width: int, dtype: Any, scratch: Path | None = None) -> None:
        used.append(scratch)
        init(self, lengths, width, dtype, scratch)

    monkeypatch.setattr(states, "__init__", noted)
    mergecore.merge(mergecore.load_spec(spec), tmp_path / "in-files")
    assert used
    assert all(used)
    same(tmp_path / "in-files", tmp_path / "in-memory")
