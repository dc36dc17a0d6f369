"""A worker process as the daemon sees it: started, watched, stopped. What it does inside: worker.py; idle: pool.py."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from mergecore.errors import Interrupted
from service.spool import DAEMON_PID, LOG, Job
from service.status import JobStatus

IDLE_SHARE = 0.01
"""A worker that uses less than this share of one processor computes nothing; its heartbeat alone uses a tenth."""
ABORT_TIME = 10.0
"""Seconds that a hung worker gets to write its traceback."""


class Worker:
    """A running worker process and the job that it runs."""

    def __init__(self, job: Job, process: subprocess.Popen[bytes]) -> None:
        self.job, self.process = job, process
        self.started = time.monotonic()
        self.cancelled = self.hung = self.killed = False
        """What we did to it, and why."""
        self._kill_at = float("inf")
        self._moved, self._cpu, self._seen = self.started, 0.0, (JobStatus().progress, 0)

    def stop(self, timeout: float) -> None:
        """Ask it to keep its work and end; it is killed if it has not done so after `timeout` seconds."""
        self.process.terminate()
        self._kill_at = min(self._kill_at, time.monotonic() + timeout)

    def abort(self) -> None:
        """Have it write the tracebacks of its threads into the log and die."""
        self.hung = True
        self.process.send_signal(signal.SIGABRT)
        self._kill_at = min(self._kill_at, time.monotonic() + ABORT_TIME)

    def kill(self) -> None:
        """Kill it, with what it started."""
        self.killed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def overdue(self) -> bool:
        """Whether its time to end is up, and it was not killed yet."""
        return not self.killed and time.monotonic() >= self._kill_at

    def idle_seconds(self, status: JobStatus) -> float:
        """Seconds since it last finished a window, used a processor, or read from a disk.

        Each time counts from the call that saw the change; so call it regularly.
        """
        now, cpu = time.monotonic(), _cpu_seconds(self.process.pid)
        seen = (status.progress, _read_bytes(self.process.pid))
        if seen != self._seen or cpu - self._cpu > IDLE_SHARE * (now - self._moved):
            self._moved, self._cpu, self._seen = now, cpu, seen
        return now - self._moved

    def died(self) -> bool:
        """Whether it ended without having said anything about the merge: by a signal, or stopped without our asking."""
        return self.process.returncode < 0 or self.process.returncode == Interrupted.exit_code

    def why_ended(self) -> str:
        """How it ended, for people."""
        code = self.process.returncode
        if self.hung:
            return "the worker hung (no progress and no CPU time); the tracebacks of its threads are in the log"
        if code == Interrupted.exit_code:
            return "the worker was told to stop, but not by the daemon"
        if code >= 0:
            return f"worker ended with exit code {code} and no report"
        return f"worker was {how_ended(code)}"


def start(
    job: Job, command: Sequence[str], arguments: Sequence[str], environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """A new process on a job; `environment` has what it does not inherit from us. Raises OSError."""
    with open_log(job) as output:
        return subprocess.Popen(
            [*command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=worker_environment(environment),
            pass_fds=job.owned.descriptors,  # a locked job stays owned while the worker lives, also without us
            start_new_session=True,
        )


def open_log(job: Job) -> BinaryIO:
    """What a job's worker says goes to the end of this file. Raises OSError."""
    return open(job.folder / LOG, "ab", opener=_no_link)


def how_ended(code: int) -> str:
    """What a process's return code says, for people."""
    if code >= 0:
        return f"exit code {code}"
    if -code == signal.SIGKILL:
        return "killed by signal 9: likely out of memory; see dmesg"
    name = ""
    with contextlib.suppress(ValueError):
        name = f" ({signal.Signals(-code).name})"
    return f"killed by signal {-code}{name}"


def resident_bytes(pid: int) -> int:
    """Resident memory of a process; 0 when it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_bytes().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _cpu_seconds(pid: int) -> float:
    """User and system time of all threads."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return 0.0


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o644)


def _read_bytes(pid: int) -> int:
    """What it made the disks read, also through mappings; 0 where that cannot be told."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)
    except (OSError, IndexError, ValueError):
        return 0


def package_environment() -> dict[str, str]:
    """This process's environment, in which Python finds this package wherever the process was started."""
    package = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def worker_environment(differing: Mapping[str, str]) -> dict[str, str]:
    """A worker's: ours, without what concerns only us, and with what differs."""
    ours = {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}
    environment = {key: value for key, value in package_environment().items() if key not in ours}
    environment["PYTHONUNBUFFERED"] = "1"
    # Models are read from this machine and nowhere else; what the libraries would fetch or report stays off.
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment[DAEMON_PID] = str(os.getpid())
    return {**environment, **differing}
