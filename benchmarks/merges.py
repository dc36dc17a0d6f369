"""Whole merges as processes: time and peak memory beside the machine's floors and the peers, on the same files in
one run. Peers: mergekit for what it has, and for widen a whole-tensor implementation (whole_tensor_widen.py).

    python -m benchmarks.merges [--geometry 1.8b] [--work DIR] [--mergekit PATH/TO/mergekit-yaml] [--methods A,B]
                               [--cold] [--json [FILE]]

Needs about 5 times the checkpoint's bytes of disk (1.8b: 19 GB). Inputs are read once beforehand, so the page cache is
warm where it is large enough; with --cold it holds none of them. Rounds alternate between the tools; the table shows
each one's minimum, beside mergekit's for the methods that it has.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from benchmarks import floors
from benchmarks.checkpoints import GEOMETRIES, make
from benchmarks.reporting import add_json, tell

MEMORY = "256MiB"
SPECS: dict[str, dict[str, object]] = {
    "linear": {"weight": 0.5},
    "task_arithmetic": {"weight": 0.5},
    "slerp": {"t": 0.5},
    "karcher": {},
    "model_stock": {},
    "dare_linear": {"weight": 0.5, "density": 0.5},
    "dare_ties": {"weight": 0.5, "density": 0.5},
    "ties": {"weight": 0.5, "density": 0.5},
    "breadcrumbs": {"weight": 0.5, "density": 0.5},
    "della": {"weight": 0.5, "density": 0.5},
    "arcee_fusion": {},
    "widen": {},
    "pcb": {},
    "consensus_ta": {},
    "metagpt": {},
}
"""Methods and their parameters; of methods for one model beside the base the first model is taken."""
ONE = ("slerp", "arcee_fusion")
NO_BASE = ("linear", "karcher")
OURS_ALONE = ("widen", "pcb", "consensus_ta", "metagpt")


WHOLE_TENSORS = 3
"""Memory that the whole-tensor WIDEN needs, bytes for each byte of bf16 input: where there is less it is left out."""


@dataclass
class Measurement:
    """One command: seconds of wall time (minimum over rounds) and peak resident bytes (maximum)."""

    name: str
    seconds: float
    peak_rss: int
    merge: float = 0.0
    """Without start-up, as ours tells it."""


def run(command: list[str], output: Path | None = None) -> tuple[float, int]:
    """Runs a command to its end; seconds and peak resident bytes of that process. `output`: where it prints to.

    The peak is asked for while it runs: what the kernel tells afterwards counts this process before the exec, too.
    """
    # Modules are compiled once, as where packages are installed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    with open(output or os.devnull, "wb") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.PIPE, env=environment)
    peak = 0
    with selectors.DefaultSelector() as selector:
        assert process.stderr is not None
        selector.register(process.stderr, selectors.EVENT_READ)
        errors = b""
        while True:
            peak = max(peak, _peak(process.pid))
            if not selector.select(timeout=0.05):
                continue
            more = os.read(process.stderr.fileno(), 1 << 16)
            if not more:
                break
            errors = (errors + more)[-2000:]
    if process.wait() != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {errors.decode(errors='replace')}")
    return time.perf_counter() - started, peak


def _peak(pid: int) -> int:
    """Peak resident bytes of a running process; 0 if it has just ended."""
    with suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) * 1024 if found is not None else 0
    return 0


def warm(folders: list[Path]) -> None:
    """Reads every input byte once."""
    buffer = bytearray(16 << 20)
    for folder in folders:
        for path in folder.glob("*.safetensors"):
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def write_specs(work: Path, folders: list[Path], methods: list[str]) -> dict[str, Path]:
    """One spec per method over the same three checkpoints."""
    paths = {}
    base, *models = map(str, folders)
    for method in methods:
        listed = [base, models[0]] if method in ONE else models
        spec: dict[str, object] = {
            "merge_method": method,
            "models": [{"model": model} for model in listed],
            "parameters": SPECS[method],
            "dtype": "bfloat16",
        }
        if method not in NO_BASE:
            spec["base_model"] = base
        paths[method] = work / f"{method}.yaml"
        paths[method].write_text(json.dumps(spec))
    return paths


def measure(
    work: Path, folders: list[Path], rounds: int, mergekit: str | None, methods: list[str], *, cold: bool
) -> list[Measurement]:
    """All merges, alternating between the tools round by round."""
    nbytes = sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))
    commands = {}
    for method, spec in write_specs(work, folders, methods).items():
        ours = [sys.executable, "-m", "mergecore.cli", "merge", str(spec), "OUT", "--memory", MEMORY, "--json"]
        commands[f"mergecore {method}"] = ours
        if mergekit is not None and method not in OURS_ALONE:
            commands[f"peer {method}"] = [mergekit, str(spec), "OUT"]
        if method == "widen" and WHOLE_TENSORS * nbytes < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            whole = [sys.executable, "-m", "benchmarks.whole_tensor_widen", *map(str, folders), "OUT"]
            commands[f"peer {method}"] = whole
    results: dict[str, Measurement] = {}
    for _ in range(rounds):
        for name, command in commands.items():
            out = work / "out"
            shutil.rmtree(out, ignore_errors=True)
            if cold:
                floors.forget(path for folder in folders for path in folder.glob("*.safetensors"))
            else:
                warm(folders)
            told = work / "told.json"
            try:
                seconds, peak = run([str(out) if part == "OUT" else part for part in command], told)
            except RuntimeError as error:  # a peer for which the machine is too small
                if name.startswith("mergecore"):
                    raise
                print(f"{name}: {error}", file=sys.stderr)
                continue
            merge = json.loads(told.read_text())["seconds"] if name.startswith("mergecore") else 0.0
            before = results.get(name, Measurement(name, seconds, peak, merge))
            fastest = min(seconds, before.seconds), max(peak, before.peak_rss), min(merge, before.merge)
            results[name] = Measurement(name, *fastest)
            shutil.rmtree(out, ignore_errors=True)
    return list(results.values())


def main() -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="1.8b")
    parser.add_argument("--work", type=Path, help="folder for the checkpoints; kept (default: a temporary one)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--mergekit", default=shutil.which("mergekit-yaml"), help="the peer's command, if installed")
    parser.add_argument("--methods", default="linear,task_arithmetic,slerp,ties,widen", help=f"of {', '.join(SPECS)}")
    parser.add_argument("--cold", action="store_true", help="read the inputs from the disk")
    add_json(parser)
    options = parser.parse_args()
    temporary = None if options.work else tempfile.TemporaryDirectory(prefix="mergecore-bench-")
    work = options.work or Path(temporary.name)  # type: ignore[union-attr]
    work.mkdir(parents=True, exist_ok=True)
    methods = options.methods.split(",")
    folders = make(work / options.geometry, GEOMETRIES[options.geometry])
    least = floors.measure(folders, work)
    results = measure(work, folders, options.rounds, options.mergekit, methods, cold=options.cold)
    if temporary is not None:
        temporary.cleanup()
    floor = floors.floor_of_a_merge(least, cold=options.cold)
    peers = "peer: process", "peak memory", "times faster"
    table = Table("method", "merge", "of the floor", "whole process", "peak memory", *peers)
    found = {result.name: result for result in results}
    for method in methods:
        ours, theirs = found[f"mergecore {method}"], found.get(f"peer {method}")
        row = [
            f"{ours.merge:.2f} s",
            f"{ours.merge / floor:.2f}",
            f"{ours.seconds:.1f} s",
            f"{ours.peak_rss >> 20} MiB",
        ]
        if theirs is not None:
            ratio = f"{theirs.seconds / ours.seconds:.1f}"
            row += [f"{theirs.seconds:.1f} s", f"{theirs.peak_rss >> 20} MiB", ratio]
        table.add_row(method, *row)
    title = f"three {options.geometry} bf16 checkpoints, mergecore with --memory {MEMORY}"
    inputs = "inputs once from the disk" if options.cold else "inputs once from memory"
    told = f"floor of a merge: {inputs}, output written and synced: {floor:.2f} s"
    everything = {
        "geometry": options.geometry,
        "cold": options.cold,
        "floors": least,
        "merges": [asdict(result) for result in results],
    }
    tell(options, everything, title, floors.table(least), told, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
