"""A device without enough memory: smaller windows, then the CPU, the same bytes, and the result says so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mergecore.merging as merging
import mergecore.placement as placement
from mergecore import MergeResult, Progress, load_spec, merge
from mergecore.device import HostWindow
from tests.merges import METHODS, LateDevice, many_kinds
from tests.models import LLAMA, moved, spec_dict, tensor_bytes, write_model

Merged = tuple[MergeResult, dict[str, tuple[str, tuple[int, ...], bytes]]]


class CrowdedDevice(LateDevice):
    """Has room for windows of `room` bytes, and none at all at the uploads that `busy` counts."""

    def __init__(self, room: int, busy: range = range(0)) -> None:
        super().__init__()
        self.fits, self.busy = room, busy
        self.uploads = self.failures = 0

    def upload(self, windows: Sequence[HostWindow]) -> list[Tensor]:
        self.uploads += 1
        nbytes = sum(window.rows * window.columns * window.dtype.itemsize for window in windows)
        if nbytes > self.fits or self.uploads in self.busy:
            self.failures += 1
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {nbytes} bytes.\nmore")
        return super().upload(windows)

    def release(self) -> None:
        self.under_way.clear()


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, base = tmp_path_factory.mktemp("trio"), many_kinds()
    models = {"base": base, "near": moved(base, 3e-4, 2), "far": moved(base, 4e-3, 3)}
    return [write_model(folder / name, tensors, LLAMA) for name, tensors in models.items()]


def merged(trio: list[Path], out: Path, method: str) -> Merged:
    keys: dict[str, Any] = {"merge_method": "widen", **METHODS[method]}
    seen: list[Progress] = []
    result = merge(load_spec(spec_dict(keys.pop("merge_method"), *trio, **keys)), out, progress=seen.append)
    assert seen[-1].bytes_read == seen[-1].bytes_read_total
    return result, tensor_bytes(out)


@pytest.fixture(scope="module")
def expected(trio: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Merged]:
    folder = tmp_path_factory.mktemp("expected")
    return {method: merged(trio, folder / method, method) for method in METHODS}


def crowd(monkeypatch: pytest.MonkeyPatch, smallest: int, room: int, busy: range = range(0)) -> CrowdedDevice:
    device = CrowdedDevice(room, busy)
    monkeypatch.setattr(merging, "open_devices", lambda name, memory: [device])
    monkeypatch.setattr(placement, "SMALLEST", smallest)
    return device


@pytest.mark.parametrize("method", METHODS)
def test_windows_get_smaller_until_they_fit_and_what_never_fits_goes_to_the_cpu(
    trio: list[Path], expected: dict[str, Merged], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = crowd(monkeypatch, smallest=2_000, room=12_000)
    result, found = merged(trio, tmp_path / "out", method)
    undisturbed, tensors = expected[method]
    assert found == tensors
    assert device.failures > 0
    assert any("ran out of memory" in warning for warning in result.warnings)
    manifest = json.loads((tmp_path / "out" / "mergecore_manifest.json").read_text())
    assert manifest["result"]["warnings"] == list(result.warnings)
    assert result.bytes_read == undisturbed.bytes_read, "what was read in vain is not counted"


@pytest.mark.parametrize("first", [1, 4, 16])
@pytest.mark.parametrize("method", ["linear", "widen", "ties", "ties of the whole model", "metagpt after trimming"])
def test_memory_that_is_short_for_a_moment_anywhere_changes_no_byte(
    trio: list[Path],
    expected: dict[str, Merged],
    tmp_path: Path,
    method: str,
    first: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = crowd(monkeypatch, smallest=2_000, room=1 << 30, busy=range(first, first + 2))
    result, found = merged(trio, tmp_path / "out", method)
    assert found == expected[method][1]
    assert device.failures > 0
    assert result.warnings != ()


@pytest.mark.parametrize("method", ["widen", "ties"])
def test_a_device_that_keeps_tensors_first_gives_that_up(
    trio: list[Path],
    expected: dict[str, Merged],
    tmp_path: Path,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    device = crowd(monkeypatch, smallest=2_000, room=1 << 30, busy=range(4, 5))
    upload = device.upload
    monkeypatch.setattr(device, "room", 1 << 30)
    monkeypatch.setattr(device, "upload", lambda windows: [tensor.clone() for tensor in upload(windows)])
    result, found = merged(trio, tmp_path / "out", method)
    assert found == expected[method][1]
    assert "going on without keeping tensors there" in caplog.text
    assert result.warnings == expected[method][0].warnings, "windows are what they were"


def test_a_device_with_no_room_at_all_leaves_everything_to_the_cpu(
    trio: list[Path],
    expected: dict[str, Merged],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    crowd(monkeypatch, smallest=2_000, room=0)
    method = next(iter(METHODS))
    result, found = merged(trio, tmp_path / "out", method)
    assert found == expected[method][1]
    (told,) = [warning for warning in result.warnings if "on the CPU" in warning]
    assert "is computed on the CPU" in caplog.text
    assert "tensor(s) were computed on the CPU, first " in told
    assert "CUDA out of memory. Tried to allocate" in caplog.text


def test_other_errors_of_a_device_are_not_taken_for_it(
    trio: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = crowd(monkeypatch, smallest=2_000, room=1 << 30)

    def upload(windows: Sequence[HostWindow]) -> list[Tensor]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(device, "upload", upload)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        merged(trio, tmp_path / "out", next(iter(METHODS)))
    assert [path.name for path in tmp_path.iterdir()] == []
