"""Idle workers that have loaded what a merge needs, for jobs to start on at once. What they are told: handover.py.

They hold only memory that no job holds. Not here: workers that run a job (process.py, supervisor.py).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mergecore
from service.config import ServeConfig
from service.handover import WAIT, channel, hand_over, has_greeted
from service.metrics import Metrics
from service.process import how_ended, open_log, resident_bytes, worker_environment
from service.resources import WORKER_BYTES, Room
from service.spool import Job

log = logging.getLogger("mergecore.service")

START_PAUSE = 0.5
"""Seconds that a job has the processors to itself before a worker is made in the place of the one that it took."""
DEATH_PAUSE, LONGEST_PAUSE = 1.0, 300.0
"""Seconds before one that died is replaced: twice as many after each death, up to the second number."""
STEADY = 60.0
"""Seconds after which a death counts as the first again."""

Code = tuple[tuple[str, int, int], ...]


@dataclass
class _Idle:
    """A worker that waits, our end of its socket, and the code that it has loaded."""

    process: subprocess.Popen[bytes]
    connection: socket.socket
    code: Code
    started: float
    greeted: bool = False


class Pool:
    """Up to `warm_workers` idle workers of one daemon; none unless the configuration says so."""

    def __init__(self, room: Room, metrics: Metrics, config: ServeConfig) -> None:
        self._room, self._metrics = room, metrics
        self._idle: list[_Idle] = []
        """The oldest first."""
        self._due: list[float] = []
        """When those that are missing are to be started, on the monotonic clock."""
        self._ended: list[subprocess.Popen[bytes]] = []
        """Killed, and perhaps not dead yet."""
        self._deaths = 0
        self.configure(config)

    def configure(self, config: ServeConfig) -> None:
        """Replace all of them by such as this configuration wants, after its room has been configured."""
        self.close()
        self._command = (*config.worker_command, WAIT)
        self._deaths = 0
        self._due = [time.monotonic() + START_PAUSE] * config.warm_workers

    def __len__(self) -> int:
        return len(self._idle)

    def resident_bytes(self) -> int:
        """Resident memory of all of them."""
        return sum(resident_bytes(one.process.pid) for one in self._idle)

    def give(self, job: Job, arguments: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes] | None:
        """A worker that is on this job from now on; None if there is none. It may still be loading. Raises OSError.

        `environment` is what the job's differs in from ours.
        """
        code = _code() if self._idle else ()
        for one in list(self._idle):
            if one.code != code:  # a new process would load what is there now
                log.info("worker %d has loaded code that has changed since; replacing it", one.process.pid)
                self._replace(one)
                continue
            one.greeted = one.greeted or has_greeted(one.connection)
            if not one.greeted:
                continue
            with open_log(job) as output:
                try:
                    descriptors = job.owned.descriptors
                    hand_over(one.connection, arguments, worker_environment(environment), output.fileno(), descriptors)
                except OSError as error:
                    log.warning("worker %d takes no job: %s", one.process.pid, error.strerror)
                    self._replace(one)
                    continue
            self._idle.remove(one)
            one.connection.close()
            self._due.append(time.monotonic() + START_PAUSE)
            return one.process
        return None

    def tend(self) -> None:
        """End those whose memory jobs hold now, and start those that are due."""
        while len(self._idle) > self._most():
            self._replace(self._idle[-1])
        now = time.monotonic()
        for at in sorted(self._due):
            if at > now or len(self._idle) >= self._most():
                break
            self._due.remove(at)
            self._start()

    def next_start(self) -> float:
        """When `tend` has something to start, on the monotonic clock, if no job ends before."""
        return min(self._due, default=float("inf")) if len(self._idle) < self._most() else float("inf")

    def reap(self) -> None:
        """Deal with those that have ended, by themselves or by us."""
        self._ended = [process for process in self._ended if process.poll() is None]
        for one in [one for one in self._idle if one.process.poll() is not None]:
            self._idle.remove(one)
            one.connection.close()
            self._metrics.idle_worker_died()
            self._failed(f"an idle worker ended: {how_ended(one.process.returncode)}", time.monotonic() - one.started)

    def close(self) -> None:
        """End all of them; none is started any more."""
        while self._idle:
            self._end(self._idle[-1])
        self._due = []

    def wait(self) -> None:
        """Wait until those that were ended are dead."""
        for process in self._ended:
            process.wait()
        self._ended = []

    def _most(self) -> int:
        """So many have room beside the jobs."""
        return max(0, self._room.memory - self._room.reserved) // WORKER_BYTES

    def _start(self) -> None:
        ours, theirs = channel()
        with theirs:
            try:
                code = _code()
                process = subprocess.Popen(
                    self._command,
                    stdin=theirs.fileno(),
                    stdout=2,  # what it says while it has no job and no log is the daemon's to tell
                    env=worker_environment(self._room.idle_environment()),
                    start_new_session=True,
                )
            except OSError as error:
                ours.close()
                self._failed(f"cannot start an idle worker: {error}", 0.0)
                return
        self._idle.append(_Idle(process, ours, code, time.monotonic()))

    def _failed(self, what: str, lived: float) -> None:
        self._deaths = 1 if lived >= STEADY else self._deaths + 1
        pause = min(LONGEST_PAUSE, DEATH_PAUSE * 2 ** min(self._deaths - 1, 30))
        log.error("%s; the next one is started in %g s", what, pause)
        self._due.append(time.monotonic() + pause)

    def _replace(self, one: _Idle) -> None:
        self._end(one)
        self._due.append(time.monotonic() + START_PAUSE)

    def _end(self, one: _Idle) -> None:
        """It has nothing to lose; a process that still loads would not see that its socket is closed."""
        self._idle.remove(one)
        one.connection.close()
        one.process.kill()
        self._ended.append(one.process)


def _code() -> Code:
    """What tells whether a process that starts now would load other code: ours, and whatever is installed beside
    torch (a folder changes with each package that is installed or removed)."""
    return tuple(_stamps())


def _stamps() -> Iterator[tuple[str, int, int]]:
    packages = [Path(mergecore.__file__).parent, Path(__file__).parent]
    paths = [path for package in packages for path in package.rglob("*") if path.suffix in (".py", ".so")]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        paths.append(Path(str(importlib.metadata.distribution("torch").locate_file(""))))
    for path in sorted(paths):
        try:
            found = os.stat(path)
        except OSError:  # it is being replaced
            yield str(path), 0, 0
        else:
            yield str(path), found.st_mtime_ns, found.st_size
