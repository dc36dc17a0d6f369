"""The main job on real input: three models trained here, the daemon, three dropped specs, one table.

    python -m benchmarks.demo [--quick] [--keep DIR] [--threads N]

Trains the models of demo_models.py, starts `mergecore serve` on a new spool, drops a spec for each merge, waits for
them, scrapes the metrics and prints how well each input and each merge predicts held-out text. What the table shows is
printed as it is. The exit code is 0 only if everything worked, the daemon's orderly stop included.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# Read when torch loads OpenMP: threads that wait shall sleep. Where cores are shared, spinning makes training several
# times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers

from benchmarks.demo_models import (
    FULL,
    FULL_RECIPES,
    QUICK,
    QUICK_RECIPES,
    bits_per_byte,
    load_texts,
    relative_change,
    train_models,
)

# Models are named as they lie below the daemon's --models folder.
SPECS = {
    "average": """\
merge_method: linear
models:
  - {model: ft, parameters: {weight: 0.5}}
  - {model: pt, parameters: {weight: 0.5}}
dtype: bfloat16
run: {output: average}
""",
    "task_arithmetic": """\
merge_method: task_arithmetic
base_model: base
models:
  - {model: ft, parameters: {weight: 1.0}}
  - {model: pt, parameters: {weight: 1.0}}
parameters: {lambda: 1.0}
dtype: bfloat16
run: {output: task_arithmetic}
""",
    "widen": """\
merge_method: widen
base_model: base
models:
  - {model: ft}
  - {model: pt}
parameters: {t: 1.0, s: 1.0}
dtype: bfloat16
run: {output: widen}
""",
}
SHOWN_METRICS = (
    "mergecore_jobs_total{",
    "mergecore_tensors_total",
    "mergecore_read_bytes_total",
    "mergecore_written_bytes_total",
)
# Seconds; generous, for slow and shared machines.
START_TIMEOUT, JOB_TIMEOUT, SCRAPE_TIMEOUT, STOP_TIMEOUT = 60.0, 300.0, 30.0, 60.0


class DemoError(Exception):
    """What went wrong, for the user."""


@dataclass(frozen=True)
class Daemon:
    """A running daemon: its process, the spool that it watches and the address of its web endpoint."""

    process: subprocess.Popen[bytes]
    spool: Path
    log: Path
    url: str


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny models, hardly trained: only shows that all works")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep models and merges in DIR; train there only once")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="threads for training and measuring (2)")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # unwinds: the daemon is stopped too
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()
    try:
        with contextlib.ExitStack() as stack:
            if options.keep is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mergecore-demo-")))
            else:
                folder = options.keep.absolute()
                folder.mkdir(parents=True, exist_ok=True)
            run(folder, quick=options.quick)
            if options.keep is not None:
                say(f"models and merges are kept in {folder}")
    except (DemoError, OSError, ValueError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    return 0


def run(folder: Path, *, quick: bool) -> None:
    """The whole demo in `folder`: models/ is used again by a later run, each run has a new run-* folder.

    Raises DemoError, or OSError and ValueError from training and measuring.
    """
    size, recipes = (QUICK, QUICK_RECIPES) if quick else (FULL, FULL_RECIPES)
    began = time.monotonic()
    say("training three models (bytes as tokens, Qwen2 architecture)")
    texts = load_texts()
    models = train_models(folder / "models", size, recipes, texts, say)
    changes = [f"{name} by {relative_change(models[name], models['base']):.1%}" for name in ("ft", "pt")]
    say(f"  weights differ from base's: {', '.join(changes)}")

    work = Path(tempfile.mkdtemp(prefix="run-", dir=folder))
    outputs, jobs = work / "outputs", {}
    with running_daemon(work, models=folder / "models", outputs=outputs) as daemon:
        say(f"the daemon listens on {daemon.url}; dropping {len(SPECS)} specs into {daemon.spool / 'incoming'}")
        for name, spec in SPECS.items():
            drop(daemon.spool, name, spec)
        for name in SPECS:
            jobs[name] = wait_for_job(daemon, name)
            say(f"  {name}: done, {jobs[name]['result']['output']}")
        say("its metrics:")
        for line in scrape(daemon.url):
            say(f"  {line}")
    say("the daemon stopped in order; measuring on held-out text")

    table = Table(title="bits per byte on held-out text (less is better)")
    table.add_column("model", no_wrap=True)
    for column in (*texts, "merge time", "peak memory"):
        table.add_column(column, justify="right")
    for recipe in recipes:
        measured = bits_per_byte(models[recipe.name], texts, size)
        table.add_row(f"{recipe.name} ({recipe.text})", *(f"{bits:.3f}" for bits in measured.values()), "", "")
    table.add_section()
    for name in SPECS:
        result = jobs[name]["result"]
        measured = bits_per_byte(Path(result["output"]), texts, size)
        figures = f"{result['seconds']:.2f} s", f"{result['peak_rss'] / 2**20:.0f} MiB"
        table.add_row(name, *(f"{bits:.3f}" for bits in measured.values()), *figures)
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    say(f"the demo took {time.monotonic() - began:.0f} s")


@contextlib.contextmanager
def running_daemon(work: Path, models: Path, outputs: Path) -> Iterator[Daemon]:
    """`mergecore serve` on a new spool in `work`; stopped with SIGTERM at the end.

    Raises DemoError if it does not come up, or if it does not stop with exit code 0 after the body went well.
    """
    spool, log, printed = work / "spool", work / "daemon.log", work / "daemon.out"
    command = [sys.executable, "-m", "mergecore.cli", "serve", "--port", "0"]
    command += ["--spool", str(spool), "--outputs", str(outputs), "--models", str(models)]
    with log.open("wb") as errors, printed.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors)
    try:
        ready = "listening on "
        deadline = time.monotonic() + START_TIMEOUT
        while ready not in (text := printed.read_text()) or not text.endswith("\n"):
            _check_alive(process, log)
            if time.monotonic() > deadline:
                raise DemoError(f"the daemon did not get ready within {START_TIMEOUT:.0f} s:\n{_tail(log)}")
            time.sleep(0.05)
        yield Daemon(process, spool, log, url=text.split(ready, 1)[1].split()[0].rstrip("/"))
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise DemoError(f"the daemon did not stop within {STOP_TIMEOUT:.0f} s of SIGTERM:\n{_tail(log)}") from None
        if code != 0:
            raise DemoError(f"after SIGTERM the daemon ended with exit code {code}, not 0:\n{_tail(log)}")
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def drop(spool: Path, name: str, spec: str) -> None:
    """Put a spec into the spool with one rename, so that nobody sees half of it."""
    target = spool / "incoming" / f"{name}.yaml"
    hidden = target.with_name(f".{target.name}.tmp")
    hidden.write_text(spec)
    os.replace(hidden, target)


def wait_for_job(daemon: Daemon, name: str) -> dict[str, Any]:
    """The status of the job made of NAME.yaml once it is done. Raises DemoError with its error.txt if it failed."""
    deadline = time.monotonic() + JOB_TIMEOUT
    while time.monotonic() < deadline:
        for state in ("done", "failed"):
            for path in (daemon.spool / state).glob("*/status.json"):
                status: dict[str, Any] = json.loads(path.read_text())
                if status["spec"] != f"{name}.yaml":
                    continue
                if state == "done":
                    return status
                raise DemoError(f"the merge {name!r} failed: {(path.parent / 'error.txt').read_text()}")
        _check_alive(daemon.process, daemon.log)
        time.sleep(0.1)
    raise DemoError(f"the merge {name!r} was not done after {JOB_TIMEOUT:.0f} s:\n{_tail(daemon.log)}")


def scrape(url: str) -> list[str]:
    """A few lines of the daemon's metrics. Raises DemoError if it does not come to count one done job for each spec."""
    deadline = time.monotonic() + SCRAPE_TIMEOUT
    while True:
        with urllib.request.urlopen(f"{url}/metrics", timeout=SCRAPE_TIMEOUT) as response:
            lines = [line for line in response.read().decode().splitlines() if not line.startswith("#")]
        metrics = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
        done = sum(metrics[name] for name in metrics if name.startswith("mergecore_jobs_total{") and '"done"' in name)
        if done == len(SPECS):
            return [
                f"{name} {metrics[name]:.0f}" for name in metrics if name.startswith(SHOWN_METRICS) and metrics[name]
            ]
        if done > len(SPECS) or time.monotonic() > deadline:
            raise DemoError(f"{url}/metrics counts {done:g} done jobs, not {len(SPECS)}")
        time.sleep(0.1)  # a job is moved to done/ first and counted then


def say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


def _check_alive(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.poll() is not None:
        raise DemoError(f"the daemon ended by itself with exit code {process.returncode}:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])


if __name__ == "__main__":
    sys.exit(main())
