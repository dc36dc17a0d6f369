"""A file system in memory that loses power and answers with I/O errors, for real processes (FUSE): the server.

    python tests/faulty_filesystem.py MOUNT         steered by faulty_disk.py, through an extended attribute

Until it is synced nothing is durable: the content of a file needs its fsync; an entry of a folder (a create, a rename,
a removal) needs the fsync of a folder that it changes. A rename is atomic, as on every journaling file system. What was
not synced is lost, or survives by chance: entry by entry and page by page, in any order that POSIX allows. That is
stricter than any file system in use.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import stat
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

CONTROL = "user.disk"
PAGE = 4096
SIZE = 1 << 30


@dataclass(eq=False)
class Node:
    """A file, or a folder if it has `entries`; what is on disk of it beside what processes see."""

    mode: int
    number: int
    entries: dict[str, Node] | None = None
    durable_entries: dict[str, Node] = field(default_factory=dict)
    data: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    dirty: set[int] = field(default_factory=set)
    mtime: int = field(default_factory=time.time_ns)

    def touched(self, begin: int, end: int) -> None:
        """These bytes are no longer as on disk."""
        self.dirty.update(range(begin // PAGE, -(-max(end, begin + 1) // PAGE)))
        self.mtime = time.time_ns()

    def after_power_loss(self, chance: random.Random | None) -> Node:
        """This node as a disk holds it, and what is below it."""
        entries = None
        if self.entries is not None:
            entries = {name: node.after_power_loss(chance) for name, node in self.durable_entries.items()}
        data = bytearray(self.durable)
        if chance is not None and self.dirty:
            size = chance.choice([len(self.data), len(self.durable)])
            data = bytearray(max(size, len(data)))
            data[: len(self.durable)] = self.durable
            for page in sorted(self.dirty):
                if chance.random() < 0.5:
                    data[page * PAGE : (page + 1) * PAGE] = self.data[page * PAGE : (page + 1) * PAGE]
            del data[size:]
        durable_entries = dict(entries or {})
        return Node(self.mode, self.number, entries, durable_entries, data, bytes(data), set(), self.mtime)


Change = dict[tuple[Node, str], Node | None]
"""Entries that change together: by folder and name, what is there afterwards."""


class Server:
    """The operations that libfuse asks for; it calls one after the other."""

    use_ns = True
    off: bool
    operations: int
    failures: int
    faults: list[dict[str, Any]]
    cut_at: int | None
    survives: int | None

    def __init__(self) -> None:
        self._numbers = 1
        self._format()

    # What the test wants.

    def setxattr(self, path: str, name: str, value: bytes, options: int, position: int = 0) -> int:
        command = json.loads(value)
        if "format" in command:
            self._format()
        elif "cut" in command:
            self.operations, self.cut_at, self.survives = 0, command["cut"], command["survives"]
        elif "reboot" in command:
            if not self.off:
                self._lose_power()
            self.off, self.operations, self.cut_at = False, 0, None
        elif "fail" in command:
            self.faults.append(command["fail"])
        else:
            self.faults, self.failures = [], 0
        return 0

    def getxattr(self, path: str, name: str, position: int = 0) -> bytes:
        if name != CONTROL:
            raise OSError(errno.ENODATA, name)
        return json.dumps({"operations": self.operations, "failures": self.failures, "off": self.off}).encode()

    def _format(self) -> None:
        self.root = self._new(stat.S_IFDIR | 0o755, {})
        self.pending: list[Change] = []
        self.handles: dict[int, tuple[Node, str]] = {}
        self.faults = []
        self.operations = self.failures = 0
        self.cut_at = None
        self.survives = None
        self.off = False

    def _lose_power(self) -> None:
        chance = None if self.survives is None else random.Random(self.survives)
        lost: set[tuple[Node, str]] = set()
        for change in self.pending:
            if chance is not None and chance.random() < 0.5 and not lost & change.keys():
                _apply(change)
            else:
                lost |= change.keys()
        self.pending = []
        self.root = self.root.after_power_loss(chance)
        self.off = True

    def _check(self, operation: str, path: str, *, changes: bool = False, end: int = 0) -> None:
        """Raises OSError if this operation is to fail."""
        if changes and not self.off:
            if self.cut_at is not None and self.operations >= self.cut_at:
                self._lose_power()
            self.operations += 1
        if self.off:
            raise OSError(errno.EIO, "no power")
        for fault in self.faults:
            if (
                re.fullmatch(fault["operation"], operation)
                and re.search(fault["path"], path)
                and end >= fault["beyond"]
            ):
                fault["after"] -= 1
                if fault["after"] < 0:
                    self.failures += 1
                    raise OSError(fault["code"], "as the test wants it")

    # Files.

    def create(self, path: str, mode: int, flags: int = 0) -> int:
        self._check("create", path, changes=True)
        folder, name = self._place(path)
        node = self._new(stat.S_IFREG | (mode & 0o7777))
        self._change({(folder, name): node})
        return self._handle(node, path)

    def open(self, path: str, flags: int) -> int:
        self._check("open", path)
        node = self._node(path)
        if flags & os.O_TRUNC and node.data:
            self.truncate(path, 0)
        return self._handle(node, path)

    def release(self, path: str, fh: int) -> int:
        self.handles.pop(fh, None)
        return 0

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        node, path = self._opened(fh)
        self._check("read", path, end=offset + size)
        return bytes(node.data[offset : offset + size])

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        node, path = self._opened(fh)
        self._check("write", path, changes=True, end=offset + len(data))
        end = offset + len(data)
        if len(node.data) < end:
            node.touched(len(node.data), end)
            node.data.extend(bytes(end - len(node.data)))
        node.data[offset:end] = data
        node.touched(offset, end)
        return len(data)

    def truncate(self, path: str, length: int) -> int:
        node = self._node(path)
        self._check("truncate", path, changes=True)
        node.touched(min(length, len(node.data)), max(length, len(node.data)))
        del node.data[length:]
        node.data.extend(bytes(length - len(node.data)))
        return 0

    def fallocate(self, path: str, mode: int, offset: int, size: int, fh: int) -> int:
        node, path = self._opened(fh)
        self._check("fallocate", path, changes=True)
        if len(node.data) < offset + size:
            node.touched(len(node.data), offset + size)
            node.data.extend(bytes(offset + size - len(node.data)))
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        node, path = self._opened(fh)
        self._check("fsync", path, changes=True)
        node.durable = bytes(node.data)
        node.dirty.clear()
        return 0

    # Folders.

    def opendir(self, path: str) -> int:
        self._check("open", path)
        return self._handle(self._node(path), path)

    releasedir = release

    def readdir(self, path: str, fh: int) -> list[tuple[str, dict[str, int], int]]:
        node, path = self._opened(fh)
        self._check("readdir", path)
        entries = {".": node, "..": node, **(node.entries or {})}
        return [(name, {"st_mode": each.mode, "st_ino": each.number}, 0) for name, each in entries.items()]

    def mkdir(self, path: str, mode: int) -> int:
        self._check("mkdir", path, changes=True)
        folder, name = self._place(path)
        self._change({(folder, name): self._new(stat.S_IFDIR | (mode & 0o7777), {})})
        return 0

    def rmdir(self, path: str) -> int:
        self._check("rmdir", path, changes=True)
        folder, name = self._place(path)
        if self._node(path).entries:
            raise OSError(errno.ENOTEMPTY, path)
        self._change({(folder, name): None})
        return 0

    def unlink(self, path: str) -> int:
        self._check("unlink", path, changes=True)
        self._node(path)
        self._change({self._place(path): None})
        return 0

    def link(self, path: str, source: str) -> int:
        self._check("link", path, changes=True)
        self._change({self._place(path): self._node(source)})
        return 0

    def rename(self, old: str, new: str) -> int:
        self._check("rename", new, changes=True)
        moving, place = self._node(old), self._place(new)
        assert place[0].entries is not None
        there = place[0].entries.get(place[1])
        if there is not None and there.entries:
            raise OSError(errno.ENOTEMPTY, new)
        self._change({self._place(old): None, place: moving})
        return 0

    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        """Makes durable what changed in this folder, and what that depends on."""
        node, path = self._opened(fh)
        self._check("fsync", path, changes=True)
        needed: set[tuple[Node, str]] = set()
        durable: list[Change] = []
        for change in reversed(self.pending):
            if needed & change.keys() or any(folder is node for folder, _ in change):
                needed |= change.keys()
                durable.append(change)
        for change in reversed(durable):
            _apply(change)
        self.pending = [change for change in self.pending if all(change is not each for each in durable)]
        return 0

    # Attributes.

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        node = self._node(path)
        if path != "/":
            self._check("getattr", path)
        times = dict.fromkeys(("st_atime", "st_mtime", "st_ctime"), node.mtime)
        return {"st_mode": node.mode, "st_ino": node.number, "st_size": len(node.data), "st_nlink": 1, **times}

    def chmod(self, path: str, mode: int) -> int:
        node = self._node(path)
        node.mode = stat.S_IFMT(node.mode) | (mode & 0o7777)
        return 0

    def chown(self, path: str, uid: int, gid: int) -> int:
        return 0

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
        self._node(path).mtime = times[1] if times is not None else time.time_ns()
        return 0

    def statfs(self, path: str) -> dict[str, int]:
        self._check("statfs", path)
        blocks = SIZE // PAGE
        return {"f_bsize": PAGE, "f_frsize": PAGE, "f_blocks": blocks, "f_bfree": blocks, "f_bavail": blocks}

    def init(self, path: str) -> None:
        pass

    def destroy(self, path: str) -> None:
        pass

    # Helpers.

    def _new(self, mode: int, entries: dict[str, Node] | None = None) -> Node:
        self._numbers += 1
        return Node(mode, self._numbers, entries)

    def _handle(self, node: Node, path: str) -> int:
        self._numbers += 1
        self.handles[self._numbers] = (node, path)
        return self._numbers

    def _opened(self, fh: int) -> tuple[Node, str]:
        if fh not in self.handles:
            raise OSError(errno.EIO, "opened before the power was cut")
        return self.handles[fh]

    def _place(self, path: str) -> tuple[Node, str]:
        parent, _, name = path.rpartition("/")
        return self._node(parent), name

    def _node(self, path: str) -> Node:
        node = self.root
        for part in path.strip("/").split("/") if path.strip("/") else []:
            if node.entries is None:
                raise OSError(errno.ENOTDIR, path)
            if part not in node.entries:
                raise OSError(errno.EIO if self.off else errno.ENOENT, path)
            node = node.entries[part]
        return node

    def _change(self, change: Change) -> None:
        _apply(change, lambda folder: folder.entries)
        self.pending.append(change)


def _apply(change: Change, which: Callable[[Node], Any] = lambda folder: folder.durable_entries) -> None:
    for (folder, name), node in change.items():
        if node is None:
            which(folder).pop(name, None)
        else:
            which(folder)[name] = node


if __name__ == "__main__":
    import mfusepy

    mfusepy.FUSE(
        Server(), sys.argv[1], foreground=True, nothreads=True, hard_remove=True, use_ino=True,
        entry_timeout=0, attr_timeout=0, fsname="mergecore-test",
    )  # fmt: skip
