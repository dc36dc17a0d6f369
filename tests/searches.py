"""A search whose optimum is known, for tests: three tiny models, a spec, and a scorer that is a real program.

The score is the distance of one tensor of the candidate to a mix of the models, so the best weights are those of the
mix. The scorer writes down each call, and waits while a file `hold` lies beside it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from tests.models import LLAMA, llama, moved, write_model

WEIGHTS = ("models.0.parameters.weight", "models.1.parameters.weight")
OPTIMUM = (0.7, 0.2)

SCORER = """
import json, math, os, struct, sys, time
here = os.path.dirname(os.path.abspath(__file__))
def tensor(model):
    with open(os.path.join(model, "model.safetensors"), "rb") as file:
        data = file.read()
    size = struct.unpack("<Q", data[:8])[0]
    first, last = json.loads(data[8 : 8 + size])["model.norm.weight"]["data_offsets"]
    return struct.unpack(f"<{(last - first) // 4}f", data[8 + size + first : 8 + size + last])
base, near, far = (tensor(os.path.join(here, "models", name)) for name in ("base", "near", "far"))
target = [b + 0.7 * (n - b) + 0.2 * (f - b) for b, n, f in zip(base, near, far)]
score = math.dist(tensor(sys.argv[1]), target)
with open(os.path.join(here, "calls"), "a") as file:
    file.write(f"{score!r}\\n")
while os.path.exists(os.path.join(here, "hold")):
    with open(os.path.join(here, "holding"), "w") as file:
        file.write(str(os.getpid()))
    os.replace(os.path.join(here, "holding"), os.path.join(here, "held"))
    time.sleep(0.02)
print("distance", SCORE)
"""


def write_search(folder: Path, *, score: str = "score", **evolve: Any) -> Path:
    """Writes models, scorer and spec into `folder`; the spec's path. `score`: what the scorer prints of its `score`."""
    base = llama(layers=1, hidden=8, vocabulary=12, dtype=torch.float32)
    write_model(folder / "models" / "base", base, LLAMA)
    for seed, name in enumerate(("near", "far"), 2):
        write_model(folder / "models" / name, moved(base, 1e-2, seed), LLAMA)
    (folder / "score.py").write_text(SCORER.replace("SCORE", score))
    spec = folder / "search.json"
    spec.write_text(json.dumps(search_dict(folder, **evolve), indent=1))
    return spec


def search_dict(folder: Path, **evolve: Any) -> dict[str, Any]:
    """The spec: task arithmetic over two weights, 3 generations of 4 if not told otherwise."""
    command = f"{sys.executable} -I -S {folder}/score.py {{model}}"
    search = {
        "parameters": {path: [0.0, 1.5] for path in WEIGHTS},
        "score": {"command": command},
        "population": 4,
        "generations": 3,
        **evolve,
    }
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "models" / "base"),
        "models": [{"model": str(folder / "models" / name)} for name in ("near", "far")],
        "evolve": search,
        "run": {"device": "cpu", "threads": 1},
    }


def calls(folder: Path) -> list[float]:
    """The scores that the scorer was asked for, in order."""
    path = folder / "calls"
    return [float(line) for line in path.read_text().splitlines()] if path.exists() else []


def history(out: Path) -> bytes:
    """The table of a search beside its result."""
    return (out / "evolve.csv").read_bytes()


def exists(process: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return "(Z" not in (state := Path(f"/proc/{process}/stat").read_text()) and " Z " not in state
    except OSError:
        return False


def hold(folder: Path) -> Path:
    """From now on the scorer waits; the file that tells that it does, with its process: it is there whole or not."""
    (folder / "held").unlink(missing_ok=True)
    (folder / "hold").touch()
    return folder / "held"


def release(folder: Path) -> None:
    """The scorer goes on."""
    for name in ("hold", "held"):
        if (folder / name).exists():
            os.unlink(folder / name)
