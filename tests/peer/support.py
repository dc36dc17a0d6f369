"""mergekit beside us: the same spec file through both programs, and how far apart the results are."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import mergecore
from tests.models import LLAMA, load_tensors

PYTHON = os.environ.get("MERGEKIT_PYTHON")
Tensors = dict[str, Tensor]
CONFIG = LLAMA | {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 80,
    "torch_dtype": "float32",
}


class MergekitError(Exception):
    """mergekit stopped; the message is its traceback."""


class Mergekit:
    """mergekit's commands, in one process of its interpreter: starting one takes longer than any merge here."""

    def __init__(self, python: str) -> None:
        self._process = subprocess.Popen(
            [python, str(Path(__file__).with_name("mergekit_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )

    def ask(self, command: str, *arguments: str | Path) -> Any:
        """`yaml` and `multi` (the arguments of mergekit-yaml and mergekit-multi), `cd FOLDER` or `describe`."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        print(json.dumps([command, *map(str, arguments)]), file=stdin, flush=True)
        line = stdout.readline()
        assert line, "mergekit's process ended"
        answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            raise MergekitError(answer["error"])
        return answer

    def merge(self, file: Path, out: Path, *options: str) -> Tensors:
        self.ask("yaml", file, out, "--quiet", *options)
        return load_tensors(out)

    def close(self) -> None:
        self._process.communicate()


def config(method: str, *names: str, base: str | None = None, weights: tuple[float, ...] = (), **keys: Any) -> Any:
    """A spec of models @NAME, `keys` its parameters."""
    entries: list[dict[str, Any]] = [{"model": f"@{name}"} for name in names]
    for entry, weight in zip(entries, weights, strict=False):
        entry["parameters"] = {"weight": weight}
    found: dict[str, Any] = {"merge_method": method, "models": entries, "dtype": "float32"}
    if base is not None:
        found["base_model"] = f"@{base}"
    return found | ({"parameters": keys} if keys else {})


def write_spec(spec: Mapping[str, Any] | str, models: Mapping[str, Path], file: Path) -> Path:
    """The spec in a file, with the models' paths where it says @NAME."""
    text = spec if isinstance(spec, str) else yaml.safe_dump(dict(spec))
    for name in sorted(models, key=len, reverse=True):
        text = text.replace(f"@{name}", str(models[name]))
    file.write_text(text)
    return file


def both(
    mergekit: Mergekit, spec: Mapping[str, Any] | str, models: Mapping[str, Path], folder: Path, *options: str
) -> tuple[Tensors, Tensors]:
    """What mergekit (folder/theirs) and mergecore (folder/ours) make of one file (folder/config.yml)."""
    file = write_spec(spec, models, folder / "config.yml")
    theirs = mergekit.merge(file, folder / "theirs", "--no-copy-tokenizer", *options)
    mergecore.merge(file, folder / "ours", device="cpu")
    return theirs, load_tensors(folder / "ours")


def moved(base: Tensors, scale: float, seed: int) -> Tensors:
    random = torch.Generator().manual_seed(seed)
    return {name: v + scale * torch.randn(v.shape, generator=random) for name, v in base.items()}


def distance(theirs: Tensors, ours: Tensors) -> float:
    """The largest difference of an entry, relative to its tensor's largest; both float32, with the same names."""
    assert set(theirs) == set(ours)
    assert all(theirs[name].dtype == ours[name].dtype == torch.float32 for name in ours)
    return max(
        float((theirs[name] - ours[name]).abs().max() / theirs[name].abs().max().clamp(min=1e-30)) for name in theirs
    )
