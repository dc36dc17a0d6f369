"""`mergecore stats`: statistics are those of the whole model, and merges take them from the files of real commands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from mergecore.errors import CheckpointError, Interrupted, OutputError, SpecError
from mergecore.features import fisher, passes
from mergecore.features.gather import gather
from mergecore.features.samples import Sample, read_samples, tokenizer_in
from mergecore.output.verify import verify_output
from tests.models import load_tensors
from tests.running import CAUSAL, checkpoints, texts, twin
from tests.service_support import wait_until
from tests.test_cli import COMMAND, ROOT, mergecore, run_here

Tensors = dict[str, Tensor]
SEEN = {"samples": 3, "length": 20, "device": "cpu"}


def samples_of(model: Path, data: Path, **how: Any) -> list[Sample]:
    how = {"count": 3, "length": 20, **how}
    return read_samples(data, tokenizer_in(model, {}), **how)


def whole_fisher(folder: Path, kind: str, samples: list[Sample]) -> Tensors:
    """By autograd of the whole model, one text after the other, stored as the model is."""
    model = twin(folder, kind).requires_grad_(True)
    sums = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for sample in samples:
        model.zero_grad()
        logits = model(sample.tokens.unsqueeze(0)).logits[0, :-1].double()
        cross_entropy(logits, sample.tokens[1:], reduction="sum").backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] += parameter.grad**2
    for name, parameter in model.named_parameters():
        parameter.data = sums[name] / len(samples)
    model.save_pretrained(folder / "whole")
    return load_file(folder / "whole" / "model.safetensors")


def whole_grams(folder: Path, kind: str, samples: list[Sample]) -> Tensors:
    """By hooks on every linear module of the whole model."""
    model = twin(folder, kind)
    found: Tensors = {}

    def given(name: str) -> Any:
        def hook(module: Any, arguments: tuple[Tensor, ...]) -> None:
            rows = arguments[0].flatten(0, -2)
            found[name] = found.get(name, torch.zeros(())) + rows.T @ rows

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            module.register_forward_pre_hook(given(f"{name}.weight"))
    with torch.no_grad():
        for sample in samples:
            model(sample.tokens.unsqueeze(0))
    return found


@pytest.mark.parametrize("kind", CAUSAL)
def test_statistics_are_those_of_the_whole_model(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of separate projections and fused ones, of tied heads and others, of biases, norms, positions and experts."""
    monkeypatch.setattr(passes, "HEAD_BYTES", 5000)  # several windows of the head
    _, data = texts(tmp_path)
    (model,) = checkpoints(tmp_path, kind, 1)
    result = gather(str(model), data, tmp_path / "stats", dtype="float64", **SEEN)  # type: ignore[arg-type]
    found, samples = load_tensors(tmp_path / "stats"), samples_of(model, data)
    assert result.tokens == sum(len(sample.tokens) for sample in samples)
    tolerance = 1e-6 if kind == "gemma3" else 1e-10
    expected = {f"fisher.{name}": each for name, each in whole_fisher(model, kind, samples).items()}
    grams = {f"gram.{name}": each for name, each in whole_grams(model, kind, samples).items()}
    grams = {name: each for name, each in grams.items() if not name.endswith(("lm_head.weight", "embed_out.weight"))}
    assert found.keys() == expected.keys() | grams.keys()
    for name, tensor in (expected | grams).items():
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance * float(tensor.abs().max()), msg=name)
    assert sum(float(each.abs().max()) > 1e-6 for each in expected.values()) > len(expected) / 2
    stored = load_tensors(model)
    experts = {name for name in result.left_out if "expert" in name or "router" in name or "gate.weight" in name}
    assert experts == set(result.left_out)
    assert {f"gram.{name}" for name in result.left_out}.isdisjoint(found)
    assert all(stored[name].dim() > 1 for name in result.left_out)


def test_what_is_gathered_in_float32_is_nearly_that(tmp_path: Path) -> None:
    _, data = texts(tmp_path)
    (model,) = checkpoints(tmp_path, "llama", 1)
    gather(str(model), data, tmp_path / "exact", dtype="float64", **SEEN)  # type: ignore[arg-type]
    gather(str(model), data, tmp_path / "stats", **SEEN)  # type: ignore[arg-type]
    found, exact = load_tensors(tmp_path / "stats"), load_tensors(tmp_path / "exact")
    assert found.keys() == exact.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), exact[name], rtol=0, atol=1e-4 * float(exact[name].max()))


def test_equal_inputs_share_one_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Query, key and value of a layer, its gate and up projections."""
    counted: list[torch.Size] = []
    matmul = Tensor.__matmul__

    def counting(one: Tensor, other: Tensor) -> Tensor:
        if one.dtype == torch.float64 and one.shape[0] == other.shape[1]:
            counted.append(one.shape)
        return matmul(one, other)

    _, data = texts(tmp_path)
    (model,) = checkpoints(tmp_path, "llama", 1)
    monkeypatch.setattr(Tensor, "__matmul__", counting)
    gather(str(model), data, tmp_path / "stats", kind="regmean", **SEEN)  # type: ignore[arg-type]
    assert len(counted) == 3 * 2 * 4  # texts, layers, inputs


@pytest.mark.parametrize("kind", ["regmean", "fisher"])
def test_one_kind_alone(kind: str, tmp_path: Path) -> None:
    _, data = texts(tmp_path)
    (model,) = checkpoints(tmp_path, "llama", 1)
    result = gather(str(model), data, tmp_path / "stats", kind=kind, **SEEN)  # type: ignore[arg-type]
    prefix = {"regmean": "gram.", "fisher": "fisher."}[kind]
    assert all(name.startswith(prefix) for name in load_tensors(tmp_path / "stats"))
    assert result.kinds == (prefix[:-1],)


def test_the_seed_draws_the_texts(tmp_path: Path) -> None:
    _, data = texts(tmp_path)
    (model,) = checkpoints(tmp_path, "llama", 1)
    folders = []
    for number, seed in enumerate((1, 1, 2)):
        folders.append(tmp_path / f"stats-{number}")
        gather(str(model), data, folders[-1], seed=seed, **SEEN)  # type: ignore[arg-type]
    first, again, other = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert first == again != other


def test_an_error_or_a_stop_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, data = texts(tmp_path)
    (model,) = checkpoints(tmp_path, "llama", 1)
    before = set(os.listdir(tmp_path))
    told: list[tuple[str, int, int]] = []

    def tell(what: str, done: int, total: int) -> None:
        told.append((what, done, total))

    with pytest.raises(Interrupted):
        gather(str(model), data, tmp_path / "stats", progress=tell, should_stop=lambda: len(told) > 2, **SEEN)  # type: ignore[arg-type]
    assert told[-1][0] == "3/4 layers"
    assert set(os.listdir(tmp_path)) == before

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OutputError):
        gather(str(model), data, tmp_path / "stats", **SEEN)  # type: ignore[arg-type]
    assert set(os.listdir(tmp_path)) == before


def test_a_model_without_a_tokenizer_or_data_without_text_is_refused(tmp_path: Path) -> None:
    _, data = texts(tmp_path)
    (model,) = checkpoints(tmp_path, "llama", 1)
    with pytest.raises(SpecError, match=r"no-such-file\.jsonl cannot be read"):
        gather(str(model), tmp_path / "no-such-file.jsonl", tmp_path / "stats")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        gather(str(model), data, tmp_path / "stats")


# Commands: of a Llama by real processes, of a GPT-2 in this one


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Two models, the statistics of each, and what regmean and fisher make of them."""
    folder = tmp_path_factory.mktemp("merged")
    data = texts(folder)

    def run(*arguments: object) -> None:
        if request.param == "llama":
            mergecore(*arguments)
        else:
            assert run_here(*arguments) == 0

    for number, model in enumerate(checkpoints(folder, request.param, 2)):
        options = ["--samples", 4, "--length", 24, "--device", "cpu"]
        run("stats", model, "--data", data[number], "--out", folder / f"s{number}", *options)
    for method in ("regmean", "fisher"):
        listed = ", ".join(f"{{model: m{number}, statistics: s{number}}}" for number in range(2))
        (folder / f"{method}.yaml").write_text(f"merge_method: {method}\nmodels: [{listed}]\ndtype: float32\n")
        run("merge", folder / f"{method}.yaml", folder / method)
    return request.param, folder


def test_merges_of_gathered_statistics_are_the_formulas(merged: tuple[str, Path]) -> None:
    kind, folder = merged
    models = [load_tensors(folder / f"m{number}") for number in range(2)]
    statistics = [load_tensors(folder / f"s{number}") for number in range(2)]
    results = {method: load_tensors(folder / method) for method in ("regmean", "fisher")}
    solved = 0
    for name in models[0]:
        values = [each[name].double().numpy() for each in models]
        information = [np.maximum(each[f"fisher.{name}"].double().numpy(), 1e-6) for each in statistics]
        weighted = sum(f * w for f, w in zip(information, values, strict=True)) / sum(information)
        np.testing.assert_allclose(results["fisher"][name].double().numpy(), weighted, rtol=1e-6, atol=1e-9)
        expected = sum(values) / 2
        if f"gram.{name}" in statistics[0]:
            solved += 1
            grams = [each[f"gram.{name}"].double().numpy() for each in statistics]
            grams = [0.9 * gram + 0.1 * np.diag(np.diag(gram)) for gram in grams]
            inside = [each if kind == "gpt2" else each.T for each in values]
            right = sum(gram @ each for gram, each in zip(grams, inside, strict=True))
            found = np.linalg.solve(sum(grams), right)
            expected = found if kind == "gpt2" else found.T
        np.testing.assert_allclose(results["regmean"][name].double().numpy(), expected, rtol=1e-5, atol=1e-8)
    assert solved == {"llama": 14, "gpt2": 8}[kind]


def test_merged_models_load(merged: tuple[str, Path]) -> None:
    kind, folder = merged
    for method in ("regmean", "fisher"):
        assert twin(folder / method, kind)(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_verify_checks_statistics(merged: tuple[str, Path]) -> None:
    _, folder = merged
    assert verify_output(folder / "s0") == []
    about = json.loads((folder / "s0" / "mergecore_manifest.json").read_text())["statistics"]
    assert about["model"]["path"] == str(folder / "m0")
    assert (about["samples"], about["length"], about["seed"], about["dtype"]) == (4, 24, 0, "float32")


def test_statistics_of_the_other_model_are_refused(
    merged: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = merged
    other = Path(shutil.copytree(folder / "m1", tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"initializer_range": 0.5}))
    spec = folder / "wrong.yaml"
    spec.write_text(
        f"merge_method: fisher\nmodels:\n- {{model: m0, statistics: s0}}\n- {{model: {other}, statistics: s1}}\n"
    )
    assert run_here("merge", spec, tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert "wrong.yaml:4: models[1].statistics:" in told
    assert "gather it from that model" in told


def test_wrong_arguments_are_told(merged: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = merged
    data, out = folder / "plain.txt", tmp_path / "s"
    for arguments, message in [
        ((folder / "m0", "--data", data, "--out", folder / "s0"), "exists"),
        ((tmp_path / "none", "--data", data, "--out", out), "does not exist"),
        ((folder / "m0", "--data", data, "--out", out, "--samples", "0"), "'0' is not a whole number above 0"),
        ((folder / "m0", "--out", out), "the following arguments are required: --data"),
    ]:
        assert run_here("stats", *arguments) == 2
        assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_it_says_what_was_gathered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, data = texts(tmp_path)
    (model,) = checkpoints(tmp_path, "mixtral", 1)
    options = ["--data", data, "--samples", 2, "--length", 9, "--device", "cpu"]
    assert run_here("stats", model, "--out", tmp_path / "a", *options) == 0
    said = capsys.readouterr().out
    assert "/a: gram and fisher of 49 tensors from 2 texts of 18 tokens" in said
    assert "26 matrices have no Gram matrix and will be averaged by regmean" in said
    assert run_here("stats", model, "--out", tmp_path / "b", *options, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["samples"], told["tokens"], told["tensors"], len(told["left_out"])) == (2, 18, 49, 26)


def test_a_signal_ends_it_without_a_trace(tmp_path: Path) -> None:
    (model,) = checkpoints(tmp_path / "model", "llama", 1)
    data = tmp_path / "model" / "many.jsonl"
    data.write_text("".join(f'"line {number} of very many"\n' for number in range(2000)))
    command = [*COMMAND, "stats", model, "--data", data, "--out", tmp_path / "s"]
    command += ["--samples", 2000, "--device", "cpu"]
    running = subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: (tmp_path / ".s.partial" / "journal.jsonl").exists(), "the first layer")
        running.send_signal(signal.SIGTERM)
        _, told = running.communicate(timeout=200)
    finally:
        running.kill()
        running.wait()
    assert running.returncode == 3, told
    assert "Traceback" not in told
    assert os.listdir(tmp_path) == ["model"]


def test_what_is_held_does_not_grow_with_layers(tmp_path: Path) -> None:
    """Squares and Gram matrices are those of one layer; only states are kept of all."""
    held: list[int] = []
    after = fisher._Squares.after

    def watching(self: Any, group: int, sample: int) -> None:
        after(self, group, sample)
        held.append(len(self.sums))

    _, data = texts(tmp_path)
    (model,) = checkpoints(tmp_path, "llama", 1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fisher._Squares, "after", watching)
        gather(str(model), data, tmp_path / "stats", kind="fisher", **SEEN)  # type: ignore[arg-type]
    assert max(held) == 9
