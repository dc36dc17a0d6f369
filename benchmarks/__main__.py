"""All benchmarks: `make bench`, or `python -m benchmarks`. Each part is also a command of its own.

The parts with whole merges make three 0.5b checkpoints (1 GB each) in temporary folders, a sweep eight outputs more.
Larger ones: python -m benchmarks.merges --geometry 1.8b --work DIR. With a GPU its kernels are measured, too; whole
merges on it: python -m benchmarks.gpu. The figures are also written to .bench/*.json.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

RESULTS = Path(".bench")


def parts() -> list[tuple[str, list[str]]]:
    """Name and command of every part."""
    kernels = [(f"kernels-{n}", ["benchmarks.kernels", "--models", str(n)]) for n in (2, 8)]
    if torch.cuda.is_available():
        kernels += [(f"{name}-cuda", [*command, "--device", "cuda"]) for name, command in kernels]
    merges = ["benchmarks.merges", "--geometry", "0.5b"]
    whole = [("merges", merges), ("merges-cold", [*merges, "--cold", "--methods", "linear,widen"])]
    whole += [("sweep", ["benchmarks.sweep"]), ("warm", ["benchmarks.warm", "--rounds", "5", "--bursts", "1"])]
    return [*kernels, ("accuracy", ["benchmarks.accuracy"]), *whole]


def main() -> int:
    """Runs the parts one after the other; the first failure's code."""
    RESULTS.mkdir(exist_ok=True)
    for name, part in parts():
        print(f"\n{' '.join(part)}", flush=True)
        written = [] if name == "accuracy" else ["--json", str(RESULTS / f"{name}.json")]
        code = subprocess.run([sys.executable, "-m", *part, *written], check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
