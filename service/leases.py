"""Leases: who owns a job where locks do not reach every host (network file systems).

A lease is in the folder's name: running/JOB@TOKEN is owned, running/JOB is free. To take a job is to rename its folder;
of several takers that succeeds for one, and from then on no path that the former owner knows exists: it cannot write a
status or move the job on. The owner renews running/JOB@TOKEN/lease; another daemon takes over when it has seen that
file unchanged for the lease's seconds on its own monotonic clock. The owner counts from before its last renewal, and
for less, two thirds of the seconds, on a clock that goes on while its machine sleeps. So it has given up and killed its
worker before anybody takes over, whatever the dates of the two hosts. Not here: what is done with a job that was taken
(spool.py), when to renew (supervisor.py), and how outputs are kept apart (publishing.py).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from service.durable import read_plain, write_atomic

LEASE = "lease"
OWNER_SHARE = 2 / 3
"""For this share of a lease's seconds its owner relies on a renewal."""
RENEWALS = 6
"""So many times per lease it is renewed."""
LONGEST = 3600.0
"""Seconds of the longest lease."""
_MARK = "@"


class LeaseLost(OSError):
    """This process does not own the job any more."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            errno.ESTALE, "the lease was not renewed in time, another daemon may have the job", str(folder)
        )


def job_of(folder: Path) -> str:
    """The name of the job in running/JOB or running/JOB@TOKEN."""
    return folder.name.partition(_MARK)[0]


def token_of(folder: Path) -> str:
    """TOKEN of running/JOB@TOKEN; empty for running/JOB."""
    return folder.name.partition(_MARK)[2]


def is_leased(folder: Path) -> bool:
    """Whether a folder in running/ is owned, or was, through a lease."""
    return _MARK in folder.name


def named(folder: Path) -> Path:
    """A name for the job's folder that nobody had before."""
    return folder.with_name(f"{job_of(folder)}{_MARK}{secrets.token_hex(8)}")


def owner_clock() -> float:
    """Seconds on a clock that nobody sets and that goes on while the machine sleeps; the same for its processes."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def observer_clock() -> float:
    """Seconds on a clock that nobody sets and that stands still while the machine sleeps, and so sees nothing."""
    return time.monotonic()


class Lease:
    """The lease on the job in `folder`, running/JOB@TOKEN, which this process has just made.

    `since`: the time on `owner_clock` before that. Raises OSError.
    """

    descriptors: tuple[int, ...] = ()

    def __init__(self, folder: Path, seconds: float, since: float) -> None:
        self._folder, self._seconds = folder, seconds
        self._renewed = since
        self._lost = False
        self._owner = f"{os.uname().nodename} {os.getpid()} {token_of(folder)}"
        self._write()

    @property
    def lost(self) -> bool:
        """Whether this process may not act for the job any more. Once lost, always lost."""
        if not self._lost and owner_clock() >= self._renewed + OWNER_SHARE * self._seconds:
            self._lost = True
        return self._lost

    def renew(self) -> float:
        """Renew it if it is time; seconds until it is to be renewed again. Raises nothing: see `lost`."""
        pause = self._seconds / RENEWALS
        if not self.lost and owner_clock() >= self._renewed + pause:
            try:
                self._write()
            except FileNotFoundError:
                self._lost = True
            except OSError:  # a full disk, a mount that has gone: tried again until time is up
                return pause / 10
        return float("inf") if self.lost else max(0.0, self._renewed + pause - owner_clock())

    def release(self) -> None:
        """Make the job free for anybody at once. May be called twice."""
        if not self.lost:
            with contextlib.suppress(OSError):  # it runs out by itself
                os.rename(self._folder, self._folder.with_name(job_of(self._folder)))
        self._lost = True

    def _write(self) -> None:
        now = owner_clock()
        content = {"owner": self._owner, "seconds": self._seconds, "renewed": now}
        write_atomic(self._folder / LEASE, json.dumps(content))
        # One that came too late may have been seen by nobody before it ran out.
        if not self.lost:
            self._renewed = now


class Claim(NamedTuple):
    """What a lease file says."""

    content: bytes
    seconds: float
    renewed: float


def read_lease(folder: Path) -> Claim:
    """The lease of the job in `folder`; without a readable one, the longest that may be, and that has run out for its
    owner."""
    content = b""
    try:
        content = read_plain(folder / LEASE)
        found = json.loads(content)
        seconds, renewed = float(found["seconds"]), float(found["renewed"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return Claim(content, LONGEST, float("-inf"))
    return Claim(content, seconds if 0 < seconds <= LONGEST else LONGEST, renewed)


class Tenancy:
    """A worker's view of the lease that its daemon holds on the job in `folder`; without a lease it is never over.

    Only processes of one host may compare the time in a lease with their clock: a worker and its daemon.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._until = 0.0 if is_leased(folder) else float("inf")

    def over(self) -> bool:
        """Whether the job may be another one's now. Reads the file only when what it said last has run out."""
        if owner_clock() < self._until:
            return False
        claim = read_lease(self._folder)
        self._until = claim.renewed + OWNER_SHARE * claim.seconds
        return owner_clock() >= self._until


class Watch:
    """How long this process has seen each lease unchanged, on its own clock."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[bytes, float]] = {}

    def forget_others(self, folders: Iterable[Path]) -> None:
        """Keep only what was seen of these folders."""
        names = {folder.name for folder in folders}
        self._seen = {name: seen for name, seen in self._seen.items() if name in names}

    def has_run_out(self, folder: Path) -> bool:
        """Look at the lease; whether it was not renewed for so long that its owner has given up."""
        before = observer_clock()
        claim = read_lease(folder)
        content, since = self._seen.get(folder.name, (None, 0.0))
        if content != claim.content:
            self._seen[folder.name] = (claim.content, observer_clock())
            return False
        return before - since >= claim.seconds
