"""Many methods on tensors of many kinds, windows of any size, and devices that deliver results as a GPU does."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

import mergecore
from mergecore import batches, load_spec, merge, merging
from mergecore.device import CpuDevice, HostWindow
from mergecore.jobs import TensorJob
from mergecore.planning import MergePlan
from tests.models import LLAMA, llama, moved, spec_dict, tensor_bytes, write_model

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


def write_worn_trio(folder: Path) -> list[Path]:
    """base, near and far, of BF16, F16 and F32 tensors; near is worn, far in three files and in F32 throughout."""
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


def results_of(trio: list[Path], folder: Path) -> dict[str, Any]:
    """What every method makes of the trio, with one thread and whole tensors."""
    return {name: merged(spec_of(trio, **keys), folder / name, threads=1) for name, keys in METHODS.items()}


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


class KeepingDevice(LateDevice):
    """Has room for whole tensors; what was uploaded is its own. Counts the windows that it was given."""

    room = 1 << 40

    def __init__(self) -> None:
        super().__init__()
        self.uploads = 0

    def upload(self, windows: Sequence[HostWindow]) -> list[Tensor]:
        self.uploads += 1
        return [tensor.clone() for tensor in super().upload(windows)]


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs Python code, in which warnings are errors, in the project's folder."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
