"""Who owns a job in running/: who holds a lock of the kernel's or, where locks do not reach every host, a lease.

How it is told is one thing for a whole spool, and written down in it: SPOOL/ownership says `locks` or `leases`, from
the first start of a daemon on. A lock is held on running/JOB/lock; the kernel gives it back when the last process that
holds it is dead. Leases are in leases.py. Not here: the way of a job (spool.py).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from pathlib import Path

from service.durable import read_plain, sync_folder
from service.errors import ServiceError
from service.leases import is_leased

LOCK = "lock"
LOCKS, LEASES = "locks", "leases"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system says that has no locks."""
_MARKER = "ownership"


class KernelLock:
    """The held lock on a job's folder; a worker that inherits it keeps the job owned when this process dies."""

    lost = False

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What a worker inherits."""
        return (self._descriptor,) if self._descriptor >= 0 else ()

    def renew(self) -> float:
        """Nothing is to be renewed: never again."""
        return float("inf")

    def release(self) -> None:
        """Give it back. May be called twice."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):  # closed all the same
                os.close(self._descriptor)
            self._descriptor = -1


def lock(folder: Path) -> KernelLock | None:
    """The lock on a job's folder, or None if it has an owner or is gone. Raises OSError."""
    path = folder / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between the open and the lock the job may have ended and moved on with its lock file.
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return KernelLock(descriptor)
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def is_owned(folder: Path) -> bool:
    """Whether somebody owns the job, as far as can be told at once: a lease counts until it is taken over.

    A lock that cannot be opened (another user's) counts as held.
    """
    if is_leased(folder):
        return True
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
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


def agreed(root: Path) -> str | None:
    """LOCKS or LEASES, as this spool says; None if no daemon has served it yet. ServiceError if it cannot be told."""
    marker = root / _MARKER
    try:
        found = read_plain(marker).decode("ascii", "replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ServiceError(
            f"spool {root}: {marker} cannot be read ({error.strerror}), so it is not known how its jobs are owned"
        ) from error
    if found not in (LOCKS, LEASES):
        raise ServiceError(
            f"spool {root}: {marker} must say {LOCKS} or {LEASES}, so it is not known how its jobs are owned; stop all "
            "daemons of this spool and write the one that holds into it"
        )
    return found


def agree(root: Path, how: str) -> None:
    """Write it down, durably, unless it was. Raises OSError; ServiceError if somebody has written the other one."""
    marker = root / _MARKER
    temporary = root / f".{_MARKER}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "x", encoding="ascii") as file:
            file.write(f"{how}\n")
            file.flush()
            os.fsync(file.fileno())
        _link(temporary, marker)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    sync_folder(root)  # also for one that was there: whoever wrote it may not have got so far
    if (found := agreed(root)) != how:
        raise ServiceError(f"spool {root}: its jobs are owned through {found}, says {marker}, and not through {how}")


def _link(temporary: Path, marker: Path) -> None:
    """Give the file its name, unless something has it."""
    try:
        os.link(temporary, marker)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        if not os.path.lexists(marker):  # no hard links here: two first starts in the same moment would race
            os.rename(temporary, marker)
