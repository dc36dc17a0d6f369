"""A sweep of eight points beside eight merges of one point each: time for reading and statistics, and time in all.

    python -m benchmarks.sweep [--geometry 0.5b] [--work DIR] [--memory 1GiB] [--threads 0] [--rounds 1]
                              [--json [FILE]]

Needs about 12 times a checkpoint's bytes of disk (0.5b: 12 GB): three inputs and eight outputs, which are removed.
Inputs are read once beforehand. Reading and statistics: what the loop waits for windows, and all it does before a
tensor's blend pass but solving for coefficients. The rest of a tensor is blending and waiting for the writer; what is
left after that (opening, planning, syncing, manifests) is in the total. Single merges and the sweep take turns in one
process, each with one loop: of several side by side each would be charged for what the others do on its cores.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

import mergecore
from benchmarks.checkpoints import GEOMETRIES, make
from benchmarks.reporting import add_json, tell
from mergecore.device import CpuDevice
from mergecore.loop import Loop
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
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._blends = False

    def measured(self, spec: Any, out: Path) -> Seconds:
        """Merges, and removes the output."""
        self.seconds.clear()
        started = time.perf_counter()
        mergecore.merge(spec, out)
        total = time.perf_counter() - started
        shutil.rmtree(out)
        solving, blends = self.seconds["solving"], self.seconds["blends"] - self.seconds["waited in blends"]
        return Seconds(total, self.seconds["tensors"] - blends - solving, solving, blends)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - started

    def install(self) -> None:
        """From now on merges have one loop, whose steps are measured."""
        CpuDevice.loops = 1
        run, write, solve = Loop._run_batch, Loop._write, Loop._solve
        following = Windows.__next__

        def solving(*arguments: Any) -> Any:
            with self._timed("solving"):
                return solve(*arguments)

        def running(*arguments: Any) -> None:
            with self._timed("tensors"):
                run(*arguments)

        def writing(*arguments: Any) -> None:
            self._blends = True
            with self._timed("blends"):
                write(*arguments)
            self._blends = False

        def waiting(windows: Windows) -> Any:
            with self._timed("waited in blends" if self._blends else "waited"):
                return following(windows)

        Loop._solve = solving  # type: ignore[method-assign, assignment]
        Loop._run_batch = running  # type: ignore[method-assign, assignment]
        Loop._write = writing  # type: ignore[method-assign, assignment]
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
