"""The values that merges give, and what their inputs may be."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

import mergecore
from mergecore import Progress, load_spec, merge
from mergecore.device import CpuDevice
from tests.merges import (
    METHODS,
    KeepingDevice,
    LateDevice,
    computing_on,
    cut_anywhere,
    merged,
    spec_of,
    write_worn_trio,
)
from tests.models import LLAMA, llama, load_tensors, moved, spec_dict, tensor_bytes, write_model, write_trio


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_worn_trio(tmp_path_factory.mktemp("trio"))


# ---- The values


def test_an_average_is_the_average(tmp_path: Path) -> None:
    models = write_trio(tmp_path, llama())[1:]
    merge(load_spec(spec_dict("linear", None, *models)), tmp_path / "out")
    first, second = map(load_tensors, models)
    for name, tensor in load_tensors(tmp_path / "out").items():
        assert torch.equal(tensor, ((first[name].double() + second[name].double()) / 2).bfloat16()), name


def test_task_arithmetic_adds_the_weighted_deltas(tmp_path: Path) -> None:
    trio = write_trio(tmp_path, llama())
    spec = spec_dict(
        "task_arithmetic", trio[0], (trio[1], {"weight": 0.5}), (trio[2], {"weight": -0.25}), dtype="float32"
    )
    merge(load_spec(spec), tmp_path / "out")
    base, near, far = map(load_tensors, trio)
    for name, tensor in load_tensors(tmp_path / "out").items():
        b, n, f = (tensors[name].double() for tensors in (base, near, far))
        assert torch.equal(tensor, (b + 0.5 * (n - b) - 0.25 * (f - b)).float()), name


def test_gradients_and_filters_reach_the_tensors(tmp_path: Path) -> None:
    trio = write_trio(tmp_path, llama(layers=3))
    weight = [{"filter": "norm", "value": 0.0}, {"value": [0.0, 1.0]}]
    merge(load_spec(spec_dict("task_arithmetic", *trio[:2], parameters={"weight": weight})), tmp_path / "out")
    base, near = map(load_tensors, trio[:2])
    result = load_tensors(tmp_path / "out")
    for name in ("model.layers.0.mlp.up_proj.weight", "lm_head.weight", "model.layers.2.input_layernorm.weight"):
        assert torch.equal(result[name], base[name]), name
    name = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(result[name], near[name])
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(result[name], ((base[name].double() + near[name].double()) / 2).bfloat16())


def test_widen_without_calibration_limits_is_task_arithmetic(trio: list[Path], tmp_path: Path) -> None:
    widen = merged(spec_of(trio, parameters={"t": -1.0, "s": 0.3}), tmp_path / "widen")
    arithmetic = spec_of(trio, merge_method="task_arithmetic", parameters={"lambda": 0.3})
    assert merged(arithmetic, tmp_path / "arithmetic") == widen


def test_models_that_equal_the_base_change_nothing(trio: list[Path], tmp_path: Path) -> None:
    copies = [shutil.copytree(trio[0], tmp_path / name) for name in ("a", "b")]
    for method, keys in METHODS.items():
        out = tmp_path / f"out {method}"
        assert merged(spec_of([trio[0], *copies], **keys), out) == tensor_bytes(trio[0])


def test_fused_experts_are_merged_one_by_one(tmp_path: Path) -> None:
    """A stack of matrices gives what its matrices give apart."""
    random = torch.Generator().manual_seed(5)
    base = {"mlp.experts.gate_up_proj": torch.randn(4, 70, 40, generator=random).bfloat16()}
    fused = [base, moved(base, 3e-4, 2), moved(base, 4e-3, 3)]
    apart = [
        {f"mlp.experts.{i}.weight": matrix for i, matrix in enumerate(model["mlp.experts.gate_up_proj"])}
        for model in fused
    ]

    def result(models: list[dict[str, Tensor]], folder: Path) -> dict[str, Tensor]:
        paths = [write_model(folder / str(i), model) for i, model in enumerate(models)]
        merge(load_spec(spec_of(paths)), folder / "out")
        return load_tensors(folder / "out")

    stack = result(fused, tmp_path / "fused")["mlp.experts.gate_up_proj"]
    for name, matrix in result(apart, tmp_path / "apart").items():
        assert torch.equal(stack[int(name.split(".")[2])], matrix)


def test_gpt2_s_transposed_layers_merge_like_the_layers_themselves(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(5)
    base = {"h.0.mlp.c_fc.weight": torch.randn(70, 40, generator=random)}
    models = [base, moved(base, 3e-4, 2), moved(base, 4e-3, 3)]

    def result(transposed: bool) -> Tensor:
        folder = tmp_path / str(transposed)
        paths = [
            write_model(
                folder / str(i),
                {name: tensor.T if transposed else tensor for name, tensor in model.items()},
                {"model_type": "gpt2" if transposed else "llama"},
            )
            for i, model in enumerate(models)
        ]
        merge(load_spec(spec_of(paths)), folder / "out")
        (tensor,) = load_tensors(folder / "out").values()
        return tensor

    assert torch.equal(result(transposed=True).T, result(transposed=False))


def test_the_spec_can_say_how_a_tensor_is_scored(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(5)
    base = torch.randn(70, 40, generator=random).bfloat16()

    def result(name: str, **keys: Any) -> Tensor:
        folder = tmp_path / f"{name}{bool(keys)}"
        merge(load_spec(spec_of(write_trio(folder, {name: base}), **keys)), folder / "out")
        return load_tensors(folder / "out")[name]

    table = result("embed_tokens.weight")
    assert torch.equal(result("up_proj.weight", orientation={"*.weight": "rows"}), table)
    assert not torch.equal(result("up_proj.weight"), table)


# ---- Inputs of all kinds


def test_dtypes_may_differ_between_models_and_the_output_has_the_one_asked_for(tmp_path: Path) -> None:
    base = llama()
    models = [
        write_model(tmp_path / str(i), {name: tensor.to(dtype) for name, tensor in moved(base, 1e-3, i).items()}, LLAMA)
        for i, dtype in enumerate((torch.float16, torch.bfloat16, torch.float32))
    ]
    loaded = [load_tensors(path) for path in models]
    for keys, dtype in [
        ({}, torch.float16),  # the first model's
        ({"dtype": "float32"}, torch.float32),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "bfloat16", "out_dtype": "float32"}, torch.float32),
    ]:
        out = tmp_path / f"out{len(keys)}{dtype}"
        merge(load_spec(spec_dict("linear", None, *models, **keys)), out)
        for name, tensor in load_tensors(out).items():
            mean = sum((tensors[name].double() for tensors in loaded[1:]), loaded[0][name].double()) / 3
            assert tensor.dtype == dtype
            # One rounding: never further from the exact value than half a unit in the last place.
            unit = torch.finfo(dtype).eps * mean.abs() + torch.finfo(dtype).smallest_normal
            assert ((tensor.double() - mean).abs() <= unit / 2 * (1 + 1e-9)).all(), name


def test_a_bias_that_the_base_lacks_counts_as_zeros(tmp_path: Path) -> None:
    bias = "model.layers.0.self_attn.q_proj.bias"
    base = llama(layers=1)
    value = torch.arange(48).float().bfloat16() / 64
    models = [
        write_model(tmp_path / "base", base),
        write_model(tmp_path / "near", base | {bias: value}),
        write_model(tmp_path / "far", base),
    ]
    merge(load_spec(spec_of(models, merge_method="task_arithmetic", parameters={"weight": 0.5})), tmp_path / "out")
    assert torch.equal(load_tensors(tmp_path / "out")[bias], value / 2)
    merge(load_spec(spec_of(models)), tmp_path / "widen")
    assert bool(torch.isfinite(load_tensors(tmp_path / "widen")[bias]).all())


def test_a_tied_head_joins_an_untied_one_as_the_embedding(tmp_path: Path) -> None:
    base = llama(layers=1, tied=True)
    head = llama(layers=1)["lm_head.weight"]
    models = [
        write_model(tmp_path / "base", base, {**LLAMA, "tie_word_embeddings": True}),
        write_model(tmp_path / "near", moved(base, 1e-3, 2) | {"lm_head.weight": head}, LLAMA),
    ]
    merge(load_spec(spec_of(models, merge_method="task_arithmetic", parameters={"weight": 0.5})), tmp_path / "out")
    result = load_tensors(tmp_path / "out")
    embedding = base["model.embed_tokens.weight"].double()
    assert torch.equal(result["lm_head.weight"], ((embedding + head.double()) / 2).bfloat16())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_tensors_at_odd_offsets_are_read_as_they_are(tmp_path: Path) -> None:
    """safetensors demands no alignment: here every tensor begins at an odd offset."""
    random = torch.Generator().manual_seed(5)
    weights = [torch.randn(33, 17, generator=random) for _ in range(3)]
    paths = []
    for i, weight in enumerate(weights):
        folder = tmp_path / str(i)
        folder.mkdir()
        entry = {"dtype": "F32", "shape": [33, 17], "data_offsets": [0, 4 * 33 * 17]}
        header = json.dumps({"a.weight": entry}).encode()
        header += b" " * ((1 - len(header)) % 8)
        data = weight.numpy().tobytes()
        (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
        paths.append(folder)
    for method in ("widen", "linear"):
        odd = merged(spec_of(paths, merge_method=method), tmp_path / f"odd-{method}")
        even = [write_model(tmp_path / f"even-{method}{i}", {"a.weight": weight}) for i, weight in enumerate(weights)]
        assert merged(spec_of(even, merge_method=method), tmp_path / f"even-{method}") == odd


@pytest.mark.parametrize("read", ["map", "pread"])
@pytest.mark.parametrize("device", [CpuDevice, LateDevice, KeepingDevice])
@pytest.mark.parametrize(
    ("method", "passes"), [("ties", 3), ("dare_ties after breadcrumbs", 3), ("widen after trimming", 4)]
)
def test_what_counting_tells_is_not_read_again(
    tmp_path: Path, method: str, passes: int, device: type[CpuDevice], read: str
) -> None:
    """Deltas of a few bits: their thresholds are the lower ends of bins. The bytes are those of whole tensors."""
    random = torch.Generator().manual_seed(9)
    base = {name: 1 + tensor for name, tensor in llama(layers=1, hidden=160).items()}
    base["model.layers.0.mlp.experts.gate_up_proj"] = 1 + torch.rand(3, 70, 90, generator=random).bfloat16()
    models = [
        write_model(tmp_path / name, tensors, LLAMA)
        for name, tensors in (("base", base), ("near", moved(base, 0.05, 2)), ("far", moved(base, 0.1, 3)))
    ]
    spec = spec_of(models, **METHODS[method], run={"read": read})
    expected, seen = merged(spec, tmp_path / "expected"), list[Progress]()
    planned = mergecore.plan(load_spec(spec))
    assert planned.passes == passes
    with computing_on(device()), cut_anywhere(Random(8)):
        result = merge(load_spec(spec), tmp_path / "out", progress=seen.append)
    assert passes * result.bytes_read == (passes - 1) * planned.bytes_to_read
    assert seen[-1].bytes_read == seen[-1].bytes_read_total == planned.bytes_to_read
    assert all(one.bytes_read <= other.bytes_read for one, other in pairwise(seen))
    assert tensor_bytes(tmp_path / "out") == expected


def test_progress_ends_at_its_total_where_tensors_are_read_more_often_than_planned(
    trio: list[Path], tmp_path: Path
) -> None:
    seen: list[Progress] = []
    planned = mergecore.plan(load_spec(spec_of(trio)))
    merge(load_spec(spec_of(trio)), tmp_path / "out", progress=seen.append)
    assert seen[-1].bytes_read == seen[-1].bytes_read_total > planned.bytes_to_read
    assert all(now.bytes_read <= now.bytes_read_total for now in seen)
