"""Where windows are computed on: the CPU in place on the mapped pages, or a GPU behind pinned rings.

Not for arithmetic (ops.py) and not for reading or writing files.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergecore.errors import MergecoreError


@dataclass(frozen=True)
class HostWindow:
    """One input's window in host memory: its entries or their bytes, or None for zeros."""

    data: Tensor | memoryview | None
    dtype: torch.dtype
    rows: int
    columns: int

    def tensor(self) -> Tensor:
        """The window as a (rows, columns) tensor over the same memory."""
        if self.data is None:
            return torch.zeros(self.rows, self.columns, dtype=self.dtype)
        entries = self.data if isinstance(self.data, Tensor) else torch.frombuffer(self.data, dtype=self.dtype)
        return entries.view(self.rows, self.columns)


class CpuDevice:
    """Computes on host memory directly: nothing is copied."""

    torch_device = torch.device("cpu")

    def upload(self, windows: Sequence[HostWindow]) -> list[Tensor]:
        """The inputs of one window on this device; valid until the next upload."""
        return [window.tensor() for window in windows]

    def output(self, window: HostWindow) -> Tensor:
        """Where a kernel writes the result that goes to `window`."""
        return window.tensor()

    def deliver(self, result: Tensor, window: HostWindow, then: Callable[[], None]) -> None:
        """Brings a result of `output` to its window in host memory, then calls `then` (perhaps later, in order)."""
        then()

    def flush(self) -> None:
        """Waits until everything delivered has arrived."""

    def release(self) -> None:
        """Forgets all windows and results that are under way, and gives back the memory held for them."""


class _Slot:
    """A pinned host buffer, its device buffer, and the events that say when each may be reused."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pinned = torch.empty(0, dtype=torch.uint8)
        self.resident = torch.empty(0, dtype=torch.uint8, device=device)
        self.copied = torch.cuda.Event()
        self.computed = torch.cuda.Event()

    def grow(self, nbytes: int) -> None:
        if self.pinned.numel() < nbytes:
            torch.cuda.synchronize(self.device)  # nothing may still use the old buffers
            self.pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            self.resident = torch.empty(nbytes, dtype=torch.uint8, device=self.device)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 256) * 256


class CudaDevice:
    """Computes on a GPU: mapped pages -> pinned ring -> device on one stream, results back on another.

    While the kernels of one window run, the next window is copied in and the previous result out.
    """

    def __init__(self, device: torch.device) -> None:
        self.torch_device = device
        self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._pending: deque[tuple[_Slot, HostWindow, Callable[[], None]]] = deque()
        self._make_rings()

    def _make_rings(self) -> None:
        self._inputs = [_Slot(self.torch_device), _Slot(self.torch_device)]
        self._outputs = [_Slot(self.torch_device), _Slot(self.torch_device)]
        self._uploads = self._results = 0

    def upload(self, windows: Sequence[HostWindow]) -> list[Tensor]:
        # The kernels launched since the last upload used that upload's slot.
        self._inputs[self._uploads % 2].computed.record(torch.cuda.current_stream(self.torch_device))
        self._uploads += 1
        slot = self._inputs[self._uploads % 2]
        sizes = [window.rows * window.columns * window.dtype.itemsize for window in windows]
        slot.grow(sum(map(_aligned, sizes)))
        slot.copied.synchronize()  # the pinned bytes of two windows ago have left
        tensors, offset = [], 0
        for window, nbytes in zip(windows, sizes, strict=True):
            host = slot.pinned[offset : offset + nbytes].view(window.dtype).view(window.rows, window.columns)
            host.copy_(window.tensor())
            tensors.append(slot.resident[offset : offset + nbytes].view(window.dtype).view(host.shape))
            offset += _aligned(nbytes)
        with torch.cuda.stream(self._in):
            self._in.wait_event(slot.computed)
            slot.resident[:offset].copy_(slot.pinned[:offset], non_blocking=True)
            slot.copied.record(self._in)
        torch.cuda.current_stream(self.torch_device).wait_event(slot.copied)
        return tensors

    def output(self, window: HostWindow) -> Tensor:
        slot = self._outputs[self._results % 2]
        nbytes = window.rows * window.columns * window.dtype.itemsize
        slot.grow(nbytes)
        return slot.resident[:nbytes].view(window.dtype).view(window.rows, window.columns)

    def deliver(self, result: Tensor, window: HostWindow, then: Callable[[], None]) -> None:
        slot = self._outputs[self._results % 2]
        self._results += 1
        nbytes = result.numel() * result.element_size()
        slot.computed.record(torch.cuda.current_stream(self.torch_device))
        with torch.cuda.stream(self._out):
            self._out.wait_event(slot.computed)
            slot.pinned[:nbytes].copy_(slot.resident[:nbytes], non_blocking=True)
            slot.copied.record(self._out)
        self._pending.append((slot, window, then))
        # One result may be under way: its host buffer and the next one are the two that the writer lends.
        if len(self._pending) > 1:
            self._arrive()

    def flush(self) -> None:
        while self._pending:
            self._arrive()

    def release(self) -> None:
        torch.cuda.synchronize(self.torch_device)
        self._pending.clear()
        self._make_rings()
        with torch.cuda.device(self.torch_device):
            torch.cuda.empty_cache()

    def _arrive(self) -> None:
        slot, window, then = self._pending.popleft()
        slot.copied.synchronize()
        host = window.tensor()
        host.copy_(slot.pinned[: host.numel() * host.element_size()].view(window.dtype).view(host.shape))
        then()


Device = CpuDevice | CudaDevice


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device had not enough memory: torch's own error, or the words of CUDA and its libraries for it."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error) or "ALLOC_FAILED" in str(error)


def open_device(name: str) -> Device:
    """The device for `auto`, `cpu`, `cuda` or `cuda:N`; MergecoreError where it is not there."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return CpuDevice()
    if not torch.cuda.is_available():
        built = "this torch was built without CUDA" if torch.version.cuda is None else "no GPU is visible"
        raise MergecoreError(f"device {name}: {built}; use --device cpu")
    device = torch.device("cuda", 0) if name == "auto" else torch.device(name)
    if (device.index or 0) >= torch.cuda.device_count():
        raise MergecoreError(f"device {name}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("mergecore::blend", "CUDA"):
        if name == "auto":
            return CpuDevice()
        raise MergecoreError(f"device {name}: the kernels were built without CUDA; build again with CUDA_HOME set")
    return CudaDevice(torch.device("cuda", device.index or 0))
