"""Where each tensor is computed, and what is done when a device has not enough memory: smaller windows, then the CPU.

Not for devices themselves (device.py) and not for what host memory allows (budget.py).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from mergecore.budget import device_bytes, narrowed, window_bytes
from mergecore.device import CpuDevice, Device
from mergecore.jobs import TensorJob

log = logging.getLogger(__name__)

SMALLEST = 4 << 20
"""Bytes of a window that is not halved any more: a device that has no room for it will have none for the kernels."""


class Placement:
    """The device of a merge, and how far the merge had to retreat from it."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.host = device if type(device) is CpuDevice else CpuDevice()
        self.limit: int | None = None
        """Bytes of a window, at most; None: as planned."""
        self.on_host: list[str] = []
        """Tensors that go to the CPU, in the order in which that was found."""
        self.room = device.room

    def of(self, job: TensorJob) -> Device:
        """Where a tensor is computed."""
        return self.host if job.name in self.on_host else self.device

    def stays(self, job: TensorJob) -> bool:
        """Whether a tensor's windows can stay on its device from one read of them to the next."""
        return self.of(job) is self.device and 0 < device_bytes(job) <= self.room

    def can_retreat(self, jobs: Sequence[TensorJob]) -> bool:
        """Whether these have not come to the CPU yet."""
        return any(self.of(job) is not self.host for job in jobs)

    def retreat(self, jobs: Sequence[TensorJob]) -> None:
        """These did not fit the device. From now on tensors are read anew for every pass, or all windows are half as
        large as theirs, or, if that is not possible, these go to the CPU."""
        self.device.release()
        if any(map(self.stays, jobs)):
            self.room = 0
            log.warning("not enough memory on the device: going on without keeping tensors there")
            return
        largest = max(map(window_bytes, jobs))
        smaller = max(SMALLEST, largest // 2)
        if any(narrowed(job, smaller) is not job for job in jobs):
            self.limit = smaller
            log.warning("not enough memory on the device: going on with windows of %.1f MiB", smaller / 2**20)
        else:
            self.on_host += [job.name for job in jobs if job.name not in self.on_host]
            log.warning("not enough memory on the device: %s is computed on the CPU", jobs[0].name)

    def narrowed(self, job: TensorJob) -> TensorJob:
        """The job in windows that the device had room for."""
        return job if self.limit is None else narrowed(job, self.limit)

    def warnings(self) -> list[str]:
        """What became of the merge, for people."""
        found = []
        if self.limit is not None:
            size = f"{self.limit / 2**20:.1f} MiB"
            found.append(f"the device ran out of memory: windows were made smaller, {size} at last")
        if self.on_host:
            count = len(self.on_host)
            found.append(
                f"the device ran out of memory: {count} tensor(s) were computed on the CPU, first {self.on_host[0]}"
            )
        return found
