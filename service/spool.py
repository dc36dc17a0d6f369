"""The spool: folders of plain files through which specs become jobs.

    SPOOL/incoming/NAME.yaml    dropped by anybody
    SPOOL/running/JOB/          spec.yaml, status.json, log, lock; or running/JOB@TOKEN/ with a lease
    SPOOL/done/JOB/             spec.yaml, status.json, log
    SPOOL/failed/JOB/           spec.yaml, status.json, log, error.txt
    SPOOL/running/JOB/cancel    somebody wants the job to stop; its owner sees it, on whatever host
    SPOOL/paused, SPOOL/drain   nothing new is started; what runs is finished, then the daemons end
    SPOOL/ownership             how it is told who owns a job: locks or leases
    SPOOL/waiting               why the first of those that wait does so

A job moves by one rename each time, so it is in exactly one folder whatever dies in between: where its spec.yaml is.
Who owns a running job: ownership.py and leases.py. Which files in incoming/ are complete is decided in incoming.py;
here is no torch, no YAML, no thread and no clock but the one that dates things.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mergecore.printable import printable
from service import fingerprints, ownership
from service.durable import copy_plain, make_folder, sync_folder, temporary_of, utc_now, write_atomic
from service.errors import ServiceError
from service.leases import LEASE, Lease, LeaseLost, Watch, is_leased, job_of, named, owner_clock, token_of
from service.ownership import LEASES, LOCK, LOCKS, KernelLock
from service.status import ENDED, STATUS, JobStatus, read_status, write_status

FOLDERS = ("incoming", "running", "done", "failed")
SPEC, ERROR, LOG, CANCEL = "spec.yaml", "error.txt", "log", "cancel"
DAEMON_PID = "MERGECORE_DAEMON_PID"
"""Environment variable that tells a worker whose death to follow."""
MORE_MEMORY = 4
"""Exit code of a worker whose plan says that it holds more memory than was granted: `memory` of its status."""


# --- jobs ---------------------------------------------------------------------------------------------------------


class Job:
    """A running job that this process owns: its folder in running/ and the lock or the lease on it."""

    def __init__(self, spool: Spool, folder: Path, owned: KernelLock | Lease) -> None:
        self.spool = spool
        self.name = job_of(folder)
        self.folder = folder
        self.owned = owned

    def status(self) -> JobStatus:
        """The job's status as it is on disk."""
        return read_status(self.folder)

    def update(self, *, durable: bool = True, **changes: Any) -> JobStatus:
        """Change some fields of the status. Only while no worker of the job lives. Raises OSError, LeaseLost."""
        if self.owned.lost:
            raise LeaseLost(self.folder)
        status = read_status(self.folder, strict=True)
        for key, value in changes.items():
            setattr(status, key, value)
        write_status(self.folder, status, durable=durable)
        return status

    def outcome(self) -> str | None:
        """What the last worker left: one of ENDED, or None if there is still something to run."""
        return _outcome(self.folder)

    def cancellation(self) -> str | None:
        """Who wants the job to stop, and since when; None if nobody does."""
        try:
            return printable((self.folder / CANCEL).read_text(encoding="utf-8", errors="replace").strip()[:200])
        except OSError:
            return None

    def finish(self, state: str, **changes: Any) -> None:
        """Record the final state, one of ENDED, and move the job to its folder; it is owned no more.

        May be called again after an OSError: each step is repeatable.
        """
        target = self.spool.root / ENDED[state] / self.name
        if not target.exists():
            status = self.update(**{"state": state, "finished": utc_now(), **changes})
            if state == "done":
                fingerprints.remember(self.spool.root, status)
            os.rename(self.folder, target)
        sync_folder(target.parent)
        sync_folder(self.spool.running)
        for name in (LOCK, LEASE, CANCEL):
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
        """Remove the folder of a claim that got no spec. It is owned until the folder is gone."""
        _remove_claim(self.folder)
        self.release()

    def release(self) -> None:
        """Give up the ownership; what is still in running/ can then be adopted by any daemon."""
        self.owned.release()


class Spool:
    """The four folders below `root`. A lease that this process takes can be taken over after `lease_seconds`."""

    def __init__(self, root: Path, lease_seconds: float = 120.0) -> None:
        self.root = root
        self.incoming, self.running, self.done, self.failed = (root / name for name in FOLDERS)
        self.paused = root / "paused"
        """While this file exists, no daemon starts anything."""
        self.drain = root / "drain"
        """When this file appears or changes, each daemon finishes what it runs and ends."""
        self.waiting = root / "waiting"
        """Why the first of those that wait does so, in a daemon's words; for people."""
        self._lease_seconds = lease_seconds
        self._how: str | None = None
        self._watch = Watch()

    @property
    def leased(self) -> bool:
        """Whether jobs are owned through leases, else through locks. ServiceError if the spool's word is unreadable."""
        if self._how is None:
            self._how = ownership.agreed(self.root) or LOCKS
        return self._how == LEASES

    def prepare(self, how: str | None = None, *, agree: bool = True) -> None:
        """Make the folders and rehearse a job's way through them. Raises ServiceError if it is barred.

        `how`: LOCKS or LEASES tell who owns a job; None: what the spool says, and LOCKS for a new one. A spool that
        says otherwise is refused. `agree`: write it down, so that all daemons of the spool do it alike.
        """
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
            self._how = self._decided(how)
            if not self.leased and (held := ownership.lock(stops[1])) is not None:
                held.release()
            for here, place in itertools.pairwise(stops[1:]):
                os.rename(here, place)
            shutil.rmtree(place)
            for name in FOLDERS:
                place = self.root / name
                sync_folder(place)
            place = self.root
            if agree:
                ownership.agree(self.root, self._how)
        except OSError as error:
            raise ServiceError(_why_unusable(self.root, place, error)) from error
        finally:
            with contextlib.suppress(OSError):
                stops[0].unlink()
            for stop in stops[1:]:
                shutil.rmtree(stop, ignore_errors=True)

    def _decided(self, how: str | None) -> str:
        """LOCKS or LEASES. ServiceError if that is not what the spool says, or what its jobs show."""
        said = ownership.agreed(self.root)
        if said is not None and how not in (said, None):
            raise ServiceError(
                f"spool {self.root}: its jobs are owned through {said}, but the configuration asks for {how}; to "
                f"change that, stop all its daemons while nothing is in running/, and remove {self.root / 'ownership'}"
            )
        how = said or how or LOCKS
        if said is None:
            for folder in self._folders(self.running):
                if is_leased(folder) if how == LOCKS else os.path.lexists(folder / LOCK):
                    raise ServiceError(
                        f"spool {self.root}: {folder} was owned through {LEASES if how == LOCKS else LOCKS}; have such "
                        f"a daemon finish it, or move it away, before jobs are owned through {how}"
                    )
        return how

    def claim(self, name: str) -> Job | None:
        """Take incoming/NAME: None if somebody else was faster. Raises OSError if it cannot be moved.

        The job is owned before the spec comes in, so nobody can take a job for abandoned that has just begun.
        """
        job = self._new_job(name)
        try:
            # All that a power loss must not take comes before the rename, which may reach the disk first.
            job.update(
                state="running",
                spec=printable(name),
                created=utc_now(),
                host=socket.gethostname(),
            )
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

    def adopt(self, own: set[str], worth: Callable[[Path], bool] = lambda folder: True) -> Iterator[Job]:
        """Take over the running jobs whose owner is gone, oldest first; `own` are not looked at.

        Claims that never got their spec are cleaned up on the way. `worth`: whether a job that is still to be run can
        be started now. Leases are not taken just to be given back: that costs a new folder.
        """
        folders = [folder for folder in self._folders(self.running) if job_of(folder) not in own]
        self._watch.forget_others(folders)
        for folder in sorted(folders, key=lambda folder: (read_status(folder).created, folder.name)):
            if self.leased and not (self._is_free(folder) and (not _is_to_run(folder) or worth(folder))):
                continue
            job = self._own(folder)
            if job is None:
                continue
            try:
                arrived = (job.folder / SPEC).exists()
            except OSError:
                arrived = True  # or it would be thrown away; who runs it will see
            if arrived:
                yield job
            else:
                job.discard()

    def own(self, name: str) -> Job | None:
        """Own a job in running/, or None if it has an owner or is gone. Raises OSError, ServiceError."""
        folder = self.folder_of(name)
        return self._own(folder) if folder is not None else None

    def folder_of(self, name: str) -> Path | None:
        """Where a job lies in running/, whoever owns it."""
        folders = [folder for folder in self._folders(self.running) if job_of(folder) == name]
        return next((folder for folder in folders if os.path.exists(folder / SPEC)), None)

    def request_cancel(self, name: str, by: str) -> None:
        """Ask the owner of running/NAME to stop it. Raises OSError, FileNotFoundError if it has just ended."""
        while True:
            folder = self.folder_of(name)
            if folder is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.running / name))
            write_atomic(folder / CANCEL, by + "\n")
            if self.folder_of(name) in (folder, None):
                return  # else another daemon took it over at this moment, perhaps without seeing the request

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

    def running_jobs(self) -> list[JobStatus]:
        """The jobs in running/: running, cancelling and interrupted ones."""
        found = []
        for folder in self._folders(self.running):
            if os.path.exists(folder / SPEC):
                status = read_status(folder)
                # An owned job may wait for its next attempt.
                owned = status.state != "interrupted" and ownership.is_owned(folder)
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
            folder = self.running / name
            if self.leased:
                if self.folder_of(name) is None:
                    return self._new_lease(folder)
                continue
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            job = self._own(folder)
            if job is not None:
                return job

    def _own(self, folder: Path) -> Job | None:
        """Own the job in this folder, or None if it has an owner or is gone. Raises OSError."""
        if not self.leased:
            held = ownership.lock(folder)
            return None if held is None else Job(self, folder, held)
        return self._take(folder) if self._is_free(folder) else None

    def _is_free(self, folder: Path) -> bool:
        """Whether no lease holds the job, as far as this process has seen."""
        return not is_leased(folder) or self._watch.has_run_out(folder)

    def _new_lease(self, folder: Path) -> Job:
        """A new folder in running/ with a lease on it. Raises OSError, and then nothing stays."""
        since, own = owner_clock(), named(folder)
        own.mkdir()
        try:
            return Job(self, own, Lease(own, self._lease_seconds, since))
        except OSError:
            _remove_claim(own)
            raise

    def _take(self, folder: Path) -> Job | None:
        """Own a job that is free or whose lease has run out; None if another one was faster. Raises OSError.

        The first rename decides who gets it and bars the former owner's way. What that had open may follow a rename, on
        network file systems even its paths for a while: so the job moves into a new folder, by the rename of its spec.
        """
        won = named(folder)
        try:
            os.rename(folder, won)
        except FileNotFoundError:
            return None
        job = None
        try:
            job = self._new_lease(folder)
            status = read_status(won, strict=True)
            last = "expired" if is_leased(folder) else "returned"
            known = {status.lease: last, token_of(folder): "expired"}
            former = {**status.former_leases, **{token: how for token, how in known.items() if token}}
            write_status(job.folder, replace(status, lease="", former_leases=former))
            for name in (LOG, ERROR, CANCEL):
                copy_plain(won / name, job.folder / name)
            sync_folder(job.folder)
            sync_folder(self.running)
            os.rename(won / SPEC, job.folder / SPEC)
        except BaseException as error:
            if job is not None:
                job.discard()
            if isinstance(error, FileNotFoundError):  # a claim that never got its spec, or we slept: somebody has it
                _remove_claim(won)
            if not is_leased(folder):
                with contextlib.suppress(OSError):
                    os.rename(won, folder)  # as free as it was, if it is there
            if isinstance(error, FileNotFoundError):
                return None
            raise
        try:
            sync_folder(job.folder)
            sync_folder(won)
        except OSError:
            job.release()  # the spec has arrived: whoever adopts the job goes on from here
            raise
        with contextlib.suppress(OSError):
            os.rename(won / CANCEL, job.folder / CANCEL)  # if it came meanwhile
        shutil.rmtree(won, ignore_errors=True)
        return job


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


def _outcome(folder: Path) -> str | None:
    status = read_status(folder)
    if status.state in ENDED:
        return status.state
    if status.result:
        return status.success
    return "failed" if (folder / ERROR).exists() else None


def _is_to_run(folder: Path) -> bool:
    """Whether the job in this folder has neither ended, nor shall be cancelled, nor is a claim without a spec."""
    try:
        return _lies_at(folder / SPEC) and not _lies_at(folder / CANCEL) and _outcome(folder) is None
    except OSError:
        return True


def _remove_claim(folder: Path) -> None:
    """Remove the folder of a claim that has no spec, if nothing else lies in it."""
    try:
        if _lies_at(folder / SPEC):
            return
        for name in (STATUS, LEASE, LOG, ERROR, CANCEL, LOCK):
            (folder / name).unlink(missing_ok=True)
            temporary_of(folder / name).unlink(missing_ok=True)
        folder.rmdir()
    except OSError:
        pass  # somebody put files there: theirs to remove


def _lies_at(path: Path) -> bool:
    """Whether anything lies there. Raises OSError where that cannot be told."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


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
    if error.errno in ownership.NO_LOCKS:
        return (
            f"spool {root}: its file system has no file locks ({error.strerror}), which tell the daemons whose job is "
            f'whose; set ownership = "{LEASES}"'
        )
    return f"spool {root}: cannot be used, at {place}: {error.strerror}"
