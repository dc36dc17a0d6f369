"""The spool: folders of plain files through which specs become jobs.

    SPOOL/incoming/NAME.yaml    dropped by anybody
    SPOOL/running/JOB/          spec.yaml, status.json, log, lock
    SPOOL/done/JOB/             spec.yaml, status.json, log
    SPOOL/failed/JOB/           spec.yaml, status.json, log, error.txt
    SPOOL/running/JOB/cancel    somebody wants the job to stop; its owner sees it, on whatever host
    SPOOL/paused, SPOOL/drain   nothing new is started; what runs is finished, then the daemons end
    SPOOL/waiting               why the first of those that wait does so

A job moves by one rename each time, so it is in exactly one folder whatever dies in between. Who owns a running job
is told by a flock on running/JOB/lock; the kernel takes it back when the last process that holds it dies (the daemon
and the job's worker share it). Which files in incoming/ are complete is decided in incoming.py; here is no torch, no
YAML, no thread and no clock but the one that dates things.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mergecore.printable import printable
from service.durable import make_folder, sync_folder, temporary_of, utc_now, write_atomic
from service.errors import ServiceError
from service.status import ENDED, STATUS, JobStatus, read_status, write_status

FOLDERS = ("incoming", "running", "done", "failed")
SPEC, LOCK, ERROR, LOG, CANCEL = "spec.yaml", "lock", "error.txt", "log", "cancel"
KNOWN = ".fingerprints"
"""The folder of the spool that tells the job in done/ of a fingerprint."""
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
DAEMON_PID = "MERGECORE_DAEMON_PID"
"""Environment variable that tells a worker whose death to follow."""
MORE_MEMORY = 4
"""Exit code of a worker whose plan says that it holds more memory than was granted: `memory` of its status."""


# --- jobs ---------------------------------------------------------------------------------------------------------


class Job:
    """A running job that this process owns: the folder running/JOB and the lock on it."""

    def __init__(self, spool: Spool, name: str, lock: int) -> None:
        self.spool = spool
        self.name = name
        self.lock = lock
        """Descriptor of the held lock; a worker that inherits it keeps the job owned when this process dies."""
        self.folder = spool.running / name

    def status(self) -> JobStatus:
        """The job's status as it is on disk."""
        return read_status(self.folder)

    def update(self, *, durable: bool = True, **changes: Any) -> JobStatus:
        """Change some fields of the status. Only while no worker of the job lives. Raises OSError."""
        status = read_status(self.folder, strict=True)
        for key, value in changes.items():
            setattr(status, key, value)
        write_status(self.folder, status, durable=durable)
        return status

    def outcome(self) -> str | None:
        """What the last worker left: one of ENDED, or None if there is still something to run."""
        status = self.status()
        if status.state in ENDED:
            return status.state
        if status.result:
            return status.success
        return "failed" if (self.folder / ERROR).exists() else None

    def cancellation(self) -> str | None:
        """Who wants the job to stop, and since when; None if nobody does."""
        try:
            return printable((self.folder / CANCEL).read_text(encoding="utf-8", errors="replace").strip()[:200])
        except OSError:
            return None

    def finish(self, state: str, **changes: Any) -> None:
        """Record the final state, one of ENDED, and move the job to its folder; the lock is given back.

        May be called again after an OSError: each step is repeatable.
        """
        target = self.spool.root / ENDED[state] / self.name
        if not target.exists():
            status = self.update(**{"state": state, "finished": utc_now(), **changes})
            if state == "done":
                self.spool.remember(status)
            os.rename(self.folder, target)
        sync_folder(target.parent)
        sync_folder(self.spool.running)
        for name in (LOCK, CANCEL):
            (target / name).unlink(missing_ok=True)
        self.release()

    def cancel(self, by: str, **changes: Any) -> None:
        """End a job that no worker runs as cancelled. Repeatable after an OSError, like `finish`."""
        error = f"cancelled by {by}"
        if self.folder.exists():
            text = f"{error}; `mergecore retry {self.name}` goes on from what was finished\n"
            write_atomic(self.folder / ERROR, text)
        self.finish("cancelled", error=error, pid=0, resident_bytes=0, **changes)

    def discard(self) -> None:
        """Remove the folder of a claim that got no spec. The lock is held until the folder is gone."""
        try:
            for name in (STATUS, temporary_of(self.folder / STATUS).name, LOCK):
                (self.folder / name).unlink(missing_ok=True)
            self.folder.rmdir()
        except OSError:
            pass  # somebody put files there: theirs to remove
        self.release()

    def release(self) -> None:
        """Give up the ownership; what is still in running/ can then be adopted by any daemon."""
        if self.lock >= 0:
            with contextlib.suppress(OSError):  # closed all the same
                os.close(self.lock)
            self.lock = -1


class Spool:
    """The four folders below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.incoming, self.running, self.done, self.failed = (root / name for name in FOLDERS)
        self.paused = root / "paused"
        """While this file exists, no daemon starts anything."""
        self.drain = root / "drain"
        """When this file appears or changes, each daemon finishes what it runs and ends."""
        self.waiting = root / "waiting"
        """Why the first of those that wait does so, in a daemon's words; for people."""

    def prepare(self) -> None:
        """Make the folders and rehearse a job's way through them. Raises ServiceError if it is barred."""
        probe = f".probe-{secrets.token_hex(4)}"
        stops = [self.incoming / probe, self.running / probe, self.done / probe, self.failed / probe]
        place = self.root
        try:
            for name in FOLDERS:
                place = self.root / name
                make_folder(place)
            place = stops[0]
            place.touch()
            place = stops[1]
            place.mkdir()
            os.rename(stops[0], stops[1] / SPEC)
            lock = os.open(stops[1] / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            finally:
                os.close(lock)
            for here, place in itertools.pairwise(stops[1:]):
                os.rename(here, place)
            shutil.rmtree(place)
            for name in FOLDERS:
                place = self.root / name
                sync_folder(place)
        except OSError as error:
            raise ServiceError(_why_unusable(self.root, place, error)) from error
        finally:
            with contextlib.suppress(OSError):
                stops[0].unlink()
            for stop in stops[1:]:
                shutil.rmtree(stop, ignore_errors=True)

    def claim(self, name: str) -> Job | None:
        """Take incoming/NAME: None if somebody else was faster. Raises OSError if it cannot be moved.

        The job is locked before the spec comes in, so nobody can take a job for abandoned that has just begun.
        """
        job = self._new_job(name)
        try:
            # All that a power loss must not take comes before the rename, which may reach the disk first.
            job.update(state="running", spec=printable(name), created=utc_now(), host=socket.gethostname())
            sync_folder(self.running)
            _sync_file(self.incoming / name)
            os.rename(self.incoming / name, job.folder / SPEC)
        except FileNotFoundError:
            job.discard()
            return None
        except OSError:
            job.discard()
            raise
        try:
            sync_folder(job.folder)
            sync_folder(self.incoming)
        except OSError:
            job.release()  # the spec has arrived: whoever adopts the job goes on from here
            raise
        return job

    def adopt(self, own: set[str]) -> Iterator[Job]:
        """Take over the running jobs whose owner is gone, oldest first; `own` are not looked at.

        Claims that never got their spec are cleaned up on the way.
        """
        folders = [entry for entry in self._folders(self.running) if entry.name not in own]
        for folder in sorted(folders, key=lambda folder: (read_status(folder).created, folder.name)):
            job = self.own(folder.name)
            if job is None:
                continue
            try:
                arrived = (folder / SPEC).exists()
            except OSError:
                arrived = True  # or it would be thrown away; who runs it will see
            if arrived:
                yield job
            else:
                job.discard()

    def request_cancel(self, name: str, by: str) -> None:
        """Ask the owner of running/NAME to stop it. Raises OSError, FileNotFoundError if it has just ended."""
        write_atomic(self.running / name / CANCEL, by + "\n")

    def retry(self, name: str) -> None:
        """Put failed/NAME back into running/, for any daemon to go on with. Repeatable after an OSError."""
        folder = self.failed / name
        status = read_status(folder, strict=True)
        status.state, status.error, status.finished, status.deaths = "interrupted", "", "", 0
        for left in (ERROR, CANCEL):
            (folder / left).unlink(missing_ok=True)
        write_status(folder, status)  # syncs the folder: what is in it before the rename is what counts after it
        os.rename(folder, self.running / name)
        sync_folder(self.running)
        sync_folder(self.failed)

    def jobs(self) -> list[JobStatus]:
        """Every job once: running first, then done and failed with the newest first. Queued ones: incoming.py."""
        found = {status.job: status for status in self.running_jobs()}
        ended = []
        for state, parent in (("done", self.done), ("failed", self.failed)):
            for folder in self._folders(parent):
                status = read_status(folder)
                if ENDED.get(status.state) != state:
                    status.state = state  # the folder says so, whatever the file says
                ended.append(status)
                found.pop(status.job, None)  # it moved while this list was made
        current = sorted(found.values(), key=lambda status: (status.state == "interrupted", status.created, status.job))
        return current + sorted(ended, key=lambda status: (status.finished, status.job), reverse=True)

    def remember(self, status: JobStatus) -> None:
        """Note which job a fingerprint is of, before it lies in done/: `remembered` looks whether it does."""
        if _FINGERPRINT.fullmatch(status.fingerprint):
            known = self.root / KNOWN
            if not known.exists():
                make_folder(known)
            write_atomic(known / status.fingerprint, status.job)

    def forget(self, status: JobStatus) -> None:
        """A job is removed from done/."""
        if _FINGERPRINT.fullmatch(status.fingerprint):
            note = self.root / KNOWN / status.fingerprint
            with contextlib.suppress(OSError):
                if note.read_text() == status.job:
                    note.unlink()

    def remembered(self, fingerprint: str) -> JobStatus | None:
        """The last job in done/ that had this fingerprint, if it is still there."""
        if not _FINGERPRINT.fullmatch(fingerprint):
            return None
        try:
            job = (self.root / KNOWN / fingerprint).read_text()
        except (OSError, ValueError):
            return None
        if job.startswith(".") or "/" in job:
            return None
        found = read_status(self.done / job)
        return found if found.fingerprint == fingerprint and found.success == "done" else None

    def running_jobs(self) -> list[JobStatus]:
        """The jobs in running/: running, cancelling and interrupted ones."""
        found = []
        for folder in self._folders(self.running):
            if os.path.exists(folder / SPEC):
                status = read_status(folder)
                # An owned job may wait for its next attempt.
                owned = status.state != "interrupted" and _is_locked(folder / LOCK)
                cancelled = os.path.exists(folder / CANCEL)
                status.state = "cancelling" if cancelled else "running" if owned else "interrupted"
                found.append(status)
        return found

    def last_success(self) -> float:
        """Unix time at which the newest job in done/ finished; 0 if there is none."""
        newest = max(self._folders(self.done), key=lambda folder: _mtime(folder), default=None)
        if newest is None:
            return 0.0
        try:
            return datetime.fromisoformat(read_status(newest).finished).timestamp()
        except ValueError:
            return _mtime(newest)

    def _folders(self, parent: Path) -> list[Path]:
        try:
            with os.scandir(parent) as entries:
                return [Path(e.path) for e in entries if not e.name.startswith(".") and e.is_dir()]
        except FileNotFoundError:
            return []

    def _new_job(self, spec_name: str) -> Job:
        while True:
            name = job_name(spec_name)
            if (self.done / name).exists() or (self.failed / name).exists():
                continue
            try:
                (self.running / name).mkdir()
            except FileExistsError:
                continue
            job = self.own(name)
            if job is not None:
                return job

    def own(self, name: str) -> Job | None:
        """Own running/NAME, or None if it has an owner or is gone. Raises OSError."""
        path = self.running / name / LOCK
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between the open and the lock the job may have ended and moved on with its lock file.
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                return Job(self, name, lock)
        except (BlockingIOError, FileNotFoundError):
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
        return None


def job_name(spec_name: str) -> str:
    """A new job id: the spec's stem made safe, the UTC time, and four random hex digits."""
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", Path(spec_name).stem).lstrip(".-")[:64] or "job"
    return f"{stem}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"


def _sync_file(path: Path) -> None:
    """Make the content of a dropped file durable; one that we may not read is reported by the worker."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_locked(path: Path) -> bool:
    """Whether somebody owns the job. What cannot be opened (another user's) counts as owned."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _why_unusable(root: Path, place: Path, error: OSError) -> str:
    if error.errno == errno.EXDEV:
        return (
            f"spool {root}: incoming, running, done and failed must lie on one filesystem, because a job moves between "
            f"them by rename; {place.parent} lies on another one"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"spool {root}: cannot write in {place.parent if place.name.startswith('.probe') else place} "
            f"({error.strerror}); give the user that runs the daemon write permission on the spool and its folders"
        )
    return f"spool {root}: cannot be used, at {place}: {error.strerror}"
