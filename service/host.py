"""What this host gives to the service: disk space and memory, without any library."""

from __future__ import annotations

import os
from pathlib import Path


def free_and_size(folder: Path) -> tuple[int, int]:
    """Bytes of the file system of `folder` that we may still use, and all of them. Raises OSError."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize


def memory_limit() -> int:
    """Bytes of memory that this process and its children may use together: the host's, or less by a cgroup."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return limits[0]
    own = next((line[3:] for line in lines if line.startswith("0::")), "/")
    for group in (Path(own), *Path(own).parents):
        try:
            limits.append(int((Path("/sys/fs/cgroup") / str(group).lstrip("/") / "memory.max").read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(limits)
