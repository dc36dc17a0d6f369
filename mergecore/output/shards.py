"""The shard files of an output while they grow: reserved, written at any offset, synced.

Where the file system can, whole pages go from the writer's buffers straight to the disk: the page cache, which would
be filled by a copy at the cost of a core, keeps the inputs instead. The rest is written through the page cache, whose
write-back starts early. Not for buffers, threads and checksums (writer.py) or for what bytes lie where (layout.py).
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from mergecore.confined import OutputFolder
from mergecore.errors import OutputError
from mergecore.output.buffers import PAGE, address_of
from mergecore.output.layout import Shard

WRITE_STEP = 16 << 20  # bytes written at once; through the page cache: before their write-back starts


class DiskFull(Exception):
    """The file system, or a quota, has not the room for the shards."""


class ShardFiles:
    """The open files of `shards` in `folder`; all methods raise OutputError.

    Shard n is of lane n % `lanes`. A thread for each lane may write and sync its shards. `direct`: past the page cache
    where the file system can. Of what goes through it `dirty_limit` bytes are not on disk at most.
    """

    def __init__(
        self, folder: OutputFolder, shards: Sequence[Shard], *, direct: bool, dirty_limit: int, lanes: int
    ) -> None:
        self._folder, self._shards, self._wants_direct = folder, shards, direct
        self._descriptors: list[int] = []
        self._direct: list[int | None] = []  # the same files, past the page cache
        self._write_back = [_WriteBack(dirty_limit // lanes) for _ in range(lanes)]
        self._unsynced = [False] * len(shards)

    def open(self) -> None:
        """Opens all files, made where they are not there, reserves their bytes and writes their headers.

        Raises DiskFull where they do not fit.
        """
        for number, shard in enumerate(self._shards):
            try:
                self._descriptors.append(self._folder.open(shard.filename, os.O_RDWR | os.O_CREAT))
                self._direct.append(self._open_direct(number))
            except OSError as error:
                raise self._failed("open", number, "", error) from error
        # Side by side: a file system in memory makes the pages there and then.
        with ThreadPoolExecutor() as pool:
            failures = list(pool.map(_preallocate, self._descriptors, self._shards))
        for shard, failure in zip(self._shards, failures, strict=True):
            path = self._folder.path / shard.filename
            if failure is not None and failure.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull from failure
            if failure is not None:
                reason = failure.strerror
                raise OutputError(f"cannot preallocate {shard.size:,} bytes for {path}: {reason}") from failure
        for number, shard in enumerate(self._shards):
            self.write(number, 0, memoryview(bytearray(shard.header)))

    def _open_direct(self, number: int) -> int | None:
        from mergecore import _stream  # not above: importing this file needs no compiled code

        alignment = _stream.direct_alignment(self._descriptors[number]) if self._wants_direct else 0
        if alignment == 0 or PAGE % alignment != 0:
            return None
        with suppress(OSError):
            return self._folder.open(self._shards[number].filename, os.O_WRONLY | os.O_DIRECT)
        return None

    def write(self, number: int, offset: int, data: memoryview) -> None:
        """Writes bytes of a shard, past the page cache where they are whole pages in memory as in the file. The memory
        is writable."""
        self._unsynced[number] = True
        in_step = len(data) > 0 and address_of(data) % PAGE == offset % PAGE
        while data:
            try:
                nbytes = self._write_some(number, offset, data, in_step)
                if nbytes == 0:
                    raise OSError(errno.EIO, "the file system took no bytes")
            except OSError as error:
                raise self._failed("write", number, f" at offset {offset:,}", error) from error
            offset += nbytes
            data = data[nbytes:]

    def _write_some(self, number: int, offset: int, data: memoryview, in_step: bool) -> int:
        direct = self._direct[number]
        if direct is not None and in_step:
            pages = min(len(data), WRITE_STEP) // PAGE * PAGE
            if offset % PAGE == 0 and pages > 0:
                try:
                    return os.pwrite(direct, data[:pages], offset)
                except OSError as error:
                    if error.errno != errno.EINVAL:  # as some file systems say only now
                        raise
                    os.close(direct)
                    self._direct[number] = None
            else:
                data = data[: PAGE - offset % PAGE]
        # In steps that end where the file offset is a multiple of WRITE_STEP.
        nbytes = os.pwrite(self._descriptors[number], data[: WRITE_STEP - offset % WRITE_STEP], offset)
        self._write_back[number % len(self._write_back)].wrote(self._descriptors[number], offset, nbytes)
        return nbytes

    def sync(self, lane: int) -> None:
        """Everything that was written to the shards of a lane is on disk when this returns."""
        for number in range(lane, len(self._shards), len(self._write_back)):
            if not self._unsynced[number]:
                continue
            try:
                os.fdatasync(self._descriptors[number])
            except OSError as error:
                raise self._failed("sync", number, "", error) from error
            self._unsynced[number] = False
        self._write_back[lane].synced()

    def close(self) -> None:
        """Closes all files, written or not."""
        for descriptor in (*self._descriptors, *self._direct):
            if descriptor is not None:
                os.close(descriptor)
        self._descriptors, self._direct = [], []

    def _failed(self, doing: str, number: int, where: str, error: OSError) -> OutputError:
        path = self._folder.path / self._shards[number].filename
        return OutputError(f"cannot {doing} {path}{where}: {error.strerror or error}")


class _WriteBack:
    """Starts write-back early and keeps what is not on disk yet below a limit, one contiguous range after another.

    Left to itself the kernel collects gigabytes of dirty pages; then other writers stall and the last sync is long.
    """

    def __init__(self, limit: int) -> None:
        from mergecore import _stream  # not above: importing this file needs no compiled code

        self._start_writeback = _stream.start_writeback
        self._wait_writeback = _stream.wait_writeback
        self._limit = limit
        self._descriptor = -1
        self._begin = self._end = 0  # written, its write-back not started
        self._started: deque[tuple[int, int, int]] = deque()
        self._nbytes = 0  # of both

    def wrote(self, descriptor: int, offset: int, nbytes: int) -> None:
        """Takes note of bytes just written; may wait for earlier ones. Raises OSError if the disk failed on them."""
        if (descriptor, offset) != (self._descriptor, self._end):
            self._start()
            self._descriptor, self._begin = descriptor, offset
        self._end = offset + nbytes
        self._nbytes += nbytes
        if self._end % WRITE_STEP == 0:  # at a page boundary, so that no page is written back twice
            self._start()
        while self._nbytes > self._limit and self._started:
            self._wait_writeback(*self._started[0])
            self._nbytes -= self._started.popleft()[2]

    def synced(self) -> None:
        """Everything written so far is on disk."""
        self._started.clear()
        self._begin = self._end
        self._nbytes = 0

    def _start(self) -> None:
        if self._begin < self._end:
            job = (self._descriptor, self._begin, self._end - self._begin)
            self._start_writeback(*job)
            self._started.append(job)
            self._begin = self._end


def _preallocate(descriptor: int, shard: Shard) -> OSError | None:
    """Reserves a shard's bytes; returns what prevents it."""
    try:
        os.posix_fallocate(descriptor, 0, shard.size)
    except OSError as error:
        return error
    return None
