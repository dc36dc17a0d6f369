"""The drop folder: which files in incoming/ are specs, which of them are complete, and whose turn is next.

A file is complete when an event said so (a writer closed it, or it was renamed into the folder), or when size, mtime
and inode have not changed for the settle time. The clock is monotonic, so clock jumps decide nothing. Nothing here
parses a spec: the only thing looked for is its priority.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mergecore.printable import printable
from service.resources import read_priority
from service.status import JobStatus

log = logging.getLogger("mergecore.service")

SUFFIXES = (".yaml", ".yml", ".json")
PATIENCE = 60.0
"""Seconds without a change after which a file counts as complete though a write, but no close, was seen.

Its writer still has it open, or the close event was lost.
"""


def is_ignored(name: str) -> bool:
    """Whether a name in incoming/ is a temporary one of an editor or of a copying program."""
    return name.startswith(".") or name.endswith((".tmp", ".part", "~", ".swp"))


def is_spec(name: str) -> bool:
    """Whether a name in incoming/ is a spec's."""
    return not is_ignored(name) and name.lower().endswith(SUFFIXES)


@dataclass
class _File:
    signature: tuple[int, int, int]
    """Size, mtime in ns, inode."""
    since: float
    """When the signature was first seen, on the monotonic clock."""
    complete: bool = False
    written: bool = False
    """Somebody writes to it: a write event came after the last close."""
    priority: int | None = None


class Incoming:
    """What lies in the drop folder. Events make it quick; without them `scan` alone finds everything.

    `settle`: seconds without a change after which a file counts as complete. Not thread-safe.
    """

    def __init__(self, folder: Path, settle: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder = folder
        self.settle = settle
        self.waiting = 0
        """Specs seen by the last scan, complete or not, and not taken since."""
        self._clock = clock
        self._files: dict[str, _File] = {}
        self._strangers: set[str] = set()

    def note_written(self, name: str) -> None:
        """An event: somebody wrote to the file, so it is open until `note_complete`."""
        file = self._look(name)
        if file is not None and not file.complete:  # complete: its attributes changed, not its content
            file.written = True

    def note_complete(self, name: str) -> None:
        """An event: a writer closed the file, or it was renamed into the folder."""
        file = self._look(name)
        if file is not None:
            # An empty file is what `touch` and editors leave before the content: let it settle.
            file.written, file.complete = False, file.signature[0] > 0

    def forget(self, name: str) -> None:
        """The file was taken: another one of this name starts anew."""
        if self._files.pop(name, None) is not None:
            self.waiting -= 1

    def scan(self) -> list[str]:
        """The names of the complete specs, in the order of their turn: priority, then arrival. Raises OSError."""
        strangers = self._take_stock()
        for name in sorted(strangers - self._strangers):
            log.warning("incoming/%s is left alone: specs are plain files named .yaml, .yml or .json", printable(name))
        self._strangers = strangers
        self.waiting = len(self._files)
        now = self._clock()
        return self._in_turn([name for name, file in self._files.items() if self._due(file) <= now])

    def next_due(self) -> float | None:
        """Seconds until a file that is not complete yet may be, if nothing happens to it; None if there is none."""
        now = self._clock()
        waits = [due - now for file in self._files.values() if (due := self._due(file)) > now]
        return min(waits, default=None)

    def queued(self) -> list[JobStatus]:
        """The specs that wait, in the order of their turn were all complete, as statuses named after their files."""
        try:
            self._take_stock()
        except OSError:
            return []
        return [
            JobStatus(job=printable(name), state="queued", spec=printable(name), created=_dated(self._files[name]))
            for name in self._in_turn(list(self._files))
        ]

    def _take_stock(self) -> set[str]:
        """Look at every file anew; the names that are neither specs nor temporary. Raises OSError."""
        now = self._clock()
        known, self._files = self._files, {}
        strangers = set()
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if is_ignored(entry.name):
                    continue
                try:
                    found = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if is_spec(entry.name) and stat.S_ISREG(found.st_mode):
                    self._files[entry.name] = _updated(known.get(entry.name), found, now)
                elif not stat.S_ISDIR(found.st_mode):
                    strangers.add(entry.name)
        return strangers

    def _in_turn(self, names: list[str]) -> list[str]:
        return sorted(names, key=lambda name: (-self._priority(name), self._files[name].signature[1], name))

    def _due(self, file: _File) -> float:
        """When the file counts as complete if nothing more happens to it."""
        return file.since if file.complete else file.since + (PATIENCE if file.written else self.settle)

    def _look(self, name: str) -> _File | None:
        """The file as it is now; the event may be about one that is gone."""
        if not is_spec(name):
            return None
        try:
            found = os.lstat(self.folder / name)
        except OSError:
            return None
        file = self._files[name] = _updated(self._files.get(name), found, self._clock())
        return file

    def _priority(self, name: str) -> int:
        file = self._files[name]
        if file.priority is None:
            file.priority = read_priority(self.folder / name)
        return file.priority


def _updated(file: _File | None, found: os.stat_result, now: float) -> _File:
    """`file` if it is unchanged; else what is known about the changed one: an event about its inode still holds."""
    signature = (found.st_size, found.st_mtime_ns, found.st_ino)
    if file is None or file.signature[2] != found.st_ino:
        return _File(signature, now)
    if file.signature != signature:
        return _File(signature, now, written=file.written)
    return file


def _dated(file: _File) -> str:
    when = datetime.fromtimestamp(file.signature[1] / 1e9, UTC)
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")
