"""The bytes of a merge depend on spec and inputs alone; it stops and goes on; and an error leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mergecore
from mergecore import Progress, batches, load_spec, merge, merging
from mergecore.device import CpuDevice, HostWindow
from mergecore.errors import (
    InputFault,
    Interrupted,
    MergecoreError,
    NonFiniteError,
    OutputExistsError,
    SpecError,
)
from mergecore.jobs import TensorJob
from mergecore.planning import MergePlan
from tests.models import LLAMA, llama, load_tensors, moved, spec_dict, tensor_bytes, write_model, write_trio

ROOT = Path(__file__).parent.parent
DARE = {"method": "dare", "drop_rate": 0.3}
METHODS: dict[str, dict[str, Any]] = {
    "widen": {"merge_method": "widen"},
    "widen after dare": {"merge_method": "widen", "sparsify": DARE, "parameters": {"t": 0.9, "vector_scoring": "rank"}},
    "linear": {"merge_method": "linear", "parameters": {"weight": [0.2, 0.7]}},
    "linear after dare": {"merge_method": "linear", "sparsify": DARE},
    "task_arithmetic after dare": {
        "merge_method": "task_arithmetic",
        "sparsify": {**DARE, "rescale": False},
        "parameters": {"lambda": 0.4},
    },
    "ties": {"merge_method": "ties", "parameters": {"density": 0.3}},
    "ties of the whole model": {"merge_method": "ties", "parameters": {"density": 0.3, "scope": "model"}},
    "breadcrumbs of the whole model, rescaled": {
        "merge_method": "breadcrumbs",
        "parameters": {"density": 0.3, "rescale": True, "scope": "model"},
    },
    "metagpt": {"merge_method": "metagpt"},
    "tsv": {"merge_method": "tsv"},
    "iso_c after dare": {"merge_method": "iso_c", "sparsify": DARE},
    "metagpt after trimming": {"merge_method": "metagpt", "sparsify": {"method": "magnitude", "density": 0.4}},
    "widen after trimming": {"merge_method": "widen", "sparsify": {"method": "magnitude", "density": 0.4}},
    "dare_ties after breadcrumbs": {
        "merge_method": "dare_ties",
        "sparsify": {"method": "breadcrumbs", "density": 0.6},
        "parameters": {"density": 0.5},
    },
    "della": {"merge_method": "della", "parameters": {"density": 0.5}},
    "multislerp after trimming": {"merge_method": "multislerp", "sparsify": {"method": "magnitude", "density": 0.4}},
    "model_stock of rows after breadcrumbs": {
        "merge_method": "model_stock",
        "sparsify": {"method": "breadcrumbs", "density": 0.6},
        "parameters": {"filter_wise": True},
    },
    "nuslerp of columns after trimming": {
        "merge_method": "nuslerp",
        "sparsify": {"method": "magnitude", "density": 0.7},
        "parameters": {"weight": 1, "nuslerp_flatten": False, "nuslerp_row_wise": True},
    },
}


def many_kinds() -> dict[str, Tensor]:
    """A Llama with a bias, fused experts, a convolution, and tensors of no and of one element."""
    random = torch.Generator().manual_seed(7)
    return llama(layers=1, hidden=40, vocabulary=300) | {
        "model.layers.0.self_attn.q_proj.bias": torch.randn(40, generator=random).half(),
        "model.layers.0.mlp.experts.gate_up_proj": torch.randn(3, 70, 30, generator=random).bfloat16(),
        "model.visual.conv.weight": torch.randn(20, 3, 5, 5, generator=random),
        "model.scale": torch.tensor(0.5),
        "model.nothing.weight": torch.zeros(0, 4),
        "model.nothing_else.weight": torch.zeros(4, 0),
        "model.no_vector.weight": torch.zeros(0),
        "model.steps": torch.tensor(12),
    }


def worn(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Some rows and columns are nearly gone: WIDEN reads such tensors once more."""
    for tensor in tensors.values():
        if tensor.is_floating_point() and tensor.dim() > 1:
            tensor[..., ::7] *= 2.0**-20
            tensor[..., ::5, :] *= 2.0**-9
    return tensors


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """base, near and far, of BF16, F16 and F32 tensors; near is worn, far in three files and in F32 throughout."""
    folder = tmp_path_factory.mktemp("trio")
    base = many_kinds()
    far = {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in moved(base, 4e-3, 3).items()
    }
    return [
        write_model(folder / "base", base, LLAMA),
        write_model(folder / "near", worn(moved(base, 3e-4, 2)), LLAMA),
        write_model(folder / "far", far, LLAMA, shards=3),
    ]


def spec_of(trio: list[Path], **keys: Any) -> dict[str, Any]:
    return spec_dict(keys.pop("merge_method", "widen"), *trio, **keys)


def merged(spec: dict[str, Any], out: Path, **options: Any) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    merge(load_spec(spec), out, **options)
    return tensor_bytes(out)


def checksums(out: Path) -> dict[str, str]:
    tensors = json.loads((out / "mergecore_manifest.json").read_text())["tensors"]
    return {name: entry["xxh3_128"] for name, entry in tensors.items()}


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for one Hypothesis example."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@contextmanager
def cut_anywhere(random: Random) -> Iterator[None]:
    """Windows of any number of rows (or blocks) for each tensor, kept between the passes or not."""

    salt = random.random()

    def cut(job: TensorJob, *_: Any, **__: Any) -> TensorJob:
        of_job = Random(f"{salt} {job.name}")
        blocks = max(1, job.rows // job.block_rows)
        rows = job.block_rows * of_job.randint(max(1, blocks // 20), blocks)
        return replace(job, window_rows=rows, keep=of_job.random() < 0.5)

    def any_windows(*arguments: Any, **options: Any) -> MergePlan:
        planned = mergecore.plan(*arguments, **options)
        return replace(planned, jobs=tuple(map(cut, planned.jobs)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "plan", any_windows)
        patch.setattr(batches, "windowed", cut)  # of loops that share the memory
        yield


# ---- Equal bytes


@pytest.fixture(scope="module")
def expected(trio: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every method makes of the trio, with one thread and whole tensors."""
    folder = tmp_path_factory.mktemp("expected")
    return {name: merged(spec_of(trio, **keys), folder / name, threads=1) for name, keys in METHODS.items()}


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=12, deadline=None)
@given(
    random=st.randoms(use_true_random=False),
    threads=st.integers(1, 2),
    shard_size=st.integers(1, 200_000),
    read=st.sampled_from(["map", "pread"]),
    write=st.sampled_from(["direct", "cached"]),
    lanes=st.integers(1, 4),
)
def test_bytes_depend_on_no_window_thread_shard_or_way_of_reading_or_writing(
    trio: list[Path],
    expected: dict[str, Any],
    method: str,
    random: Random,
    threads: int,
    shard_size: int,
    read: str,
    write: str,
    lanes: int,
) -> None:
    run = {"threads": threads, "shard_size": shard_size, "read": read, "write": write}
    with scratch() as folder, cut_anywhere(random), writing_at_once(lanes):
        assert merged(spec_of(trio, **METHODS[method], run=run), folder / "out") == expected[method]


@contextmanager
def computing_on(device: CpuDevice) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "open_devices", lambda name, memory: [device])
        yield


@contextmanager
def writing_at_once(lanes: int) -> Iterator[None]:
    """As many shards as a machine with many cores writes at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "_lanes", lambda threads, outputs: lanes)
        yield


class LateDevice(CpuDevice):
    """Delivers each result when the next one is computed, as a GPU does."""

    loops = 1
    pending = 1

    def __init__(self) -> None:
        self.under_way: deque[tuple[Tensor, HostWindow, Callable[[], None]]] = deque()

    def output(self, window: HostWindow) -> Tensor:
        return torch.empty(window.rows, window.columns, dtype=window.dtype)

    def deliver(self, result: Tensor, window: HostWindow, then: Callable[[], None]) -> None:
        self.under_way.append((result, window, then))
        if len(self.under_way) > self.pending:
            self._arrive()

    def flush(self) -> None:
        while self.under_way:
            self._arrive()

    def _arrive(self) -> None:
        result, window, then = self.under_way.popleft()
        window.tensor().copy_(result)
        then()


@pytest.mark.parametrize("method", METHODS)
def test_a_device_may_deliver_a_result_while_it_computes_the_next(
    trio: list[Path], expected: dict[str, Any], tmp_path: Path, method: str
) -> None:
    with computing_on(LateDevice()), cut_anywhere(Random(3)):
        assert merged(spec_of(trio, **METHODS[method]), tmp_path / "out") == expected[method]


class KeepingDevice(LateDevice):
    """Has room for whole tensors; what was uploaded is its own. Counts the windows that it was given."""

    room = 1 << 40

    def __init__(self) -> None:
        super().__init__()
        self.uploads = 0

    def upload(self, windows: Sequence[HostWindow]) -> list[Tensor]:
        self.uploads += 1
        return [tensor.clone() for tensor in super().upload(windows)]


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_that_stays_on_the_device_is_uploaded_once_and_gives_the_same_bytes(
    trio: list[Path], expected: dict[str, Any], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = KeepingDevice()
    monkeypatch.setattr(merging, "open_devices", lambda name, memory: [device])
    spec = spec_of(trio, **METHODS[method])
    with cut_anywhere(Random(3)):
        assert merged(spec, tmp_path / "cut") == expected[method]
    jobs = [job for job in mergecore.plan(load_spec(spec)).jobs if job.parameters is not None]
    once = sum(len(list(job.windows())) * job.matrices * (1 + job.surveyed_reads) for job in jobs)
    device.uploads = 0
    assert merged(spec, tmp_path / "whole") == expected[method]
    # Order statistics look for a block again, which is no window.
    assert device.uploads == once or any(job.choosing_reads for job in jobs)


@pytest.fixture(scope="module")
def large_trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """Three models whose embedding (40 MB) and projection (20 MB) exceed a small budget."""
    folder = tmp_path_factory.mktemp("large")
    base = {
        "model.embed_tokens.weight": torch.randn(20_000, 1_000, generator=torch.Generator().manual_seed(1)).bfloat16(),
        "model.layers.0.mlp.up_proj.weight": torch.randn(
            4_000, 2_500, generator=torch.Generator().manual_seed(2)
        ).bfloat16(),
        "model.norm.weight": torch.ones(1_000, dtype=torch.bfloat16),
    }
    yield write_trio(folder, base)
    shutil.rmtree(folder)


@pytest.mark.parametrize("keys", [{}, {"merge_method": "task_arithmetic", "sparsify": DARE}], ids=["widen", "dare"])
def test_bytes_do_not_depend_on_the_memory_budget(large_trio: list[Path], tmp_path: Path, keys: dict[str, Any]) -> None:
    results, windows = [], []
    for memory, threads in [("16MiB", 2), ("64MiB", 1), ("4GiB", 2)]:
        spec = spec_of(large_trio, **keys, run={"memory": memory, "threads": threads})
        windows.append(sum(len(list(job.windows())) for job in mergecore.plan(load_spec(spec)).jobs))
        merge(load_spec(spec), tmp_path / "out")
        results.append(checksums(tmp_path / "out"))
        shutil.rmtree(tmp_path / "out")
    assert results[0] == results[1] == results[2]
    assert windows[0] > windows[1] > windows[2]


def test_a_model_in_several_files_merges_like_one_in_a_single_file(tmp_path: Path) -> None:
    base = llama()
    one, many = write_trio(tmp_path / "one", base), write_trio(tmp_path / "many", base, shards=4)
    expected = merged(spec_of(one), tmp_path / "a")
    assert merged(spec_of(many), tmp_path / "b") == expected
    files = [path / "model.safetensors" for path in one]
    assert merged(spec_of(files), tmp_path / "c") == expected


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


# ---- Stopping and going on


class StopAt:
    """Asks to stop at the window of this number, counted from 1."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0


def windows_of(spec: dict[str, Any]) -> int:
    planned = mergecore.plan(load_spec(spec))
    passes = {job.name: planned.passes if job.parameters is not None else 1 for job in planned.jobs}
    return sum(passes[job.name] * job.matrices * len(list(job.windows())) for job in planned.jobs)


@pytest.mark.parametrize("method", ["widen after dare", "linear", "ties of the whole model", "metagpt after trimming"])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_a_merge_stopped_anywhere_goes_on_to_the_same_bytes(
    trio: list[Path], expected: dict[str, Any], method: str, data: st.DataObject
) -> None:
    spec = spec_of(trio, **METHODS[method], run={"shard_size": data.draw(st.integers(1, 200_000))})
    stops = data.draw(st.lists(st.integers(1, windows_of(spec)), min_size=1, max_size=3))
    with scratch() as folder, writing_at_once(data.draw(st.integers(1, 3))):
        whole = merge(load_spec(spec), folder / "whole")
        done = 0
        for number in stops:
            seen: list[Progress] = []
            try:
                with computing_on(data.draw(st.sampled_from([CpuDevice, LateDevice]))()):
                    merge(
                        load_spec(spec), folder / "out", resume=True, should_stop=StopAt(number), progress=seen.append
                    )
            except Interrupted:
                assert os.listdir(folder / ".out.partial")
                assert not (folder / "out").exists()
                assert all(step.tensors_done >= done for step in seen)
                done = max([done, *(step.tensors_done for step in seen)])
            else:
                break  # what was left had fewer windows
        if not (folder / "out").exists():
            result = merge(load_spec(spec), folder / "out", resume=True, progress=seen.append)
            assert result.resumed
            assert result.bytes_read <= whole.bytes_read
            assert seen[-1].bytes_read == seen[-1].bytes_read_total
            assert seen[-1].bytes_written == seen[-1].bytes_written_total
            assert seen[-1].tensors_done == seen[-1].tensors_total
        assert tensor_bytes(folder / "out") == expected[method]
        assert checksums(folder / "out") == checksums(folder / "whole")
        assert sorted(os.listdir(folder)) == ["out", "whole"]


def interrupt(spec: dict[str, Any], out: Path) -> None:
    """Stops a merge when about half of its windows are done."""
    with pytest.raises(Interrupted) as caught:
        merge(load_spec(spec), out, should_stop=StopAt(windows_of(spec) // 2))
    assert caught.value.exit_code == 3


def test_finished_tensors_are_not_read_again(trio: list[Path], tmp_path: Path) -> None:
    spec = spec_of(trio)
    interrupt(spec, tmp_path / "out")
    first: list[Progress] = []
    result = merge(load_spec(spec), tmp_path / "out", resume=True, progress=first.append)
    assert first[0].tensors_done > 0
    assert result.bytes_read < first[0].bytes_read_total


def test_how_it_runs_may_change_before_it_goes_on(trio: list[Path], tmp_path: Path) -> None:
    interrupt(spec_of(trio), tmp_path / "out")
    changed = spec_of(trio, run={"memory": "32MiB", "threads": 1, "read": "pread"})
    assert merge(load_spec(changed), tmp_path / "out", resume=True).resumed


@pytest.mark.parametrize(
    "change",
    [
        {"parameters": {"t": 0.5}},
        {"seed": 1},
        {"sparsify": DARE},
        {"run": {"shard_size": "20kB"}},
        {"dtype": "float32"},
    ],
    ids=str,
)
def test_a_changed_spec_starts_from_zero(trio: list[Path], tmp_path: Path, change: dict[str, Any]) -> None:
    interrupt(spec_of(trio), tmp_path / "out")
    result = merge(load_spec(spec_of(trio, **change)), tmp_path / "out", resume=True)
    assert not result.resumed
    assert tensor_bytes(tmp_path / "out") == merged(spec_of(trio, **change), tmp_path / "fresh")


def test_a_changed_input_starts_from_zero(tmp_path: Path) -> None:
    base = llama()
    trio = write_trio(tmp_path, base)
    interrupt(spec_of(trio), tmp_path / "out")
    write_model(trio[1], moved(base, 1e-3, 9), LLAMA)
    result = merge(load_spec(spec_of(trio)), tmp_path / "out", resume=True)
    assert not result.resumed
    assert tensor_bytes(tmp_path / "out") == merged(spec_of(trio), tmp_path / "fresh")


def test_without_resume_a_stopped_merge_starts_from_zero(trio: list[Path], tmp_path: Path) -> None:
    interrupt(spec_of(trio), tmp_path / "out")
    assert not merge(load_spec(spec_of(trio)), tmp_path / "out").resumed


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_missing_does_not_cost_the_finished_work(trio: list[Path], tmp_path: Path) -> None:
    interrupt(spec_of(trio), tmp_path / "out")
    with pytest.raises(MergecoreError, match=r"device cuda: .*--device cpu"):
        merge(load_spec(spec_of(trio)), tmp_path / "out", resume=True, device="cuda")
    assert merge(load_spec(spec_of(trio)), tmp_path / "out", resume=True).resumed


# ---- Errors


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


def test_the_number_of_threads_is_the_caller_s_again_afterwards(trio: list[Path], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    merge(load_spec(spec_of(trio)), tmp_path / "out", threads=before + 1)
    assert torch.get_num_threads() == before


# ---- Processes of their own


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs Python code, in which warnings are errors, in the project's folder."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


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


PEAK = """
import sys
from mergecore import merge
for spec in sys.argv[2:]:
    print(merge(spec, sys.argv[1] + "/out-" + spec.rsplit("/")[-1], memory=64 << 20).peak_rss)
"""


def test_peak_memory_does_not_depend_on_the_size_of_a_tensor(tmp_path: Path) -> None:
    """Three checkpoints of 200 MB, nearly all of it one embedding, with a budget of 64 MiB."""
    base = llama(layers=1)
    random = torch.Generator().manual_seed(1)
    # Like a real vocabulary, 50,000 tokens; all rows equal, so that making it is no work.
    row = torch.randn(2_000, generator=random)
    names = ("base", "near", "far")
    for number, name in enumerate(names):
        embedding = (row * (1 + 0.01 * number)).bfloat16().expand(50_000, 2_000)
        write_model(tmp_path / "large" / name, base | {"model.embed_tokens.weight": embedding}, LLAMA)
        write_model(tmp_path / "tiny" / name, base, LLAMA)
    for size in ("tiny", "large"):
        (tmp_path / f"{size}.json").write_text(json.dumps(spec_of([tmp_path / size / name for name in names])))
    try:
        ended = run_python(PEAK, tmp_path, tmp_path / "tiny.json", tmp_path / "large.json")
        assert ended.returncode == 0, ended.stderr
        tiny, large = map(int, ended.stdout.split())
        assert tiny < large < tiny + (110 << 20)
    finally:
        shutil.rmtree(tmp_path)


def test_peak_memory_is_the_merge_s_and_not_its_parent_s(trio: list[Path], tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(spec_of(trio)))
    ballast = b"\1" * (800 << 20)
    ended = run_python(PEAK, tmp_path, spec)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < len(ballast)
