"""Sweeps: each model is byte for byte the merge of its point, inputs and statistics are read once, all or nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mergecore
from mergecore import merging
from mergecore.cli import main
from mergecore.confined import OutputFolder
from mergecore.errors import Interrupted, NonFiniteError, OutputError, OutputExistsError, SpecError
from mergecore.methods import METHODS
from mergecore.methods.base import Method, Statistics
from mergecore.progress import Progress
from mergecore.spec import load_spec, parse_spec
from mergecore.spec.sweep import names_of
from mergecore.sweeping import plan_sweep
from tests.models import LLAMA, llama, load_tensors, moved, spec_dict, write_model, write_trio
from tests.service_support import ROOT
from tests.statistics import random_statistics
from tests.test_device_memory import CrowdedDevice
from tests.test_every_method import DATA_FREE, SHRINKS, changed, counts, given, model
from tests.vocabularies import words

ALIKE = {"mergecore_manifest.json"}
"""Files that tell times: they differ between any two merges."""


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ALIKE}


def listed(out: Path) -> list[dict[str, Any]]:
    """The points of a finished sweep."""
    points: list[dict[str, Any]] = json.loads((out / "mergecore_manifest.json").read_text())["points"]
    return points


def swept(spec: dict[str, Any], tmp_path: Path, **options: Any) -> mergecore.MergeResult:
    """Merges a sweep, and every point of it alone from the spec that its manifest holds: all files are the same."""
    result = mergecore.merge(load_spec(spec), tmp_path / "out", **options)
    points = listed(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md", "mergecore_manifest.json", *(point["name"] for point in points),
    }  # fmt: skip
    for number, point in enumerate(points):
        text = json.loads((tmp_path / "out" / point["name"] / "mergecore_manifest.json").read_text())["spec_text"]
        alone = tmp_path / f"alone-{number}"
        mergecore.merge(parse_spec(text), alone)
        assert parse_spec(text).sweep is None
        assert files(tmp_path / "out" / point["name"]) == files(alone), point["name"]
    return result


# ---- The models of a sweep are those of its points


def points_of(methods: Sequence[Method], lacks: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Two points of each method, which differ in a parameter where it has one that changes what is read or computed."""
    points = []
    for method in methods:
        first = {"merge_method": method.name, **{f"parameters.{k}": v for k, v in given(method).items()}}
        shrunk = {f"parameters.{k}": v for k, v in given(method, **SHRINKS).items() if k not in lacks}
        points += [first, {**first, **shrunk}] if {**first, **shrunk} != first else [first]
    return points


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_method_in_one_sweep(tmp_path: Path, count: int, dtype: torch.dtype) -> None:
    methods = [each for each in DATA_FREE if counts(each, count) == [count] and each.gathered is None]
    base = model(1, dtype)
    paths = [write_model(tmp_path / f"m{n}", changed(base, n, dtype), LLAMA) for n in range(count)]
    points = points_of(methods)
    assert len(points) > 10
    for part in (points[:60], points[60:]):
        if part:
            spec = spec_dict(methods[0].name, write_model(tmp_path / "base", base, LLAMA), *paths)
            swept({**spec, "sweep": {"points": part}, "run": {"device": "cpu"}}, tmp_path)
            for path in (*tmp_path.glob("alone-*"), tmp_path / "out"):
                shutil.rmtree(path)


@pytest.mark.parametrize(
    "method", [each for each in DATA_FREE if each.gathered is not None], ids=lambda each: each.name
)
def test_methods_that_take_statistics_from_files(method: Method, tmp_path: Path) -> None:
    assert method.gathered is not None
    entries = []
    for n in range(2):
        path = write_model(tmp_path / f"m{n}", changed(model(1, torch.float32), n, torch.float32), LLAMA)
        statistics = random_statistics(tmp_path / f"statistics-{n}", path, method.gathered)
        entries.append({"model": str(path), "statistics": str(statistics)})
    name = next(each.name for each in method.parameters if each.type is float)
    spec = {"merge_method": method.name, "models": entries, "sweep": {"parameters": {f"parameters.{name}": [0.3, 0.6]}}}
    swept(spec, tmp_path)


@pytest.mark.parametrize(
    ("method", "sparsify", "path"),
    [
        ("widen", {"method": "dare", "drop_rate": 0.5}, "sparsify.drop_rate"),
        ("widen", {"method": "della", "density": 0.5}, "parameters.s"),
        ("ties", {"method": "magnitude", "density": 0.5}, "sparsify.density"),
        ("model_stock", {"method": "breadcrumbs", "density": 0.5, "rescale": True}, "sparsify.density"),
        ("task_arithmetic", {"method": "dare", "drop_rate": 0.5}, "models.0.parameters.weight"),
    ],
)
@pytest.mark.parametrize("read", ["map", "pread"])
def test_what_is_dropped_in_front_of_a_method(
    tmp_path: Path, method: str, sparsify: dict[str, Any], path: str, read: str
) -> None:
    spec = spec_dict(method, *write_trio(tmp_path, llama()), sparsify=sparsify, seed=7)
    spec["sweep"] = {"merge_method": [method, "task_arithmetic"], "parameters": {path: [0.25, 0.5]}}
    if path == "parameters.s":
        spec["sweep"]["merge_method"] = [method]
    if method == "task_arithmetic":
        spec["sweep"]["merge_method"] = [method, "dare_ties"]
    swept({**spec, "run": {"device": "cpu", "read": read}}, tmp_path)


def test_points_that_ask_for_different_statistics_of_the_same_windows(tmp_path: Path) -> None:
    flat = {"merge_method": "nuslerp", "parameters.weight": 0.5, "parameters.nuslerp_flatten": False}
    points = [
        {"merge_method": "widen"},
        {"merge_method": "model_stock", "parameters.filter_wise": True},
        {**flat, "parameters.nuslerp_row_wise": True},
        flat,
        {"merge_method": "ram", "parameters.epsilon": 1e-5},
        {"merge_method": "ramplus_tl", "parameters.epsilon": 1e-5},
        {"merge_method": "ramplus_tl", "parameters.epsilon": 1e-3},
        {"merge_method": "metagpt"},
    ]
    spec = {**spec_dict("widen", *write_trio(tmp_path, llama())), "sweep": {"points": points}}
    planned = plan_sweep(load_spec(spec))
    matrix = next(batch for batch in planned.batches if batch.form.statistics is Statistics.COLUMNS)
    assert matrix.reads_of_matrix == 3  # columns, Gram matrices of rows (two points) and of columns
    swept(spec, tmp_path)


def test_windows_get_smaller_where_memory_is_short_and_no_byte_changes(tmp_path: Path) -> None:
    spec = spec_dict("widen", *write_trio(tmp_path, llama(hidden=256, vocabulary=4000, layers=1)))
    spec["sweep"] = {"parameters": {"parameters.s": [0.1 * n for n in range(8)]}}
    wide, narrow = (plan_sweep(load_spec({**spec, "run": {"memory": memory}})) for memory in ("1GiB", "16MiB"))
    assert narrow.held_bytes <= 16 << 20 < wide.held_bytes
    assert narrow.batches[0].form.window_rows < wide.batches[0].form.window_rows
    swept({**spec, "run": {"memory": "16MiB"}}, tmp_path)


def test_adapters_and_vocabularies_are_shared_like_stored_tensors(tmp_path: Path) -> None:
    for number, (name, tokens) in enumerate({"base": "abcdef", "near": "abcdefgh", "far": "fedcba"}.items()):
        config = {**LLAMA, "vocab_size": len(tokens)}
        folder = write_model(tmp_path / name, moved(llama(vocabulary=len(tokens)), 3e-4, number), config)
        words(*tokens).save(str(folder / "tokenizer.json"))
    weight = "model.layers.0.self_attn.q_proj"
    hidden = load_tensors(tmp_path / "near")[f"{weight}.weight"].shape[0]
    (tmp_path / "lora").mkdir()
    factors = {f"base_model.model.{weight}.lora_A.weight": torch.full((2, hidden), 0.01),
               f"base_model.model.{weight}.lora_B.weight": torch.full((hidden, 2), 0.02)}  # fmt: skip
    save_file(factors, tmp_path / "lora" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    spec = spec_dict("ties", tmp_path / "base", tmp_path / "near", tmp_path / "far", tokenizer_source="union")
    spec["models"][0]["model"] += f"+{tmp_path / 'lora'}"
    spec["parameters"] = {"density": 0.5}
    spec["sweep"] = {"parameters": {"parameters.lambda": [0.3, 0.7, 1.0]}}
    sweep = swept(spec, tmp_path)
    del spec["sweep"]
    assert mergecore.plan(load_spec(spec)).vocabulary is not None
    assert sweep.bytes_read == mergecore.merge(load_spec(spec), tmp_path / "one").bytes_read


def test_merges_that_come_before_are_made_once(tmp_path: Path) -> None:
    base, near, far = write_trio(tmp_path, llama())
    first = {"name": "mean", **spec_dict("linear", None, near, far), "parameters": {"weight": 0.5}}
    last = spec_dict("task_arithmetic", base, near)
    last["models"].append({"model": "mean"})
    last["sweep"] = {"parameters": {"parameters.lambda": [0.5, 1.0]}}
    (tmp_path / "spec.yaml").write_text(f"{json.dumps(first)}\n---\n{json.dumps(last)}\n")
    shown: list[Progress] = []
    result = mergecore.merge(tmp_path / "spec.yaml", tmp_path / "out", progress=shown.append)
    assert result.tensors == shown[-1].tensors_done == shown[-1].tensors_total == 3 * len(load_tensors(base))
    assert shown[-1].bytes_read == shown[-1].bytes_read_total
    del last["sweep"]
    for value in ("0.5", "1.0"):
        plain = f"{json.dumps(first)}\n---\n{json.dumps({**last, 'parameters': {'lambda': float(value)}})}\n"
        mergecore.merge(parse_spec(plain, path=tmp_path / "plain.yaml"), tmp_path / value)
        ours, alone = files(tmp_path / "out" / f"lambda-{value}"), files(tmp_path / value)
        assert {name for name in ours if ours[name] != alone[name]} <= {"README.md"}
    assert not list(tmp_path.glob(".*"))


# ---- What is shared


@pytest.mark.parametrize(
    ("method", "keys", "sweep"),
    [
        ("widen", {}, {"parameters": {"parameters.s": [0.25, 0.5, 1.0]}}),
        ("widen", {}, {"parameters": {"parameters.s": [0.5, 1.0]}, "points": [{"merge_method": "task_arithmetic"}]}),
        ("model_stock", {}, {"points": [{"merge_method": "model_stock"}, {"merge_method": "task_arithmetic"}]}),
        ("ties", {"parameters": {"density": 0.4}}, {"parameters": {"parameters.lambda": [0.5, 1.0]}}),
        (
            "ties",
            {"parameters": {"density": 0.4, "scope": "model"}},
            {"parameters": {"models.0.parameters.weight": [0.5, 1.0]}},
        ),
        ("metagpt", {}, {"points": [{"merge_method": "metagpt"}, {"merge_method": "dare_linear"}]}),
        (
            "task_arithmetic",
            {"sparsify": {"method": "magnitude", "density": 0.5, "rescale": True}},
            {"parameters": {"parameters.lambda": [0.5, 1.0]}},
        ),
    ],
)
def test_a_sweep_reads_as_much_as_its_most_demanding_point(
    tmp_path: Path, method: str, keys: dict[str, Any], sweep: dict[str, Any]
) -> None:
    spec = spec_dict(method, *write_trio(tmp_path, llama()), **keys)
    shown: list[Progress] = []
    mergecore.merge(load_spec(spec), tmp_path / "one")
    one = json.loads((tmp_path / "one" / "mergecore_manifest.json").read_text())["result"]
    result = swept({**spec, "sweep": sweep}, tmp_path, progress=shown.append)
    assert result.bytes_read == one["bytes_read"]
    assert (shown[-1].bytes_read, shown[-1].bytes_written) == (
        shown[-1].bytes_read_total,
        shown[-1].bytes_written_total,
    )
    assert shown[-1].tensors_done == shown[-1].tensors_total == result.tensors


def test_points_of_other_inputs_read_by_themselves_and_the_plan_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = spec_dict("task_arithmetic", *write_trio(tmp_path, llama()))
    spec["sweep"] = {"points": [{"merge_method": name} for name in ("task_arithmetic", "widen", "karcher", "ties")]}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    assert main(["plan", str(tmp_path / "spec.json"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [set(group) for group in told["groups"]] == [{"task_arithmetic", "widen", "ties"}, {"karcher"}]
    assert main(["plan", str(tmp_path / "spec.json")]) == 0
    text = capsys.readouterr().out
    assert "together  task_arithmetic, widen, ties\ntogether  karcher\n" in text
    result = mergecore.merge(load_spec(spec), tmp_path / "out")
    assert result.bytes_read == told["bytes_read"] < told["bytes_read_alone"]
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*/*.safetensors"))
    assert told["bytes_written"] == written == sum(point["bytes_written"] for point in told["points"])


def test_the_folder_says_what_its_models_are_and_verify_checks_all_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = spec_dict("task_arithmetic", *write_trio(tmp_path, llama()))
    spec["sweep"] = {
        "parameters": {"parameters.lambda": [0.5, 1]},
        "points": [{"merge_method": "ties", "parameters.density": 0.2}],
    }
    mergecore.merge(load_spec(spec), tmp_path / "out")
    assert [(point["name"], point["method"], point["values"]) for point in listed(tmp_path / "out")] == [
        ("lambda-0.5", "task_arithmetic", {"parameters.lambda": 0.5}),
        ("lambda-1", "task_arithmetic", {"parameters.lambda": 1}),
        ("ties_density-0.2", "ties", {"merge_method": "ties", "parameters.density": 0.2}),
    ]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| lambda-0.5 | task_arithmetic | 0.5 |  |\n" in card
    assert "| ties_density-0.2 | ties |  | 0.2 |\n" in card
    assert main(["verify", str(tmp_path / "out")]) == 0
    with (tmp_path / "out" / "lambda-1" / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert main(["verify", str(tmp_path / "out")]) == 1
    assert "lambda-1: model.safetensors: the bytes of tensor" in capsys.readouterr().err


# ---- All or nothing, resumed

KILLED = """
import os, signal, sys
from mergecore import cli, engine
from mergecore.output import lanes, staging, writer
lanes.CHECKPOINT_SECONDS = 0
owner, name, left = sys.argv[1].split(":")
owner, left = {"merge": engine.Merge, "writer": writer.OutputWriter, "staging": staging.Staging}[owner], int(left)
original = getattr(owner, name)
def counted(*arguments, **named):
    global left
    result = original(*arguments, **named)
    if name == "finish":
        arguments[0].sync()
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(owner, name, counted)
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sweep of four points and its result `out`."""
    folder = tmp_path_factory.mktemp("four")
    spec = spec_dict("task_arithmetic", *write_trio(folder, llama()))
    points = [{"merge_method": "widen"}, {"merge_method": "ties", "parameters.density": 0.3}]
    spec["sweep"] = {"parameters": {"parameters.lambda": [0.5, 1.0]}, "points": points}
    (folder / "spec.json").write_text(json.dumps({**spec, "run": {"device": "cpu", "threads": 1}}))
    mergecore.merge(folder / "spec.json", folder / "out")
    return folder


def assert_as(four: Path, out: Path) -> None:
    for point in listed(four / "out"):
        assert files(out / point["name"]) == files(four / "out" / point["name"])
    assert {path.name for path in out.iterdir()} == {path.name for path in (four / "out").iterdir()}


@pytest.mark.parametrize(
    "point",
    [
        "merge:count:1",
        "merge:count:60",
        "writer:finish:30",
        "writer:publish:1",
        "writer:publish:4",
        "staging:publish:2",
    ],
)
def test_a_sweep_that_is_killed_goes_on_where_it_was(four: Path, tmp_path: Path, point: str) -> None:
    command = [sys.executable, "-c", KILLED, point, "merge", str(four / "spec.json"), str(tmp_path / "out")]
    assert subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == [".out.partial"]
    shown: list[Progress] = []
    result = mergecore.merge(four / "spec.json", tmp_path / "out", resume=True, progress=shown.append)
    assert result.resumed
    assert os.listdir(tmp_path) == ["out"]
    assert_as(four, tmp_path / "out")
    if point == "writer:finish:30":
        assert shown[0].tensors_done >= 30
        assert 0 < result.bytes_read < shown[0].bytes_read_total
    if "publish" in point:
        assert result.bytes_read == 0


def test_an_interrupted_sweep_keeps_what_is_finished_unless_something_has_changed(four: Path, tmp_path: Path) -> None:
    spec = json.loads((four / "spec.json").read_text())
    seen = 0

    def stop() -> bool:
        nonlocal seen
        seen += 1
        return seen > 40

    with pytest.raises(Interrupted):
        mergecore.merge(load_spec(spec), tmp_path / "out", should_stop=stop)
    assert os.listdir(tmp_path) == [".out.partial"]
    spec["sweep"]["parameters"]["parameters.lambda"] = [0.5]
    result = mergecore.merge(load_spec(spec), tmp_path / "out", resume=True)
    assert not result.resumed
    assert [point["name"] for point in listed(tmp_path / "out")] == ["lambda-0.5", "widen", "ties_density-0.3"]
    assert os.listdir(tmp_path) == ["out"]


def test_nothing_stays_of_a_sweep_that_fails(tmp_path: Path) -> None:
    base = llama()
    near = moved(base, 3e-4, 2)
    near["model.norm.weight"][0] = float("nan")
    spec = spec_dict(
        "task_arithmetic",
        write_model(tmp_path / "m" / "base", base, LLAMA),
        write_model(tmp_path / "m" / "near", near, LLAMA),
    )
    spec["sweep"] = {"parameters": {"parameters.lambda": [0.5, 1.0]}}
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight holds NaN or Inf in .*near"):
        mergecore.merge(load_spec(spec), tmp_path / "out")
    assert os.listdir(tmp_path) == ["m"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(OutputExistsError):
        mergecore.merge(load_spec({**spec, "on_nonfinite": "warn"}), tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["mine"]
    assert sorted(os.listdir(tmp_path)) == ["m", "out"]


def test_a_disk_without_room_for_all_models_is_told_before_anything_is_written(
    four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(point["bytes"] for point in listed(four / "out"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    opened: list[str] = []
    original = OutputFolder.open

    def watched(folder: OutputFolder, name: str, *rest: Any) -> int:
        opened.append(name)
        return original(folder, name, *rest)

    monkeypatch.setattr(OutputFolder, "open", watched)
    with pytest.raises(OutputError, match=f"models of this sweep need {needed:,} bytes together"):
        mergecore.merge(four / "spec.json", tmp_path / "out")
    assert not any(name.endswith(".safetensors") for name in opened)
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    mergecore.merge(four / "spec.json", tmp_path / "out")


@pytest.mark.parametrize("busy", [1, 4, 9])
def test_a_device_with_too_little_memory_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, busy: int
) -> None:
    """Also where windows of a tensor are written already."""
    spec = spec_dict("task_arithmetic", *write_trio(tmp_path, llama(layers=1, hidden=128, vocabulary=30_000)))
    spec["sweep"] = {"parameters": {"parameters.lambda": [0.5, 1.0]}, "points": [{"merge_method": "widen"}]}
    spec["run"] = {"memory": "16MiB"}
    mergecore.merge(load_spec(spec), tmp_path / "expected")
    device = CrowdedDevice(1 << 40, busy=range(busy, busy + 1))
    monkeypatch.setattr(merging, "open_devices", lambda name, memory: [device])
    result = mergecore.merge(load_spec(spec), tmp_path / "out")
    assert device.failures == 1
    assert any("ran out of memory" in warning for warning in result.warnings)
    for point in listed(tmp_path / "out"):
        assert files(tmp_path / "out" / point["name"]) == files(tmp_path / "expected" / point["name"])


# ---- What is wrong, and names


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"parameters": {}}, r"sweep.parameters: found an empty mapping, expected at least one parameter"),
        ({}, "sweep: expected merge_method, parameters or points, found none"),
        ({"parameters": {"parameters.lambda": 1.0}}, r"found 1\.0, expected a list of values"),
        ({"parameters": {"parameters.lambda": [1.0, 1.0]}}, "a value is listed twice"),
        ({"parameters": {"parameters.lambda": [float("inf")]}}, "expected a list of values"),
        ({"merge_method": [3]}, "expected a list of methods"),
        ({"parameters": {"parameters.lambda": [0.1 * n for n in range(65)]}}, "found 65 points, expected at most 64"),
        ({"parameters": {"lambda": [1.0]}}, r"sweep\.parameters\.lambda: not the place of a method parameter"),
        ({"parameters": {"models.7.parameters.weight": [1.0]}}, "expected a number from 0 to 1"),
        ({"points": [{"models.7.parameters.weight": 1.0}]}, r"sweep\.points: models\.7.*expected a number from 0 to 1"),
        ({"points": [{}]}, "expected a mapping of places to values"),
        ({"points": [{"parameters.lambda": 0.5}, {"parameters.lambda": 0.5}]}, "is there twice"),
        ({"parameters": {"parameters.lambda": [0.5]}, "points": [{"parameters.lambda": 0.5}]}, "is there twice"),
        ({"merge_method": ["task_arithmetic", "tise"]}, r"unknown method 'tise'.*point tise of the sweep"),
        ({"merge_method": ["task_arithmetic", "widen"], "parameters": {"parameters.lambda": [1.0]}},
         r"widen has no such parameter.*point widen_lambda-1\.0 of the sweep"),
        ({"parameters": {"parameters.lambda": [1.0, "much"]}}, r"found 'much', expected a number.*point lambda-much"),
        ({"merge_method": ["slta"]}, "point slta of the sweep"),
        ({"points": [{"merge_method": "dam"}]}, "point dam of the sweep"),
        ({"lambda": [1.0]}, "sweep.lambda: unknown key"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_before_anything_is_read(tmp_path: Path, sweep: dict[str, Any], message: str) -> None:
    spec = spec_dict("task_arithmetic", *write_trio(tmp_path, llama()))
    with pytest.raises(SpecError, match=message):
        mergecore.merge(load_spec({**spec, "sweep": sweep}), tmp_path / "out")
    assert not list(tmp_path.glob(".*"))
    assert not (tmp_path / "out").exists()


def test_methods_that_are_fitted_on_samples_are_merged_alone(tmp_path: Path) -> None:
    spec = spec_dict("task_arithmetic", *write_trio(tmp_path, llama()))
    (tmp_path / "text").write_text("a\n")
    for entry in spec["models"]:
        entry["data"] = str(tmp_path / "text")
    fitted = [each.name for each in METHODS.values() if each.statistics is Statistics.FITTED]
    for name in fitted:
        with pytest.raises(SpecError, match=f"{name} is fitted on samples.*merge it in a spec of its own"):
            plan_sweep(load_spec({**spec, "sweep": {"merge_method": [name]}}))


def test_a_sweep_is_no_search_and_stands_last(tmp_path: Path) -> None:
    spec = spec_dict("task_arithmetic", *write_trio(tmp_path, llama()))
    sweep = {"parameters": {"parameters.lambda": [0.5, 1.0]}}
    search = {"parameters": {"parameters.lambda": [0.0, 1.0]}, "score": {"command": "x {model}"}, "generations": 1}
    with pytest.raises(SpecError, match="expected one of evolve and sweep, found both"):
        load_spec({**spec, "sweep": sweep, "evolve": search})
    text = f"{json.dumps({**spec, 'name': 'first', 'sweep': sweep})}\n---\n" + json.dumps(
        spec_dict("linear", None, Path("first"), parameters={"weight": 1.0})
    )
    with pytest.raises(SpecError, match="only the last merge of a file can be a sweep"):
        mergecore.plan(parse_spec(text))


def test_names_are_short_readable_stable_and_unique() -> None:
    grid: list[dict[str, Any]] = [
        {"merge_method": "ties", "parameters.density": 0.2},
        {"parameters.density": 0.2},
        {"parameters.normalize": True},
    ]
    assert names_of(grid) == ["ties_density-0.2", "density-0.2", "normalize-true"]
    assert names_of(grid[::-1]) == names_of(grid)[::-1]
    weights = [{"models.0.parameters.weight": 1, "models.1.parameters.weight": 0.5, "parameters.lambda": -1}]
    assert names_of(weights) == ["models.0.weight-1_models.1.weight-0.5_lambda--1"]
    odd = names_of([{"parameters.a": "x/../y"}, {"parameters.a": "x ..:y"}, {"parameters.a": "long" * 100}])
    assert len(set(odd)) == 3
    assert all(len(name) <= 100 and "/" not in name and not name.startswith(".") for name in odd)
    assert len(set(names_of([{"parameters.a": "One"}, {"parameters.a": "one"}]))) == 2
