"""What the tests of leases share: clocks turned by hand, daemons with short leases, a merge that waits half-way."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from service import leases
from service import spool as spool_module
from tests.models import LLAMA, llama, moved, write_model
from tests.service_support import DaemonProcess, running_daemon, wait_until

SECONDS = 3.0
GATED = """
import sys, time
from pathlib import Path
import service.worker as worker
outputs = Path(sys.argv[sys.argv.index("--outputs") + 1])
report, install, stops = worker.Reporter.progress, worker.Stop.install, []

def progress(self, now):
    report(self, now)
    while now.tensors_done >= 3 and not (outputs / "go").exists() and not stops[0].requested:
        time.sleep(0.01)

def remembered(self):
    stops.append(self)
    install(self)

worker.Reporter.progress, worker.Stop.install = progress, remembered
sys.exit(worker.main())
"""


class Clocks:
    """The clocks of one host, turned by hand; they may have begun at any time."""

    owner, observer = 1000.0, 7e6

    def sleep(self, seconds: float) -> None:
        """Time goes on for all."""
        self.owner += seconds
        self.observer += seconds


def turned_by_hand(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    clocks = Clocks()
    monkeypatch.setattr(leases, "owner_clock", lambda: clocks.owner)
    monkeypatch.setattr(spool_module, "owner_clock", lambda: clocks.owner)
    monkeypatch.setattr(leases, "observer_clock", lambda: clocks.observer)
    return clocks


def leased_daemon(folder: Path, **options: Any) -> Any:
    return running_daemon(folder, **{"ownership": "leases", "lease_seconds": SECONDS, "rescan": 0.2, **options})


def write_models(folder: Path) -> Path:
    """Two small models; the folder that they lie in."""
    tensors = llama(hidden=16, vocabulary=24)
    for i, name in enumerate("ab"):
        write_model(folder / "models" / name, moved(tensors, 1e-3, i), {**LLAMA, "num_hidden_layers": 2})
    return folder / "models"


def spec(output: str = "out") -> dict[str, Any]:
    entries = [{"model": name, "parameters": {"weight": 0.5}} for name in "ab"]
    return {"merge_method": "linear", "models": entries, "dtype": "bfloat16", "run": {"output": output}}


def digest(output: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.glob("*.safetensors")}


def process_of(daemon: DaemonProcess, attempt: int = 1) -> psutil.Process:
    """The worker of this attempt, in the middle of its merge."""

    def half_way() -> int:
        status = daemon.jobs("running").get("a.yaml")
        begun = status is not None and status.attempts == attempt and status.progress.get("tensors_done", 0) >= 3
        return status.pid if status is not None and begun else 0

    return psutil.Process(wait_until(half_way, f"the middle of the merge; log: {daemon.log()}"))


def gated(folder: Path, models: Path, code: str = GATED) -> dict[str, Any]:
    """Options of a daemon whose workers wait in the middle of a merge, until its gate is open."""
    worker = folder / "worker.py"
    worker.write_text(code)
    return {"worker_command": [sys.executable, "-P", str(worker)], "models": [str(models)]}
