"""A sweep of eight points beside eight merges of one point each: time for reading and statistics, and time in all.

    python -m benchmarks.sweep [--geometry 0.5b] [--work DIR] [--memory 1GiB] [--threads 0] [--rounds 1]
                              [--json [FILE]]

Needs about 12 times a checkpoint's bytes of disk (0.5b: 12 GB): three inputs and eight outputs, which are removed.
Inputs are read once beforehand. Reading and statistics: what the loop waits for windows, and all it does before a
tensor's blend pass but solving for coefficients. The rest of a tensor is blending and waiting for the writer; what is
left after that (opening, planning, syncing, manifests) is in the total. Single merges and the sweep take turns in one
process.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

import mergecore
from benchmarks.checkpoints import GEOMETRIES, make
from benchmarks.reporting import add_json, tell
from mergecore import engine
from mergecore.reads import Windows
from mergecore.sizes import parse_size
from mergecore.spec import filled, load_spec

POINTS: list[dict[str, Any]] = [
    *({"merge_method": "task_arithmetic", "parameters.lambda": value} for value in (0.2, 0.4, 0.6, 0.8)),
    *({"merge_method": "widen", "parameters.s": value} for value in (0.25, 0.5, 0.75, 1.0)),
]


@dataclass
class Seconds:
    """What merges took: all of it, and of this reading and statistics, coefficients, and blends with their writing."""

    total: float = 0.0
    reading: float = 0.0
    solving: float = 0.0
    blending: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(*map(sum, zip(astuple(self), astuple(other), strict=True)))


class Clock:
    """Measures merges that run in this process."""

    def __init__(self) -> None:
        self.tensors = self.solving = self.blends = self.waited_in_blends = 0.0
        self._blending = False

    def measured(self, spec: Any, out: Path) -> Seconds:
        """Merges, and removes the output."""
        self.__init__()  # type: ignore[misc]
        started = time.perf_counter()
        mergecore.merge(spec, out)
        total = time.perf_counter() - started
        shutil.rmtree(out)
        blends = self.blends - self.waited_in_blends
        return Seconds(total, self.tensors - blends - self.solving, self.solving, blends)

    def install(self) -> None:
        """From now on the engine's steps are measured."""
        run, write, solve = engine.Merge._run_batch, engine.Merge._write, engine.Merge._solve
        following = Windows.__next__

        def solving(*arguments: Any) -> Any:
            started = time.perf_counter()
            found = solve(*arguments)
            self.solving += time.perf_counter() - started
            return found

        def running(*arguments: Any) -> None:
            started = time.perf_counter()
            run(*arguments)
            self.tensors += time.perf_counter() - started

        def writing(*arguments: Any) -> None:
            started = time.perf_counter()
            self._blending = True
            write(*arguments)
            self._blending = False
            self.blends += time.perf_counter() - started

        def waiting(windows: Windows) -> Any:
            started = time.perf_counter()
            window = following(windows)
            if self._blending:
                self.waited_in_blends += time.perf_counter() - started
            return window

        engine.Merge._solve = solving  # type: ignore[method-assign, assignment]
        engine.Merge._run_batch = running  # type: ignore[method-assign, assignment]
        engine.Merge._write = writing  # type: ignore[method-assign, assignment]
        Windows.__next__ = waiting  # type: ignore[method-assign, assignment]


def main() -> int:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="0.5b")
    parser.add_argument("--work", type=Path, help="a folder with the checkpoints in it, or for them; it stays")
    parser.add_argument("--memory", type=parse_size, default=1 << 30)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=1, help="the fastest round of each counts")
    add_json(parser)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="mergecore-sweep-"))
    try:
        make(work, GEOMETRIES[options.geometry])
        compare(work, options)
    finally:
        if options.work is None:
            shutil.rmtree(work)
    return 0


def compare(work: Path, options: argparse.Namespace) -> None:
    """Single merges and the sweep in turns."""
    for file in sorted(work.glob("*/*.safetensors")):
        with file.open("rb") as opened:
            while opened.read(64 << 20):
                pass
    spec = load_spec(
        {
            "merge_method": "task_arithmetic",
            "base_model": str(work / "base"),
            "models": [{"model": str(work / "tuned")}, {"model": str(work / "pretrained")}],
            "sweep": {"points": POINTS},
            "run": {"device": options.device, "memory": options.memory, "threads": options.threads},
        }
    )
    clock = Clock()
    clock.install()
    singles, sweeps = [], []
    for _ in range(options.rounds):
        each = [clock.measured(filled(spec, values), work / "out") for values in POINTS]
        singles.append(sum(each, Seconds()))
        sweeps.append(clock.measured(spec, work / "out"))
    single, sweep = min(singles, key=lambda one: one.total), min(sweeps, key=lambda one: one.total)
    table = Table("", "eight merges", "one sweep", "sweep / merges", title=f"{options.geometry}, {options.device}")
    told = {}
    for name, alone, together in (
        ("reading and statistics, s", single.reading, sweep.reading),
        ("coefficients, s", single.solving, sweep.solving),
        ("blending and writing, s", single.blending, sweep.blending),
        ("in all, s", single.total, sweep.total),
    ):
        table.add_row(name, f"{alone:.2f}", f"{together:.2f}", f"{together / alone:.3f}")
        told[name] = {"eight merges": alone, "one sweep": together}
    tell(options, {"geometry": options.geometry, "device": options.device} | told, table)


if __name__ == "__main__":
    raise SystemExit(main())
