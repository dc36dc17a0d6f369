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
import json
import os
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

from mergecore.confined import OutputFolder
from mergecore.errors import OutputError, OutputExistsError
from mergecore.output.locking import take

LOCK, JOURNAL, OUTPUT, SCRATCH = "lock", "journal.jsonl", "output", "scratch"


class Staging:
    """The staging folder of the output directory `out`. Raises OutputError, or OutputExistsError for a taken name."""

    def __init__(self, out: str | Path) -> None:
        self.out = Path(os.path.abspath(out))
        self.folder = self.out.parent / f".{self.out.name}.partial"
        """Its path, for messages: what is done in it is done by descriptors."""
        self.journal = Journal(self.folder / JOURNAL)
        self._parent: OutputFolder
        self._inside: OutputFolder
        self._output: OutputFolder | None = None
        self._lock = -1
        self._made: list[tuple[OutputFolder, str]] = []  # parents of `out` that did not exist, outermost first

    @property
    def output(self) -> OutputFolder:
        """What becomes `out`: open from `begin` or `go_on` to `leave`."""
        assert self._output is not None
        return self._output

    def enter(self) -> None:
        """Makes the folder and locks it. Refuses if `out` is taken or another merge is writing it."""
        if not self.out.name:
            raise OutputError(f"{self.out} cannot be an output: it has no name; give a new directory inside it")
        try:
            with reporting("create", self.folder):
                self._parent = OutputFolder.at(self.out.parent, self._made)
        except BaseException:
            self._unmake()
            raise
        try:
            if self._is_left_over():
                with suppress(OSError, OutputError):
                    self._take_lock()
                    self._inside.remove([JOURNAL])
            self._refuse_taken()
            with reporting("create", self.folder):
                if self._lock < 0:
                    self._take_lock()
            self._refuse_taken()  # now nobody else publishes there
        except BaseException:
            self.leave(keep=True)
            raise

    def begin(self) -> None:
        """Makes `output/` anew. Raises OSError."""
        self._inside.remove([JOURNAL])
        self._inside.sync()  # a journal that a power loss brings back would vouch for data that is gone
        self._inside.remove([OUTPUT, SCRATCH])
        os.mkdir(OUTPUT, dir_fd=self._inside.descriptor)
        self.go_on()

    def go_on(self) -> None:
        """Opens the `output/` that is there. Raises OSError."""
        self._output = self._inside.enter(OUTPUT)

    def scratch(self) -> Path:
        """The folder `scratch/`, made if it is not there. OutputError if that fails."""
        with reporting("create", self.folder / SCRATCH):
            with suppress(FileExistsError):
                os.mkdir(SCRATCH, dir_fd=self._inside.descriptor)
            self._inside.enter(SCRATCH).close()  # a folder, and no link to one
        return self.folder / SCRATCH

    def publish(self) -> None:
        """Gives `output/`, whose files are durable, the name `out`, durably. The folder is left for `leave`."""
        with reporting("sync", self.output.path):
            self.output.sync()
        self._refuse_taken()
        self._refuse_moved()
        folder, parent = self._inside.descriptor, self._parent.descriptor
        try:
            # Replaces an empty directory, and nothing else.
            os.rename(OUTPUT, self.out.name, src_dir_fd=folder, dst_dir_fd=parent)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise _exists(self.out) from error
            raise OutputError(f"cannot rename {self.output.path} to {self.out}: {error.strerror}") from error
        # Before the journal goes: if a power loss undoes the rename, the journal must be there.
        with reporting("sync", self.out.parent):
            self.sync()

    def sync(self) -> None:
        """Makes the folder, and that it is there, durable. Raises OSError."""
        self._inside.sync()
        self._parent.sync()

    def leave(self, keep: bool) -> None:
        """Unlocks. `keep`: journal and `output/` stay; else all that was made here goes. Raises nothing."""
        self.journal.close()
        if self._output is not None:
            self._output.close()
        if self._lock >= 0:
            if not keep:
                self._inside.remove([JOURNAL, OUTPUT, SCRATCH])  # the journal first: without files it would be a lie
            self._inside.remove([LOCK])
        with suppress(OSError):  # not empty: kept, or the next merge to this output is in it already
            os.rmdir(self.folder.name, dir_fd=self._parent.descriptor)
            self._parent.sync()  # a power loss must not bring it back beside a finished output
        if self._lock >= 0:
            self._inside.close()
            os.close(self._lock)
            self._lock = -1
        self._parent.close()
        self._unmake()

    def _unmake(self) -> None:
        """Removes the parents that were made, unless something lies in them, and forgets them."""
        while self._made:
            folder, name = self._made.pop()
            with suppress(OSError):
                os.rmdir(name, dir_fd=folder.descriptor)
            folder.close()

    def _refuse_taken(self) -> None:
        """Raises unless `out` is absent or an empty directory that a rename can replace."""
        with reporting("look at", self.out):
            if not self._parent.has(self.out.name):
                return
            status = self._parent.status(self.out.name)
            if not stat.S_ISDIR(status.st_mode):
                raise _exists(self.out)
            folder = self._parent.enter(self.out.name)
            try:
                taken = bool(folder.names())
            finally:
                folder.close()
            if taken:
                raise _exists(self.out)
            if status.st_dev != os.fstat(self._parent.descriptor).st_dev:
                raise OutputError(f"{self.out} is a mount point and cannot be replaced; give a new directory inside it")

    def _refuse_moved(self) -> None:
        """Raises where the path of the parent leads elsewhere by now: what has no path has no readers."""
        with suppress(OSError):
            if os.path.samestat(os.stat(self.out.parent), os.fstat(self._parent.descriptor)):
                return
        raise OutputError(
            f"{self.out.parent} is no longer the folder that it was when the merge began: moved, replaced or unmounted"
        )

    def _is_left_over(self) -> bool:
        """Whether a crash between rename and removal left the folder."""
        with suppress(OSError):
            folder = self._parent.enter(self.folder.name)
            try:
                return self._parent.has(self.out.name) and not folder.has(OUTPUT)
            finally:
                folder.close()
        return False

    def _take_lock(self) -> None:
        """Makes the folder if needed and locks it; the file descriptor holds the lock until it is closed."""
        while True:
            with suppress(FileExistsError):
                os.mkdir(self.folder.name, dir_fd=self._parent.descriptor)
            try:
                inside = self._parent.enter(self.folder.name)
            except FileNotFoundError:
                continue  # its former owner has just removed the folder
            try:
                self._lock = self._locked(inside)
            except BaseException:
                inside.close()
                raise
            if self._lock >= 0:
                self._inside = self.journal.folder = inside
                return
            inside.close()

    def _locked(self, inside: OutputFolder) -> int:
        """The descriptor of the lock, -1 if the folder or the lock was removed meanwhile."""
        try:
            descriptor = inside.open(LOCK, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:
            return -1
        try:
            take(descriptor)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), inside.status(LOCK)):
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
        return -1


class Journal:
    """A file of JSON lines, each with a checksum of itself: after a crash the lines before the first torn one count."""

    folder: OutputFolder
    """Where it lies: known when the staging folder is locked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        self._good = 0  # bytes of whole lines

    def read(self) -> list[dict[str, Any]]:
        """The records up to the first line that is not whole; none if there is no journal."""
        records: list[dict[str, Any]] = []
        self._good = 0
        with suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
            with os.fdopen(self.folder.open(self.path.name, os.O_RDONLY), "rb") as file:
                lines = file.readlines()
            for line in lines:
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
        self._descriptor = self.folder.open(self.path.name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
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


def _exists(out: Path) -> OutputExistsError:
    return OutputExistsError(f"{out} exists already and was not touched; choose another output or move it away")
