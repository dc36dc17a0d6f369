"""Where windows are computed on: the CPU in place on the mapped pages, or a GPU behind pinned rings.

Not for arithmetic (ops.py) and not for reading or writing files.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from mergecore.budget import LOOPS
from mergecore.errors import MergecoreError
from mergecore.output.buffers import Buffer, new_buffer
from mergecore.spec.fields import DEVICES


class HostWindow(NamedTuple):
    """One window in host memory: its entries or their bytes, or None for zeros."""

    data: Tensor | memoryview | None
    """Entries are (rows, columns), or flat."""
    dtype: torch.dtype
    rows: int
    columns: int

    def tensor(self) -> Tensor:
        """The window as a (rows, columns) tensor over the same memory."""
        if self.data is None:
            return torch.zeros(self.rows, self.columns, dtype=self.dtype)
        entries = self.data if isinstance(self.data, Tensor) else torch.frombuffer(self.data, dtype=self.dtype)
        if entries.dim() == 2:
            return entries
        return entries.view(self.rows, self.columns)


class CpuDevice:
    """Computes on host memory directly: nothing is copied."""

    torch_device = torch.device("cpu")
    loops = LOOPS
    """Loops of a merge that may share the device: while one decides what to compute, the others' kernels run."""
    readers = 1
    """Threads that bring windows into memory while others are computed."""
    pending = 0
    """Results that are on their way to the writer at most."""
    room = 0
    """Bytes of tensors that stay on the device from one pass to the next."""

    def __enter__(self) -> Self:
        """Keeps this program to the device's memory until it is left."""
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def new_buffer(self, nbytes: int) -> Buffer:
        """A page-aligned buffer for results, at least `nbytes` long."""
        return new_buffer(nbytes)

    def numbers(self, rows: int, columns: int) -> HostWindow:
        """Host memory for a few whole numbers."""
        return HostWindow(torch.empty(rows, columns, dtype=torch.int64), torch.int64, rows, columns)

    def upload(self, windows: Sequence[HostWindow]) -> list[Tensor]:
        """The inputs of one window on this device; valid until the next upload, and as long as they are referred to
        where the device has `room`."""
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
    """A pinned host buffer, and the event that says when its bytes have left."""

    def __init__(self) -> None:
        self.pinned = torch.empty(0, dtype=torch.uint8)
        self.copied = torch.cuda.Event()

    def take(self, nbytes: int) -> Tensor:
        self.copied.synchronize()
        if self.pinned.numel() < nbytes:
            self.pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        return self.pinned


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 256) * 256


class CudaDevice:
    """Computes on a GPU: mapped pages -> pinned ring -> device on one stream, results back on another.

    While the kernels of one window run, the next window is copied in and the previous result out: straight to the
    writer's buffers, which are pinned. `memory`: bytes of the GPU that are used at most, to which torch's allocator
    keeps; None: most of what is free.
    """

    loops = 1
    pending = 3

    def __init__(self, device: torch.device, memory: int | None = None) -> None:
        self.torch_device = device
        free, total = torch.cuda.mem_get_info(device)
        allowed = min(free // 5 * 4 if memory is None else memory, total)
        self._share = allowed / total
        self.room = allowed // 3  # for the next one, too; the rest is for windows under way, statistics, results
        # A core copies about half as fast as PCIe does; more than a few of them share what the memory gives.
        self.readers = max(1, min(8, (os.cpu_count() or 1) // 2))
        self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._pending: deque[tuple[torch.cuda.Event, Callable[[], None]]] = deque()
        self._slots = [_Slot(), _Slot()]
        self._uploads = 0

    def __enter__(self) -> Self:
        torch.cuda.set_per_process_memory_fraction(self._share, self.torch_device)
        return self

    def __exit__(self, *error: object) -> None:
        # After an error copies may still be under way, into buffers that are free for others now.
        torch.cuda.synchronize(self.torch_device)
        with torch.cuda.device(self.torch_device):
            torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, self.torch_device)

    def new_buffer(self, nbytes: int) -> Buffer:
        return torch.empty(max(nbytes, 1), dtype=torch.uint8, pin_memory=True).numpy()

    def numbers(self, rows: int, columns: int) -> HostWindow:
        pinned = torch.empty(rows, columns, dtype=torch.int64, pin_memory=True)
        return HostWindow(pinned, torch.int64, rows, columns)

    def upload(self, windows: Sequence[HostWindow]) -> list[Tensor]:
        slot = self._slots[self._uploads % len(self._slots)]
        self._uploads += 1
        compute = torch.cuda.current_stream(self.torch_device)
        sizes = [window.rows * window.columns * window.dtype.itemsize for window in windows]
        pinned = slot.take(sum(map(_aligned, sizes)))
        tensors, offset = [], 0
        with torch.cuda.stream(self._in):
            for window, nbytes in zip(windows, sizes, strict=True):
                shape = window.rows, window.columns
                resident = torch.empty(shape, dtype=window.dtype, device=self.torch_device)
                if window.data is None:
                    resident.zero_()
                else:
                    host = pinned[offset : offset + nbytes].view(window.dtype).view(shape)
                    host.copy_(window.tensor())
                    resident.copy_(host, non_blocking=True)
                resident.record_stream(compute)
                tensors.append(resident)
                offset += _aligned(nbytes)
            slot.copied.record(self._in)
        compute.wait_event(slot.copied)
        return tensors

    def output(self, window: HostWindow) -> Tensor:
        return torch.empty(window.rows, window.columns, dtype=window.dtype, device=self.torch_device)

    def deliver(self, result: Tensor, window: HostWindow, then: Callable[[], None]) -> None:
        computed, arrived = torch.cuda.Event(), torch.cuda.Event()
        computed.record(torch.cuda.current_stream(self.torch_device))
        with torch.cuda.stream(self._out):
            self._out.wait_event(computed)
            window.tensor().copy_(result, non_blocking=True)
            result.record_stream(self._out)
            arrived.record(self._out)
        self._pending.append((arrived, then))
        while len(self._pending) > self.pending:
            self._arrive()

    def flush(self) -> None:
        while self._pending:
            self._arrive()

    def release(self) -> None:
        torch.cuda.synchronize(self.torch_device)
        self._pending.clear()
        with torch.cuda.device(self.torch_device):
            torch.cuda.empty_cache()

    def _arrive(self) -> None:
        arrived, then = self._pending.popleft()
        arrived.synchronize()
        then()


Device = CpuDevice | CudaDevice


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device had not enough memory: torch's own error, or the words of CUDA and its libraries for it."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error) or "ALLOC_FAILED" in str(error)


def open_devices(name: str, memory: int | None = None) -> list[Device]:
    """The devices for `auto`, `cpu`, `cuda`, `cuda:N` or `cuda:N+M+...`; of each GPU `memory` bytes are used at most
    (None: most of what is free). MergecoreError where one is not there."""
    if not re.fullmatch(DEVICES, name):
        raise MergecoreError(f"device {name}: expected auto, cpu, cuda, cuda:N or cuda:N+M (several)")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return [CpuDevice()]
    if not torch.cuda.is_available():
        built = "this torch was built without CUDA" if torch.version.cuda is None else "no GPU is visible"
        raise MergecoreError(f"device {name}: {built}; use --device cpu")
    numbers = [int(number) for number in (name.partition(":")[2] or "0").split("+")]
    if max(numbers) >= torch.cuda.device_count():
        raise MergecoreError(f"device {name}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("mergecore::blend", "CUDA"):
        if name == "auto":
            return [CpuDevice()]
        raise MergecoreError(f"device {name}: the kernels were built without CUDA; build again with CUDA_HOME set")
    return [CudaDevice(torch.device("cuda", number), memory) for number in numbers]


def open_device(name: str) -> Device:
    """The one device of a name, for what uses no more than one."""
    devices = open_devices(name)
    if len(devices) > 1:
        raise MergecoreError(f"device {name}: only a merge uses several GPUs; name one")
    return devices[0]
