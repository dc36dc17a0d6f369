"""What the machine can move: the floors of every merge, measured on the same files and in the same run as merges.

    python -m benchmarks.floors [--geometry 0.5b] [--work DIR] [--json]

GB/s of reading and copying memory far larger than the caches, with one thread and with all; seconds of reading every
input byte once through a mapping with all threads, of writing an output's bytes once (preallocated) and of syncing
them; GB/s of the disk, cold. A copy counts what is read and what is written.
"""

from __future__ import annotations

import argparse
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable
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


def write_once(path: Path, nbytes: int) -> tuple[float, float]:
    """Seconds of writing a preallocated file, and of syncing it."""
    step = bytes(bytearray(os.urandom(1 << 20)) * (STEP >> 20))
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
        started = time.perf_counter()
        for begin in range(0, nbytes, STEP):
            os.pwrite(descriptor, step[: nbytes - begin], begin)
        written = time.perf_counter()
        os.fdatasync(descriptor)
        return written - started, time.perf_counter() - written
    finally:
        os.close(descriptor)


def cold(path: Path) -> float:
    """GB/s of reading a file that the page cache does not hold."""
    descriptor = os.open(path, os.O_RDONLY)
    buffer = bytearray(STEP)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        started, nbytes = time.perf_counter(), 0
        while count := os.preadv(descriptor, [buffer], nbytes):
            nbytes += count
        return nbytes / (time.perf_counter() - started) / 1e9
    finally:
        os.close(descriptor)


def measure(folders: list[Path], work: Path) -> dict[str, float]:
    """All floors of merging `folders` into a model of the first one's size in `work`."""
    files = [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]
    output = sum(path.stat().st_size for path in folders[0].glob("*.safetensors"))
    found = memory()
    read_once(files)  # warms the cache
    found["read all inputs once, s"] = seconds(lambda: read_once(files))
    path = work / "floor"
    rounds = [write_once(path, output) for _ in range(2)]
    found["write the output once, s"] = min(written for written, _ in rounds)
    found["sync the output, s"] = min(synced for _, synced in rounds)
    found["disk, cold read, GB/s"] = cold(path)
    found["disk, write and sync, GB/s"] = output / min(map(sum, rounds)) / 1e9
    path.unlink()
    return found


def floor_of_a_merge(found: dict[str, float]) -> float:
    """Seconds: all inputs once, the output written and synced."""
    return found["read all inputs once, s"] + found["write the output once, s"] + found["sync the output, s"]


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
