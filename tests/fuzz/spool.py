"""Mutated specs and mutated models through a real daemon with its real workers:

    python -m tests.fuzz.spool [--jobs 100] [--seed 1]

Every job must end in done/ or failed/, with a clear first paragraph where it failed; the daemon must not restart.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import yaml

from benchmarks.trust.bad import clear
from service.config import WORKER_COMMAND
from service.spool import ERROR
from tests.fuzz.mutations import mutated
from tests.fuzz.targets import folder, seeds
from tests.service_support import running_daemon, wait_until


def fuzz(work: Path, jobs: int, seed: int, deadline: float) -> Counter[str]:
    """How many jobs ended how; AssertionError where one did not end well."""
    chance = random.Random(seed)
    shutil.copytree(folder("spool"), work / "models")
    specs = {f"job-{number}.yaml": _job(work / "models", number, chance) for number in range(jobs)}
    with running_daemon(work / "d", worker_command=WORKER_COMMAND, models=[str(work / "models")], jobs=2) as daemon:
        for name, text in specs.items():
            (daemon.spool.incoming / name).write_bytes(text)

        def ended() -> dict[str, str]:
            return {one.spec: one.state for one in daemon.spool.jobs() if one.state in ("done", "failed", "duplicate")}

        wait_until(lambda: set(ended()) == set(specs), "the end of all jobs", deadline)
        for one in daemon.spool.jobs():
            if one.state == "failed":
                told = (daemon.spool.failed / one.job / ERROR).read_text()
                assert clear(told.partition("\n\n")[0]), f"{one.spec}: {told}\n{specs[one.spec]!r}"
        assert ended()["job-0.yaml"] == "done", "the sound one"
        return Counter(ended().values())


def _job(models: Path, number: int, chance: random.Random) -> bytes:
    """A mutated spec on sound models, or a sound spec on a mutated model; both are sound in the first job."""
    entries = [{"model": name, "parameters": {"weight": 0.5}} for name in ("model", f"bad-{number}")]
    shutil.copytree(models / "model", models / f"bad-{number}")
    sound = {"merge_method": "linear", "models": entries, "tokenizer_source": "union", "run": {"force": True}}
    if number == 0:
        return json.dumps(sound).encode()
    kind = chance.choice(["spec", "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
    if kind != "spec":
        file = models / f"bad-{number}" / kind
        file.write_bytes(mutated(file.read_bytes(), chance))
        return json.dumps(sound).encode()
    text = chance.choice([*seeds("spec"), json.dumps(sound).encode(), yaml.safe_dump(sound).encode()])
    return mutated(text, chance)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.spool")
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        print(dict(fuzz(Path(work), options.jobs, options.seed, 60.0 + 20 * options.jobs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
