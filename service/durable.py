"""Files and folders of the spool that survive a power loss, and the dates that stand in them. Not for outputs."""

from __future__ import annotations

import os
import shutil
from datetime import UTC, datetime
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Make the entries of `folder` durable: a rename survives a power loss only once its folders are synced."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents durably, unless they are there. Raises OSError."""
    for missing in reversed([each for each in (folder, *folder.parents) if not each.exists()]):
        missing.mkdir(exist_ok=True)
    for parent in folder.parents:  # also of folders that were there: whoever made them may not have synced them
        try:
            sync_folder(parent)
        except PermissionError:  # not ours, so made long ago
            return


def write_atomic(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace `path`: readers see the old or the new content whole, also after a power loss; `durable`: the new one.

    One writer at a time per path: the temporary name is fixed, so that a crash leaves at most one.
    """
    temporary = temporary_of(path)
    temporary.unlink(missing_ok=True)  # a link in its place must not lead elsewhere: O_EXCL follows none
    with temporary.open("x", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # before the rename, which may reach the disk first
    os.replace(temporary, path)
    if durable:
        sync_folder(path.parent)


def read_plain(path: Path, limit: int = 64 << 10) -> bytes:
    """The beginning of a small file; a link is not followed, a pipe not waited for. Raises OSError."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        return file.read(limit)


def copy_plain(source: Path, target: Path) -> None:
    """Make a new file, durable, with the content of a small one, if that is there. Raises OSError."""
    try:
        descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    with os.fdopen(descriptor, "rb") as content, target.open("xb") as file:
        shutil.copyfileobj(content, file)
        file.flush()
        os.fsync(file.fileno())


def temporary_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def utc_now() -> str:
    """The wall-clock time, ISO 8601 in UTC. For people to read; nothing is decided by it."""
    return dated(datetime.now(UTC))


def dated(when: datetime) -> str:
    """A time in UTC as it stands in a status."""
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")
