"""What jobs hold of this host while they run: a worker, memory, threads, a GPU. Who may start, and why not yet.

A job declares what it needs below `run` of its spec. The daemon finds it with regular expressions, as it parses no
spec; the worker is held to what was granted. In which order jobs come: supervisor.py and incoming.py.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergecore.sizes import parse_size
from service.errors import ServiceError
from service.host import memory_limit
from service.metrics import build_versions

if TYPE_CHECKING:
    from service.config import ServeConfig

DECLARED_BYTES = 1 << 30
"""run.memory of a spec that does not say it."""
WORKER_BYTES = 512 << 20
"""What a worker holds beside run.memory: Python, torch, a tokenizer."""
READ_BYTES = 64 * 1024
"""So much of a spec is looked at."""


def _key(name: bytes, value: bytes) -> re.Pattern[bytes]:
    return re.compile(rb"^[^#\n]*?\b" + name + rb"[\"']?[ \t]*:[ \t]*[\"']?(" + value + rb")", re.MULTILINE)


_PRIORITY = _key(b"priority", rb"[+-]?[0-9]{1,9}\b")
_MEMORY = _key(b"memory", rb"[0-9][0-9.]{0,40}(?:\s*[KkMmGgTt]?[Ii]?[Bb]\b)?")
_THREADS = _key(b"threads", rb"[0-9]{1,6}\b")
_DEVICE = _key(b"device", rb"(?:auto|cpu|cuda(?::[0-9]{1,4}(?:\+[0-9]{1,4})*)?)\b")


@dataclass(frozen=True)
class Needs:
    """What a spec declares: bytes, threads (0: as many as there are), auto, cpu, cuda, cuda:N or cuda:N+M."""

    memory: int = DECLARED_BYTES
    threads: int = 0
    device: str = "auto"

    def at_least(self, memory: int) -> Needs:
        """These needs, and this memory if that is more."""
        return replace(self, memory=max(self.memory, memory))


@dataclass(frozen=True)
class Grant:
    """What a running job holds. `memory`: what its spec may use; a worker holds WORKER_BYTES more."""

    memory: int
    threads: int
    devices: tuple[str, ...]
    environment: dict[str, str]
    """What makes the worker keep to threads and device."""


class NeverFits(ServiceError):
    """A job that this daemon can never run."""


class Room:
    """What this daemon may give to jobs, and what they hold."""

    def __init__(self, config: ServeConfig) -> None:
        self.held: dict[str, Grant] = {}
        """By job."""
        self.configure(config)

    def configure(self, config: ServeConfig) -> None:
        """For what starts from now on."""
        self._jobs, self._threads = config.jobs, config.threads
        self.memory = memory_limit() if config.memory is None else config.memory
        found = found_devices() if config.devices is None else config.devices
        self.devices, self._per_device = found, config.jobs_per_device
        self._counted = config.devices is not None or bool(found)

    @property
    def reserved(self) -> int:
        """Bytes that the running jobs hold by what they declared."""
        return sum(grant.memory + WORKER_BYTES for grant in self.held.values())

    @property
    def places(self) -> int:
        """How many jobs may use a device at once."""
        return len(self.devices) * self._per_device

    @property
    def places_held(self) -> int:
        """How many of these places running jobs hold."""
        return sum(len(grant.devices) for grant in self.held.values())

    def busy(self) -> str:
        """Why nothing at all can start now; empty if something may."""
        if len(self.held) < self._jobs:
            return ""
        return f"waits for one of {self._jobs} workers" if self._jobs > 1 else "waits for the worker"

    def ask(self, needs: Needs) -> Grant | str:
        """What a job gets that starts now, or why it has to wait. Raises NeverFits."""
        whole = needs.memory + WORKER_BYTES
        if whole > self.memory:
            raise NeverFits(
                f"the job needs {gib(needs.memory)} of memory (run.memory, or what its plan says) and "
                f"{gib(WORKER_BYTES)} for the worker itself, but jobs may hold only {gib(self.memory)} on this server; "
                "lower run.memory, or raise `memory` of the daemon"
            )
        threads = (needs.threads or self._share()) if self._threads else 0
        if threads > self._threads:
            raise NeverFits(
                f"run.threads {threads} is more than the {self._threads} that jobs may use on this server; "
                "lower run.threads, or raise `threads` of the daemon"
            )
        wanted = self._wanted(needs.device)
        if busy := self.busy():
            return busy
        free = self.memory - self.reserved
        if whole > free:
            return f"needs {gib(whole)} of memory, {gib(max(0, free))} of {gib(self.memory)} are free"
        threads_free = self._threads - sum(grant.threads for grant in self.held.values())
        if threads > threads_free:
            return f"needs {threads} threads, {max(0, threads_free)} of {self._threads} are free"
        held = Counter(device for grant in self.held.values() for device in grant.devices)
        free_ones = [devices for devices in wanted if all(held[one] < self._per_device for one in devices)]
        if wanted and not free_ones:
            return f"needs {' or '.join(dict.fromkeys(map(' and '.join, wanted)))}, which other jobs hold"
        devices = min(free_ones, key=lambda devices: max(held[one] for one in devices), default=())
        return Grant(needs.memory, threads, devices, self._environment(needs, threads, devices))

    def idle_environment(self) -> dict[str, str]:
        """With what a worker is to start that waits for a job. What torch reads when it is loaded is as for a job that
        says nothing about threads; others set them as they run. No GPU is seen: a job brings its own."""
        threads = {"OMP_NUM_THREADS": str(self._share())} if self._threads else {}
        return {**threads, "CUDA_VISIBLE_DEVICES": ""}

    def _share(self) -> int:
        """Threads of a job that declares none, where they are counted."""
        return max(1, self._threads // self._jobs)

    def _wanted(self, device: str) -> list[tuple[str, ...]]:
        """The devices that a job holds, as alternatives; none if it computes on the CPU, or if devices are not
        counted."""
        if device == "cpu" or not self._counted or (device == "auto" and not self.devices):
            return []
        if device in ("auto", "cuda") and self.devices:
            return [(one,) for one in self.devices]
        named = tuple(dict.fromkeys(f"cuda:{number}" for number in device.partition(":")[2].split("+")))
        if set(named) <= set(self.devices):
            return [named]
        has = ", ".join(self.devices) or "no GPU"
        raise NeverFits(f"run.device {device}: jobs of this server get {has}; choose another, or auto")

    def _environment(self, needs: Needs, threads: int, devices: tuple[str, ...]) -> dict[str, str]:
        environment = {}
        if threads and not needs.threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        if devices and needs.device in ("auto", "cuda"):
            environment["CUDA_VISIBLE_DEVICES"] = _visible(int(devices[0].partition(":")[2]))
        elif not devices and self._counted:
            environment["CUDA_VISIBLE_DEVICES"] = ""  # whatever else the spec says, in a way that was not understood
        return environment


def read_needs(spec: Path) -> Needs:
    """What a spec declares; the defaults for what it does not say or what cannot be read."""
    text = read_start(spec)
    threads = max((int(found) for found in _THREADS.findall(text)), default=0)
    devices = _DEVICE.findall(text)  # of several merges in one file the last one's counts
    sizes = []
    for found in _MEMORY.findall(text):
        try:
            sizes.append(parse_size(found.decode().strip()))
        except ValueError:  # the worker says so
            continue
    return Needs(max(sizes, default=DECLARED_BYTES), threads, devices[-1].decode() if devices else "auto")


def read_priority(spec: Path) -> int:
    """run.priority of a spec, higher first; 0 if there is none or the file cannot be read."""
    found = _PRIORITY.search(read_start(spec))
    return int(found[1]) if found else 0


def read_start(spec: Path) -> bytes:
    """The first READ_BYTES of a dropped file; nothing of a link, a pipe, or what cannot be read."""
    try:
        descriptor = os.open(spec, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return b""
    with os.fdopen(descriptor, "rb") as file:
        try:
            return file.read(READ_BYTES)
        except OSError:
            return b""


def found_devices() -> tuple[str, ...]:
    """The GPUs that a worker would see: none if torch was built without CUDA."""
    if build_versions()["cuda"] == "none":
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        count = len([one for one in visible.split(",") if one.strip() and one.strip() != "-1"])
    else:
        count = len([name for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name)])
    return tuple(f"cuda:{number}" for number in range(count))


def gib(nbytes: int) -> str:
    """For people."""
    return f"{nbytes / 2**30:.1f} GiB"


def _visible(number: int) -> str:
    """How CUDA_VISIBLE_DEVICES names the device that a worker of ours would see under this number."""
    visible = [one.strip() for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one.strip()]
    return visible[number] if number < len(visible) else str(number)
