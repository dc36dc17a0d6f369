"""Which job in done/ a fingerprint is of: a note for each, SPOOL/.fingerprints/FINGERPRINT. Where they come from:
duplicates.py.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from service.durable import make_folder, read_plain, write_atomic
from service.status import JobStatus, read_status

KNOWN = ".fingerprints"
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")


def remember(spool: Path, status: JobStatus) -> None:
    """Note which job a fingerprint is of, before it lies in done/: `remembered` looks whether it does."""
    if _FINGERPRINT.fullmatch(status.fingerprint):
        known = spool / KNOWN
        if not known.exists():
            make_folder(known)
        write_atomic(known / status.fingerprint, status.job)


def forget(spool: Path, status: JobStatus) -> None:
    """A job is removed from done/."""
    if _FINGERPRINT.fullmatch(status.fingerprint):
        note = spool / KNOWN / status.fingerprint
        with contextlib.suppress(OSError):
            if read_plain(note) == status.job.encode():
                note.unlink()


def remembered(spool: Path, fingerprint: str) -> JobStatus | None:
    """The last job in done/ that had this fingerprint, if it is still there."""
    if not _FINGERPRINT.fullmatch(fingerprint):
        return None
    try:
        job = read_plain(spool / KNOWN / fingerprint).decode()
    except (OSError, ValueError):
        return None
    if job.startswith(".") or "/" in job:
        return None
    found = read_status(spool / "done" / job)
    return found if found.fingerprint == fingerprint and found.success == "done" else None
