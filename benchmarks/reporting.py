"""How benchmarks tell their results: tables for people, JSON for machines, or both."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json` prints JSON in place of tables, `--json FILE` writes it beside them."""
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="JSON instead of tables, or into FILE")


def tell(options: argparse.Namespace, results: Any, *shown: RenderableType) -> None:
    """Prints and writes as `options.json` says."""
    text = json.dumps(results, indent=2) + "\n"
    if options.json == "-":
        sys.stdout.write(text)
        return
    if options.json:
        Path(options.json).write_text(text)
    Console(width=None if sys.stdout.isatty() else 120).print(*shown, sep="\n")
