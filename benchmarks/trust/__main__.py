"""Whether operators can trust the daemon, measured on the real one: kills, bad specs, a flood of specs, hours of work.

    python -m benchmarks.trust [kills] [bad] [flood] [soak] [--kills 200] [--jobs 50] [--bad 1000] [--specs 10000]
                              [--minutes 30] [--json]

kills: kill -9 of the daemon or a worker at random moments while at least --jobs small merges run; counts what was
       lost, was run twice to completion, or differs from an undisturbed merge.
bad:   --bad specs of 60 kinds; each must end in failed/ with a clear error, the daemon must stay up and small.
flood: --specs small specs at once, with a worker that does nothing; they must be claimed in the order of arrival while
       the metrics answer.
soak:  small jobs, good, bad, repeated and cancelled, with scrapes and reloads for --minutes; the daemon's memory, open
       descriptors and threads must not grow.

All (the default) take an hour and a half on two cores, a third of it the soak. The exit
code is 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.trust.bad import bad
from benchmarks.trust.flood import flood
from benchmarks.trust.kills import kills
from benchmarks.trust.soak import soak


def main() -> int:
    """Prints a table, or JSON with --json; 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="kills|bad|flood|soak", help="what to measure (default: all)")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=50, help="merges while it is killed, at least")
    parser.add_argument("--bad", type=int, default=1000, help="bad specs")
    parser.add_argument("--specs", type=int, default=10_000, help="specs of the flood")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the soak")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--work", type=Path, help="an empty folder, which is kept (default: a temporary one)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        "kills": lambda work: kills(work, options.kills, options.jobs, options.seed),
        "bad": lambda work: bad(work, options.bad),
        "flood": lambda work: flood(work, options.specs),
        "soak": lambda work: soak(work, options.minutes, options.seed),
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
