"""A folder that nobody may read or change: the kernel (inotify) tells whether somebody did. And a racing attacker."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_ACCESS, _MODIFY, _ATTRIB, _OPEN, _CREATE, _DELETE, _MOVED = 0x1, 0x2, 0x4, 0x20, 0x100, 0x200, 0xC0
_ISDIR = 0x40000000

# Puts a link in the place of a folder and the folder back, in one system call each (renameat2 with RENAME_EXCHANGE).
# Now and then it rests, so that some attempts see one state alone.
_SWAPPING = """
import ctypes, os, random, sys, time
libc = ctypes.CDLL(None, use_errno=True)
first, second = map(os.fsencode, sys.argv[1:])
print("ready", flush=True)
while True:
    if libc.renameat2(-100, first, -100, second, 2) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if random.random() < 0.01:
        time.sleep(random.uniform(0, 0.05))
"""


class Canary:
    """Watches a folder with its files, not deeper."""

    def __init__(self, folder: Path) -> None:
        self._queue = _LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        mask = _ACCESS | _MODIFY | _ATTRIB | _OPEN | _CREATE | _DELETE | _MOVED
        for path in (folder, *folder.rglob("*")):
            if path.is_dir():
                assert _LIBC.inotify_add_watch(self._queue, os.fsencode(path), mask) >= 0

    def touched(self) -> list[str]:
        """What was opened, read or changed since the last call. To open a folder and look where it is counts not."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._queue, 1 << 16):
                while data:
                    _, mask, _, length = struct.unpack_from("iIII", data)
                    name = data[16 : 16 + length].rstrip(b"\0").decode()
                    data = data[16 + length :]
                    if mask & ~_ISDIR != _OPEN or not mask & _ISDIR:
                        found.append(f"{name} {mask:#x}")
        return found

    def close(self) -> None:
        """Ends the watch."""
        os.close(self._queue)


@contextlib.contextmanager
def guarded(folder: Path) -> Iterator[Canary]:
    """Fails the test if anything in the folder was touched meanwhile."""
    canary = Canary(folder)
    try:
        yield canary
        assert canary.touched() == []
    finally:
        canary.close()


@contextlib.contextmanager
def swapping(place: Path, link_to: Path) -> Iterator[None]:
    """Another process that makes `place`, a folder or file, a link to `link_to` and back, as often as it can."""
    other = place.with_name(f"{place.name}-other")
    other.symlink_to(link_to)
    attacker = subprocess.Popen([sys.executable, "-c", _SWAPPING, str(place), str(other)], stdout=subprocess.PIPE)
    try:
        assert attacker.stdout is not None
        assert attacker.stdout.readline() == b"ready\n"
        yield
        assert attacker.poll() is None, "the attacker gave up"
    finally:
        attacker.kill()
        attacker.wait()
        if attacker.stdout is not None:
            attacker.stdout.close()
