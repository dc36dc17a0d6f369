"""The jobs that this daemon owns: taken over, started, watched, ended. What a job is and how it moves: spool.py.

When this happens is the main loop's to decide (daemon.py), what a job may hold resources.py's; what a worker does:
worker.py; workers that wait for a job: pool.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

from mergecore.printable import printable
from service import process
from service.clock import SteadyDate
from service.complaints import Complaints
from service.config import ServeConfig
from service.durable import dated, utc_now, write_atomic
from service.leases import token_of
from service.metrics import Metrics
from service.pool import Pool
from service.process import Worker, resident_bytes
from service.resources import Grant, Needs, NeverFits, Room, gib, read_needs
from service.spool import ERROR, LOG, MORE_MEMORY, SPEC, Job, Spool
from service.status import read_status

log = logging.getLogger("mergecore.service")


class Supervisor:
    """Owns jobs, their workers and what these hold of the host."""

    def __init__(
        self, spool: Spool, metrics: Metrics, config: ServeConfig, date: SteadyDate, complaints: Complaints
    ) -> None:
        self.spool, self.metrics, self.config = spool, metrics, config
        self.room = Room(config)
        self.pool = Pool(self.room, metrics, config)
        self.workers: dict[str, Worker] = {}
        self.stopping = False
        """The daemon ends: workers that stop have been told to."""
        self.halted = False
        """Nothing may be started: paused, draining, stopping."""
        self.left_behind = ""
        """Why a job that was found in running/ cannot go on yet."""
        self._rests = ""
        """Why one of ours that is to be started again cannot be yet."""
        self.unfinished: list[tuple[Job, str, dict[str, Any]]] = []
        """Jobs that ended but could not be moved: a full disk, a vanished mount. Tried again at each rescan."""
        self._resting: dict[str, tuple[float, Job]] = {}
        """Jobs of ours whose worker died, and when they are to be started again, on the monotonic clock."""
        self._date, self._complaints = date, complaints

    def configure(self, config: ServeConfig) -> None:
        """For what starts from now on."""
        self.config = config
        self.room.configure(config)
        self.pool.configure(config)

    @property
    def holds_up(self) -> str:
        """Why a job that has begun, and so comes before all that wait, cannot go on yet; empty if there is none."""
        return self.left_behind or self._rests

    def next_start(self) -> float:
        """When a resting job is to be started again, on the monotonic clock."""
        return min((at for at, _ in self._resting.values()), default=float("inf"))

    # --- owning ---

    def adopt(self) -> None:
        """Go on with jobs that a dead daemon, or an interrupted worker of ours, left in running/. Raises OSError."""
        own = {*self.workers, *self._resting, *(job.name for job, _, _ in self.unfinished)}
        self.left_behind = ""
        for job in self.spool.adopt(own, self._can_start):
            try:
                self._take_over(job)
                self._complaints.over(self.spool.running / job.name)
            except OSError as error:
                job.release()
                self._complaints.make(
                    self.spool.running / job.name, "job %s: cannot be taken over: %s; trying again", job.name, error
                )

    def _can_start(self, folder: Path) -> bool:
        """Whether a job in running/ could be started now, or fails because it never can."""
        if self.halted or self.left_behind:
            return False
        with contextlib.suppress(NeverFits):
            answer = self.room.ask(_needs(folder))
            if isinstance(answer, str):
                self.left_behind = answer
                return False
        return True

    def claim(self, name: str, needs: Needs) -> str:
        """Claim incoming/NAME and start it; why it has to wait, empty if it has gone. Raises OSError."""
        with contextlib.suppress(NeverFits):
            answer = self.room.ask(needs)
            if isinstance(answer, str):
                return answer
        job = self.spool.claim(name)
        if job is not None:
            log.info("job %s: claimed %s", job.name, printable(name))
            self._start_if_granted(job)
        return ""

    def start_rested(self) -> None:
        """Start again what died and has waited long enough, the one that waits longest first."""
        self._rests = ""
        for name, (at, job) in sorted(self._resting.items(), key=lambda item: item[1][0]):
            if self.halted or time.monotonic() < at:
                return
            del self._resting[name]
            self._rests = self._start_if_granted(job)
            if self._rests:
                self._resting[name] = (at, job)
                return

    def _take_over(self, job: Job) -> None:
        """Finish or resume a job that has just become ours. Raises OSError."""
        outcome = job.outcome()
        if outcome is not None:
            status = job.status()
            log.info("job %s: taken over; its worker had ended: %s", job.name, outcome)
            self.metrics.ended(job.name, outcome, status.method, status.seconds)
            if outcome == "done":
                self.metrics.succeeded(time.time())
            self._finish(job, outcome)
        elif job.cancellation() is not None:
            self._cancelled(job)
        elif self.halted or self.left_behind:
            job.release()
        else:
            self.left_behind = self._start_if_granted(job, "taken over; resuming")
            if self.left_behind:
                job.release()

    def keep(self) -> float:
        """Renew the leases, and kill the workers of jobs whose lease is lost; when to do so again, on the monotonic
        clock."""
        again = float("inf")
        for worker in self.workers.values():
            again = min(again, worker.job.owned.renew())
            if worker.job.owned.lost and not worker.killed:
                log.error("job %s: its lease was not renewed in time; killing its worker", worker.job.name)
                worker.kill()
        for job in (*(job for _, job in self._resting.values()), *(job for job, _, _ in self.unfinished)):
            again = min(again, job.owned.renew())
        self._resting = {name: (at, job) for name, (at, job) in self._resting.items() if not job.owned.lost}
        self.unfinished = [one for one in self.unfinished if not one[0].owned.lost]
        return time.monotonic() + again

    # --- starting ---

    def _start_if_granted(self, job: Job, saying: str = "") -> str:
        """Start a job of ours; why it has to wait. One that can never run here fails."""
        try:
            answer = self.room.ask(_needs(job.folder))
        except NeverFits as error:
            log.error("job %s: failed: %s", job.name, error)
            status = job.status()
            self.metrics.ended(job.name, "failed", status.method, status.seconds)
            self._finish(job, "failed", error=str(error))
            return ""
        if isinstance(answer, str):
            return answer
        if saying:
            log.info("job %s: %s", job.name, saying)
        self._start(job, answer)
        return ""

    def _start(self, job: Job, grant: Grant) -> None:
        """Start a worker on a job that we own. If no process can be had, the job waits for the next rescan."""
        try:
            status = job.status()
            job.update(
                state="running",
                host=socket.gethostname(),
                started=status.started or utc_now(),
                attempts=status.attempts + 1,
                lease=token_of(job.folder),
                heartbeat=utc_now(),
                progress={},
                error="",
            )
            arguments = self._arguments(job, grant)
            warm = self.pool.give(job, arguments, grant.environment)
            started = warm or process.start(job, self.config.worker_command, arguments, grant.environment)
        except OSError as error:
            if os.path.exists(job.folder) or not os.path.isdir(self.spool.running):
                log.error("job %s: cannot start a worker: %s; trying again later", job.name, error)
            else:
                log.error("job %s: cannot be run: somebody removed its folder", job.name)
            job.release()
            return
        self.workers[job.name] = Worker(job, started)
        self.room.held[job.name] = grant
        self.metrics.started(job.name, warm=warm is not None)
        log.info("job %s: worker %d started%s", job.name, started.pid, " (it waited)" if warm else "")

    def _arguments(self, job: Job, grant: Grant) -> list[str]:
        arguments = [str(job.folder), "--outputs", str(self.config.outputs)]
        for folder in self.config.models:
            arguments += ["--models", str(folder)]
        arguments += ["--memory", str(grant.memory)]
        return [*arguments, "--allow-commands"] if self.config.allow_commands else arguments

    # --- watching ---

    def cancel(self) -> None:
        """End those of our jobs that somebody wants cancelled."""
        for worker in self.workers.values():
            if not worker.cancelled and worker.job.cancellation() is not None:
                log.info("job %s: cancelled; stopping its worker", worker.job.name)
                worker.cancelled = True
                worker.stop(self.config.stop_timeout)
        for name, (_, job) in list(self._resting.items()):
            if job.cancellation() is not None:
                del self._resting[name]
                self._cancelled(job)

    def refresh(self) -> None:
        """Look how the running workers fare; end those that hang, and those that were to end and did not."""
        for worker in self.workers.values():
            status = worker.job.status()
            self.metrics.progressed(worker.job.name, status)
            idle = worker.idle_seconds(status)
            if not worker.hung and idle >= self.config.stall_seconds:
                log.error("job %s: worker hangs: no progress and no CPU time for %.0f s", worker.job.name, idle)
                worker.abort()
        self.kill_overdue()
        running = sum(resident_bytes(worker.process.pid) for worker in self.workers.values())
        self.metrics.resident(running + self.pool.resident_bytes())

    def kill_overdue(self, *, all_of_them: bool = False) -> None:
        """Kill the workers whose time to stop is up."""
        for worker in self.workers.values():
            if worker.overdue() or (all_of_them and not worker.killed):
                log.warning("job %s: worker did not stop, killing it", worker.job.name)
                worker.kill()

    def stop(self) -> None:
        """Have all workers keep their work and end."""
        self.stopping = self.halted = True
        self.pool.close()
        for worker in self.workers.values():
            worker.stop(self.config.stop_timeout)

    # --- ending ---

    def reap(self) -> bool:
        """Deal with the workers that have ended; whether there was one."""
        self.pool.reap()
        ended = [worker for worker in self.workers.values() if worker.process.poll() is not None]
        for worker in ended:
            del self.workers[worker.job.name]
            self._ended(worker, self.room.held.pop(worker.job.name))
        return bool(ended)

    def release_all(self) -> None:
        """Whatever ended the loop: no worker stays behind unseen, nothing is owned on."""
        self.pool.close()
        self.pool.wait()
        for worker in self.workers.values():
            worker.kill()
            worker.process.wait()
            worker.job.release()
        self.workers.clear()
        self.room.held.clear()
        self.retry_unfinished()
        for job in (*(job for job, _, _ in self.unfinished), *(job for _, job in self._resting.values())):
            job.release()

    def retry_unfinished(self) -> None:
        """Move what could not be moved when it ended."""
        unfinished, self.unfinished = self.unfinished, []
        for job, state, changes in unfinished:
            self._finish(job, state, **changes)

    def _ended(self, worker: Worker, grant: Grant) -> None:
        job, code = worker.job, worker.process.returncode
        status = job.status()
        self.metrics.progressed(job.name, status)
        status.seconds += time.monotonic() - worker.started
        if job.owned.lost:
            log.error("job %s: no longer ours", job.name)
            self.metrics.ended(job.name, "interrupted", status.method, status.seconds)
            return
        changes: dict[str, Any] = {"seconds": round(status.seconds, 3), "pid": 0, "resident_bytes": 0}
        if code == 0 or status.result:
            if code != 0:
                log.warning("job %s: worker ended with %d after the merge was complete", job.name, code)
            state = status.success
            if state == "done":
                self.metrics.succeeded(time.time())
            changes["progress"] = {**status.progress, "ratio": 1.0}
        elif code == MORE_MEMORY and status.memory > grant.memory:
            state = "interrupted"
            self.left_behind = f"needs {gib(status.memory)} by its plan"  # it is taken up again, and asks for them
        elif not worker.died():
            state, changes["error"] = "failed", status.error or worker.why_ended()
        elif worker.cancelled:
            state = "cancelled"
        elif self.stopping:
            state = "interrupted"
        else:
            state, changes["deaths"], changes["error"] = self._judged(worker, status.deaths + 1)
        self.metrics.ended(job.name, state, status.method, status.seconds)
        error = changes.get("error")
        level = logging.ERROR if error else logging.INFO
        log.log(level, "job %s: %s after %.1f s%s", job.name, state, status.seconds, f": {error}" if error else "")
        if state != "interrupted":
            self._finish(job, state, **changes)
            return
        with contextlib.suppress(OSError):  # that nobody owns it tells the same
            job.update(state=state, **changes)
        if error:
            pause = self.config.retry_delay * 2 ** (changes["deaths"] - 1)
            self._resting[job.name] = (time.monotonic() + pause, job)
        else:
            job.release()

    def _judged(self, worker: Worker, deaths: int) -> tuple[str, int, str]:
        """(state, deaths, error) of a job whose worker has died: it gets another attempt, or fails."""
        why, attempts = worker.why_ended(), self.config.attempts
        if deaths < attempts:
            return "interrupted", deaths, f"{why}; attempt {deaths} of {attempts}"
        kept = f"what was finished is kept: mergecore retry {worker.job.name}"
        return "failed", deaths, f"{why}; attempt {deaths} of {attempts}, the last; {kept}"

    def _cancelled(self, job: Job) -> None:
        """End a job of ours that has no worker."""
        status = job.status()
        log.info("job %s: cancelled", job.name)
        self.metrics.ended(job.name, "cancelled", status.method, status.seconds)
        self._finish(job, "cancelled")

    def _finish(self, job: Job, state: str, **changes: Any) -> None:
        """Move an ended job to done/ or failed/; if that cannot be done now, keep it and try again."""
        changes.setdefault("finished", dated(self._date.now()))  # retention goes by it
        try:
            if state == "cancelled":
                job.cancel(by=job.cancellation() or "somebody", finished=changes["finished"])
                return
            if state == "failed" and not (job.folder / ERROR).exists():
                paragraph = changes.get("error") or job.status().error or "the worker left no report"
                text = f"{paragraph}\n\nThe end of the worker's log:\n{_log_tail(job.folder / LOG)}"
                write_atomic(job.folder / ERROR, text)
            job.finish(state, **changes)
        except OSError as error:
            if os.path.isdir(self.spool.running) and not os.path.exists(job.folder):
                log.error("job %s: %s, but somebody removed its folder", job.name, state)
                job.release()
                return
            log.error("job %s: cannot move it to %s/: %s; trying again", job.name, state, error)
            self.unfinished.append((job, state, changes))


def _needs(folder: Path) -> Needs:
    """What the job in this folder asks for, by its spec and what is known of its plan."""
    return read_needs(folder / SPEC).at_least(read_status(folder).memory)


def _log_tail(path: Path, nbytes: int = 4096) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - nbytes))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return "(none)\n"
