"""Measures of linearity against the paper's formulas on whole models, and on modules that are linear by design."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergecore.errors import SpecError
from mergecore.features.linearity import PAIR, TRIPLE, linearity, measure
from mergecore.features.passes import States
from mergecore.features.samples import read_samples, tokenizer_in
from tests.running import checkpoints, texts, twin

Features = list[np.ndarray[Any, Any]]


def states_of(features: Features) -> States:
    found = States([len(each) for each in features], features[0].shape[1], torch.float64)
    for i, each in enumerate(features):
        found[i] = torch.from_numpy(each).unsqueeze(0)
    return found


def expected(output: Any, tasks: Sequence[int]) -> tuple[list[float], float, float, float]:
    """Eq. 19, 8, 15-16 and 17, term by term; `output` gives the features for weights of the models' deltas."""
    count, steps = len(tasks), 10
    unit = np.eye(count)
    owner = [task for task, number in enumerate(tasks) for _ in range(number)]
    scores = []
    for model in range(count):
        line = [output(unit[model] * k / steps) for k in range(steps + 1)]
        squares: list[float] = []
        for s in (s for s, task in enumerate(owner) if task == model):
            d = lambda i, j, s=s, line=line: np.linalg.norm(line[i][s] - line[j][s])  # noqa: E731
            squares.append(
                math.fsum(
                    (d(i, j) / d(steps, 0) - abs(i - j) / steps) ** 2
                    for i in range(steps + 1)
                    for j in range(steps + 1)
                )
            )
        scores.append(float(np.mean(squares)))
    zero, whole = output(np.zeros(count)), [output(unit[model]) for model in range(count)]

    def cosine(a: Any, b: Any) -> float:
        return float(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b))

    distances: list[float] = []
    cosines: list[float] = []
    for size, values in ((2, PAIR), (3, TRIPLE)):
        for chosen in itertools.combinations(range(count), size):
            for some in itertools.product(values, repeat=size):
                weights = np.zeros(count)
                weights[list(chosen)] = some
                merged = output(weights)
                ratios: list[float] = []
                of_samples: list[float] = []
                for s in range(len(owner)):
                    found = merged[s] - zero[s]
                    wanted = sum(weights[t] * (whole[t][s] - zero[s]) for t in range(count))
                    of_samples.append(cosine(found, wanted))
                    ratios.append(float(np.linalg.norm(found) * of_samples[-1] / np.linalg.norm(wanted)))
                distances.append(float(abs(1 - np.mean(ratios))))
                cosines.append(float(np.mean(of_samples)))
    between = [
        np.mean(
            [cosine(whole[a][s] - zero[s], whole[b][s] - zero[s]) for a, b in itertools.combinations(range(count), 2)]
        )
        for s in range(len(owner))
    ]
    return scores, float(np.mean(distances)), float(np.mean(cosines)), float(np.mean(between))


@given(st.integers(2, 3), st.integers(0, 2**32 - 1), st.floats(0, 2))
def test_measures_are_the_paper_s_formulas(count: int, seed: int, bend: float) -> None:
    random = np.random.default_rng(seed)
    base, deltas = random.normal(size=(4, 5)), random.normal(size=(count, 4, 5))
    tasks = list(random.integers(1, 3, size=count))
    samples = [random.normal(size=(random.integers(1, 4), 4)) for _ in range(sum(tasks))]

    def output(weights: Any) -> Features:
        matrix = base + np.tensordot(np.asarray(weights), deltas, axes=1)
        return [x @ matrix + bend * np.tanh(x @ matrix) for x in samples]

    found = measure("module", lambda weights: states_of(output(weights)), [int(task) for task in tasks])
    scores, distance, cosine, between = expected(output, tasks)
    assert found.nonlinearity == pytest.approx(scores, rel=1e-9, abs=1e-18)
    assert found.projection_distance is not None
    assert found.projection_distance == pytest.approx(distance, rel=1e-9, abs=1e-12)
    assert found.cosine == pytest.approx(cosine, rel=1e-9)
    assert found.cosine_between_models == pytest.approx(between, rel=1e-9, abs=1e-12)
    if bend == 0:
        assert max(found.nonlinearity) < 1e-20
        assert found.projection_distance < 1e-12
        assert found.cosine == pytest.approx(1.0)


def test_a_model_that_is_the_base_is_linear() -> None:
    features = [np.ones((2, 3))]
    assert measure("module", lambda weights: states_of(features), [1]).nonlinearity == [0.0]
    both: Any = measure("module", lambda weights: states_of(features * 2), [1, 1])
    assert (both.projection_distance, both.cosine) == (0.0, 1.0)


@torch.no_grad()
def test_submodules_are_measured_on_the_base_s_features(tmp_path: Path) -> None:
    folders = checkpoints(tmp_path, "llama", 3)
    data = list(texts(tmp_path))
    found = linearity(
        str(folders[0]), [str(f) for f in folders[1:]], [str(f) for f in data],
        level="attn_mlp", samples=2, length=10, dtype="float64",
    )  # fmt: skip
    assert [one.module for one in found] == [f"layers.{i}.{part}" for i in range(2) for part in ("attn", "mlp")]
    base, *models = [twin(folder, "llama") for folder in folders]
    tokenizer = tokenizer_in(folders[0], {})
    drawn = [read_samples(path, tokenizer, count=2, length=10, seed=task) for task, path in enumerate(data)]
    inputs = []  # what the second layer's MLP is given, in the base
    handle = base.model.layers[1].post_attention_layernorm.register_forward_pre_hook(lambda m, x: inputs.append(x[0]))
    for sample in (sample for task in drawn for sample in task):
        base(sample.tokens.unsqueeze(0))
    handle.remove()
    own = [model.model.layers[1] for model in (base, *models)]

    def output(weights: Any) -> Features:
        blended = twin(folders[0], "llama").model.layers[1]
        for name, parameter in blended.named_parameters():
            ours, *theirs = [dict(layer.named_parameters())[name] for layer in own]
            parameter.data = ours + sum(w * (one - ours) for w, one in zip(weights, theirs, strict=True))
        return [blended.mlp(blended.post_attention_layernorm(x))[0].numpy() for x in inputs]

    scores, distance, cosine, between = expected(output, [2, 2])
    assert found[3].nonlinearity == pytest.approx(scores, rel=1e-6)
    assert found[3].projection_distance == pytest.approx(distance, rel=1e-6)
    assert found[3].cosine == pytest.approx(cosine, rel=1e-9)
    assert found[3].cosine_between_models == pytest.approx(between, rel=1e-6)


def command(*arguments: str | Path | int, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mergecore.cli", "linearity", *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, timeout=200,
    )  # fmt: skip


def test_the_command_prints_a_table_json_and_a_plot(tmp_path: Path) -> None:
    checkpoints(tmp_path, "qwen2", 3)
    plain, records = texts(tmp_path)
    short = ("--data", plain, "--data", records, "--samples", 2, "--length", 8)
    finished = command("m0", "m1", "m2", *short, "--level", "head_mlp", "--json", "--plot", "plot.svg", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    printed = json.loads(finished.stdout)
    assert printed["models"] == ["m1", "m2"]
    assert len(printed["modules"]) == 2 * (4 + 1)
    assert all(len(one["nonlinearity"]) == 2 and math.isfinite(one["cosine"]) for one in printed["modules"])
    assert (tmp_path / "plot.svg").read_text().lstrip().startswith("<?xml")
    table = command("m0", "m1", "--data", plain, "--samples", 2, "--length", 8, "--level", "model", cwd=tmp_path)
    assert "model" in table.stdout
    assert table.returncode == 0, table.stderr
    wrong = command("m0", "m1", "m2", "--data", plain, cwd=tmp_path)
    assert wrong.returncode == 2
    assert "2 models and 1 --data" in wrong.stderr


def test_a_level_that_an_architecture_lacks_is_named(tmp_path: Path) -> None:
    folders = checkpoints(tmp_path, "gpt2", 2)
    plain, _ = texts(tmp_path)
    with pytest.raises(Exception, match=r"head_mlp needs layers with q_proj.*take level: attn_mlp"):
        linearity(str(folders[0]), [str(folders[1])], [str(plain)], level="head_mlp", samples=1, length=8)
    with pytest.raises(SpecError, match="expected text"):
        linearity(str(folders[0]), [str(folders[1])], [""], samples=1)
