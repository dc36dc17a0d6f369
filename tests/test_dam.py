"""DAM and AdaMerging beside the plain case: who gives which tensor, what of logits is kept, and what it costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import mergecore
from mergecore.cli import main
from mergecore.errors import NonFiniteError, SpecError
from mergecore.features import adamerging, dam, learning
from mergecore.features.backward import value_and_gradient
from mergecore.features.fitting import kept_bytes
from mergecore.features.learning import BATCH, Mixed
from tests.running import checkpoints, texts
from tests.test_learning import fitting_of, manifest, merged, spec_of

F64 = torch.float64


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}


def with_tensor(folder: Path, name: str, tensor: Tensor) -> None:
    stored = load_file(folder / "model.safetensors")
    save_file({**stored, name: tensor}, folder / "model.safetensors", {"format": "pt"})


# --- who gives a tensor --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", [False, True])
def test_the_base_gives_embeddings_and_norms_also_if_it_is_one_of_the_models(listed: bool, tmp_path: Path) -> None:
    folders, data = checkpoints(tmp_path, "qwen2", 3), list(texts(tmp_path))
    spec = spec_of(folders, data, "dam", epochs=0)
    if listed:
        spec["models"].insert(0, {"model": str(folders[0]), "data": str(data[0])})
    out, base = weights(merged(tmp_path, spec)), weights(folders[0])
    averaged = [weights(folder) for folder in folders[0 if listed else 1 :]]
    for name, tensor in out.items():
        if "embed" in name or "norm" in name or name.endswith("bias"):
            assert torch.equal(tensor, base[name]), name
        else:
            torch.testing.assert_close(tensor, sum(one[name] / len(averaged) for one in averaged), msg=name)


def test_a_model_that_is_listed_for_two_tasks_counts_twice(tmp_path: Path) -> None:
    folders, data = checkpoints(tmp_path, "llama", 2), list(texts(tmp_path))
    twice = [folders[0], folders[1], folders[1]]
    out = weights(merged(tmp_path, spec_of(twice, data, "dam", epochs=0, embeddings="merge", norms="merge")))
    model = weights(folders[1])
    assert all(torch.equal(out[name], model[name]) for name in model)


TOWER = "vision_tower.patch.weight"


@pytest.mark.parametrize("method", ["dam", "adamerging"])
@pytest.mark.parametrize("having", [[0, 1, 2], [0, 2]])
def test_tensors_that_the_model_does_not_run_stay_where_learning_began(
    method: str, having: list[int], tmp_path: Path
) -> None:
    folders, data = checkpoints(tmp_path, "llama", 3), list(texts(tmp_path))
    tower = torch.arange(12.0).view(3, 4)
    for number in having:
        with_tensor(folders[number], TOWER, tower * (1 + number))
    parameters = {"lambda_l1": 1.0, "lambda_l2": 1.0} if method == "dam" else {}
    out = weights(merged(tmp_path, spec_of(folders, data, method, learning_rate=0.05, **parameters)))
    moved = [number for number in having if number]
    share = {"adamerging": tower * (1 + 0.3 * sum(moved)), "dam": tower * (1 + sum(moved) / len(moved))}
    if method == "dam" and len(having) < 3:  # the base has it, too, and is one of those that are averaged
        share["dam"] = tower * (1 + sum(having) / len(having))
    torch.testing.assert_close(out[TOWER], share[method])
    assert not torch.equal(out["lm_head.weight"], weights(folders[0])["lm_head.weight"])


def test_the_bias_of_a_head_shares_the_heads_coefficients(tmp_path: Path) -> None:
    folders, data = checkpoints(tmp_path, "phi", 3), list(texts(tmp_path))
    with fitting_of(folders, data, "adamerging", tmp_path) as fitting:
        groups = {name: adamerging._group(fitting, name, "layer") for name in fitting.models[0].shapes}
    assert groups["lm_head.weight"] == groups["lm_head.bias"] == "head"
    assert groups["model.final_layernorm.weight"] == "outside"
    assert groups["model.embed_tokens.weight"] == "embedding"
    assert {group for group in groups.values() if group.startswith("layers")} == {"layers.0", "layers.1"}


# --- logits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_as_many_logits_as_there_are_tokens_or_more_are_all(loss: str, tmp_path: Path) -> None:
    folders, data = checkpoints(tmp_path, "llama", 3), list(texts(tmp_path))
    whole, equal, more = (
        merged(tmp_path, spec_of(folders, data, "dam", loss=loss, top_k=top)) for top in (0, 257, 1000)
    )
    for other in (equal, more):
        assert manifest(other)["fit"] == manifest(whole)["fit"]
        assert (other / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@given(st.integers(0, 2**32 - 1), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_what_the_rest_of_the_vocabulary_has_is_told_however_little_it_is(seed: int, dtype: torch.dtype) -> None:
    """Next to certain predictions, too: 1 - sum of the largest would be rounding noise."""
    random = np.random.default_rng(seed)
    merged, model = (random.normal(size=(4, 9)) for _ in range(2))
    model[:, 2] += 30
    merged[:, 2] += 20
    merged, model = (torch.from_numpy(x).to(dtype).double().numpy() for x in (merged, model))
    places = torch.from_numpy(model).topk(2, dim=-1).indices
    known = dam.with_rest(torch.from_numpy(model), places).to(torch.float32)

    def logs(values: Any) -> Any:
        """Of the two tokens and the others together."""
        normed = values - np.logaddexp.reduce(values, axis=-1, keepdims=True)
        own = np.take_along_axis(normed, places.numpy(), -1)
        others = normed.copy()
        np.put_along_axis(others, places.numpy(), -np.inf, -1)
        return np.concatenate([own, np.logaddexp.reduce(others, axis=-1, keepdims=True)], -1)

    p, q = logs(merged), logs(model)
    for kind, expected in (("kl", (np.exp(p) * (p - q)).sum(-1)), ("forward_kl", (np.exp(q) * (q - p)).sum(-1))):
        found = dam.distance(kind, torch.from_numpy(merged), known, places)
        assert float(found) == pytest.approx(expected.mean(), rel=1e-3, abs=1e-6)
    squares = np.take_along_axis(merged - model, places.numpy(), -1) ** 2
    found = dam.distance("mse", torch.from_numpy(merged), known, places)
    assert float(found) == pytest.approx(squares.mean(), rel=1e-4)


@pytest.mark.parametrize("kind", ["kl", "forward_kl", "mse", "entropy"])
@pytest.mark.parametrize("top", [0, 5])
def test_losses_of_few_tokens_at_once_are_those_of_all(kind: str, top: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = torch.randn(17, 40, dtype=F64)
    places = [model.topk(top, dim=-1).indices] if top else []
    known = dam.with_rest(model, *places) if top else model
    sizes: list[int] = []
    softmax = torch.log_softmax

    def recorded(logits: Tensor, dim: int) -> Tensor:
        sizes.append(logits.shape[0])
        return softmax(logits, dim=dim)

    monkeypatch.setattr(torch, "log_softmax", recorded)

    def value_and_slope(at_once: int) -> tuple[Tensor, Tensor]:
        monkeypatch.setattr(learning, "LOGITS", at_once)
        merged = torch.linspace(-1, 1, 17 * 40, dtype=F64).view(17, 40).sin().requires_grad_()
        loss = learning.entropy(merged[None]) if kind == "entropy" else dam.distance(kind, merged, known, *places)
        loss.backward()
        assert merged.grad is not None
        return loss.detach(), merged.grad

    whole = value_and_slope(17 * 40)
    sizes.clear()
    for found, expected in zip(value_and_slope(3 * 40 + 1), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    assert kind == "mse" or max(sizes) == 3


def test_gradients_do_not_depend_on_the_heads_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders, data = checkpoints(tmp_path, "phi", 3), list(texts(tmp_path))
    with fitting_of(folders, data, "dam", tmp_path, norms="merge") as fitting:
        mixtures, leaves = dam._mixtures(fitting, 2)
        known, tokens = dam.Targets(fitting, 1), [sample.tokens for sample in fitting.samples[0]]
        found = []
        for nbytes in (64 << 20, 40 * 16 * 8):
            monkeypatch.setattr(learning, "HEAD_BYTES", nbytes)
            mixed = Mixed(fitting.network, mixtures, F64)
            windows = [first for first, _ in mixed.head_windows()]
            value_and_gradient(
                fitting.network, mixed, tokens, lambda number, logits: dam.distance("kl", logits[0], *known[number])
            )
            found.append({name: leaf.grad for name, leaf in leaves.items()})
            for leaf in leaves.values():
                leaf.grad = None
    assert windows == [0, 40, 80, 120, 160, 200, 240]
    for name, expected in found[0].items():
        assert expected is not None
        torch.testing.assert_close(found[1][name], expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))


# --- errors and costs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        ("dam", "learning_rate", [{"filter": "mlp", "value": 0.5}, {"value": 0.0}]),
        ("dam", "embeddings", [{"filter": "embed_tokens", "value": "merge"}, {"value": "base"}]),
        ("adamerging", "start", [0.1, 0.5]),
    ],
)
def test_a_parameter_of_the_whole_fit_that_differs_between_tensors_is_an_error(
    method: str, name: str, value: Any, tmp_path: Path
) -> None:
    folders, data = checkpoints(tmp_path, "llama", 3), list(texts(tmp_path))
    with pytest.raises(SpecError, match=f"parameters.{name}: {name} of {method} is one for the whole model, but"):
        mergecore.plan(mergecore.load_spec(spec_of(folders, data, method, **{name: value})))


def test_learning_that_diverges_is_told_at_once(tmp_path: Path) -> None:
    folders, data = checkpoints(tmp_path, "llama", 3), list(texts(tmp_path))
    with pytest.raises(NonFiniteError, match=r"the loss of step \d is (nan|inf): lower learning_rate"):
        merged(tmp_path, spec_of(folders, data, "dam", learning_rate=1e200, epochs=3))


@pytest.mark.parametrize(("kind", "top"), [("llama", 0), ("gpt2", 7)])
def test_a_plan_tells_what_is_kept_beside_the_weights(
    kind: str, top: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders, data = checkpoints(tmp_path, kind, 3), list(texts(tmp_path))
    spec = spec_of(folders, data, "dam", top_k=top, batch=2)
    planned = kept_bytes(mergecore.plan(mergecore.load_spec(spec)))
    with fitting_of(folders, data, "dam", tmp_path, top_k=top) as fitting:
        known = dam.Targets(fitting, 1)
        tokens = sum(len(sample.tokens) for task in fitting.samples for sample in task)
        kept = sum(tensor.nbytes for number in range(6) for tensor in known[number])
    assert tokens == 2 * 3 * 12
    states = 12 * 16 * 8  # of a sample: tokens, hidden size, float64
    assert planned == {BATCH: 2 * (2 + 1) * states, "logits": kept, "hidden states": 3 * states}
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(spec))
    assert main(["plan", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "of hidden states of a batch, in memory at most\n" in shown
    assert "of logits at most; beyond --memory in a file beside the output" in shown
