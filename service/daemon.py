"""The merge daemon: startup, main loop, shutdown. Claims specs from the spool and runs a worker process for each.

The daemon opens no spec and no model, so nothing that is dropped can bring it down, and it needs no torch. What a job
is and how it moves: spool.py. Which file is next: incoming.py. What a worker does: worker.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from watchdog.events import (
    FileClosedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers.inotify import InotifyObserver

from mergecore.errors import MergecoreError
from mergecore.printable import PrintableFormatter, printable
from service import retention, systemd
from service.clock import SteadyDate
from service.commands import status_command, submit_command
from service.config import FIXED, ServeConfig, load_config
from service.endpoint import Endpoint
from service.incoming import Incoming, is_spec
from service.metrics import Metrics
from service.process import Worker
from service.spool import ERROR, LOG, Job, ServiceError, Spool, dated, make_folder, utc_now, write_atomic

__all__ = ["Daemon", "ServeConfig", "load_config", "serve", "serve_command", "status_command", "submit_command"]

log = logging.getLogger("mergecore.service")

WATCHED_EVENTS: list[type[FileSystemEvent]] = [FileClosedEvent, FileMovedEvent, FileModifiedEvent]
CONTROL_EVENTS: list[type[FileSystemEvent]] = [FileMovedEvent, FileDeletedEvent]
REFRESH = 1.0
"""Seconds between two looks at the progress of running workers, and between two scans while no worker is free."""
SCAN_PAUSE = 0.1
"""Seconds between two scans however many events come."""
LONGEST_WAIT = 3600.0
RETENTION_PAUSE = 60.0
"""Seconds between two looks at what need not be kept."""
SWITCH_INTERVAL = 0.0005
"""Seconds after which the loop makes way for another thread. An answer of the metrics port takes dozens of turns: with
Python's 5 ms it would take more than 100 ms while the loop looks at 10,000 new files."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def serve_command(config_file: Path | None, overrides: dict[str, Any]) -> int:
    """Run the daemon until a signal stops it; the exit code. Errors are printed as one clear line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])

    sys.setswitchinterval(SWITCH_INTERVAL)

    def load() -> ServeConfig:
        return load_config(config_file, overrides)

    try:
        return serve(load(), load)
    except MergecoreError as error:
        print(f"mergecore serve: {printable(str(error))}", file=sys.stderr)
        return error.exit_code


def serve(config: ServeConfig, reload: Callable[[], ServeConfig] | None = None) -> int:
    """Run the daemon in the main thread until SIGTERM or SIGINT; 0. Raises ServiceError if it cannot start.

    At SIGHUP it takes the configuration that `reload` gives.
    """
    return Daemon(config, reload).run()


class Daemon:
    """One daemon on one spool. Several may share a spool, also on several hosts: the job locks keep them apart."""

    def __init__(self, config: ServeConfig, reload: Callable[[], ServeConfig] | None = None) -> None:
        self.config = config
        self._load = reload or (lambda: config)
        self._reload = False
        self.spool = Spool(config.spool)
        self.incoming = Incoming(self.spool.incoming, config.settle)
        self.metrics = Metrics()
        self.workers: dict[str, Worker] = {}
        self._resting: dict[str, tuple[float, Job]] = {}
        """Jobs of ours whose worker died, and when they are to be started again, on the monotonic clock."""
        self._unfinished: list[tuple[Job, str, dict[str, Any]]] = []
        """Jobs that ended but could not be moved: a full disk, a vanished mount. Tried again at each rescan."""
        self._complaints: set[Path] = set()
        """What was complained about, to say it once: files that cannot be claimed, folders that cannot be read."""
        self._ready: list[str] = []
        """Specs that the last look found complete and that were not claimed, in the order of their turn."""
        self._left_behind = False
        """Whether the last look into running/ found jobs to take over, but no free worker."""
        self._events: deque[tuple[str, bool]] = deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stop_signals = 0
        self._paused = self._draining = self._heed = False
        self._drain_seen = self._drain_request()
        self._rescan_at = self._scan_at = self._refresh_at = time.monotonic()
        self._scanned_at = float("-inf")
        self._retention_at = self._rescan_at
        self._date = SteadyDate()
        self._said = ""
        self._watchdog = systemd.watchdog_interval()

    def run(self) -> int:
        """Start up, loop until told to stop, shut down; 0. Raises ServiceError if it cannot start."""
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(os.close, self._wake)
            self._startup(cleanup)
            systemd.notify("READY=1")
            while not self._stop_signals and not self._drained():
                self._turn()
            self._shutdown()
        return 0

    # --- startup ---

    def _startup(self, cleanup: contextlib.ExitStack) -> None:
        self.spool.prepare()
        _prepare_outputs(self.config.outputs)
        _check_programs(self.config)
        self._endpoint = Endpoint(self.config, self.metrics.registry)
        cleanup.callback(self._endpoint.close)
        cleanup.enter_context(self._signal_handlers())
        cleanup.callback(self._release_all)
        self._watch(cleanup)
        self.metrics.succeeded(self.spool.last_success())
        self.metrics.watch(spool=self.spool.root, outputs=self.config.outputs)
        log.info("spool %s, outputs %s, %d job(s) at a time", self.spool.root, self.config.outputs, self.config.jobs)
        log.info("metrics on %s/metrics", self._endpoint.url)
        with contextlib.suppress(OSError):  # nobody needs to read it
            print(f"listening on {self._endpoint.url}", flush=True)

    def _watch(self, cleanup: contextlib.ExitStack) -> None:
        """Have events of the drop folder wake the loop; where there are none, the periodic rescan finds everything."""
        try:
            observer = InotifyObserver(generate_full_events=True)
            observer.schedule(_Listener(self), str(self.spool.incoming), event_filter=WATCHED_EVENTS)
            observer.schedule(_Controls(self), str(self.spool.root), event_filter=CONTROL_EVENTS)
            observer.start()
        except OSError as error:
            log.warning(
                "no events from %s (%s): dropped files are found by looking every %g s",
                self.spool.incoming,
                error.strerror or error,
                self.config.rescan,
            )
            return
        cleanup.callback(_stop_observer, observer)

    @contextlib.contextmanager
    def _signal_handlers(self) -> Iterator[None]:
        handlers: dict[signal.Signals, Any] = dict.fromkeys(STOP_SIGNALS, self._on_stop_signal)
        handlers[signal.SIGHUP] = self._on_reload_signal
        handlers[signal.SIGCHLD] = lambda number, frame: self.wake()
        old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _on_reload_signal(self, number: int, frame: FrameType | None) -> None:
        self._reload = True
        self.wake()

    def _on_stop_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop_signals += 1
        self.wake()

    def wake(self) -> None:
        """End the loop's current wait. Safe in any thread and in signal handlers, where a lock would not be."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._wake, 1)

    def event(self, name: str, complete: bool) -> None:
        """Something happened to incoming/NAME. Called in the observer's thread."""
        self._events.append((name, complete))
        if complete:
            self.wake()

    def heed(self) -> None:
        """Somebody paused, resumed or drained the spool. Called in the observer's thread."""
        self._heed = True
        self.wake()

    # --- main loop ---

    def _turn(self) -> None:
        """Wait for the next thing to do, and do what is due."""
        self._wait(self._next_moment())
        if self._reload:
            self._reload = False
            self._reconfigure()
        now = time.monotonic()
        while self._events:
            name, complete = self._events.popleft()
            (self.incoming.note_complete if complete else self.incoming.note_written)(name)
            self._scan_at = min(self._scan_at, now)
        if self._reap():
            self._refresh_at = now
            if self._left_behind:
                self._adopt()
        if self._heed or self._ready or now >= min(self._refresh_at, self._rescan_at):
            self._heed = False
            self._look_at_controls()
        if now >= self._rescan_at:
            self._rescan_at = now + self.config.rescan
            self._retry_unfinished()
            self._adopt()
            self._scan_at = now
            if now >= self._retention_at:
                self._retention_at = now + RETENTION_PAUSE
                self._remove_old()
        if now >= self._scan_after():
            self._look()
        self._start_rested()
        self._claim()
        if now >= self._refresh_at:
            self._refresh_at = now + REFRESH
            self._refresh()
        self._tell()

    def _reconfigure(self) -> None:
        """Take the new configuration for what starts from now on, or keep the old one if something is wrong with it."""
        systemd.notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
        try:
            new = self._load()
            fixed = [name for name in FIXED if getattr(new, name) != getattr(self.config, name)]
            if fixed:
                raise ServiceError(f"{', '.join(fixed)} cannot change while the daemon runs; restart it for that")
            _check_programs(new)
            self._endpoint.reload()
        except MergecoreError as error:
            log.error("configuration not reloaded, the old one holds: %s", error)
        else:
            self.config = new
            self.incoming.settle = new.settle
            self._rescan_at = self._retention_at = time.monotonic()
            log.info("configuration reloaded: %d job(s) at a time", new.jobs)
        systemd.notify("READY=1")

    def _next_moment(self) -> float:
        """When the loop must turn though nothing happens, on the monotonic clock."""
        moments = [self._rescan_at, self._scan_after()]
        if self.workers:
            moments.append(self._refresh_at)
        if self._free() > 0:
            moments += [at for at, _ in self._resting.values()]
        return min(moments)

    def _scan_after(self) -> float:
        """When the drop folder is to be looked at; not too often, be it 10,000 files and an event for each."""
        return max(self._scan_at, self._scanned_at + (SCAN_PAUSE if self._free() > 0 else REFRESH))

    def _wait(self, until: float) -> None:
        """Sleep until `wake` is called or the moment has come; tell systemd's watchdog that the loop turns."""
        if self._watchdog:
            systemd.notify("WATCHDOG=1")
            until = min(until, time.monotonic() + self._watchdog)
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if poll.poll(1000 * min(max(0.0, until - time.monotonic()), LONGEST_WAIT)):
            os.eventfd_read(self._wake)

    def _free(self) -> int:
        """How many jobs may be started now."""
        halted = self._stop_signals or self._paused or self._draining
        return 0 if halted else self.config.jobs - len(self.workers)

    def _look_at_controls(self) -> None:
        """Whether the spool is paused or to be drained, and which of our jobs are to be cancelled."""
        paused = os.path.exists(self.spool.paused)  # unlike Path.exists, no error where a mount has gone
        if paused != self._paused:
            self._paused = paused
            log.info("paused: nothing is started" if paused else "resumed")
            self._rescan_at = min(self._rescan_at, time.monotonic())
        if not self._draining and self._drain_request() not in ("", self._drain_seen):
            self._draining = True
            log.info("draining: %d worker(s) finish, then this daemon ends", len(self.workers))
        for worker in self.workers.values():
            if not worker.cancelled and worker.job.cancellation() is not None:
                log.info("job %s: cancelled; stopping its worker", worker.job.name)
                worker.cancelled = True
                worker.stop(self.config.stop_timeout)
        for name, (_, job) in list(self._resting.items()):
            if job.cancellation() is not None:
                del self._resting[name]
                self._cancelled(job)

    def _cancelled(self, job: Job) -> None:
        """End a job of ours that has no worker."""
        status = job.status()
        log.info("job %s: cancelled", job.name)
        self.metrics.ended(job.name, "cancelled", status.method, status.seconds)
        self._finish(job, "cancelled")

    def _drain_request(self) -> str:
        """What the drain file says: each request is another one. Empty if there is none."""
        try:
            return self.spool.drain.read_text(errors="replace")[:200]
        except OSError:
            return ""

    def _drained(self) -> bool:
        return self._draining and not self.workers and not self._unfinished

    def _look(self) -> None:
        """See what lies in the drop folder and in which order it is to be claimed."""
        self._scanned_at = time.monotonic()
        self._scan_at = float("inf")
        try:
            self._ready = self.incoming.scan()
        except OSError as error:
            self._complain(self.spool.incoming, "cannot list %s: %s", self.spool.incoming, error.strerror)
            return
        due = self.incoming.next_due()
        if due is not None:
            self._scan_at = self._scanned_at + due
        ready = {self.spool.incoming / name for name in self._ready}
        self._complaints = {
            about for about in self._complaints if about.parent != self.spool.incoming or about in ready
        }

    def _claim(self) -> None:
        """Start as many of the jobs that were seen as workers are free."""
        ready = iter(self._ready)
        while self._free() > 0 and (name := next(ready, None)) is not None:
            try:
                job = self.spool.claim(name)
            except OSError as error:
                path = self.spool.incoming / name
                self._complain(path, "cannot claim %s: %s; trying again", printable(str(path)), error.strerror)
                continue
            self.incoming.forget(name)
            if job is not None:
                log.info("job %s: claimed %s", job.name, printable(name))
                self._start(job)
        self._ready = list(ready)
        self.metrics.queue(self.incoming.waiting)

    def _adopt(self) -> None:
        """Go on with jobs that a dead daemon, or an interrupted worker of ours, left in running/."""
        own = {*self.workers, *self._resting, *(job.name for job, _, _ in self._unfinished)}
        self._left_behind = False
        try:
            for job in self.spool.adopt(own):
                try:
                    self._take_over(job)
                    self._complaints.discard(job.folder)
                except OSError as error:
                    job.release()
                    self._complain(job.folder, "job %s: cannot be taken over: %s; trying again", job.name, error)
            self._complaints.discard(self.spool.running)
        except OSError as error:
            self._complain(self.spool.running, "cannot look into %s: %s", self.spool.running, error.strerror)

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
        elif self._free() > 0:
            log.info("job %s: taken over; resuming", job.name)
            self._start(job)
        else:
            self._left_behind = True
            job.release()

    def _start(self, job: Job) -> None:
        """Start a worker on a job that we own. If no process can be had, the job waits for the next rescan."""
        try:
            status = job.status()
            job.update(
                state="running",
                host=socket.gethostname(),
                started=status.started or utc_now(),
                attempts=status.attempts + 1,
                heartbeat=utc_now(),
                progress={},
                error="",
            )
            worker = Worker(job, self._worker_command(job))
        except OSError as error:
            if os.path.exists(job.folder) or not os.path.isdir(self.spool.running):
                log.error("job %s: cannot start a worker: %s; trying again later", job.name, error)
            else:
                log.error("job %s: cannot be run: somebody removed its folder", job.name)
            job.release()
            return
        self.workers[job.name] = worker
        self.metrics.started(job.name)
        log.info("job %s: worker %d started", job.name, worker.process.pid)

    def _start_rested(self) -> None:
        """Start again what died and has waited long enough, the one that waits longest first."""
        for name, (at, job) in sorted(self._resting.items(), key=lambda item: item[1][0]):
            if self._free() > 0 and time.monotonic() >= at:
                del self._resting[name]
                self._start(job)

    def _worker_command(self, job: Job) -> list[str]:
        command = [*self.config.worker_command, str(job.folder), "--outputs", str(self.config.outputs)]
        for folder in self.config.models:
            command += ["--models", str(folder)]
        return [*command, "--allow-commands"] if self.config.allow_commands else command

    def _reap(self) -> bool:
        """Deal with the workers that have ended; whether there was one."""
        ended = [worker for worker in self.workers.values() if worker.process.poll() is not None]
        for worker in ended:
            del self.workers[worker.job.name]
            self._ended(worker)
        return bool(ended)

    def _ended(self, worker: Worker) -> None:
        job, code = worker.job, worker.process.returncode
        status = job.status()
        self.metrics.progressed(job.name, status)
        status.seconds += time.monotonic() - worker.started
        changes: dict[str, Any] = {"seconds": round(status.seconds, 3), "pid": 0, "resident_bytes": 0}
        if code == 0 or status.result:
            if code != 0:
                log.warning("job %s: worker ended with %d after the merge was complete", job.name, code)
            state = status.success
            if state == "done":
                self.metrics.succeeded(time.time())
            changes["progress"] = {**status.progress, "ratio": 1.0}
        elif not worker.died():
            state, changes["error"] = "failed", status.error or worker.why_ended()
        elif worker.cancelled:
            state = "cancelled"
        elif self._stop_signals:
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
        with contextlib.suppress(OSError):  # the lock tells the same
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
            self._unfinished.append((job, state, changes))

    def _retry_unfinished(self) -> None:
        unfinished, self._unfinished = self._unfinished, []
        for job, state, changes in unfinished:
            self._finish(job, state, **changes)

    def _remove_old(self) -> None:
        try:
            removed = retention.apply(self.spool, self.config.keep_done, self.config.keep_failed, self._date.now())
        except OSError as error:
            log.error("cannot remove old jobs: %s", error)
            return
        for folder in removed:
            log.info("removed %s/%s, as configured", folder.parent.name, folder.name)

    def _refresh(self) -> None:
        """Look how the running workers fare; end those that hang, and those that were to end and did not."""
        for worker in self.workers.values():
            status = worker.job.status()
            self.metrics.progressed(worker.job.name, status)
            idle = worker.idle_seconds(status)
            if not worker.hung and idle >= self.config.stall_seconds:
                log.error("job %s: worker hangs: no progress and no CPU time for %.0f s", worker.job.name, idle)
                worker.abort()
            elif worker.overdue():
                log.warning("job %s: worker did not stop, killing it", worker.job.name)
                worker.kill()
        self.metrics.resident(sum(worker.resident_bytes() for worker in self.workers.values()))

    def _tell(self) -> None:
        """Tell systemd what is going on, when it has changed."""
        self.metrics.state(len(self.workers), self._paused)
        saying = f"STATUS={len(self.workers)} running, {self.incoming.waiting} waiting"
        saying += ", draining" if self._draining else ", paused" if self._paused else ""
        if saying != self._said:
            self._said = saying
            systemd.notify(saying)

    def _complain(self, about: Path, message: str, *details: object) -> None:
        """Log a lasting problem once."""
        if about not in self._complaints:
            self._complaints.add(about)
            log.error(message, *details)

    # --- shutdown ---

    def _shutdown(self) -> None:
        """Have the workers stop and keep their work; kill what does not stop in time or at a second signal."""
        systemd.notify("STOPPING=1", f"STATUS=stopping, {len(self.workers)} running")
        if self.workers:
            log.info("stopping: waiting up to %g s for %d worker(s)", self.config.stop_timeout, len(self.workers))
        for worker in self.workers.values():
            worker.stop(self.config.stop_timeout)
        deadline = time.monotonic() + self.config.stop_timeout
        while self.workers:
            self._wait(deadline)
            for worker in self.workers.values():
                if worker.overdue() or (self._stop_signals > 1 and not worker.killed):
                    log.warning("job %s: worker did not stop, killing it", worker.job.name)
                    worker.kill()
            if time.monotonic() >= deadline:
                deadline = float("inf")
            self._reap()
        log.info("stopped")

    def _release_all(self) -> None:
        """Whatever ended the loop: no worker stays behind unseen, no lock is held on."""
        for worker in self.workers.values():
            worker.kill()
            worker.process.wait()
            worker.job.release()
        self.workers.clear()
        self._retry_unfinished()
        for job in (*(job for job, _, _ in self._unfinished), *(job for _, job in self._resting.values())):
            job.release()


class _Listener(FileSystemEventHandler):
    """Passes events on specs in the drop folder to the daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon

    def on_any_event(self, event: FileSystemEvent) -> None:
        moved = isinstance(event, FileMovedEvent)
        name = os.path.basename(os.fsdecode(event.dest_path if moved else event.src_path))
        if is_spec(name):
            self.daemon.event(name, complete=not isinstance(event, FileModifiedEvent))


class _Controls(FileSystemEventHandler):
    """Passes events on the files that pause and drain the spool to the daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon

    def on_any_event(self, event: FileSystemEvent) -> None:
        self.daemon.heed()


def _check_programs(config: ServeConfig) -> None:
    if shutil.which(config.worker_command[0]) is None:
        raise ServiceError(f"worker_command: {config.worker_command[0]} is not a program that can be run")
    for folder in config.models:
        if not folder.is_dir():
            log.warning("model folder %s does not exist (yet)", folder)


def _prepare_outputs(outputs: Path) -> None:
    try:
        make_folder(outputs)
        with tempfile.TemporaryFile(dir=outputs):
            pass
    except OSError as error:
        raise ServiceError(f"outputs {outputs}: cannot be written: {error.strerror}") from error


def _stop_observer(observer: InotifyObserver) -> None:
    logging.getLogger("watchdog.observers.inotify").setLevel(logging.CRITICAL)  # it logs its own stop as an error
    observer.stop()
    observer.join()


def _log_tail(path: Path, nbytes: int = 4096) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - nbytes))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return "(none)\n"
