"""A daemon under steady work for a long time: its memory, descriptors and threads do not grow."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import statistics
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.trust.daemon import RESIDENT_LIMIT, Daemon, visible, wait
from benchmarks.trust.kills import METHODS, spec_of

WARM_UP = 0.2
"""This part of the time is not judged: caches fill, and the first jobs of each kind load what they need."""
EVERY = 5.0
"""Seconds between two looks."""
GROWTH = 2e6
"""Bytes of memory that the fitted line may rise from the end of the warm-up to the end: the noise of an allocator."""


@dataclass(frozen=True)
class Look:
    """What the daemon holds at a moment: resident bytes, open descriptors, threads."""

    seconds: float
    resident: int
    descriptors: int
    threads: int


def look(daemon: Daemon, started: float) -> Look:
    """At the daemon now."""
    process = Path(f"/proc/{daemon.process.pid}")
    return Look(
        time.monotonic() - started,
        daemon.resident(),
        len(os.listdir(process / "fd")),
        len(os.listdir(process / "task")),
    )


def rise(looks: list[Look], what: str) -> float:
    """How much the line through the judged looks rises over their time (least squares)."""
    judged = [one for one in looks if one.seconds >= WARM_UP * looks[-1].seconds]
    times = [one.seconds for one in judged]
    slope, _ = statistics.linear_regression(times, [getattr(one, what) for one in judged])
    return slope * (times[-1] - times[0])


def soak(work: Path, minutes: float, seed: int) -> dict[str, Any]:
    """Good, bad and repeated specs, cancelled jobs, scrapes and reloads, all the time."""
    from benchmarks.checkpoints import GEOMETRIES, make

    daemon = Daemon(work, jobs=1, keep_done=20, keep_failed=20, rescan=1.0)
    make(daemon.models, GEOMETRIES["tiny"])
    daemon.spool.prepare()
    daemon.start()
    url = daemon.url()
    chance, methods = random.Random(seed), itertools.cycle(METHODS)
    started, looks, dropped = time.monotonic(), [look(daemon, time.monotonic())], 0
    while time.monotonic() - started < 60 * minutes:
        for _ in range(3 - len(visible(daemon.spool.incoming))):
            kind = chance.choice(("good", "good", "bad", "again"))
            number = 0 if kind == "again" else dropped
            spec = spec_of(next(methods) if kind != "again" else "linear", f"out-{number:06d}")
            text = b"models: [" if kind == "bad" else json.dumps(spec).encode()
            daemon.drop(f"{dropped:06d}.yaml", text)
            dropped += 1
        running = visible(daemon.spool.running)
        if running and chance.random() < 0.1:
            (daemon.spool.running / running[0] / "cancel").touch()
        if chance.random() < 0.1:
            daemon.process.send_signal(signal.SIGHUP)
        with urllib.request.urlopen(url, timeout=60) as answer:
            answer.read()
        end = time.monotonic() + EVERY
        while time.monotonic() < end:
            with urllib.request.urlopen(url, timeout=60) as answer:
                answer.read()
            time.sleep(0.5)
        looks.append(look(daemon, started))
    wait(lambda: not visible(daemon.spool.incoming) and not visible(daemon.spool.running), 300, "the last jobs")
    alive = daemon.process.poll() is None
    daemon.stop()
    rises = {what: rise(looks, what) for what in ("resident", "descriptors", "threads")}
    grows = rises["resident"] > GROWTH or rises["descriptors"] >= 1 or rises["threads"] >= 1
    return {
        "minutes": round(looks[-1].seconds / 60, 1),
        "jobs": dropped,
        "looks": len(looks),
        "resident bytes at first, after the warm-up, at last": [
            looks[0].resident,
            next(one for one in looks if one.seconds >= WARM_UP * looks[-1].seconds).resident,
            looks[-1].resident,
        ],
        "rise of resident bytes": round(rises["resident"]),
        "rise of descriptors": round(rises["descriptors"], 2),
        "rise of threads": round(rises["threads"], 2),
        "daemon restarts": daemon.starts - 1 + (not alive),
        "ok": alive and not grows and looks[-1].resident < RESIDENT_LIMIT,
    }
