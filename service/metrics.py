"""The daemon's Prometheus metrics; endpoint.py serves them.

Every label is bounded: `method` is one of METHODS, `job` exists only while the job runs. Counters count what this
daemon's workers did since it started; they never go down.
"""

from __future__ import annotations

import importlib.metadata
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from mergecore import __version__
from service.host import free_and_size, memory_limit
from service.status import JobStatus

if TYPE_CHECKING:
    from service.resources import Room

METHODS = (
    "adamerging",
    "arcee_fusion",
    "breadcrumbs",
    "breadcrumbs_ties",
    "consensus_ta",
    "consensus_ties",
    "dam",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "fisher",
    "iso_c",
    "karcher",
    "linear",
    "lines",
    "metagpt",
    "magmax",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "passthrough",
    "pcb",
    "ram",
    "ramplus_tl",
    "regmean",
    "sce",
    "slerp",
    "slta",
    "task_arithmetic",
    "ties",
    "tsv",
    "widen",
)
"""The values of the label `method`, besides "other" and "unknown" (the spec could not be read)."""

STATES = ("done", "duplicate", "failed", "cancelled", "interrupted")
DURATIONS = (1, 5, 15, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800)


class Metrics:
    """All metrics in a registry of their own."""

    def __init__(self) -> None:
        prometheus_client.disable_created_metrics()
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry, "namespace": "mergecore"}
        self._jobs = Counter("jobs", "Jobs that ended, by final state and merge method.", ["state", "method"], **own)
        self._queue = Gauge("queue_jobs", "Specs that wait in the drop folder.", **own)
        self._running = Gauge("running_jobs", "Jobs that have a worker.", **own)
        self._warm = Gauge("warm_workers", "Idle workers that wait for a job.", **own)
        self._starts = Counter(
            "worker_starts", "Jobs that were started, on a warm worker or on a new (cold) one.", ["worker"], **own
        )
        self._idle_deaths = Counter("warm_worker_deaths", "Idle workers that ended without being told to.", **own)
        self._paused = Gauge("paused", "1 while the spool is paused.", **own)
        self._duration = Histogram(
            "job_duration_seconds",
            "Time that workers spent on a job, over all its attempts, observed when it is done or failed.",
            buckets=DURATIONS,
            **own,
        )
        self._tensors = Counter("tensors", "Tensors merged.", **own)
        self._read = Counter("read_bytes", "Bytes of model weights read.", **own)
        self._written = Counter("written_bytes", "Bytes of merged weights written.", **own)
        self._progress = Gauge("job_progress_ratio", "Part of a running job that is done, from 0 to 1.", ["job"], **own)
        self._resident = Gauge("worker_resident_bytes", "Resident memory of all workers together, idle too.", **own)
        self._last_success = Gauge(
            "last_success_timestamp_seconds", "Unix time at which a job was last done; 0 if none was.", **own
        )
        self._memory = Gauge("memory_budget_bytes", "Memory that jobs may be granted together.", **own)
        self._reserved = Gauge("memory_reserved_bytes", "Memory that the running jobs were granted.", **own)
        self._devices = Gauge("device_jobs", "Jobs that may use a GPU at once.", **own)
        self._devices_reserved = Gauge("device_jobs_reserved", "Running jobs that were granted a GPU.", **own)
        limit = Gauge("memory_limit_bytes", "Memory of the host, or of the cgroup that the daemon is in.", **own)
        limit.set_function(memory_limit)
        self._free = Gauge("filesystem_free_bytes", "Free space where a folder lies.", ["folder"], **own)
        self._size = Gauge("filesystem_size_bytes", "All space where a folder lies.", ["folder"], **own)
        build = Gauge("build_info", "Always 1; the versions are in the labels.", ["version", "torch", "cuda"], **own)
        build.labels(**build_versions()).set(1)
        ProcessCollector(registry=self.registry)
        # A series that first appears with its first failure has no increase that an alert could see.
        for state in STATES:
            for method in (*METHODS, "other", "unknown"):
                self._jobs.labels(state, method)
        for worker in ("warm", "cold"):
            self._starts.labels(worker)
        self._seen: dict[str, dict[str, float]] = {}

    def queue(self, jobs: int) -> None:
        """Set the number of specs that wait."""
        self._queue.set(jobs)

    def state(self, running: int, warm: int, paused: bool) -> None:
        """Set how many jobs have a worker, how many workers wait for a job, and whether the spool is paused."""
        self._running.set(running)
        self._warm.set(warm)
        self._paused.set(paused)

    def reserved(self, room: Room) -> None:
        """Set what jobs may hold, and what the running ones do: bytes, and places on GPUs."""
        self._memory.set(room.memory)
        self._reserved.set(room.reserved)
        self._devices.set(room.places)
        self._devices_reserved.set(room.places_held)

    def watch(self, **folders: Path) -> None:
        """Show the space of these folders from now on. It is looked up at each scrape, in the thread of the scrape: a
        network mount that hangs does not stop the daemon."""
        for name, folder in folders.items():
            self._free.labels(name).set_function(partial(_space, folder, 0))
            self._size.labels(name).set_function(partial(_space, folder, 1))

    def resident(self, nbytes: int) -> None:
        """Set the resident memory of all workers together."""
        self._resident.set(nbytes)

    def succeeded(self, timestamp: float) -> None:
        """Set the time of the last success, in Unix seconds."""
        self._last_success.set(timestamp)

    def idle_worker_died(self) -> None:
        """A worker that waited has ended."""
        self._idle_deaths.inc()

    def started(self, job: str, warm: bool = False) -> None:
        """A worker begins with a job, whose progress starts from nothing; it was `warm` if it had waited."""
        self._starts.labels("warm" if warm else "cold").inc()
        self._seen[job] = {}
        self._progress.labels(job).set(0)

    def progressed(self, job: str, status: JobStatus) -> None:
        """Count what a running job did since the last call. What does not look like a number is passed over."""
        seen = self._seen.get(job)
        if seen is None:
            return
        for counter, key in (
            (self._tensors, "tensors_done"),
            (self._read, "bytes_read"),
            (self._written, "bytes_written"),
        ):
            value = _number(status.progress.get(key))
            already = _number(status.progress.get(f"{key}_before"))  # by an earlier attempt
            value = max(0.0, value - already)
            if value > seen.get(key, 0.0):
                counter.inc(value - seen.get(key, 0.0))
                seen[key] = value
        self._progress.labels(job).set(min(1.0, max(0.0, _number(status.progress.get("ratio")))))

    def ended(self, job: str, state: str, method: str, seconds: float) -> None:
        """A worker is through with a job; `state` is "interrupted" if the job will be resumed."""
        if self._seen.pop(job, None) is not None:
            self._progress.remove(job)
        self._jobs.labels(state, method_label(method)).inc()
        if state != "interrupted":
            self._duration.observe(seconds)


def method_label(method: str) -> str:
    """The bounded value of the label `method`."""
    if not method:
        return "unknown"
    return method if method in METHODS else "other"


def build_versions() -> dict[str, str]:
    """The labels of build_info, read from what is installed: nothing is imported."""
    return {"version": __version__, "torch": _version("torch"), "cuda": _cuda_version()}


def _space(folder: Path, which: int) -> float:
    """Free (0) or all (1) bytes; NaN where the folder is away."""
    try:
        return free_and_size(folder)[which]
    except OSError:
        return float("nan")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _cuda_version() -> str:
    """The CUDA version that torch was built for, from its version.py; "none" for a CPU build."""
    try:
        source = Path(str(importlib.metadata.distribution("torch").locate_file("torch/version.py"))).read_text()
    except (importlib.metadata.PackageNotFoundError, OSError):
        return "none"
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"]([0-9.]+)['\"]", source, re.MULTILINE)
    return found[1] if found else "none"


def _number(value: object) -> float:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
    return float(value) if usable else 0.0  # type: ignore[arg-type]
