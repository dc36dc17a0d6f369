"""Fuzzes one target, guided by coverage (atheris), from its seeds:

    python -m tests.fuzz TARGET [--minutes 5] [--seed 1] [--corpus DIR]

The exit code is not 0 if an input was found that crashes, hangs (20 s) or needs too much memory (4 GB); it is left as
crash-*, timeout-* or oom-* in the working directory. After mending, put it into tests/fuzz/seeds/TARGET/.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("target")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, help="where inputs of new coverage are collected")
    options = parser.parse_args()

    import atheris

    with atheris.instrument_imports(include=["mergecore", "service"]):
        from tests.fuzz.targets import SEEDS, TARGETS

    from tests.fuzz.mutations import mutated

    def change(data: bytes, most: int, seed: int) -> bytes:
        chance = random.Random(seed)
        return bytes(atheris.Mutate(data, most)) if chance.random() < 0.3 else mutated(data, chance)[:most]

    corpus = options.corpus or Path(tempfile.mkdtemp(prefix="mergecore-corpus-"))
    limits = ["-timeout=20", "-rss_limit_mb=4096", "-max_len=65536", f"-seed={options.seed}"]
    arguments = [sys.argv[0], *limits, f"-max_total_time={int(60 * options.minutes)}", "-print_final_stats=1"]
    atheris.Setup(
        [*arguments, str(corpus), str(SEEDS / options.target)], TARGETS[options.target], custom_mutator=change
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
