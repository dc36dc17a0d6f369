"""An error of inputs, output, settings, disk or caller is told, and leaves nothing behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

import mergecore
from mergecore import Progress, load_spec, merge, merging
from mergecore.device import CpuDevice
from mergecore.errors import InputFault, NonFiniteError, OutputExistsError, SpecError
from tests.merges import (
    METHODS,
    LateDevice,
    computing_on,
    cut_anywhere,
    results_of,
    run_python,
    spec_of,
    write_worn_trio,
)
from tests.models import LLAMA, llama, load_tensors, tensor_bytes, write_model, write_trio


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_worn_trio(tmp_path_factory.mktemp("trio"))


@pytest.fixture(scope="module")
def expected(trio: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return results_of(trio, tmp_path_factory.mktemp("expected"))


def poisoned(trio: list[Path], folder: Path, number: int, name: str, *values: float) -> list[Path]:
    """The trio with these values at the end of one tensor of one model."""
    tensors = load_tensors(trio[number])
    tensors[name].view(-1)[-len(values) :] = torch.tensor(values)
    models = list(trio)
    models[number] = write_model(folder / trio[number].name, tensors, LLAMA)
    return models


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("device", [CpuDevice, LateDevice])
@pytest.mark.parametrize("method", ["widen", "widen after dare", "linear after dare"])
@pytest.mark.parametrize(("number", "value"), [(0, float("inf")), (2, float("nan"))], ids=["Inf in base", "NaN in far"])
def test_nan_and_inf_are_told_with_tensor_file_and_number(
    trio: list[Path], tmp_path: Path, name: str, method: str, number: int, value: float, device: type[CpuDevice]
) -> None:
    models = poisoned(trio, tmp_path / "models", number, name, *[value] * 5)
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    with computing_on(device()), pytest.raises(NonFiniteError) as caught:
        merge(load_spec(spec_of(models, **METHODS[method])), outputs / "out")
    message = str(caught.value)
    assert message.startswith(f"{name} holds NaN or Inf in {models[number]}/model.safetensors (5 entries); ")
    assert "on_nonfinite: warn" in message
    assert os.listdir(outputs) == []


@pytest.mark.parametrize("method", METHODS)
def test_nan_and_inf_go_through_if_asked_to(
    trio: list[Path], expected: dict[str, Any], tmp_path: Path, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    models = poisoned(trio, tmp_path / "models", 2, name, float("nan"), float("inf"), float("-inf"))
    spec = spec_of(models, **METHODS[method], on_nonfinite="warn")
    result = merge(load_spec(spec), tmp_path / "out")
    (warning,) = [warning for warning in result.warnings if "NaN" in warning]
    assert warning == f"{name} holds NaN or Inf in {models[2]}/model.safetensors (3 entries)"
    assert warning in caplog.text
    assert json.loads((tmp_path / "out" / "mergecore_manifest.json").read_text())["result"]["warnings"][-1] == warning
    found = tensor_bytes(tmp_path / "out")
    assert not torch.isfinite(load_tensors(tmp_path / "out")[name].view(-1)[-3:]).any()
    if any(job.scope == "model" for job in mergecore.plan(load_spec(spec)).jobs):
        return  # what is compared over the whole model changes everywhere
    assert {key: value for key, value in found.items() if key != name} == {
        key: value for key, value in expected[method].items() if key != name
    }


@pytest.mark.parametrize("device", [CpuDevice, LateDevice])
def test_results_beyond_the_output_dtype_are_an_error(tmp_path: Path, device: type[CpuDevice]) -> None:
    base = {"a.weight": torch.full((4, 4), 6e4)}
    models = [
        write_model(tmp_path / "base", base),
        write_model(tmp_path / "near", {"a.weight": torch.full((4, 4), 6.2e4)}),
    ]
    spec = spec_of(models, merge_method="task_arithmetic", parameters={"weight": 4.0}, dtype="float16")
    (tmp_path / "outputs").mkdir()
    with (
        computing_on(device()),
        pytest.raises(NonFiniteError, match=r"a.weight: 16 results overflow float16; set out_"),
    ):
        merge(load_spec(spec), tmp_path / "outputs" / "out")
    assert os.listdir(tmp_path / "outputs") == []
    with computing_on(device()):
        result = merge(load_spec({**spec, "on_nonfinite": "warn"}), tmp_path / "outputs" / "out")
    assert result.warnings == ("a.weight: 16 results overflow float16",)
    assert torch.isinf(load_tensors(tmp_path / "outputs" / "out")["a.weight"]).all()


def during(action: Callable[[], object], window: int) -> Callable[[Progress], None]:
    """A progress callback that does something after the window of this number."""
    left = window

    def call(progress: Progress) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            action()

    return call


@pytest.mark.parametrize("read", ["map", "pread"])
@pytest.mark.parametrize("window", [1, 5, 20])
def test_an_input_truncated_while_it_is_read_is_told_and_nothing_is_published(
    tmp_path: Path, read: str, window: int
) -> None:
    trio = write_trio(tmp_path / "models", llama())
    file = trio[2] / "model.safetensors"
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    with pytest.raises(InputFault) as caught, cut_anywhere(Random(1)):
        merge(
            load_spec(spec_of(trio, run={"read": read})),
            outputs / "out",
            progress=during(lambda: os.truncate(file, 4096), window),
        )
    assert str(file) in str(caught.value)
    assert os.listdir(outputs) == []


@pytest.mark.parametrize("read", ["map", "pread"])
@pytest.mark.parametrize("what", ["truncated", "removed", "replaced", "rewritten"])
def test_an_input_that_changes_before_or_while_it_is_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: str, what: str
) -> None:
    """Whatever happens to the second file of a model between planning and the end."""
    trio = write_trio(tmp_path / "models", llama(), shards=2)
    file = trio[2] / "model-00002-of-00002.safetensors"
    content = file.read_bytes()

    def change() -> None:
        if what == "truncated":
            os.truncate(file, 100)
        elif what == "rewritten":
            file.write_bytes(content[:-8] + bytes(8))
        else:
            file.unlink()
            if what == "replaced":
                file.write_bytes(content)

    outputs = tmp_path / "outputs"
    outputs.mkdir()
    spec = load_spec(spec_of(trio, run={"read": read}))
    planned = mergecore.plan(spec)
    change()
    monkeypatch.setattr(merging, "plan", lambda *_, **__: planned)
    with pytest.raises(InputFault) as caught:
        merge(spec, outputs / "out")
    assert file.name in str(caught.value)
    assert os.listdir(outputs) == []


def test_an_error_of_the_caller_leaves_nothing(trio: list[Path], tmp_path: Path) -> None:
    def fail(progress: Progress) -> None:
        raise RuntimeError("the caller's own")

    with pytest.raises(RuntimeError, match="the caller's own"):
        merge(load_spec(spec_of(trio)), tmp_path / "new folder" / "out", progress=fail)
    assert os.listdir(tmp_path) == []


def test_an_output_that_exists_is_not_touched(trio: list[Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(OutputExistsError, match="exists already") as caught:
        merge(load_spec(spec_of(trio)), tmp_path / "out")
    assert caught.value.exit_code == 2
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["precious"]


def test_an_input_is_no_output(tmp_path: Path) -> None:
    trio = write_trio(tmp_path, llama())
    before = tensor_bytes(trio[1])
    with pytest.raises(OutputExistsError):
        merge(load_spec(spec_of(trio)), trio[1])
    assert tensor_bytes(trio[1]) == before


def test_settings_that_make_no_sense_are_refused_before_anything_is_written(trio: list[Path], tmp_path: Path) -> None:
    for settings_ in ({"memory": 1000}, {"threads": -1}, {"device": "gpu"}):
        with pytest.raises(SpecError):
            merge(load_spec(spec_of(trio)), tmp_path / "out", **settings_)
    assert os.listdir(tmp_path) == []


FULL_DISK = """
import resource, sys
from mergecore import load_spec, merge
from mergecore.errors import OutputError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    merge(sys.argv[1], sys.argv[2])
except OutputError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("limit", [5_000, 90_000])
def test_a_full_disk_is_told_and_nothing_stays(trio: list[Path], tmp_path: Path, limit: int) -> None:
    """5 kB: the weights do not fit; 90 kB: they do, but not the other files."""
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(spec_of(write_trio(tmp_path / "models", {"a.weight": torch.zeros(100, 200)}))))
    (tmp_path / "models" / "base" / "tokenizer.json").write_bytes(b" " * 100_000)
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    ended = run_python(FULL_DISK, spec, outputs / "out", limit)
    assert ended.returncode == 1, ended.stderr
    assert str(outputs / ".out.partial") in ended.stdout
    assert ended.stderr == ""
    assert os.listdir(outputs) == []
