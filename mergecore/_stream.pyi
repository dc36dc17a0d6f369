"""Windows over files in a known order, read ahead; early write-back (csrc/stream.cpp)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import TracebackType

class ReadFault(OSError):
    """A file could not be read to its end: truncated or modified while in use, or an I/O error."""

    path: str
    offset: int
    reason: str

class WindowStream:
    """Windows over files in a known order, read ahead by threads of its own.

    A window is a list of pieces (file index, offset, bytes). At most `depth + 1` windows that are not kept are
    resident: the one that is out, and `depth` after it.

    Mode "map" shows the mapped files themselves; mode "pread" reads into reused buffers (network mounts). Whatever
    was submitted is brought into the page cache while there is nothing to make resident.
    """

    def __init__(
        self,
        files: Sequence[str | os.PathLike[str]],
        mode: str = "map",
        depth: int = 1,
        *,
        threads: int = 1,
        opener: Callable[[str], int] | None = None,
    ) -> None:
        """No file is opened yet; ValueError for an unknown mode, a negative depth or less than one thread.

        `threads` share the parts of a window.
        `opener` returns a descriptor to read a path with, which the stream then owns; without one os.open does.
        """

    def submit(self, pieces: Sequence[tuple[int, int, int]], keep: bool = False) -> None:
        """Appends a window; the thread starts on it when it is at most `depth` windows ahead.

        `keep` leaves a mapped window's pages resident after use, for a later pass over them (no effect in mode
        "pread"). Files are opened when first named: OSError if that fails, ValueError for a piece outside its file.
        """

    def next(self) -> list[memoryview]:
        """The next window, one view per piece, as soon as it is resident; releases the previous one.

        A view is valid until the call after this one. It is exported writable because torch.frombuffer wants that;
        in mode "map" a write to it is a segmentation fault. A system call that is given a view of a truncated file
        fails with EFAULT; a plain access sees zeros, and `check` raises.
        RuntimeError when no submitted window is left, ReadFault when a file faulted, ValueError when closed.
        """

    def skip(self) -> None:
        """Passes over the next window and releases the previous one; does not wait.

        If its reading has not begun, nothing of it is read. Pages that an earlier window with `keep` left resident
        stay so if the window passed over has `keep`, too. Raises as `next` does.
        """

    def check(self) -> None:
        """Raises ReadFault if any file faulted so far, or if the files of the current window have changed.

        What was computed from a window is sound if `check`, `next` or `skip` returns normally after the computation.
        """

    def close(self) -> None:
        """Stops the thread and closes the files; idempotent. A fault stays visible to `check`."""

    def __enter__(self) -> WindowStream: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

def direct_alignment(fd: int) -> int:
    """The multiple that offsets, lengths and addresses must have where a file is read or written with O_DIRECT; 0 if
    its file system does not say that this is possible."""

def start_writeback(fd: int, offset: int, nbytes: int) -> None:
    """Starts writing dirty pages of the range to disk and returns; does nothing where it is not supported."""

def wait_writeback(fd: int, offset: int, nbytes: int) -> None:
    """Writes dirty pages of the range to disk and waits; not a replacement for fsync. OSError if it fails."""
