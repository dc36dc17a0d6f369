"""A daemon of its own for a measurement, and what looks at it from outside."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from service.spool import Spool

RESIDENT_LIMIT = 150e6


class Daemon:
    """A daemon of its own on WORK/spool; it can be started again after a kill."""

    def __init__(self, work: Path, **config: Any) -> None:
        self.spool = Spool(work / "spool")
        self.outputs = work / "outputs"
        self.models = work / "models"
        self.file = work / "mergecore.toml"
        settings = {
            "spool": str(self.spool.root),
            "outputs": str(self.outputs),
            "models": [str(self.models)],
            "port": 0,
            **config,
        }
        self.file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
        self.log = work / "daemon.log"
        self.starts = 0

    def start(self) -> None:
        """Start it; returns at once."""
        self.starts += 1
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mergecore.cli", "serve", "--config", str(self.file)],
                stdout=subprocess.PIPE,
                stderr=log,
            )

    def url(self) -> str:
        """Wait until it is ready; where its metrics are."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        if "listening on" not in line:
            raise RuntimeError(f"the daemon did not start: {self.log.read_text()[-2000:]}")
        return f"{line.split()[-1]}/metrics"

    def resident(self) -> int:
        """Its resident memory in bytes."""
        found = re.search(r"VmRSS:\s*(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        return int(found[1]) * 1024 if found else 0

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        code = self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code

    def drop(self, name: str, text: bytes) -> None:
        """Put a spec into the drop folder, whole at once."""
        temporary = self.spool.root / f"{name}.new"
        temporary.write_bytes(text)
        os.rename(temporary, self.spool.incoming / name)

    def ended(self) -> int:
        """How many jobs lie in done/ and failed/."""
        return sum(len(visible(folder)) for folder in (self.spool.done, self.spool.failed))


def visible(folder: Path) -> list[str]:
    """The names in a folder, without hidden ones."""
    return [name for name in os.listdir(folder) if not name.startswith(".")]


def wait(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until it holds. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(0.05)


@contextlib.contextmanager
def scraping(url: str) -> Iterator[list[float]]:
    """Scrape the metrics ten times a second in a thread; the seconds that each scrape took."""
    took: list[float] = []
    ended = threading.Event()

    def scrape() -> None:
        while not ended.wait(0.1):
            before = time.perf_counter()
            with urllib.request.urlopen(url, timeout=60) as answer:
                answer.read()
            took.append(time.perf_counter() - before)

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield took
    finally:
        ended.set()
        thread.join()
