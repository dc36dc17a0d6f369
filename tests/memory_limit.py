"""A memory limit of the kernel's for real processes: a cgroup of version 2 or 1, whichever this host has."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")


class MemoryLimit:
    """A cgroup; processes that are put in, and those that they start, have so much memory together."""

    def __init__(self, folder: Path, files: dict[str, str]) -> None:
        self.folder, self._files = folder, files

    def add(self, pid: int) -> None:
        (self.folder / "cgroup.procs").write_text(str(pid))

    @property
    def command(self) -> list[str]:
        """In front of a command: it runs within the limit."""
        return ["sh", "-c", f'echo $$ > {self.folder}/cgroup.procs && exec "$@"', "sh"]

    @property
    def kills(self) -> int:
        """How many processes the kernel has killed for memory."""
        found = re.search(r"^oom_kill (\d+)", (self.folder / self._files["kills"]).read_text(), re.MULTILINE)
        return int(found[1]) if found else 0


@contextlib.contextmanager
def memory_limit(nbytes: int) -> Iterator[MemoryLimit]:
    """A limit of `nbytes`, without swap; skips the test where no cgroup can be made."""
    version_1 = (ROOT / "memory" / "memory.limit_in_bytes").exists()
    parent = ROOT / "memory" if version_1 else ROOT
    files = (
        {"limit": "memory.limit_in_bytes", "swap": "memory.swappiness", "kills": "memory.oom_control"}
        if version_1
        else {"limit": "memory.max", "swap": "memory.swap.max", "kills": "memory.events"}
    )
    folder = parent / f"mergecore-test-{os.getpid()}-{time.monotonic_ns()}"
    try:
        if not version_1:
            (parent / "cgroup.subtree_control").write_text("+memory")
        folder.mkdir()
        (folder / files["limit"]).write_text(str(nbytes))
        with contextlib.suppress(OSError):  # a kernel without swap has no such file
            (folder / files["swap"]).write_text("0")
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        yield MemoryLimit(folder, files)
    finally:
        end = time.monotonic() + 30
        while True:  # until the kernel has seen the last process off
            try:
                folder.rmdir()
                break
            except OSError:
                assert time.monotonic() < end, f"{folder} is still in use"
                time.sleep(0.05)
