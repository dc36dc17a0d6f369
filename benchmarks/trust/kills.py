"""kill -9 of the daemon and its workers: nothing is lost, run twice, or different."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from benchmarks.trust.daemon import Daemon, visible, wait
from service.spool import LOG, Spool
from service.status import JobStatus, read_status

METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.5},
    "task_arithmetic": {"weight": 0.5},
    "ties": {"weight": 0.5, "density": 0.5},
    "dare_linear": {"weight": 0.5, "density": 0.5},
    "widen": {},
}


def spec_of(method: str, output: str) -> dict[str, Any]:
    """A merge of the tiny checkpoints."""
    spec: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": "tuned"}, {"model": "pretrained"}],
        "parameters": METHODS[method],
        "dtype": "bfloat16",
        "run": {"output": output, "threads": 1},
    }
    return spec if method == "linear" else {**spec, "base_model": "base"}


def digest(output: Path) -> str:
    """One checksum of all weights of a model."""
    total = hashlib.sha256()
    for path in sorted(output.glob("*.safetensors")):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


def undisturbed(work: Path, models: Path) -> dict[str, str]:
    """The checksum of each method's merge without any daemon."""
    from mergecore import load_spec, merge

    digests = {}
    for method in METHODS:
        out = work / "undisturbed" / method
        merge(load_spec(spec_of(method, "out")), out, resolve=lambda name, revision: models / name)
        digests[method] = digest(out)
    return digests


def kills(work: Path, count: int, jobs: int, seed: int) -> dict[str, Any]:
    """kill -9 at random moments; new jobs are dropped so that there is always something to kill."""
    from benchmarks.checkpoints import GEOMETRIES, make

    daemon = Daemon(work, jobs=2, attempts=1_000_000, retry_delay=0.1, rescan=0.2, stop_timeout=30.0)
    make(daemon.models, GEOMETRIES["tiny"])
    expected = undisturbed(work, daemon.models)
    daemon.spool.prepare()
    random_ = random.Random(seed)
    methods = list(METHODS)
    dropped: dict[str, str] = {}

    def drop() -> None:
        method = methods[len(dropped) % len(methods)]
        name = f"{len(dropped):05d}"
        dropped[f"{name}.yaml"] = method
        daemon.drop(f"{name}.yaml", json.dumps(spec_of(method, name)).encode())

    for _ in range(jobs):
        drop()
    killed: collections.Counter[str] = collections.Counter()
    started = time.monotonic()
    daemon.start()
    while killed.total() < count:
        time.sleep(random_.uniform(0.05, 4.0))
        if daemon.process.poll() is not None:
            raise RuntimeError(f"the daemon ended: {daemon.log.read_text()[-2000:]}")
        while len(visible(daemon.spool.incoming)) < 2:
            drop()
        if daemon.ended() * count < jobs * (killed.total() - 8):
            continue  # spread over all jobs, also where a merge takes longer than the time between kills
        if random_.random() < 0.4:
            daemon.kill()
            killed["daemon"] += 1
            daemon.start()
            continue
        running = (read_status(daemon.spool.running / name) for name in visible(daemon.spool.running))
        workers = [status.pid for status in running if status.pid and is_worker(status)]
        if workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(random_.choice(workers), signal.SIGKILL)
                killed["worker"] += 1
    wait(lambda: daemon.ended() >= len(dropped), 30 * len(dropped), "the rest of the jobs")
    seconds = time.monotonic() - started
    daemon.stop()

    found = collections.Counter(status.spec for status in daemon.spool.jobs())
    done = {status.spec: status for status in daemon.spool.jobs() if status.state == "done"}
    different = [name for name in done if digest(daemon.outputs / name[:5]) != expected[dropped[name]]]
    attempts = sum(status.attempts for status in done.values())
    resumed = sum(bool(status.result.get("resumed")) for status in done.values())
    bad = len(dropped) - len(done) + len(different)
    twice = sum(completions(daemon.spool, status) > 1 for status in done.values())
    left = [name for name in os.listdir(daemon.outputs) if name.startswith(".")]
    return {
        "kills of the daemon": killed["daemon"],
        "kills of workers": killed["worker"],
        "jobs": len(dropped),
        "attempts": attempts,
        "resumed from a journal": resumed,
        "jobs lost or not done": len(dropped) - len(done),
        "jobs in two folders": sum(number > 1 for number in found.values()),
        "jobs run twice to completion": twice,
        "outputs that differ": len(different),
        "partial outputs left": len(left),
        "seconds": round(seconds, 1),
        "ok": not (bad or twice or left or any(number > 1 for number in found.values())),
    }


def is_worker(status: JobStatus) -> bool:
    """Whether the process that the status names still is the job's worker."""
    with contextlib.suppress(OSError):
        return status.job.encode() in Path(f"/proc/{status.pid}/cmdline").read_bytes()
    return False


def completions(spool: Spool, status: JobStatus) -> int:
    """How often the job's log says that a whole merge was published."""
    log = (spool.done / status.job / LOG).read_text(errors="replace")
    return log.count(" INFO done: ") - log.count("an earlier attempt had published it")
