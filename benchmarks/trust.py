"""Whether operators can trust the daemon, measured on the real one: kills, bad specs, a flood of specs.

    python -m benchmarks.trust [kills] [bad] [flood] [--kills 200] [--jobs 50] [--bad 1000] [--specs 10000] [--json]

kills: kill -9 of the daemon or a worker at random moments while at least --jobs small merges run; counts what was
       lost, was run twice to completion, or differs from an undisturbed merge.
bad:   --bad specs of 60 kinds; each must end in failed/ with a clear error, the daemon must stay up and small.
flood: --specs small specs at once, with a worker that does nothing; they must be claimed in the order of arrival while
       the metrics answer.

All three (the default) take the better part of an hour on two cores, most of it the bad specs and the kills. The exit
code is 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from service.spool import ERROR, LOG, JobStatus, Spool, read_status

RESIDENT_LIMIT = 150e6
SCRAPE_LIMIT = 0.1
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.5},
    "task_arithmetic": {"weight": 0.5},
    "ties": {"weight": 0.5, "density": 0.5},
    "dare_linear": {"weight": 0.5, "density": 0.5},
    "widen": {},
}


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


# --- kills ---


def spec_of(method: str, output: str) -> dict[str, Any]:
    """A merge of the tiny checkpoints."""
    spec: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": "tuned"}, {"model": "pretrained"}],
        "parameters": METHODS[method],
        "dtype": "bfloat16",
        "run": {"output": output, "threads": 1},
    }
    return spec if method == "linear" else {**spec, "base_model": "base"}


def digest(output: Path) -> str:
    """One checksum of all weights of a model."""
    total = hashlib.sha256()
    for path in sorted(output.glob("*.safetensors")):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


def undisturbed(work: Path, models: Path) -> dict[str, str]:
    """The checksum of each method's merge without any daemon."""
    from mergecore import load_spec, merge

    digests = {}
    for method in METHODS:
        out = work / "undisturbed" / method
        merge(load_spec(spec_of(method, "out")), out, resolve=lambda name, revision: models / name)
        digests[method] = digest(out)
    return digests


def kills(work: Path, count: int, jobs: int, seed: int) -> dict[str, Any]:
    """kill -9 at random moments; new jobs are dropped so that there is always something to kill."""
    from benchmarks.checkpoints import GEOMETRIES, make

    daemon = Daemon(work, jobs=2, attempts=1_000_000, retry_delay=0.1, rescan=0.2, stop_timeout=30.0)
    make(daemon.models, GEOMETRIES["tiny"])
    expected = undisturbed(work, daemon.models)
    daemon.spool.prepare()
    random_ = random.Random(seed)
    methods = list(METHODS)
    dropped: dict[str, str] = {}

    def drop() -> None:
        method = methods[len(dropped) % len(methods)]
        name = f"{len(dropped):05d}"
        dropped[f"{name}.yaml"] = method
        daemon.drop(f"{name}.yaml", json.dumps(spec_of(method, name)).encode())

    for _ in range(jobs):
        drop()
    killed: collections.Counter[str] = collections.Counter()
    started = time.monotonic()
    daemon.start()
    while killed.total() < count:
        time.sleep(random_.uniform(0.05, 4.0))
        while len(visible(daemon.spool.incoming)) < 2:
            drop()
        if daemon.ended() * count < jobs * (killed.total() - 8):
            continue  # spread over all jobs, also where a merge takes longer than the time between kills
        if random_.random() < 0.4:
            daemon.kill()
            killed["daemon"] += 1
            daemon.start()
            continue
        running = (read_status(daemon.spool.running / name) for name in visible(daemon.spool.running))
        workers = [status.pid for status in running if status.pid and is_worker(status)]
        if workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(random_.choice(workers), signal.SIGKILL)
                killed["worker"] += 1
    wait(lambda: daemon.ended() >= len(dropped), 30 * len(dropped), "the rest of the jobs")
    seconds = time.monotonic() - started
    daemon.stop()

    found = collections.Counter(status.spec for status in daemon.spool.jobs())
    done = {status.spec: status for status in daemon.spool.jobs() if status.state == "done"}
    different = [name for name in done if digest(daemon.outputs / name[:5]) != expected[dropped[name]]]
    attempts = sum(status.attempts for status in done.values())
    resumed = sum(bool(status.result.get("resumed")) for status in done.values())
    bad = len(dropped) - len(done) + len(different)
    twice = sum(completions(daemon.spool, status) > 1 for status in done.values())
    left = [name for name in os.listdir(daemon.outputs) if name.startswith(".")]
    return {
        "kills of the daemon": killed["daemon"],
        "kills of workers": killed["worker"],
        "jobs": len(dropped),
        "attempts": attempts,
        "resumed from a journal": resumed,
        "jobs lost or not done": len(dropped) - len(done),
        "jobs in two folders": sum(number > 1 for number in found.values()),
        "jobs run twice to completion": twice,
        "outputs that differ": len(different),
        "partial outputs left": len(left),
        "seconds": round(seconds, 1),
        "ok": not (bad or twice or left or any(number > 1 for number in found.values())),
    }


def is_worker(status: JobStatus) -> bool:
    """Whether the process that the status names still is the job's worker."""
    with contextlib.suppress(OSError):
        return status.job.encode() in Path(f"/proc/{status.pid}/cmdline").read_bytes()
    return False


def completions(spool: Spool, status: JobStatus) -> int:
    """How often the job's log says that a whole merge was published."""
    log = (spool.done / status.job / LOG).read_text(errors="replace")
    return log.count(" INFO done: ") - log.count("an earlier attempt had published it")


# --- bad specs ---


def bad_specs(models: Path) -> dict[str, bytes]:
    """Name -> spec, one of each kind; the model folders that some of them need are made below `models`."""
    from benchmarks.checkpoints import GEOMETRIES, make

    make(models, GEOMETRIES["tiny"])
    good = {
        "merge_method": "linear",
        "models": [{"model": "base", "parameters": {"weight": 1.0}}, {"model": "tuned", "parameters": {"weight": 1.0}}],
    }
    text: dict[str, bytes] = {
        "only blanks": b"  \n",
        "only a comment": b"# nothing\n",
        "binary": bytes(range(256)),
        "not utf-8": b"merge_method: caf\xe9\n",
        "null bytes": b"merge_method: linear\0\n",
        "a list": b"- 1\n- 2\n",
        "a word": b"merge\n",
        "a number": b"42\n",
        "an open bracket": b"models: [\n",
        "a tab as indentation": b"models:\n\t- model: base\n",
        "a repeated key": b"merge_method: linear\nmerge_method: ties\n",
        "a bomb of aliases": b"a: &a [x,x,x,x,x,x,x,x,x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(9)),
        "an alias to itself": b"models: &a [*a]\n",
        "an unknown alias": b"models: *nothing\n",
        "a python tag": b"!!python/object/apply:os.system ['touch /nowhere/evil']\n",
        "a deep nest": b"[" * 100_000,
        "a deep nest of mappings": b"{a: " * 20_000,
        "a huge file": b"#" * (64 << 20),
        "a huge number": b"merge_method: linear\nseed: " + b"9" * 100_000 + b"\n",
        "json that is torn": b'{"merge_method": "linear", "models": [{"model"',
    }
    changed: dict[str, Any] = {
        "an unknown method": {"merge_method": "widden"},
        "no method": {"merge_method": None},
        "a method that is a list": {"merge_method": ["linear"]},
        "an unknown key": {"modles": []},
        "no models": {"models": []},
        "models that are a word": {"models": "base"},
        "a model without a name": {"models": [{"parameters": {"weight": 1.0}}]},
        "an unknown parameter": {"parameters": {"wieght": 1.0}},
        "a weight that is a word": {"models": [{"model": "base", "parameters": {"weight": "much"}}]},
        "a weight that is not a number": {"parameters": {"weight": float("nan")}},
        "a weight that is infinite": {"parameters": {"weight": float("inf")}},
        "a gradient of words": {"models": [{"model": "base", "parameters": {"weight": [0, "one"]}}]},
        "a density above one": {"merge_method": "ties", "base_model": "base", "parameters": {"density": 2.0}},
        "a base that is needed": {"merge_method": "ties"},
        "an unknown dtype": {"dtype": "float13"},
        "an unknown key of run": {"run": {"ouput": "a"}},
        "a memory that is none": {"run": {"memory": "much"}},
        "a negative number of threads": {"run": {"threads": -1}},
        "an unknown device": {"run": {"device": "abacus"}},
        "an output above the folder": {"run": {"output": "../evil"}},
        "an absolute output": {"run": {"output": "/tmp/evil"}},
        "a hidden output": {"run": {"output": ".evil"}},
        "an output of nothing": {"run": {"output": ""}},
        "a model that is absent": {"models": [{"model": "absent"}]},
        "a model outside": {"models": [{"model": "/etc"}]},
        "a model above": {"models": [{"model": "../../etc"}]},
        "a model with a null byte": {"models": [{"model": "a\0b"}]},
        "a model with a long name": {"models": [{"model": "x" * 5000}]},
        "slices and models": {"slices": [{"sources": [{"model": "base", "layer_range": [0, 1]}]}]},
        "layers that are not there": {
            "models": None,
            "slices": [{"sources": [{"model": "base", "layer_range": [0, 99]}]}],
        },
        "an unknown tokenizer": {"tokenizer_source": "nobody"},
    }
    weights = (models / "base" / "model-00001.safetensors").read_bytes()
    length = struct.unpack("<Q", weights[:8])[0]
    one = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
    damaged = {
        "weights that end early": weights[: len(weights) // 2],
        "weights of nothing": b"",
        "a header longer than the file": struct.pack("<Q", 1 << 62) + weights[8:],
        "a header that is no JSON": struct.pack("<Q", length) + b"x" * length + weights[8 + length :],
        "tensors that overlap": with_header(one + b'"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}', 12),
        "a shape that does not fit": with_header(b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}}', 8),
        "an unknown dtype in a header": with_header(b'{"a": {"dtype": "X7", "shape": [2], "data_offsets": [0, 8]}}', 8),
        "a header of nests": with_header(b"[" * 100_000, 0),
    }
    for kind, content in damaged.items():
        folder = models / kind.replace(" ", "-")
        folder.mkdir()
        (folder / "config.json").write_bytes((models / "base" / "config.json").read_bytes())
        (folder / "model.safetensors").write_bytes(content)
        changed[kind] = {"models": [{"model": "base"}, {"model": folder.name}], "parameters": {"weight": 1.0}}
    (models / "pickle").mkdir()
    (models / "pickle" / "config.json").write_bytes((models / "base" / "config.json").read_bytes())
    (models / "pickle" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /nowhere/evil'\ntR.")
    changed["a pickle that runs something"] = {"models": [{"model": "pickle"}], "parameters": {"weight": 1.0}}
    return text | {kind: json.dumps({**good, **change}).encode() for kind, change in changed.items()}


def with_header(header: bytes, nbytes: int) -> bytes:
    """A safetensors file with this header and so many bytes of data."""
    return struct.pack("<Q", len(header)) + header + bytes(nbytes)


def bad(work: Path, count: int) -> dict[str, Any]:
    """Bad specs of all kinds in turn."""
    daemon = Daemon(work, jobs=2, attempts=1)
    specs = bad_specs(daemon.models)
    kinds = list(specs)
    daemon.spool.prepare()
    daemon.start()
    daemon.url()
    time.sleep(1)
    before = daemon.resident()
    started = time.monotonic()
    for number in range(count):
        kind = kinds[number % len(kinds)]
        name = f"{number:05d}.yaml"
        path = daemon.spool.root / f"{name}.new"
        path.write_bytes(specs[kind])
        os.rename(path, daemon.spool.incoming / name)
        wait(lambda: len(visible(daemon.spool.incoming)) < 50, 600, "the daemon to keep up")  # 64 MB each
    wait(lambda: daemon.ended() >= count, 60 + 10 * count, "all to end")
    seconds = time.monotonic() - started
    after = daemon.resident()
    alive = daemon.process.poll() is None
    daemon.stop()

    unclear: dict[str, str] = {}
    failed = 0
    for status in daemon.spool.jobs():
        kind = kinds[int(status.spec[:5]) % len(kinds)]
        folder = daemon.spool.failed / status.job
        paragraph = (folder / ERROR).read_text().split("\n\n")[0] if (folder / ERROR).exists() else ""
        failed += status.state == "failed"
        if status.state != "failed" or not clear(paragraph):
            unclear[kind] = f"{status.state}: {paragraph[:200]}"
    outputs = visible(daemon.outputs)
    return {
        "specs": count,
        "kinds": min(len(kinds), count),
        "in failed/ with an error": failed,
        "kinds without a clear error": unclear,
        "outputs": len(outputs),
        "daemon restarts": daemon.starts - 1 + (not alive),
        "resident bytes before": before,
        "resident bytes after": after,
        "seconds": round(seconds, 1),
        "ok": failed == count and alive and not unclear and not outputs and after < RESIDENT_LIMIT,
    }


def clear(paragraph: str) -> bool:
    """Whether an error says something, and is none that nobody foresaw."""
    return bool(paragraph) and not re.search(r"unexpected error|Traceback|no report|killed by", paragraph)


# --- a flood ---


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


def main() -> int:
    """Prints a table, or JSON with --json; 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="kills|bad|flood", help="what to measure (default: all)")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=50, help="merges while it is killed, at least")
    parser.add_argument("--bad", type=int, default=1000, help="bad specs")
    parser.add_argument("--specs", type=int, default=10_000, help="specs of the flood")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--work", type=Path, help="an empty folder, which is kept (default: a temporary one)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        "kills": lambda work: kills(work, options.kills, options.jobs, options.seed),
        "bad": lambda work: bad(work, options.bad),
        "flood": lambda work: flood(work, options.specs),
    }
    unknown = set(options.parts) - set(parts)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    results: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as cleanup:
        top = options.work or Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="mergecore-bench-")))
        for part in options.parts or parts:
            (top / part).mkdir(parents=True)
            results[part] = parts[part](top / part)
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        for part, figures in results.items():
            table = Table(part, "")
            for name, value in figures.items():
                table.add_row(name, f"{value:,}" if type(value) is int else str(value))
            Console(width=None if sys.stdout.isatty() else 120).print(table)
    return 0 if all(figures["ok"] for figures in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
