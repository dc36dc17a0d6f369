"""Methods that are fitted on samples, and others, on four small models that were really trained; and their memory.

    python -m benchmarks.fitted table [--seeds 3] [--quick] [--work DIR] [--json]
    python -m benchmarks.fitted memory [--geometry 1.8b] [--samples 2] [--length 64] [--top-k 64] [--work DIR]

table:  the demo's base, and three models trained on from it (questions, source code, names of characters), merged by
        every method; bits per byte of held-out text of all four kinds, seconds and peak memory of the whole process.
        Methods with samples or chance are merged with several seeds: mean and standard deviation. Task arithmetic is
        the best of a grid by samples of the training texts, by which evolutionary search scores, too; its time is the
        whole grid's. What is in --work is not merged again.
memory: slta and dam on three checkpoints of a real geometry with bytes as tokens; the plan's hidden states and logits
        beside the peak of the process. Needs 19 GB of disk for 1.8b.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.demo_models import (
    FULL,
    FULL_RECIPES,
    QUICK,
    QUICK_RECIPES,
    Recipe,
    Size,
    Text,
    bits_per_byte,
    byte_tokenizer,
    load_texts,
    train_models,
)
from benchmarks.merges import run

LAMBDAS = (0.2, 0.4, 0.6, 0.8, 1.0)
SEEDED = {"dare_linear", "slta layer", "slta attn_mlp", "slta model", "dam", "adamerging", "evolutionary"}


def characters() -> Text:
    """What Unicode's characters are called, one a line; every tenth one is held out."""
    lines = [
        f"U+{code:04X} {unicodedata.name(chr(code))}\n"
        for code in range(0x21, 0x3000)
        if unicodedata.name(chr(code), None)
    ]
    held_out = "".join(line for i, line in enumerate(lines) if i % 10 == 5)
    return Text("".join(line for i, line in enumerate(lines) if i % 10 != 5), held_out)


def specs(models: dict[str, Path], data: dict[str, Path], samples: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and spec of every merge; the seed is still to be set."""
    base, tuned = models["base"], {name: path for name, path in models.items() if name != "base"}
    plain: dict[str, Any] = {"models": [{"model": str(path)} for path in tuned.values()], "dtype": "bfloat16"}
    based = plain | {"base_model": str(base)}
    given = based | {
        "models": [{"model": str(path), "data": str(data[name])} for name, path in tuned.items()],
        "calibration": {"samples": samples, "length": 256},
    }
    third = {"weight": 1 / len(tuned)}
    texts = {"text": [str(path) for path in data.values()], "samples": 8, "length": 256}
    yield "average", plain | {"merge_method": "linear", "parameters": {"weight": 1.0}}
    for scale in LAMBDAS:
        yield f"task_arithmetic {scale}", based | {"merge_method": "task_arithmetic", "parameters": {"lambda": scale}}
    yield "ties", based | {"merge_method": "ties", "parameters": {"weight": 1.0, "density": 0.5}}
    yield "dare_linear", based | {"merge_method": "dare_linear", "parameters": {**third, "density": 0.5}}
    yield "widen", based | {"merge_method": "widen"}
    for level in ("layer", "attn_mlp", "model"):
        yield f"slta {level}", given | {"merge_method": "slta", "parameters": {"level": level}}
    yield "dam", given | {"merge_method": "dam", "parameters": {"epochs": 3, "learning_rate": 0.01}}
    yield "adamerging", given | {"merge_method": "adamerging", "parameters": {"epochs": 3}}
    yield (
        "evolutionary",
        based
        | {
            "merge_method": "task_arithmetic",
            "parameters": {"lambda": 1.0},
            "models": [{"model": str(path), "parameters": {"weight": 1 / len(tuned)}} for path in tuned.values()],
            "evolve": {
                "parameters": {f"models.{n}.parameters.weight": [0.0, 1.0] for n in range(len(tuned))},
                "score": texts,
                "population": 6,
                "generations": 6,
            },
        },
    )


@dataclasses.dataclass
class Row:
    """A method: bits per byte of each text for every seed, and the dearest merge's cost."""

    name: str
    bits: list[dict[str, float]]
    seconds: float = 0.0
    peak: int = 0
    samples: int = 0

    def cells(self) -> list[str]:
        """As they stand in the table."""
        texts = list(self.bits[0])
        numbers = [[one[text] for one in self.bits] for text in texts]
        numbers.append([statistics.fmean(one.values()) for one in self.bits])
        cost = [f"{self.seconds:.1f} s", f"{self.peak / 2**20:.0f} MiB"] if self.peak else ["", ""]
        return [*map(_spread, numbers), *cost, str(self.samples or "")]


def _spread(values: list[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def table(work: Path, seeds: int, quick: bool) -> list[Row]:
    """Trains, merges and measures."""
    size, recipes = (QUICK, QUICK_RECIPES) if quick else (FULL, FULL_RECIPES)
    last = recipes[-1]
    all_recipes = [*recipes, Recipe("names", "characters", "base", last.steps, last.learning_rate, seed=4)]
    texts = load_texts() | {"characters": characters()}
    models = train_models(work / "models", size, all_recipes, texts, lambda line: print(line, file=sys.stderr))
    data = {}
    for recipe in all_recipes[1:]:
        data[recipe.name] = work / f"{recipe.name}.txt"
        data[recipe.name].write_text(texts[recipe.text].training)
    rows = [Row(f"{r.name} ({r.text})", [bits_per_byte(models[r.name], texts, size)]) for r in all_recipes]
    samples = 4 if quick else 30
    merged = [_row(work, name, spec, texts, size, seeds) for name, spec in specs(models, data, samples)]
    grid = [row for row in merged if row.name.startswith("task_arithmetic")]
    best = min(grid, key=lambda row: _on_samples(work / row.name.replace(" ", "-"), list(data.values())))
    best = dataclasses.replace(best, seconds=sum(row.seconds for row in grid))
    shown = [best if row.name == best.name else row for row in merged]
    return rows + [row for row in shown if row is best or row not in grid]


def _on_samples(folder: Path, data: list[Path]) -> float:
    """Mean bits per byte of samples of the training texts."""
    from mergecore.features.perplexity import bits_per_byte as streamed

    return statistics.fmean(streamed(folder, data, samples=8, length=256))


def _row(work: Path, name: str, spec: dict[str, Any], texts: dict[str, Text], size: Size, seeds: int) -> Row:
    row = Row(name, [])
    for seed in range(seeds if name in SEEDED else 1):
        out = work / (name.replace(" ", "-") + (f"-{seed}" if name in SEEDED else ""))
        path = work / f"{out.name}.yaml"
        spec = spec | {"seed": seed}
        if "evolve" in spec:
            spec["evolve"] = spec["evolve"] | {"seed": seed}
        path.write_text(json.dumps(spec))
        cost = work / f"{out.name}.cost"
        if not cost.exists():
            seconds, peak = run([sys.executable, "-m", "mergecore.cli", "merge", str(path), str(out)])
            cost.write_text(json.dumps([seconds, peak]))
        seconds, peak = json.loads(cost.read_text())
        row.seconds, row.peak = max(row.seconds, seconds), max(row.peak, peak)
        row.bits.append(bits_per_byte(out, texts, size))
        row.samples = sum(json.loads((out / "mergecore_manifest.json").read_text()).get("fit", {}).get("samples", []))
        print(f"  {out.name}: {row.cells()}", file=sys.stderr)
    return row


def memory(work: Path, geometry: str, samples: int, length: int, top_k: int) -> list[tuple[str, str, str, str]]:
    """(method, seconds, peak of the process, what the plan says is kept beside it)."""
    from benchmarks.checkpoints import GEOMETRIES, make

    base, *models = make(work / geometry, GEOMETRIES[geometry])
    for folder in (base, *models):
        byte_tokenizer().save_pretrained(folder)
    (work / "text.txt").write_text(load_texts()["documentation"].training)
    found = []
    for method, parameters in (("slta", {"level": "attn_mlp"}), ("dam", {"top_k": top_k})):
        spec = {
            "merge_method": method,
            "base_model": str(base),
            "models": [{"model": str(model), "data": str(work / "text.txt")} for model in models],
            "parameters": parameters,
            "calibration": {"samples": samples, "length": length},
            "dtype": "bfloat16",
        }
        path = work / f"{method}.yaml"
        path.write_text(json.dumps(spec))
        command = [sys.executable, "-m", "mergecore.cli", "plan", str(path), "--json", "--memory", "256MiB"]
        planned = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        out = work / f"{method}-out"
        seconds, peak = run([sys.executable, "-m", "mergecore.cli", "merge", str(path), str(out), "--memory", "256MiB"])
        kept = ", ".join(f"{what} {nbytes / 2**20:.0f} MiB" for what, nbytes in planned["fit_bytes"].items())
        found.append((method, f"{seconds:.0f} s", f"{peak / 2**20:.0f} MiB", kept))
    return found


def main() -> int:
    """Prints a table, or JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("table", "memory"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="models that are hardly trained: to try the command")
    parser.add_argument("--geometry", default="1.8b")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=64, help="logits that dam keeps of each token; 0: all")
    parser.add_argument("--work", type=Path, help="a folder, which is kept (default: a temporary one)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with contextlib.ExitStack() as cleanup:
        work = options.work or Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="mergecore-bench-")))
        work.mkdir(parents=True, exist_ok=True)
        if options.part == "memory":
            shown = Table(
                "method", "time", "peak memory", "kept, by the plan", title=f"three {options.geometry} models"
            )
            for cells in memory(work, options.geometry, options.samples, options.length, options.top_k):
                shown.add_row(*cells)
        else:
            rows = table(work, options.seeds, options.quick)
            if options.json:
                print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
                return 0
            titles = (*rows[0].bits[0], "mean", "time", "peak memory", "samples")
            shown = Table("model", *titles, title="bits per byte on held-out text (less is better)")
            for row in rows:
                shown.add_row(row.name, *row.cells())
    Console(width=None if sys.stdout.isatty() else 200).print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
