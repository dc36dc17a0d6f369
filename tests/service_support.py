"""What the tests of the service share: real daemons, stand-in and real workers, tiny checkpoints."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from service.spool import Spool
from service.status import JobStatus

ROOT = Path(__file__).parent.parent
STAND_IN = (sys.executable, "-P", str(ROOT / "tests" / "stand_in_worker.py"))
DEADLINE = 60.0
"""Seconds after which a test gives up to wait; nothing is decided by how much faster it is."""

LAUNCHER = """
import json, sys
from pathlib import Path
import service.daemon
{prelude}
file = Path(sys.argv[2]) if sys.argv[2:] else None
sys.exit(service.daemon.serve_command(file, json.loads(sys.argv[1])))
"""


def wait_until(condition: Callable[[], Any], what: str, deadline: float = DEADLINE) -> Any:
    """The first true value of `condition`; fails the test if there is none in time."""
    end = time.monotonic() + deadline
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {deadline:g} s for: {what}"
        time.sleep(0.02)
    return value


class DaemonProcess:
    """A real daemon in a process of its own, on SPOOL and OUTPUTS below `folder` unless `config` says where.

    Settings that are not None win over `config_file`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        prelude: str = "",
        environment: dict[str, str] | None = None,
        config_file: Path | None = None,
        **config: Any,
    ):
        folder.mkdir(exist_ok=True)
        self.spool = Spool(Path(config.get("spool", folder / "spool")))
        self.outputs = Path(config.get("outputs", folder / "outputs"))
        self.log_path = folder / f"daemon-{time.monotonic_ns()}.log"
        settings = {
            "spool": str(self.spool.root),
            "outputs": str(self.outputs),
            "port": 0,
            "worker_command": STAND_IN,
            "rescan": 0.5,
            "settle": 0.3,
            "retry_delay": 0.05,
            "memory": "1TiB",
            **config,
        }
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    LAUNCHER.format(prelude=prelude),
                    json.dumps(settings),
                    *([str(config_file)] if config_file else []),
                ],
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
            )
        self.url = ""

    def wait_ready(self) -> DaemonProcess:
        """Wait for the line that tells the port."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], DEADLINE)
        line = self.process.stdout.readline().decode() if ready else ""
        assert line.startswith("listening on http"), f"{line!r}, log: {self.log()}"
        self.url = line.split()[-1]
        return self

    def log(self) -> str:
        """What it logged so far."""
        return self.log_path.read_text()

    def drop(self, name: str, **spec: Any) -> None:
        """Put a spec into the drop folder, whole at once."""
        temporary = self.spool.root / f"{name}.new"
        temporary.write_text(json.dumps(spec))
        os.rename(temporary, self.spool.incoming / name)

    def open_gate(self, name: str = "go") -> None:
        """Let the stand-ins that wait at this gate go on."""
        (self.outputs / name).touch()

    def record(self) -> list[str]:
        """What the stand-ins did, in order."""
        path = self.outputs / "record"
        return path.read_text().splitlines() if path.exists() else []

    def jobs(self, state: str) -> dict[str, JobStatus]:
        """The jobs in a state, by the name of their spec."""
        return {status.spec: status for status in self.spool.jobs() if status.state == state}

    def kill_worker(self, spec: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to the worker of a running job, once its process is known."""
        os.kill(self.worker(spec), number)

    def worker(self, spec: str) -> int:
        """The process of a running job's worker; waits for it, as 0 would be a signal to the tests' own group."""
        return wait_until(
            lambda: status.pid if (status := self.jobs("running").get(spec)) else 0,
            f"the worker of {spec}; log:\n{self.log()}",
        )

    def wait_for(self, state: str, *specs: str) -> dict[str, JobStatus]:
        """Wait until the jobs of all these specs are in `state`."""
        return wait_until(
            lambda: found if set(specs) <= set(found := self.jobs(state)) else None,
            f"{', '.join(specs)} {state}; log:\n{self.log()}",
        )

    def wait_started(self, spec: str, times: int = 1) -> None:
        """Wait until a stand-in has begun with this spec."""
        wait_until(
            lambda: sum(line.startswith(f"start {spec} ") for line in self.record()) >= times, f"start of {spec}"
        )

    def scrape(self) -> str:
        """The text at the metrics port."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            return answer.read().decode()

    def metric(self, line: str) -> float | None:
        """The value of one sample, named as it is printed."""
        for sample in self.scrape().splitlines():
            name, _, value = sample.rpartition(" ")
            if name == line:
                return float(value)
        return None

    def die(self) -> None:
        """Kill it and its workers at once, as a power loss does."""
        processes = [psutil.Process(self.process.pid)]
        with contextlib.suppress(psutil.NoSuchProcess):
            processes += processes[0].children(recursive=True)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(DEADLINE)
        psutil.wait_procs(processes[1:], DEADLINE)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(DEADLINE)


@contextlib.contextmanager
def running_daemon(folder: Path, **options: Any) -> Iterator[DaemonProcess]:
    """A daemon that is ready; afterwards it must end cleanly, unless the test has ended it."""
    daemon = DaemonProcess(folder, **options)
    try:
        yield daemon.wait_ready()
        if daemon.process.poll() is None:
            assert daemon.stop() == 0, daemon.log()
        assert "Traceback" not in daemon.log(), daemon.log()
    finally:
        daemon.process.kill()
        daemon.process.wait()
        if daemon.process.stdout is not None:
            daemon.process.stdout.close()
