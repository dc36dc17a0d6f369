"""From dropping a tiny spec to done/: on a new (cold) worker and on one that waited (warm), alternating in one run.

    python -m benchmarks.warm [--rounds 20] [--burst 20] [--bursts 3] [--jobs 1] [--warm 1] [--json [FILE]]

One: a spec is dropped when nothing runs and the idle worker has loaded everything. Burst: many at once, seconds until
all are done, so warm workers are used up, and made while jobs run. Both daemons live all the time; the one whose turn
it is not is stopped (SIGSTOP), its idle worker sleeps. Also what an idle worker holds: its own memory, and all with the
libraries that it shares with others.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table

from benchmarks.checkpoints import GEOMETRIES, make
from benchmarks.reporting import add_json, tell
from benchmarks.trust.daemon import Daemon

LOOK = 0.002
"""Seconds between two looks at done/."""
QUIET = 0.5
"""Seconds without CPU time after which a worker has loaded everything."""
KINDS = {"cold": 0, "warm": 1}


def spec(name: str) -> bytes:
    """A tiny merge that is not skipped as done before."""
    models = [{"model": model, "parameters": {"weight": 0.5}} for model in ("tuned", "pretrained")]
    run = {"output": name, "force": True, "memory": "64MiB"}
    text = {"merge_method": "task_arithmetic", "base_model": "base", "models": models, "run": run}
    return json.dumps(text).encode()


def settled(daemon: Daemon, count: int) -> list[psutil.Process]:
    """Wait until its only children are so many workers that have nothing left to do."""
    while True:
        found = psutil.Process(daemon.process.pid).children()
        before = [sum(one.cpu_times()[:2]) for one in found]
        time.sleep(QUIET)
        if len(found) == count and [sum(one.cpu_times()[:2]) for one in found] == before:
            return found


def seconds(daemon: Daemon, names: list[str]) -> float:
    """From dropping specs of these names until all are done."""
    expected = daemon.ended() + len(names)
    started = time.perf_counter()
    for name in names:
        daemon.drop(f"{name}.json", spec(name))
    while daemon.ended() < expected:
        time.sleep(LOOK)
    took = time.perf_counter() - started
    for name in names:
        shutil.rmtree(daemon.outputs / name)  # fails if the merge did
    return took


@contextmanager
def woken(daemon: Daemon) -> Iterator[None]:
    """Let it run for the time being."""
    daemon.process.send_signal(signal.SIGCONT)
    try:
        yield
    finally:
        daemon.process.send_signal(signal.SIGSTOP)


def starts(url: str) -> dict[str, int]:
    """How many of its jobs began on which kind of worker, as the metrics tell."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {
        kind: round(float(line.split()[-1]))
        for kind in KINDS
        for line in lines
        if line.startswith(f'mergecore_worker_starts_total{{worker="{kind}"}}')
    }


def measure(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Both kinds in turn; the figures."""
    make(work / "models", GEOMETRIES["tiny"])
    daemons, urls = {}, {}
    for kind, any_warm in KINDS.items():
        (work / kind).mkdir()
        (work / kind / "models").symlink_to(work / "models")
        daemons[kind] = Daemon(work / kind, jobs=options.jobs, warm_workers=options.warm * any_warm)
        daemons[kind].start()
        urls[kind] = daemons[kind].url()
    found: dict[str, Any] = {"one": {kind: [] for kind in KINDS}, "burst": {kind: [] for kind in KINDS}}
    try:
        idle = settled(daemons["warm"], options.warm)[0].memory_full_info()
        for daemon in daemons.values():
            daemon.process.send_signal(signal.SIGSTOP)
        for number in range(options.rounds + 1):
            for kind, daemon in daemons.items():
                with woken(daemon):
                    settled(daemon, options.warm * KINDS[kind])
                    took = seconds(daemon, [f"one{number}"])
                    found["one"][kind] += [took] if number else []  # the first one fills caches
        for number in range(options.bursts):
            for kind, daemon in daemons.items():
                with woken(daemon):
                    settled(daemon, options.warm * KINDS[kind])
                    found["burst"][kind].append(seconds(daemon, [f"b{number}-{n}" for n in range(options.burst)]))
        for daemon in daemons.values():
            daemon.process.send_signal(signal.SIGCONT)
        found["starts"] = {kind: starts(url) for kind, url in urls.items()}
    finally:
        for daemon in daemons.values():
            daemon.process.send_signal(signal.SIGCONT)
            daemon.stop()
    return {**found, "idle": {"own bytes": idle.uss, "resident bytes": idle.rss}}


def main() -> int:
    """Measures and tells."""
    parser = argparse.ArgumentParser(description="Cold against warm workers.")
    parser.add_argument("--rounds", type=int, default=20, help="single specs of each kind")
    parser.add_argument("--burst", type=int, default=20, help="specs at once")
    parser.add_argument("--bursts", type=int, default=3, help="bursts of each kind")
    parser.add_argument("--jobs", type=int, default=1, help="jobs at a time")
    parser.add_argument("--warm", type=int, default=1, help="idle workers")
    add_json(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        found = measure(Path(work), options)
    table = Table("seconds to done/", "cold", "warm", "warm / cold", title=f"{options.jobs} at a time")
    for what, title in (("one", "one spec, median"), ("burst", f"{options.burst} specs at once, median")):
        if all(found[what].values()):
            cold, warm = (statistics.median(found[what][kind]) for kind in KINDS)
            table.add_row(title, f"{cold:.2f}", f"{warm:.2f}", f"{warm / cold:.2f}")
    own, resident = (found["idle"][f"{what} bytes"] / 2**20 for what in ("own", "resident"))
    told = f"an idle worker: {own:.0f} MiB of its own, {resident:.0f} MiB resident; jobs started: {found['starts']}"
    tell(options, found, table, told)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
