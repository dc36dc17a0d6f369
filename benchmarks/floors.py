"""What the machine can move: the floors of every merge, measured on the same files and in the same run as merges.

    python -m benchmarks.floors [--geometry 0.5b] [--work DIR] [--json]

GB/s of reading and copying memory far larger than the caches, with one thread and with all; seconds of reading every
input byte once through a mapping with all threads, and with the page cache cold; of writing an output's bytes once
(preallocated) and of syncing them, through the page cache and past it. A copy counts what is read and what is written.
"""

from __future__ import annotations

import argparse
import math
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.checkpoints import GEOMETRIES, make
from benchmarks.reporting import add_json, tell

MEMORY = 1 << 30
STEP = 16 << 20


def seconds(action: Callable[[], object], rounds: int = 3) -> float:
    """The best of several rounds."""
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - started)
    return best


def memory() -> dict[str, float]:
    """GB/s of memory."""
    numbers = torch.ones(MEMORY // 8, dtype=torch.int64)
    other = torch.empty_like(numbers)
    threads, found = torch.get_num_threads(), {}
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        found[f"read memory, {count} threads, GB/s"] = MEMORY / seconds(numbers.sum) / 1e9
        found[f"copy memory, {count} threads, GB/s"] = 2 * MEMORY / seconds(lambda: other.copy_(numbers)) / 1e9
    torch.set_num_threads(threads)
    return found


def mapped(path: Path) -> torch.Tensor:
    """A file's bytes."""
    with open(path, "rb") as file:
        # Private: torch asks for memory that could be written.
        pages = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def read_once(files: list[Path]) -> None:
    """Every byte through a mapping, with all threads."""
    for path in files:
        pages = mapped(path)
        for begin in range(0, pages.numel() // 8 * 8, 8 * STEP):
            piece = pages[begin : begin + 8 * STEP]
            piece[: piece.numel() // 8 * 8].view(torch.int64).sum()


def write_once(path: Path, nbytes: int, flags: int = 0) -> tuple[float, float]:
    """Seconds of writing a preallocated file, and of syncing it; `flags`: of opening it. Raises OSError."""
    nbytes = nbytes // mmap.PAGESIZE * mmap.PAGESIZE
    with mmap.mmap(-1, STEP) as step:  # which begins on a page
        step.write(os.urandom(1 << 20) * (STEP >> 20))
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | flags)
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
            started = time.perf_counter()
            with memoryview(step) as data:
                for begin in range(0, nbytes, STEP):
                    os.pwrite(descriptor, data[: nbytes - begin], begin)
            written = time.perf_counter()
            os.fdatasync(descriptor)
            return written - started, time.perf_counter() - written
        finally:
            os.close(descriptor)


def forget(files: Iterable[Path]) -> None:
    """The page cache holds these files no longer."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_cold(files: list[Path]) -> None:
    """Every byte from the disk."""
    buffer = bytearray(STEP)
    forget(files)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def measure(folders: list[Path], work: Path) -> dict[str, float]:
    """All floors of merging `folders` into a model of the first one's size in `work`."""
    files = [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]
    output = sum(path.stat().st_size for path in folders[0].glob("*.safetensors"))
    found = memory()
    read_once(files)  # warms the cache
    found["read all inputs once, s"] = seconds(lambda: read_once(files))
    found["read all inputs once, cold, s"] = seconds(lambda: read_cold(files), rounds=1)
    read_once(files)
    path = work / "floor"
    for how, flags in (("", 0), (" past the page cache", os.O_DIRECT)):
        try:
            rounds = [write_once(path, output, flags) for _ in range(3)]
        except OSError:  # not every file system can
            continue
        best = min(rounds, key=sum)
        found[f"write the output{how}, s"], found[f"sync the output{how}, s"] = best
    path.unlink()
    return found


def floor_of_a_merge(found: dict[str, float], *, cold: bool = False) -> float:
    """Seconds: all inputs once, the output written and synced, the faster way."""
    read = found["read all inputs once, cold, s" if cold else "read all inputs once, s"]
    ways = ("", " past the page cache")
    written = [sum(found.get(f"{doing} the output{how}, s", math.inf) for doing in ("write", "sync")) for how in ways]
    return read + min(written)


def table(found: dict[str, float]) -> Table:
    """For people."""
    shown = Table("floor", "measured")
    for name, value in found.items():
        shown.add_row(name, f"{value:.2f}")
    return shown


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="0.5b")
    parser.add_argument("--work", type=Path, help="folder for the checkpoints; kept (default: a temporary one)")
    add_json(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mergecore-bench-") as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        found: dict[str, Any] = measure(make(work / options.geometry, GEOMETRIES[options.geometry]), work)
    tell(options, found, table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
