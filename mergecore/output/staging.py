"""The folder in which an output grows before it has its name: lock, journal, publishing by one rename.

Not for what is written into it (writer.py). The staging folder `.NAME.partial` lies beside the output NAME:

    lock             flock'ed while a merge writes; its content says who
    journal.jsonl    which tensors are complete and on disk
    output/          what becomes NAME
    scratch/         of a method that is fitted on samples: what it resumes from

Publishing renames `output/` to NAME and removes the rest afterwards. So NAME is complete in the moment it appears and
never holds a journal or a lock; a crash before the rename leaves a staging folder that resumes, a crash right after it
leaves the journal and the lock, which the next attempt to write NAME removes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

from mergecore.errors import OutputError, OutputExistsError


class Staging:
    """The staging folder of the output directory `out`. Raises OutputError, or OutputExistsError for a taken name."""

    def __init__(self, out: str | Path) -> None:
        self.out = Path(os.path.abspath(out))
        self.folder = self.out.parent / f".{self.out.name}.partial"
        self.output = self.folder / "output"
        self.journal = Journal(self.folder / "journal.jsonl")
        self.scratch = self.folder / "scratch"
        self._lock = -1
        self._lock_path = self.folder / "lock"
        self._made: list[Path] = []  # parents of `out` that did not exist, outermost first

    def enter(self) -> None:
        """Makes the folder and locks it. Refuses if `out` is taken or another merge is writing it."""
        try:
            self.refuse_taken()
        except OutputExistsError:
            if self.folder.exists() and not self.output.exists():  # a crash between rename and removal
                with suppress(OSError, OutputError):
                    self._lock = self._take_lock()
                    self.leave(keep=False)
            raise
        try:
            with reporting("create", self.folder):
                self._make_parents()
                self._lock = self._take_lock()
            self.refuse_taken()  # now nobody else publishes there
        except BaseException:
            self.leave(keep=True)
            raise

    def refuse_taken(self) -> None:
        """Raises unless `out` is absent or an empty directory that a rename can replace."""
        if not self.out.name:
            raise OutputError(f"{self.out} cannot be an output: it has no name; give a new directory inside it")
        with reporting("look at", self.out):
            try:
                mode = os.lstat(self.out).st_mode
            except (FileNotFoundError, NotADirectoryError):
                return
            if not stat.S_ISDIR(mode) or os.listdir(self.out):
                raise _exists(self.out)
            if os.path.ismount(self.out):
                raise OutputError(f"{self.out} is a mount point and cannot be replaced; give a new directory inside it")

    def publish(self) -> None:
        """Gives `output/`, whose files are durable, the name `out`, durably. The folder is left for `leave`."""
        with reporting("sync", self.output):
            sync_path(self.output)
        self.refuse_taken()
        try:
            os.rename(self.output, self.out)  # replaces an empty directory, and nothing else
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise _exists(self.out) from error
            raise OutputError(f"cannot rename {self.output} to {self.out}: {error.strerror}") from error
        self._made.clear()
        # Before the journal goes: if a power loss undoes the rename, the journal must be there.
        with reporting("sync", self.out.parent):
            sync_path(self.folder)
            sync_path(self.out.parent)

    def leave(self, keep: bool) -> None:
        """Unlocks. `keep`: journal and `output/` stay; else all that was made here goes. Raises nothing."""
        self.journal.close()
        if self._lock >= 0:
            if not keep:
                remove_all(
                    [self.journal.path, self.output, self.scratch]
                )  # the journal first: without files it would be a lie
            remove_all([self._lock_path])
        with suppress(OSError):  # not empty: kept, or the next merge to this output is in it already
            self.folder.rmdir()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        for folder in reversed(self._made):
            with suppress(OSError):
                folder.rmdir()

    def _make_parents(self) -> None:
        for folder in reversed(self.folder.parents):
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                self._made.append(folder)
                sync_path(folder.parent)

    def _take_lock(self) -> int:
        """Makes the folder if needed and locks it; the file descriptor holds the lock until it is closed."""
        while True:
            self.folder.mkdir(exist_ok=True)
            try:
                descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                continue  # its former owner has just removed the folder
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(descriptor, self._lock_path):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, _myself().encode(), 0)
                    return descriptor
            except BlockingIOError:
                holder = os.pread(descriptor, 500, 0).decode(errors="replace") or "a process that has just started"
                os.close(descriptor)
                raise OutputError(
                    f"another merge is writing {self.out} ({holder}); wait for it, stop it, or choose another output"
                ) from None
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # it had been removed when it was unlocked: what is locked is no longer in the folder


class Journal:
    """A file of JSON lines, each with a checksum of itself: after a crash the lines before the first torn one count."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        self._good = 0  # bytes of whole lines

    def read(self) -> list[dict[str, Any]]:
        """The records up to the first line that is not whole; none if there is no journal."""
        records: list[dict[str, Any]] = []
        self._good = 0
        with suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
            for line in self.path.read_bytes().splitlines(keepends=True):
                record = json.loads(line)
                del record["check"]
                if line != _line(record):
                    break
                records.append(record)
                self._good += len(line)
        return records

    def start(self, head: dict[str, Any]) -> None:
        """Begins a new journal with one record. Raises OSError."""
        self._good = 0
        self.go_on()
        self.append([head])

    def go_on(self) -> None:
        """Opens the journal to append to what `read` returned; what follows that is cut off. Raises OSError."""
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        os.ftruncate(self._descriptor, self._good)

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Adds records; they are on disk when this returns. Raises OSError."""
        data = b"".join(map(_line, records))
        while data:
            data = data[os.write(self._descriptor, data) :]
        os.fsync(self._descriptor)

    def close(self) -> None:
        """May be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def sync_path(path: Path) -> None:
    """fsync of a file or a folder. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_all(paths: Iterable[Path]) -> None:
    """Removes files and folders as far as possible. Raises nothing."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


@contextmanager
def reporting(doing: str, path: Path) -> Iterator[None]:
    """Turns an OSError into an OutputError "cannot DOING PATH: reason"."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot {doing} {path}: {error.strerror or error}") from error


def _line(record: dict[str, Any]) -> bytes:
    check = xxhash.xxh3_64_hexdigest(json.dumps(record).encode())
    return (json.dumps({**record, "check": check}) + "\n").encode()


def _myself() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _exists(out: Path) -> OutputExistsError:
    return OutputExistsError(f"{out} exists already and was not touched; choose another output or move it away")
