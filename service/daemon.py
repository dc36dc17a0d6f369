"""The merge daemon: startup, main loop, shutdown. Decides when things happen; the jobs it owns are supervisor.py's.

The daemon parses no spec and opens no model, so nothing that is dropped can bring it down, and it needs no torch. What
a job is and how it moves: spool.py. Which file is next: incoming.py. What may run at once: resources.py. What a worker
does: worker.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import shutil
import signal
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
from service.complaints import Complaints
from service.config import FIXED, ServeConfig, load_config
from service.durable import make_folder, write_atomic
from service.endpoint import Endpoint
from service.errors import ServiceError
from service.incoming import Incoming, is_spec
from service.metrics import Metrics
from service.resources import read_needs
from service.spool import Spool
from service.supervisor import Supervisor

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
    """One daemon on one spool. Several may share a spool, also on several hosts: locks or leases keep them apart."""

    def __init__(self, config: ServeConfig, reload: Callable[[], ServeConfig] | None = None) -> None:
        self.config = config
        self._load = reload or (lambda: config)
        self._reload = False
        self.spool = Spool(config.spool, config.lease_seconds)
        self.incoming = Incoming(self.spool.incoming, config.settle)
        self.metrics = Metrics()
        self._date = SteadyDate()
        self._complaints = Complaints()
        self.supervisor = Supervisor(self.spool, self.metrics, config, self._date, self._complaints)
        self._ready: list[str] = []
        """Specs that the last look found complete and that were not claimed, in the order of their turn."""
        self._events: deque[tuple[str, bool]] = deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stop_signals = 0
        self._paused = self._draining = self._heed = False
        self._drain_seen = self._drain_request()
        self._rescan_at = self._scan_at = self._refresh_at = time.monotonic()
        self._scanned_at = float("-inf")
        self._retention_at = self._rescan_at
        self._said = self._why = ""
        self._wrote: str | None = None
        self._keep_at = float("-inf")
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
        self.spool.prepare(self.config.agreed_ownership)
        _prepare_outputs(self.config.outputs)
        _check_programs(self.config)
        self._endpoint = Endpoint(self.config, self.metrics.registry)
        cleanup.callback(self._endpoint.close)
        cleanup.enter_context(self._signal_handlers())
        cleanup.callback(self.supervisor.release_all)
        self._watch(cleanup)
        self.metrics.succeeded(self.spool.last_success())
        self.metrics.watch(spool=self.spool.root, outputs=self.config.outputs)
        log.info("spool %s, outputs %s, %d job(s) at a time", self.spool.root, self.config.outputs, self.config.jobs)
        if self.spool.leased:
            log.info("jobs are owned through leases of %g s", self.config.lease_seconds)
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
        self.supervisor.halted = True
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
        if self.supervisor.reap():
            self._refresh_at = now
            if self.supervisor.left_behind:
                self._adopt()
        if self._heed or self._ready or now >= min(self._refresh_at, self._rescan_at):
            self._heed = False
            self._look_at_controls()
        if now >= self._rescan_at:
            self._rescan_at = now + self.config.rescan
            self.supervisor.retry_unfinished()
            self._adopt()
            self._scan_at = now
            if now >= self._retention_at:
                self._retention_at = now + RETENTION_PAUSE
                self._remove_old()
        if now >= self._scan_after():
            self._look()
        self.supervisor.start_rested()
        self._claim()
        if now >= self._refresh_at:
            self._refresh_at = now + REFRESH
            self.supervisor.refresh()
            self._say_why()
        self._keep_at = self.supervisor.keep()
        if not self.supervisor.halted:
            self.supervisor.pool.tend()
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
            self.supervisor.configure(new)
            self.incoming.settle = new.settle
            self._rescan_at = self._retention_at = time.monotonic()
            log.info("configuration reloaded: %d job(s) at a time", new.jobs)
        systemd.notify("READY=1")

    def _next_moment(self) -> float:
        """When the loop must turn though nothing happens, on the monotonic clock."""
        moments = [self._rescan_at, self._scan_after(), self._keep_at]
        if self.supervisor.workers or self._why != self._wrote:
            moments.append(self._refresh_at)
        if not self.supervisor.halted:
            moments.append(self.supervisor.pool.next_start())
        if not self.supervisor.halted and not self.supervisor.holds_up:
            moments.append(self.supervisor.next_start())
        return min(moments)

    def _scan_after(self) -> float:
        """When the drop folder is to be looked at; not too often, be it 10,000 files and an event for each."""
        return max(self._scan_at, self._scanned_at + (REFRESH if self._why else SCAN_PAUSE))

    def _wait(self, until: float) -> None:
        """Sleep until `wake` is called or the moment has come; tell systemd's watchdog that the loop turns."""
        if self._watchdog:
            systemd.notify("WATCHDOG=1")
            until = min(until, time.monotonic() + self._watchdog)
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if poll.poll(1000 * min(max(0.0, until - time.monotonic()), LONGEST_WAIT)):
            os.eventfd_read(self._wake)

    def _look_at_controls(self) -> None:
        """Whether the spool is paused or to be drained, and which of our jobs are to be cancelled."""
        paused = os.path.exists(self.spool.paused)  # unlike Path.exists, no error where a mount has gone
        if paused != self._paused:
            self._paused = paused
            log.info("paused: nothing is started" if paused else "resumed")
            self._rescan_at = min(self._rescan_at, time.monotonic())
        if not self._draining and self._drain_request() not in ("", self._drain_seen):
            self._draining = True
            self.supervisor.pool.close()
            log.info("draining: %d worker(s) finish, then this daemon ends", len(self.supervisor.workers))
        self.supervisor.halted = bool(self._stop_signals) or self._paused or self._draining
        self.supervisor.cancel()

    def _drain_request(self) -> str:
        """What the drain file says: each request is another one. Empty if there is none."""
        try:
            return self.spool.drain.read_text(errors="replace")[:200]
        except OSError:
            return ""

    def _drained(self) -> bool:
        return self._draining and not self.supervisor.workers and not self.supervisor.unfinished

    def _look(self) -> None:
        """See what lies in the drop folder and in which order it is to be claimed."""
        self._scanned_at = time.monotonic()
        self._scan_at = float("inf")
        try:
            self._ready = self.incoming.scan()
        except OSError as error:
            self._complaints.make(self.spool.incoming, "cannot list %s: %s", self.spool.incoming, error.strerror)
            return
        due = self.incoming.next_due()
        if due is not None:
            self._scan_at = self._scanned_at + due
        self._complaints.forget_below(self.spool.incoming, (self.spool.incoming / name for name in self._ready))

    def _claim(self) -> None:
        """Start the jobs that were seen, in their order. One that has to wait holds up those behind it: nobody who
        needs little overtakes one who needs much, again and again."""
        ready = deque(self._ready)
        self._why = self.supervisor.holds_up
        while ready and not self._why:
            self._why = self._held_up() or self._claim_one(ready[0])
            if not self._why:
                ready.popleft()
        self._ready = list(ready)
        self.metrics.queue(self.incoming.waiting)

    def _held_up(self) -> str:
        """Why no waiting spec at all can start now; empty if one may."""
        if self.supervisor.halted:
            return "the spool is paused" if self._paused else "the daemon ends"
        return self.supervisor.room.busy()

    def _claim_one(self, name: str) -> str:
        """Start a spec; why it has to wait. One that cannot be claimed holds up nobody: it is tried again later."""
        path = self.spool.incoming / name
        try:
            why = self.supervisor.claim(name, read_needs(path))
        except OSError as error:
            self._complaints.make(path, "cannot claim %s: %s; trying again", printable(str(path)), error.strerror)
            return ""
        if not why:
            self.incoming.forget(name)
        return why

    def _adopt(self) -> None:
        try:
            self.supervisor.adopt()
            self._complaints.over(self.spool.running)
        except OSError as error:
            self._complaints.make(self.spool.running, "cannot look into %s: %s", self.spool.running, error.strerror)

    def _remove_old(self) -> None:
        try:
            removed = retention.apply(self.spool, self.config.keep_done, self.config.keep_failed, self._date.now())
        except OSError as error:
            log.error("cannot remove old jobs: %s", error)
            return
        for folder in removed:
            log.info("removed %s/%s, as configured", folder.parent.name, folder.name)

    def _say_why(self) -> None:
        """Write down for `mergecore status` why the first of those that wait does so."""
        if self._why == self._wrote:
            return
        try:
            if self._why:
                write_atomic(self.spool.waiting, f"{self._why}\n", durable=False)
            else:
                self.spool.waiting.unlink(missing_ok=True)
            self._wrote = self._why
            self._complaints.over(self.spool.waiting)
        except FileExistsError:  # another daemon of this spool writes it at this moment
            pass
        except OSError as error:
            self._complaints.make(self.spool.waiting, "cannot write %s: %s", self.spool.waiting, error.strerror)

    def _tell(self) -> None:
        """Tell systemd what is going on, when it has changed."""
        workers, room = len(self.supervisor.workers), self.supervisor.room
        self.metrics.state(workers, len(self.supervisor.pool), self._paused)
        self.metrics.reserved(room)
        saying = f"STATUS={workers} running, {self.incoming.waiting} waiting"
        saying += ", draining" if self._draining else ", paused" if self._paused else ""
        if saying != self._said:
            self._said = saying
            systemd.notify(saying)

    # --- shutdown ---

    def _shutdown(self) -> None:
        """Have the workers stop and keep their work; kill what does not stop in time or at a second signal."""
        workers = self.supervisor.workers
        systemd.notify("STOPPING=1", f"STATUS=stopping, {len(workers)} running")
        if workers:
            log.info("stopping: waiting up to %g s for %d worker(s)", self.config.stop_timeout, len(workers))
        self.supervisor.stop()
        deadline = time.monotonic() + self.config.stop_timeout
        while workers:
            self._wait(min(deadline, self._keep_at))
            self._keep_at = self.supervisor.keep()
            self.supervisor.kill_overdue(all_of_them=self._stop_signals > 1)
            if time.monotonic() >= deadline:
                deadline = float("inf")
            self.supervisor.reap()
        self._why = ""
        self._say_why()
        log.info("stopped")


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
