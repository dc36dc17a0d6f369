"""regmean, held against least squares in NumPy and against what it must do by its mathematics."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

import mergecore
from mergecore.errors import CheckpointError, Interrupted, MergecoreError, NonFiniteError, SpecError
from tests import oracle
from tests.models import LLAMA, llama, load_tensors, moved, tensor_bytes, write_model
from tests.statistics import write_statistics

Matrix = npt.NDArray[np.float64]
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
ATTENTION = "transformer.h.0.attn.c_attn.weight"
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
ROWS = 40
"""Tokens that every model has seen: more than any layer of these has inputs."""


def weight(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def inputs_of(number: int, width: int, rows: int = ROWS) -> Matrix:
    """What a layer of a model was given: correlated features of different sizes."""
    random = np.random.default_rng(number)
    mixed = random.standard_normal((rows, width)) @ (np.eye(width) + 0.3 * random.standard_normal((width, width)))
    return np.asarray(mixed * np.geomspace(0.01, 10, width))


def gram(inputs: Matrix) -> Tensor:
    return torch.from_numpy(inputs.T @ inputs)


def closed_form(weights: Sequence[Matrix], inputs: Sequence[Matrix], alpha: float) -> Matrix:
    """(sum G_i')^-1 sum G_i' W_i of weights (in, out)."""
    grams = [np.diag(np.diag(x.T @ x)) * (1 - alpha) + alpha * (x.T @ x) for x in inputs]
    right = sum(g @ w for g, w in zip(grams, weights, strict=True))
    return np.asarray(np.linalg.solve(np.sum(grams, axis=0), right))


class Merging:
    """Models with the inputs of their layers, and their merge."""

    def __init__(self, folder: Path, config: Mapping[str, Any] = LLAMA) -> None:
        self.folder, self.config = folder, config
        self.entries: list[dict[str, str]] = []

    def add(self, tensors: Mapping[str, Tensor], grams: Mapping[str, Tensor]) -> Merging:
        number = len(self.entries)
        model = write_model(self.folder / f"model-{number}", tensors, self.config)
        named = {f"gram.{name}": matrix for name, matrix in grams.items()}
        statistics = write_statistics(self.folder / f"statistics-{number}", model, named)
        self.entries.append({"model": str(model), "statistics": str(statistics)})
        return self

    def spec(self, **keys: Any) -> dict[str, Any]:
        return {"merge_method": "regmean", "models": self.entries, "dtype": "float32", **keys}

    def merge(self, name: str = "out", **keys: Any) -> dict[str, Tensor]:
        mergecore.merge(mergecore.load_spec(self.spec(**keys)), self.folder / name, device="cpu")
        return load_tensors(self.folder / name)


def assert_close(found: Tensor, expected: Matrix, tolerance: float = 2.0**-23) -> None:
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=tolerance, atol=1e-9)


# What is computed


@pytest.mark.parametrize("alpha", [0.9, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("models", [1, 2, 3])
def test_linear_layers_are_the_closed_form(models: int, alpha: float, tmp_path: Path) -> None:
    merging = Merging(tmp_path)
    for n in range(models):
        up, down = (weight(9, 6, seed=n), weight(6, 9, seed=10 + n))
        merging.add({UP: up, DOWN: down}, {UP: gram(inputs_of(n, 6)), DOWN: gram(inputs_of(5 + n, 9))})
    found = merging.merge(parameters={"alpha": alpha})
    for name, shift, seed, shape in ((UP, 0, 0, (9, 6)), (DOWN, 5, 10, (6, 9))):
        weights = [weight(*shape, seed=seed + n).double().numpy().T for n in range(models)]
        inputs = [inputs_of(shift + n, shape[1]) for n in range(models)]
        assert_close(found[name], closed_form(weights, inputs, alpha).T)


def test_the_default_alpha_is_nine_tenths(tmp_path: Path) -> None:
    merging = Merging(tmp_path)
    for n in range(2):
        merging.add({UP: weight(9, 6, seed=n)}, {UP: gram(inputs_of(n, 6))})
    assert torch.equal(merging.merge("a")[UP], merging.merge("b", parameters={"alpha": 0.9})[UP])
    assert not torch.equal(merging.merge("c", parameters={"alpha": 0.8})[UP], merging.merge("d")[UP])


def test_layers_stored_in_by_out_are_the_closed_form(tmp_path: Path) -> None:
    """Conv1D of GPT-2, of a square shape: which axis has the inputs is known of the architecture, not of the shape."""
    merging = Merging(tmp_path, GPT2)
    for n in range(3):
        merging.add({ATTENTION: weight(6, 6, seed=n)}, {ATTENTION: gram(inputs_of(n, 6))})
    weights = [weight(6, 6, seed=n).double().numpy() for n in range(3)]
    expected = closed_form(weights, [inputs_of(n, 6) for n in range(3)], 0.9)
    assert_close(merging.merge()[ATTENTION], expected)
    planned = mergecore.plan(mergecore.load_spec(merging.spec()))
    assert planned.passes == 2


def test_alpha_1_answers_most_like_every_model_on_its_inputs(tmp_path: Path) -> None:
    """The least sum of squares |X_i W - X_i W_i|^2, by least squares on the inputs themselves."""
    merging = Merging(tmp_path)
    weights, inputs = [weight(9, 6, seed=n) for n in range(3)], [inputs_of(n, 6) for n in range(3)]
    for each, seen in zip(weights, inputs, strict=True):
        merging.add({UP: each}, {UP: gram(seen)})
    wanted = [x @ w.double().numpy().T for x, w in zip(inputs, weights, strict=True)]
    best, *_ = np.linalg.lstsq(np.concatenate(inputs), np.concatenate(wanted), rcond=None)
    assert_close(merging.merge(parameters={"alpha": 1.0})[UP], best.T)


def test_equal_inputs_give_the_average(tmp_path: Path) -> None:
    merging = Merging(tmp_path)
    for n in range(3):
        merging.add({UP: weight(9, 6, seed=n, dtype=torch.bfloat16)}, {UP: gram(inputs_of(0, 6))})
    found = merging.merge(dtype="bfloat16")
    expected = merging.merge("average", dtype="bfloat16", merge_method="linear")
    assert torch.equal(oracle.bits(found[UP]), oracle.bits(expected[UP]))


@pytest.mark.parametrize("only", [0, 1, 2])
def test_a_model_that_alone_has_inputs_is_the_result(only: int, tmp_path: Path) -> None:
    merging = Merging(tmp_path)
    weights = [weight(9, 6, seed=n, dtype=torch.bfloat16) for n in range(3)]
    for n, each in enumerate(weights):
        merging.add({UP: each}, {UP: gram(inputs_of(n, 6)) * (n == only)})
    found = merging.merge(dtype="bfloat16")
    assert torch.equal(oracle.bits(found[UP]), oracle.bits(weights[only]))


def test_inputs_that_no_model_has_seen_are_averaged(tmp_path: Path) -> None:
    merging, seen = Merging(tmp_path), [0, 1, 3, 4]
    weights, inputs = [weight(9, 6, seed=n) for n in range(2)], [inputs_of(n, 6) for n in range(2)]
    for each, x in zip(weights, inputs, strict=True):
        x[:, [2, 5]] = 0
        merging.add({UP: each}, {UP: gram(x)})
    found = merging.merge()[UP]
    expected = closed_form([w.double().numpy().T[seen] for w in weights], [x[:, seen] for x in inputs], 0.9)
    assert_close(found[:, seen], expected.T)
    average = (weights[0].double() + weights[1].double())[:, [2, 5]] / 2
    assert_close(found[:, [2, 5]], average.numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions_without_inputs_are_averaged_and_told(dtype: torch.dtype, tmp_path: Path) -> None:
    """Fewer tokens than inputs, and alpha 1: many weights are as good as one another."""
    merging = Merging(tmp_path)
    weights = [weight(9, 12, seed=n) for n in range(2)]
    inputs = [np.random.default_rng(n).standard_normal((4, 12)) for n in range(2)]
    for each, x in zip(weights, inputs, strict=True):
        merging.add({UP: each}, {UP: gram(x).to(dtype)})
    spec = mergecore.load_spec(merging.spec(parameters={"alpha": 1.0}))
    result = mergecore.merge(spec, tmp_path / "out", device="cpu")
    assert [text for text in result.warnings if f"{UP}: the inputs" in text and "8 of 12 directions" in text]
    found = load_tensors(tmp_path / "out")[UP].double().numpy().T
    average = sum(w.double().numpy().T for w in weights) / 2
    noise = 1e-4 if dtype is torch.float32 else 2.0**-22
    # As good as the best, and no further from the average than that needs.
    stacked = np.concatenate(inputs)
    wanted = np.concatenate([x @ w.double().numpy().T for x, w in zip(inputs, weights, strict=True)])
    scale = np.sqrt((stacked**2).sum(axis=0))
    moved, *_ = np.linalg.lstsq(stacked / scale, wanted - stacked @ average, rcond=None)
    np.testing.assert_allclose(stacked @ found, stacked @ (average + moved / scale[:, None]), atol=20 * noise)
    np.testing.assert_allclose(found, average + moved / scale[:, None], atol=20 * noise)


def test_everything_else_is_averaged(tmp_path: Path) -> None:
    """Embeddings, the head, norms, biases and what has no Gram matrix; a model that is merged with itself stays."""
    base = llama(layers=1, hidden=6, vocabulary=11) | {"model.layers.0.mlp.up_proj.bias": weight(12, seed=3)}
    merging = Merging(tmp_path)
    for n in range(2):
        merging.add(moved(base, 0.01, n), {UP: gram(inputs_of(n, 6))})
    found, average = merging.merge(), merging.merge("average", merge_method="linear")
    assert {name for name, tensor in found.items() if not torch.equal(tensor, average[name])} == {UP}


# In windows, and again


def test_any_memory_and_interruption_give_the_same_bytes(tmp_path: Path) -> None:
    merging, name = Merging(tmp_path), DOWN
    for n in range(2):
        tensors = {name: weight(12000, 300, seed=n, dtype=torch.bfloat16), UP: weight(300, 700, seed=9 + n)}
        random = np.random.default_rng(n).standard_normal((900, 700))
        merging.add(tensors, {name: gram(random[:, :300]).float(), UP: gram(random).float()})
    merging.merge()
    whole = tensor_bytes(tmp_path / "out")
    small = mergecore.load_spec(merging.spec(run={"memory": "56MiB", "threads": 1}))
    jobs = {job.name: job for job in mergecore.plan(small).jobs}
    assert jobs[name].window_rows < 12000
    assert jobs[name].window_rows % ((1 << 18) // 300) == 0
    seen: list[int] = []

    def stop() -> bool:
        seen.append(0)
        return len(seen) > 2

    with pytest.raises(Interrupted):
        mergecore.merge(small, tmp_path / "again", device="cpu", should_stop=stop)
    result = mergecore.merge(small, tmp_path / "again", device="cpu", resume=True)
    assert result.resumed
    assert tensor_bytes(tmp_path / "again") == whole


def test_plans_count_the_gram_matrices(tmp_path: Path) -> None:
    merging = Merging(tmp_path)
    for n in range(2):
        merging.add({UP: weight(300, 700, seed=n)}, {UP: gram(np.eye(700)).float()})
    planned = mergecore.plan(mergecore.load_spec(merging.spec()))
    (job,) = planned.jobs
    assert job.bytes_to_read == 2 * 4 * (300 * 700 + 700 * 700)
    assert planned.held_bytes > 8 * 4 * 700 * 700
    with pytest.raises(SpecError, match=rf"{UP} \[300, 700\] needs [45]\d\.\d MiB.*raise run.memory"):
        mergecore.plan(mergecore.load_spec(merging.spec(run={"memory": "16MiB"})))


# What is refused


@pytest.fixture
def two(tmp_path: Path) -> Merging:
    """Two models whose statistics fit."""
    merging = Merging(tmp_path)
    for n in range(2):
        merging.add({UP: weight(9, 6, seed=n), DOWN: weight(6, 9, seed=n)}, {UP: gram(inputs_of(n, 6))})
    return merging


def restated(merging: Merging, number: int, tensors: Mapping[str, Tensor]) -> None:
    """Other statistics for one model."""
    entry = merging.entries[number]
    folder = merging.folder / f"other-{number}"
    entry["statistics"] = str(write_statistics(folder, Path(entry["model"]), tensors))


def test_a_model_without_statistics_is_refused(two: Merging) -> None:
    del two.entries[1]["statistics"]
    with pytest.raises(SpecError, match=r"models\[1\]: regmean needs the statistics of .*model-1.*`mergecore stats`"):
        two.merge()


def test_a_base_must_be_listed_with_its_statistics(two: Merging) -> None:
    base = write_model(two.folder / "base", {UP: weight(9, 6, seed=7), DOWN: weight(6, 9, seed=7)}, LLAMA)
    with pytest.raises(SpecError, match="base_model: regmean takes the base as one of the models"):
        two.merge(base_model=str(base))


def test_statistics_that_are_missing_are_refused(two: Merging) -> None:
    two.entries[0]["statistics"] = str(two.folder / "nothing")
    with pytest.raises(CheckpointError, match=r"models\[0\].statistics: .*nothing"):
        two.merge()


def test_a_folder_of_other_things_is_refused(two: Merging) -> None:
    two.entries[0]["statistics"] = two.entries[0]["model"]
    with pytest.raises(CheckpointError, match=r"has no tensors gram\.\*; gather them with `mergecore stats --kind reg"):
        two.merge()
    restated(two, 0, {f"gram.{UP}": gram(inputs_of(0, 6))})
    manifest = two.folder / "other-0" / "mergecore_manifest.json"
    manifest.write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        two.merge()
    manifest.unlink()
    with pytest.raises(CheckpointError, match="expected a folder that `mergecore stats` made"):
        two.merge()


def test_statistics_of_another_model_are_refused(two: Merging) -> None:
    other = write_model(two.folder / "other", {UP: weight(9, 6, seed=0), DOWN: weight(7, 9, seed=0)}, LLAMA)
    two.entries[0]["statistics"] = str(
        write_statistics(two.folder / "strange", other, {f"gram.{UP}": gram(inputs_of(0, 6))})
    )
    with pytest.raises(
        CheckpointError, match=r"models\[0\].statistics: .*strange was gathered from .*other, whose fil"
    ):
        two.merge()


def test_a_model_of_another_date_is_warned_of(two: Merging) -> None:
    os.utime(Path(two.entries[0]["model"]) / "model.safetensors", (1, 1))
    planned = mergecore.plan(mergecore.load_spec(two.spec()))
    assert [text for text in planned.warnings if "statistics-0 was gathered when the files of" in text]


def test_a_matrix_that_only_some_have_is_refused(two: Merging) -> None:
    restated(two, 1, {f"gram.{name}": gram(inputs_of(0, width)) for name, width in ((UP, 6), (DOWN, 9))})
    with pytest.raises(CheckpointError, match=r"models\[0\].statistics: .*statistics-0 lacks gram.*down_proj"):
        two.merge()


@pytest.mark.parametrize(("matrix", "found"), [
    (gram(inputs_of(0, 9)), r"F64 \[9, 9\]"),
    (gram(inputs_of(0, 6))[:5], r"F64 \[5, 6\]"),
    (gram(inputs_of(0, 6)).bfloat16(), r"BF16 \[6, 6\]"),
])  # fmt: skip
def test_a_matrix_of_another_shape_or_dtype_is_refused(two: Merging, matrix: Tensor, found: str) -> None:
    restated(two, 1, {f"gram.{UP}": matrix})
    with pytest.raises(CheckpointError, match=rf"up_proj.weight is {found}, expected F32 or F64 \[6, 6\]"):
        two.merge()


def test_nan_in_statistics_is_told_with_its_file(two: Merging) -> None:
    broken = gram(inputs_of(1, 6))
    broken[2, 3] = float("nan")
    restated(two, 1, {f"gram.{UP}": broken})
    with pytest.raises(NonFiniteError, match=r"up_proj.weight holds NaN or Inf in .*other-1/model.safetensors \(1 ent"):
        two.merge()
    found = two.merge(on_nonfinite="warn")
    assert found[UP].isnan().all()
    assert found[DOWN].isfinite().all()


def test_a_matrix_that_is_no_gram_matrix_is_refused(two: Merging) -> None:
    restated(two, 1, {f"gram.{UP}": -10 * gram(inputs_of(0, 6))})
    with pytest.raises(
        MergecoreError, match=r"up_proj.weight: a Gram matrix of inputs has a negative number on its di"
    ):
        two.merge()


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_alpha_lies_between_0_and_1(two: Merging, alpha: float) -> None:
    with pytest.raises(SpecError, match="expected a number from 0 to 1"):
        two.merge(parameters={"alpha": alpha})


def test_nothing_is_dropped_in_front(two: Merging) -> None:
    sparsify = {"method": "dare", "drop_rate": 0.5}
    with pytest.raises(SpecError, match="sparsify: regmean has statistics of the models as they are"):
        two.merge(base_model=two.entries[0]["model"], sparsify=sparsify)


def test_statistics_are_looked_for_where_models_are(two: Merging) -> None:
    """The daemon confines both to its model folders."""
    asked = []

    def resolve(name: str, revision: str | None) -> Path:
        asked.append(name)
        if "statistics-1" in name:
            raise CheckpointError(f"{name} does not lie below a model folder of this server")
        return Path(name)

    with pytest.raises(CheckpointError, match=r"models\[1\].statistics: .*does not lie below"):
        mergecore.plan(mergecore.load_spec(two.spec()), resolve=resolve)
    assert set(asked) >= {entry["statistics"] for entry in two.entries}


def test_other_statistics_are_another_merge(two: Merging) -> None:
    before = mergecore.plan(mergecore.load_spec(two.spec())).identity()
    assert mergecore.plan(mergecore.load_spec(two.spec())).identity() == before
    file = Path(two.entries[0]["statistics"]) / "model.safetensors"
    os.utime(file, (1, 1))
    assert mergecore.plan(mergecore.load_spec(two.spec())).identity() != before
    two.merge()
    manifest = json.loads((two.folder / "out" / "mergecore_manifest.json").read_text())
    assert [Path(entry["path"]).name for entry in manifest["statistics"]] == ["statistics-0", "statistics-1"]
