"""Thousands of specs at once: claimed in order, while the metrics answer."""

from __future__ import annotations

import os
import random
import re
import time
from pathlib import Path
from typing import Any

from benchmarks.trust.daemon import Daemon, scraping, wait

SCRAPE_LIMIT = 0.1


def flood(work: Path, count: int) -> dict[str, Any]:
    """Many specs at once; a worker that does nothing, so that the daemon alone is measured."""
    daemon = Daemon(work, worker_command=["/bin/true"])
    daemon.models.mkdir()
    daemon.spool.prepare()
    waiting = work / "waiting"
    waiting.mkdir()
    names = [f"{number:06d}.yaml" for number in range(count)]
    random.Random(0).shuffle(names)  # so that the order of arrival is not that of the names
    now = time.time_ns() - count * 1000
    for number, name in enumerate(names):
        (waiting / name).write_text("merge_method: linear\nmodels: [{model: base}]\n")
        os.utime(waiting / name, ns=(now + 1000 * number,) * 2)
    daemon.start()
    url = daemon.url()
    before = daemon.resident()
    with scraping(url) as took:
        started = time.monotonic()
        for name in names:
            os.rename(waiting / name, daemon.spool.incoming / name)
        dropping = time.monotonic() - started
        wait(lambda: daemon.ended() >= count, 60 + count, "all to end")
        seconds = time.monotonic() - started
    after = daemon.resident()
    daemon.stop()
    claimed = re.findall(r" claimed (\S+)", daemon.log.read_text())
    took.sort()
    return {
        "specs": count,
        "seconds to drop them": round(dropping, 2),
        "seconds to claim and end them": round(seconds, 1),
        "claimed": len(claimed),
        "claimed in the order of arrival": claimed == names,
        "scrapes": len(took),
        "median scrape, ms": round(1000 * took[len(took) // 2], 1),
        "slowest scrape, ms": round(1000 * took[-1], 1),
        "resident bytes before": before,
        "resident bytes after": after,
        "ok": claimed == names and took[-1] < SCRAPE_LIMIT,
    }
