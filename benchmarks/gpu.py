"""Whole merges on a GPU beside what the machine can move, in one run.

    python -m benchmarks.gpu [--geometry 14b] [--work /dev/shm/mergecore] [--methods widen,linear] [--json [FILE]]

Three checkpoints and the output lie in `--work`: 4 times a checkpoint's bytes (14b: 114 GB; fewer with --geometry 7b or
1.8b). In a folder that is memory (tmpfs), no disk is part of the figures. Floors: pinned memory to the GPU and back, a
copy on the GPU, mapped input files to pinned memory with all threads, and writing a file of the output folder. The
output of a smaller merge is compared with the CPU's, byte for byte.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.checkpoints import GEOMETRIES, make_one, names
from benchmarks.floors import mapped
from benchmarks.merges import write_specs
from benchmarks.reporting import add_json, tell

GIB = 1 << 30
PIECE = 48 << 20


def best(nbytes: int, action: Callable[[], object], rounds: int = 3) -> float:
    """GB/s of an action that moves `nbytes`; the best of several rounds."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        action()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return nbytes / min(seconds) / 1e9


def floors(file: Path, folder: Path) -> dict[str, float]:
    """GB/s of what every merge has to do; copies count what is read and what is written."""
    pinned = torch.empty(GIB, dtype=torch.uint8, pin_memory=True).fill_(1)
    there, other = (torch.empty(2 * GIB, dtype=torch.uint8, device="cuda") for _ in range(2))
    found = {
        "pinned to GPU": best(GIB, lambda: there[:GIB].copy_(pinned, non_blocking=True)),
        "GPU to pinned": best(GIB, lambda: pinned.copy_(there[:GIB], non_blocking=True)),
        "copy on the GPU": best(4 * GIB, lambda: other.copy_(there)),
    }
    pages = mapped(file)[: 2 * GIB]
    size = pages.numel()

    def to_pinned() -> None:
        for begin in range(0, size, PIECE):
            piece = pages[begin : begin + PIECE]
            pinned[: piece.numel()].copy_(piece)

    found["mapped to pinned"] = best(size, to_pinned)
    bytes_: Any = memoryview(pinned.numpy())  # type: ignore[arg-type]
    path = folder / "floor"

    def write() -> None:
        with open(path, "wb", buffering=0) as out:
            os.posix_fallocate(out.fileno(), 0, GIB)
            for begin in range(0, GIB, 16 << 20):
                out.write(bytes_[begin : begin + (16 << 20)])
        path.unlink()

    found["write a file"] = best(GIB, write)
    return found


def merged(spec: Path, out: Path, device: str) -> dict[str, Any]:
    """What the command tells of a merge, and `process`: seconds from its start to its end."""
    command = [sys.executable, "-m", "mergecore.cli", "merge", str(spec), str(out), "--device", device, "--json"]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout)
    return found | {"process": time.perf_counter() - started}


def remove(folder: Path) -> None:
    """A merged model."""
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def make_all(folder: Path, geometry: str) -> list[Path]:
    """The three checkpoints, made side by side."""
    with ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(make_one, [folder] * 3, [GEOMETRIES[geometry]] * 3, names()))


def same_as_cpu(work: Path) -> bool:
    """Whether a small merge gives the CPU's bytes."""
    spec = write_specs(work, make_all(work / "0.5b", "0.5b"), ["widen"])["widen"]
    outs = [work / f"same-{device}" for device in ("cpu", "cuda")]
    for out, device in zip(outs, ("cpu", "cuda"), strict=True):
        merged(spec, out, device)
    files = [path.name for path in outs[0].glob("*.safetensors")]
    equal = filecmp.cmpfiles(outs[0], outs[1], files, shallow=False)[0] == files
    for out in outs:
        remove(out)
    return equal


def main() -> int:
    """Prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="14b")
    parser.add_argument("--work", type=Path, default=Path("/dev/shm/mergecore"))
    parser.add_argument("--methods", default="widen,linear")
    add_json(parser)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU is visible to torch", file=sys.stderr)
        return 1
    options.work.mkdir(parents=True, exist_ok=True)
    folders = make_all(options.work / options.geometry, options.geometry)
    nbytes = sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))
    least = floors(next(folders[0].glob("*.safetensors")), options.work)
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "floors": least, "input_bytes": nbytes}
    results["bytes equal the CPU's"] = same_as_cpu(options.work)
    results["merges"] = {}
    torch.cuda.empty_cache()
    for method, spec in write_specs(options.work, folders, options.methods.split(",")).items():
        out = options.work / "out"
        results["merges"][method] = merged(spec, out, "cuda")
        remove(out)
    shown = Table("floor", "GB/s")
    for name, speed in least.items():
        shown.add_row(name, f"{speed:.1f}")
    table = Table("method", "merge", "input read once", "of pinned to GPU", "whole process", "host memory")
    for method, found in results["merges"].items():
        rate = nbytes / found["seconds"] / 1e9
        cells = (f"{found['seconds']:.2f} s", f"{rate:.1f} GB/s", f"{rate / least['pinned to GPU']:.0%}")
        table.add_row(method, *cells, f"{found['process']:.1f} s", f"{found['peak_rss'] / 2**20:.0f} MiB")
    equal = "equal" if results["bytes equal the CPU's"] else "DIFFER FROM"
    title = f"{results['gpu']}; three {options.geometry} checkpoints; bytes {equal} the CPU's"
    tell(options, results, title, shown, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
