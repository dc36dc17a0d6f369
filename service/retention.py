"""How long ended jobs are kept: the oldest folders in done/ and failed/ go. Outputs are never touched."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from service import fingerprints
from service.durable import sync_folder
from service.spool import Spool
from service.status import read_status

_GOING = ".removing-"


@dataclass(frozen=True)
class Keep:
    """The newest `jobs` are kept, and those of the last `days`; None: without limit."""

    jobs: int | None = None
    days: float | None = None

    def __str__(self) -> str:
        return "all" if self == KEEP_ALL else str(self.jobs) if self.days is None else f"{self.days:g}d"


KEEP_ALL = Keep()


def parse_keep(value: object) -> Keep:
    """ "all", a number of jobs, or days such as "30d". Raises ValueError."""
    if isinstance(value, Keep):
        return value
    if value == "all":
        return KEEP_ALL
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return Keep(jobs=value)
    found = re.fullmatch(r"(\d{1,5}(?:\.\d{1,6})?) ?(?:d|days?)", value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(value)
    return Keep(days=float(found[1]))


def apply(spool: Spool, done: Keep, failed: Keep, now: datetime) -> list[Path]:
    """Remove what need not be kept at `now`; the removed folders. Raises OSError.

    A folder is renamed first, so that nobody sees half of one, and removed wholly at the next call if this one dies.
    """
    removed = []
    for parent, keep in ((spool.done, done), (spool.failed, failed)):
        if keep == KEEP_ALL:
            continue
        for left in parent.glob(f"{_GOING}*"):
            shutil.rmtree(left, ignore_errors=True)
        for folder in _superfluous(parent, keep, now):
            going = folder.with_name(_GOING + folder.name)
            with contextlib.suppress(FileNotFoundError):  # retried, or removed by another daemon, meanwhile
                status = read_status(folder)
                os.rename(folder, going)
                fingerprints.forget(spool.root, status)
                shutil.rmtree(going, ignore_errors=True)
                removed.append(folder)
        sync_folder(parent)
    return removed


def _superfluous(parent: Path, keep: Keep, now: datetime) -> list[Path]:
    folders = [Path(entry.path) for entry in os.scandir(parent) if entry.is_dir() and not entry.name.startswith(".")]
    if keep.jobs is not None and len(folders) <= keep.jobs:
        return []
    dated = sorted(((_ended(folder), folder) for folder in folders), reverse=True)
    if keep.jobs is not None:
        return [folder for _, folder in dated[keep.jobs :]]
    assert keep.days is not None
    horizon = now - timedelta(days=keep.days)
    return [folder for ended, folder in dated if ended < horizon]


def _ended(folder: Path) -> datetime:
    """When the job ended; now if that cannot be told, so that it stays."""
    with contextlib.suppress(ValueError, TypeError):
        return datetime.fromisoformat(read_status(folder).finished).astimezone(UTC)
    with contextlib.suppress(OSError):
        return datetime.fromtimestamp(folder.stat().st_mtime, UTC)
    return datetime.now(UTC)
